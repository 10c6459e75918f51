"""Attention over packed pools: the references beside the plain model's, what the schedules accept, and their cubins."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.model.attention import attend_csa, attend_hca, attend_window
from dsv4c.ops import OPS
from dsv4c.ops.formats import kv_sizes, read_entries, unpack_kv
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Value
from dsv4c.schedules.hopper.attention import SCHEDULES
from dsv4c.schedules.workloads.attention import Case, Kind, make, node, workload, workloads

PLAIN = {"window": attend_window, "csa": attend_csa, "hca": attend_hca}
KINDS: tuple[Kind, ...] = ("window", "csa", "hca")
RAGGED = ((0, 3), (126, 3), (255, 1), (510, 5), (511, 1))


def call(kind: Kind, spans: tuple[tuple[int, int], ...], seed: int = 3) -> tuple[Case, list[Tensor]]:
    generator = torch.Generator()
    generator.manual_seed(seed)
    case = Case("nano", kind, spans, "test")
    return case, [t for t in make(case, generator) if t is not None]


def reference(case: Case, tensors: list[Tensor]) -> Tensor:
    op = node(case.model, case.kind)
    result: Tensor = OPS[op.op](*tensors, **op.attrs)
    return result


def plain_pool(case: Case, pool: Tensor, entries_per_page: int) -> Tensor:
    """The pool's entries as the plain ops take them; bytes of nobody as 0."""
    rope_dim = case.config.qk_rope_head_dim
    data_bytes, _ = kv_sizes(case.config.head_dim, rope_dim)
    data, scales = read_entries(pool, torch.arange(len(pool)), data_bytes, entries_per_page=entries_per_page)
    entries = unpack_kv(data, scales, rope_dim)
    return torch.where(entries.isfinite().all(1, keepdim=True), entries, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_the_plain_op_on_dequantised_entries(kind: Kind) -> None:
    case, tensors = call(kind, RAGGED)
    attrs = dict(node("nano", kind).attrs)
    rope_dim = attrs.pop("rope_dim")
    assert rope_dim == case.config.qk_rope_head_dim
    plain = list(tensors)
    plain[0] = tensors[0].float()
    plain[1] = plain_pool(case, tensors[1], attrs["page"])
    if kind != "window":
        plain[3] = plain_pool(case, tensors[3], attrs["entries_per_page"])
    if kind == "csa":
        plain[5] = tensors[5].long()
    expected = PLAIN[kind](*plain, **attrs)
    torch.testing.assert_close(reference(case, tensors).float(), expected, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_bytes_do_not_matter(kind: Kind) -> None:
    """Pools are 0xFF wherever no token may look; zeros there give the same."""
    case, tensors = call(kind, RAGGED)
    pools = (1,) if kind == "window" else (1, 3)
    wiped = [
        torch.where((t == 255).all(1, keepdim=True), 0, t).to(torch.uint8) if i in pools else t
        for i, t in enumerate(tensors)
    ]
    first, second = reference(case, tensors), reference(case, wiped)
    assert first.isfinite().all() and torch.equal(first, second)


def test_a_missing_pick_may_stand_anywhere() -> None:
    case, tensors = call("csa", ((40, 1), (63, 2)))
    picks = tensors[5]
    assert (picks < 0).any() and (picks >= 0).any()
    ordered = [*tensors]
    ordered[5] = picks.sort(1, descending=True).values
    torch.testing.assert_close(reference(case, tensors), reference(case, ordered), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_rows(kind: Kind) -> None:
    case, tensors = call(kind, ())
    assert reference(case, tensors).shape == (0, 8, 64)


def test_workloads_make_what_their_nodes_say() -> None:
    for one in workloads():
        if one.node.inputs[0].shape[1] == 8:  # type: ignore[union-attr]
            generator = torch.Generator()
            tensors = one.make(generator)
            for value, tensor in zip(one.node.inputs, tensors, strict=True):
                assert value is not None and tensor is not None
                assert tuple(tensor.shape) == value.sizes(one.symbols), one.label
                assert tensor.dtype == getattr(torch, value.dtype)


def names(model: str, kind: Kind) -> dict[str, str | None]:
    one = node(model, kind)
    return {s.name.partition(".")[2]: s.accepts(one) for s in SCHEDULES if s.op == one.op}


@pytest.mark.parametrize("kind", KINDS)
def test_who_accepts(kind: Kind) -> None:
    assert names("flash", kind) == names("pro", kind) == {"gluon_groups": None, "triton_gather": None}
    nano = names("nano", kind)
    assert nano["triton_gather"] is None
    assert nano["gluon_groups"] == "8 heads of 64 channels, 32 of them rotated: not 64 of 512 and 64"


def test_refusals_name_the_reason() -> None:
    one = node("flash", "csa")
    strided = dataclasses.replace(
        one, inputs=(Value(("T", 64, 512), "bfloat16", strides=(65536, 512, 1)), *one.inputs[1:])
    )
    float32 = dataclasses.replace(one, inputs=(Value(("T", 64, 512), "float32"), *one.inputs[1:]))
    page = dataclasses.replace(one, attrs={**one.attrs, "page": 48})
    for schedule in (s for s in SCHEDULES if s.op == one.op):
        assert schedule.accepts(strided) == "q is strided"
        assert schedule.accepts(float32) == "q is float32"
        assert schedule.accepts(page) == "48 entries a page are no power of two"


@pytest.mark.parametrize(("tokens", "shares"), [(0, 10), (1, 10), (16, 8), (64, 2), (128, 1), (4096, 1)])
def test_few_tokens_share_out_their_keys(tokens: int, shares: int) -> None:
    schedule = next(s for s in SCHEDULES if s.name == "attend_csa_packed.gluon_groups")
    one = workload(Case("flash", "csa", ((8191, 1),) * 1, "x"))
    configs = schedule.space(one.node, {**one.symbols, "T": tokens})
    assert configs[0] == {"shares": shares} and len(configs) <= 12
    assert len(schedule.workspace(one.node, configs[0])) == (2 if shares > 1 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_group_kernel_uses_the_matrix_units_without_copies_of_sums(kind: Kind, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    schedule = next(s for s in SCHEDULES if s.name == f"attend_{kind}_packed.gluon_groups")
    one = node("flash", kind)
    launch = schedule.build(one, {"shares": 1}).launches[0]
    assert isinstance(launch, TritonLaunch)
    made = compile_launch(Request(one.describe(), launch, (*one.inputs, *one.outputs), "sm_90a"), tmp_path)
    assert made.record.threads == 512
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (tmp_path / "k.cubin").write_bytes(made.image)
    text = subprocess.run(
        [str(tool), "-c", str(tmp_path / "k.cubin")], capture_output=True, text=True, check=True
    ).stdout
    # scores: 32 products of 16 channels, twice (first tile, loop); values: 8 for each of two groups
    assert len(re.findall(r"\bHGMMA\.64x64x16\.F32\.BF16", text)) == 64
    assert len(re.findall(r"\bHGMMA\.64x128x16\.F32\.BF16", text)) == 16
    assert not re.findall(r"\bHMMA\b", text)
