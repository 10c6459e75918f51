"""nn.Module -> Program: torch.export once for each distinct piece of the model, on the meta device, without weights.

A flat export of 61 layers takes minutes; each of the (at most eight) kinds of sublayer takes a second or two. Sizes
that change between steps are symbols: T tokens, S wanted rows, R requests, E_m entries completed, P_g columns of a
page table, N_g rows of a pool, Z state slots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import CompileError
from dsv4c.exporting import export
from dsv4c.model.dspark import DSparkStage
from dsv4c.model.state import group_ratios, min_columns, state_tensors
from dsv4c.model.transformer import Prelude, Transformer, groups_of_ratio
from dsv4c.ops import LEAVES, OPS, Op, TensorType
from dsv4c.program import Instance, Leaf, Program, Symbol, Value
from dsv4c.provenance import calling_place, traced_place

Spec = dict[str, TensorType]


@dataclass(frozen=True)
class Piece:
    """A piece to capture: a module, its inputs by kind, and the names of its outputs."""

    module: nn.Module
    strip: str
    inputs: tuple[tuple[str, str, TensorType], ...]
    """(kind, name, type) of every input, in the order of the module's positional parameters."""
    outputs: tuple[str, ...]


class _Call(nn.Module):
    """Lets torch.export see one method of a part of the model, with a flat list of tensors as arguments."""

    def __init__(self, part: nn.Module, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.part = part
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(self.part, *tensors)


def capture(
    config: ModelConfig,
    layout: StateLayout | None = None,
    *,
    fake_quant: bool = False,
    drafter: bool = True,
    only: Collection[str] | None = None,
) -> Program:
    """The program of the whole model, not yet stitched.

    Its entry points are `step` and, with `drafter`, those of what drafts: `mtp`, or `dspark.absorb` and `dspark.draft`.
    `config`: the model; `layout`: how its state is paged (by default as compiled artifacts page it); `fake_quant`:
    whether KV entries are fake-quantised as in training. Deterministic, without weights; `nano` takes ten seconds.
    `only` names the pieces to capture (`attention.csa`, ...): such a program can be raised but not stitched.
    """
    layout = layout or StateLayout()
    with torch.device("meta"):
        model = Transformer(config, layout, fake_quant=fake_quant)
    symbols = _symbols(config, layout)
    recipes = _recipes(model, config)
    if not drafter:
        recipes = {"step": tuple(instance for instance in recipes["step"] if not instance.piece.startswith("tap."))}
    used = {instance.piece for recipe in recipes.values() for instance in recipe}
    program = Program(config, layout, {}, recipes, symbols, {}, {})
    for name, piece in _pieces(model, config, layout).items():
        if name in used and (only is None or name in only):
            program.graphs[name] = _export(name, piece, symbols)
    program.constants = _constants(config, layout)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        program.weight_types[name] = TensorType(tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
    return program


def _symbols(config: ModelConfig, layout: StateLayout) -> dict[str, Symbol]:
    huge = 1 << 30
    out = {name: Symbol(name, 0, huge) for name in ("T", "S", "R", "Z")}
    for ratio in config.ratios:
        out[f"E_{ratio}"] = Symbol(f"E_{ratio}", 0, huge)
    for group in group_ratios(config):
        out[f"P_{group}"] = Symbol(f"P_{group}", min_columns(config, layout, group), huge)
        out[f"N_{group}"] = Symbol(f"N_{group}", 1, huge)
    return out


def step_inputs(config: ModelConfig) -> Spec:
    """The step's int64 inputs."""
    out = {name: TensorType(("T",), "int64") for name in ("token_ids", "positions", "request_rows")}
    out.update({name: TensorType(("R",), "int64") for name in ("seq_starts", "seq_ends", "state_slots")})
    out.update({f"pages_{group}": TensorType(("R", f"P_{group}"), "int64") for group in group_ratios(config)})
    out.update({f"ends_{ratio}": TensorType((f"E_{ratio}",), "int64") for ratio in config.ratios})
    out["logit_rows"] = TensorType(("S",), "int64")
    return out


def dspark_inputs(config: ModelConfig) -> Spec:
    """What DSpark's entry points ask for besides a step's inputs: `absorb` the tap, `draft` the block rows."""
    spark = config.dspark
    if spark is None:
        return {}
    tap = TensorType(("T", len(spark.target_layer_ids) * config.hidden_size), "float32")
    return {"tap": tap, "block_rows": TensorType(("R",), "int64")}


def _derived(config: ModelConfig) -> Spec:
    table = config.qk_rope_head_dim
    out = {"rope_window": TensorType(("T", table), "float32"), "slots_window": TensorType(("T",), "int64")}
    if config.ratios:
        out["rope_compressed"] = TensorType(("T", table), "float32")
    for ratio in config.ratios:
        out[f"entry_rope_{ratio}"] = TensorType((f"E_{ratio}", table), "float32")
        for group in groups_of_ratio(config, ratio):
            out[f"slots_{group}"] = TensorType((f"E_{ratio}",), "int64")
    return out


def state_types(config: ModelConfig, layout: StateLayout) -> Spec:
    """Every pool and ring by its full name."""
    return {
        t.name: TensorType((f"N_{t.group}" if t.group else "Z", *t.entry_shape), "float32")
        for t in state_tensors(config, layout)
    }


def _pieces(model: Transformer, config: ModelConfig, layout: StateLayout) -> dict[str, Piece]:
    inputs, derived, states = step_inputs(config), _derived(config), state_types(config, layout)
    streams = ("streams", "streams", TensorType(("T", config.hc_mult, config.hidden_size), "float32"))
    out: dict[str, Piece] = {}

    step_keys = [k for k in inputs if k not in ("token_ids", "seq_starts", "seq_ends", "state_slots", "logit_rows")]
    out["prelude"] = Piece(
        _Call(model.prelude, lambda part, *t: _in_order(part(dict(zip(step_keys, t, strict=True))), derived)),
        "part.", tuple(("input", k, inputs[k]) for k in step_keys), tuple(f"derived.{k}" for k in derived),
    )  # fmt: skip
    out["embed"] = Piece(
        _Call(model, lambda part, ids: (part.embed_tokens({"token_ids": ids}),)),
        "part.", (("input", "token_ids", inputs["token_ids"]),), ("streams",),
    )  # fmt: skip
    for layer, block, prefix in _blocks(model):
        kind, ratio = config.attention_kind(layer), config.compress_ratios[layer]
        if f"attention.{kind}" not in out and not isinstance(block, DSparkStage):
            out[f"attention.{kind}"] = _attention_piece(block, kind, ratio, streams, inputs, derived, states, prefix)
        gate = config.gate_kind(layer)
        if f"ffn.{gate}" not in out:
            out[f"ffn.{gate}"] = Piece(
                _Call(block, lambda part, x, ids: (part.feed_forward(x, ids),)),
                "part.", (streams, ("input", "token_ids", inputs["token_ids"])), ("streams",),
            )  # fmt: skip
    out["head"] = Piece(
        _Call(model, lambda part, x, rows: (part.logits(x, rows),)),
        "part.", (streams, ("input", "logit_rows", inputs["logit_rows"])), ("logits",),
    )  # fmt: skip
    if config.drafter == "dspark":
        out.update(_dspark_pieces(model, config, streams, inputs, derived, states))
    if config.drafter == "mtp":
        out["mtp.merge"] = Piece(
            _Call(model, lambda part, x, ids: (part.mtp_streams(x, ids),)),
            "part.", (streams, ("input", "next_ids", inputs["token_ids"])), ("streams",),
        )  # fmt: skip
        out["mtp.head"] = Piece(
            _Call(model, lambda part, x, rows: (part.mtp_head(x, rows),)),
            "part.", (streams, ("input", "logit_rows", inputs["logit_rows"])), ("logits",),
        )  # fmt: skip
    return out


def _in_order(values: Mapping[str, Tensor], names: Mapping[str, object]) -> tuple[Tensor, ...]:
    return tuple(values[name] for name in names)


def _blocks(model: Transformer) -> list[tuple[int, Any, str]]:
    main = [(i, block, f"layers.{i}.") for i, block in enumerate(model.layers)]
    return main + [(len(main) + i, block, f"mtp.{i}.") for i, block in enumerate(model.mtp)]


def _attention_piece(
    block: Any, kind: str, ratio: int, streams: tuple[str, str, TensorType], inputs: Spec, derived: Spec,
    states: Spec, prefix: str,
) -> Piece:  # fmt: skip
    groups = ["window", *(g for g in ([f"c{ratio}"] if ratio else [])), *(["index"] if kind == "csa" else [])]
    state_keys = [k.removeprefix(prefix) for k in states if k.startswith(prefix)]
    step_keys = ["positions", "request_rows", *(f"pages_{g}" for g in groups)]
    made_keys = [*(f"slots_{g}" for g in groups), "rope_compressed" if ratio else "rope_window"]
    if ratio:
        step_keys += ["seq_starts", "seq_ends", "state_slots", f"ends_{ratio}"]
        made_keys += [f"entry_rope_{ratio}"]

    def run(part: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(state_keys, tensors, strict=False))
        step = dict(zip(step_keys + made_keys, tensors[len(state_keys) :], strict=True))
        x, after = part.attention(x, state, step)
        return (x, *(after[k] for k in state_keys))

    values = [
        streams,
        *(("state", k, states[prefix + k]) for k in state_keys),
        *(("input", k, inputs[k]) for k in step_keys),
        *(("derived", k, derived[k]) for k in made_keys),
    ]
    return Piece(_Call(block, run), "part.", tuple(values), ("streams", *(f"state.{k}" for k in state_keys)))


def _dspark_pieces(
    model: Transformer, config: ModelConfig, streams: tuple[str, str, TensorType], inputs: Spec, derived: Spec,
    states: Spec,
) -> dict[str, Piece]:  # fmt: skip
    """A tap for every target layer, and what `dspark.absorb` and `dspark.draft` are made of besides."""
    spark, first, given = config.dspark, model.mtp[0], dspark_inputs(config)
    assert spark is not None
    pool, rope = ("state", "window", states["mtp.0.window"]), ("derived", "rope_window", derived["rope_window"])
    main_x = ("derived", "main_x", TensorType(("T", config.hidden_size), "float32"))
    slots = ("derived", "slots_window", derived["slots_window"])
    ids, rows = ("input", "token_ids", inputs["token_ids"]), ("input", "block_rows", given["block_rows"])
    where = [("input", k, inputs[k]) for k in ("positions", "request_rows", "pages_window")]
    keys = ("positions", "request_rows", "pages_window", "block_rows", "rope_window")
    out = {"tap.0": Piece(_Call(model, lambda part, x: (part.tap_first(x),)), "part.", (streams,), ("derived.tap",))}
    for i in range(1, len(spark.target_layer_ids)):
        tap = ("derived", "tap", TensorType(("T", i * config.hidden_size), "float32"))
        run = _Call(model, lambda part, tap, x: (part.tap_next(tap, x),))
        out[f"tap.{i}"] = Piece(run, "part.", (tap, streams), ("derived.tap",))
    out["dspark.main"] = Piece(
        _Call(first, lambda part, tap: (part.main(tap),)), "part.", (("input", "tap", given["tap"]),),
        ("derived.main_x",),
    )  # fmt: skip
    out["dspark.absorb"] = Piece(
        _Call(first, lambda part, x, pool, slots, rope: (
            part.attn.absorb(x, pool, {"slots_window": slots, "rope_window": rope}),)),
        "part.", (main_x, pool, slots, rope), ("state.window",),
    )  # fmt: skip
    out["dspark.attention"] = Piece(
        _Call(first, lambda part, x, pool, *t: (
            part.attention(x, {"window": pool}, dict(zip(keys, t, strict=True)))[0],)),
        "part.", (streams, pool, *where, rows, rope), ("streams",),
    )  # fmt: skip
    out["dspark.head"] = Piece(
        _Call(model, lambda part, x, ids, rows: part.draft_head(x, {"token_ids": ids, "block_rows": rows})),
        "part.", (streams, ids, rows), ("drafts", "confidences"),
    )  # fmt: skip
    return out


def _recipes(model: Transformer, config: ModelConfig) -> dict[str, tuple[Instance, ...]]:
    def layer(index: int, scope: str, prefix: str) -> list[Instance]:
        return [
            Instance(f"attention.{config.attention_kind(index)}", f"{scope}.attn", prefix),
            Instance(f"ffn.{config.gate_kind(index)}", f"{scope}.ffn", prefix),
        ]

    prelude = Instance("prelude", "prelude", "prelude.")
    spark = config.dspark
    step = [prelude, Instance("embed", "embed", "")]
    for i in range(config.num_hidden_layers):
        step += layer(i, f"L{i:02d}", f"layers.{i}.")
        if spark is not None and i in spark.target_layer_ids:
            step.append(Instance(f"tap.{spark.target_layer_ids.index(i)}", f"L{i:02d}.tap", ""))
    out = {"step": (*step, Instance("head", "head", ""))}
    if spark is not None:
        absorb, draft = [Instance("dspark.main", "dspark.main", "mtp.0.")], [Instance("embed", "embed", "")]
        for i in range(spark.num_stages):
            absorb.append(Instance("dspark.absorb", f"S{i}.absorb", f"mtp.{i}."))
            draft.append(Instance("dspark.attention", f"S{i}.attn", f"mtp.{i}."))
            draft.append(Instance("ffn.bias", f"S{i}.ffn", f"mtp.{i}."))
        out["dspark.absorb"] = (prelude, *absorb)
        out["dspark.draft"] = (prelude, *draft, Instance("dspark.head", "dspark.head", ""))
    if config.drafter == "mtp":
        mtp = [prelude, Instance("mtp.merge", "mtp.merge", "")]
        mtp += layer(config.num_hidden_layers, "MTP", "mtp.0.")
        out["mtp"] = (*mtp, Instance("mtp.head", "mtp.head", ""))
    return out


def _constants(config: ModelConfig, layout: StateLayout) -> dict[str, Tensor]:
    return {f"prelude.{name}": buffer for name, buffer in Prelude(config, layout).named_buffers()}


def _export(name: str, piece: Piece, symbols: Mapping[str, Symbol]) -> fx.Graph:
    """One torch.export, its placeholders named by what they stand for and its nodes typed and attributed."""
    example = {s: max(symbols[s].low, 2) + 5 + 2 * i for i, s in enumerate(symbols)}
    dims = {s: Dim(s, min=symbols[s].low if symbols[s].low > 1 else 0) for s in symbols}
    args = tuple(
        torch.empty([example[d] if isinstance(d, str) else d for d in t.shape], dtype=getattr(torch, t.dtype),
                    device="meta") for _, _, t in piece.inputs
    )  # fmt: skip
    shapes = tuple({i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for _, _, t in piece.inputs)
    calls: dict[str, _LeafCall] = {}
    hooks = []
    for path, module in piece.module.named_modules():
        if f"{type(module).__module__}.{type(module).__qualname__}" in LEAVES:
            hooks.append(module.register_forward_pre_hook(_recorder(calls, path)))
    try:
        exported = export(piece.module, args, shapes)
    finally:
        for hook in hooks:
            hook.remove()
    return _Importer(name, piece, exported, calls).graph()


@dataclass(frozen=True)
class _LeafCall:
    """What a leaf module was given, and the line of the model that gave it."""

    args: tuple[Tensor, ...]
    place: str


def _recorder(calls: dict[str, _LeafCall], path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if path in calls:
            raise CompileError(f"leaf module `{path}` runs twice in one sublayer", hint="give each use its own module")
        calls[path] = _LeafCall(args, calling_place())

    return record


class _Importer:
    """Copies an exported graph into ours: values named and typed, leaf modules attributed."""

    def __init__(self, name: str, piece: Piece, exported: Any, calls: dict[str, _LeafCall]) -> None:
        self.name, self.piece, self.exported = name, piece, exported
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        signature = exported.graph_signature
        weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.values: dict[str, Value] = {k: Value("weight", v.removeprefix(piece.strip)) for k, v in weights.items()}
        for placeholder, (kind, value, spec) in zip(signature.user_inputs, piece.inputs, strict=True):
            self.values[placeholder] = Value(kind, value)  # type: ignore[arg-type]
            self._name_symbols(placeholder, spec)
        self.leaves = {path: self._leaf(path, call.args) for path, call in calls.items()}
        self.places = {path: call.place for path, call in calls.items()}

    def _name_symbols(self, placeholder: str, spec: TensorType) -> None:
        node = next(n for n in self.exported.graph.nodes if n.name == placeholder)
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(name, str):
                self.names[size.node.expr] = sympy.Symbol(name, integer=True)

    def size(self, value: Any) -> int | str:
        """An int, or the text of an expression in our symbols."""
        if isinstance(value, torch.SymInt):
            expression = value.node.expr.xreplace(self.names)
            return int(expression) if expression.is_number else str(expression)
        return int(value)

    def type_of(self, tensor: Tensor) -> TensorType:
        return TensorType(tuple(self.size(s) for s in tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _leaf(self, path: str, args: tuple[Any, ...]) -> Leaf:
        module = self.piece.module.get_submodule(path)
        class_name = f"{type(module).__module__}.{type(module).__qualname__}"
        op: Op = OPS[LEAVES[class_name]]
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        given = iter(args)
        tensors = [own.get(name, own.get(name.rsplit("_", 1)[0])) for name in op.parameters]
        types = tuple(self.type_of(t if t is not None else next(given)) for t in tensors)
        attrs = {a: getattr(module, a) for a in op.attributes}
        return Leaf(path.removeprefix(self.piece.strip), class_name, attrs, types)

    def graph(self) -> fx.Graph:
        out = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.exported.graph.nodes:
            new = copied[node] = out.node_copy(node, lambda n: copied[n])
            new.meta = self._meta(node)
        return out

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        if node.op == "output":
            return {"outputs": self.piece.outputs}
        meta: dict[str, Any] = {"scope": self.name}
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            meta["type"] = self.type_of(value)
        elif isinstance(value, (list, tuple)):
            meta["type"] = tuple(self.type_of(v) for v in value)
        elif isinstance(value, (torch.SymInt, int)):
            meta["size"] = self.size(value)
        if node.op == "placeholder":
            meta["value"] = self.values[node.name]
            return meta
        meta["origin"], meta["passes"] = traced_place(node.meta.get("stack_trace")), ()
        stack = node.meta.get("nn_module_stack")
        if stack:
            path, _ = list(stack.values())[-1]
            if path in self.leaves:
                meta["leaf"], meta["origin"] = self.leaves[path], (self.places[path],)
            meta["path"] = path.removeprefix(self.piece.strip)
        return meta
