"""How far results lie from a reference's, in the measure that the tolerances of schedules are stated in.

Numbers are compared with the largest magnitude beside them. Quantised bytes may fall to their neighbour where float32
sums differ in order: any byte further off is an infinite error, and of those near by the share counts. A choice (the
best experts, the best entries, a drawn token) is judged by what it loses to the best one, not by its ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.ops import Op
from dsv4c.ops.formats import index_sizes, kv_sizes
from dsv4c.ops.index import index_scores
from dsv4c.schedules.workloads import gate, hyper, index, rows, sampling


@dataclass(frozen=True)
class Apart:
    """The error of one result. With `bytes`, a share of so many quantised bytes, of which `together` fall at once."""

    output: int
    error: float
    bytes: int = 0
    together: int = 0


@dataclass(frozen=True)
class Seen:
    """One call: its operands before it, what it gave, and what its reference gives. `null`: rows that are nobody's."""

    op: Op
    attrs: Mapping[str, Any]
    args: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    expected: Sequence[Tensor]
    null: Sequence[int]

    def arg(self, name: str) -> Tensor:
        found = self.args[self.op.parameters.index(name)]
        assert found is not None
        return found

    @property
    def tensors(self) -> list[Tensor]:
        return [arg for arg in self.args if arg is not None]


Measure = Callable[[Seen], Iterator[Apart]]


def measure(seen: Seen) -> list[Apart]:
    """The errors of every result of a call, in the order of its outputs."""
    return list(_MEASURES.get(seen.op.name, _by_dtype)(seen))


def largest_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, over outputs, of max|out - ref| / max|ref|; NaN or a different shape gives infinity."""
    worst = 0.0
    for out, ref in zip(outputs, expected, strict=True):
        if out.shape != ref.shape:
            return math.inf
        if not out.numel():
            continue
        if not ref.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(out.long(), ref.long()) else math.inf)
            continue
        wide, wanted = out.float(), ref.float()
        apart = (wide - wanted).masked_fill(wide == wanted, 0.0).abs().max().item()  # what is masked is -inf in both
        scale = wanted.masked_fill(~wanted.isfinite(), 0.0).abs().max().item()
        if not math.isfinite(apart):
            return math.inf
        worst = max(worst, apart / scale if scale else (math.inf if apart else 0.0))
    return worst


def _by_dtype(seen: Seen) -> Iterator[Apart]:
    for i, (out, ref, first) in enumerate(zip(seen.outputs, seen.expected, seen.null, strict=True)):
        yield Apart(i, largest_error([out[first:]], [ref[first:]]))


def _hyper(seen: Seen) -> Iterator[Apart]:
    yield Apart(0, hyper.error(seen.outputs, seen.expected) if seen.outputs[0].numel() else 0.0)


def _quantised(seen: Seen) -> Iterator[Apart]:
    yield _rows(seen, 0)


def _rows(seen: Seen, first: int) -> Apart:
    out, ref = seen.outputs[first : first + 2], seen.expected[first : first + 2]
    group = out[0].shape[-1] // out[1].shape[-1]
    return Apart(first, rows.quantised_error(out, ref), out[0].numel(), group)


def _entries(seen: Seen, output: int, dim: int, rope_dim: int, form: str) -> Apart:
    written, per_page = seen.arg("slots").numel(), int(seen.attrs["entries_per_page"])
    out, ref = seen.outputs[output], seen.expected[output]
    if form == "kv":
        size, known = sum(kv_sizes(dim, rope_dim)), {"head_dim": dim, "rope_dim": rope_dim}
        error = rows.kv_error(out, ref, entries_per_page=per_page, written=written, **known)
    else:
        fmt: Any = form
        size = sum(index_sizes(dim, fmt))
        error = rows.index_error(out, ref, dim=dim, fmt=fmt, entries_per_page=per_page, written=written)
    return Apart(output, error, max(1, written) * size, size)


def _window(seen: Seen) -> Iterator[Apart]:
    weight = seen.arg("kv_weight" if seen.op.name == "qkv_norm_rope_pack" else "weight")
    yield _entries(seen, 0, weight.shape[0], seen.arg("table_TR").shape[-1], "kv")
    if len(seen.outputs) > 1:
        yield _rows(seen, 1)


def _compressed(seen: Seen) -> Iterator[Apart]:
    """Rings hold what was projected, bit for bit; a running softmax is a sum in some order."""
    last = len(seen.outputs) - 1
    for i in range(last):
        error = largest_error([seen.outputs[i][1:]], [seen.expected[i][1:]])
        exact = seen.op.name == "compress_pack"
        yield Apart(i, math.inf if error > (0.0 if exact else 1e-5) else 0.0)
    form = str(seen.attrs.get("format", "kv"))
    yield _entries(seen, last, seen.arg("norm_weight").shape[0], seen.arg("entry_table_ER").shape[-1], form)


def _gate(seen: Seen) -> Iterator[Apart]:
    known = gate.scores_and_ranks(seen.op.name, seen.tensors)
    yield Apart(0, gate.choice_error(seen.op.name, float(seen.attrs["scaling"]), seen.outputs, known))


def _query(seen: Seen) -> Iterator[Apart]:
    """One byte of a head with a large weight can be 0.2 % of a few queries: bytes count, and weights by themselves."""
    (data, weight), (ref_data, ref_weight) = seen.outputs, seen.expected
    coarse = 2 / 3 if seen.attrs["format"] == "fp4" else 2.0**-7
    error = index.query_share((data, weight), (ref_data, ref_weight), slack=coarse)
    yield Apart(0, error, data.numel(), data.shape[-1])
    if not math.isinf(error):
        same = (data == ref_data).all(-1)
        yield Apart(1, largest_error([weight[same]], [ref_weight[same]]))


def _picks(seen: Seen) -> Iterator[Apart]:
    """Picks of packed keys are ascending, those of plain keys in any order."""
    found, wanted = (picks.sort(-1).values for picks in (seen.outputs[0], seen.expected[0]))
    positions = seen.arg("positions")
    entries = (positions + 1) // int(seen.attrs["ratio"])
    ordered = seen.op.name == "index_topk" or torch.equal(
        torch.where(seen.outputs[0] < 0, 2**30, seen.outputs[0]).sort(-1).values,
        torch.where(seen.outputs[0] < 0, 2**30, seen.outputs[0]),
    )
    counts = torch.equal((found < 0).sum(-1), (wanted < 0).sum(-1))
    real = found >= 0
    twice = ((found[:, 1:] == found[:, :-1]) & real[:, 1:]).any()
    outside = (real & (found >= entries.unsqueeze(1))).any()
    if not ordered or not counts or bool(twice) or bool(outside):
        yield Apart(0, math.inf)
        return
    if torch.equal(found, wanted):
        yield Apart(0, 0.0)
        return
    yield Apart(0, index.pick_loss(seen.outputs[0], _scores(seen), entries))


def _scores(seen: Seen) -> Tensor:
    if seen.op.name == "index_topk_packed":
        known = {name: seen.attrs[name] for name in ("ratio", "entries_per_page", "format")}
        return index_scores(*seen.tensors, **known).flatten(1)
    q_TIC, weight_TI, pool_NC, pages_RP, request_rows, positions = seen.tensors
    per_page = int(seen.attrs["entries_per_page"])
    entry = torch.arange(pages_RP.shape[1] * per_page, device=positions.device)
    keys = pool_NC[pages_RP[request_rows][:, entry // per_page] * per_page + entry % per_page].float()
    scores = torch.einsum("tic,tec->tie", q_TIC.float(), keys).relu()
    scores = torch.einsum("tie,ti->te", scores, weight_TI.float())
    return scores.masked_fill(entry >= ((positions + 1) // int(seen.attrs["ratio"])).unsqueeze(1), float("-inf"))


def _draw(seen: Seen) -> Iterator[Apart]:
    yield Apart(0, sampling.draw_error(seen.outputs, sampling.judged_by(*seen.tensors)))


_MEASURES: Mapping[str, Measure] = {
    **dict.fromkeys(("quantise_rows", "rms_norm_quantise", "rope_quantise", "swiglu_quantise"), _quantised),
    **dict.fromkeys(("norm_rope_pack", "qkv_norm_rope_pack"), _window),
    **dict.fromkeys(("compress_pack", "compress_online_pack"), _compressed),
    **dict.fromkeys(
        (
            f"hc_{name}"
            for name in ("pre", "post", "head", "pre_norm", "post_pre_norm", "head_norm", "pre_norm_quantise",
                         "post_pre_norm_quantise")
        ),
        _hyper,
    ),
    **dict.fromkeys(("gate_bias", "gate_hash", "gate_linear_bias", "gate_linear_hash"), _gate),
    "index_query": _query,
    **dict.fromkeys(("index_topk", "index_topk_packed"), _picks),
    **dict.fromkeys(("sample", "sample_penalised", "sample_drafted"), _draw),
}  # fmt: skip
