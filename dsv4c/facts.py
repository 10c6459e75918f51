"""Facts about a program: name -> checker. A pass names the facts it needs, gives and breaks; all are checked.

A checker returns the offending nodes; none means that the fact holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from torch import fx

from dsv4c.ops import LEAVES, OPS, Op
from dsv4c.program import Program, is_op, types_of

Checker = Callable[[Program], list[fx.Node]]

FAMILIES: dict[str, frozenset[str]] = {
    "attention": frozenset({"attend_window", "attend_csa", "attend_hca"}),
    "compressor": frozenset({"compress"}),
    "embedding": frozenset({"embed", "embed_streams", "take_rows"}),
    "hyper": frozenset({"hc_pre", "hc_post", "hc_head"}),
    "indexer": frozenset({"index_topk", "split_heads"}),
    "linear": frozenset({"linear", "grouped_linear"}),
    "moe": frozenset({"gate_bias", "gate_hash", "swiglu", "experts"}),
    "mtp": frozenset({"add_embedding"}),
    "norm": frozenset({"rms_norm", "head_norm"}),
    "paging": frozenset({"token_slots", "entry_slots", "page_write"}),
    "quant": frozenset({"quantise_kv", "quantise_index"}),
    "rope": frozenset({"rope_table", "entry_rope_table", "rope"}),
}
"""Ops of the dialect by the pass that raises them."""


def calls(program: Program) -> Iterable[fx.Node]:
    """Every call that computes something."""
    return (n for n in program.nodes() if n.op == "call_function" and n.target is not operator.getitem)


def is_noise(node: fx.Node) -> bool:
    """Whether a node computes nothing: an assertion, a cast to the dtype at hand, a slice of everything."""
    if node.op != "call_function" or isinstance(node.target, Op):
        return False
    name = str(node.target)
    if "assert" in name or "sym_constrain" in name:
        return True
    if not node.args or not isinstance(node.args[0], fx.Node) or "type" not in node.meta:
        return False
    same = types_of(node.args[0]) == types_of(node) if "type" in node.args[0].meta else False
    return same and name in ("aten.to.dtype", "aten.slice.Tensor", "aten.expand.default", "aten.contiguous.default")


def _canonical(program: Program) -> list[fx.Node]:
    return [n for n in calls(program) if is_noise(n) and str(n.target) != "aten.contiguous.default"]


def _raised(family: str) -> Checker:
    def check(program: Program) -> list[fx.Node]:
        return [n for n in calls(program) if "leaf" in n.meta and LEAVES[n.meta["leaf"].class_name] in FAMILIES[family]]

    return check


def _stitched(program: Program) -> list[fx.Node]:
    return [] if set(program.graphs) == set(program.recipes) else [g.output_node() for g in program.graphs.values()]


def reads(node: fx.Node, index: int, name: str, output: int | None = None) -> fx.Node | None:
    """The producer of argument `index` if it is an op `name` (its output `output`), else None."""
    if index >= len(node.args) or not isinstance(node.args[index], fx.Node):
        return None
    source = node.args[index]
    assert isinstance(source, fx.Node)
    if output is not None:
        if source.target is not operator.getitem or source.args[1] != output:
            return None
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        source = inner
    return source if is_op(source, name) else None


def only_use(value: fx.Node | object) -> bool:
    """Whether a value has exactly one user."""
    return isinstance(value, fx.Node) and len(value.users) == 1


def _fused(second: str, index: int, first: str, output: int | None) -> Checker:
    def check(program: Program) -> list[fx.Node]:
        return [
            n for n in calls(program) if is_op(n, second) and reads(n, index, first, output) and only_use(n.args[index])
        ]

    return check


def norm_rope_write(write: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The norm and the rotation that only this `page_write` reads, or None."""
    rope = reads(write, 2, "rope")
    norm = reads(rope, 0, "rms_norm") if rope is not None else None
    return (norm, rope) if rope is not None and norm is not None and only_use(rope) and only_use(norm) else None


def _no_norm_rope_write(program: Program) -> list[fx.Node]:
    return [n for n in calls(program) if is_op(n, "page_write") and norm_rope_write(n)]


def linear_group(node: fx.Node) -> tuple[object, bool]:
    """What linear maps must share to become one: their input, and whether they widen it."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x, bool(node.kwargs["float32"]) and types_of(x)[0].dtype != "float32"


def _no_shared_input(program: Program) -> list[fx.Node]:
    out, seen = [], set()
    for node in calls(program):
        if is_op(node, "linear"):
            if linear_group(node) in seen:
                out.append(node)
            seen.add(linear_group(node))
    return out


def _lowered(program: Program) -> list[fx.Node]:
    return [n for n in calls(program) if not isinstance(n.target, Op) or n.target.name not in OPS]


def _quantised(program: Program) -> list[fx.Node]:
    weights = (n for n in program.nodes() if n.op == "placeholder" and n.meta["value"].kind == "weight")
    return [n for n in weights if "stored" not in n.meta]


CHECKERS: dict[str, Checker] = {
    "canonical": _canonical,
    **{f"{family}-raised": _raised(family) for family in FAMILIES},
    "stitched": _stitched,
    "hc-norm-fused": _fused("rms_norm", 0, "hc_pre", 0),
    "hc-post-pre-fused": _fused("hc_pre_norm", 0, "hc_post", None),
    "hc-head-norm-fused": _fused("rms_norm", 0, "hc_head", None),
    "head-rope-fused": _fused("rope", 0, "head_norm", None),
    "norm-rope-write-fused": _no_norm_rope_write,
    "linears-fused": _no_shared_input,
    "quantised": _quantised,
    "lowered": _lowered,
}
