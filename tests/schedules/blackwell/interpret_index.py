"""Blackwell's index scores in Triton's interpreter beside float64: `interpret_index.py [CASES] [PART]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. Keys that no token may see are 0xFF
and pages that it may not look up lie nowhere. Queries and keys are what the call says, bit for bit, so what is allowed
is what a float32 sum may lose; maxima of groups are compared with the kernel's own scores, exactly.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4c.ops.formats import from_e8m0, index_sizes, unpack_e2m1
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules.blackwell import index
from dsv4c.schedules.hopper.index import GROUP, PAGE
from tests.schedules.blackwell.checks import Check, random_cases, run_checks

RATIO = 4
SCHEDULES = {s.name: s for s in index.schedules("sm_103a")}


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call."""

    way: str
    format: str
    heads: int
    dim: int
    spans: tuple[tuple[int, int], ...]
    """First position and number of new tokens of one request."""
    least: int
    """Tokens that see at most so many entries need no scores (top-k)."""
    chunks: int
    scales: str
    """Of FP4 keys: `usual`, `apart` (groups of a key up to 2^60 apart), `tiny`. FP8: usual, large, small."""
    weights: str
    """`usual`, `zero`, `negative`, `nan` (a head of some tokens)."""
    seed: int


@st.composite
def cases(draw: st.DrawFn, fmt: str) -> Case:
    edges = (0, 2, 3, 4, 250, 251, 254, 255, 256, 511, 512, 513, 1019, 1023, 1100)
    start = st.one_of(st.sampled_from(edges), st.integers(0, 1300))
    spans = draw(st.lists(st.tuples(start, st.sampled_from((1, 1, 2, 3, 5, 9, 130))), min_size=1, max_size=3))
    return Case(
        draw(st.sampled_from(("tiles", "runs"))), fmt, draw(st.sampled_from((16, 32, 64))),
        draw(st.sampled_from((32, 64, 128))), tuple(spans), draw(st.sampled_from((64, 128))),
        draw(st.sampled_from((1, 2))), draw(st.sampled_from(("usual", "apart", "tiny"))),
        draw(st.sampled_from(("usual", "zero", "negative", "nan"))), draw(st.integers(0, 2**31)),
    )  # fmt: skip


class _Made:
    """The tensors of a case, and what its scores are in float64."""

    def __init__(self, case: Case) -> None:
        generator = self.generator = torch.Generator().manual_seed(case.seed)
        self.case = case
        self.requests = torch.repeat_interleave(torch.arange(len(case.spans)), torch.tensor([n for _, n in case.spans]))
        self.positions = torch.cat([torch.arange(a, a + n) for a, n in case.spans])
        tokens = len(self.positions)
        query = torch.randint(0, 256, (tokens, case.heads, case.dim), generator=generator, dtype=torch.uint8)
        self.query = torch.where(query & 127 == 127, 0, query)
        self.weight = torch.randn(tokens, case.heads, generator=generator)
        if case.weights == "zero":
            self.weight[:, ::2] = 0
        if case.weights == "negative":
            self.weight = -self.weight.abs()
        if case.weights == "nan":
            self.weight[::3, 1] = float("nan")
        entries = [(a + n) // RATIO for a, n in case.spans]
        live = [-(-count // PAGE) for count in entries]
        columns = max(live) + 1
        self.pages = torch.full((len(live), columns), 1 << 40)
        order = (1 + torch.randperm(sum(live), generator=generator)).tolist()
        for row, count in enumerate(live):
            self.pages[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.long)
        data_bytes, scale_bytes = index_sizes(case.dim, "fp8" if case.format == "fp8" else "fp4")
        self.pool = torch.full((1 + sum(live), PAGE * (data_bytes + scale_bytes)), 255, dtype=torch.uint8)
        self.keys = torch.zeros(len(live), columns * PAGE, case.dim, dtype=torch.float64)
        for row, count in enumerate(entries):
            data, scales, wide = self._keys(count)
            entry = torch.arange(count)
            number, slot = self.pages[row, entry // PAGE], entry % PAGE
            self.pool[:, : PAGE * data_bytes].unflatten(1, (PAGE, -1))[number, slot] = data
            self.pool[:, PAGE * data_bytes :].unflatten(1, (PAGE, -1))[number, slot] = scales
            self.keys[row, :count] = wide
        self.pool = self.pool.view(-1, data_bytes + scale_bytes)
        self.seen = (self.positions + 1) // RATIO

    def _keys(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Data and scale bytes of keys, and their values."""
        case, generator = self.case, self.generator
        if case.format == "fp8":
            data = torch.randint(0, 256, (count, case.dim), generator=generator, dtype=torch.uint8)
            data = torch.where(data & 127 == 127, 0, data)
            low = {"usual": -8, "apart": 30, "tiny": -60}[case.scales]
            scale = torch.exp2(torch.randint(low, low + 4, (count, 1), generator=generator).float())
            return data, scale.view(torch.uint8), data.view(torch.float8_e4m3fn).double() * scale.double()
        data = torch.randint(0, 256, (count, case.dim // 2), generator=generator, dtype=torch.uint8)
        low, high = {"usual": (120, 126), "apart": (90, 150), "tiny": (1, 4)}[case.scales]
        groups = case.dim // 32
        scales = torch.full((count, 4), 255, dtype=torch.uint8)
        scales[:, :groups] = torch.randint(low, high, (count, groups), generator=generator, dtype=torch.uint8)
        factor = from_e8m0(scales[:, :groups]).double().repeat_interleave(32, 1)
        return data, scales, unpack_e2m1(data).double() * factor

    def args(self) -> list[Tensor]:
        return [self.query, self.weight, self.pool, self.pages, self.requests, self.positions]

    def model(self, token: int) -> tuple[Tensor, Tensor]:
        """Scores of a token's entries, and what their terms come to in magnitude."""
        keys = self.keys[self.requests[token], : int(self.seen[token])]
        query, weight = self.query[token].view(torch.float8_e4m3fn).double(), self.weight[token].double()
        dots = query @ keys.T
        reach = (query.abs() @ keys.abs().T * weight.abs()[:, None]).sum(0)
        return (dots.relu() * weight[:, None]).sum(0), reach


def _node(made: _Made, op: str) -> OpNode:
    case = made.case
    attrs: dict[str, Any] = {"ratio": RATIO, "entries_per_page": PAGE, "format": case.format}
    if op == "index_topk_packed":
        attrs["topk"] = case.least
    token = Value(("T",), "int64", "input")
    inputs = (
        Value(("T", case.heads, case.dim), "uint8"), Value(("T", case.heads), "float32"),
        Value(("N", made.pool.shape[1]), "uint8", "pool"), Value(("R", "P"), "int64", "input"), token, token,
    )  # fmt: skip
    out = Value(("T", "P", PAGE), "float32") if op == "index_scores" else Value(("T", case.least), "int32")
    return OpNode(op, attrs, inputs, (out,))


def _compare(made: _Made, token: int, row: Tensor) -> None:
    expected, reach = made.model(token)
    found = row[: len(expected)].double()
    hidden = expected.isnan()
    assert torch.equal(found == float("-inf"), hidden), f"token {token}: what is -inf"
    error = (found - expected).abs()[~hidden]
    assert (error <= 2.0**-20 * reach[~hidden] + 1e-37).all(), f"token {token}: {error.max():.3g}"


def check(case: Case) -> None:
    """All scores of a batch; then those that top-k asks for, with their maxima, a chunk at a time."""
    made = _Made(case)
    tokens, columns = len(made.positions), made.pages.shape[1]
    symbols = {"T": tokens, "P": columns, "R": len(case.spans)}
    interpret._order.reverse = bool(case.seed & 1)
    node, schedule = _node(made, "index_scores"), SCHEDULES[f"index_scores.triton_{case.way}"]
    assert schedule.accepts(node) is None
    config = schedule.space(node, {**symbols, "P_index": columns})[0]
    out = torch.full((tokens, columns, PAGE), float("nan"))
    build: Any = schedule.build
    for launch in build.func(node, config, sms=1, score=index._launch).launches:  # so few that programs go round
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, [*made.args(), out])
    for token in range(tokens):
        _compare(made, token, out[token].flatten())
        assert (out[token].flatten()[int(made.seen[token]) :] == float("-inf")).all(), "what is not seen"

    node, schedule = _node(made, "index_topk_packed"), SCHEDULES[f"index_topk_packed.triton_{case.way}"]
    assert schedule.accepts(node) is None
    build, config = schedule.build, {**schedule.space(node, {**symbols, "P_index": columns})[0], "chunks": case.chunks}
    buffers = [torch.full(v.sizes(symbols), float("nan")) for v in schedule.workspace(node, config)]
    rows = [(i * (tokens // case.chunks), tokens // case.chunks) for i in range(case.chunks)]
    rows += [(tokens // case.chunks * case.chunks, tokens % case.chunks)] if case.chunks > 1 else []
    launches = build.func(node, config, sms=1, score=index._launch).launches[::2]  # the others select
    for (first, count), launch in zip(rows, launches, strict=True):
        buffer = buffers[int(launch.args["scores"].arg) - 6].fill_(float("nan")).view(-1)
        interpret.run(launch, [*made.args(), *buffers, torch.empty(tokens, case.least, dtype=torch.int32)])
        scores = buffer[: count * columns * PAGE].view(count, columns * PAGE)
        behind = buffer[count * columns * PAGE :][: count * columns * PAGE // GROUP].view(torch.int32)
        maxima = behind.view(count, columns * PAGE // GROUP)
        for row in range(count):
            seen = int(made.seen[first + row])
            if seen <= case.least:
                continue
            _compare(made, first + row, scores[row])
            groups = scores[row, : -(-seen // GROUP) * GROUP].view(-1, GROUP)
            assert groups.flatten()[seen:].eq(float("-inf")).all()
            bits = groups.amax(1).view(torch.int32)
            assert torch.equal(maxima[row, : len(groups)], bits ^ ((bits >> 31) & 0x7FFFFFFF)), "maxima"


def main(count: int, part: str) -> int:
    checks: dict[str, Check] = {fmt: random_cases(given(cases(fmt))(check), count) for fmt in ("fp8", "fp4")}
    return run_checks(checks, part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main(int((sys.argv[1:] or ["20"])[0]), (sys.argv[2:] or [""])[0]))
