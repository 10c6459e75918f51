"""Random calls of the ops whose schedules Blackwell shares with Hopper: workloads of drawn shapes, batches and values.

Shapes are nano's, those of flash and pro with a small vocabulary, and a wide one of few heads. Batches have tails, one
row or none. Values of activations are usual, or some rows are zero, or all are tiny, or large, or rows lie 2^60 apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st

from dsv4c.config import ModelConfig, preset
from dsv4c.schedules._schedule import Schedule
from dsv4c.schedules._workload import Args, Workload
from dsv4c.schedules.workloads import attention, compress, gate, hyper, index, rows, sampling, speculation

Cases = st.SearchStrategy[Workload]

NANO = preset("nano")
FLASH, PRO = (dataclasses.replace(preset(name), vocab_size=509) for name in ("flash", "pro"))
VALUES = ("usual", "zeros", "tiny", "large", "apart")

tokens = st.one_of(st.sampled_from((0, 1, 2, 3, 15, 16, 17, 63, 64, 65)), st.integers(0, 70))
few = st.integers(0, 2)


def twisted(workload: Workload, kind: str, which: Sequence[int]) -> Workload:
    """The workload with its activations (inputs `which`, floating point, dimension 0 is rows) scaled by rows."""

    def make(generator: torch.Generator) -> Args:
        args = workload.make(generator)
        for i in which:
            x = args[i]
            assert x is not None
            exponent = torch.zeros(len(x))
            if kind in ("tiny", "large"):
                exponent += 40 if kind == "large" else -40
            if kind == "apart":
                exponent = torch.randint(-30, 31, (len(x),), generator=generator).float()
            factor = torch.exp2(exponent)
            if kind == "zeros":
                factor = factor * (torch.rand(len(x), generator=generator) < 0.5)
            x.mul_(factor.to(x.dtype).view(-1, *(1 for _ in x.shape[1:])))
        return args

    return workload if kind == "usual" else dataclasses.replace(workload, make=make)


def sized(draw: st.DrawFn, small: ModelConfig = NANO) -> tuple[ModelConfig, int]:
    """A model and a number of tokens: few where rows are wide."""
    model = draw(st.sampled_from((*5 * (small,), FLASH, PRO)))
    return model, draw(tokens if model is small else few)


def hyper_cases(op: str) -> Cases:
    @st.composite
    def cases(draw: st.DrawFn) -> Workload:
        model, count = sized(draw)
        values, extreme = draw(st.sampled_from(VALUES)), draw(st.integers(0, 3)) == 0 and op != "hc_post"
        work = hyper.workload(op, model, count, extreme=extreme)
        return twisted(work, values, (0, 1) if "post" in op else (0,))

    return cases()


def row_cases(op: str) -> Cases:
    which = {"norm_rope_pack": (2,), "qkv_norm_rope_pack": (2,)}.get(op, (0,))
    floats = op not in ("embed", "embed_streams", "rope_table", "entry_rope_table", "token_slots", "entry_slots")

    @st.composite
    def cases(draw: st.DrawFn) -> Workload:
        model, count = sized(draw)
        if op in ("take_rows", "entry_slots", "entry_rope_table"):
            count = max(1, count)  # what is taken is taken of something
        work = rows.workload(op, model, count)
        return twisted(work, draw(st.sampled_from(VALUES)), which) if floats else work

    return cases()


NARROW = dataclasses.replace(NANO, head_dim=256, qk_rope_head_dim=64, num_attention_heads=10, index_topk=40)
WIDE = dataclasses.replace(NANO, head_dim=512, qk_rope_head_dim=64, index_head_dim=128)
SPAN_LENGTHS = (1, 1, 1, 2, 3, 4, 5, 9, 127, 128, 129)


@st.composite
def compress_cases(draw: st.DrawFn, kinds: Sequence[compress.Kind]) -> Workload:
    """Up to four requests, begun or not, whose windows end anywhere; rows padded behind them."""
    model, kind = draw(st.sampled_from((NANO, NANO, NANO, WIDE))), draw(st.sampled_from(kinds))
    start = st.one_of(st.sampled_from((0, 1, 3, 4, 7, 126, 127, 128, 131, 255, 1000)), st.integers(0, 600))
    lengths = SPAN_LENGTHS if model is NANO else SPAN_LENGTHS[:8]
    spans = draw(st.lists(st.tuples(start, st.sampled_from(lengths)), min_size=0, max_size=3))
    case = compress.Case(
        model, kind, tuple(spans), "random", padded=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16"))),
        extra_ring=draw(st.sampled_from((0, 0, 3))) if kind != "online" else 0,
        extra_columns=draw(st.sampled_from((0, 64))),
    )  # fmt: skip
    return compress.workload(case)


@st.composite
def query_cases(draw: st.DrawFn) -> Workload:
    model, count = sized(draw)
    count = min(count, 33)
    form = draw(st.sampled_from(("fp8", "fp4")))
    work = index.query(index.Case(model, form, ((0, count),) if count else (), "random"))
    return twisted(work, draw(st.sampled_from(VALUES)), (0,))


@st.composite
def row_pick_cases(draw: st.DrawFn) -> Workload:
    """Rows around every edge of the selection, some of them over 2^15 entries, where Blackwell bisects for 1,024."""
    topk = draw(st.sampled_from((64, 128, 256, 512, 1024)))
    edges = (0, 1, 63, 64, topk - 1, topk, topk + 1, 2 * topk, 8191, 8192, 8193, 9000, 32767, 32768)
    some = st.one_of(st.sampled_from(edges), st.integers(0, 20_000))
    counts = draw(st.lists(some, min_size=0, max_size=4))
    if draw(st.booleans()):
        counts.append(draw(st.sampled_from((32_769, 33_001, 40_000, 65_543))))
    kind = draw(st.sampled_from(("normal", "ties", "nan", "zeros")))
    return index.rows("random", counts, topk, kind)


@st.composite
def pick_cases(draw: st.DrawFn) -> Workload:
    """Scores and their selection as one call: few entries, but more than are picked."""
    model = draw(st.sampled_from((NANO, dataclasses.replace(FLASH, index_topk=64, index_n_heads=16))))
    start = st.one_of(st.sampled_from((0, 2, 3, 250, 255, 259, 260, 263, 511, 1019)), st.integers(0, 1300))
    spans = draw(st.lists(st.tuples(start, st.sampled_from((1, 1, 2, 3, 9))), min_size=0, max_size=3))
    return index.picks(index.Case(model, draw(st.sampled_from(("fp8", "fp4"))), tuple(spans), "random"))


@st.composite
def attend_cases(draw: st.DrawFn, kind: attention.Kind) -> Workload:
    """Narrow entries, which the plain kernel takes: nano's, and 256 channels of an odd number of heads."""
    model = draw(st.sampled_from((NANO, NANO, NARROW)))
    start = st.one_of(st.sampled_from((0, 1, 3, 4, 63, 64, 126, 127, 128, 255, 511, 1000)), st.integers(0, 1200))
    spans = draw(st.lists(st.tuples(start, st.sampled_from((1, 1, 1, 2, 3, 5))), min_size=0, max_size=3))
    return attention.workload(attention.Case(model, kind, tuple(spans), "random"))


def gate_cases(op: str) -> Cases:
    """Logits between -120 and -87 are left out: of their exponentials a float32 has few bits or none."""

    @st.composite
    def cases(draw: st.DrawFn) -> Workload:
        model, count = sized(draw, dataclasses.replace(NANO, vocab_size=97))
        case = gate.Case(model, op.rpartition("_")[2], False)
        work = gate.workload(case, draw(tokens) if model is not PRO else count, bench=False)

        def make(generator: torch.Generator) -> Args:
            logits, *rest = work.make(generator)
            assert logits is not None
            return [logits.masked_fill_((logits > -120) & (logits < -87), -87), *rest]

        return dataclasses.replace(work, make=make)

    return cases()


@st.composite
def draw_cases(draw: st.DrawFn, op: str) -> Workload:
    """Batches of up to nine rows of every kind of parameters, vocabularies of one chunk to three."""
    mixed = sampling.KINDS[-1]
    kind = draw(st.sampled_from((*sampling.KINDS, mixed, mixed, sampling.RULED)))
    kind = dataclasses.replace(kind, hard=draw(st.booleans()), ruled=draw(st.sampled_from((0.0, 0.5, 1.0))))
    vocab = draw(st.sampled_from((1, 2, 7, 97, 512, 2049, 4096, 4097, 9001)))
    count = draw(st.integers(0, 9)) if vocab < 4096 else draw(st.integers(0, 2))
    return sampling.workload("nano", kind, count, op, vocab=vocab)


@st.composite
def edit_cases(draw: st.DrawFn) -> Workload:
    counts = draw(st.lists(st.sampled_from((0, 1, 2, 127, 128, 129, 300, 700)), min_size=1, max_size=6))
    return sampling.edits("nano", draw(st.integers(0, 9)), counts, draw(st.sampled_from((1, 7, 509, 4097))))


def seat_cases(op: str) -> Cases:
    return st.integers(0, 256).map(lambda count: sampling.seated(count, op == "feed_tokens"))


def draft_cases(op: str) -> Cases:
    known = [case for case in speculation.CASES if case[0].op == op]
    counts = st.one_of(st.sampled_from((0, 1, 2, 127, 128, 129, 200)), st.integers(0, 250))
    return st.tuples(st.sampled_from(known), counts).map(lambda pair: speculation.workload(*pair))


@st.composite
def embedding_cases(draw: st.DrawFn) -> Workload:
    model, count = sized(draw)
    return twisted(speculation.embedded(model, count), draw(st.sampled_from(VALUES)), (0, 1))


CASES: Mapping[str, Cases] = {
    **{
        op: hyper_cases(op)
        for op in ("hc_head", "hc_head_norm", "hc_post", "hc_post_pre_norm", "hc_post_pre_norm_quantise", "hc_pre",
                   "hc_pre_norm", "hc_pre_norm_quantise")
    },
    **{
        op: row_cases(op)
        for op in ("quantise_rows", "swiglu_quantise", "swiglu_pair", "head_norm_rope", "rope_quantise", "rms_norm",
                   "rms_norm_quantise", "norm_rope_pack", "qkv_norm_rope_pack", "embed", "embed_streams", "take_rows",
                   "token_slots", "entry_slots", "rope_table", "entry_rope_table")
    },
    "compress_pack": compress_cases(("c4", "index fp8", "index fp4", "c128")),
    "compress_online_pack": compress_cases(("online",)),
    "index_query": query_cases(),
    "topk_rows": row_pick_cases(),
    "index_topk_packed": pick_cases(),
    "attend_window_packed": attend_cases("window"),
    "attend_csa_packed": attend_cases("csa"),
    "attend_hca_packed": attend_cases("hca"),
    **{op: gate_cases(op) for op in ("gate_bias", "gate_hash")},
    **{op: draw_cases(op) for op in sampling.DRAWS},
    "edit_logits": edit_cases(),
    **{op: seat_cases(op) for op in ("feed_tokens", "keep_tokens")},
    **{op: draft_cases(op) for op in sorted({node.op for node, _ in speculation.CASES})},
    "add_embedding": embedding_cases(),
}  # fmt: skip
"""Op -> calls that every shared schedule of it is checked with, as far as it accepts them."""


OWN = (".triton_wide", ".triton_cluster")
"""Ways of such ops that have a script of their own: wide entries of attention, mHC of few tokens."""


def shared(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Those that these calls check."""
    return [s for s in schedules if s.op in CASES and not s.name.endswith(OWN)]
