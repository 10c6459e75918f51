"""Sampling workloads: rows of logits with every kind of parameters, alone and mixed, and rows that cannot be sampled.

A draw is right if its token arrives first of those that the filters keep, in float64; the error is by how much it is
late, as the logarithm of a ratio of times.

Legend: T rows, V vocabulary, Z seats, M edits, G masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.config import preset
from dsv4c.ops.sampling import IN_PROMPT, exponentials, kept, mask, penalise
from dsv4c.ops.speculation import counts_behind
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload

DRAWS = ("sample", "sample_penalised", "sample_drafted")
SEATS = 257  # of the penalties' table: 256 requests, and nobody's
DEEP = 4  # rows of a request that verifies three drafts


@dataclass(frozen=True)
class Kind:
    """Parameters of a batch; a tuple is chosen from at random, row by row."""

    name: str
    temperature: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] = (0,)
    top_p: tuple[float, ...] = (1.0,)
    min_p: tuple[float, ...] = (0.0,)
    hard: bool = False
    """With rows of equal logits, infinities and NaN."""
    ruled: float = 0.0
    """The share of rows that a mask rules."""


KINDS = (
    Kind("greedy", temperature=(0.0,)),
    Kind("temperature"),
    Kind("top_k", top_k=(50,)),
    Kind("top_p", top_p=(0.95,)),
    Kind("both", top_k=(50,), top_p=(0.95,)),
    Kind(
        "mixed", (0.0, 1e-6, 0.3, 1.0, 2.0), (0, 0, -1, 1, 2, 50, 1000, 10**6), (1.0, 1.0, 0.9, 0.5, 1e-6),
        (0.0, 0.0, 0.05, 1.0), hard=True, ruled=0.4,
    ),
)  # fmt: skip
RULED = Kind("ruled", ruled=1.0)


def _pick(values: Sequence[float], rows: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    at = torch.randint(0, len(values), (rows,), generator=generator, device=generator.device)
    return torch.tensor(values, dtype=dtype, device=generator.device)[at]


def _logits(kind: Kind, rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    logits = 3 * torch.randn(rows, vocab, generator=generator, device=device)
    if not kind.hard:
        return logits
    for row in range(1, rows):
        x, which = logits[row], row % 9
        if which == 1:
            x.fill_(-7.25)
        elif which == 2:
            x.round_()
        elif which == 3:
            x[vocab // 3 :] = -math.inf
        elif which == 4:
            x[vocab - 1] = math.inf if row % 2 else math.nan
        elif which == 5:
            x.mul_(20)
        elif which == 6:
            x.mul_(1e-3)
    if rows > 9:
        logits[9].fill_(-math.inf)
    return logits


def make(kind: Kind, rows: int, vocab: int, op: str, generator: torch.Generator) -> Args:
    """Fresh inputs of `sample`, `sample_penalised` or `sample_drafted`."""
    device = generator.device

    def pick(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return _pick(values, rows, dtype, generator)

    args: Args = [
        _logits(kind, rows, vocab, generator),
        pick(kind.temperature),
        pick(kind.top_k, torch.int32),
        pick(kind.top_p),
        pick(kind.min_p),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator, device=device) * 2 + 1,
        torch.randint(0, 100_000, (rows,), generator=generator, device=device),
    ]
    if op == "sample":
        return args
    slots = torch.randperm(SEATS - 1, generator=generator, device=device)[:rows] + 1
    slots = torch.where(torch.rand(rows, generator=generator, device=device) < 0.2, 0, slots)
    many = torch.randint(0, 4, (SEATS, vocab), generator=generator, device=device)
    rare = torch.rand(SEATS, vocab, generator=generator, device=device)
    counts = torch.where(rare < 0.02, many, 0) + torch.where(rare > 0.98, IN_PROMPT, 0)
    counts[:, 0] = IN_PROMPT - 1  # the most a count can hold
    args += [
        slots, counts.to(torch.int16), pick((1.0, 1.3, 0.8)), pick((0.0, 0.4, -0.5)), pick((0.0, 1.5, -1.0)),
        *_masks(kind, rows, vocab, generator),
    ]  # fmt: skip
    return args if op == "sample_penalised" else _in_chains(args, generator)


def _masks(kind: Kind, rows: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each ruled row's mask, and masks that allow much, little, one token or none; row 0 is nobody's."""
    device = generator.device
    ruled = torch.rand(rows, generator=generator, device=device) < kind.ruled
    own = torch.randperm(rows, generator=generator, device=device) + 1
    words = torch.randint(-(2**31), 2**31, (rows + 1, -(-vocab // 32)), generator=generator, device=device)
    words = words.to(torch.int32)
    for row in range(rows + 1):
        which = row % 6
        if which == 1:
            words[row] = -1
        elif which > 2:
            words[row] = 0
            for token in torch.randint(0, vocab, ((0, 1, 40)[which - 3],), generator=generator, device=device).tolist():
                words[row, token // 32] |= (1 << token % 32) - (1 << 32) * (token % 32 == 31)
    return torch.where(ruled, own, 0), words


def _in_chains(args: Args, generator: torch.Generator) -> Args:
    """Rows in chains of four of a seat, the last one short. Of a row's drafts one is its best token if nothing counts.

    Some drafts are twice in a chain.
    """
    logits, slots = args[0], args[7]
    assert logits is not None and slots is not None
    row = torch.arange(slots.numel(), device=slots.device)
    chain = row % DEEP

    def random() -> Tensor:
        return torch.rand(row.shape, generator=generator, device=slots.device)

    drafted = logits.argmax(-1)
    drafted = torch.where(random() < 0.3, drafted[(row - 1).clamp(min=0)], drafted)
    which = drafted[row - (random() * chain).long()]
    best = logits.amax(-1)
    lifted = (chain > 0) & best.isfinite()
    logits[row[lifted], which[lifted]] = best[lifted] + 0.1
    return [*args[:7], slots[row - chain], *args[8:], chain, drafted]


def judged_by(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a draw is judged by: times of arrival, sound rows; and the seats and counts, if it is counted."""
    logits, temperature, top_k, top_p, min_p, keys, counters, *rest = tensors
    if rest:
        slots, counts, repetition, frequency, presence, mask_rows, masks, *behind = rest
        counts_SV = counts_behind(counts, slots, *behind) if behind else counts[slots]
        penalised = penalise(logits, counts_SV, repetition, frequency, presence)
        logits = mask(torch.where((slots == 0).unsqueeze(1), logits, penalised), mask_rows, masks)
        rest = [] if behind else rest[:2]  # nothing is counted behind drafts
    p, sound = kept(logits, temperature, top_k, top_p, min_p)
    return exponentials(keys, counters, p.shape[1]).div_(p), sound, *rest


def draw_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    tokens, (times, sound, *rest) = outputs[0], expected
    if not tokens.numel():
        return 0.0
    if not torch.equal(tokens >= 0, sound) or tokens.min() < -1 or tokens.max() >= times.shape[1]:
        return math.inf
    if rest:
        slots, counts = rest
        live = sound & (slots != 0)
        old = counts[slots[live], tokens[live]]
        counts = counts.clone()
        counts[slots[live], tokens[live]] = torch.where((old & (IN_PROMPT - 1)) < IN_PROMPT - 1, old + 1, old)
        if not torch.equal(outputs[1], counts):
            return math.inf
    late = (times.gather(1, tokens.clamp(min=0).unsqueeze(1))[:, 0] / times.amin(-1)).log()
    return float(late[sound].max()) if bool(sound.any()) else 0.0


def _node(vocab: int, op: str) -> OpNode:
    row = {n: Value(("T",), n, "input") for n in ("float32", "int32", "int64")}
    inputs = [
        Value(("T", vocab), "float32"), row["float32"], row["int32"], row["float32"], row["float32"], row["int64"],
        row["int64"],
    ]  # fmt: skip
    out = (Value(("T",), "int64"),)
    if op == "sample":
        return OpNode(op, {}, tuple(inputs), out)
    inputs += [row["int64"], Value((SEATS, vocab), "int16", "pool"), *3 * (row["float32"],), row["int64"]]
    inputs += [Value(("G", -(-vocab // 32)), "int32", "input")]
    if op == "sample_penalised":
        return OpNode(op, {}, tuple(inputs), out, mutates=(8,))
    return OpNode(op, {}, (*inputs, row["int64"], row["int64"]), out)


def _baselines(kind: Kind) -> dict[str, Callable[[Args], Callable[[], object]]]:
    def torch_eager(args: Args) -> Callable[[], object]:
        """What an engine would do with torch's own operators: sort, cut, draw."""
        logits, temperature, top_k, top_p = args[:4]
        assert logits is not None and temperature is not None and top_k is not None and top_p is not None

        def run() -> Tensor:
            if kind.temperature == (0.0,):
                return logits.argmax(-1)
            x = logits / temperature.clamp(min=1e-5).unsqueeze(1)
            if kind.top_k == (0,) and kind.top_p == (1.0,):
                p = x.softmax(-1)
            else:
                x, ids = x.sort(-1, descending=True)
                last = x.gather(1, (top_k.clamp(min=1, max=x.shape[1]).long() - 1).unsqueeze(1))
                p = x.masked_fill(x < last, -math.inf).softmax(-1)
                p = p.masked_fill(p.cumsum(-1) - p > top_p.unsqueeze(1), 0.0).scatter(1, ids, p)
            return (p / torch.empty_like(p).exponential_()).argmax(-1)

        return run

    return {"torch eager": torch_eager}


def workload(
    model: str, kind: Kind, rows: int, op: str = "sample", *, bench: bool = True, vocab: int | None = None
) -> Workload:
    """The workload of a batch of rows with parameters of one kind; `vocab` is the model's."""
    vocab = preset(model).vocab_size if vocab is None else vocab
    return Workload(
        label=f"{model} {kind.name} {rows}",
        node=_node(vocab, op),
        symbols={"T": rows, "G": rows + 1},
        make=lambda generator: make(kind, rows, vocab, op, generator),
        bytes_moved=rows * (vocab * (4.0 if op == "sample" else 6.0) + 56),
        unit="fp32",
        reference=judged_by,
        error=draw_error,
        baselines=_baselines(kind),
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


def edits(model: str, rows: int, counts: Sequence[int] = (0, 1, 300, 128, 5), vocab: int | None = None) -> Workload:
    """Edits of some rows: none, one, or more tokens a row, `counts` in turn; `vocab` is the model's."""
    vocab = preset(model).vocab_size if vocab is None else vocab
    numbers = [min(counts[i % len(counts)], vocab) for i in range(rows)]
    total = sum(numbers)

    def make_edits(generator: torch.Generator) -> Args:
        device = generator.device
        size = torch.tensor(numbers, dtype=torch.int64)
        stops = size.cumsum(0).to(device)
        tokens = [torch.randperm(vocab, generator=generator, device=device)[:n] for n in numbers]
        values = torch.randn(total, generator=generator, device=device) * 10
        values[::7] = -math.inf
        logits = torch.randn(rows, vocab, generator=generator, device=device)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return [logits, stops - size.to(device), stops, torch.cat([empty, *tokens]), values]

    inputs = (
        Value(("T", vocab), "float32"), Value(("T",), "int64", "input"), Value(("T",), "int64", "input"),
        Value(("M",), "int64", "input"), Value(("M",), "float32", "input"),
    )  # fmt: skip
    return Workload(
        label=f"{model} edits {rows}",
        node=OpNode("edit_logits", {}, inputs, (Value(("M",), "float32"),), mutates=(0,)),
        symbols={"T": rows, "M": total},
        make=make_edits,
        bytes_moved=20.0 * total,
        unit="fp32",
        error=_exact,
    )


def _exact(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return 0.0 if all(torch.equal(out, ref) for out, ref in zip(outputs, expected, strict=True)) else math.inf


def seated(rows: int, feeds: bool) -> Workload:
    """Tokens to their seats and back; some ids are negative, and some seats' last token too."""
    row, seats = Value(("T",), "int64", "input"), Value((SEATS,), "int64", "pool")

    def make_seats(generator: torch.Generator) -> Args:
        device = generator.device
        where = torch.randperm(SEATS - 1, generator=generator, device=device)[:rows] + 1
        last, ids = (torch.randint(-1, 1000, (n,), generator=generator, device=device) for n in (SEATS, rows))
        ids = torch.where(torch.rand(rows, generator=generator, device=device) < 0.5, -1, ids)
        return [ids, last, where] if feeds else [last, where, ids]

    node = (
        OpNode("feed_tokens", {}, (row, seats, row), (row,))
        if feeds
        else OpNode("keep_tokens", {}, (seats, row, row), (), mutates=(0,))
    )
    return Workload(
        label=f"{'feed' if feeds else 'keep'} {rows}", node=node, symbols={"T": rows}, make=make_seats,
        bytes_moved=32.0 * rows, unit="fp32", error=_exact,
    )  # fmt: skip


def workloads() -> tuple[Workload, ...]:
    plain, mixed = KINDS[1], KINDS[-1]
    out = [workload("nano", mixed, rows, op, bench=False) for rows in (0, 1, 64) for op in DRAWS]
    out += [edits("nano", 64), edits("flash", 64)]
    out += [seated(rows, feeds) for rows in (0, 1, 200) for feeds in (True, False)]
    out += [workload("flash", kind, rows) for kind in KINDS for rows in (1, 64)]
    out += [workload("flash", kind, 256) for kind in (plain, mixed)]
    out += [workload("flash", kind, rows, op) for op in DRAWS[1:] for kind in (plain, mixed) for rows in (1, 64)]
    out += [workload("flash", plain, 256, "sample_penalised")]
    out += [workload("flash", RULED, rows, "sample_penalised") for rows in (1, 64, 256)]
    return tuple(out)
