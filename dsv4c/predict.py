"""What a step of a model should take on a GPU, before it is compiled or run: time, bytes and operations, op by op.

    lower a model with one layer of each kind -> plan the bucket -> predict each call -> as many layers as the model has

A batch is padded to the bucket that an artifact would run. Independent calls overlap as the planner's lanes allow.
Routing is taken as even, sampling as with a temperature, page tables as wide as the context. `low` is what the maker's
stated rates allow with nothing exposed but launches; `high` is where kernels that no card has run reach half of what
their likes reach on an H200 (for an H200 it is the prediction).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv4c import overlap
from dsv4c.artifact import Call
from dsv4c.buckets import FEW_ROWS, Bucket, gpu_buckets
from dsv4c.compile import Options, artifact_inputs, lower, sampling_inputs, state_symbols, usual_options
from dsv4c.config import ModelConfig, Target
from dsv4c.errors import ConfigError
from dsv4c.lanes import Task, settle
from dsv4c.passes import default_pipeline
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.pipeline import Pipeline, Step
from dsv4c.plan import Called, Plan, plan
from dsv4c.program import Program
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Choice
from dsv4c.schedules.predict import Bound, Situation, Stage, busy, card_of, measured, seconds, stages
from dsv4c.weights import stored_formats

Activations = Literal["mxfp8", "mxfp4"]
BOUNDS: tuple[Bound, ...] = ("expected", "stated", "half")


@dataclass(frozen=True)
class OpCost:
    """All calls of one op by one schedule in a step. Seconds are of the calls alone, one after another."""

    op: str
    schedule: str
    calls: int
    seconds: float
    low: float
    high: float
    bytes: float
    """From and to memory."""
    flops: float
    """That the result needs; a multiply-add counts two."""
    unit: str
    measured: bool
    """Whether the rates are of this kernel's own source (on an H200), or of its like."""

    def __add__(self, other: OpCost) -> OpCost:
        return replace(
            self, calls=self.calls + other.calls, seconds=self.seconds + other.seconds, low=self.low + other.low,
            high=self.high + other.high, bytes=self.bytes + other.bytes, flops=self.flops + other.flops,
            measured=self.measured and other.measured,
        )  # fmt: skip

    def times(self, count: int) -> OpCost:
        """As much, `count` times."""
        return replace(
            self, calls=self.calls * count, seconds=self.seconds * count, low=self.low * count,
            high=self.high * count, bytes=self.bytes * count, flops=self.flops * count,
        )  # fmt: skip


@dataclass(frozen=True)
class StepCost:
    """One step of the whole model. `seconds` of the device, calls overlapping; `program`: its bucket."""

    phase: str
    program: str
    tokens: int
    requests: int
    context: int
    seconds: float
    low: float
    high: float
    weights: float
    """Bytes of the weights that its programs hold."""
    ops: tuple[OpCost, ...]
    """The longest first."""

    @property
    def bytes(self) -> float:
        return sum(op.bytes for op in self.ops)

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.ops)


class Predictor:
    """A model on a target. Lowering takes seconds and happens once, each step is then planned in less than one."""

    def __init__(
        self, config: ModelConfig, arch: str, *, activations: Activations | None = None, every_layer: bool = False,
        watch: Callable[[Step], None] | None = None,
    ) -> None:  # fmt: skip
        """`every_layer`: lowers all of them, to check that layers of a kind take the same.

        Raises ConfigError for a target that nobody calibrated, or `activations` that it does not have."""
        if arch not in MACHINES or arch == "cpu":
            known = ", ".join(name for name in MACHINES if name != "cpu")
            raise ConfigError(f"nothing predicts target `{arch}`", hint=f"targets are {known}")
        self.config, self.arch = config, arch
        like = kinds(config)
        chosen = range(config.num_hidden_layers) if every_layer else sorted(set(like))
        few = of_layers(config, chosen)
        self._counts = [1 if every_layer else like.count(layer) for layer in chosen]
        self._options = usual_options(few, Target(arch))
        self._program: Program = lower(
            few, self._options, watch, arch, _pipeline(few, arch, self._options, activations)
        )

    def decode(self, batch: int, context: int) -> StepCost:
        """One new token of each of `batch` requests that hold `context` tokens with it."""
        check_context(self.config, context)
        sizes = [b.requests for b in gpu_buckets(max(8192, batch), max(256, batch)) if b.phase == "decode"]
        size = next(size for size in sorted(sizes) if size >= batch)
        return self._step(Bucket("decode", size, size, size), Situation(size, size, context))

    def prefill(self, tokens: int, before: int = 0) -> StepCost:
        """`tokens` tokens of one prompt of which `before` are computed. Raises ConfigError beyond one step's tokens."""
        check_context(self.config, before + tokens)
        buckets = [b.tokens for b in gpu_buckets(self._options.max_tokens, self._options.max_requests)
                   if b.phase == "prefill"]  # fmt: skip
        size = next((size for size in sorted(buckets) if size >= tokens), None)
        if size is None:
            raise ConfigError(
                f"a prefill step has at most {max(buckets):,} tokens, not {tokens:,}",
                hint="a longer prompt takes several: give the tokens of one, and what came before as the context",
            )
        rows = min(size, FEW_ROWS)
        return self._step(Bucket("prefill", size, rows, rows), Situation(size, 1, before + size))

    def _step(self, bucket: Bucket, situation: Situation) -> StepCost:
        config, layout = self._program.config, self._program.layout
        options = replace(self._options, max_requests=max(self._options.max_requests, bucket.requests))
        symbols = bucket.symbols(config, state_symbols(config, layout, options))
        inputs = (*artifact_inputs(config, layout), *sampling_inputs(config.vocab_size))
        made = plan(self._program, "step", bucket.name, bucket.phase, self.arch, symbols, inputs)
        seen = replace(options, max_context=max(1, situation.context))
        now = bucket.symbols(config, state_symbols(config, layout, seen))
        return self._cost(bucket, situation, made, now)

    def _cost(self, bucket: Bucket, situation: Situation, made: Plan, symbols: Mapping[str, int]) -> StepCost:
        found, calls = made.called[bucket.name], _calls(made, bucket.name)
        counts = [self._count(call.scope) for call in calls]
        described = [self._stages(one, symbols, situation) for one in found]
        ops = [
            self._op(one.choice, parts).times(count) for one, parts, count in zip(found, described, counts, strict=True)
        ]
        weights = sum(
            count * sum(v.bytes(symbols) for v in one.choice.inputs if v is not None and v.role == "weight")
            for one, count in zip(found, counts, strict=True)
        )
        expected, low, high = (self._whole(found, described, calls, bound) for bound in BOUNDS)
        return StepCost(
            bucket.phase, bucket.name, situation.tokens, situation.requests, situation.context, expected, low, high,
            weights, _joined(ops),
        )  # fmt: skip

    def _stages(self, one: Called, symbols: Mapping[str, int], situation: Situation) -> tuple[Stage, ...]:
        rows = {**symbols, "T": symbols[one.rows]}
        return stages(one.choice.schedule, one.choice.node, rows, one.choice.config, situation, card_of(self.arch))

    def _op(self, choice: Choice, parts: Sequence[Stage]) -> OpCost:
        expected, low, high = (sum(seconds(part, self.arch, bound) for part in parts) for bound in BOUNDS)
        return OpCost(
            choice.node.op, choice.schedule, 1, expected, low, high, sum(part.bytes for part in parts),
            sum(part.flops for part in parts), max(parts, key=lambda part: part.flops).unit, all(map(measured, parts)),
        )  # fmt: skip

    def _count(self, scope: str) -> int:
        """Layers of the whole model that a call of the lowered one stands for."""
        layer = _layer(scope)
        return 1 if layer is None else self._counts[layer]

    def _whole(
        self, found: Sequence[Called], described: Sequence[Sequence[Stage]], calls: Sequence[Call], bound: Bound
    ) -> float:
        """Seconds of a step: the lowered layers as their lanes overlap, and each as often again as it is meant."""
        tasks = [_timed(one.task, parts, self.arch, bound) for one, parts in zip(found, described, strict=True)]
        lanes = [call.lane for call in calls]
        total = _duration(tasks, lanes)
        for layer, count in enumerate(self._counts):
            places = [place for place, call in enumerate(calls) if _layer(call.scope) == layer]
            low, high = places[0], places[-1] + 1
            total += (count - 1) * _duration([_from(task, low) for task in tasks[low:high]], lanes[low:high])
        return total


def check_context(config: ModelConfig, context: int) -> None:
    """Raises ConfigError for more tokens than the model allows."""
    most = config.max_position_embeddings
    if context > most:
        raise ConfigError(f"a context of {context:,} tokens is more than the model's {most:,}")


def _calls(made: Plan, name: str) -> list[Call]:
    return [call for segment in made.programs[name].segments for call in segment.calls]


def _layer(scope: str) -> int | None:
    """3 of `L03.attn`; None outside of layers."""
    found = re.match(r"L(\d+)\b", scope)
    return int(found[1]) if found else None


def kinds(config: ModelConfig) -> list[int]:
    """Of each layer the first one that does the same. The first and the last of all, which begin and end the streams,
    are like no other; nor are those that a DSpark drafter reads."""
    last, read = config.num_hidden_layers - 1, set(config.dspark_target_layer_ids or ())
    first: dict[object, int] = {}
    return [
        layer
        if layer in (0, last) or layer in read
        else first.setdefault(
            (config.compress_ratios[layer], config.gate_kind(layer), layer in config.nvfp4_layers), layer
        )
        for layer in range(last + 1)
    ]


def of_layers(config: ModelConfig, chosen: Sequence[int]) -> ModelConfig:
    """The model with these layers alone, in their order, its first and last among them."""
    behind = range(config.num_hidden_layers, len(config.compress_ratios))
    kept = (*chosen, *behind)
    targets = config.dspark_target_layer_ids
    return replace(
        config, num_hidden_layers=len(chosen),
        compress_ratios=tuple(config.compress_ratios[layer] for layer in kept),
        nvfp4_layers=tuple(at for at, layer in enumerate(kept) if layer in config.nvfp4_layers),
        num_hash_layers=sum(config.gate_kind(layer) == "hash" for layer in chosen),
        dspark_target_layer_ids=targets and tuple(chosen.index(layer) for layer in targets),
    )  # fmt: skip


def _pipeline(config: ModelConfig, arch: str, options: Options, activations: Activations | None) -> Pipeline | None:
    if activations is None:
        return None
    usual = default_pipeline(stored_formats(config), arch, 0, options.max_context)
    if not any(isinstance(one, QuantiseActivations) for one in usual.passes):
        raise ConfigError(
            f"target `{arch}` computes experts on BF16 activations or wider",
            hint="`--activations` is for sm_100a and sm_103a",
        )
    if len(config.nvfp4_layers) >= config.num_hidden_layers:
        raise ConfigError(
            f"`--activations {activations}` fits no experts: all of this model are NVFP4",
            hint="leave it out: NVFP4 weights are multiplied with NVFP4 activations",
        )
    chosen = QuantiseActivations(activations)
    return usual.without(chosen.name).with_(chosen)


def _timed(task: Task, parts: Sequence[Stage], arch: str, bound: Bound) -> Task:
    """The task with predicted times in place of planned ones."""
    total, work = sum(seconds(part, arch, bound) for part in parts), sum(busy(part, arch, bound) for part in parts)
    planned = sum(part.seconds for part in task.parts)
    shares = [part.seconds / planned for part in task.parts]
    timed = (
        replace(part, seconds=total * share, busy=min(work, total) * share)
        for part, share in zip(task.parts, shares, strict=True)
    )
    return replace(task, parts=tuple(timed))


def _from(task: Task, low: int) -> Task:
    """The task where everything before call `low` is over."""
    return replace(
        task,
        parts=tuple(replace(part, needs=frozenset(n - low for n in part.needs if n >= low)) for part in task.parts),
    )


def _duration(tasks: Sequence[Task], lanes: Sequence[int]) -> float:
    if not any(lanes):
        return sum(part.seconds for task in tasks for part in task.parts)
    return overlap.duration(tasks, settle(tasks, lanes))


def _joined(ops: Iterable[OpCost]) -> tuple[OpCost, ...]:
    """By op and schedule, the longest first."""
    out: dict[tuple[str, str], OpCost] = {}
    for op in ops:
        key = (op.op, op.schedule)
        out[key] = out[key] + op if key in out else op
    return tuple(sorted(out.values(), key=lambda op: -op.seconds))
