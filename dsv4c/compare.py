"""What differs between two artifacts: model, passes, programs' text, kernels, plan, state, weights, numerics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dsv4c.artifact import KVGroup, Manifest, PassRecord, StateGroup
from dsv4c.artifact import Program as ArtifactProgramRecord
from dsv4c.describe import entry_bytes
from dsv4c.errors import ArtifactError
from dsv4c.irdiff import changed
from dsv4c.opened import Artifact, PlacedCall

ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """One thing that the two artifacts say differently: its kind (`pass`, `kernel`, ...), what, and both values."""

    kind: str
    what: str
    a: str
    b: str


def differences(a: Artifact, b: Artifact) -> list[Difference]:
    """Everything that differs, by kind; empty for artifacts that compute alike, kernel for kernel."""
    parts = (_head, _passes, _texts, _kernels, _plan, _state, _weights, _numerics)
    return [found for part in parts for found in part(a, b)]


def _head(a: Artifact, b: Artifact) -> Iterator[Difference]:
    one, two = a.manifest, b.manifest
    for key in sorted({*one.model, *two.model}):
        yield from _unequal("model", key, one.model.get(key, ABSENT), two.model.get(key, ABSENT))
    for what in ("target", "isa", "compute_dtype", "max_context", "truncated_from"):
        yield from _unequal("target", what.replace("_", " "), getattr(one, what), getattr(two, what))
    for tool in sorted({*one.tools, *two.tools}):
        yield from _unequal("made with", tool, one.tools.get(tool, ABSENT), two.tools.get(tool, ABSENT))


def _unequal(kind: str, what: str, a: object, b: object) -> Iterator[Difference]:
    if a != b:
        yield Difference(kind, what, str(a), str(b))


def _passes(a: Artifact, b: Artifact) -> Iterator[Difference]:
    one = {record.name: record for record in a.manifest.passes}
    two = {record.name: record for record in b.manifest.passes}
    for name in dict.fromkeys((*one, *two)):
        yield from _unequal("pass", name, _ran(one.get(name)), _ran(two.get(name)))
    common = [[name for name in names if name in one and name in two] for names in (one, two)]
    yield from _unequal("pass", "order", ", ".join(common[0]), ", ".join(common[1]))


def _ran(record: PassRecord | None) -> str:
    if record is None:
        return "does not run"
    exact = "exact" if record.exact else "inexact"
    return f"{record.rewrites:,} rewrites, {record.nodes_before:,} to {record.nodes_after:,} nodes, {exact}"


def _texts(a: Artifact, b: Artifact) -> Iterator[Difference]:
    """Where the programs part: the first pass behind which their texts differ, and by how much at the end."""
    try:
        one, two = ({stage.name: of.text(stage) for stage in of.stages.stages} for of in (a, b))
    except ArtifactError as error:
        yield Difference("program", "text", "not compared:", error.message)
        return
    parted = next((name for name in one if name in two and one[name] != two[name]), None)
    if parted is None:
        return
    last = [list(found.values())[-1] for found in (one, two)]
    what = f"text, first after `{parted}`; {changed(*last):,} lines differ at the end"
    yield Difference("program", what, *(f"{len(text.splitlines()):,} lines" for text in last))


def _kernels(a: Artifact, b: Artifact) -> Iterator[Difference]:
    """Calls of programs of one name, paired by where they are in the model and what they compute."""
    seen: Counter[tuple[str, str, str]] = Counter()
    where: dict[tuple[str, str, str], str] = {}
    for name in (name for name in a.programs if name in b.programs):
        one, two = _keyed(a.program(name).calls), _keyed(b.program(name).calls)
        for key in dict.fromkeys((*one, *two)):
            left, right = one.get(key), two.get(key)
            pair = (_kernel(left), _kernel(right))
            if left is not None and right is not None and pair[0] == pair[1]:
                if left.call.kernel == right.call.kernel:
                    continue
                pair = (f"{pair[0]} as `{left.call.kernel}`", f"{pair[1]} as `{right.call.kernel}`")
            seen[key[1], *pair] += 1
            where.setdefault((key[1], *pair), f"{key[0]} of `{name}`")
    for (op, left_name, right_name), count in seen.most_common():
        place = where[op, left_name, right_name]
        more = f"{count} calls, first {place}" if count > 1 else place
        yield Difference("kernel", f"{op}: {more}", left_name, right_name)


def _keyed(calls: Iterable[PlacedCall]) -> dict[tuple[str, str, int], PlacedCall]:
    """(scope, op, how many of these before it) -> call."""
    counts: Counter[tuple[str, str]] = Counter()
    out = {}
    for call in calls:
        out[call.scope, call.op, counts[call.scope, call.op]] = call
        counts[call.scope, call.op] += 1
    return out


def _kernel(call: PlacedCall | None) -> str:
    return "no such call" if call is None else f"{call.kernel.schedule} (tolerance {call.kernel.tolerance:g})"


_PLAN: Mapping[str, Callable[[ArtifactProgramRecord], str]] = {
    "calls": lambda p: f"{sum(len(s.calls) for s in p.segments):,}",
    "segments": lambda p: ", ".join(f"{s.kind} of {len(s.calls)}" for s in p.segments),
    "arena": lambda p: f"{p.arena_bytes:,} bytes",
    "calls beside lane 0": lambda p: f"{sum(c.lane > 0 for s in p.segments for c in s.calls):,}",
    "sizes": lambda p: ", ".join(f"{k}={v}" for k, v in sorted(p.symbols.items())),
}


def _plan(a: Artifact, b: Artifact) -> Iterator[Difference]:
    one, two = a.manifest.programs, b.manifest.programs
    only = [", ".join(k for k in here if k not in there) or ABSENT for here, there in ((one, two), (two, one))]
    yield from _unequal("plan", "programs of one alone", *only)
    for name in (name for name in one if name in two):
        for what, say in _PLAN.items():
            yield from _unequal("plan", f"{what} of `{name}`", say(one[name]), say(two[name]))


def _state(a: Artifact, b: Artifact) -> Iterator[Difference]:
    def groups(manifest: Manifest) -> dict[str, str]:
        kv = {group.name: f"{entry_bytes(group) / group.tokens_per_entry:,.1f} bytes a token, {_pools(group)}"
              for group in manifest.kv_groups}  # fmt: skip
        return {**kv, **{g.name: f"{entry_bytes(g):,} bytes a request, {_pools(g)}" for g in manifest.state_groups}}

    one, two = groups(a.manifest), groups(b.manifest)
    for name in dict.fromkeys((*one, *two)):
        yield from _unequal("state", name, one.get(name, ABSENT), two.get(name, ABSENT))


def _pools(group: KVGroup | StateGroup) -> str:
    kinds = Counter(f"{pool.dtype}{list(pool.entry_shape)}" for pool in group.pools)
    return ", ".join(f"{count} pools of {kind}" for kind, count in kinds.items())


def _weights(a: Artifact, b: Artifact) -> Iterator[Difference]:
    one, two = ({w.name: (w.shape, w.dtype, w.transforms) for w in of.manifest.weights} for of in (a, b))
    only = [sorted(k for k in here if k not in there) for here, there in ((one, two), (two, one))]
    yield from _unequal("weights", "of one alone", _some(only[0]), _some(only[1]))
    other = [name for name in one if name in two and one[name] != two[name]]
    if other:
        first = other[0]
        yield Difference(
            "weights", f"{len(other)} laid out otherwise, first `{first}`",
            f"{one[first][1]}{list(one[first][0])}", f"{two[first][1]}{list(two[first][0])}",
        )  # fmt: skip
    yield from _unequal("weights", "embedded", a.manifest.embedded_weights, b.manifest.embedded_weights)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else ABSENT


def _numerics(a: Artifact, b: Artifact) -> Iterator[Difference]:
    one, two = a.manifest.numerics, b.manifest.numerics
    for sentence in dict.fromkeys((*one, *two)):
        yield from _unequal("numerics", sentence, *("yes" if sentence in of else "no" for of in (one, two)))
