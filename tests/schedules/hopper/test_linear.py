"""FP8 and mixed linears: the references, what the schedules accept, and their cubins."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dsv4c.ops import OPS
from dsv4c.ops.formats import dequantise_blocks, dequantise_rows
from dsv4c.ops.linears import grouped_linear_fp8, linear_fp8, linear_mixed
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Schedule, Value
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.hopper.linear import SCHEDULES
from dsv4c.schedules.workloads.linear import workloads

ALL = {(w.op, w.label): w for w in workloads()}


def find(label: str) -> Workload:
    return next(w for w in ALL.values() if w.label == label)


def inputs(label: str) -> list[torch.Tensor]:
    generator = torch.Generator()
    generator.manual_seed(3)
    return [t for t in find(label).make(generator) if t is not None]


def schedule(name: str) -> Schedule:
    return next(s for s in SCHEDULES if s.name == name)


def test_an_fp8_linear_is_the_product_of_what_its_bytes_stand_for() -> None:
    data, scale, weight, weight_scale = inputs("nano wq_a+wkv decode 3")
    assert weight.shape[0] % 128, "the last block of rows is a partial one"
    exact = dequantise_rows(data, scale).double() @ dequantise_blocks(weight, weight_scale).double().T
    out = linear_fp8(data, scale, weight, weight_scale)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_group_sees_its_own_rows_alone() -> None:
    data, scale, weight, weight_scale = inputs("nano wo_a decode 3")
    out = grouped_linear_fp8(data, scale, weight, weight_scale, groups=2)
    parts = [linear_fp8(data[:, g], scale[:, g], weight[g * 128 :][:128], weight_scale[g : g + 1]) for g in range(2)]
    torch.testing.assert_close(out, torch.cat(parts, 1), rtol=2**-8, atol=1e-6)


def test_mixed_sums_stay_float32() -> None:
    x, weight = inputs("nano gate decode 3")
    torch.testing.assert_close(linear_mixed(x, weight).double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_workloads_and_their_references_match_the_ops() -> None:
    for work in ALL.values():
        if not work.label.startswith("nano") or work.symbols["T"] not in (0, 3):
            continue
        tensors = inputs(work.label)
        for value, tensor in zip(work.node.inputs, tensors, strict=True):
            assert value is not None
            assert tuple(tensor.shape) == value.sizes(work.symbols) and str(tensor.dtype) == f"torch.{value.dtype}"
        out = (work.reference or OPS[work.op].reference)(*tensors, **work.node.attrs)
        assert tuple(out.shape) == work.node.outputs[0].sizes(work.symbols)
        if work.symbols["T"]:
            expected = OPS[work.op].reference(*tensors, **work.node.attrs)
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-5)


def test_every_shape_has_a_kernel_and_refusals_name_the_reason() -> None:
    for work in ALL.values():
        taking = [s for s in SCHEDULES if s.op == work.op and s.accepts(work.node) is None]
        assert any("gluon" in s.name for s in taking), work.label
        for one in taking:
            assert 1 <= len(one.space(work.node, work.symbols)) <= 6
    node = find("flash wo_b decode 1").node
    strided = dataclasses.replace(
        node, inputs=(Value(("T", 8192), "float8_e4m3fn", strides=(9000, 1)), *node.inputs[1:])
    )
    assert schedule("linear_fp8.gluon_few").accepts(strided) == "x is strided"
    nano = find("nano wo_b decode 1").node
    assert "multiple of 512" in (schedule("linear_fp8.gluon_many").accepts(nano) or "")
    assert "multiple of 16 x 512" in (schedule("linear_fp8.aten").accepts(nano) or "")


def compiled(name: str, label: str, folder: Path) -> tuple[Compiled, TritonLaunch, str]:
    triton = pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    work, one = find(label), schedule(name)
    config = one.space(work.node, work.symbols)[0]
    (launch,) = one.build(work.node, config).launches
    assert isinstance(launch, TritonLaunch)
    made = compile_launch(Request(label, launch, (*work.node.inputs, *work.node.outputs), "sm_90a"), folder)
    (folder / "k.cubin").write_bytes(made.image)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    run = subprocess.run([str(tool), "-c", str(folder / "k.cubin")], capture_output=True, text=True, check=True)
    return made, launch, run.stdout


def test_few_tokens_split_a_narrow_weight_over_a_cluster(tmp_path: Path) -> None:
    made, launch, text = compiled("linear_fp8.gluon_few", "flash wq_a+wkv decode 1", tmp_path)
    assert launch.pdl and made.record.cluster == (8, 1, 1) and not made.spills
    assert len(re.findall(r"\bQGMMA\.64x16x32", text)) == 8  # 2 x 64 rows, 4 x 32 channels
    assert "UTMALDG" in text and "ACQBULK" in text  # tensor-map copies; the wait for the kernel in front
    # weights are asked for before that wait, tokens behind it
    assert text.index("UTMALDG") < text.index("ACQBULK") < text.rindex("UTMALDG")


def test_many_tokens_keep_products_in_flight(tmp_path: Path) -> None:
    made, _, text = compiled("linear_fp8.gluon_many", "flash wo_b prefill 8192", tmp_path)
    assert not made.spills and made.record.threads == 384
    products = len(re.findall(r"\bQGMMA\.64x128x32", text))
    assert products == 32  # two warp groups, 4 blocks of 128 channels
    # one fence and one wait a block: a compiler that gives up overlap puts them around every product
    assert len(re.findall(r"\bWARPGROUP\.ARRIVE", text)) == products // 4


def test_mixed_products_do_not_wait_for_each_other(tmp_path: Path) -> None:
    made, _, text = compiled("linear_mixed.gluon_many", "flash csa_compress prefill 8192", tmp_path)
    assert not made.spills and "HGMMA.64x128x16.F32.BF16" in text
