"""Attention workloads: decode and prefill of flash, pro and nano over packed pools laid out as an engine would.

Pages are assigned at random, window pages behind the window are null, and every byte that no token may see is 0xFF
(NaN in E4M3, in bfloat16 and as a scale): a kernel that reads one shows it.

Legend: T tokens, H heads, C head_dim, B bytes of an entry, K picks, N pool rows, R requests, P pages of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.ops.attention import attend_csa_packed, attend_hca_packed, attend_window_packed
from dsv4c.ops.formats import kv_sizes, pack_kv
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of

Kind = Literal["window", "csa", "hca"]
Span = tuple[int, int]
"""First position and number of new tokens of one request."""

_CSA, _HCA = 4, 128
_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "window": attend_window_packed, "csa": attend_csa_packed, "hca": attend_hca_packed,
}  # fmt: skip
_REFERENCE_KEYS = 1 << 16  # tokens x keys of one chunk of a reference: 128 MB of float32 keys at 512 channels


@dataclass(frozen=True)
class Case:
    """One attention call: spans of new tokens, one request each, in a batch."""

    model: str | ModelConfig
    kind: Kind
    spans: tuple[Span, ...]
    label: str
    bench: bool = False

    @property
    def config(self) -> ModelConfig:
        return config_of(self.model)

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def ratio(self) -> int:
        return {"window": 0, "csa": _CSA, "hca": _HCA}[self.kind]

    @property
    def entry_bytes(self) -> int:
        return sum(kv_sizes(self.config.head_dim, self.config.qk_rope_head_dim))

    def positions(self) -> Tensor:
        return torch.cat(
            [torch.arange(start, start + length) for start, length in self.spans] or [torch.zeros(0)]
        ).long()

    def seen(self) -> Tensor:
        """Keys of every token."""
        at = self.positions() + 1
        keys = at.clamp(max=self.config.sliding_window)
        if self.kind == "csa":
            keys = keys + (at // _CSA).clamp(max=self.config.index_topk)
        elif self.kind == "hca":
            keys = keys + at // _HCA
        return keys

    def entries(self) -> list[int]:
        """Completed entries of every request at its last token (csa, hca)."""
        return [(start + length) // self.ratio for start, length in self.spans]


def _pages(live: Sequence[tuple[int, int]], per_page: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Page table, live pool rows and pages of a group whose requests hold entries [first, end)."""
    spans = [(first // per_page, -(-end // per_page)) if end > first else (0, 0) for first, end in live]
    total = 1 + sum(end - first for first, end in spans)
    table = torch.zeros(len(live), max([end for _, end in spans] or [0]) or 1, dtype=torch.int64)
    ids = 1 + torch.randperm(total - 1, generator=generator, device=generator.device).cpu()
    rows, used = [torch.zeros(0, dtype=torch.int64)], 0
    for request, ((first, end), (a, b)) in enumerate(zip(spans, live)):
        table[request, first:end] = ids[used : used + end - first]
        used += end - first
        entry = torch.arange(a, b)
        rows.append(table[request, entry // per_page] * per_page + entry % per_page)
    return table, torch.cat(rows), total


def _pool(rows: Tensor, pages: int, per_page: int, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A packed pool with random entries in `rows` and 0xFF everywhere else."""
    device = generator.device
    data_bytes, scale_bytes = kv_sizes(config.head_dim, config.qk_rope_head_dim)
    pool = torch.full((pages, per_page * (data_bytes + scale_bytes)), 255, dtype=torch.uint8, device=device)
    data_view = pool[:, : per_page * data_bytes].unflatten(1, (per_page, data_bytes))
    scale_view = pool[:, per_page * data_bytes :].unflatten(1, (per_page, scale_bytes))
    for some in rows.to(device).split(1 << 18):
        x = torch.randn(len(some), config.head_dim, generator=generator, device=device)
        # gains of 1/8 to 8 for runs of 32 channels, so that neighbouring groups have different scales
        gain = torch.rand(len(some), config.head_dim // 32, generator=generator, device=device) * 6 - 3
        data, scales = pack_kv((x.unflatten(1, (-1, 32)) * torch.exp2(gain).unsqueeze(-1)).flatten(1) / 2,
                               config.qk_rope_head_dim)  # fmt: skip
        data_view[some // per_page, some % per_page] = data
        scale_view[some // per_page, some % per_page] = scales
    return pool.view(-1, data_bytes + scale_bytes)


def _picks(positions: Tensor, topk: int, generator: torch.Generator) -> Tensor:
    """Distinct random completed entries of every token, in any order; -1 where there are fewer."""
    device = generator.device
    complete = ((positions + 1) // _CSA).to(device)
    picks = torch.full((len(positions), topk), -1, dtype=torch.int32, device=device)
    if not len(positions):
        return picks
    # one entry of each of `topk` equal strata: distinct, and spread as a real selection is
    width = complete.clamp(min=topk).unsqueeze(1) / topk
    step = torch.arange(topk, device=device)
    jitter = torch.rand(picks.shape, generator=generator, device=device)
    low, high = (step * width).ceil(), ((step + 1) * width).ceil() - 1
    entry = (low + jitter * (high - low + 1)).floor().clamp(max=high).to(torch.int32)
    entry = torch.where(entry < complete.unsqueeze(1), entry, -1)
    order = torch.rand(picks.shape, generator=generator, device=device).argsort(1)
    return entry.gather(1, order)


def make(case: Case, generator: torch.Generator) -> Args:
    """The call's tensors, on the generator's device."""
    config, layout, device = case.config, StateLayout(), generator.device
    positions = case.positions()
    lengths = torch.tensor([length for _, length in case.spans], dtype=torch.int64)
    request_rows = torch.repeat_interleave(torch.arange(len(case.spans)), lengths)
    shape = (case.tokens, config.num_attention_heads, config.head_dim)
    q = torch.randn(shape, generator=generator, device=device)
    # from flat to peaked softmax, head by head
    q = q * torch.exp2(torch.rand(shape[:2], generator=generator, device=device) * 3 - 1.5).unsqueeze(-1)
    sink = torch.randn(config.num_attention_heads, generator=generator, device=device) * 2
    page = layout.entries_per_page(0)
    live = [(max(0, start - config.sliding_window + 1), start + length) for start, length in case.spans]
    table, rows, pages = _pages(live, page, generator)
    args: Args = [q.to(torch.bfloat16), _pool(rows, pages, page, config, generator), table.to(device)]
    if case.kind != "window":
        per_page = layout.entries_per_page(case.ratio)
        table, rows, pages = _pages([(0, count) for count in case.entries()], per_page, generator)
        args += [_pool(rows, pages, per_page, config, generator), table.to(device)]
    if case.kind == "csa":
        args.append(_picks(positions, config.index_topk, generator))
    return [*args, request_rows.to(device), positions.to(device), sink]


def _reference(case: Case) -> Callable[..., Tensor]:
    """The op's reference on a few tokens at a time."""
    reference = _REFERENCES[case.kind]
    by_token = {"window": (0, 3, 4), "csa": (0, 5, 6, 7), "hca": (0, 5, 6)}[case.kind]
    widest = int(case.seen().max()) if case.tokens else 1

    def run(*tensors: Tensor, **attrs: Any) -> Tensor:
        outputs = [torch.empty_like(tensors[0][:0])]
        step = max(1, _REFERENCE_KEYS // widest)
        for first in range(0, tensors[0].shape[0], step):
            some = [t[first : first + step] if i in by_token else t for i, t in enumerate(tensors)]
            outputs.append(reference(*some, **attrs))
        return torch.cat(outputs)

    return run


def node(model: str | ModelConfig, kind: Kind) -> OpNode:
    """The op of one attention kind of a preset."""
    config, layout = config_of(model), StateLayout()
    heads, dim, rope_dim = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    entry = sum(kv_sizes(dim, rope_dim))
    attrs: dict[str, Any] = {"window": config.sliding_window, "page": layout.entries_per_page(0), "rope_dim": rope_dim}
    inputs = [
        Value(("T", heads, dim), "bfloat16"),
        Value(("N_window", entry), "uint8", "pool"),
        Value(("R", "P_window"), "int64", "input"),
    ]
    if kind != "window":
        ratio = _CSA if kind == "csa" else _HCA
        attrs["entries_per_page"] = layout.entries_per_page(ratio)
        inputs.append(Value((f"N_c{ratio}", entry), "uint8", "pool"))
        inputs.append(Value(("R", f"P_c{ratio}"), "int64", "input"))
    if kind == "csa":
        inputs.append(Value(("T", config.index_topk), "int32"))
    if kind == "hca":
        attrs["ratio"] = _HCA
    inputs += [Value(("T",), "int64", "input"), Value(("T",), "int64", "input"), Value((heads,), "float32", "weight")]
    return OpNode(f"attend_{kind}_packed", attrs, tuple(inputs), (Value(("T", heads, dim), "bfloat16"),))


def workload(case: Case) -> Workload:
    """The workload of a case, with its least bytes and its flops."""
    config, layout = case.config, StateLayout()
    heads, dim, window = config.num_attention_heads, config.head_dim, config.sliding_window
    seen = case.seen()
    ends = [start + length for start, length in case.spans]
    live = [(max(0, start - window + 1), start + length) for start, length in case.spans]
    page = layout.entries_per_page(0)
    symbols = {
        "T": case.tokens,
        "R": len(case.spans),
        "P_window": max([-(-end // page) for end in ends] or [0]) or 1,
        "N_window": (1 + sum(-(-b // page) - a // page for a, b in live)) * page,
    }
    rows = sum(b - a for a, b in live)
    if case.kind != "window":
        per_page = layout.entries_per_page(case.ratio)
        columns = [-(-count // per_page) for count in case.entries()]
        symbols[f"P_c{case.ratio}"] = max(columns or [0]) or 1
        symbols[f"N_c{case.ratio}"] = (1 + sum(columns)) * per_page
        picked = int(seen.sum() - (case.positions() + 1).clamp(max=window).sum())
        rows += min(picked, sum(case.entries()))
    step = 8 * 2 * case.tokens + (4 * config.index_topk * case.tokens if case.kind == "csa" else 0)
    return Workload(
        label=f"{case.model} {case.label}",
        node=node(case.model, case.kind),
        symbols=symbols,
        make=lambda generator: make(case, generator),
        bytes_moved=2 * 2 * heads * dim * case.tokens + rows * case.entry_bytes + step + 4 * heads,
        flops=4.0 * heads * dim * int(seen.sum()),
        reference=_reference(case),
        purpose=frozenset({"check", "bench"}) if case.bench else frozenset({"check"}),
    )


def _decode(batch: int, context: int) -> tuple[Span, ...]:
    """One new token of each of `batch` requests that hold `context` tokens with it."""
    return ((context - 1, 1),) * batch


# Lengths where a window, an entry or a page begins or ends; all in one ragged decode batch.
_EDGES = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 2047, 2048, 3967, 3968, 4095, 4096)
_KINDS: tuple[Kind, ...] = ("window", "csa", "hca")


def _nano() -> list[Case]:
    cases = []
    for kind in _KINDS:
        cases.append(Case("nano", kind, (), "decode 0"))
        cases.append(Case("nano", kind, _decode(1, 1), "decode 1 @1"))
        cases.append(Case("nano", kind, tuple((length - 1, 1) for length in _EDGES), "decode edges"))
        cases.append(Case("nano", kind, ((0, 1), (0, 129), (126, 3), (1000, 300), (511, 1)), "prefill ragged"))
        cases.append(Case("nano", kind, _decode(64, 2048), "decode 64 @2K", bench=True))
    return cases


def _large(model: str | ModelConfig) -> list[Case]:
    cases = []
    for kind in _KINDS:
        cases.append(Case(model, kind, (), "decode 0"))
        cases.append(Case(model, kind, _decode(1, 1), "decode 1 @1"))
        cases.append(Case(model, kind, tuple((length - 1, 1) for length in _EDGES), "decode edges"))
        cases.append(Case(model, kind, ((0, 1), (0, 129), (126, 3), (1000, 300), (511, 1)), "prefill ragged"))
        for batch in (1, 16, 64, 128, 256):
            cases.append(Case(model, kind, _decode(batch, 8192), f"decode {batch} @8K", bench=True))
        cases.append(Case(model, kind, ((0, 4096),), "prefill 4096 @0", bench=True))
    cases.append(Case(model, "csa", ((126976, 4096),), "prefill 4096 @124K", bench=True))
    cases.append(Case(model, "hca", ((126976, 4096),), "prefill 4096 @124K", bench=True))
    cases.append(Case(model, "csa", _decode(4, 1 << 20), "decode 4 @1M", bench=True))
    cases.append(Case(model, "hca", _decode(64, 1 << 17), "decode 64 @128K", bench=True))
    cases.append(Case(model, "hca", _decode(1, 1 << 20), "decode 1 @1M", bench=True))
    cases.append(Case(model, "hca", _decode(4, (1 << 20) - 1), "decode 4 @1M-1"))
    return cases


def workloads() -> tuple[Workload, ...]:
    return tuple(workload(case) for case in (*_nano(), *_large("flash"), *_large("pro")))
