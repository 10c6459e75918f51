"""Plain model -> capture -> every pass -> compiled program, on the same inputs: what each claims, and what it does.

    found = verify_lineage(of_pipeline(pipeline, program), [Case("random", Runs(Inputs.random(config)))])
    found.ok, found.broken[0].name, found.broken[0].broken

Exact stages are compared bit for bit, the others on equal inputs (dsv4c.numerics), kernels call by call with their
references (dsv4c.compiled). The errors, divergences and bits per byte of a row are those of the first case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.apart import divergence, greedy_agreement
from dsv4c.checkpoint.names import inventory
from dsv4c.compiled import Compiled
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.inputs import Inputs
from dsv4c.lineage import Lineage, Staged
from dsv4c.numerics import Check, Runs, broken, compare, first_op, on_equal_inputs
from dsv4c.room import measured_room
from dsv4c.shadow import Shadow
from dsv4c.strictjson import decode

Watch = Callable[[str], object]
Results = Mapping[str, Tensor]

PLAIN, COMPILED = "plain model", "compiled program"


@dataclass(frozen=True)
class Case:
    """Inputs by `name`, as people are told of them, and the `runs` of programs on them."""

    name: str
    runs: Runs


@dataclass(frozen=True)
class Row:
    """One stage: what it claims, what it did to the results of the stage before it, and what is then off.

    `name` is that of the pass (or `capture`, `compiled program`), `claim` is `exact` or `to 0.25`, `why` its reason.
    `check` compares with the stage before. `changed`: whether the stage rewrote anything; if not, it was not run.
    `kl` (nats) and `greedy` are the divergence of the next token's distribution from the plain model's, and the share
    of equal best tokens; `bits_per_byte` of the text, where there is text. `broken`: how the claim is broken, and in
    which case.
    """

    name: str
    claim: str
    changed: bool
    check: Check
    kl: float
    greedy: float
    bits_per_byte: float | None = None
    broken: str | None = None
    why: str = ""


@dataclass(frozen=True)
class ScheduleRow:
    """One `schedule` of an `op`: the largest `error` of its calls against their references, and its `tolerance`."""

    op: str
    schedule: str
    error: float
    tolerance: float
    broken: str | None = None
    """The first call beyond it."""


@dataclass(frozen=True)
class Verification:
    """What `dsv4c verify` found of `model` for `target`: `rows` of stages, and of `schedules` where kernels ran.

    `inputs`: cases in words; `notes`: what was not verified, and why.
    """

    model: str
    target: str
    inputs: tuple[str, ...]
    rows: tuple[Row, ...]
    schedules: tuple[ScheduleRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[Row | ScheduleRow, ...]:
        """Whatever breaks its claim, in order."""
        return (*(r for r in self.rows if r.broken), *(s for s in self.schedules if s.broken))

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return not self.broken

    def to_json(self) -> str:
        """As JSON, for tools. Infinite errors are `Infinity`, as Python writes them."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Verification:
        """What `to_json` wrote. Raises ArtifactError for anything else."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"no JSON: {error}", hint="give a file that `dsv4c verify --json` wrote") from error
        found: Verification = decode(cls, value)
        return found


@dataclass
class _Case:
    """A case under way: the plain model's results, and the last stage's."""

    case: Case
    plain: Results
    last: Results


def verify_lineage(
    lineage: Lineage,
    cases: Sequence[Case],
    *,
    compiled: Compiled | None = None,
    fake_quant: bool = False,
    model: str = "",
    target: str = "",
    notes: Sequence[str] = (),
    watch: Watch | None = None,
) -> Verification:
    """Runs every stage of `lineage` that changed something, and the kernels of `compiled`, in every one of `cases`.

    `fake_quant`: the plain model that was captured quantises as in training. `model`, `target` and `notes` are told on
    in the result. `watch` is told what begins. Raises ConfigError where the inputs do not fit the kernels.
    """
    tell = watch or (lambda name: None)
    tell(PLAIN)
    under_way = []
    for case in cases:
        plain = case.runs.plain(lineage[0].program.layout, fake_quant=fake_quant)
        under_way.append(_Case(case, plain, plain))
    rows, before = [], None
    for stage in lineage:
        tell(stage.name)
        rows.append(_row(stage, before, under_way))
        before = stage
    schedules: tuple[ScheduleRow, ...] = ()
    if compiled is not None:
        tell(COMPILED)
        row, schedules = _compiled(compiled, under_way)
        rows.append(row)
    said = tuple(f"{case.name}: {in_words(case.runs.inputs)}" for case in cases)
    return Verification(model, target, said, tuple(rows), schedules, tuple(notes))


def in_words(inputs: Inputs) -> str:
    """`2 requests, 285 tokens of text (1,034 bytes)`."""
    tokens, many = sum(len(ids) - 1 for ids in inputs.ids), len(inputs.ids)
    of = f" of text ({inputs.text_bytes:,} bytes)" if inputs.text_bytes else ""
    return f"{many} request{'s' if many > 1 else ''}, {tokens:,} tokens{of}"


def _row(stage: Staged, before: Staged | None, cases: Sequence[_Case]) -> Row:
    checks: list[Check] = []
    complaint = None
    for one in cases:
        found = Check(equal=True)
        if stage.changed:
            results = one.case.runs.results(stage.program)
            found = compare(results, one.last)
            one.last = results
        found, wrong = _judged(stage, before, found, one.case.runs)
        checks.append(found)
        if wrong is not None and complaint is None:
            complaint = f"{wrong} ({one.case.name})" if len(cases) > 1 else wrong
    why = "" if stage.record is None else stage.record.why
    row = Row(stage.name, stage.claim, stage.changed, checks[0], 0.0, 1.0, broken=complaint, why=why)
    return _measured(row, cases[0])


def _judged(stage: Staged, before: Staged | None, found: Check, runs: Runs) -> tuple[Check, str | None]:
    """The check with what its claim asks for, and how it breaks the claim."""
    if found.equal:
        return found, None
    if before is None or stage.record is None:
        return found, f"is not the plain model: {found}"
    if not stage.exact:
        found = on_equal_inputs(found, before.program, stage.program, runs, stage.record.tolerance)
    wrong = broken(stage.record, found)
    if wrong is not None and stage.exact:
        found = replace(found, first_op=first_op(before.program, stage.program, runs))
        wrong = broken(stage.record, found)
    return found, wrong


def _measured(row: Row, one: _Case) -> Row:
    """The row with what separates its results from the plain model's."""
    logits, plain, inputs = one.last["logits"], one.plain["logits"], one.case.runs.inputs
    bits = None
    if inputs.text_bytes:
        nats = F.cross_entropy(logits.double(), inputs.targets(StateLayout()), reduction="sum").item()
        bits = nats / math.log(2) / inputs.text_bytes
    return replace(row, kl=divergence(logits, plain), greedy=greedy_agreement(logits, plain), bits_per_byte=bits)


def _compiled(compiled: Compiled, cases: Sequence[_Case]) -> tuple[Row, tuple[ScheduleRow, ...]]:
    """The kernels beside the last stage, and every schedule beside its references."""
    found: list[Check] = []
    worst: dict[tuple[str, str], ScheduleRow] = {}
    for one in cases:
        results, shadow = compiled.results(one.case.runs.inputs)
        found.append(compare(results, {n: one.last[n] for n in results if n in one.last}))
        one.last = results
        for it in _schedules(shadow, one.case.name if len(cases) > 1 else ""):
            known = worst.get((it.op, it.schedule))
            if known is None or (it.broken and not known.broken) or (it.error > known.error and not known.broken):
                worst[it.op, it.schedule] = it
    row = Row(COMPILED, "by schedule", True, found[0], 0.0, 1.0)
    return _measured(row, cases[0]), tuple(worst[key] for key in sorted(worst))


def _schedules(shadow: Shadow, case: str) -> list[ScheduleRow]:
    wrong: dict[tuple[str, str], str] = {}
    for difference in shadow.differences:
        wrong.setdefault((difference.op, difference.schedule), f"{difference}" + (f" ({case})" if case else ""))
    return [
        ScheduleRow(op, schedule, error, tolerance, wrong.get((op, schedule)))
        for op, schedule, error, tolerance in shadow.summary()
    ]


def quantised_in_training(lineage: Lineage) -> bool:
    """Whether the captured model quantises entries as in training: then no plain float32 model is its reference."""
    return any(torch.float8_e4m3fn in node.args for node in lineage[0].program.nodes())


def check_room(config: ModelConfig) -> None:
    """Raises ConfigError if the plain model's float32 weights would not fit in memory twice."""
    wanted = 2 * 4 * sum(math.prod(spec.shape) for spec in inventory(config).values())
    room = measured_room("cpu").total_bytes
    if wanted > room:
        raise ConfigError(
            f"the plain model needs {wanted / 1e9:,.0f} GB in float32, this machine has {room / 1e9:,.0f}",
            hint="verify a smaller model of the same kind, such as nano: passes are the same",
        )
