"""Blackwell's attention kernel in Triton's interpreter beside float64: `interpret_attention.py [CASES] [PART]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. Every byte that no token may see is
0xFF and every page that it may not look up lies nowhere, so a kernel that reads one shows it. What is allowed per value
is what the kernel's roundings can do: weights, shares and result are bfloat16, sums of scores float32.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4c.ops.attention import packed_keys
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules.blackwell.attention import schedules
from dsv4c.schedules.triton import attend_wide
from tests.schedules.blackwell.checks import Check, random_cases, run_checks

DIM, ROPE, ENTRY = 512, 64, 584
SCHEDULES = {s.op: s for s in schedules("sm_103a") if s.name.endswith("triton_wide")}
HALF = 2.0**-8  # half a step of bfloat16, relative


@triton.jit
def widen(x, factor):
    """What the inline assembly of `attend_wide.widen` does, in words: `simulated` shows that it does."""
    return (x.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (factor.to(tl.float32) * 2.0**-120)).to(tl.bfloat16)


def _simulated(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The instructions of WIDEN on uint32 words of four bytes and float32 factors: float64 values, four a word."""

    def prmt(a: np.ndarray, picks: int) -> np.ndarray:
        out = np.zeros_like(a)
        for i in range(4):
            pick = (picks >> (4 * i)) & 15
            byte = (a >> (8 * (pick & 7))) & 255 if pick & 7 < 4 else np.zeros_like(a)
            if pick & 8:
                byte = np.where(byte & 128, 255, 0).astype(np.uint32)
            out |= byte.astype(np.uint32) << (8 * i)
        return out

    values = []
    for picks in (0x1804, 0x3A24):
        x = (prmt(words, picks).view(np.int32) >> 4).view(np.uint32) & np.uint32(0x87F087F0)
        for half in (x & 0xFFFF, x >> 16):
            values.append((half.astype(np.uint32) << 16).view(np.float32).astype(np.float64) * factors)
    return np.stack(values, -1)


def simulated() -> None:
    """The assembly text gives every E4M3 number times the factor, at each of its four places."""
    assert [line.split()[-1] for line in attend_wide.WIDEN.value.splitlines() if "prmt" in line] == [
        "0x1804;",
        "0x3A24;",
    ]
    byte = np.array([b for b in range(256) if b & 127 != 127], np.uint32)
    number = torch.from_numpy(byte.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()
    for place in range(4):
        for others in (0, 0xFFFFFFFF, 0x55AA55AA):
            keep = np.uint32(0xFFFFFFFF ^ (255 << (8 * place)))
            found = _simulated((byte << np.uint32(8 * place)) | (np.uint32(others) & keep), np.float64(2.0) ** 120)
            assert np.array_equal(found[:, place], number), place


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call."""

    kind: str
    heads: int
    positions: tuple[int, ...]
    """Of tokens; neighbours may be of one request."""
    together: bool
    """All tokens are of one request, as when drafts are verified."""
    window: int
    page: int
    per_page: int
    ratio: int
    topk: int
    shares: int
    picks: str
    """`some`, `none`, `all` (as many as there are, in order), `last` (only the last place)."""
    scales: str
    """`usual`, `mixed` (2^-27 to 2^7), `tiny` (2^-27)."""
    queries: str
    """`usual`, `large` (scores of thousands), `zero`."""
    sink: str
    """`usual`, `low` (-inf), `high`."""
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(("window", "csa", "hca")))
    edges = (0, 1, 3, 62, 63, 64, 65, 126, 127, 128, 129, 191, 255, 256, 320)
    at = st.one_of(st.sampled_from(edges), st.integers(0, 400))
    return Case(
        kind, draw(st.sampled_from((8, 64, 72, 128))), tuple(draw(st.lists(at, min_size=1, max_size=3))),
        draw(st.booleans()), draw(st.sampled_from((1, 64, 100, 128))), draw(st.sampled_from((16, 64))),
        draw(st.sampled_from((2, 16, 64))), draw(st.sampled_from((1, 4, 128))),
        draw(st.sampled_from((16, 64, 80, 128))), draw(st.integers(1, 4)),
        draw(st.sampled_from(("some", "none", "all", "last"))),
        draw(st.sampled_from(("usual", "mixed", "tiny"))), draw(st.sampled_from(("usual", "large", "zero"))),
        draw(st.sampled_from(("usual", "low", "high"))), draw(st.integers(0, 2**31)),
    )  # fmt: skip


class _Made:
    """The tensors of a case, and its keys in float64."""

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        tokens = len(case.positions)
        self.positions = torch.tensor(sorted(case.positions) if case.together else case.positions)
        self.rows = torch.zeros(tokens, dtype=torch.long) if case.together else torch.arange(tokens)
        shape = (tokens, case.heads, DIM)
        gain = {"usual": 1.0, "large": 60.0, "zero": 0.0}[case.queries]
        self.q = (torch.randn(shape, generator=self.generator) * gain).to(torch.bfloat16)
        self.sink = torch.randn(case.heads, generator=self.generator) * 2
        if case.sink != "usual":
            self.sink = torch.full((case.heads,), float("-inf") if case.sink == "low" else 300.0)
        recent = (self.positions + 1).clamp(max=case.window)
        self.pool, self.pages = self._pool(
            [(int(p + 1 - r), int(p + 1)) for p, r in zip(self.positions, recent)], case.page
        )
        step = {"window": 1, "csa": 4, "hca": case.ratio}[case.kind]
        self.complete = (self.positions + 1) // step
        self.entry_pool, self.entry_pages = self._pool([(0, int(n)) for n in self.complete], case.per_page)
        self.picks = self._picks()

    def _pool(self, spans: list[tuple[int, int]], page: int) -> tuple[Tensor, Tensor]:
        """Packed entries where a token may look, 0xFF elsewhere; the page table."""
        requests = int(self.rows.max()) + 1
        columns = max(1, -(-max(end for _, end in spans) // page))
        table = torch.full((requests, columns), 1 << 40)
        live = {(int(r), e // page) for r, (a, b) in zip(self.rows, spans) for e in range(a, b)}
        order = torch.randperm(len(live), generator=self.generator).tolist()
        for place, (request, column) in zip(order, sorted(live)):
            table[request, column] = 1 + place
        pool = torch.full(((1 + len(live)) * page, ENTRY), 255, dtype=torch.uint8)
        view = pool.view(-1, page * ENTRY)
        for request, entry in {(int(r), e) for r, (a, b) in zip(self.rows, spans) for e in range(a, b)}:
            number, slot = int(table[request, entry // page]), entry % page
            view[number, slot * 576 : slot * 576 + 576] = self._entry()
            low, high = {"usual": (118, 124), "mixed": (100, 135), "tiny": (100, 101)}[self.case.scales]
            at = page * 576 + slot * 8
            view[number, at : at + 7] = torch.randint(low, high, (7,), generator=self.generator, dtype=torch.uint8)
        return pool, table

    def _entry(self) -> Tensor:
        plain = torch.randint(0, 256, (448,), generator=self.generator, dtype=torch.uint8)
        plain = torch.where(plain & 127 == 127, 0, plain)
        turned = torch.randn(64, generator=self.generator).to(torch.bfloat16)
        return torch.cat((plain, turned.view(torch.uint8)))

    def _picks(self) -> Tensor:
        case = self.case
        picks = torch.full((len(self.positions), case.topk), -1, dtype=torch.int32)
        for row, count in enumerate(self.complete.tolist()):
            some = torch.randperm(count, generator=self.generator)[: case.topk].to(torch.int32)
            if case.picks == "all":
                picks[row, : len(some)] = some.sort().values
            if case.picks == "some":
                place = torch.randperm(case.topk, generator=self.generator)[: len(some)]
                picks[row, place] = torch.where(torch.rand(len(some), generator=self.generator) < 0.8, some, -1)
            if case.picks == "last" and count:
                picks[row, -1] = some[0]
        return picks

    def args(self) -> list[Tensor]:
        args = [self.q, self.pool, self.pages]
        if self.case.kind != "window":
            args += [self.entry_pool, self.entry_pages]
        if self.case.kind == "csa":
            args += [self.picks]
        return [*args, self.rows, self.positions, self.sink]

    def keys(self, token: int) -> Tensor:
        """float64 [keys, C]: what a token attends to."""
        case, position, request = self.case, int(self.positions[token]), int(self.rows[token])
        window = torch.arange(max(0, position + 1 - case.window), position + 1)
        found = [self._unpack(self.pool, self.pages[request], window, case.page)]
        if case.kind != "window":
            entries = torch.arange(int(self.complete[token]))
            if case.kind == "csa":
                entries = self.picks[token][self.picks[token] >= 0].long()
            found.append(self._unpack(self.entry_pool, self.entry_pages[request], entries, case.per_page))
        return torch.cat(found)

    @staticmethod
    def _unpack(pool: Tensor, table: Tensor, entries: Tensor, page: int) -> Tensor:
        rows = table[entries // page] * page + entries % page
        seen = torch.ones_like(rows, dtype=torch.bool)
        return packed_keys(pool, rows, seen, entries_per_page=page, head_dim=DIM, rope_dim=ROPE).double()


def _node(case: Case) -> OpNode:
    pool, table = Value(("N", ENTRY), "uint8", "pool"), Value(("R", "P"), "int64", "input")
    inputs = [Value(("T", case.heads, DIM), "bfloat16"), pool, table]
    attrs: dict[str, Any] = {"window": case.window, "page": case.page, "rope_dim": ROPE}
    if case.kind != "window":
        inputs += [pool, table]
        attrs["entries_per_page"] = case.per_page
    if case.kind == "csa":
        inputs.append(Value(("T", case.topk), "int32"))
    if case.kind == "hca":
        attrs["ratio"] = case.ratio
    token = Value(("T",), "int64", "input")
    inputs += [token, token, Value((case.heads,), "float32", "weight")]
    return OpNode(f"attend_{case.kind}_packed", attrs, tuple(inputs), (Value(("T", case.heads, DIM), "bfloat16"),))


def check(case: Case) -> None:
    """The kernel, and the combine of its shares, against float64."""
    node, made = _node(case), _Made(case)
    schedule, config = SCHEDULES[node.op], {"warps": 8, "stages": 4, "shares": case.shares}
    assert schedule.accepts(node) is None
    buffers = []
    for value in (*schedule.workspace(node, config), *node.outputs):
        tensor = torch.empty(value.sizes({"T": len(made.q)}), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(tensor)
    interpret._order.reverse = bool(case.seed & 1)
    for launch in schedule.build(node, config).launches:
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, [*made.args(), *buffers])
    out = buffers[-1].double()
    for token in range(len(made.q)):
        keys, q = made.keys(token), made.q[token].double()
        score = q @ keys.T * DIM**-0.5
        both = torch.cat((score, made.sink.double()[:, None]), 1)
        weight = torch.softmax(both, 1)[:, :-1]
        result, reach = weight @ keys, weight @ keys.abs()
        # of a score's float32 sum: a weight's relative error, where the weight counts
        loose = (q.abs() @ keys.abs().T).max(1).values * DIM**-0.5 * 2.0**-21 + 1e-5
        allowed = (HALF * 1.02 + loose)[:, None] * reach + HALF * result.abs()
        if case.shares > 1:
            allowed = allowed + HALF * reach
        error = (out[token] - result).abs()
        worst = (error - allowed).max()
        assert worst <= 1e-30, (
            f"token {token}: {error.max():.3g} where {allowed.flatten()[error.argmax()]:.3g} is allowed"
        )


def main(count: int, part: str) -> int:
    attend_wide.widen = widen
    checks: dict[str, Check] = {"widen": simulated, "attention": random_cases(given(cases())(check), count)}
    return run_checks(checks, part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main(int((sys.argv[1:] or ["20"])[0]), (sys.argv[2:] or [""])[0]))
