"""The step verifies drafts and makes the next ones: from token ids to accepted tokens and new drafts, without the host.

    step:  logits                     ->  feed_drafts, feed_spans, feed_ends, row_facts; the model; edit_logits,
    mtp:   streams, next_ids              sample_drafted, accept_drafts; place_tokens, the mtp graph, sample,
                                          keep_draft; for every draft more: the mtp graph on one row a request,
                                          sample, keep_draft

One graph for every number of drafts, 0 to `max_tokens`, named `step`, `step+1`, ...: a step is captured whole. The
first pass of the MTP block runs over all rows of the step, because later queries see its window entries; the others
over one row a request, on the streams that the pass before left there. In place of `append-sampling`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dsv4c.artifact import Size
from dsv4c.errors import PassError
from dsv4c.facts import COUNTS, LENGTH, PENDING, STREAM_ROWS
from dsv4c.ops import Op, TensorType
from dsv4c.passes._rewriting import call_before, output_of
from dsv4c.passes.append_sampling import ROW_INPUTS, shared_inputs
from dsv4c.pipeline import Pass
from dsv4c.program import Program, Value, is_op, results_of

CHAIN_INPUTS = {
    **{name: dtype for name, dtype in ROW_INPUTS.items() if name != "noise_counters"},
    "noise_shifts": "int64", "chain": "int64",
}  # fmt: skip
"""What sampling asks for each row of logits: the noise by position, and how many drafts lie before the row."""
DRAFT_INPUTS = {
    "draft_starts": "int64", "draft_limits": "int64", "draft_seats": "int64", "draft_temperature": "float32",
    "draft_top_k": "int32", "draft_top_p": "float32", "draft_min_p": "float32", "draft_keys": "int64",
}  # fmt: skip
"""What accepting and drafting ask for each request that samples."""


_LAST_ROWS: Mapping[Size, Size] = {"S": "D"}  # of all rows of the step, logits are wanted of one a request
_ROW_EACH: Mapping[Size, Size] = {"T": "D", "S": "D", STREAM_ROWS: "D_streams"}


def graph_name(drafts: int) -> str:
    """The graph that makes so many drafts."""
    return f"step+{drafts}" if drafts else "step"


@dataclass(frozen=True)
class AppendDrafts(Pass):
    """`max_tokens`: the most drafts; `max_context`: tokens of the longest request, behind which no page lies."""

    max_tokens: int
    max_context: int
    name: ClassVar[str] = "append-drafts"
    needs: ClassVar[frozenset[str]] = frozenset({"activations-narrow", "streams-flat"})
    gives: ClassVar[frozenset[str]] = frozenset({"samples-inside"})
    breaks: ClassVar[frozenset[str]] = frozenset({"stitched"})

    def apply(self, program: Program) -> int:
        if "mtp" not in program.graphs:
            raise PassError("the program has no graph `mtp` to draft with")
        step, block = program.graphs["step"], program.graphs["mtp"]
        graphs = {}
        for drafts in range(self.max_tokens + 1):
            graphs[graph_name(drafts)] = _Builder(
                program, _copied(step), block, self.max_tokens, self.max_context
            ).build(drafts)
        program.graphs = graphs
        return len(graphs)


def _copied(graph: fx.Graph) -> fx.Graph:
    out = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    results = out.graph_copy(graph, known)
    end = out.output(results)
    end.meta = copy.copy(graph.output_node().meta)
    for old, new in known.items():
        new.meta = copy.copy(old.meta)
    return out


class _Builder:
    """Rewrites one copy of the step's graph."""

    def __init__(
        self, program: Program, graph: fx.Graph, block: fx.Graph, max_tokens: int, max_context: int
    ) -> None:  # fmt: skip
        self.program, self.graph, self.block = program, graph, block
        self.given: dict[Value, fx.Node] = {n.meta["value"]: n for n in graph.nodes if n.op == "placeholder"}
        self.place = list(self.given.values())[-1]
        self.end = graph.output_node()
        self.results = results_of(graph)
        self.tables = {k: n.meta["type"] for k, n in self.given.items()}
        self.max_tokens, self.max_context = max_tokens, max_context

    def build(self, drafts: int) -> fx.Graph:
        vocab = self.program.config.vocab_size
        for size, inputs in (("S", CHAIN_INPUTS), ("D", DRAFT_INPUTS)):
            for name, dtype in inputs.items():
                self.placeholder(Value("input", name), TensorType((size,), dtype))
        for name, kind in shared_inputs(vocab).items():
            self.placeholder(Value("input", name), kind)
        self.placeholder(Value("input", "next_ids"), TensorType(("T",), "int64"))
        self.placeholder(Value("state", COUNTS), TensorType(("Z", vocab), "int16"))
        self.placeholder(Value("state", PENDING), TensorType(("Z", 1 + self.max_tokens), "int64"))
        self.placeholder(Value("state", LENGTH), TensorType(("Z",), "int64"))
        tokens, positions = self.feed()
        self.sample(tokens, positions)
        if drafts:
            self.draft(positions, drafts)
        self.end.args = (tuple(self.results.values()),)
        self.end.meta = {**self.end.meta, "outputs": tuple(self.results)}
        return self.graph

    def input(self, name: str) -> fx.Node:
        return self.given[Value("input", name)]

    def state(self, name: str) -> fx.Node:
        """The state as written so far."""
        return self.results.get(f"state.{name}") or self.given[Value("state", name)]

    def placeholder(self, value: Value, kind: TensorType) -> fx.Node:
        if value not in self.given:
            with self.graph.inserting_after(self.place):
                node = self.graph.placeholder(f"{value.kind}_{value.name}".replace(".", "_"))
            node.meta = {"type": kind, "value": value}
            self.given[value] = self.place = node
        return self.given[value]

    def call(self, place: fx.Node, scope: str, name: str, args: tuple[Any, ...], kinds: Any, **attrs: Any) -> fx.Node:
        node = call_before(place, name, args, attrs, kinds)
        node.meta["scope"] = scope
        return node

    def several(
        self, place: fx.Node, scope: str, name: str, args: tuple[Any, ...], kinds: tuple[TensorType, ...], **attrs: Any
    ) -> list[fx.Node]:  # fmt: skip
        """The outputs of a call with several."""
        node = self.call(place, scope, name, args, kinds, **attrs)
        out = [output_of(node, i, place) for i in range(len(kinds))]
        for one in out:
            one.meta["scope"] = scope
        return out

    def feed(self) -> tuple[fx.Node, fx.Node]:
        """Tokens, positions, spans and window ends as they are, in place of those that the host gave."""
        place, rows, length = self.place.next, self.input("request_rows"), self.state(LENGTH)
        ids, at = self.input("token_ids"), self.input("positions")
        kinds = (ids.meta["type"], at.meta["type"])
        args = (ids, at, rows, self.state(PENDING), length)
        tokens, positions = self.several(place, "prelude", "feed_drafts", args, kinds)
        fed = {ids: tokens, at: positions}
        if Value("input", "seq_starts") in self.given:
            starts, ends = self.input("seq_starts"), self.input("seq_ends")
            kinds = (starts.meta["type"], ends.meta["type"])
            fed[starts], fed[ends] = self.several(place, "prelude", "feed_spans", (starts, ends, length), kinds)
            for ratio in self.program.config.ratios:
                given = self.input(f"ends_{ratio}")
                args = (given, positions, rows, fed[starts], fed[ends])
                fed[given] = self.call(place, "prelude", "feed_ends", args, given.meta["type"], ratio=ratio)
        feeding = {n for n in self.graph.nodes if is_op(n) and n.target.name.startswith("feed_")}
        for old, new in fed.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in feeding)
        return tokens, positions

    def sample(self, tokens: fx.Node, positions: fx.Node) -> None:
        end, results, scope = self.end, self.results, "sampling"
        logits, rows = results["logits"], self.input("logit_rows")
        edits = tuple(self.input(name) for name in ("edit_starts", "edit_stops", "edit_tokens", "edit_values"))
        kinds = (logits.meta["type"], edits[3].meta["type"])
        results["logits"], results["replaced"] = self.several(end, scope, "edit_logits", (logits, *edits), kinds)
        row, one = TensorType(("S",), "int64"), TensorType(("D",), "int64")
        args: tuple[Any, ...] = (tokens, positions, rows, self.input("noise_shifts"))
        drafted, counters = self.several(end, scope, "row_facts", args, (row, row))
        counts = self.state(COUNTS)
        asked = [self.input(name) for name in ("temperature", "top_k", "top_p", "min_p", "noise_keys")]
        behind = [self.input(name) for name in ("repetition", "frequency", "presence", "mask_rows", "masks", "chain")]
        args = (results["logits"], *asked, counters, self.input("penalty_seats"), counts, *behind, drafted)
        results["tokens"] = self.call(end, scope, "sample_drafted", args, row)
        places = tuple(self.input(f"draft_{name}") for name in ("starts", "limits", "seats"))
        pending, length = self.state(PENDING), self.state(LENGTH)
        args = (results["tokens"], drafted, rows, positions, counters, *places, self.input("penalty_seats"), pending,
                length, counts)  # fmt: skip
        states = (pending.meta["type"], length.meta["type"], counts.meta["type"])
        accepted, self.rows, self.positions, self.counters, *after = self.several(
            end, scope, "accept_drafts", args, (one, one, one, one, *states), end=self.max_context
        )
        results["accepted"] = accepted
        for name, node in zip((PENDING, LENGTH, COUNTS), after, strict=True):
            results[f"state.{name}"] = node

    def draft(self, positions: fx.Node, drafts: int) -> None:
        end, seats = self.end, self.input("draft_seats")
        row, one = TensorType(("T",), "int64"), TensorType(("D",), "int64")
        args: tuple[Any, ...] = (
            self.input("next_ids"),
            self.input("logit_rows"),
            self.input("token_seats"),
            self.results["tokens"],
        )
        following = self.call(end, "draft1", "place_tokens", args, row)
        values = {"positions": positions, "request_rows": self.input("request_rows"), "next_ids": following}
        found = self.inline("draft1", {**values, "logit_rows": self.rows}, self.results["streams"], one_row=False)
        counters = self.counters
        for number in range(1, drafts + 1):
            scope = f"draft{number}"
            asked = [self.input(f"draft_{name}") for name in ("temperature", "top_k", "top_p", "min_p", "keys")]
            token = self.call(end, scope, "sample", (found["logits"], *asked, counters), one)
            pending = self.state(PENDING)
            kept = self.call(end, scope, "keep_draft", (pending, seats, token), pending.meta["type"], at=number)
            self.results[f"state.{PENDING}"] = kept
            if number == drafts:
                return
            scope = f"draft{number + 1}"
            streams = found["streams"]
            if number == 1:
                kind = TensorType(("D", *streams.meta["type"].shape[1:]), streams.meta["type"].dtype)
                streams = self.call(end, scope, "take_rows", (streams, self.rows), kind)
                at = self.positions
            args, limit = (self.positions, self.counters), {"end": self.max_context}
            if number > 1:
                at, _ = self.several(end, scope, "advance_rows", args, (one, one), by=number - 1, **limit)
            _, counters = self.several(end, scope, "advance_rows", args, (one, one), by=number, **limit)
            values = {"positions": at, "request_rows": seats, "next_ids": token}
            found = self.inline(scope, values, streams, one_row=True)

    def inline(
        self, scope: str, values: Mapping[str, fx.Node], streams: fx.Node, *, one_row: bool
    ) -> dict[str, fx.Node]:
        """The MTP graph before the end: its logits and streams; the state that it writes becomes the step's.

        `one_row`: for one row a request, whose logits are all wanted: its sizes T and S are D.
        """
        here: dict[fx.Node, Any] = {}
        for node in self.block.nodes:
            if node.op == "placeholder":
                if node.users:
                    here[node] = self._resolve(node, values, streams)
            elif node.op == "output":
                found = {name: here[v] for name, v in zip(node.meta["outputs"], node.args[0], strict=True)}
                self.results.update({k: v for k, v in found.items() if k.startswith("state.")})
                return found
            elif one_row and is_op(node, "take_rows") and here[node.args[1]] is None:
                here[node] = here[node.args[0]]
            else:
                here[node] = self._call(node, here, scope, one_row)
        raise PassError("the graph `mtp` has no output")

    def _resolve(self, node: fx.Node, values: Mapping[str, fx.Node], streams: fx.Node) -> fx.Node | None:
        value: Value = node.meta["value"]
        if value.kind == "streams":
            return streams
        if value.kind == "input":
            if value.name in values:
                return values[value.name]
            return None if value.name == "logit_rows" else self.input(value.name)
        if value.kind == "state":
            self.placeholder(value, node.meta["type"])
            return self.state(value.name)
        return self.placeholder_with(value, node)

    def placeholder_with(self, value: Value, like: fx.Node) -> fx.Node:
        node = self.placeholder(value, like.meta["type"])
        node.meta = {**copy.copy(like.meta), **node.meta}
        return node

    def _call(self, node: fx.Node, here: Mapping[fx.Node, Any], scope: str, one_row: bool) -> fx.Node:
        same = self._same(node, here) if not one_row else None
        if same is not None:
            return same
        with self.graph.inserting_before(self.end):
            new = self.graph.node_copy(node, lambda n: here[n])
        new.meta = {**copy.copy(node.meta), "scope": f"{scope}.{node.meta.get('scope', '')}"}
        sizes = _ROW_EACH if one_row else _LAST_ROWS
        kinds = new.meta["type"]
        if isinstance(kinds, TensorType):
            new.meta["type"] = _resized(kinds, sizes)
        else:
            new.meta["type"] = tuple(_resized(kind, sizes) for kind in kinds)
        return new

    def _same(self, node: fx.Node, here: Mapping[fx.Node, Any]) -> fx.Node | None:
        """The step's own call of the prelude, if it is the same one."""
        if (
            not is_op(node)
            or not isinstance(node.target, Op)
            or node.target.in_place
            or node.target is operator.getitem
        ):
            return None
        args = tuple(fx.map_arg(arg, lambda n: here[n]) for arg in node.args)
        users = args[0].users if args and isinstance(args[0], fx.Node) else ()
        same = (u for u in users if u.target is node.target and u.args == args and u.kwargs == node.kwargs)
        return next(same, None)


def _resized(kind: TensorType, sizes: Mapping[Size, Size]) -> TensorType:
    return TensorType(tuple(sizes.get(size, size) for size in kind.shape), kind.dtype)
