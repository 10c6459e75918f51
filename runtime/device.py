"""Steps on a GPU: spans -> a padded bucket -> one launch -> tokens, read by the host one step late.

    launch   pick the smallest program that holds the step, fill its inputs, send them with what changed in the page
             tables, replay, start the copy of the tokens to the host; nothing here waits for the device
    finish   where masks of grammars depend on tokens in flight, `launch` leaves the sampling out: it follows when
             these tokens are collected, and their masks filled, while the device computes the logits
    collect  wait for that copy

What a request asks of sampling is kept by slot, so that a step gathers it; penalties count tokens on the device. Only
rows that ask for log-probabilities cost more: they are computed behind the step, from its logits as they were before
edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv4c.artifact import Program
from dsv4c.errors import EngineError, RunnerBroken
from dsv4c.runtime.grammar import Cursor, fill_wide
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import Chosen
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.scheduler import Span
from dsv4c.runtime.seats import Seats

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Step:
    """The spans of a step as arrays, one entry a span: tokens, rows of logits, first token in the batch, slot."""

    spans: tuple[Span, ...]
    starts: Int64Array
    lengths: Int64Array
    firsts: Int64Array
    slots: Int64Array
    rows: Int64Array
    sampled: Int64Array
    """Rows of logits that choose a token: the last ones of a span."""
    floating: npt.NDArray[np.bool_]
    drafts: int
    """Most drafts to verify or to make."""
    scored: bool
    """Whether any row asks for log-probabilities."""
    ruled: bool
    """Whether any row has a grammar."""
    single: bool
    """Whether every span is one token with its drafts, and samples: a decode step."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> _Step:
        facts = [
            (s.start, s.end, s.request.slot, s.samples, len(s.prompt_rows), s.request.params.logprobs is not None,
             s.drafts, s.floating, s.wanted)
            for s in spans
        ]  # fmt: skip
        starts, ends, slots, samples, prompt, scored, drafts, floating, wanted = np.array(facts, dtype=np.int64).T
        lengths = ends - starts
        chosen = (1 + drafts) * samples
        return cls(
            tuple(spans), starts, lengths, np.cumsum(lengths) - lengths, slots, chosen + prompt, chosen,
            floating.astype(bool), int(max(drafts.max(), wanted.max())),
            bool(prompt.any() or (scored & samples).any()),
            any(s.samples and s.request.params.grammar is not None for s in spans),
            bool((lengths == 1 + drafts).all() and samples.all() and not prompt.any()),
        )  # fmt: skip

    def rows_chosen(self) -> Int64Array:
        """The rows of logits that choose a token, ascending."""
        lasts = np.cumsum(self.rows)
        return _runs(lasts - self.sampled, self.sampled)


def _runs(starts: Int64Array, counts: Int64Array) -> Int64Array:
    """starts[i], starts[i] + 1, ... `counts[i]` numbers, one run after the other."""
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return np.asarray(np.arange(shift.size) + shift, dtype=np.int64)


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities on their way to the host: of the token [N], of the best [N, K], and which these are."""

    owners: list[tuple[int, int]]
    """Of each row: the index of its span, and how many of the best it asks for."""
    chosen: Tensor
    best: Tensor
    ids: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _Results:
    """What a step gives, on its way to the host, and when it is there."""

    tokens: Tensor
    accepted: Tensor | None
    """[D] tokens of each span that samples; None: one of each."""
    scores: _Scores | None
    done: torch.cuda.Event | None


@dataclass
class Launched:
    """A step on its way: its program and inputs, which rows are sampled, those with a grammar in the order of masks."""

    name: str
    step: _Step
    views: Mapping[str, npt.NDArray[Any]]
    sampled: Int64Array
    ruled: tuple[Request, ...]
    results: _Results | None = None
    """None until all of it is launched."""


class DeviceRunner:
    """A StepRunner over the programs of a GPU artifact. `pool` must track its table writes.

    `states`: names of the state pools that `copy_states` copies.
    """

    lag = 1

    def __init__(self, executor: GraphExecutor, pool: KVPool, *, vocab_size: int, states: Sequence[str] = ()) -> None:
        self.executor = executor
        self._pool = pool
        self._states = tuple(states)
        self._seats = Seats(pool.sizes.slots, vocab_size)
        self._vocab_size = vocab_size
        self._decode = _sorted(executor.programs, "decode")
        self._drafts = {name: _drafts_of(program) for name, program in executor.programs.items()}
        self._prefill = _sorted(executor.programs, "prefill")
        first = next(iter(executor.programs.values()))
        self._ratios = {i.name: int(i.ratio or 1) for i in first.inputs if i.kind == "window_ends"}
        self._pinned = executor.stream is not None
        self._hosts = [torch.zeros(2 * self.max_rows, dtype=torch.int64, pin_memory=self._pinned) for _ in range(3)]
        self._turn = 0
        self._changes: dict[str, list[tuple[int, int, int]]] = {}

    @property
    def _most_drafts(self) -> int:
        return max(self._drafts[name] for name in self._decode)

    @property
    def max_rows(self) -> int:
        """Rows of logits that a step can have."""
        return max(p.symbols["S"] for p in self.executor.programs.values())

    def _update_tables(self) -> None:
        """What changed since the last step; kept if it cannot be sent, for other requests depend on it."""
        for group, changes in self._pool.drain_updates().items():
            self._changes.setdefault(group, []).extend(changes)
        self.executor.tables.update(self._changes)
        self._changes.clear()

    def check(self, request: Request, /) -> None:
        """Raises RequestError (400) for what the device's buffers cannot hold, EngineError for another's grammar."""
        grammar = request.params.grammar
        if grammar is not None and grammar.vocab_size > self._vocab_size:
            raise EngineError(f"the grammar knows {grammar.vocab_size} tokens, the model {self._vocab_size}")
        self._seats.check(request)

    def launch(self, spans: Sequence[Span], /) -> Launched:
        """See StepRunner. Raises EngineError if no bucket holds the step."""
        step = _Step.of(spans)
        name = self._program(step)
        known = not step.ruled or not any(s.request.num_inflight for s in spans if s.request.params.grammar is not None)
        with _telling():
            ticket = self._begin(name, step)
            if known:
                self._finish(ticket)
        return ticket

    def finish(self, ticket: Launched, /) -> None:
        """See StepRunner."""
        if ticket.results is None:
            with _telling():
                self._finish(ticket)

    def _begin(self, name: str, step: _Step) -> Launched:
        """Sends the inputs and, where masks are still to come, launches what does not read them."""
        views = self.executor.staging.begin(name)
        self._fill_tokens(views, step)
        sampled = self._fill_rows(views, step)
        edits = self._seats.fill(views, step.spans, sampled)
        ruled = _number_masks(views, step, sampled) if step.ruled else ()
        with self.executor.on_stream():
            self.executor.staging.send(name, edits)
            self._update_tables()
            for slot, counts in self._seats.fresh_counts():
                self.executor.states["sampling.counts"][slot].copy_(torch.from_numpy(counts), non_blocking=True)
            if ruled:
                self.executor.begin(name)
        return Launched(name, step, views, sampled, ruled)

    def _finish(self, ticket: Launched) -> None:
        """Launches the rest: masks, sampling, copies to the host."""
        step, name, count = ticket.step, ticket.name, int(ticket.step.rows.sum())
        if ticket.ruled:
            self._fill_masks(ticket)
        with self.executor.on_stream():
            if ticket.ruled:
                self.executor.staging.send_masks(name, len(ticket.ruled))
            outputs = self.executor.finish(name) if ticket.ruled else self.executor.launch(name)
            self._turn = (self._turn + 1) % len(self._hosts)
            tokens = self._hosts[self._turn][:count]
            tokens.copy_(outputs["tokens"][:count], non_blocking=True)
            accepted = None
            if "accepted" in outputs:
                asking = int(np.count_nonzero(step.sampled))
                accepted = self._hosts[self._turn][self.max_rows : self.max_rows + asking]
                accepted.copy_(outputs["accepted"][:asking], non_blocking=True)
            scores = self._scores(step, ticket.views, outputs) if step.scored else None
            done = torch.cuda.Event() if self._pinned else None
            if done is not None:
                done.record()
        ticket.results = _Results(tokens, accepted, scores, done)

    @staticmethod
    def _fill_masks(ticket: Launched) -> None:
        """What may follow in each row; anything, for requests that ended meanwhile."""
        cursors: list[Cursor | None] = []
        withheld: dict[int, list[int]] = {}
        for row, request in enumerate(ticket.ruled):
            state = request.sampler
            assert state is not None
            cursors.append(None if request.status == "ended" else state.grammar)
            if state.masks:
                withheld[row] = state.stop_ids.tolist()
        grammar = ticket.ruled[0].params.grammar
        assert grammar is not None  # an engine has one vocabulary
        masks = ticket.views["masks"][1 : 1 + len(cursors)]
        fill_wide(masks, cursors, grammar.vocab_size, withheld)

    def collect(self, ticket: Launched, /) -> Chosen:
        """See StepRunner."""
        self.finish(ticket)
        results = ticket.results
        assert results is not None
        with _telling():
            if results.done is not None:
                results.done.synchronize()
        found: list[int] = results.tokens.numpy()[ticket.sampled].tolist()
        tokens = [token if token >= 0 else None for token in found]
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        prompt: dict[str, list[TokenLogprob]] = {}
        spans = ticket.step.spans
        if results.scores is not None:
            self._read_scores(spans, results.scores, logprobs, prompt)
        sampling = [span for span in spans if span.samples]
        counts = [1] * len(sampling) if results.accepted is None else results.accepted.tolist()
        kept, first = [], 0
        for span, count in zip(sampling, counts, strict=True):
            kept.append(slice(first, first + count))
            first += 1 + span.drafts
        return Chosen([tokens[rows] for rows in kept], [logprobs[rows] for rows in kept], prompt)

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        """See StepRunner."""
        if pairs:
            with self.executor.on_stream():
                self.executor.copy_states(pairs, self._states)

    def synchronize(self) -> None:
        """See StepRunner."""
        try:
            if self.executor.stream is not None:
                self.executor.stream.synchronize()
        except torch.AcceleratorError as error:
            raise RunnerBroken(f"the device failed: {_first_line(error)}", hint="restart the server") from error

    def _program(self, step: _Step) -> str:
        tokens, rows = int(step.lengths.sum()), int(step.rows.sum())
        known = (*self._decode, *self._prefill) if step.single else self._prefill
        for name in known:
            symbols = self.executor.programs[name].symbols
            if name in self._decode and self._drafts[name] != step.drafts and step.drafts <= self._most_drafts:
                continue
            asking = symbols.get("D", symbols["S"]) >= np.count_nonzero(step.sampled)
            if asking and symbols["T"] >= tokens and symbols["S"] >= max(rows, len(step.spans)):
                return name
        raise EngineError(
            f"no program of the artifact holds {tokens} tokens of {len(step.spans)} requests and {rows} rows of logits",
            hint="compile with larger `--max-tokens` or `--max-requests`",
        )

    def _fill_tokens(self, views: Mapping[str, npt.NDArray[Any]], step: _Step) -> None:
        starts, slots, count = step.starts, step.slots, int(step.lengths.sum())
        # a request in flight is at its last token, which the device knows, and where its drafts are
        if step.single:
            first: Any = [-1 if s.request.num_inflight else s.request.token(s.start) for s in step.spans]
            owners, back = slots, np.zeros(count, np.int64)
            if count > len(step.spans):
                owners = np.repeat(slots, step.lengths)
                back = np.arange(count) - np.repeat(step.firsts, step.lengths)
                tokens = -1 - back
                tokens[step.firsts] = first
            else:
                tokens = first
        else:
            tokens = np.concatenate([s.request.tokens(s.start, s.end) for s in step.spans])
            owners = np.repeat(slots, step.lengths)
            back = np.arange(count) - np.repeat(step.firsts, step.lengths)
        floating = np.repeat(step.floating, step.lengths)
        positions = np.where(floating, -1 - back, back + np.repeat(starts, step.lengths))
        views["token_ids"][:count] = tokens
        views["positions"][:count] = positions
        views["request_rows"][:count] = owners
        if "seq_starts" in views:
            views["seq_starts"][slots] = np.where(step.floating, -1, starts)
            views["seq_ends"][slots] = np.where(step.floating, -step.lengths, starts + step.lengths)
        loose = (
            -2 - step.firsts[step.floating]
        )  # a span that floats has at most one end, as none is longer than a window
        for name, ratio in self._ratios.items():
            ends = np.flatnonzero((positions >= 0) & ((positions + 1) % ratio == 0))
            views[name][: ends.size] = ends
            views[name][ends.size : ends.size + loose.size] = loose
        if "next_ids" in views and not step.single:
            for span, row in zip(step.spans, step.firsts.tolist(), strict=True):
                following = span.request.tokens(span.start + 1, span.end + (not span.samples))
                views["next_ids"][row : row + following.size] = following

    @staticmethod
    def _fill_rows(views: Mapping[str, npt.NDArray[Any]], step: _Step) -> Int64Array:
        """Rows of logits: of a span its prompt rows, then those it samples. Returns the rows that are sampled."""
        lasts = np.cumsum(step.rows) - 1
        sampled = step.rows_chosen()
        views["logit_rows"][sampled] = _runs(step.firsts + step.lengths - step.sampled, step.sampled)
        if "token_seats" in views:
            views["token_seats"][sampled] = np.repeat(step.slots, step.sampled)
        for i, span in enumerate(step.spans) if step.scored else ():
            if span.prompt_rows:
                begin = int(lasts[i] + 1 - step.rows[i])
                wanted = np.arange(span.prompt_rows.start, span.prompt_rows.stop) - span.start + step.firsts[i]
                views["logit_rows"][begin : begin + wanted.size] = wanted
        return sampled

    def _scores(
        self, step: _Step, views: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, Tensor]
    ) -> _Scores:  # fmt: skip
        """Log-probabilities of the rows that ask for them, started on the device."""
        lasts = np.cumsum(step.rows) - 1
        owners: list[tuple[int, int]] = []
        at: list[int] = []
        targets: list[int] = []
        for i, span in enumerate(step.spans):
            params = span.request.params
            for j, position in enumerate(span.prompt_rows):
                owners.append((i, params.prompt_logprobs or 0))
                at.append(int(lasts[i] + 1 - step.rows[i]) + j)
                targets.append(span.request.token(position + 1))
            for back in range(span.drafts, -1, -1) if span.samples and params.logprobs is not None else ():
                owners.append((i, params.logprobs or 0))
                at.append(int(lasts[i]) - back)
                targets.append(-1)
        where = self._to_device([at, targets])
        raw = outputs["logits"].index_select(0, where[0])
        self._restore(raw, at, views, outputs["replaced"])
        sampled = outputs["tokens"].index_select(0, where[0]).clamp(min=0)
        tokens = torch.where(where[1] < 0, sampled, where[1])
        logp = torch.log_softmax(raw, dim=-1)
        best, ids = logp.topk(min(max(1, *(k for _, k in owners)), logp.shape[-1]), dim=-1)
        chosen = logp.gather(1, tokens.unsqueeze(1))[:, 0]
        return _Scores(owners, *(self._to_host(t) for t in (chosen, best, ids, tokens)))

    def _restore(
        self, raw: Tensor, at: Sequence[int], views: Mapping[str, npt.NDArray[Any]], replaced: Tensor
    ) -> None:  # fmt: skip
        """Puts back what edits changed."""
        places = [
            (i, m, int(views["edit_tokens"][m]))
            for i, row in enumerate(at)
            for m in range(int(views["edit_starts"][row]), int(views["edit_stops"][row]))
        ]
        if places:
            rows, edits, tokens = self._to_device(places).t()
            raw[rows, tokens] = replaced[edits]

    def _to_device(self, values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, pin_memory=self._pinned).to(self.executor.device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return host.copy_(tensor, non_blocking=True)

    @staticmethod
    def _read_scores(
        spans: Sequence[Span], scores: _Scores, logprobs: list[TokenLogprob | None],
        prompt: dict[str, list[TokenLogprob]],
    ) -> None:  # fmt: skip
        order, first = {}, 0  # of a span: the place of its next row among those that are sampled
        for i, span in enumerate(spans):
            order[i] = first
            first += 1 + span.drafts if span.samples else 0
        tokens, chosen = scores.tokens.tolist(), scores.chosen.tolist()
        best, ids = scores.best.tolist(), scores.ids.tolist()
        left = {i: len(span.prompt_rows) for i, span in enumerate(spans)}
        for row, (i, k) in enumerate(scores.owners):
            top = tuple(zip(ids[row][:k], best[row][:k], strict=True))
            entry = TokenLogprob(tokens[row], chosen[row], top)
            if left[i]:
                left[i] -= 1
                prompt.setdefault(spans[i].request.id, []).append(entry)
            else:
                logprobs[order[i]] = entry
                order[i] += 1


def _number_masks(views: Mapping[str, npt.NDArray[Any]], step: _Step, sampled: Int64Array) -> tuple[Request, ...]:
    """Gives every row with a grammar its mask's number, in order. Their requests."""
    out, first = [], 0
    for span in step.spans:
        if span.samples and span.request.params.grammar is not None:
            if span.drafts:
                raise EngineError(f"the masks behind the drafts of {span.request} are not known")
            out.append(span.request)
            views["mask_rows"][sampled[first]] = len(out)
        first += 1 + span.drafts if span.samples else 0
    return tuple(out)


@contextmanager
def _telling() -> Iterator[None]:
    """Turns what a device raises into errors that say what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"the device is out of memory: {_first_line(error)}") from error
    except torch.AcceleratorError as error:
        raise RunnerBroken(f"the device failed: {_first_line(error)}", hint="restart the server") from error


def _drafts_of(program: Program) -> int:
    """How many drafts a decode program verifies and makes."""
    return program.symbols["S"] // program.symbols["D"] - 1 if "accepted" in program.outputs else 0


def _sorted(programs: Mapping[str, Program], phase: str) -> list[str]:
    found = [name for name, program in programs.items() if program.phase == phase]
    return sorted(found, key=lambda n: (programs[n].symbols["T"], programs[n].symbols["S"]))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
