"""Twelve deliberate faults, of the kind that engines for this model have shipped: a pass does its work, then harm."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from dsv4c.config import StateLayout
from dsv4c.lineage import Lineage, of_steps
from dsv4c.model.attention import window_keys
from dsv4c.model.rope import rope_frequencies, rope_table
from dsv4c.ops import Op
from dsv4c.pipeline import Pass, Pipeline, Step
from dsv4c.program import Program, is_op

Edit = Callable[[Program], None]
Function = Callable[..., Any]
LAYOUT = StateLayout()


@dataclass(frozen=True)
class Fault:
    """`edit` is done to the program behind the pass `at`; `op` is what bisect must name, `scope` where."""

    name: str
    at: str
    edit: Edit
    op: str
    scope: str
    arch: str = "cpu"

    def lineage(self, steps: tuple[Step, ...]) -> Lineage:
        """These stages with the fault in one of them. `steps`: of the default pipeline, those that change something."""
        index = next(i for i, step in enumerate(steps) if step.name == self.at)
        passes = Pipeline.default(self.arch).passes
        left = {step.name for step in steps[:index]}
        rest = Pipeline(tuple(self._spoilt(p) if p.name == self.at else p for p in passes if p.name not in left))
        return of_steps(chain(steps[:index], rest.steps(steps[index].before)))

    def _spoilt(self, one: Pass) -> Pass:
        def apply(self: Pass, program: Program) -> int:
            count = type(one).apply(self, program)
            edit(program)
            return count

        edit = self.edit
        kind = type(f"Spoilt{type(one).__name__}", (type(one),), {"apply": apply})
        spoilt: Pass = kind(**{f.name: getattr(one, f.name) for f in dataclasses.fields(one)})
        return spoilt


def _nodes(program: Program, *ops: str) -> list[fx.Node]:
    found = [n for n in program.nodes() if any(is_op(n, op) for op in ops)]
    assert found, ops
    return found


def _means(*ops: str, of: Callable[[fx.Node], bool] = lambda node: True) -> Callable[[Callable[..., Any]], Edit]:
    """An edit: these ops (of nodes that meet `of`) mean the decorated function, told their right meaning first."""

    def decorate(function: Function) -> Edit:
        def edit(program: Program) -> None:
            for node in [n for n in _nodes(program, *ops) if of(n)]:
                assert isinstance(node.target, Op)
                right = node.target.reference
                node.target = dataclasses.replace(
                    node.target, reference=functools.wraps(right)(_bound(function, right))
                )

        return edit

    return decorate


def _bound(function: Function, right: Function) -> Function:
    return lambda *args, **attrs: function(right, *args, **attrs)


def _attrs(*ops: str, **change: Callable[[Any], Any]) -> Edit:
    """An edit: attributes of these ops change so."""

    def edit(program: Program) -> None:
        for node in _nodes(program, *ops):
            node.kwargs = {k: change[k](v) if k in change else v for k, v in node.kwargs.items()}

    return edit


@_means("hc_post_pre_norm")
def transposed_comb(right: Function, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(y, x, post, comb.mT, *rest, **attrs)


def _is_q_norm(node: fx.Node) -> bool:
    weight = node.args[1]
    return isinstance(weight, fx.Node) and str(weight.meta["value"].name).endswith("q_norm.weight")


@_means("rms_norm", of=_is_q_norm)
def eps_outside_the_root(right: Function, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def yarn_left_on(program: Program) -> None:
    """Layers without compressed entries turn as the others do."""
    config = program.config
    (name,) = (n for n in program.constants if n.endswith("rope_window.frequency"))
    known = program.constants[name]
    yarn = rope_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
    assert known.shape == yarn.shape and not torch.equal(known, yarn)
    program.constants[name] = yarn


@_means("entry_rope_table")
def rope_at_entry_index(right: Function, positions: Tensor, ends: Tensor, frequency: Tensor, *, ratio: int) -> Tensor:
    return rope_table(positions[ends] // ratio, frequency)


@_means("attend_window", "attend_csa", "attend_hca")
def dropped_sink(right: Function, *args: Tensor, **attrs: Any) -> Tensor:
    out: Tensor = right(*args[:-1], torch.full_like(args[-1], -math.inf), **attrs)
    return out


@_means("index_topk")
def causal_bound_off_by_one(right: Function, *args: Tensor, **attrs: Any) -> Tensor:
    picks: Tensor = right(*args[:-1], args[-1] + 1, **attrs)
    return picks


@_means("attend_window")
def bf16_softmax(
    right: Function, q: Tensor, pool: Tensor, pages: Tensor, rows: Tensor, positions: Tensor, sink: Tensor, *,
    window: int, page: int,
) -> Tensor:  # fmt: skip
    keys, seen = window_keys(pool, pages, rows, positions, window=window, page=page)
    logits = torch.einsum("thc,tkc->thk", q, keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), -math.inf)
    joined = torch.cat((logits, sink.view(1, -1, 1).expand(len(q), -1, 1)), -1)
    weight = joined.bfloat16().softmax(-1)[..., :-1].float()
    return torch.einsum("thk,tkc->thc", weight, keys)


def swapped_gate_and_up(program: Program) -> None:
    """The rows of the shared expert's two maps are joined in the wrong order."""
    for name, parts in program.weight_sources.items():
        gate, up = ([p for p in parts if p.endswith(f"shared_experts.{w}.weight")] for w in ("w1", "w3"))
        if gate and up:
            program.weight_sources[name] = tuple({gate[0]: up[0], up[0]: gate[0]}.get(p, p) for p in parts)


@_means("linear_fp8")
def stale_scale(right: Function, data: Tensor, scale: Tensor, *rest: Tensor, **attrs: Any) -> Tensor:
    """Of the row before."""
    out: Tensor = right(data, scale.roll(1, 0), *rest, **attrs)
    return out


@_means("attend_csa")
def lost_padding_mask(right: Function, *args: Tensor, **attrs: Any) -> Tensor:
    """A pick of nothing is entry 0."""
    out: Tensor = right(*args[:5], args[5].clamp(min=0), *args[6:], **attrs)
    return out


FAULTS = (
    Fault("transposed comb", "fuse-hc-post-pre", transposed_comb, "hc_post_pre_norm", "L00.ffn"),
    Fault("missing clamp", "raise-moe", _attrs("experts", limit=lambda _: math.inf), "experts", "L00.ffn"),
    Fault("eps in the wrong place", "raise-norm", eps_outside_the_root, "rms_norm", "L00.attn"),
    Fault("YaRN left on", "raise-rope", yarn_left_on, "rope_table", "prelude"),
    Fault("RoPE at entry index", "raise-rope", rope_at_entry_index, "entry_rope_table", "prelude"),
    Fault("dropped sink", "raise-attention", dropped_sink, "attend_window", "L00.attn"),
    Fault(
        "wrong routing scale",
        "raise-moe",
        _attrs("gate_hash", "gate_bias", scaling=lambda s: 2 * s),
        "gate_hash",
        "L00.ffn",
    ),
    Fault("causal bound off by one", "raise-indexer", causal_bound_off_by_one, "index_topk", "L02.attn"),
    Fault("bf16 softmax", "raise-attention", bf16_softmax, "attend_window", "L00.attn"),
    Fault("swapped gate and up", "fuse-linears", swapped_gate_and_up, "swiglu_pair", "L00.ffn"),
    Fault("stale scale", "store-linears", stale_scale, "linear_fp8", "L00.attn", "sm_90a"),
    Fault("lost padding mask", "raise-attention", lost_padding_mask, "attend_csa", "L02.attn"),
)
