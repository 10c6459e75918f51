"""What a program computes, at any stage, and what a pass did to it: `Program.run`, `Step.check`.

    runs = Runs(Inputs.random(config))
    runs.results(program)            logits, streams, state and the MTP layer's, by name
    check(before, after, runs)       bit-equal; or how far apart, from which op on, and how far on equal inputs

Everything runs on the references of the ops. A pass claims to be exact, or a tolerance: the largest relative error of
a row of what any call gives, where that call and the calls before it read what they read without the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dsv4c.aligned import Digests, EqualInputs, FirstDifference, Values, counterparts
from dsv4c.apart import Difference, differences, divergence, greedy_agreement, rows_apart
from dsv4c.artifact import PassRecord, Weight
from dsv4c.checkpoint.source import load_model_state
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.inputs import Inputs
from dsv4c.interpret import Watch, greedy_sampling, program_state, read_weights, run
from dsv4c.model import Transformer, init_state
from dsv4c.model.state import group_ratios, state_tensors
from dsv4c.pipeline import Step
from dsv4c.program import Program
from dsv4c.runtime.weights import load_weights

WatchAt = Callable[..., Any]
"""A `Watch` that is first told the step and entry point: `0 step`, `0 mtp`, `1 step`, ..."""


class Runs:
    """Runs of programs on the same inputs. `count`: how many there were; weights are kept between them.

    `weights`: values by the names of programs' weights, in place of what is made of the inputs' source.
    """

    def __init__(self, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> None:
        self.inputs = inputs
        self.count = 0
        self._given = dict(weights or {})
        self._weights: dict[tuple[Any, ...], Tensor] = {}
        self._entries = ("step", "mtp") if inputs.source.has_mtp else ("step",)

    @torch.no_grad()
    def results(self, program: Program, watch: WatchAt | None = None) -> dict[str, Tensor]:
        """Logits [S, V] and streams [T, N, D] of all steps one after the other, `mtp.logits`, and the last state.

        State of nobody (row 0 of a ring, page 0 of a pool) is zeroed.
        """
        self.count += 1
        weights, config = self._weights_of(program), program.config
        slots = len(self.inputs.ids) + 1
        state = program_state(program, init_state(config, program.layout, slots - 1, self.inputs.tokens))
        state.update(greedy_sampling(program, 0, slots)[1])
        rows: dict[str, list[Tensor]] = {}
        for i, step in enumerate(self.inputs.steps(program.layout)):
            asked, _ = greedy_sampling(program, len(step["logit_rows"]), slots)
            given: dict[str, Tensor] = {**step, **asked}
            for entry in self._entries:
                if entry not in program.recipes:
                    continue
                told = cast(Watch, partial(watch, f"{i} {entry}")) if watch else None
                found = run(program, entry, given, state, weights, told)
                for name, value in found.items():
                    if name.startswith("state."):
                        state[name.removeprefix("state.")] = value
                    else:
                        rows.setdefault(name if entry == "step" else f"{entry}.{name}", []).append(value)
                given["streams"] = found.get("streams", given.get("streams", torch.empty(0)))
        out = {name: torch.cat(values) for name, values in rows.items()}
        return {**out, **somebodys_state(config, program.layout, state)}

    @torch.no_grad()
    def plain(self, layout: StateLayout | None = None, *, fake_quant: bool = False) -> dict[str, Tensor]:
        """The same of the plain model in float32."""
        self.count += 1
        config, layout = self.inputs.config, layout or StateLayout()
        with torch.random.fork_rng():  # its random weights are all replaced
            model = Transformer(config, layout, fake_quant=fake_quant).eval()
        model.load_state_dict(load_model_state(self.inputs.source), strict=self.inputs.source.has_mtp)
        state = init_state(config, layout, len(self.inputs.ids), self.inputs.tokens)
        rows: dict[str, list[Tensor]] = {}
        for step in self.inputs.steps(layout):
            streams, state = model.run(step, state)
            found = {"logits": model.logits(streams[-1], step["logit_rows"]), "streams": streams[-1]}
            if "mtp" in self._entries and len(model.mtp):
                found["mtp.logits"], state = model.mtp_logits(streams[-1], step["next_ids"], step, state)
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
        return {**{name: torch.cat(values) for name, values in rows.items()}, **somebodys_state(config, layout, state)}

    def _weights_of(self, program: Program) -> dict[str, Tensor]:
        wanted = [w for w in read_weights(program) if self.inputs.source.has_mtp or not w.name.startswith("mtp.")]
        made = [w for w in wanted if w.name not in self._given]
        missing = {_made_of(w): w for w in made if _made_of(w) not in self._weights}
        loaded, _ = load_weights(tuple(missing.values()), self.inputs.source)
        self._weights.update({key: loaded[w.name] for key, w in missing.items()})
        return {**{w.name: self._weights[_made_of(w)] for w in made}, **self._given}


def _made_of(weight: Weight) -> tuple[Any, ...]:
    return weight.sources, weight.transforms, weight.dtype


def somebodys_state(config: ModelConfig, layout: StateLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State by name, what is nobody's zeroed."""
    ratios = group_ratios(config)
    null = {t.name: layout.entries_per_page(ratios[t.group]) if t.group else 1 for t in state_tensors(config, layout)}
    out = {}
    for name, tensor in state.items():
        out[f"state.{name}"] = tensor.clone()
        out[f"state.{name}"][: null.get(name, 1)] = 0
    return out


@dataclass(frozen=True)
class Check:
    """What a rewrite did to results: nothing (`equal`), or how much.

    `max_abs`, `max_rel` and `cosine` are the worst of all results that both have in one form; `kl` is the mean
    divergence of the next token's distribution in nats, `greedy` the share of rows with the same best token;
    `first_op` the first call that gives what was nowhere before. `equal_inputs`: the largest relative error of a row of
    any call, each on what it read before (None: not asked for), at `worst_op`.
    """

    equal: bool
    kl: float = 0.0
    greedy: float = 1.0
    results: tuple[Difference, ...] = ()
    """Those that differ, the largest first."""
    other_form: tuple[str, ...] = ()
    """Results of another shape or dtype, such as packed state."""
    missing: tuple[str, ...] = ()
    """Results that are no longer there."""
    first_op: str | None = None
    equal_inputs: float | None = None
    worst_op: str | None = None

    @property
    def max_abs(self) -> float:
        """Largest difference of a value."""
        return max((d.max_abs for d in self.results), default=0.0)

    @property
    def max_rel(self) -> float:
        """Largest relative error, as `Difference` measures it."""
        return max((d.max_rel for d in self.results), default=0.0)

    @property
    def cosine(self) -> float:
        """Least cosine of a result before and after."""
        return min((d.cosine for d in self.results), default=1.0)

    def __str__(self) -> str:
        if self.equal:
            return "bit-equal"
        parts = [
            f"max abs {self.max_abs:.3g}, max rel {self.max_rel:.3g}, cosine {self.cosine:.6f}",
            f"KL {self.kl:.3g} nats, greedy {100 * self.greedy:.1f} %",
        ]
        if self.equal_inputs is not None:
            parts.append(f"{self.equal_inputs:.3g} on equal inputs")
        if self.first_op:
            parts.append(f"first differs: {self.first_op}")
        if self.missing:
            parts.append(f"missing: {', '.join(self.missing)}")
        return "; ".join(parts)


def compare(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Check:
    """Results against those before; what `after` has besides does not count."""
    missing = tuple(name for name in before if name not in after)
    other = tuple(
        name
        for name, value in before.items()
        if name in after and (after[name].shape != value.shape or after[name].dtype != value.dtype)
    )
    in_form = {n: v for n, v in before.items() if n not in missing and (n not in other or n in _ALWAYS)}
    found = tuple(differences(after, in_form))
    if not (found or missing or other):
        return Check(equal=True)
    kl, greedy = math.inf, 0.0
    if "logits" in after and after["logits"].shape == before["logits"].shape:
        kl = divergence(after["logits"], before["logits"])
        greedy = greedy_agreement(after["logits"], before["logits"])
    return Check(False, kl, greedy, found, tuple(n for n in other if n not in _ALWAYS), missing)


_ALWAYS = frozenset({"logits", "streams", "mtp.logits"})  # compared as numbers whatever their dtype


def check(before: Program, after: Program, runs: Runs, *, exact: bool = True) -> Check:
    """What separates two stages of a program on these inputs. `exact=False`: also the errors on equal inputs."""
    found = compare(runs.results(after), runs.results(before))
    if found.equal:
        return found
    found = replace(found, first_op=first_op(before, after, runs))
    return found if exact else on_equal_inputs(found, before, after, runs)


def first_op(before: Program, after: Program, runs: Runs) -> str | None:
    """The first call of `after` whose result `before` has nowhere, as "`op` in `scope`". Two runs."""
    digests = Digests()
    runs.results(before, digests.watch)
    first = FirstDifference(digests)
    runs.results(after, first.watch)
    return first.op()


def on_equal_inputs(found: Check, before: Program, after: Program, runs: Runs, tolerance: float = math.inf) -> Check:
    """The check with the errors on equal inputs, of stitched programs; `first_op` is the first beyond `tolerance`.

    Two runs.
    """
    if not (before.stitched and after.stitched):
        return found
    values = Values()
    expected = runs.results(before, values.watch)
    forced = EqualInputs(values, counterparts(before, after))
    got = runs.results(after, forced.watch)
    returned = max((rows_apart(got[n], expected[n]) for n in _ALWAYS if n in expected and n in got), default=0.0)
    return replace(
        found,
        equal_inputs=max(forced.worst(), returned),
        worst_op=forced.op(),
        first_op=found.first_op or forced.first_beyond(tolerance),
    )


def check_step(step: Step, inputs: Inputs | None = None, seed: int = 0) -> Check:
    """See Step.check."""
    runs = Runs(inputs or Inputs.random(step.before.config, seed))
    return check(step.before, step.after, runs, exact=step.record.exact)


def results_of_program(program: Program, inputs: Inputs | None = None, seed: int = 0) -> dict[str, Tensor]:
    """See Program.run."""
    return Runs(inputs or Inputs.random(program.config, seed)).results(program)


def broken(record: PassRecord, found: Check) -> str | None:
    """How a check breaks what its pass claims; None if it does not."""
    if found.missing:
        return f"`{found.missing[0]}` is no longer returned"
    if found.equal:
        return None
    if record.exact:
        return f"claims to be exact, and {found}"
    error = math.inf if found.equal_inputs is None else found.equal_inputs
    if error <= record.tolerance:
        return None
    return f"claims {record.tolerance:g} on equal inputs, and is {error:.3g} off at {found.worst_op}"
