"""A router over workers that do what a test tells them: no process, no socket, no model, and a clock that is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.lifecycle import Policy
from dsv4c.runtime.cluster.placement import Member
from dsv4c.runtime.cluster.router import Router
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.service import Output
from tests.runtime.standin import VOCAB, kv_groups

BLOCK = 256
PAGES = {"window": 40, "c4": 32, "c128": 32, "index": 32}


def hashes_of(prompt: Sequence[int]) -> list[int]:
    """Names of the whole blocks of a prompt, each with those before it in it."""
    return [hash(tuple(prompt[: end + BLOCK])) for end in range(0, len(prompt) // BLOCK * BLOCK, BLOCK)]


def hello(
    role: wire.Role, name: str, *, layout: dict[str, str] | None = None, version: int = wire.VERSION, **facts: Any
) -> wire.Hello:
    """How a worker introduces itself."""
    given = {"max_context": 2048, "longest": 2048, "max_requests": 8, "pages": PAGES, "transfer": "shm", **facts}
    return wire.Hello(version, role, name, 1, layout or {}, wire.Facts(**given, peer=name))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(eq=False)
class Worker:
    """The far end of a link. `sent`: what the router has said and nobody has `take`n yet."""

    router: Router
    member: Member | None = None
    sent: list[Any] = field(default_factory=list)
    closed: bool = False

    def send(self, frame: bytes) -> None:
        assert not self.closed or self.member is None or self.member.lost
        self.sent.append(wire.decode_for_worker(frame))

    def close(self) -> None:
        self.closed = True

    def say(self, message: Any) -> None:
        """As its process would: through bytes."""
        assert self.member is not None
        self.router.handle(self.member, wire.decode_for_router(wire.encode(message)))

    def tell(self, job: wire.Job, *tokens: int, end: str | None = None, fault: wire.Fault | None = None) -> None:
        """Tokens of a request, and its end."""
        ended = None if end is None else wire.Ended(end, 1, len(tokens), None, fault)  # type: ignore[arg-type]
        self.say(wire.Said([wire.Spoken(job.id, tokens, ended)]))

    def take(self, kind: type) -> list[Any]:
        """The messages of one kind, which are then gone."""
        found = [m for m in self.sent if isinstance(m, kind)]
        self.sent = [m for m in self.sent if not isinstance(m, kind)]
        return found

    def one(self, kind: type) -> Any:
        """The only message of a kind."""
        (found,) = self.take(kind)
        return found

    def lose(self) -> None:
        """Its link breaks."""
        assert self.member is not None
        self.router.lose(self.member, "the link is closed")


@dataclass
class Client:
    """One request and what its client has heard."""

    number: int = 0
    outputs: list[Output] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [o.token_id for o in self.outputs if o.token_id is not None]

    @property
    def end(self) -> Output | None:
        ends = [o for o in self.outputs if o.finish_reason is not None]
        assert len(ends) <= 1 and (not ends or self.outputs[-1] is ends[0])
        return ends[0] if ends else None


class Stage:
    """A router and its workers."""

    def __init__(self, prefill: int = 1, decode: int = 1, *, both: int = 0, **policy: Any) -> None:
        self.clock = Clock()
        manifest: Any = SimpleNamespace(kv_groups=kv_groups(), vocab_size=VOCAB, max_context=8192)
        self.router = Router(manifest, BLOCK, hashes_of, Policy(**policy), self.clock)
        self.prefill = [self.join("prefill", f"prefill-{i}") for i in range(prefill)]
        self.decode = [self.join("decode", f"decode-{i}") for i in range(decode)]
        self.both = [self.join("both", f"both-{i}") for i in range(both)]

    def join(self, role: wire.Role, name: str, **facts: Any) -> Worker:
        worker = Worker(self.router)
        worker.member = self.router.join(hello(role, name, **facts), worker)
        worker.one(wire.Welcome)
        return worker

    def ask(self, prompt: Sequence[int] = (5, 6, 7), max_tokens: int | None = 8, **params: Any) -> Client:
        client = Client()
        client.number = self.router.submit(
            list(prompt), SamplingParams(max_tokens=max_tokens, **params), client.outputs.append
        )
        return client

    def hand_over(self, prefill: Worker, decode: Worker, first: int = 9) -> wire.Job:
        """Leads the request that was sent to `prefill` to where `decode` can begin."""
        job: wire.Job = prefill.one(wire.Prefill).job
        prefill.say(wire.Granted(job.id, {"lease": 1}))
        asked = decode.one(wire.Decode)
        assert asked.handle == {"lease": 1} and asked.job == job
        prefill.say(wire.Handover(job.id, (first,)))
        assert decode.one(wire.Handed).handover.tokens == (first,)
        return job

    def check_nothing_is_booked(self) -> None:
        """What must hold when every request has ended."""
        assert not any(m.given or m.uncomputed or any(m.claimed.values()) for m in self.router.members)
        assert self.router.stats().running == self.router.stats().waiting == 0
