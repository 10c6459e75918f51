"""Structured output: what a grammar lets follow, as a mask over tokens.

    Grammars (a vocabulary) --compile(source), in threads--> Grammar --start()--> Cursor, one a request
    Cursor   where its text stands: accept(token), ahead(tokens) -> another Cursor
    Masking  fills the masks of a step's rows in a thread, while the model computes their logits

llguidance does the work: it builds its automata while they are walked, so that compiling takes a millisecond, and it
refuses what it cannot enforce, where others drop it unseen. A grammar allows tokens as text; added tokens (roles,
markup, thinking) are allowed only where it names their ids. A request ends where its grammar does: when the end token
is chosen, or as soon as nothing else can follow.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from dsv4c.errors import Dsv4cError, EngineError, RequestError

MAX_SOURCE_CHARS = 1 << 18  # of a grammar or schema: 20,000 values of an enum
MAX_WAITING = 64  # compilations, before requests are turned away
COMPILE_S = 20.0  # what is not compiled by then is refused; ordinary schemas take milliseconds
_CACHED = 256  # compiled grammars; some 100 kB each
_THREADS = 2
_UNFIT = "doesn't satisfy the grammar"  # llguidance of a token that is not allowed; other errors are its limits
# A mask of an ambiguous grammar may hold up a step for some 0.2 s at that limit; ordinary ones need less than 5,000.
_LIMITS = llguidance.LLParserLimits(verbose_errors=False, step_max_items=10_000)

Masks = npt.NDArray[np.int32]
"""[rows, ceil(vocabulary / 32)], a bit a token, 1: allowed."""


class GrammarCodec(Protocol):
    """What grammars need to know of a tokenizer and a chat format."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def added_token_ids(self) -> Collection[int]:
        """Tokens that are no text: roles, markup, ends."""

    def vocabulary(self) -> Sequence[bytes]:
        """The bytes of every token, by id."""

    def encode(self, text: str, /) -> list[int]: ...

    def answer_grammar(
        self,
        content: Mapping[str, Any] | None,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        forced: bool,
        parallel: bool,
    ) -> str:
        """What an answer may be: content (None: free text), or calls of these functions."""


@dataclass(frozen=True)
class GrammarSource:
    """A grammar as llguidance takes it (Lark, or its JSON form), and the request's field that asked for it."""

    text: str
    param: str


class Grammar:
    """A compiled grammar, shared by all requests that ask for it."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        eos_token_ids: Collection[int],
        source: GrammarSource,
        begun: tuple[int, ...] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.source = source
        self.begun = begun
        """Tokens of the text that lie behind it."""
        self._matcher = matcher
        self._eos = frozenset(eos_token_ids)

    @property
    def param(self) -> str:
        """The field of the request that asked for it."""
        return self.source.param

    def __deepcopy__(self, _memo: dict[int, Any]) -> Grammar:
        return self

    def ahead(self, tokens: Sequence[int]) -> Grammar:
        """What may follow these tokens, which are given. Raises EngineError if they cannot be."""
        matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(list(tokens)) < len(tokens):
            raise EngineError(f"the grammar does not allow the tokens {list(tokens)[:16]} that it is to continue")
        return Grammar(matcher, self.vocab_size, self._eos, self.source, (*self.begun, *tokens))

    def start(self, stop_ids: Collection[int]) -> Cursor:
        """At the beginning; `stop_ids`: the tokens that end the request. End tokens that are none are masked."""
        return Cursor(self._matcher.deep_copy(), tuple(sorted(self._eos.difference(stop_ids))), self.param)


class Cursor:
    """Where the text of one request stands in its grammar. Not thread-safe."""

    __slots__ = ("_hidden", "_matcher", "_param", "_strayed", "fault")

    def __init__(self, matcher: Any, hidden: tuple[int, ...], param: str) -> None:
        self._matcher = matcher
        self._hidden = hidden
        self._param = param
        self._strayed = False
        self.fault: Dsv4cError | None = None
        """Why the grammar cannot be followed any more: a RequestError if it grew too complex, an EngineError if it got
        a token that it does not allow."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Cursor:
        return self.ahead(())

    @property
    def over(self) -> bool:
        """Whether nothing can follow but an end."""
        return self._strayed or self.fault is not None or self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Moves on by a token; one that cannot follow is a `fault`."""
        if not self.over and not self._matcher.consume_token(token):
            self.fault = self._lost(f"token {token} cannot follow: ")

    def ahead(self, tokens: Sequence[int]) -> Cursor:
        """Where these tokens would lead. What is behind one that cannot follow masks nothing: it will not be kept."""
        out = Cursor(self._matcher.deep_copy(), self._hidden, self._param)
        out.fault = self.fault
        out._strayed = self.over or out._matcher.try_consume_tokens(list(tokens)) < len(tokens)
        return out

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """The mask of what may follow: of end tokens those that end the request, others where nothing else is left."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)  # without the GIL
        if self._matcher.is_error() and not self._matcher.is_accepting():
            self.fault = self._lost("")
        for token in self._hidden:
            row[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
        if self._hidden and not row.any():
            for token in self._hidden:
                row[token // 32] |= np.uint32(1 << token % 32).view(np.int32)

    def _lost(self, what: str) -> Dsv4cError:
        told = self._matcher.get_error()
        if _UNFIT in told:
            return EngineError(f"the grammar cannot be followed any more: {what}{_first_line(told)}")
        message = f"`{self._param}` is too complex where the text has come to: {_first_line(told)}"
        return RequestError(message, param=self._param, code="invalid_grammar")


def fill_masks(cursors: Sequence[Cursor | None], width: int) -> Masks:
    """The masks of as many rows, for a vocabulary of `width` tokens. Rows without a cursor are all ones."""
    nbytes = 4 * -(-width // 32)
    masks = np.full((len(cursors), nbytes // 4), -1, dtype=np.int32)
    for row, cursor in zip(masks, cursors, strict=True):
        if cursor is not None and not cursor.over:
            cursor.fill(row)
    return masks


class Masking:
    """Fills masks in a thread of its own, started when the first grammar comes."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, cursors: Sequence[Cursor | None], width: int) -> Future[Masks] | None:
        """The masks of as many rows, on their way; None if no row has any. Rows without a cursor are all ones.

        `width`: tokens of the grammars' vocabulary. No cursor may be touched before the result is there.
        """
        if all(cursor is None for cursor in cursors):
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="dsv4c-masks")
        return self._thread.submit(fill_masks, cursors, width)


def fill_wide(
    masks: Masks, cursors: Sequence[Cursor | None], width: int, withheld: Mapping[int, Sequence[int]]
) -> None:
    """Fills `masks`, a row a cursor, which may have more words than the grammars' vocabulary of `width` tokens.

    Rows without a cursor are all ones. `withheld`: of some rows, tokens that are masked too, unless nothing else is
    left. In this thread: beside a step of 18 ms, 64 rows of 129,280 tokens take 1.4 ms, and llguidance's executor takes
    1.5 to 1.7 ms with 2 to 8 threads.
    """
    words = -(-width // 32)
    for row, cursor in zip(masks, cursors, strict=True):
        if cursor is None or cursor.over:
            row.fill(-1)
        else:
            cursor.fill(row[:words])
            if row.size > words or width % 32:
                _beyond(row, width)
    for at, tokens in withheld.items():
        left = masks[at].view(np.uint32).copy()
        for token in tokens:
            left[token // 32] &= ~np.uint32(1 << token % 32)
        if left.any():
            masks[at] = left.view(np.int32)


def _beyond(row: npt.NDArray[np.int32], width: int) -> None:
    """Lets tokens from `width` on follow if all before may, as the host's sampler does."""
    known, last = row[: -(-width // 32)].view(np.uint32), np.uint32((1 << width % 32) - 1 if width % 32 else 0xFFFFFFFF)
    if (known[:-1] == 0xFFFFFFFF).all() and known[-1] & last == last:
        row.fill(-1)
    else:
        known[-1] &= last
        row[known.size :] = 0


class Grammars:
    """Compiles grammars for one vocabulary, in threads, and keeps the latest."""

    def __init__(self, codec: GrammarCodec) -> None:
        """The codec's vocabulary is read when the first grammar comes."""
        self._codec = codec
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._known: OrderedDict[GrammarSource, Grammar] = OrderedDict()  # touched in the event loop's thread alone
        self._built: OrderedDict[GrammarSource, Grammar] = OrderedDict()  # those of `compile_here`, under the lock
        self._waiting = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dsv4c-grammar")

    async def compile(self, source: GrammarSource) -> Grammar:
        """The grammar, compiled in a thread. Raises RequestError: 400 naming its field, 503 if too many wait."""
        if len(source.text) > MAX_SOURCE_CHARS:
            raise _refused(source, f"is larger than {MAX_SOURCE_CHARS} characters")
        known = self._known.get(source)
        if known is not None:
            self._known.move_to_end(source)
            return known
        if self._waiting >= MAX_WAITING:
            raise RequestError(
                f"{self._waiting} grammars are being compiled already",
                status=503,
                code="queue_full",
                hint="try again later",
            )
        self._waiting += 1
        work = self._threads.submit(self.build, source)
        work.add_done_callback(self._done(asyncio.get_running_loop()))
        try:
            grammar = await asyncio.wait_for(asyncio.wrap_future(work), COMPILE_S)
        except TimeoutError:
            raise _refused(source, f"was not compiled within {COMPILE_S:.0f} s") from None
        self._known[source] = grammar
        if len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return grammar

    def _done(self, loop: asyncio.AbstractEventLoop) -> Callable[[object], None]:
        def count() -> None:
            self._waiting -= 1

        def done(_work: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(count)

        return done

    def build(self, source: GrammarSource) -> Grammar:
        """Compiles in this thread. Raises RequestError (400) for a grammar that is wrong, or that no text matches."""
        tokenizer = self._tokenizer_once()
        matcher = llguidance.LLMatcher(tokenizer, source.text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refused(source, f"is not a grammar that can be enforced: {_first_line(matcher.get_error())}")
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # also builds the automata that every request begins with
        if probe.is_error():
            raise _refused(source, "matches no text")
        return Grammar(matcher, tokenizer.vocab_size, self._codec.eos_token_ids, source)

    def compile_here(self, source: GrammarSource) -> Grammar:
        """The grammar, compiled in this thread, for callers without an event loop. Raises RequestError as `build`."""
        with self._lock:
            known = self._built.get(source)
            if known is not None:
                self._built.move_to_end(source)
                return known
        grammar = self.build(source)
        with self._lock:
            self._built[source] = grammar
            if len(self._built) > _CACHED:
                self._built.popitem(last=False)
        return grammar

    def close(self) -> None:
        """Ends the threads; what is being compiled is still finished."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _tokenizer_once(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                words, ends = _Words(self._codec), sorted(self._codec.eos_token_ids)
                made = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=ends)
                if made.vocab_size != len(words.tokens):
                    raise EngineError(f"the grammar's vocabulary has {made.vocab_size} tokens, not {len(words.tokens)}")
                self._tokenizer = made
            return self._tokenizer


class _Words:
    """A vocabulary as llguidance asks for it. 0xFF begins the name of a token that is no text."""

    def __init__(self, codec: GrammarCodec) -> None:
        added = frozenset(codec.added_token_ids)
        words = enumerate(codec.vocabulary())
        self.tokens = [b"\xff<%d>" % i if i in added or not text else bytes(text) for i, text in words]
        self.special_token_ids = sorted(added)
        self.eos_token_id = min(codec.eos_token_ids)
        self.bos_token_id = None
        self._encode = codec.encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # it asks whether bytes are taken, and gives text if not
            raise TypeError("text, not bytes")
        return self._encode(text)


def _refused(source: GrammarSource, what: str) -> RequestError:
    return RequestError(f"`{source.param}` {what}", param=source.param, code="invalid_grammar")


def _first_line(text: str) -> str:
    """The reason in an error of several lines, which also shows where it is and, in tags, all that is known."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("<")]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([*lines[:1], *told[:1]])[:300] or "it grew too complex"
