"""What the router costs: CPU time of its process a token and a request, everything in it but HTTP.

    python benchmarks/router.py

Workers are scripted: what they would send is encoded beforehand. A token is decoded from its frame, looked up, and put
where the server's event loop takes it from; a request is checked, hashed, placed, sent to two workers, handed over,
and forgotten. One thread, CPU time; the best of five rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dsv4c.artifact import KVGroup, Pool
from dsv4c.runtime.blockkeys import block_hashes
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.router import Router
from dsv4c.runtime.params import SamplingParams

BLOCK = 256
ROUNDS = 5
GROUPS = tuple(
    KVGroup(name, ratio, 64 if name == "window" else 256, 128 if name == "window" else None, (Pool("p", (1,), "int8"),))
    for name, ratio in (("window", 1), ("c4", 4), ("index", 4), ("c128", 128))
)


class Far:
    """The far end of a link: keeps what the router says."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def close(self) -> None:
        """Nothing is open."""


def make() -> tuple[Router, list[Any], list[Far]]:
    """A router with a prefill and a decode worker that hold whatever comes."""
    manifest: Any = SimpleNamespace(kv_groups=GROUPS, vocab_size=129280, max_context=131072)
    router = Router(manifest, BLOCK, lambda tokens: block_hashes(tokens, BLOCK))
    facts = wire.Facts(131072, 131072, 4096, dict.fromkeys((g.name for g in GROUPS), 10**7), "shm", "peer")
    fars = [Far(), Far()]
    roles: tuple[wire.Role, wire.Role] = ("prefill", "decode")
    members = [
        router.join(wire.Hello(wire.VERSION, role, role, 1, {}, facts), far)
        for role, far in zip(roles, fars, strict=True)
    ]
    return router, members, fars


def begin(router: Router, members: list[Any], fars: list[Far], prompt: list[int]) -> str:
    """Brings one request to its first token; its id at the workers."""
    prefill, decode = members
    for far in fars:
        far.sent.clear()
    router.submit(prompt, SamplingParams(max_tokens=4096, seed=1), lambda output: None)
    asked = wire.decode_for_worker(fars[0].sent[0])
    assert isinstance(asked, wire.Prefill)
    name = asked.job.id
    for member, message in (
        (prefill, wire.Granted(name, {"lease": 1, "row": 1, "at": {"name": "x" * 22, "offsets": list(range(12))}})),
        (prefill, wire.Handover(name, (5,))),
        (decode, wire.Said([wire.Spoken(name, (5,))])),
    ):
        router.handle(member, wire.decode_for_router(wire.encode(message)))
    return name


def best_us(measure: Callable[[], None], count: int) -> float:
    """Microseconds of CPU for each of `count` things that `measure` does."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        measure()
        found.append((time.process_time() - began) / count * 1e6)
    return min(found)


def token_us(running: int) -> float:
    """Of a token, where a step brings one to each of so many requests."""
    router, members, fars = make()
    names = [begin(router, members, fars, [7] * 16) for _ in range(running)]
    frames = [
        wire.encode(wire.Said([wire.Spoken(name, (i,)) for name in names])) for i in range(max(20, 2000 // running))
    ]

    def measure() -> None:
        for frame in frames:
            router.handle(members[1], wire.decode_for_router(frame))

    return best_us(measure, len(frames) * running)


def request_us(tokens: int, count: int = 200) -> float:
    """Of a request with a prompt of so many tokens, from its arrival to its end, without the tokens between."""
    router, members, fars = make()
    prompt = [i % 1000 for i in range(tokens)]

    def measure() -> None:
        for _ in range(count):
            name = begin(router, members, fars, prompt)
            end = wire.Said([wire.Spoken(name, (1,), wire.Ended("length", tokens, 2))])
            router.handle(members[1], wire.decode_for_router(wire.encode(end)))

    return best_us(measure, count)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("us of CPU a token, by requests in a step: ", end="")
    print(", ".join(f"{running}: {token_us(running):.1f}" for running in (1, 8, 64)))
    print("us of CPU a request, by tokens of its prompt: ", end="")
    print(", ".join(f"{tokens}: {request_us(tokens):.0f}" for tokens in (16, 640, 8192)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
