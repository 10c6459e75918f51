"""Facts about a program: name -> checker. A pass names the facts it needs, gives and breaks; all are checked.

A checker returns the offending nodes; none means that the fact holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from torch import fx

from dsv4c.ops import LEAVES, OPS, Op, TensorType
from dsv4c.program import Program, is_op, op_name, types_of

Checker = Callable[[Program], list[fx.Node]]

FAMILIES: dict[str, frozenset[str]] = {
    "attention": frozenset({"attend_window", "attend_csa", "attend_hca", "attend_block"}),
    "compressor": frozenset({"compress"}),
    "dspark": frozenset({"mean_streams", "extend_tap", "markov_draft"}),
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
    return [] if program.stitched else [g.output_node() for g in program.graphs.values()]


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


BLOCK = 128  # rows and columns of an FP8 weight that share a scale


def stored_linear_groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Linear maps of one input and one stored format that could be one: two or more each, in the graph's order.

    An FP8 weight whose rows do not fill its last block ends a group: the blocks behind it would be cut elsewhere.
    """
    groups: list[list[fx.Node]] = []
    open_groups: dict[tuple[object, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_op(node, "linear"):
            continue
        weight = node.args[1]
        key = (node.args[0], weight.meta["stored"])
        found = open_groups.get(key)
        if found is None:
            found = open_groups[key] = []
            groups.append(found)
        found.append(node)
        if weight.meta["stored"] == "fp8" and int(types_of(weight)[0].shape[0]) % BLOCK:
            del open_groups[key]
    return [group for group in groups if len(group) > 1]


def _no_stored_groups(program: Program) -> list[fx.Node]:
    return [group[0] for graph in program.graphs.values() for group in stored_linear_groups(graph)]


def _one_kind_of_linear(program: Program) -> list[fx.Node]:
    """Linear maps widened to float32, if others compute on stored formats."""
    stored = any(is_op(n, "linear_fp8") or is_op(n, "linear_mixed") for n in calls(program))
    return [n for n in calls(program) if is_op(n, "linear") and stored]


def _none_of(*names: str) -> Checker:
    def check(program: Program) -> list[fx.Node]:
        return [n for n in calls(program) if isinstance(n.target, Op) and n.target.name in names]

    return check


def _unknown_format(program: Program) -> list[fx.Node]:
    """Experts whose activations are in no format that scaled products take with their weights."""
    taken = {"experts_mx": ("mxfp8", "mxfp4"), "experts_nvfp4": ("nvfp4",)}
    found = [n for n in calls(program) if isinstance(n.target, Op) and n.target.name in taken]
    return [n for n in found if n.kwargs.get("activations") not in taken[op_name(n)]]


QUANTISED_OUTPUT = {"hc_pre_norm": 0, "hc_post_pre_norm": 1, "rms_norm": None, "swiglu_pair": None}
"""Ops with a form that also quantises: the output quantised (None: the only one, if nothing else reads it)."""


def quantise_source(node: fx.Node) -> fx.Node | None:
    """The op whose result this `quantise_rows` reads and which could quantise it itself, or None."""
    for name, output in QUANTISED_OUTPUT.items():
        source = reads(node, 0, name, output)
        if source is not None and (output is not None or only_use(source)):
            return source
    return None


def _no_quantise_after(program: Program) -> list[fx.Node]:
    return [n for n in calls(program) if is_op(n, "quantise_rows") and quantise_source(n)]


STREAM_ROWS = "T_streams"
"""The number of rows of whole streams: hc_mult times the tokens."""
_BY_ROWS = frozenset({"rms_norm", "rms_norm_quantise", "quantise_rows", "linear_fp8", "linear_mixed"})


def of_streams(node: fx.Node) -> bool:
    """Whether a norm or a linear takes streams of tokens, [T, N, C], whose kernels take rows."""
    if not isinstance(node.target, Op) or node.target.name not in _BY_ROWS:
        return False
    first = node.args[0]
    assert isinstance(first, fx.Node)
    kind = first.meta["type"]
    return len((kind if isinstance(kind, TensorType) else kind[0]).shape) > 2


def _streams_by_rows(program: Program) -> list[fx.Node]:
    return [n for n in program.nodes() if of_streams(n)]


COUNTS, LAST_TOKENS = "sampling.counts", "sampling.last_tokens"
"""State of sampling on the device: how often each seat's request generated each token, and its last one."""
PENDING, LENGTH = "sampling.pending", "sampling.length"
"""Where a step verifies drafts: each seat's last token with the drafts behind it, and the tokens that are computed."""


def _hosted_sampling(program: Program) -> list[fx.Node]:
    """What still needs the host between two steps: a reader of the token ids as given, or logits without tokens."""
    graph = program.graphs["step"]
    ids = [n for n in graph.nodes if n.op == "placeholder" and n.meta["value"].name == "token_ids"]
    readers = [
        user for node in ids for user in node.users if not is_op(user, "feed_tokens") and not is_op(user, "feed_drafts")
    ]
    return readers if "tokens" in graph.output_node().meta["outputs"] else [*readers, graph.output_node()]


def _lowered(program: Program) -> list[fx.Node]:
    return [n for n in calls(program) if not isinstance(n.target, Op) or n.target.name not in OPS]


def _quantised(program: Program) -> list[fx.Node]:
    weights = (n for n in program.nodes() if n.op == "placeholder" and n.meta["value"].kind == "weight")
    return [n for n in weights if "stored" not in n.meta]


_SAME = "same as the first argument"
_HC = ("bfloat16", "float32", "float32")
NARROW: dict[str, tuple[str, ...]] = {
    "embed": ("bfloat16",), "embed_streams": ("bfloat16",), "add_embedding": ("bfloat16",),
    "hc_pre": _HC, "hc_pre_norm": _HC, "hc_pre_norm_quantise": (*_HC, "float8_e4m3fn", "float32"),
    "hc_post": ("bfloat16",), "hc_post_pre_norm": ("bfloat16", *_HC),
    "hc_post_pre_norm_quantise": ("bfloat16", *_HC, "float8_e4m3fn", "float32"),
    "hc_head": ("bfloat16",), "hc_head_norm": ("bfloat16",), "rms_norm": ("bfloat16",), "head_norm": ("bfloat16",),
    "head_norm_rope": ("bfloat16",), "rope": ("bfloat16",), "linear_fp8": ("bfloat16",),
    "grouped_linear_fp8": ("bfloat16",), "swiglu_pair": ("bfloat16",), "experts_fp4": ("bfloat16",),
    "experts_mx": ("bfloat16",), "experts_nvfp4": ("bfloat16",),
    "attend_window_packed": ("bfloat16",), "attend_csa_packed": ("bfloat16",), "attend_hca_packed": ("bfloat16",),
    "columns": (_SAME,), "split_heads": (_SAME,), "take_rows": (_SAME,),
}  # fmt: skip
"""Dtypes of results where activations are bfloat16: streams and rows are, mixing coefficients and sums are not."""


def narrow_types(node: fx.Node) -> tuple[TensorType, ...] | None:
    """The types of a node where activations are bfloat16; None for one that this does not concern."""
    if node.target is operator.getitem:
        source, index = node.args[0], int(str(node.args[1]))
        assert isinstance(source, fx.Node)
        found = narrow_types(source)
        return (found[index],) if found else None
    if node.op == "placeholder" and node.meta["value"].kind == "streams":
        return (TensorType(types_of(node)[0].shape, "bfloat16"),)
    if not isinstance(node.target, Op) or node.target.name not in NARROW:
        return None
    first = node.args[0]
    assert isinstance(first, fx.Node)
    kinds = (types_of(first)[0].dtype if kind == _SAME else kind for kind in NARROW[node.target.name])
    return tuple(TensorType(t.shape, kind) for t, kind in zip(types_of(node), kinds, strict=True))


def _wide_activations(program: Program) -> list[fx.Node]:
    return [n for n in program.nodes() if (found := narrow_types(n)) is not None and found != types_of(n)]


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
    "formats-chosen": _one_kind_of_linear,
    "stored-linears-fused": _no_stored_groups,
    "state-packed": _none_of(
        "norm_rope_write", "page_write", "compress", "index_topk", "attend_window", "attend_csa", "attend_hca"
    ),
    "linears-stored": _none_of("linear", "grouped_linear"),
    "experts-stored": _none_of("experts"),
    "gate-fused": _none_of("gate_bias", "gate_hash"),
    "expert-activations-chosen": _unknown_format,
    "quantise-fused": _no_quantise_after,
    "activations-narrow": _wide_activations,
    "streams-flat": _streams_by_rows,
    "samples-inside": _hosted_sampling,
    "lowered": _lowered,
}
