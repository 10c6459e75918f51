"""Workloads of the compressors: decode, prefill, and ragged batches of every chunk length and start.

A batch is a list of spans, one request each. Rings and state hold random rows, as if earlier steps had left them; the
pools hold random bytes, so that what must stay shows if it does not. `padded` batches end in what a CUDA graph leaves
unused: tokens of a request in the null slot, and ends below 0.

Legend: T tokens, E entries completed, C channels of an entry, D channels of a projected row, Z request slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.rope import entry_rope_table, rope_frequencies
from dsv4c.ops.formats import index_sizes, kv_sizes
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of
from dsv4c.schedules.workloads.rows import Draw, index_error, kv_error, pool_rows

Kind = Literal["c4", "index fp8", "index fp4", "c128", "online"]
Span = tuple[int, int]
"""First position and number of new tokens of one request."""

_STATE_TOLERANCE = 1e-5  # of a running sum of up to 128 terms
_PADDING = 5  # unused tokens, and unused entries


@dataclass(frozen=True)
class Case:
    """One call of a compressor of a preset."""

    model: str | ModelConfig
    kind: Kind
    spans: tuple[Span, ...]
    label: str
    bench: bool = False
    padded: bool = False
    dtype: str = "float32"
    extra_ring: int = 0
    extra_columns: int = 0
    """Columns of other projections behind each row: k and gate are then a view."""

    @property
    def config(self) -> ModelConfig:
        return config_of(self.model)

    @property
    def ratio(self) -> int:
        return 128 if self.kind in ("c128", "online") else 4

    @property
    def overlap(self) -> bool:
        return self.ratio == 4

    @property
    def format(self) -> Any:
        return {"index fp8": "fp8", "index fp4": "fp4"}.get(self.kind, "kv")

    @property
    def dim(self) -> int:
        return self.config.head_dim if self.format == "kv" else self.config.index_head_dim

    @property
    def channels(self) -> int:
        return self.dim * (2 if self.overlap else 1)

    @property
    def ring(self) -> int:
        return StateLayout(extra_ring=self.extra_ring).ring(self.ratio, self.overlap)

    @property
    def entries_per_page(self) -> int:
        return StateLayout().entries_per_page(self.ratio)

    @property
    def entry_bytes(self) -> int:
        sizes = (
            kv_sizes(self.dim, self.config.qk_rope_head_dim)
            if self.format == "kv"
            else index_sizes(self.dim, self.format)
        )
        return sum(sizes)

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.spans) + _PADDING * self.padded

    @property
    def entries(self) -> int:
        """Entries that the spans complete."""
        return sum((start + length) // self.ratio - start // self.ratio for start, length in self.spans)

    def symbols(self) -> dict[str, int]:
        group = "index" if self.kind.startswith("index") else f"c{self.ratio}"
        return {
            "T": self.tokens, f"E_{self.ratio}": self.entries + _PADDING * self.padded,
            "R": len(self.spans) + self.padded, "Z": len(self.spans) + 2,
            f"N_{group}": pool_rows(self.entries, self.entries_per_page),
        }  # fmt: skip


def node(case: Case) -> OpNode:
    """The op as the GPU program has it."""
    dim, wide, rope = case.dim, 2 * case.channels, case.config.qk_rope_head_dim
    pool = next(name for name in case.symbols() if name.startswith("N_"))
    entries, tokens, requests = f"E_{case.ratio}", Value(("T",), "int64", "input"), Value(("R",), "int64", "input")
    strides = (wide + case.extra_columns, 1) if case.extra_columns else None
    ring = Value(("Z", case.ring, case.channels), "float32", "pool")
    state = (Value(("Z", 3, dim), "float32", "pool"),) if case.kind == "online" else (ring, ring)
    inputs = (
        Value(("T", wide), case.dtype, strides=strides),
        Value((case.ratio, case.channels), "float32", "weight"),
        *state,
        Value((dim,), "float32", "weight", exact="bfloat16"),
        Value((entries, rope), "float32"),
        Value((pool, case.entry_bytes), "uint8", "pool"),
        Value((entries,), "int64"),
        tokens, tokens, requests, requests, requests,
        Value((entries,), "int64", "input"),
    )  # fmt: skip
    attrs: dict[str, Any] = {
        "ratio": case.ratio, "eps": case.config.rms_norm_eps, "entries_per_page": case.entries_per_page,
    }  # fmt: skip
    if case.kind == "online":
        return OpNode("compress_online_pack", attrs, inputs, (), (2, 5))
    return OpNode("compress_pack", {**attrs, "overlap": case.overlap, "format": case.format}, inputs, (), (2, 3, 6))


def make(case: Case, generator: torch.Generator) -> Args:
    """The call's tensors, on the generator's device."""
    draw, symbols, config = Draw(generator), case.symbols(), case.config
    device, requests = draw.device, len(case.spans)
    lengths = torch.tensor([length for _, length in case.spans], dtype=torch.int64)
    starts = torch.tensor([start for start, _ in case.spans], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(requests), lengths)
    positions = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows] + starts[rows]
    ends = torch.nonzero((positions + 1) % case.ratio == 0).squeeze(1)
    seq_ends = starts + lengths
    slots = 1 + torch.randperm(requests + 1, generator=generator, device=device).cpu()[:requests]
    rows_E = draw.slots(len(ends), symbols[next(n for n in symbols if n.startswith("N_"))], case.entries_per_page)
    if case.padded:
        none, zero = torch.full((_PADDING,), -1), torch.zeros(_PADDING, dtype=torch.int64)
        rows = torch.cat((rows, torch.full((_PADDING,), requests)))
        positions, ends = torch.cat((positions, zero)), torch.cat((ends, none))
        starts, seq_ends, slots = (torch.cat((t, torch.zeros(1, dtype=torch.int64))) for t in (starts, seq_ends, slots))
        rows_E = torch.cat((rows_E, zero.to(device)))
    wide = 2 * case.channels
    k_gate = draw.normal(len(rows), wide + case.extra_columns)
    k_gate[:, case.channels : wide] *= 2
    k_gate = k_gate.to(getattr(torch, case.dtype))[:, :wide]
    frequency = rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling).to(device)
    on_device = [t.to(device) for t in (positions, rows, starts, seq_ends, slots, ends)]
    table = entry_rope_table(on_device[0], on_device[5].clamp(min=0), frequency, ratio=case.ratio)
    if not len(rows):
        table = torch.zeros(0, config.qk_rope_head_dim, device=device)
    state = [draw.normal(symbols["Z"], case.ring, case.channels) for _ in range(2)]
    if case.kind == "online":
        state = [draw.normal(symbols["Z"], 3, case.dim)]
        state[0][:, 1] = 1 + state[0][:, 1].abs()  # a sum of exponentials, the largest of them 1
    pool = draw.pool(symbols[next(n for n in symbols if n.startswith("N_"))], case.entry_bytes)
    ape = draw.normal(case.ratio, case.channels)
    return [k_gate, ape, *state, draw.weight(case.dim), table, pool, rows_E, *on_device]


def error(case: Case, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The share of new bytes in the pool that differ; infinite if a ring or state, the null slot apart, is wrong."""
    pool, ref_pool = outputs[-1], expected[-1]
    for out, ref in zip(outputs[:-1], expected[:-1], strict=True):
        exact = case.kind != "online"
        apart = (out[1:] - ref[1:]).abs().amax().item() / ref[1:].abs().amax().item()
        if out.shape != ref.shape or (exact and not torch.equal(out[1:], ref[1:])) or not apart <= _STATE_TOLERANCE:
            return math.inf
    written = case.entries
    if case.format == "kv":
        return kv_error(
            pool, ref_pool, head_dim=case.dim, rope_dim=case.config.qk_rope_head_dim,
            entries_per_page=case.entries_per_page, written=written,
        )  # fmt: skip
    return index_error(
        pool, ref_pool, dim=case.dim, fmt=case.format, entries_per_page=case.entries_per_page, written=written
    )


def bytes_moved(case: Case) -> float:
    """Projected rows once, the entries written, ring or state rows read and written."""
    wide = 2 * case.channels * (2 if case.dtype == "bfloat16" else 4)
    moved = float(case.tokens * wide + case.entries * (case.entry_bytes + 4 * case.config.qk_rope_head_dim))
    width = case.ratio * (2 if case.overlap else 1)
    for start, length in case.spans:
        end = start + length
        if case.kind == "online":
            moved += 24 * case.dim * (start % case.ratio > 0) / 2 + 24 * case.dim * (end % case.ratio > 0) / 2
            continue
        moved += 8 * case.channels * min(length, case.ring)
        for last in range(start - start % case.ratio + case.ratio - 1, min(end, start + width), case.ratio):
            moved += 8 * case.dim * (start - max(0, last - width + 1) if last - width + 1 < start else 0)
    return moved


def workload(case: Case) -> Workload:
    return Workload(
        label=f"{case.model} {case.kind} {case.label}",
        node=node(case),
        symbols=case.symbols(),
        make=lambda generator: make(case, generator),
        bytes_moved=bytes_moved(case),
        error=lambda outputs, expected: error(case, outputs, expected),
        purpose=frozenset({"check", "bench"}) if case.bench else frozenset({"check"}),
    )


_LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255)
_KINDS: tuple[Kind, ...] = ("c4", "index fp8", "index fp4", "c128", "online")


def decode(batch: int, context: int) -> tuple[Span, ...]:
    """One new token of each of `batch` requests, at every residue of the position in turn."""
    return tuple((context + i, 1) for i in range(batch))


def ragged(ratio: int, base: int, lengths: Sequence[int] = _LENGTHS) -> tuple[Span, ...]:
    """Chunks of every length at every residue of the start: what a step finds in a ring and what it overwrites."""
    residues = range(8) if ratio == 4 else range(ratio)
    return tuple((base + residue, length) for residue, length in itertools.product(residues, lengths))


def _checks(model: str | ModelConfig) -> list[Case]:
    cases = []
    for kind in _KINDS:
        ratio = 128 if kind in ("c128", "online") else 4
        cases.append(Case(model, kind, (), "decode 0"))
        cases.append(Case(model, kind, ragged(ratio, 0), "ragged @0"))
        cases.append(Case(model, kind, ragged(ratio, 1280), "ragged @1280", padded=True))
        # rings read and overwritten by the same step, for either ratio
        cases.append(Case(model, kind, ((3, 9), (126, 3), (0, 1)), "short", padded=True))
        cases.append(Case(model, kind, ((0, 1), (0, 4), (7, 513), (1 << 19, 1), (3, 1)), "mixed", padded=True))
        cases.append(Case(model, kind, ((0, 1500), (5, 700), (127, 1)), "prefill mixed", padded=True, extra_columns=64))
        if kind != "online":
            cases.append(Case(model, kind, ragged(ratio, 640, (1, 5, 255)), "long ring", extra_ring=3))
    cases.append(Case(model, "c4", ragged(4, 40), "ragged bf16", dtype="bfloat16"))
    cases.append(Case(model, "c128", ragged(128, 40, (1, 129)), "ragged bf16", dtype="bfloat16"))
    return cases


def _benches(model: str | ModelConfig, sizes: Sequence[int]) -> list[Case]:
    cases = []
    for kind in _KINDS:
        for batch in (1, 64, 256):
            context = 8191 if batch == 1 else 8192  # the single token completes an entry of either kind
            cases.append(Case(model, kind, decode(batch, context), f"decode {batch} @8K", bench=True))
        for tokens in sizes:
            cases.append(Case(model, kind, ((0, tokens),), f"prefill {tokens}", bench=True))
    return cases


def workloads() -> tuple[Workload, ...]:
    cases = [*_checks("nano"), *_checks("flash"), *_benches("flash", (1024, 4096, 8192, 16384))]
    cases.append(Case("flash", "c4", ((1001, 2048),) * 4, "prefill 4 x 2048", bench=True))
    cases.append(Case("flash", "c128", ((1001, 2048),) * 4, "prefill 4 x 2048", bench=True))
    return tuple(workload(case) for case in cases)
