"""Indexer workloads: queries, scores over paged keys, and top-k, for decode and prefill of flash, pro and nano.

Pages are assigned at random. Every key byte that no token may see is 0xFF (NaN as E4M3 and as a scale), and what lies
behind a request's live pages in its page table points far outside the pool: a kernel that reads either shows it.

Legend: T tokens, I index heads, C index channels, K topk, N pool rows, R requests, P pages of a request, E entries of
a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.ops.formats import IndexFormat, index_sizes, pack_index
from dsv4c.ops.index import index_query, index_scores, topk_rows
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of
from dsv4c.schedules.workloads.rows import e4m3_apart

Span = tuple[int, int]
"""First position and number of new tokens of one request."""

RATIO = 4
_NOWHERE = 1 << 40  # a page that no pool has
_REFERENCE_KEYS = 1 << 18  # tokens x entries of one chunk of a reference: 128 MB of float32 keys, 64 MB of dots
_CHECKED_KEYS = 1 << 23  # tokens x entries that a large workload checks, of rows spread over the batch
_FORMATS: tuple[IndexFormat, ...] = ("fp8", "fp4")


@dataclass(frozen=True)
class Case:
    """One call: spans of new tokens, one request each, in a batch."""

    model: str | ModelConfig
    format: IndexFormat
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
    def heads(self) -> int:
        return self.config.index_n_heads

    @property
    def dim(self) -> int:
        return self.config.index_head_dim

    @property
    def key_bytes(self) -> int:
        return sum(index_sizes(self.dim, self.format))

    def positions(self) -> Tensor:
        return torch.cat([torch.arange(a, a + n) for a, n in self.spans] or [torch.zeros(0)]).long()

    def entries(self) -> list[int]:
        """Completed entries of every request at its last token."""
        return [(start + length) // RATIO for start, length in self.spans]

    @property
    def columns(self) -> int:
        """Width of the page table: one page more than is live, and wide enough for the model's topk."""
        page = StateLayout().entries_per_page(RATIO)
        live = max([-(-count // page) for count in self.entries()] or [0])
        return max(live + (not self.bench), self.config.index_topk // page + 1)

    @property
    def symbols(self) -> dict[str, int]:
        page = StateLayout().entries_per_page(RATIO)
        pages = 1 + sum(-(-count // page) for count in self.entries())
        return {"T": self.tokens, "R": len(self.spans), "P_index": self.columns, "N_index": pages * page}


def _pool(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A packed pool with random keys where requests have entries and 0xFF elsewhere, and the page table."""
    device, page = generator.device, StateLayout().entries_per_page(RATIO)
    counts = [-(-count // page) for count in case.entries()]
    table = torch.full((len(counts), case.columns), _NOWHERE, dtype=torch.int64)
    ids = 1 + torch.randperm(sum(counts), generator=generator, device=device).cpu()
    rows, used = [torch.zeros(0, dtype=torch.int64)], 0
    for request, (count, live) in enumerate(zip(counts, case.entries())):
        table[request, :count] = ids[used : used + count]
        used += count
        entry = torch.arange(live)
        rows.append(table[request, entry // page] * page + entry % page)
    data_bytes, scale_bytes = index_sizes(case.dim, case.format)
    pool = torch.full((1 + used, page * (data_bytes + scale_bytes)), 255, dtype=torch.uint8, device=device)
    data_view = pool[:, : page * data_bytes].unflatten(1, (page, data_bytes))
    scale_view = pool[:, page * data_bytes :].unflatten(1, (page, scale_bytes))
    for some in torch.cat(rows).to(device).split(1 << 19):
        x = torch.randn(len(some), case.dim, generator=generator, device=device)
        # gains for runs of 32 channels, so that the groups of an FP4 key have different scales
        gain = torch.rand(len(some), max(1, case.dim // 32), generator=generator, device=device) * 6 - 3
        data, scales = pack_index((x.unflatten(1, (gain.shape[1], -1)) * torch.exp2(gain).unsqueeze(-1)).flatten(1),
                                  case.format)  # fmt: skip
        data_view[some // page, some % page] = data
        scale_view[some // page, some % page] = scales
    return pool.view(-1, data_bytes + scale_bytes), table.to(device)


def _query_args(case: Case, generator: torch.Generator) -> list[Tensor]:
    device, config = generator.device, case.config
    q = torch.randn(case.tokens, case.heads * case.dim, generator=generator, device=device)
    angle = torch.rand(case.tokens, config.qk_rope_head_dim // 2, generator=generator, device=device) * 6.3
    weight = torch.randn(case.tokens, case.heads, generator=generator, device=device)
    return [q.to(torch.bfloat16), torch.cat((angle.cos(), angle.sin()), -1), weight]


def _score_args(case: Case, generator: torch.Generator) -> Args:
    data, weight = index_query(*_query_args(case, generator), num_heads=case.heads, format=case.format)
    pool, table = _pool(case, generator)
    lengths = torch.tensor([length for _, length in case.spans], dtype=torch.int64)
    requests = torch.repeat_interleave(torch.arange(len(case.spans)), lengths).to(generator.device)
    return [data, weight, pool, table, requests, case.positions().to(generator.device)]


def _checked_rows(case: Case) -> Tensor:
    """Rows that are compared with the reference: all, or as many as fit, spread evenly."""
    rows = max(1, _CHECKED_KEYS // (case.columns * StateLayout().entries_per_page(RATIO)))
    return torch.linspace(0, max(0, case.tokens - 1), min(rows, case.tokens)).round().long()


def _scores(case: Case, args: Sequence[Tensor], attrs: dict[str, Any]) -> Tensor:
    """The reference's scores of the checked rows, a few rows at a time."""
    rows = _checked_rows(case).to(args[0].device)
    step = max(1, _REFERENCE_KEYS // (args[3].shape[1] * attrs["entries_per_page"]))
    known = {name: attrs[name] for name in ("ratio", "entries_per_page", "format")}
    out = [torch.empty(0, args[3].shape[1], attrs["entries_per_page"], device=args[0].device)]
    for some in rows.split(step):
        out.append(index_scores(args[0][some], args[1][some], args[2], args[3], args[4][some], args[5][some], **known))
    return torch.cat(out)


def _score_error(case: Case) -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
    def error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        out, ref = outputs[0][_checked_rows(case).to(outputs[0].device)], expected[0]
        finite = ref.isfinite()
        if not torch.equal(finite, out.isfinite()) or bool((out[~finite] != float("-inf")).any()):
            return float("inf")
        if bool(outputs[0].isnan().any()):
            return float("inf")
        if not bool(finite.any()):
            return 0.0
        return ((out[finite] - ref[finite]).abs().max() / ref[finite].abs().max()).item()

    return error


def _pick_error(case: Case) -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
    """How far, of the largest score, the worst pick lies below the best entry left out; infinity if they are no set."""

    def error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        picks = outputs[0]
        rows, seen = _checked_rows(case).to(picks.device), (case.positions().to(picks.device) + 1) // RATIO
        topk = picks.shape[1]
        count = seen.clamp(max=topk).unsqueeze(1)
        place = torch.arange(topk, device=picks.device)
        rising = (picks[:, 1:] > picks[:, :-1]) | (place[1:] >= count)
        inside = torch.where(place < count, (picks >= 0) & (picks < seen.unsqueeze(1)), picks == -1)
        if not bool(rising.all()) or not bool(inside.all()):
            return float("inf")
        return pick_loss(picks[rows], expected[0].flatten(1), seen[rows])

    return error


def pick_loss(picks_TK: Tensor, scores_TN: Tensor, seen_T: Tensor) -> float:
    """How far, of the row's largest score, the worst pick lies below the best entry left out, at worst of all rows."""
    chosen = seen_T > picks_TK.shape[1]  # others have no choice
    picks, scores = picks_TK[chosen].long(), scores_TN[chosen]
    if not picks.numel():
        return 0.0
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, picks.clamp(min=0), True)
    best_left = scores.masked_fill(taken, float("-inf")).amax(1)
    worst_taken = scores.masked_fill(~taken, float("inf")).amin(1)
    largest = scores.masked_fill(~scores.isfinite(), 0.0).abs().amax(1)
    apart = (best_left - worst_taken).clamp(min=0) / largest.clamp(min=1e-30)
    return float("inf") if bool(apart.isnan().any()) else apart.max().item()


def _score_values(case: Case) -> tuple[Value, ...]:
    return (
        Value(("T", case.heads, case.dim), "uint8"),
        Value(("T", case.heads), "float32"),
        Value(("N_index", case.key_bytes), "uint8", "pool"),
        Value(("R", "P_index"), "int64", "input"),
        Value(("T",), "int64", "input"),
        Value(("T",), "int64", "input"),
    )


def _purpose(case: Case) -> frozenset[Any]:
    return frozenset({"check", "bench"}) if case.bench else frozenset({"check"})


def _read(case: Case) -> tuple[float, float]:
    """Bytes that scoring reads at least, and its flops: rows that see at most topk entries are scored too."""
    per_token = case.heads * (case.dim + 4) + 16
    table = 8 * sum(-(-count // StateLayout().entries_per_page(RATIO)) for count in case.entries())
    keys = sum(case.entries()) * case.key_bytes
    seen = int(((case.positions() + 1) // RATIO).sum())
    return float(case.tokens * per_token + table + keys), 2.0 * case.heads * case.dim * seen


def scores(case: Case) -> Workload:
    """index_scores of a case."""
    page = StateLayout().entries_per_page(RATIO)
    attrs: dict[str, Any] = {"ratio": RATIO, "entries_per_page": page, "format": case.format}
    read, flops = _read(case)
    return Workload(
        label=f"{case.model} {case.format} {case.label}",
        node=OpNode("index_scores", attrs, _score_values(case), (Value(("T", "P_index", page), "float32"),)),
        symbols=case.symbols,
        make=lambda generator: _score_args(case, generator),
        bytes_moved=read + 4.0 * case.tokens * case.columns * page,
        flops=flops,
        unit="fp8",
        reference=lambda *args, **known: _scores(case, args, known),
        error=_score_error(case),
        purpose=_purpose(case),
    )


def picks(case: Case) -> Workload:
    """index_topk_packed of a case."""
    page, topk = StateLayout().entries_per_page(RATIO), case.config.index_topk
    attrs: dict[str, Any] = {"ratio": RATIO, "entries_per_page": page, "topk": topk, "format": case.format}
    read, flops = _read(case)
    return Workload(
        label=f"{case.model} {case.format} {case.label}",
        node=OpNode("index_topk_packed", attrs, _score_values(case), (Value(("T", topk), "int32"),)),
        symbols=case.symbols,
        make=lambda generator: _score_args(case, generator),
        bytes_moved=read + 4.0 * case.tokens * topk,
        flops=flops,
        unit="fp8",
        reference=lambda *args, **known: _scores(case, args, known),
        error=_pick_error(case),
        purpose=_purpose(case),
    )


def query_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the dequantised queries times their weights, by norm: a rounding may fall the other way, one in many."""
    (data, weight), (ref_data, ref_weight) = outputs, expected
    ref = ref_data.view(torch.float8_e4m3fn).float() * ref_weight.unsqueeze(-1)
    out = data.view(torch.float8_e4m3fn).float() * weight.unsqueeze(-1)
    return ((out - ref).norm() / ref.norm().clamp(min=1e-30)).item() if ref.numel() else 0.0


def query_share(outputs: Sequence[Tensor], expected: Sequence[Tensor], *, slack: float) -> float:
    """Of (bytes [T, I, C], weights [T, I]): the share of bytes that differ; infinity where a product is further off.

    `slack`: what it may be off besides its own step, as a share of its head's largest. A rotated channel that fell to
    its neighbour in bfloat16 moves the whole head; an E2M1 value has steps of up to two thirds.
    """
    (data, weight), (ref_data, ref_weight) = outputs, expected
    if data.shape != ref_data.shape or weight.shape != ref_weight.shape:
        return math.inf
    if not data.numel():
        return 0.0
    fp8 = torch.float8_e4m3fn
    signed = [w.sign().unsqueeze(-1) * d.view(fp8).float() for d, w in ((data, weight), (ref_data, ref_weight))]
    out, ref = (values.to(fp8) for values in signed)
    size, ref_size = weight.abs().unsqueeze(-1), ref_weight.abs().unsqueeze(-1)
    most = (ref.float() * ref_size).abs().amax(-1, keepdim=True)
    return e4m3_apart(out, size, ref, ref_size, slack * most) / data.numel()


def query(case: Case) -> Workload:
    """index_query of a case."""
    heads, dim, rope_dim = case.heads, case.dim, case.config.qk_rope_head_dim
    inputs = (
        Value(("T", heads * dim), "bfloat16"),
        Value(("T", rope_dim), "float32"),
        Value(("T", heads), "float32"),
    )
    outputs = (Value(("T", heads, dim), "uint8"), Value(("T", heads), "float32"))
    per_token = heads * dim * 3 + 4 * rope_dim + 8 * heads
    return Workload(
        label=f"{case.model} {case.format} {case.label}",
        node=OpNode("index_query", {"num_heads": heads, "format": case.format}, inputs, outputs),
        symbols={"T": case.tokens},
        make=lambda generator: list(_query_args(case, generator)),
        bytes_moved=float(case.tokens * per_token),
        flops=2.0 * case.tokens * heads * dim * dim,
        error=query_error,
        purpose=_purpose(case),
    )


def _row_args(counts: Sequence[int], columns: int, kind: str, generator: torch.Generator) -> Args:
    device = generator.device
    scores = torch.randn(len(counts), columns, 64, generator=generator, device=device)
    if kind == "ties":
        scores = (scores * 2).round() / 2
    if kind == "nan":
        scores = torch.where(torch.rand_like(scores) < 0.9, float("nan"), scores)
        scores[::3] = float("nan")
    if kind == "zeros":
        scores = torch.copysign(torch.zeros_like(scores), scores)
    seen = torch.tensor(counts, dtype=torch.int64, device=device)
    # what is not seen is as high as can be
    hidden = torch.arange(columns * 64, device=device) >= seen.unsqueeze(1)
    scores.flatten(1).masked_fill_(hidden, float("inf"))
    extra = torch.randint(0, RATIO, (len(counts),), generator=generator, device=device)
    return [scores, seen * RATIO - 1 + extra]


def rows(label: str, counts: Sequence[int], topk: int, kind: str = "normal", *, bench: bool = False) -> Workload:
    """topk_rows of rows that see so many entries each."""
    columns = max(1, -(-max([*counts, 1]) // 64) + (not bench))
    return Workload(
        label=label,
        node=OpNode(
            "topk_rows",
            {"ratio": RATIO, "topk": topk},
            (Value(("T", "P_index", 64), "float32"), Value(("T",), "int64", "input")),
            (Value(("T", topk), "int32"),),
        ),
        symbols={"T": len(counts), "P_index": columns},
        make=lambda generator: _row_args(counts, columns, kind, generator),
        bytes_moved=4.0 * (sum(counts) + topk * len(counts)),
        reference=lambda scores, positions, **attrs: torch.cat(
            [topk_rows(scores[:0], positions[:0], **attrs)]
            + [topk_rows(s, p, **attrs) for s, p in zip(scores.split(64), positions.split(64))]
        ),
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


def _decode(batch: int, context: int) -> tuple[Span, ...]:
    """One new token of each of `batch` requests that hold `context` tokens with it."""
    return ((context - 1, 1),) * batch


# Lengths where an entry, a page, the selection or a way of selecting begins or ends; all in one ragged batch.
_EDGES = (1, 2, 3, 4, 5, 7, 8, 255, 256, 257, 259, 260, 2047, 2048, 2051, 2052, 4095, 4096, 4100, 8191, 8192, 8196,
          32767, 32768, 32772)  # fmt: skip
_LONG_EDGES = ((1 << 17) - 1, 1 << 17, (1 << 17) + 4, (1 << 20) - 5, (1 << 20) - 1, 1 << 20)
_RAGGED = ((0, 1), (0, 129), (126, 3), (1000, 300), (511, 1), (2040, 24), (3000, 700))


def _cases() -> tuple[list[Case], list[Case]]:
    """(cases of scores, cases of picks)."""
    scored, picked = [], []
    for form in _FORMATS:
        for model in ("nano", "flash", "pro"):
            edges = tuple(length for length in _EDGES if model != "nano" or length <= 4096)
            both = [
                Case(model, form, (), "decode 0"),
                Case(model, form, _decode(1, 1), "decode 1 @1"),
                Case(model, form, tuple((length - 1, 1) for length in edges), "decode edges"),
                Case(model, form, _RAGGED, "prefill ragged"),
            ]
            picked += both
            scored += both if model != "pro" else []  # pro's scores are flash's
        picked.append(Case("nano", form, _decode(64, 2048), "decode 64 @2K", bench=True))
        picked.append(Case("flash", form, tuple((length - 1, 1) for length in _LONG_EDGES), "decode long edges"))
        picked.append(Case("pro", form, tuple((length - 1, 1) for length in _LONG_EDGES), "decode long edges"))
        picked.append(Case("flash", form, (((1 << 20) - 700, 700), (5000, 77)), "prefill long ragged"))
        for batch, context, name in _DECODES:
            case = Case("flash", form, _decode(batch, context), f"decode {batch} @{name}", bench=True)
            scored.append(case)
            picked.append(case)
        for batch, context, name in ((64, 1 << 17, "128K"), (1, 1 << 20, "1M")):
            picked.append(Case("pro", form, _decode(batch, context), f"decode {batch} @{name}", bench=True))
        for tokens, end, name in ((8192, 8192, "0"), (8192, 1 << 17, "120K"), (1024, 1 << 20, "1023K")):
            case = Case("flash", form, ((end - tokens, tokens),), f"prefill {tokens} @{name}", bench=True)
            scored.append(case)
            picked.append(case)
        picked.append(Case("pro", form, (((1 << 17) - 8192, 8192),), "prefill 8192 @120K", bench=True))
    return scored, picked


_DECODES = ((1, 8192, "8K"), (64, 8192, "8K"), (256, 8192, "8K"), (1, 1 << 17, "128K"), (16, 1 << 17, "128K"),
            (64, 1 << 17, "128K"), (1, 1 << 20, "1M"), (8, 1 << 20, "1M"))  # fmt: skip


def _row_workloads() -> list[Workload]:
    edges = (0, 1, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2048, 2049, 8191, 8192, 8193, 32767, 32768, 32769,
             65536, 65543, 262143, 262144)  # fmt: skip
    out = [rows(f"top {k} edges {kind}", edges, k, kind) for k in (512, 1024) for kind in ("normal", "ties", "nan")]
    out.append(rows("top 64 edges", [e for e in edges if e <= 9000], 64))
    out.append(rows("top 512 zeros", (600, 9000, 40000), 512, "zeros"))
    out.append(rows("top 512 of nothing", (), 512))
    for topk in (512, 1024):
        for count, entries in ((1, 262144), (64, 262144), (256, 262144), (64, 32768), (256, 32768), (4096, 32768)):
            out.append(rows(f"top {topk} of {entries} x {count}", [entries] * count, topk, bench=True))
    return out


def workloads() -> tuple[Workload, ...]:
    queries = [
        Case(model, form, ((0, tokens),), f"query {tokens}", bench=model == "flash" and tokens > 0)
        for form in _FORMATS
        for model, sizes in (("nano", (0, 1, 67)), ("flash", (0, 1, 65, 256, 1024, 8192)))
        for tokens in sizes
    ]
    scored, picked = _cases()
    return (*map(query, queries), *map(scores, scored), *_row_workloads(), *map(picks, picked))
