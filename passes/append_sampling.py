"""The step samples: from token ids to chosen tokens without the host.

    %1 = embed_streams(%token_ids, ...)    ->  %0 = dsv4.feed_tokens(%token_ids, %last_tokens, %request_rows)
                                               %1 = embed_streams(%0, ...)
    return logits                          ->  edit_logits, sample_penalised, keep_tokens
                                               return logits, tokens, replaced

A token that the host does not know yet is given as -1 and read from its request's seat, where the step before left
it. For targets where a step ends before the host has read the last one's tokens; requests are addressed by slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.errors import PassError
from dsv4c.facts import COUNTS, LAST_TOKENS
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before, output_of
from dsv4c.pipeline import Pass
from dsv4c.program import Program, Value, results_of

ROW_INPUTS = {
    "edit_starts": "int64", "edit_stops": "int64", "temperature": "float32", "top_k": "int32", "top_p": "float32",
    "min_p": "float32", "noise_keys": "int64", "noise_counters": "int64", "penalty_seats": "int64",
    "repetition": "float32", "frequency": "float32", "presence": "float32", "token_seats": "int64",
    "mask_rows": "int64",
}  # fmt: skip
"""What sampling asks for each row of logits."""
EDIT_INPUTS = {"edit_tokens": "int64", "edit_values": "float32"}


def shared_inputs(vocab_size: int) -> dict[str, TensorType]:
    """What rows of logits refer to: edits, and masks of 32 tokens a word."""
    edits = {name: TensorType(("M",), dtype) for name, dtype in EDIT_INPUTS.items()}
    return {**edits, "masks": TensorType(("G", -(-vocab_size // 32)), "int32")}


@dataclass(frozen=True)
class AppendSampling(Pass):
    name: ClassVar[str] = "append-sampling"
    needs: ClassVar[frozenset[str]] = frozenset({"activations-narrow"})
    gives: ClassVar[frozenset[str]] = frozenset({"samples-inside"})

    def apply(self, program: Program) -> int:
        graph, vocab = program.graphs["step"], program.config.vocab_size
        given = {n.meta["value"].name: n for n in graph.nodes if n.op == "placeholder"}
        for name in ("token_ids", "request_rows"):
            if name not in given:
                raise PassError(f"the step has no input `{name}`")
        place = list(given.values())[-1]
        rows = {name: TensorType(("S",), dtype) for name, dtype in ROW_INPUTS.items()}
        for name, kind in {**rows, **shared_inputs(vocab)}.items():
            place = given[name] = _placeholder(graph, place, Value("input", name), kind)
        for name, kind in ((COUNTS, TensorType(("Z", vocab), "int16")), (LAST_TOKENS, TensorType(("Z",), "int64"))):
            place = given[name] = _placeholder(graph, place, Value("state", name), kind)
        self._feed(graph, given, place)
        self._sample(graph, given)
        return 2

    def _feed(self, graph: fx.Graph, given: dict[str, fx.Node], place: fx.Node) -> None:
        ids = given["token_ids"]
        args = (ids, given[LAST_TOKENS], given["request_rows"])
        fed = call_before(place.next, "feed_tokens", args, {}, ids.meta["type"])
        fed.meta["scope"] = "prelude"
        ids.replace_all_uses_with(fed, delete_user_cb=lambda user: user is not fed)

    def _sample(self, graph: fx.Graph, given: dict[str, fx.Node]) -> None:
        end, results = graph.output_node(), results_of(graph)
        logits = results["logits"]
        edits = (given["edit_starts"], given["edit_stops"], given["edit_tokens"], given["edit_values"])
        kinds = (logits.meta["type"], given["edit_values"].meta["type"])
        edit = call_before(end, "edit_logits", (logits, *edits), {}, kinds)
        results["logits"], results["replaced"] = output_of(edit, 0, end), output_of(edit, 1, end)
        asked = ("temperature", "top_k", "top_p", "min_p", "noise_keys", "noise_counters", "penalty_seats", COUNTS,
                 "repetition", "frequency", "presence", "mask_rows", "masks")  # fmt: skip
        tokens = TensorType(("S",), "int64")
        args = (results["logits"], *(given[name] for name in asked))
        drawn = call_before(end, "sample_penalised", args, {}, (tokens, given[COUNTS].meta["type"]))
        results["tokens"], results[f"state.{COUNTS}"] = output_of(drawn, 0, end), output_of(drawn, 1, end)
        args = (given[LAST_TOKENS], given["token_seats"], results["tokens"])
        keep = call_before(end, "keep_tokens", args, {}, given[LAST_TOKENS].meta["type"])
        results[f"state.{LAST_TOKENS}"] = keep
        for node in (edit, drawn, keep, *edit.users, *drawn.users):
            node.meta["scope"] = "sampling"
        end.args = (tuple(results.values()),)
        end.meta = {**end.meta, "outputs": tuple(results)}


def _placeholder(graph: fx.Graph, after: fx.Node, value: Value, kind: TensorType) -> fx.Node:
    with graph.inserting_after(after):
        node = graph.placeholder(f"{value.kind}_{value.name}".replace(".", "_"))
    node.meta = {"type": kind, "value": value}
    return node
