"""Compressors: chunks against whole prompts, rings against running softmax, cubins, and programs in any order."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.model.compressor import compress
from dsv4c.ops import OPS
from dsv4c.ops.compress import compress_online_pack, compress_pack, running_softmax
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._schedule import Schedule, Value
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.hopper.compress import SCHEDULES
from dsv4c.schedules.select import choose
from dsv4c.schedules.workloads.compress import Case, Kind, error, make, node, ragged, workload, workloads
from tests.schedules.hopper.test_rows import interpret

KINDS: tuple[Kind, ...] = ("c4", "index fp8", "index fp4", "c128")
# arguments of the op: what a chunk takes its rows of, and what the step before it leaves
K_GATE, POOL, SLOTS = 0, -8, -7


def call(kind: Kind, *spans: tuple[int, int], seed: int = 3) -> tuple[Case, list[Tensor]]:
    case = Case("nano", kind, spans, "test")
    generator = torch.Generator()
    generator.manual_seed(seed)
    return case, [t for t in make(case, generator) if t is not None]


def run(case: Case, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    op = node(case)
    result: tuple[Tensor, ...] = OPS[op.op](*tensors, **op.attrs)
    return result


def in_chunks(case: Case, whole: list[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The results of one request's prompt, computed chunk by chunk."""
    held = 1 if case.kind == "online" else 2
    state, pool = list(whole[2 : 2 + held]), whole[POOL]
    positions, ends = whole[-6], whole[-1]
    at = 0
    for length in lengths:
        end = at + length
        finished = torch.nonzero((ends >= at) & (ends < end)).squeeze(1)
        tensors = list(whole)
        tensors[K_GATE] = whole[K_GATE][at:end]
        tensors[2 : 2 + held] = state
        tensors[POOL - 1] = whole[POOL - 1][finished]
        tensors[POOL], tensors[SLOTS] = pool, whole[SLOTS][finished]
        tensors[-6], tensors[-5] = positions[at:end], whole[-5][at:end]
        tensors[-4], tensors[-3] = torch.tensor([at]), torch.tensor([end])
        tensors[-1] = ends[finished] - at
        *state, pool = run(case, tensors)
        at = end
    return (*state, pool)


@pytest.mark.parametrize("kind", [*KINDS, "online"])
@pytest.mark.parametrize("lengths", [(300,), (1,) * 9 + (127, 128, 36), (3, 4, 5, 255, 33), (129, 1, 170)])
def test_chunks_leave_what_the_whole_prompt_leaves(kind: Kind, lengths: tuple[int, ...]) -> None:
    case, whole = call(kind, (0, 300))
    assert sum(lengths) == 300
    assert error(case, in_chunks(case, whole, lengths), run(case, whole)) < (2e-3 if kind == "online" else 1e-9)


def test_the_running_softmax_gives_the_rings_entries() -> None:
    case, whole = call("c128", (0, 700))
    online = dataclasses.replace(case, kind="online")
    state = torch.zeros(3, 3, case.dim)
    attrs = dict(node(online).attrs)
    after, pool = compress_online_pack(whole[0], whole[1], state, *whole[4:], **attrs)
    rings = compress_pack(*whole, **node(case).attrs)
    assert error(online, (after, pool), (after, rings[-1])) < 2e-3
    slot = int(whole[-2][0])
    ring_k, ring_z = rings[0][slot, : 700 % 128], rings[1][slot, : 700 % 128]  # the unfinished window
    weight = torch.exp(ring_z - ring_z.amax(0))
    expected = torch.stack((ring_z.amax(0), weight.sum(0), (weight * ring_k).sum(0)))
    assert torch.allclose(after[slot], expected, rtol=1e-5, atol=1e-6)


def test_the_running_softmax_of_a_finished_window_is_the_models_entry() -> None:
    case, whole = call("c128", (5, 300), (128, 1), (0, 128))
    k_gate, ape, ring_k, ring_z, *_, positions, rows, starts, ends_, slots, ends = whole
    k, gate = k_gate.chunk(2, -1)
    entries, _, _ = compress(
        k, gate, ape, ring_k, ring_z, positions, rows, starts, ends_, slots, ends, ratio=128, overlap=False
    )
    fresh = starts[rows[ends]] <= positions[ends] - 127
    state = running_softmax(
        k, gate + ape[positions % 128], torch.zeros(5, 3, case.dim), ends, positions, rows, starts, slots, ratio=128
    )
    assert torch.allclose((state[:, 2] / state[:, 1])[fresh], entries[fresh], rtol=1e-5, atol=1e-6)


def test_what_a_graph_leaves_unused_changes_nothing() -> None:
    for kind in (*KINDS, "online"):
        case, whole = call(kind, (3, 9), (126, 3))
        held = 1 if kind == "online" else 2
        padded = list(whole)
        for index, value in ((K_GATE, 1.0), (-6, 0), (-5, 2)):  # two tokens of a third request in the null slot
            row = torch.full_like(whole[index][:1], value)
            padded[index] = torch.cat((whole[index], row, row))
        for index in (-4, -3, -2):
            padded[index] = torch.cat((whole[index], torch.zeros(1, dtype=torch.int64)))
        for index, value in ((POOL - 1, 0.0), (SLOTS, 0), (-1, -1)):
            row = torch.full_like(
                torch.cat((whole[index], whole[index].new_zeros(1, *whole[index].shape[1:])))[:1], value
            )
            padded[index] = torch.cat((whole[index], row))
        assert error(case, run(case, padded), run(case, whole)) == 0, kind
        assert held == len(run(case, whole)) - 1


def schedules_for(work: Workload) -> list[Schedule]:
    return [s for s in SCHEDULES if s.op == work.op and s.accepts(work.node) is None]


@pytest.mark.parametrize("work", workloads(), ids=lambda w: w.label)
def test_every_workload_is_accepted_and_has_configs(work: Workload) -> None:
    found = schedules_for(work)
    assert len(found) == (2 if work.op == "compress_pack" and not work.node.attrs["overlap"] else 1)
    for schedule in found:
        configs = schedule.space(work.node, work.symbols)
        assert 0 < len(configs) <= 6 and len({str(c) for c in configs}) == len(configs)
        for config in configs:
            launches = schedule.build(work.node, config).launches
            assert len(launches) == (2 if schedule.name.endswith("slices") else 1)
            assert launches[0].constants["BT"] >= launches[0].constants.get("SUB", 1)


def refusal(work: Workload, name: str, **fields: object) -> str:
    values = list(work.node.inputs)
    index = {"k_gate": 0, "ape": 1, "norm_weight": 4}[name]
    value = values[index]
    assert isinstance(value, Value)
    values[index] = dataclasses.replace(value, **fields)  # type: ignore[arg-type]
    changed = dataclasses.replace(work.node, inputs=tuple(values))
    return " / ".join(str(s.accepts(changed)) for s in SCHEDULES if s.op == work.op)


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    c4 = workload(Case("flash", "c4", ((0, 8),), "test"))
    assert "entries of 384 channels" in refusal(c4, "norm_weight", shape=(384,))
    assert "projected rows of 1000" in refusal(c4, "k_gate", shape=("T", 1000))
    assert "neither float32 nor bfloat16" in refusal(c4, "k_gate", dtype="float16")
    assert "do not start at multiples of 16 bytes" in refusal(c4, "k_gate", strides=(2050, 1))
    assert "ape or norm weight that are not float32" in refusal(c4, "ape", dtype="bfloat16")
    many = dataclasses.replace(c4.node, attrs={**c4.node.attrs, "ratio": 16})
    assert "up to 8 tokens" in str(SCHEDULES[0].accepts(many))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("kind", [*KINDS, "online"])
@pytest.mark.parametrize("tokens", [64, 8192])
def test_a_kernel_spills_next_to_nothing(kind: Kind, tokens: int, cache: Path) -> None:
    work = workload(Case("flash", kind, ((0, tokens),), "test"))
    schedule = schedules_for(work)[0]
    choice = choose(schedule, work.node, "sm_90a", work.symbols, "test")
    (launch,) = choice.build.launches
    made = compile_launch(Request(work.op, launch, choice.inputs, "sm_90a"), cache)
    assert made.spills < 128  # a cap on registers that lets another block in was measured to pay
    assert made.record.cluster[0] == choice.config.get("ctas", 1)


def test_programs_may_run_in_any_order() -> None:
    """The interpreter runs the programs of a launch first to last and last to first; both must be right."""
    lines = interpret("compress", "nano c4 short", "nano index fp4 short", "nano c128 short", "nano online short")
    assert len(lines) == 5 and all(line.startswith("ok") for line in lines)


def test_ragged_batches_cover_every_start_and_length() -> None:
    lengths = (1, 3, 4, 5, 127, 128, 129, 255)
    assert set(ragged(128, 0)) == set(itertools.product(range(128), lengths))
    assert {start % 8 for start, _ in ragged(4, 1280)} == set(range(8))
