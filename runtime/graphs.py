"""Runs the programs of a GPU artifact as CUDA graphs, broken where a segment or the user says so.

    plan's segments --break patterns--> pieces --capture, largest program first--> graphs and eager calls
    step: inputs staged by the caller --launch(name)--> one replay (or more, with eager calls between) --> outputs

All programs share one arena, one graph memory pool and one stream. Capturing runs nothing; before it every program runs
once on a step of nobody, so that libraries allocate what they need. Nothing is captured or compiled later. Calls of
several lanes become parallel branches of their graph (runtime/lanes.py); uncaptured ones run on the one stream.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4c.artifact import Call, Program
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.runtime.buffers import Arena
from dsv4c.runtime.kernels import Binder, Kernels, Run, arguments
from dsv4c.runtime.lanes import CudaStreams, Part, Streams, play, steps_of
from dsv4c.runtime.staging import Staging
from dsv4c.runtime.tables import PageTables

Progress = Callable[[int, int, str], None]
"""(programs done, programs in all, name of the last)."""


@dataclass(frozen=True)
class Piece:
    """Calls in a row that are captured together (`why` empty), or run one by one for the reason given."""

    calls: tuple[Call, ...]
    why: str = ""
    masked: bool = False
    """Whether the first call is the first to read masks, which may be sent while the calls before run."""

    @property
    def branched(self) -> bool:
        """Whether some calls may run beside others."""
        return any(call.lane for call in self.calls)


def pieces_of(program: Program, breaks: Sequence[str] = ()) -> tuple[Piece, ...]:
    """The segments of a program, with calls whose scope matches a pattern of `breaks` taken out of the graphs.

    Neighbouring `graph` segments join, but for a cut before masks are read.
    """
    out: list[Piece] = []
    masks = {item.name for item in program.inputs if item.kind == "masks"}
    for segment in program.segments:
        for call in segment.calls:
            pattern = next((p for p in breaks if fnmatch.fnmatchcase(call.scope, p)), None)
            why = segment.why or segment.kind if segment.kind != "graph" else ""
            why = why or (f"--break {pattern}" if pattern else "")
            if masks.intersection(call.args):
                masks = set()
                out.append(Piece((call,), why, True))
            elif out and out[-1].why == why:
                out[-1] = Piece((*out[-1].calls, call), why, out[-1].masked)
            else:
                out.append(Piece((call,), why))
    return tuple(out)


@dataclass
class _Bound:
    """A program over its tensors: what runs, in order, and what it gives."""

    values: dict[str, Tensor]
    outputs: dict[str, Tensor]
    pieces: tuple[Piece, ...]
    runs: list[list[Run]]
    replays: list[Callable[[], object]]
    masked: int
    """The first piece that reads masks."""
    whole: list[Callable[[], object]]
    """As `replays`, with no cut before masks are read: a graph less to launch, 30 us of a small model's step."""


class GraphExecutor:
    """All programs of one artifact on one device. One thread at a time; work is on `stream`, in the order of calls.

    `rows`: the sizes the runtime chose for symbols that state has (`R`, `Z`, `P_<group>`, `N_<group>`). Inputs are
    written through `staging` and `tables`.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        kernels: Binder,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        device: torch.device,
        *,
        rows: Mapping[str, int],
        breaks: Sequence[str] = (),
    ) -> None:
        _check_breaks(programs, breaks)
        self.programs = dict(programs)
        self.states = dict(states)
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kernels = kernels
        self.rows = dict(rows)
        self.arena = self._new_arena()
        self.staging = Staging(programs, device, rows)
        groups = {i.group: rows[str(i.shape[1])] for p in programs.values() for i in p.inputs if i.kind == "page_table"}
        self.tables = PageTables(rows["R"], {str(group): width for group, width in groups.items()}, device)
        self._slots = torch.arange(rows["R"], device=device)
        self.weights = dict(weights)
        self._bound = {
            name: self._bind(program, self._tensors(name, self.arena, self.states), pieces_of(program, breaks))
            for name, program in programs.items()
        }

    def _new_arena(self) -> Tensor:
        """Memory that any of the programs can use."""
        return Arena.memory(max(program.arena_bytes for program in self.programs.values()), self.device)

    def _tensors(self, name: str, arena: Tensor, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every value of a program, with its buffers in this arena and over these states."""
        program = self.programs[name]
        views = Arena(program, self.device, arena).views({**program.symbols, **self.rows})
        resident = {
            i.name: self.tables.tensors[str(i.group)] if i.kind == "page_table" else self._slots
            for i in program.inputs
            if i.kind in ("page_table", "state_slots")
        }
        return {**views, **self.weights, **states, **resident, **self.staging.tensors(name)}

    def _bind(self, program: Program, values: dict[str, Tensor], pieces: tuple[Piece, ...]) -> _Bound:
        runs = [self._kernels.bind_calls(program, piece.calls, values) for piece in pieces]
        outputs = {meaning: values[value] for meaning, value in program.outputs.items()}
        masked = next((i for i, piece in enumerate(pieces) if piece.masked), len(pieces))
        replays: list[Callable[[], object]] = [_all(run) for run in runs]
        return _Bound(values, outputs, pieces, runs, replays, masked, list(replays))

    def on_stream(self) -> torch.cuda.StreamContext:
        """`with executor.on_stream():` everything that must keep the order of steps."""
        return torch.cuda.stream(self.stream)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """What a program is cut into."""
        return self._bound[name].pieces

    def outputs(self, name: str) -> dict[str, Tensor]:
        """Meaning -> tensor on the device, valid until the next launch of any program."""
        return self._bound[name].outputs

    def values(self, name: str) -> Mapping[str, Tensor]:
        """Every value of a program by name: inputs, weights, states and buffers, for checks."""
        return self._bound[name].values

    def warm_up(self, progress: Progress | None = None) -> None:
        """Runs every program once, uncaptured, on a step of nobody."""
        for done, name in enumerate(self._largest_first(), 1):
            self.staging.begin(name)
            with self.on_stream():
                self.staging.send(name)
                for run in self._bound[name].runs:
                    _all(run)()
            self.synchronize()  # the pinned buffers come round again
            if progress:
                progress(done, len(self.programs), name)

    def capture(self, progress: Progress | None = None) -> None:
        """Captures every piece that can be, largest program first, into one pool. `warm_up` comes before.

        What is cut for masks that come late is captured uncut too.
        """
        if self.stream is None or not isinstance(self._kernels, Kernels):
            raise ConfigError("only an artifact's own kernels on a card can be captured", hint="`--executor eager`")
        pool, stream, kernels = torch.cuda.graph_pool_handle(), self.stream, self._kernels
        lanes = 1 + max(c.lane for bound in self._bound.values() for piece in bound.pieces for c in piece.calls)
        streams = CudaStreams(self.stream, lanes)
        for done, name in enumerate(self._largest_first(), 1):
            bound = self._bound[name]
            starts = list(itertools.accumulate((len(p.calls) for p in bound.pieces), initial=0))

            def captured(piece: Piece, runs: Sequence[Run], start: int, bound: _Bound = bound) -> Callable[[], object]:
                make = self._branches(kernels, bound, piece, start, streams) if piece.branched else _all(runs)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    make()
                replay: Callable[[], object] = graph.replay
                return replay

            for i, (piece, runs) in enumerate(zip(bound.pieces, bound.runs, strict=True)):
                if not piece.why:
                    bound.replays[i] = captured(piece, runs, starts[i])
            bound.whole, at = list(bound.replays), bound.masked
            if 0 < at < len(bound.pieces) and not bound.pieces[at - 1].why and not bound.pieces[at].why:
                joined = Piece((*bound.pieces[at - 1].calls, *bound.pieces[at].calls))
                both = [*bound.runs[at - 1], *bound.runs[at]]
                bound.whole[at - 1 : at + 1] = [captured(joined, both, starts[at - 1])]
            if progress:
                progress(done, len(self.programs), name)

    def _branches(self, kernels: Kernels, bound: _Bound, piece: Piece, start: int, streams: Streams) -> Run:
        """Makes the calls of a piece, the program's from number `start` on, each in its lane."""

        def bind(parts: Sequence[Part]) -> list[Run]:
            return kernels.bind_parts([(part, arguments(part.call, bound.values)) for part in parts])

        return partial(play, steps_of(piece.calls, start), bind, streams)

    def launch(self, name: str) -> dict[str, Tensor]:
        """Runs one step on what was staged, on the current stream; the outputs, not yet computed."""
        bound = self._bound[name]
        for replay in bound.whole:
            replay()
        return bound.outputs

    def begin(self, name: str) -> None:
        """In place of `launch`, its first half: all before the first call that reads masks."""
        bound = self._bound[name]
        for replay in bound.replays[: bound.masked]:
            replay()

    def finish(self, name: str) -> dict[str, Tensor]:
        """Its second half. The masks must have been sent."""
        bound = self._bound[name]
        for replay in bound.replays[bound.masked :]:
            replay()
        return bound.outputs

    def calls(self, name: str) -> list[tuple[Call, Callable[[], object]]]:
        """Every call of a program with a function that makes it alone, for measuring and checking."""
        bound, out = self._bound[name], []
        for piece in bound.pieces:
            for call in piece.calls:
                out.append((call, _all(self._kernels.bind_calls(self.programs[name], [call], bound.values))))
        return out

    def copy_states(self, pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
        """Copies rows (source, target) of these states, on the current stream."""
        at = torch.tensor(pairs, dtype=torch.int64).t()
        source, target = (at.pin_memory() if self.stream else at).to(self.device, non_blocking=True)
        for name in names:
            self.states[name].index_copy_(0, target, self.states[name].index_select(0, source))

    def synchronize(self) -> None:
        """Waits for everything launched."""
        if self.stream is not None:
            self.stream.synchronize()

    def _largest_first(self) -> list[str]:
        return sorted(self.programs, key=lambda n: -self.programs[n].symbols["T"])


def _all(runs: Sequence[Run]) -> Callable[[], object]:
    def run() -> None:
        for one in runs:
            one()

    return run


def _check_breaks(programs: Mapping[str, Program], breaks: Sequence[str]) -> None:
    scopes = {call.scope for p in programs.values() for s in p.segments for call in s.calls}
    for pattern in breaks:
        if not fnmatch.filter(scopes, pattern):
            raise ConfigError(
                f"no call is in `{pattern}`", hint=f"scopes are like {', '.join(sorted(scopes)[:3])}, and end in `*`"
            )
    if not programs:
        raise ArtifactError("the artifact has no programs", hint="compile it again")
