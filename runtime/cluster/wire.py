"""What the router and its workers say to each other: structs of msgspec as msgpack, one message a frame.

    worker -> router   Hello  Beat  Blocks  Granted  Handover  Said  Leaving  Audited
    router -> worker   Welcome  Refused  Prefill  Decode  Handed  Alone  Cancel  PeerGone  Beat  Audit

A message that is none of these, or has a field of another type, is a LinkError: the link is closed, and what ran over
it is done elsewhere. No message carries code, a path or a clock; lengths of time are the sender's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, ConfigError, Dsv4cError, EngineError, LinkError, RequestError
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.grammar import Grammar, GrammarSource
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import End, Event, FinishReason
from dsv4c.runtime.sampler import TokenLogprob

VERSION = 1
MAX_BYTES = 64 * 2**20  # a message; a prompt of a million tokens takes 5 MB
Role = Literal["prefill", "decode", "both"]


class _Message(msgspec.Struct, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    pass


class _Part(msgspec.Struct, array_like=True):
    pass


class Fault(_Part):
    """An error on its way: its class (`kind`) and what it says."""

    kind: str
    message: str
    hint: str = ""
    status: int = 500
    param: str | None = None
    code: str | None = None


class Score(_Part):
    """A TokenLogprob."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Ended(_Part):
    """The End of a request."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    stop_token: int | None = None
    fault: Fault | None = None


_SKIPPED = ("grammar",)  # travels as its source


def _sampling_fields() -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(SamplingParams)
    fields = []
    for field in dataclasses.fields(SamplingParams):
        if field.name in _SKIPPED:
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = msgspec.field(default_factory=dict) if made else field.default
        fields.append((field.name, hints[field.name], default))
    return fields


Sampling = msgspec.defstruct(
    "Sampling", _sampling_fields(), frozen=True, omit_defaults=True, forbid_unknown_fields=True, module=__name__
)
"""The fields of SamplingParams but `grammar`, those that are not the default."""


class Structure(_Part):
    """A grammar: its source, the request's field that asked for it, and the tokens that it has behind it."""

    text: str
    param: str
    begun: tuple[int, ...] = ()


class Job(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A request for a worker. `generated`: tokens that others have chosen; `id` names one attempt, and no other.

    Tokens are int32, little-endian (`tokens_of`, `packed`).
    """

    id: str
    prompt: bytes
    sampling: Sampling  # type: ignore[valid-type]
    generated: bytes = b""
    grammar: Structure | None = None


class Facts(msgspec.Struct, forbid_unknown_fields=True):
    """What a worker can hold. `longest`: tokens that one request alone can reach; `pages`: of each KV group."""

    max_context: int
    longest: int
    max_requests: int
    pages: dict[str, int]
    transfer: str = ""
    """How state reaches it: `shm`, `nixl`; empty: in no way. Only workers that agree hand over to each other."""
    peer: str = ""
    """Its name in handles."""


class Hello(_Message):
    """The first message of a worker. `layout`: the named values whose digest is the layout's fingerprint."""

    version: int
    role: Role
    name: str
    pid: int
    layout: dict[str, str]
    facts: Facts


class Welcome(_Message):
    """The worker is taken. `silence_s`: who hears nothing for so long takes the other for lost."""

    silence_s: float


class Refused(_Message):
    """The worker is not taken, and will not be later."""

    message: str
    hint: str = ""


class Beat(_Message):
    """Says that the sender lives; a worker's has its numbers."""

    stats: EngineStats | None = None
    leases: int = 0
    """Prompts kept for others."""
    transfers: dict[str, int] = {}
    """Totals: `pulled`, `lost`, `bytes`, ..."""


class Blocks(_Message):
    """Blocks of tokens that a worker's prefix tree has taken, or dropped, by hash. `cleared`: all before are gone."""

    stored: list[int] = []
    removed: list[int] = []
    cleared: bool = False


class Prefill(_Message):
    """Compute this prompt, and keep what was computed for another worker to pull."""

    job: Job


class Granted(_Message):
    """The prompt is being computed; the handle says where its state can be pulled from."""

    id: str
    handle: dict[str, Any]


class Handover(_Message):
    """The prompt is computed: its first token, and what is to be said of it."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[Score, ...] = ()
    prompt_logprobs: tuple[Score | None, ...] = ()
    cached_tokens: int = 0
    finish: FinishReason = "length"


class Decode(_Message):
    """Generate. With a handle the prompt's state comes from there, and a Handed follows; without, compute it."""

    job: Job
    handle: dict[str, Any] | None = None


class Handed(_Message):
    """What the prefill worker's Handover said, for the worker that goes on."""

    handover: Handover


class Cancel(_Message):
    """End this attempt, or let go what is kept of it."""

    id: str


class Alone(_Message):
    """What was to be pulled for this attempt will not come: compute it there."""

    id: str
    reason: str


class PeerGone(_Message):
    """A worker is lost: nothing more can be pulled from it."""

    peer: str


class Spoken(_Part):
    """An Event."""

    id: str
    tokens: tuple[int, ...] = ()
    end: Ended | None = None
    logprobs: tuple[Score, ...] = ()
    prompt_logprobs: tuple[Score | None, ...] = ()
    cached_tokens: int = 0
    queued_s: float = 0.0


class Said(_Message):
    """What steps gave to requests, in order."""

    events: list[Spoken]


class Leaving(_Message):
    """The worker takes nothing new and ends when what it has is done."""


class Audit(_Message):
    """Asks whether every page, slot and lease is accounted for."""

    number: int


class Audited(_Message):
    """`fault` is empty if all is; `idle`: nothing runs, waits, is kept or quarantined."""

    number: int
    fault: str = ""
    idle: bool = False


ToRouter = Hello | Beat | Blocks | Granted | Handover | Said | Leaving | Audited
ToWorker = Welcome | Refused | Prefill | Decode | Handed | Alone | Cancel | PeerGone | Beat | Audit
Message = ToRouter | ToWorker

_ENCODER = msgspec.msgpack.Encoder()
_TO_ROUTER: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def encode(message: Message) -> bytes:
    """The message as a frame. Raises LinkError if it is too large."""
    data = _ENCODER.encode(message)
    if len(data) > MAX_BYTES:
        raise LinkError(f"a message of {len(data)} bytes is larger than {MAX_BYTES}")
    return data


def decode_for_router(data: bytes) -> ToRouter:
    """A worker's message. Raises LinkError."""
    try:
        return _TO_ROUTER.decode(data)
    except msgspec.MsgspecError as error:
        raise LinkError(f"a worker's message is not understood: {error}") from error


def decode_for_worker(data: bytes) -> ToWorker:
    """The router's message. Raises LinkError."""
    try:
        return _TO_WORKER.decode(data)
    except msgspec.MsgspecError as error:
        raise LinkError(f"the router's message is not understood: {error}") from error


def packed(tokens: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    """Tokens as they travel."""
    return np.asarray(tokens, dtype="<i4").tobytes()


def tokens_of(data: bytes) -> npt.NDArray[np.int64]:
    """The tokens again. Raises LinkError."""
    if len(data) % 4:
        raise LinkError(f"{len(data)} bytes are no tokens")
    return np.frombuffer(data, dtype="<i4").astype(np.int64)


def sampling_of(params: SamplingParams) -> Any:
    """What of the parameters travels as a struct."""
    return Sampling(**{name: getattr(params, name) for name in Sampling.__struct_fields__})


def structure_of(grammar: Grammar | None) -> Structure | None:
    """How a grammar travels."""
    if grammar is None:
        return None
    return Structure(grammar.source.text, grammar.source.param, grammar.begun)


def source_of(structure: Structure) -> GrammarSource:
    """What is to be compiled."""
    return GrammarSource(structure.text, structure.param)


def params_of(sampling: Any, grammar: Grammar | None = None) -> SamplingParams:
    """The parameters, checked. Raises RequestError."""
    given = {name: getattr(sampling, name) for name in Sampling.__struct_fields__}
    return SamplingParams(**given, grammar=grammar)


_KINDS: Mapping[str, type[Dsv4cError]] = {
    kind.__name__: kind for kind in (RequestError, ConfigError, ArtifactError, EngineError)
}


def fault_of(error: Dsv4cError) -> Fault:
    """How an error travels."""
    if isinstance(error, RequestError):
        return Fault("RequestError", error.message, error.hint, error.status, error.param, error.code)
    return Fault(type(error).__name__, error.message, error.hint)


def error_of(fault: Fault) -> Dsv4cError:
    """The error again; of a kind that is not known here, an EngineError."""
    if fault.kind == "RequestError":
        return RequestError(fault.message, status=fault.status, param=fault.param, code=fault.code, hint=fault.hint)
    return _KINDS.get(fault.kind, EngineError)(fault.message, hint=fault.hint)


def spoken_of(event: Event) -> Spoken:
    """How an event travels."""
    end = event.end
    return Spoken(
        event.request_id,
        event.tokens,
        None if end is None else ended_of(end),
        scores_of(event.logprobs),
        tuple(None if entry is None else score_of(entry) for entry in event.prompt_logprobs),
        event.cached_tokens,
        event.queued_s,
    )


def event_of(spoken: Spoken) -> Event:
    """The event again."""
    end = spoken.end
    return Event(
        spoken.id,
        spoken.tokens,
        tuple(logprob_of(score) for score in spoken.logprobs),
        tuple(None if score is None else logprob_of(score) for score in spoken.prompt_logprobs),
        spoken.cached_tokens,
        spoken.queued_s,
        None if end is None else end_of(end),
    )


def ended_of(end: End) -> Ended:
    """How an End travels."""
    fault = None if end.error is None else fault_of(end.error)
    return Ended(end.reason, end.prompt_tokens, end.generated_tokens, end.stop_token, fault)


def end_of(ended: Ended) -> End:
    """The End again."""
    error = None if ended.fault is None else error_of(ended.fault)
    return End(ended.reason, ended.prompt_tokens, ended.generated_tokens, ended.stop_token, error)


def score_of(entry: TokenLogprob) -> Score:
    """How a log-probability travels."""
    return Score(entry.token_id, entry.logprob, entry.top)


def scores_of(entries: tuple[TokenLogprob, ...]) -> tuple[Score, ...]:
    """How log-probabilities travel."""
    return tuple(score_of(entry) for entry in entries)


def logprob_of(score: Score) -> TokenLogprob:
    """The log-probability again."""
    return TokenLogprob(score.token, score.logprob, score.top)


def messages() -> tuple[type[Message], ...]:
    """Every kind of message."""
    return tuple(dict.fromkeys((*get_args(ToRouter), *get_args(ToWorker))))
