"""Row ops: the references beside the plain model's, what the schedules accept, their cubins, and their arithmetic."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.model.norm import rms_norm
from dsv4c.model.quant import power_of_two_ceil, quantise_kv
from dsv4c.model.rope import rope
from dsv4c.ops import OPS
from dsv4c.ops.formats import dequantise_rows, kv_group, kv_sizes, quantise_rows, read_entries, unpack_kv
from dsv4c.ops.rows import norm_rope_pack, qkv_norm_rope_pack, rms_norm_quantise, rope_quantise, swiglu_quantise
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._schedule import Schedule, Value
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.hopper.rows import SCHEDULES
from dsv4c.schedules.select import choose
from dsv4c.schedules.workloads.rows import Draw, e4m3_apart, kv_error, workload, workloads

REPOSITORY = Path(__file__).parents[3]
FUSED = ("norm_rope_pack", "qkv_norm_rope_pack", "rms_norm_quantise", "head_norm_rope", "rope_quantise",
         "quantise_rows", "rms_norm", "swiglu_quantise", "swiglu_pair")  # fmt: skip


def inputs(op: str, tokens: int, seed: int = 5) -> tuple[Workload, list[Tensor]]:
    work = workload(op, "nano", tokens)
    generator = torch.Generator()
    generator.manual_seed(seed)
    return work, [t for t in work.make(generator) if t is not None]


def schedule_of(op: str) -> Schedule:
    return next(s for s in SCHEDULES if s.op == op)


def test_a_packed_window_entry_is_the_models_fake_quantised_one() -> None:
    work, (pool, slots, x, weight, table) = inputs("norm_rope_pack", 9)
    attrs = work.node.attrs
    out = norm_rope_pack(pool, slots, x, weight, table, **attrs)
    dim, rotated = x.shape[1], table.shape[1]
    data, scales = read_entries(out, slots, kv_sizes(dim, rotated)[0], entries_per_page=attrs["entries_per_page"])
    entries = rope(rms_norm(x, weight, eps=attrs["eps"]), table, inverse=False)
    group = kv_group(dim, rotated)
    assert torch.equal(unpack_kv(data, scales, rotated), quantise_kv(entries, rope_dim=rotated, group=group).float())
    others = torch.ones(len(pool), dtype=torch.bool)
    others[slots] = False
    pages = [read_entries(p, torch.nonzero(others)[:, 0], 96, entries_per_page=64) for p in (pool, out)]
    assert all(torch.equal(a, b) for a, b in zip(*pages, strict=True))


def test_the_joint_op_is_the_two_it_joins() -> None:
    work, (pool, slots, x, q_weight, kv_weight, table) = inputs("qkv_norm_rope_pack", 9)
    attrs = dict(work.node.attrs)
    after, data, scale = qkv_norm_rope_pack(pool, slots, x, q_weight, kv_weight, table, **attrs)
    group = attrs.pop("group")
    latent, kv = x.split([len(q_weight), len(kv_weight)], -1)
    assert torch.equal(after, norm_rope_pack(pool, slots, kv, kv_weight, table, **attrs))
    again = rms_norm_quantise(latent, q_weight, eps=attrs["eps"], group=group)
    assert torch.equal(data.float(), again[0].float()) and torch.equal(scale, again[1])


def test_rotated_outputs_are_quantised_group_by_group() -> None:
    work, (o, table) = inputs("rope_quantise", 6)
    data, scale = rope_quantise(o, table, **work.node.attrs)
    assert data.shape == (6, 2, 256) and scale.shape == (6, 2, 2)
    wide = dequantise_rows(data, scale).flatten(1)
    exact = rope(o, table, inverse=True).float().flatten(1)
    step = 2.0**-4 * exact.abs() + 2.0**-9 * scale.flatten(1).repeat_interleave(128, 1)
    assert ((wide - exact).abs() <= step).all()


def test_gated_rows_are_rounded_before_they_are_quantised() -> None:
    work, (gate_up,) = inputs("swiglu_quantise", 6)
    limit = work.node.attrs["limit"]
    data, scale = swiglu_quantise(gate_up, **work.node.attrs)
    gated = OPS["swiglu_pair"](gate_up, limit=limit)
    assert gated.dtype == torch.bfloat16
    again = quantise_rows(gated, group=128)
    assert torch.equal(data.float(), again[0].float()) and torch.equal(scale, again[1])


def test_scales_from_bits_are_those_of_the_reference() -> None:
    """What the kernels do with an amax that bfloat16 holds, for every one: e4m3_byte and e2m1_byte of rows.py."""
    amax = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    for least, top, carry, shift in ((1e-4, 448, 0x1FFFFF, 8), (6 * 2.0**-126, 6, 0x3FFFFF, 2)):
        amax = amax.clamp(min=least)
        byte = ((amax.view(torch.int32) + carry) >> 23) - shift
        assert torch.equal((byte << 23).view(torch.float32), power_of_two_ceil(amax / top))
        assert torch.equal(((254 - byte) << 23).view(torch.float32), 1 / power_of_two_ceil(amax / top))


def test_an_error_is_the_share_of_bytes_that_fell_to_their_neighbour() -> None:
    x = Draw(torch.Generator().manual_seed(1)).rows(4, 256)
    data, scale = quantise_rows(x, group=128)
    assert e4m3_apart(data, scale, data, scale) == 0
    near = data.view(torch.uint8).clone()
    near[0, 0] ^= 1
    assert e4m3_apart(near.view(torch.float8_e4m3fn), scale, data, scale) == 1
    near[0, 0] ^= 3
    assert e4m3_apart(near.view(torch.float8_e4m3fn), scale, data, scale) == float("inf")
    work, (pool, *rest) = inputs("norm_rope_pack", 3)
    ref = norm_rope_pack(pool, *rest, **work.node.attrs)
    sizes = {"head_dim": 64, "rope_dim": 32, "entries_per_page": 64, "written": 3}
    free = ref.clone()
    free.view(-1)[: 64 * 104] = 1  # the null page
    assert kv_error(free, ref, **sizes) == 0 and kv_error(pool, ref, **sizes) == float("inf")


@pytest.mark.parametrize("work", workloads(), ids=lambda w: f"{w.op} {w.label}")
def test_every_workload_is_accepted_and_has_configs(work: Workload) -> None:
    schedule = schedule_of(work.op)
    assert schedule.accepts(work.node) is None
    configs = schedule.space(work.node, work.symbols)
    assert 0 < len(configs) <= 12 and len({str(c) for c in configs}) == len(configs)
    for config in configs:
        assert len(schedule.build(work.node, config).launches) == 1


def changed(work: Workload, index: int, **fields: object) -> str | None:
    values = list(work.node.inputs)
    value = values[index]
    assert isinstance(value, Value)
    values[index] = dataclasses.replace(value, **fields)  # type: ignore[arg-type]
    return schedule_of(work.op).accepts(dataclasses.replace(work.node, inputs=tuple(values)))


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    pack, heads, rows = (workload(op, "flash", 64) for op in ("norm_rope_pack", "head_norm_rope", "quantise_rows"))
    assert changed(rows, 0, dtype="float32") == "input 0 is float32, written for bfloat16"
    assert changed(rows, 0, strides=(4096, 2)) == "input 0 is strided within its rows"
    assert changed(rows, 0, strides=(4100, 1)) == "rows of input 0 do not start at multiples of 16 bytes"
    assert "groups of 128 in rows of 100" in str(changed(rows, 0, shape=("T", 100)))
    assert "rows of more than one dimension" in str(changed(rows, 0, shape=("T", 4, 1024)))
    assert "heads of 48 channels" in str(changed(heads, 0, shape=("T", 64 * 48)))
    assert "entries of 96 channels" in str(changed(pack, 3, shape=(96,)))
    assert changed(pack, 1, dtype="int32") == "input 1 is int32, written for int64"
    narrow = dataclasses.replace(rows.node, attrs={"group": 64})
    assert "written for whole groups of 128" in str(schedule_of("quantise_rows").accepts(narrow))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    return tmp_path_factory.mktemp("kernels")


def compiled(work: Workload, cache: Path) -> Compiled:
    schedule = schedule_of(work.op)
    choice = choose(schedule, work.node, "sm_90a", work.symbols, "test", schedule.space(work.node, work.symbols)[0])
    (launch,) = choice.build.launches
    return compile_launch(Request(work.op, launch, (*choice.inputs, *work.node.outputs), "sm_90a"), cache)


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("model", ["flash", "nano"])
def test_a_kernel_spills_nothing(op: str, model: str, cache: Path) -> None:
    made = compiled(workload(op, model, 8192 if model == "flash" else 65), cache)
    assert made.spills == 0 and 0 < made.record.registers <= 128


def interpret(*arguments: str) -> Sequence[str]:
    """The lines of the interpreter's report; fails with it if a candidate is wrong."""
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", "tests.schedules.hopper.interpret", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_kernels_give_the_references_bytes_in_the_interpreter() -> None:
    lines = interpret("rows", "nano decode 65")
    assert len(lines) == len(FUSED) + 7 and all(line.startswith("ok") for line in lines)
