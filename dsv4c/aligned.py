"""Two programs side by side, value by value: where they first differ, and how far on equal inputs.

Digests of one run, FirstDifference of the other      the first op that gives what the one had nowhere
Values of one run, EqualInputs of the other           errors that do not add up: a call that both programs have is
                                                      compared, and what follows reads what the one had there
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dsv4c.agreement import Seen, measure
from dsv4c.apart import quantised_rows_apart, rows_apart, same_bits
from dsv4c.model.paging import entry_rows
from dsv4c.ops import Op
from dsv4c.program import Program, op_name, target_name, types_of

_CHOICES = frozenset({"gate_bias", "gate_hash", "gate_linear_bias", "gate_linear_hash", "index_topk",
                      "index_topk_packed"})  # fmt: skip
"""Ops that choose: near ties may fall the other way, so a choice is judged by what it loses."""


def digest(value: Tensor) -> bytes:
    """Of a tensor's dtype, shape and bytes."""
    flat = value.detach().contiguous().cpu().flatten().view(torch.uint8) if value.numel() else torch.empty(0)
    head = f"{value.dtype} {tuple(value.shape)}".encode()
    return hashlib.blake2b(flat.numpy().data, digest_size=16, key=head[:64]).digest()


def named(scope: str, node: fx.Node) -> str:
    """A call as people are told of it: "`dsv4.hc_pre` in `L00.attn`"."""
    source = node
    while source.target is operator.getitem:
        source = source.args[0]  # type: ignore[assignment]
    return f"`{target_name(source.target)}` in `{scope}`"


def _live(node: fx.Node, value: Tensor) -> Tensor:
    """Without the first row of state, which is nobody's: what padding and dropped tokens leave there has no order."""
    source, index = node, 0
    if node.target is operator.getitem:
        source, index = node.args  # type: ignore[assignment]
    in_place = isinstance(source.target, Op) and index in source.target.in_place
    return value[1:] if in_place or str(node.target) == "aten.index_put.default" else value


@dataclass
class Digests:
    """Watches a run: the digests of all values, by entry point and step."""

    seen: dict[str, set[bytes]] = field(default_factory=dict)

    def watch(self, at: str, scope: str, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, Tensor):
            self.seen.setdefault(at, set()).add(digest(_live(node, value)))
        return value


@dataclass
class FirstDifference:
    """Watches another run: its values that the first one had nowhere."""

    before: Digests
    unknown: dict[tuple[str, str, fx.Node], None] = field(default_factory=dict)

    def watch(self, at: str, scope: str, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, Tensor) and digest(_live(node, value)) not in self.before.seen.get(at, ()):
            self.unknown[at, scope, node] = None
        return value

    def op(self) -> str | None:
        """The first call whose new value shows: one that only known values are made from does not (a wider map of
        which both halves are known)."""
        for at, scope, node in self.unknown:
            if self._shows(at, scope, node):
                return named(scope, node)
        return None

    def _shows(self, at: str, scope: str, node: fx.Node) -> bool:
        """Whether an unknown value reaches what the graph returns through unknown values."""
        waiting, met = [(scope, node)], {node}
        while waiting:
            scope, node = waiting.pop()
            piece = node.meta.get("scope", "") != scope
            for user in node.users:
                there = scope if piece else user.meta.get("scope", "")
                if user.op == "output":
                    return True
                parts = any(u.target is operator.getitem for u in user.users)  # of several results: the parts count
                if user not in met and (parts or (at, there, user) in self.unknown):
                    met.add(user)
                    waiting.append((there, user))
        return False


def counterparts(before: Program, after: Program) -> dict[fx.Node, fx.Node]:
    """Call of a stitched program -> the call of an earlier stage that it is, or stands for.

    Calls of one scope and op that read the same weights, state and inputs are the same, in order, if both programs have
    as many. Of the others, those of op `linear_fp8` stand for those of op `linear`, and those of `experts_mx` for those
    of `experts_fp4`, if there are as many and of the same shapes. Nothing else is known of calls whose programs were
    read from text.
    """
    out: dict[fx.Node, fx.Node] = {}
    for entry in before.graphs:
        old, new = _by_key(before.graphs[entry]), _by_key(after.graphs[entry])
        for key, theirs in new.items():
            if len(mine := old.get(key, [])) == len(theirs):
                out.update(zip(theirs, mine, strict=True))
        taken = set(out.values())
        left = [n for nodes in old.values() for n in nodes if isinstance(n.target, Op) and n not in taken]
        others = [n for nodes in new.values() for n in nodes if isinstance(n.target, Op) and n not in out]
        for scope, name in dict.fromkeys((n.meta.get("scope"), op_name(n)) for n in left):
            mine = [n for n in left if (n.meta.get("scope"), op_name(n)) == (scope, name)]
            kin = name.removesuffix("_fp4")
            theirs = [n for n in others if n.meta.get("scope") == scope and op_name(n).startswith(kin)]
            if len(mine) == len(theirs) and all(map(_alike, mine, theirs)):
                out.update(zip(theirs, mine, strict=True))
        out.update(_parts(after.graphs[entry], out))
    return out


def _by_key(graph: fx.Graph) -> dict[tuple[str, ...], list[fx.Node]]:
    """Calls by scope, op and the names of the values that they read directly."""
    out: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            named = [n.meta["value"].name for n in node.all_input_nodes if n.op == "placeholder"]
            out.setdefault((node.meta.get("scope", ""), target_name(node.target), *named), []).append(node)
    return out


def _parts(graph: fx.Graph, calls: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Of calls with several outputs: each output and what it was."""
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[0] in calls:
            for known in calls[node.args[0]].users:
                if known.target is operator.getitem and known.args[1] == node.args[1]:
                    yield node, known


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return [t.shape for t in types_of(a)] == [t.shape for t in types_of(b)]


@dataclass
class Values:
    """Watches a run: every value, and the arguments of calls that choose. Holds them all in memory."""

    seen: dict[tuple[str, fx.Node], Any] = field(default_factory=dict)
    args: dict[tuple[str, fx.Node], tuple[Any, ...]] = field(default_factory=dict)

    def watch(self, at: str, scope: str, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        self.seen[at, node] = value
        if isinstance(node.target, Op) and node.target.name in _CHOICES:
            self.args[at, node] = args
        return value


@dataclass
class EqualInputs:
    """Watches another run: the error of every call that has a counterpart, where it reads what that one read.

    Calls of different float dtypes are compared as they are. Bytes of packed state are not compared: what is read from
    them is.
    """

    before: Values
    counterparts: Mapping[fx.Node, fx.Node]
    errors: dict[tuple[str, fx.Node], float] = field(default_factory=dict)
    """Errors above zero, in the order of the calls."""

    def watch(self, at: str, scope: str, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        known = self.counterparts.get(node)
        if known is None:
            return value
        if node.target is not operator.getitem:
            error = self._error(at, node, value, known)
            if error > 0:
                self.errors[at, node] = error
        return _in_place_of(value, self.before.seen[at, known])

    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def op(self) -> str | None:
        """The first call with the largest error, and what only this program has before it."""
        worst = self.worst()
        for (_, node), error in self.errors.items():
            if error >= worst:
                return named(node.meta.get("scope", ""), node) + self._behind(node)
        return None

    def first_beyond(self, tolerance: float) -> str | None:
        """The first call off by more than this, and what only this program has before it."""
        for (_, node), error in self.errors.items():
            if error > tolerance:
                return named(node.meta.get("scope", ""), node) + self._behind(node)
        return None

    def _behind(self, node: fx.Node) -> str:
        """The nearest calls without a counterpart that the node reads."""
        waiting, new = list(node.all_input_nodes), dict[str, None]()
        while waiting:
            source = waiting.pop(0)
            if source.op == "call_function" and source not in self.counterparts:
                if source.target is not operator.getitem:
                    new[named(source.meta.get("scope", ""), source)] = None
                waiting += source.all_input_nodes
        return f", behind {', '.join(new)}" if new else ""

    def _error(self, at: str, node: fx.Node, value: Any, known: fx.Node) -> float:
        was, op = self.before.seen[at, known], known.target
        values, others = (v if isinstance(v, tuple) else (v,) for v in (value, was))
        if all(isinstance(v, Tensor) and same_bits(v, o) for v, o in zip(values, others, strict=True)):
            return 0.0
        if isinstance(op, Op) and op.name in _CHOICES:
            args = self.before.args[at, known]
            seen = Seen(op, known.kwargs, args, values, others, [0] * len(values))
            error = max(apart.error for apart in measure(seen))
            if op.name == "index_topk" and 0 < error < math.inf:
                return _lost(value, *args, ratio=seen.attrs["ratio"], entries_per_page=seen.attrs["entries_per_page"])
            return error
        if isinstance(op, Op) and op.name == "index_query":  # a scale may move between its outputs
            return rows_apart(*(data.view(torch.float8_e4m3fn).float() * w.unsqueeze(-1) for data, w in (value, was)))
        in_place = op.in_place if isinstance(op, Op) else {}
        error, scale = 0.0, -1
        for i, (out, ref) in enumerate(zip(values, others, strict=True)):
            if not isinstance(out, Tensor) or i == scale:
                continue
            if out.dtype == ref.dtype == torch.float8_e4m3fn and i + 1 < len(values):
                scale = i + 1
                error = max(error, quantised_rows_apart((out, values[scale]), (ref, others[scale])))
            elif out.is_floating_point() and ref.is_floating_point():
                first = 1 if i in in_place else 0
                error = max(error, rows_apart(out[first:], ref[first:]))
            elif i not in in_place and not torch.equal(out.long(), ref.long()):
                return float("inf")
        return error


def _in_place_of(value: Any, known: Any) -> Any:
    """The known value in the dtypes of `value`; `value` where these hold something else."""
    if isinstance(value, tuple):
        return tuple(_in_place_of(v, k) for v, k in zip(value, known, strict=True))
    if not isinstance(value, Tensor) or value.shape != known.shape:
        return value
    bytes_ = torch.uint8 in (value.dtype, known.dtype)
    if value.dtype == known.dtype:
        return known
    return value if bytes_ or value.is_floating_point() != known.is_floating_point() else known.to(value.dtype)


def _lost(
    picks_TK: Tensor, q_TIC: Tensor, weight_TI: Tensor, pool_NC: Tensor, pages_RP: Tensor, request_rows: Tensor,
    positions: Tensor, *, ratio: int, entries_per_page: int,
) -> float:  # fmt: skip
    """What valid picks lose to the best ones, over the size that a row's scores could have had: their terms cancel."""
    entry = torch.arange(pages_RP.shape[1] * entries_per_page)
    keys = pool_NC[entry_rows(pages_RP, request_rows.unsqueeze(1), entry, entries_per_page)]
    scores = torch.einsum("ti,tie->te", weight_TI, torch.einsum("tic,tec->tie", q_TIC, keys).relu())
    seen = entry < ((positions + 1) // ratio).unsqueeze(1)
    taken = (picks_TK.unsqueeze(-1) == entry).any(1)
    size = (weight_TI.abs() * q_TIC.norm(dim=-1)).sum(-1) * (keys.norm(dim=-1) * seen).amax(-1)
    best_left = scores.masked_fill(taken | ~seen, -math.inf).amax(-1)
    worst_taken = scores.masked_fill(~taken, math.inf).amin(-1)
    lost = (best_left - worst_taken).clamp(min=0) / size.clamp(min=1e-30)
    return float(lost.masked_fill(~taken.any(-1), 0.0).max())
