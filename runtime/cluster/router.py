"""The router: takes requests from the server, places them on workers, and sees each through to one end.

    queued -> prefilling -> transferring -> decoding -> finished | cancelled | failed
       ^           |              |             |
       +-----------+--------------+-------------+   a worker is lost: the next attempt, with what was delivered

state         who does what                                                    who owns pages of it
queued        the router holds it; by priority, then in order of arrival       nobody
prefilling    the prefill worker computes the prompt under a lease, which it   prefill: slot, pages to the prompt's end;
              grants as it begins; the decode worker pulls behind it           decode: slot, pages to the prompt's end
transferring  the prompt is computed; the rest is pulled                       the same; prefill writes no more
decoding      the decode worker has given the first token, and goes on; the    decode: slot, pages as it grows;
              lease is let go                                                  prefill: its prefix cache, no request
the ends      outputs that still come for it are ignored                       nobody

Without a prefill worker the decode worker computes the prompt itself, and the request is `decoding` at once. When the
prefill worker is lost before the first token, or the transfer fails, the decode worker computes what it lacks. When the
decode worker is lost, both sides let go and the request comes back to the front of the queue; its next attempt begins
with the tokens delivered so far as `generated`, on any worker, and since the router has fixed its seed, it goes on as
if nothing had happened. Every attempt has an id of its own, so that nothing of an older one is ever taken for it.

A decode worker is given what it can hold to the end, or to a budget; claims are booked here (placement.py), so it
never has to refuse. A worker that says nothing for `silence_s` is lost: its link is closed, upon which it ends all it
has before it calls again. Durations are measured on one clock each; no two are compared.

Any thread may call. One lock guards it all; under it nothing waits: links write in threads of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from dsv4c.artifact import Manifest
from dsv4c.errors import Dsv4cError, LinkError, RequestError
from dsv4c.runtime.checks import check_lengths, check_tokens
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.figures import total
from dsv4c.runtime.cluster.journeys import Journeys, send
from dsv4c.runtime.cluster.lifecycle import ENDS, PRESENT, Policy, State, Task
from dsv4c.runtime.cluster.placement import Member, Wire
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.service import Sink

BlockHashes = Callable[[Sequence[int]], Sequence[int]]
_LOOK_S = 0.005  # between looks at the answers to an audit


class Router:
    """What `create_app` asks of an engine, over workers that come and go (reception.py)."""

    def __init__(
        self,
        manifest: Manifest,
        block: int,
        hashes: BlockHashes,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`block`: tokens of a block of the prefix cache, `hashes`: those of the whole blocks of a prompt."""
        self.policy = policy or Policy()
        self.journeys = Journeys(self.policy, block, manifest.max_context, clock)
        self.losses: Counter[str] = Counter()
        """Workers lost, by role."""
        self._manifest = manifest
        self._hashes = hashes
        self._clock = clock
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._names: set[str] = set()
        self._past = EngineStats()
        self._audits: dict[int, dict[Member, wire.Audited]] = {}
        self._helpless_since_s: float | None = clock()
        self._context = manifest.max_context
        self._failure: Dsv4cError | None = None
        self._closing = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, name="dsv4c-router", daemon=True)

    @property
    def members(self) -> list[Member]:
        """The workers that are there."""
        return self.journeys.members

    # what the server asks

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._context

    @property
    def failure(self) -> Dsv4cError | None:
        """Why the router stopped serving, or None while it is well; lost workers are no reason."""
        return self._failure

    def submit(self, prompt: Sequence[int], params: SamplingParams, sink: Sink, /) -> int:
        """Queues a request and returns its number; `sink` is called in any thread, one output after the other.

        Raises RequestError: 400 if it can never run, 503 if the queue is full or no worker can serve it.
        """
        tokens = np.asarray(prompt, dtype=np.int64).reshape(-1)
        check_tokens(tokens, params, self._manifest.vocab_size)
        check_lengths(tokens.size, params.max_tokens, self._context, self.journeys.longest)
        if params.seed is None:  # another worker must be able to go on
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        hashes = () if params.prompt_logprobs is not None else self._hashes(prompt)
        with self._lock:
            self._check_open()
            number = next(self._numbers)
            made_s = self._clock()
            self.journeys.add(Task(number, wire.packed(tokens), tokens.size, params, sink, hashes, made_s))
            return number

    def cancel(self, request_id: int, /) -> None:
        """Ends a request; its workers free its pages soon. Does nothing if it has ended."""
        with self._lock:
            task = self.journeys.tasks.get(request_id)
            if task is not None:
                self.journeys.finish(task, "cancelled")
                self.journeys.place()

    def stats(self) -> EngineStats:
        """Of all workers together, with those that wait here; totals are those of lost workers too."""
        with self._lock:
            now = total([self._past, *(m.beat.stats for m in self.members if m.beat.stats is not None)])
            running, waiting = len(self.journeys.attempts), len(self.journeys.queue)
        return dataclasses.replace(now, running=running, waiting=waiting, max_waiting=self.policy.max_waiting)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RequestError(self._failure.message, status=503, code="unavailable", hint=self._failure.hint)
        if len(self.journeys.queue) >= self.policy.max_waiting:
            message = f"{self.policy.max_waiting} requests are waiting already"
            raise RequestError(message, status=503, code="queue_full", hint="try again later")
        if self._helpless(self._clock()):
            raise _no_worker()

    # workers

    def knows(self, name: str) -> bool:
        """Whether a worker of this name has ever joined."""
        return name in self._names

    def start(self) -> Router:
        """Begins to watch over silence; call it once."""
        self._ticker.start()
        return self

    def join(self, hello: wire.Hello, link: Wire) -> Member:
        """Takes a worker in that has the router's layout. Raises LinkError if the router closes."""
        with self._lock:
            if self._closing.is_set():
                raise LinkError("the router closes")
            groups = self._manifest.kv_groups
            member = Member(hello.name, hello.role, hello.pid, hello.facts, link, groups, self._clock())
            self.members.append(member)
            self._names.add(hello.name)
            send(member, wire.Welcome(self.policy.silence_s))
            self._look_around()
            self.journeys.place()
        logging.getLogger("dsv4c").info("worker `%s` (%s, pid %d) has joined", member.name, member.role, member.pid)
        return member

    def lose(self, member: Member, reason: str) -> None:
        """A worker has gone, or is taken for gone: what it had goes on elsewhere."""
        with self._lock:
            if member.lost:
                return
            member.lost = True
            self.members.remove(member)
            log = logging.getLogger("dsv4c")
            if self._closing.is_set() or (member.leaving and not member.given):
                log.info("worker `%s` has left", member.name)
            else:
                self.losses[member.role] += 1
                log.warning("worker `%s` is lost: %s", member.name, reason)
            if member.beat.stats is not None:
                self._past = total([self._past, member.beat.stats], past=True)
            for other in self.members if member.facts.peer else ():
                send(other, wire.PeerGone(member.facts.peer))
            for attempt in [a for a in self.journeys.attempts.values() if member in (a.decode, a.prefill)]:
                self.journeys.survive(attempt, member)
            self._look_around()
            self.journeys.place()
        member.wire.close()

    def handle(self, member: Member, message: wire.ToRouter) -> None:
        """What a worker says. Of one that is taken for gone, nothing is heard."""
        with self._lock:
            if member.lost:
                return
            member.heard_s = self._clock()
            match message:
                case wire.Said():
                    for spoken in message.events:
                        self.journeys.said(member, spoken)
                case wire.Granted():
                    self.journeys.granted(member, message)
                case wire.Handover():
                    self.journeys.handed_over(member, message)
                case wire.Blocks():
                    member.learn(message)
                case wire.Beat():
                    member.beat = message
                case wire.Leaving():
                    member.leaving = True
                    self._look_around()
                case wire.Audited():
                    if message.number in self._audits:
                        self._audits[message.number][member] = message
                case wire.Hello():
                    raise LinkError("it introduced itself twice")

    def tick(self) -> None:
        """Looks at the time: who is silent, who has waited too long."""
        with self._lock:
            now = self._clock()
            for member in list(self.members):
                if now - member.heard_s > self.policy.silence_s:
                    self.lose(member, f"it has said nothing for {now - member.heard_s:.1f} s")
                else:
                    send(member, wire.Beat())
            for task in list(self.journeys.queue):
                if self._helpless(now):
                    self.journeys.finish(task, "failed", _no_worker())
                elif self._helpless_since_s is None and not self._can_hold(task):
                    self.journeys.finish(task, "failed", _no_pages(task.num_tokens))
            self.journeys.place()

    def audit(self, timeout_s: float) -> dict[str, wire.Audited]:
        """Asks every worker whether all its pages are accounted for; the answers that come in time, by name."""
        found: dict[Member, wire.Audited] = {}
        with self._lock:
            number, asked = next(self._numbers), list(self.members)
            self._audits[number] = found
            for member in asked:
                send(member, wire.Audit(number))
        deadline = self._clock() + timeout_s
        while self._clock() < deadline and not all(m in found or m.lost for m in asked):
            time.sleep(_LOOK_S)
        with self._lock:
            del self._audits[number]
            return {member.name: answer for member, answer in found.items()}

    def states(self) -> dict[State, int]:
        """How many requests are in each state, and how many have ended in which way."""
        with self._lock:
            counts: dict[State, int] = {
                **dict.fromkeys((*PRESENT, *ENDS), 0),
                "queued": len(self.journeys.queue),
                **self.journeys.ended,
            }
            for attempt in self.journeys.attempts.values():
                counts[attempt.phase] += 1
            return counts

    def fail(self, error: Dsv4cError) -> None:
        """Ends every request with this error, and takes no more."""
        with self._lock:
            self._failure = error
            for task in list(self.journeys.tasks.values()):
                self.journeys.finish(task, "failed", error)

    def close(self) -> None:
        """Ends every request and every link."""
        self._closing.set()
        self.fail(RequestError("the server is shutting down", status=503, code="unavailable"))
        with self._lock:
            members = list(self.members)
        for member in members:
            self.lose(member, "the router closes")
        if self._ticker.ident is not None:
            self._ticker.join()

    def _tick_on(self) -> None:
        while not self._closing.wait(min(1.0, self.policy.silence_s / 5)):
            self.tick()

    def _look_around(self) -> None:
        """Takes note of whether anybody is there to generate, and of what they hold."""
        generating = [m for m in self.members if m.generates and not m.leaving]
        if generating:
            self._helpless_since_s = None
            self._context = min(m.facts.max_context for m in generating)
            self.journeys.longest = min(m.facts.longest for m in generating)
        elif self._helpless_since_s is None:
            self._helpless_since_s = self._clock()

    def _helpless(self, now: float) -> bool:
        since = self._helpless_since_s
        return since is not None and now - since > self.policy.patience_s

    def _can_hold(self, task: Task) -> bool:
        held = task.held_tokens(self.policy.budget_tokens, self.journeys.longest)
        return any(m.generates and not m.leaving and m.could_hold(held) for m in self.members)


def _no_worker() -> RequestError:
    return RequestError("no worker is there to serve it", status=503, code="unavailable", hint="try again later")


def _no_pages(tokens: int) -> RequestError:
    hint = "serve with more KV memory, or ask for fewer tokens"
    return RequestError(f"no worker holds {tokens} tokens and more", status=503, code="out_of_pages", hint=hint)
