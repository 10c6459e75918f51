"""The indexer: its references beside the plain model's, what the schedules accept, and facts of their cubins."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.model.indexer import index_topk
from dsv4c.model.quant import hadamard, quantise_index
from dsv4c.model.rope import rope
from dsv4c.ops.formats import IndexFormat, index_sizes, read_entries, unpack_index
from dsv4c.ops.index import index_query, index_scores, index_topk_packed, topk_rows
from dsv4c.runtime.gpu import CallSizes
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Schedule, Value
from dsv4c.schedules.hopper.index import SCHEDULES
from dsv4c.schedules.workloads.index import Case, picks, query, scores, workloads

FORMATS: tuple[IndexFormat, ...] = ("fp8", "fp4")
RAGGED = ((0, 3), (300, 5), (1023, 1), (511, 2))


def schedule_of(name: str) -> Schedule:
    return next(s for s in SCHEDULES if s.name == name)


def call(form: IndexFormat, spans: tuple[tuple[int, int], ...] = RAGGED) -> tuple[Case, OpNode, list[Tensor]]:
    case = Case("nano", form, spans, "test")
    generator = torch.Generator()
    generator.manual_seed(5)
    work = picks(case)
    return case, work.node, [t for t in work.make(generator) if t is not None]


@pytest.mark.parametrize("form", FORMATS)
def test_a_query_carries_its_scale_in_its_weight(form: IndexFormat) -> None:
    heads, dim, turned = 16, 128, 64
    q, weight = torch.randn(7, heads * dim), torch.randn(7, heads)
    angle = torch.rand(7, turned // 2) * 6
    table = torch.cat((angle.cos(), angle.sin()), -1)
    data, scaled = index_query(q, table, weight, num_heads=heads, format=form)
    rotated = rope(q.unflatten(-1, (heads, dim)), table, inverse=False)
    plain = quantise_index(rotated, group=32) if form == "fp4" else hadamard(rotated)
    got = data.view(torch.float8_e4m3fn).float() * (scaled / (weight * (heads * dim) ** -0.5)).unsqueeze(-1)
    if form == "fp4":  # E4M3 holds E2M1 times powers of two exactly
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    else:
        assert (got - plain).abs().max() <= plain.abs().max() / 16


@pytest.mark.parametrize("form", FORMATS)
def test_packed_topk_is_the_plain_topk_on_dequantised_keys(form: IndexFormat) -> None:
    case, node, (data, weight, pool, pages, requests, positions) = call(form)
    size = index_sizes(case.dim, form)[0]
    keys = unpack_index(*read_entries(pool, torch.arange(len(pool)), size, entries_per_page=64), form)
    pages_seen = torch.where(pages < len(pool), pages, 0)
    plain = index_topk(
        data.view(torch.float8_e4m3fn).float(), weight * (case.heads * case.dim) ** 0.5, keys.nan_to_num(0.0),
        pages_seen, requests, positions, ratio=4, entries_per_page=64, topk=case.config.index_topk,
    )  # fmt: skip
    packed = index_topk_packed(data, weight, pool, pages, requests, positions, **node.attrs)
    for a, b in zip(plain.tolist(), packed.tolist(), strict=True):
        assert set(a) == set(b)
        assert b == sorted(b, key=lambda e: (e < 0, e))


@pytest.mark.parametrize("form", FORMATS)
def test_unseen_bytes_and_pages_do_not_matter(form: IndexFormat) -> None:
    """Pools are 0xFF and page tables point nowhere behind what a token sees."""
    _, node, args = call(form)
    attrs = {k: v for k, v in node.attrs.items() if k != "topk"}
    first = index_scores(*args, **attrs)
    wiped = [*args]
    wiped[2] = torch.where((args[2] == 255).all(1, keepdim=True), 0, args[2]).to(torch.uint8)
    wiped[3] = torch.where(args[3] < len(args[2]), args[3], 0)
    assert torch.equal(first, index_scores(*wiped, **attrs))
    assert not first.isnan().any()


def test_topk_takes_the_earlier_of_equals_and_never_nan() -> None:
    scores_of = torch.zeros(3, 2, 64)
    scores_of[0, 0, 5:] = -0.0
    scores_of[1, 1, 3] = float("nan")
    scores_of[2] = float("nan")
    scores_of[2, 1, 7] = -3.0
    found = topk_rows(scores_of, torch.tensor([511, 511, 511]), ratio=4, topk=64)
    assert found[0].tolist() == list(range(64)) and found[1].tolist() == list(range(64))
    assert found[2].tolist() == [71] + [-1] * 63
    few = topk_rows(scores_of, torch.tensor([0, 10, 255]), ratio=4, topk=64)
    assert [(row >= 0).sum().item() for row in few] == [0, 2, 64]


def test_no_tokens_give_no_rows() -> None:
    _, node, args = call("fp8", ())
    assert index_topk_packed(*args, **node.attrs).shape == (0, 64)


def test_workloads_make_what_their_nodes_say() -> None:
    for one in workloads():
        if one.label.startswith("nano") and "bench" not in one.purpose:
            generator = torch.Generator()
            for value, tensor in zip(one.node.inputs, one.make(generator), strict=True):
                assert value is not None and tensor is not None
                assert tuple(tensor.shape) == value.sizes(one.symbols), one.label
                assert tensor.dtype == getattr(torch, value.dtype)


def test_labels_are_unique() -> None:
    labels = [(w.op, w.label) for w in workloads()]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(("model", "ways"), [("flash", 3), ("pro", 3), ("nano", 1)])
def test_who_accepts(model: str, ways: int) -> None:
    case = Case(model, "fp4", RAGGED, "x")
    for one in (scores(case), picks(case)):
        accepting = [s for s in SCHEDULES if s.op == one.op and s.accepts(one.node) is None]
        assert len(accepting) == ways
        for schedule in accepting:
            space = schedule.space(one.node, one.symbols)
            assert 1 <= len(space) <= 12 and len({repr(config) for config in space}) == len(space)
    assert schedule_of("index_query.triton_rows").accepts(query(case).node) is None


def test_refusals_name_the_reason() -> None:
    node = picks(Case("flash", "fp8", RAGGED, "x")).node
    schedule = schedule_of("index_topk_packed.gluon_keys")
    changes = {
        "needs pages of 64 keys, not 32": {"attrs": {**node.attrs, "entries_per_page": 32}},
        "needs a topk of 64, 128, 256, 512 or 1024, not 100": {"attrs": {**node.attrs, "topk": 100}},
        "the pool holds no fp4 keys of 128 channels": {"attrs": {**node.attrs, "format": "fp4"}},
        "needs 64 heads of 128 channels, not 16 of 32": {
            "inputs": (
                Value(("T", 16, 32), "uint8"), Value(("T", 16), "float32"), Value(("N_index", 36), "uint8"),
                *node.inputs[3:],
            )
        },
    }  # fmt: skip
    for reason, change in changes.items():
        assert schedule.accepts(dataclasses.replace(node, **change)) == reason


@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 100, 4096])
def test_pieces_cover_every_batch_within_their_workspace(tokens: int) -> None:
    """Whatever the number of tokens, rows are scored once, and a piece fits its workspace."""
    case = Case("flash", "fp8", (((1 << 20) - 8192, 8192),), "x")
    one = picks(case)
    schedule = schedule_of("index_topk_packed.gluon_keys")
    config = schedule.space(one.node, one.symbols)[0]
    assert config["chunks"] == 32  # 8192 rows of 2^18 scores, in 512 MB
    columns = 700
    sizes = {"T": tokens, "R": 1, "P_index": columns, "N_index": 64 * columns}
    shapes = [v.sizes(sizes) for v in (*one.node.inputs, *schedule.workspace(one.node, config), *one.node.outputs) if v]
    known = CallSizes("test", [torch.empty(shape, device="meta") for shape in shapes])
    rows: list[int] = []
    for launch in schedule.build(one.node, config).launches:
        assert isinstance(launch, TritonLaunch)
        if not launch.kernel.endswith("select_rows"):
            continue
        count = known.value(launch.grid[0])
        first, at = (known.value(launch.args[name].value) for name in ("first", "maxima_at"))  # type: ignore[union-attr]
        space = torch.Size(shapes[launch.args["scores"].arg]).numel()  # type: ignore[union-attr]
        assert at == count * columns * 64 and at + count * columns * 4 <= space
        rows += range(first, first + count)
    assert rows == list(range(tokens))


def disassembly(image: bytes, tmp_path: Path) -> str:
    triton = pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    file = tmp_path / "kernel.cubin"
    file.write_bytes(image)
    return subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("way", ["gluon_pages", "gluon_keys"])
def test_products_overlap_the_sums(way: str, form: IndexFormat, tmp_path: Path) -> None:
    """FP8 matrix instructions, a product in flight while another is summed up, nothing kept in local memory."""
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    one = picks(Case("flash", form, (((1 << 17) - 64, 64),), "x"))
    schedule = schedule_of(f"index_topk_packed.{way}")
    config = schedule.space(one.node, one.symbols)[0]
    launch = schedule.build(one.node, config).launches[0]
    values = (*one.node.inputs, *schedule.workspace(one.node, config), *one.node.outputs)
    made = compile_launch(Request(one.node.describe(), launch, values, "sm_90a"), tmp_path)
    assert made.spills == 0 and made.record.registers <= 255
    assembly = disassembly(made.image, tmp_path)
    products = len(re.findall(r"QGMMA\.64x64x32", assembly))
    assert products % 4 == 0 and products >= 4
    # a wait for each group of four steps: a wait for each step would mean that they run one by one
    assert len(re.findall(r"WARPGROUP\.DEPBAR", assembly)) == products // 4


@pytest.mark.parametrize("op", ["index_query", "topk_rows", "index_scores"])
def test_kernels_build(op: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    one = next(w for w in workloads() if w.op == op and ("nano" in w.label or "top 64" in w.label))
    schedule = next(s for s in SCHEDULES if s.op == op and s.accepts(one.node) is None)
    config = schedule.space(one.node, one.symbols)[0]
    values = (*one.node.inputs, *schedule.workspace(one.node, config), *one.node.outputs)
    for launch in schedule.build(one.node, config).launches:
        made = compile_launch(Request(one.node.describe(), launch, values, "sm_90a"), tmp_path)
        assert made.image[:4] == b"\x7fELF"
