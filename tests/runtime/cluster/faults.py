"""Faults done to a cluster that works, at random moments, and what became of its requests."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.errors import Dsv4cError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.placement import Member
from dsv4c.runtime.params import SamplingParams
from tests.runtime.cluster.live import PATIENCE_S, Asked, Cluster, wait_for

BATCH = 12  # requests that run when a fault strikes

Known = Sequence[tuple[list[int], SamplingParams, list[int]]]
"""Requests, and the tokens that one engine alone gives them."""


@dataclass
class Report:
    """What became of the requests of one kind of fault."""

    moments: int = 0
    same: int = 0
    """Requests whose tokens are those of one engine without a fault."""
    cancelled: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that ended with an error, by what it says."""
    retried: int = 0
    recomputed: int = 0
    longest_s: float = 0.0

    def row(self, name: str, means: str) -> str:
        errors = "; ".join(f"{count}: {text}" for text, count in self.failed.items()) or "none"
        told = f"{self.same} same tokens" + (f", {self.cancelled} cancelled" if self.cancelled else "")
        return (
            f"| {name} | {self.moments} | {told} | {errors} | {self.retried} | {self.recomputed} | "
            f"{self.longest_s:.1f} s | {means} |"
        )


class Trial:
    """A cluster under requests of which the tokens are known."""

    def __init__(self, cluster: Cluster, known: Known, seed: int, *, stop_s: float) -> None:
        """`stop_s`: how long a worker is stopped."""
        self.cluster = cluster
        self.draw = random.Random(seed)
        self.stop_s = stop_s
        self.known = known
        self.gone: set[int] = set()
        """Requests whose clients have gone."""

    def moment(self, strike: Callable[[Trial, list[Asked]], None], report: Report, **chosen: Any) -> None:
        """One batch of requests, a fault somewhere in it, and the proof that all is well behind it."""
        router = self.cluster.router
        retried, recomputed, began = router.journeys.retried, self._recomputed(), time.monotonic()
        batch = [(self.draw.choice(self.known)) for _ in range(BATCH)]
        asked = [self.cluster.send(prompt, params) for prompt, params, _ in batch]
        strike(self, asked)
        for one in asked:
            assert one.number in self.gone or one.over.wait(PATIENCE_S), (one.number, router.states())
        report.longest_s = max(report.longest_s, time.monotonic() - began)
        report.moments += 1
        for one, (_, _, tokens) in zip(asked, batch, strict=True):
            self.judge(one, tokens, report)
        self.cluster.check_clean()
        report.retried += router.journeys.retried - retried
        report.recomputed += max(0, self._recomputed() - recomputed)

    def judge(self, one: Asked, tokens: list[int], report: Report) -> None:
        if one.number in self.gone:
            assert one.tokens == tokens[: len(one.tokens)]
            report.cancelled += 1
            return
        last = one.outputs[-1]
        if last.error is not None:
            assert isinstance(last.error, Dsv4cError) and one.tokens == tokens[: len(one.tokens)]
            report.failed[last.error.message] += 1
            return
        assert one.tokens == tokens, f"a prompt of {len(one.prompt)} tokens gave others"
        report.same += 1

    def _recomputed(self) -> int:
        return sum(m.beat.transfers.get("recomputed", 0) for m in self.cluster.router.members)

    def wait(self, most_s: float = 0.6) -> None:
        """Until some moment of the batch."""
        time.sleep(self.draw.uniform(0.0, most_s))

    def victim(self, role: str) -> str:
        """A worker of this role."""
        wait_for(lambda: any(m.role == role for m in self.cluster.router.members), f"a {role} worker")
        return self.draw.choice([m.name for m in list(self.cluster.router.members) if m.role == role])


def kill_prefill(trial: Trial, _asked: list[Asked]) -> None:
    trial.wait()
    trial.cluster.signal(trial.victim("prefill"), signal.SIGKILL)


def kill_decode(trial: Trial, _asked: list[Asked]) -> None:
    trial.wait()
    trial.cluster.signal(trial.victim("decode"), signal.SIGKILL)


def kill_mid_pull(trial: Trial, asked: list[Asked]) -> None:
    """The prefill worker of a request that is being pulled."""
    router = trial.cluster.router

    def pulled() -> Member | None:
        for attempt in list(router.journeys.attempts.values()):
            if attempt.granted and attempt.prefill is not None and attempt.phase != "decoding":
                return attempt.prefill
        return None

    found: list[Member] = []
    while not found and not all(one.over.is_set() for one in asked):
        member = pulled()
        if member is not None and trial.draw.random() < 0.3:
            found.append(member)
    if found:
        trial.cluster.signal(found[0].name, signal.SIGKILL)


def stop_and_resume(trial: Trial, _asked: list[Asked]) -> None:
    trial.wait()
    name = trial.victim(trial.draw.choice(["prefill", "decode"]))
    trial.cluster.signal(name, signal.SIGSTOP)
    time.sleep(trial.stop_s)
    trial.cluster.signal(name, signal.SIGCONT)


def terminate(trial: Trial, _asked: list[Asked]) -> None:
    trial.wait()
    trial.cluster.signal(trial.victim(trial.draw.choice(["prefill", "decode"])), signal.SIGTERM)


def leave(trial: Trial, asked: list[Asked]) -> None:
    """Clients go."""
    trial.wait()
    for one in trial.draw.sample(asked, BATCH // 2):
        if not one.over.is_set():
            trial.gone.add(one.number)
            trial.cluster.router.cancel(one.number)


def expire(trial: Trial, _asked: list[Asked]) -> None:
    """Decode workers are stopped for longer than leases live, and not for so long that they are taken for lost."""
    trial.wait(0.2)
    names = [m.name for m in list(trial.cluster.router.members) if m.role == "decode"]
    for name in names:
        trial.cluster.signal(name, signal.SIGSTOP)
    time.sleep(0.4)
    for name in names:
        trial.cluster.signal(name, signal.SIGCONT)


class Tampered:
    """What the router sends with handles is changed on its way."""

    def __init__(self, cluster: Cluster, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._members = list(cluster.router.members)
        self._change = change

    def __enter__(self) -> None:
        for member in self._members:
            wire_of: Any = member.wire
            wire_of.send = self._changed(wire_of.send)

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            wire_of: Any = member.wire
            del wire_of.send

    def _changed(self, send: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def sending(frame: bytes) -> None:
            message = wire.decode_for_worker(frame)
            if isinstance(message, wire.Decode) and message.handle is not None:
                frame = wire.encode(wire.Decode(message.job, self._change(message.handle)))
            send(frame)

        return sending


def foreign_handle(trial: Trial, asked: list[Asked]) -> None:
    """Handles say that they are of another model."""

    def change(handle: dict[str, Any]) -> dict[str, Any]:
        if trial.draw.random() < 0.5:
            return handle
        fields = {**handle["fields"], "model_sha256": "0" * 64}
        return {**handle, "fields": fields, "layout": "0" * 64}

    with Tampered(trial.cluster, change):
        more = [trial.cluster.send(prompt, params) for prompt, params, _ in trial.known[:4]]
        for one in (*asked, *more):
            assert one.over.wait(PATIENCE_S)
    for one, (_, _, tokens) in zip(more, trial.known[:4], strict=True):
        assert one.tokens == tokens


def replayed_handle(trial: Trial, asked: list[Asked]) -> None:
    """Handles of requests before are given again, some of them to the same prompts."""
    seen: list[dict[str, Any]] = []

    def change(handle: dict[str, Any]) -> dict[str, Any]:
        seen.append(handle)
        return trial.draw.choice(seen)

    again = [*trial.known[:4], *trial.known[:4]]
    with Tampered(trial.cluster, change):
        more = [trial.cluster.send(prompt, params) for prompt, params, _ in again]
        for one in (*asked, *more):
            assert one.over.wait(PATIENCE_S)
    for one, (_, _, tokens) in zip(more, again, strict=True):
        assert one.tokens == tokens


FAULTS: dict[str, tuple[Callable[[Trial, list[Asked]], None], str]] = {
    "prefill worker SIGKILL": (kill_prefill, "computed elsewhere; the worker is started again"),
    "decode worker SIGKILL": (kill_decode, "goes on elsewhere behind the tokens delivered"),
    "peer SIGKILL mid-pull": (kill_mid_pull, "the decode worker computes the prompt"),
    "worker SIGSTOP, SIGCONT": (stop_and_resume, "taken for lost when silent; joins again, empty"),
    "worker SIGTERM": (terminate, "finishes what it has, and is started again"),
    "client gone": (leave, "cancelled on every worker"),
    "lease expired": (expire, "the decode worker computes the prompt"),
    "handle of another model": (foreign_handle, "refused before a byte moves; computed instead"),
    "handle replayed": (replayed_handle, "it is for other tokens, or its lease is gone; computed instead"),
}


def elsewhere(cluster: Cluster, artifact: Path, folder: Path, names: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Workers that are no children of the router, and know its secret by a file."""
    file = folder / "secret"
    file.touch(mode=0o600)
    file.write_text(cluster.secret)
    commands = [cluster.command(artifact, name, "shm") for name in names]
    for command in commands:
        command[command.index("--secret-file") + 1] = str(file)
    return [subprocess.Popen(command) for command in commands]
