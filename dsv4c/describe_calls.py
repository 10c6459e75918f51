"""Every kernel of a part of the model in words: its lines and passes, its schedule and why, its segment and its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv4c.config import ModelConfig
from dsv4c.opened import ArtifactProgram, PlacedCall
from dsv4c.places import Place, locate


def explained(program: ArtifactProgram, scope: str) -> RenderableType:
    """The calls of a scope (`L07`, `L07.ffn`, `head`), one block each, and the segments they are in.

    Raises ConfigError for a scope without calls, ArtifactError for an artifact without provenance.
    """
    calls = program.in_scope(scope)
    blocks = [part for call in calls for part in (Text(), *_block(call))]
    return Group(_title(program, scope, calls), *blocks, Text(), _segments(program, calls), *_readers(program, calls))


def _title(program: ArtifactProgram, scope: str, calls: Sequence[PlacedCall]) -> Text:
    manifest = program.of.manifest
    parts = [_kind(ModelConfig.from_dict(manifest.model), calls[0].scope)]
    parts += [f"{len(calls)} of {len(program.calls)} calls of program `{program.name}`", f"target {manifest.target}"]
    return Text.assemble((scope, "bold"), ": ", ", ".join(part for part in parts if part))


def _kind(config: ModelConfig, scope: str) -> str:
    """`csa attention (ratio 4), bias gate` of a layer."""
    layer = scope.split(".")[0].removeprefix("L")
    if not layer.isdigit():
        return ""
    index = int(layer)
    ratio = config.compress_ratios[index]
    kind = config.attention_kind(index) + (f" attention (ratio {ratio})" if ratio else " attention")
    return f"{kind}, {config.gate_kind(index)} gate"


def _block(call: PlacedCall) -> Iterator[RenderableType]:
    kernel = call.kernel
    yield Text.assemble((f"{call.index:>4}  {kernel.op}", "bold"), f"  {call.scope}")
    places = sorted(
        (locate(one) for one in call.origin), key=lambda place: (place.where.split(":")[0], place.line or 0)
    )
    for i, place in enumerate(places):
        yield _row("" if i else "model", _line(place))
    yield _row("passes", ", ".join(call.passes))
    accuracy = "exact" if kernel.tolerance == 0 else f"tolerance {kernel.tolerance:g}"
    yield _row("schedule", f"{kernel.schedule}: {kernel.reason}; {accuracy}{_launches(call)}")
    weights = [name for name in call.reads if name in call.program.of.weights]
    if weights:
        yield _row("weights", ", ".join(weights))
    yield _row("segment", _segment(call))


def _row(label: str, value: str | Text) -> Text:
    return Text.assemble((f"      {label:<8}  ", "dim"), value)


def _line(place: Place) -> Text:
    """`attention.py:194  Attention.forward  latent = ...`"""
    if not place.where:
        return Text(place.text)
    return Text.assemble((place.where, "cyan"), f"  {place.function}  ", (place.text, "bold"))


def _launches(call: PlacedCall) -> str:
    count = len(call.kernel.launches)
    return f"; {count} launches" if count > 1 else ""


def _segment(call: PlacedCall) -> str:
    kind = call.program.segments[call.segment].kind
    lane = f", lane {call.call.lane}" if call.call.lane else ""
    waits = ", ".join(str(wait.call) for wait in call.call.waits)
    return f"{call.segment} ({kind}){lane}" + (f", waits for {waits}" if waits else "")


def segment_ends(program: ArtifactProgram) -> list[str]:
    """Why each segment of a program ends where it does."""
    out = []
    for number, segment in enumerate(program.segments):
        if number == len(program.segments) - 1:
            out.append("the program ends")
            continue
        following = program.segments[number + 1]
        first = next(call for call in program.calls if call.segment == number + 1)
        name = f"call {first.index}, `{first.op}` in `{first.scope}`"
        if following.kind == "graph":
            out.append(f"{name}, can be captured in a graph again")
        else:
            out.append(f"{name}, is {following.kind}: {following.why or segment.why or 'no reason is given'}")
    return out


def _segments(program: ArtifactProgram, calls: Sequence[PlacedCall]) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("segment", "kind", "calls", "why", "ends because"):
        table.add_column(column, overflow="fold")
    ends = segment_ends(program)
    for number in sorted({call.segment for call in calls}):
        segment = program.segments[number]
        first = next(call.index for call in program.calls if call.segment == number)
        why = segment.why or "every call can be captured"
        table.add_row(str(number), segment.kind, f"{first} to {first + len(segment.calls) - 1}", why, ends[number])
    return table


def _readers(program: ArtifactProgram, calls: Sequence[PlacedCall]) -> Iterator[Text]:
    """Who reads, elsewhere, what these calls make: what ends a sublayer is often fused into the next one's start."""
    views = {buffer.name: buffer.of for buffer in program.program.buffers if buffer.of is not None}
    own = {call.index for call in calls}
    made = {value for call in calls for value in call.writes}
    found = [c for c in program.calls if c.index not in own and any(views.get(v, v) in made for v in c.reads)]
    if found:
        shown = ", ".join(f"{c.index} `{c.op}` ({c.scope})" for c in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        yield Text(f"\nresults are read by call {shown}{more}")
