"""Experts on FP4 weights: the reference beside the plain model's, stored layouts, the sort, and the cubins."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.model.moe import experts
from dsv4c.ops import OPS
from dsv4c.ops.formats import dequantise_fp4
from dsv4c.runtime import layouts
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Value, apply_layout
from dsv4c.schedules.hopper.experts import SCHEDULES
from dsv4c.schedules.workloads.experts import make, node, workloads

SCHEDULE = SCHEDULES[0]
SIZES = (1, 4, 64, 256, 1024, 2048, 4096, 8192)


def test_the_reference_is_the_plain_op_on_dequantised_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    what = node("nano")
    x, chosen, weight, *packed, shared = (t for t in make(what, 9, "skewed", generator) if t is not None)
    w1, w3, w2 = (dequantise_fp4(packed[i], packed[i + 1]) for i in (0, 2, 4))
    expected = experts(x.float(), chosen.long(), weight, w1, w3, w2, shared.float(), limit=10.0)
    out = OPS["experts_fp4"](x.float(), chosen, weight, *packed, shared.float(), limit=10.0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert OPS["experts_fp4"](x, chosen, weight, *packed, shared, limit=10.0).dtype == torch.bfloat16


def test_a_layout_puts_a_threads_scale_group_into_16_bytes() -> None:
    """Position p of hidden is channel 32 t + 8 q + 4 c + 2 j + h; w2's rows 8 apart are halves of a fragment."""
    dim, inner = 256, 128
    what = OpNode("experts_fp4", {}, node("nano").inputs, ())
    generator = torch.Generator().manual_seed(1)
    sizes = [v.sizes({}) for v in what.inputs[3:9] if v]
    stored = [torch.randint(0, 129, size, generator=generator, dtype=torch.uint8) for size in sizes]
    found = {i + 3: layouts.apply(t, SCHEDULE.layouts(what)[i + 3]) for i, t in enumerate(stored)}
    position = torch.arange(128)
    q, j, h, t, c = ((position // s) % n for s, n in ((32, 4), (16, 2), (8, 2), (2, 4), (1, 2)))
    channel = 32 * t + 8 * q + 4 * c + 2 * j + h
    experts_ = stored[0].shape[0]
    data = found[3].view(experts_, inner // 32, dim // 128, 4, 8, 4, 16)
    scale = found[4].view(experts_, inner // 32, dim // 128, 4, 8, 4)
    for p in (0, 1, 9, 37, 127):
        at: tuple[int, ...] = (3, p // 32, 1, p % 32 // 8, p % 8, 2)
        assert torch.equal(data[at], stored[0][3, channel[p], 64 + 32 : 64 + 48])
        assert scale[at] == stored[1][3, channel[p], 4 + 2]
    data = found[7].view(experts_, dim // 64, 2, 1, 4, 8, 4, 16)
    for row in (0, 7, 8, 100, 255):
        at = (2, row // 64, row % 16 // 8, 0, row % 64 // 16, row % 8, 3)
        assert torch.equal(data[at], stored[4][2, row, 48:64])
    for i, value in enumerate(what.inputs[3:9]):
        assert value is not None
        assert apply_layout(value, SCHEDULE.layouts(what)[i + 3]).shape == value.shape


def test_dequantising_by_bits_is_exact() -> None:
    """The kernel's steps in integers: mask, multiply, mask, then a bfloat16 product with 2 ** (scale - 1)."""
    code = torch.arange(16)
    pattern = (code * 0x1040) & 0x81C0
    assert torch.equal(pattern, ((code << 4) * 0x104) & 0x81C0)  # the second nibble of a byte
    tiny = pattern.to(torch.int32).bitwise_left_shift(16).view(torch.float32).double()
    value = dequantise_fp4((code % 16).to(torch.uint8).view(16, 1), torch.full((16, 1), 127, dtype=torch.uint8))[:, 0]
    for scale in (0, 1, 100, 127, 128):
        factor = torch.tensor((scale * 0x80 + 0x3F00) << 16, dtype=torch.int32).view(torch.float32).double()
        assert torch.equal(tiny * factor, value.double() * 2.0 ** (scale - 127))


def test_it_says_what_it_does_not_take() -> None:
    good = node("flash")
    assert SCHEDULE.accepts(good) is None and SCHEDULE.accepts(node("pro")) is None

    def changed(index: int, **changes: Any) -> str | None:
        inputs = list(good.inputs)
        value = inputs[index]
        assert value is not None
        inputs[index] = dataclasses.replace(value, **changes)
        return SCHEDULE.accepts(dataclasses.replace(good, inputs=tuple(inputs)))

    assert "float32" in str(changed(0, dtype="float32"))
    assert "multiples" in str(changed(0, shape=("T", 4000)))
    assert "strided" in str(changed(0, strides=(8192, 1)))
    assert "experts" in str(changed(3, shape=(2048, 2048, 2048)))


@pytest.mark.parametrize("model", ["flash", "pro", "nano"])
def test_every_size_has_configs_and_a_cost(model: str) -> None:
    what = node(model)
    last = 0.0
    for tokens in SIZES:
        space = SCHEDULE.space(what, {"T": tokens})
        assert 0 < len(space) <= 12
        moved = SCHEDULE.cost(what, {"T": tokens}, space[0]).bytes_moved
        assert moved > last
        last = moved


def test_workloads_cover_empty_batches_and_skew() -> None:
    labels = {w.label for w in workloads()}
    assert {"nano decode 0", "flash decode 1", "flash prefill 8192", "nano prefill 500 one"} <= labels


def test_the_sort_is_right() -> None:
    """Order, places, tiles and gathered rows, beside torch's stable sort, in the interpreter."""
    script = Path(__file__).with_name("interpret_sort.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("ok") for line in lines), result.stdout + result.stderr


def _code(launch: TritonLaunch, values: tuple[Value | None, ...], folder: Path) -> tuple[int, list[str]]:
    import triton

    compiled = compile_launch(Request("experts", launch, values, "sm_90a"), folder)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (folder / "image").write_bytes(compiled.image)
    text = subprocess.run([str(tool), "-c", str(folder / "image")], capture_output=True, text=True, check=True).stdout
    return compiled.spills, text.splitlines()


@pytest.mark.parametrize("tokens", [1, 8192])
def test_products_run_beside_the_next_fragment(tokens: int, tmp_path: Path) -> None:
    """wgmma with A in registers, four to a group: one a group would mean that the assembler waits after each."""
    what = node("flash")
    config = SCHEDULE.space(what, {"T": tokens})[0]
    values = (*what.inputs, *SCHEDULE.workspace(what, config), *what.outputs)
    launches = [launch for launch in SCHEDULE.build(what, config).launches if isinstance(launch, TritonLaunch)]
    gemms = [launch for launch in launches if launch.kernel.endswith(":grouped_gemm")]
    assert len(gemms) == 2 and len(launches) == (4 if config["sort"] else 5)
    for gemm in gemms:
        spills, lines = _code(gemm, values, tmp_path)
        products = [line for line in lines if "HGMMA" in line]
        assert products and all(re.search(r"R\d+, R\d+, gdesc", line) for line in products)
        assert 4 * sum("gsb0" in line for line in products) == len(products)
        assert spills <= 32  # bytes a thread, outside the loops


def test_small_kernels_build_and_move_16_bytes_a_thread(tmp_path: Path) -> None:
    what = node("pro")
    for tokens in (8, 8192):
        config = SCHEDULE.space(what, {"T": tokens})[0]
        values = (*what.inputs, *SCHEDULE.workspace(what, config), *what.outputs)
        for launch in SCHEDULE.build(what, config).launches:
            assert isinstance(launch, TritonLaunch)
            if launch.kernel.endswith(":grouped_gemm"):
                continue
            spills, lines = _code(launch, values, tmp_path)
            assert spills == 0
            if not launch.kernel.endswith(":sort_pairs"):
                assert any("LDG.E.128" in line for line in lines) and any("STG.E.128" in line for line in lines)
