"""A router in this process over real worker processes that serve nano, and what one engine alone would say."""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.artifact import load_manifest
from dsv4c.launch import LaunchOptions, codec_of, launch_engine
from dsv4c.launch_cluster import LocalWorkers
from dsv4c.runtime.blockkeys import block_hashes
from dsv4c.runtime.cluster.address import Address
from dsv4c.runtime.cluster.lifecycle import Policy
from dsv4c.runtime.cluster.link import Port
from dsv4c.runtime.cluster.processes import Child, Processes
from dsv4c.runtime.cluster.reception import Reception
from dsv4c.runtime.cluster.router import Router
from dsv4c.runtime.outputs import outputs_of
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import block_tokens
from dsv4c.runtime.request import Request
from dsv4c.runtime.service import Output
from dsv4c.runtime.transfer.setup import layout_of

SMALL = ("--max-requests", "16", "--max-context", "2048", "--log-level", "warning")
PATIENCE_S = 60.0  # a guard against hanging, far above any real wait; nothing is measured by it


@dataclass
class Asked:
    """A request to a cluster."""

    prompt: list[int]
    params: SamplingParams
    number: int = 0
    outputs: list[Output] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, output: Output) -> None:
        assert not self.over.is_set(), "an output came behind the end"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [o.token_id for o in self.outputs if o.token_id is not None]

    @property
    def reason(self) -> str | None:
        return self.outputs[-1].finish_reason if self.outputs else None


class Cluster:
    """`P` prefill and `D` decode workers of an artifact, and a router. Use as a context."""

    def __init__(
        self,
        artifact: Path,
        prefill: int,
        decode: int,
        *,
        transfer: str = "shm",
        options: Sequence[str] = (),
        address: Address | None = None,
        secret: str | None = None,
        **policy: Any,
    ) -> None:
        manifest = load_manifest(artifact)
        block = block_tokens(manifest.kv_groups)
        self.router = Router(manifest, block, lambda tokens: block_hashes(tokens, block), Policy(**policy))
        self.secret = secret or secrets.token_hex(16)
        self.reception = Reception(self.router, layout_of(manifest).fields)
        self.port = Port(
            address or Address(name="\0dsv4c-" + secrets.token_hex(8)), self.secret.encode(), self.reception.serve
        )
        self.size = prefill + decode
        names = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
        children = [Child(name, self.command(artifact, name, transfer, options)) for name in names]
        self.processes = Processes(children if transfer != "local" else [], self.secret, self.router.knows)
        self.workers = ExitStack()
        if transfer == "local":
            roles: list[Any] = [name.partition("-")[0] for name in names]
            chosen = LaunchOptions(max_requests=16, max_context=2048)
            self.workers.enter_context(LocalWorkers(artifact, chosen, self.reception.serve, roles))

    def command(self, artifact: Path, name: str, transfer: str, options: Sequence[str] = ()) -> list[str]:
        """The command line of a worker; `-` for its secret file is replaced where it is no child."""
        command = [sys.executable, "-m", "dsv4c.cli", "run", str(artifact), "--config", os.devnull, "--threads", "1"]
        command += ["--role", name.partition("-")[0], "--worker-name", name, "--router", str(self.port.address)]
        return [*command, "--secret-file", "-", "--transfer", transfer, "--drain-timeout", "20", *SMALL, *options]

    def __enter__(self) -> Cluster:
        self.port.start()
        self.router.start()
        self.processes.__enter__()
        self.processes.await_all()
        wait_for(lambda: len(self.router.members) == self.size, "all workers")
        return self

    def __exit__(self, *_: object) -> None:
        self.port.close()
        self.router.close()
        self.workers.close()
        self.processes.close()

    def ask(self, prompt: Sequence[int], **params: Any) -> Asked:
        return self.send(prompt, SamplingParams(**params))

    def send(self, prompt: Sequence[int], params: SamplingParams) -> Asked:
        asked = Asked(list(prompt), params)
        asked.number = self.router.submit(asked.prompt, asked.params, asked)
        return asked

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes.pids[name], number)

    def names(self) -> set[str]:
        return {m.name for m in self.router.members}

    def await_members(self, names: Iterable[str]) -> None:
        """Waits until these are there, and no others."""
        wanted = set(names)
        wait_for(lambda: self.names() == wanted and len(self.router.members) == len(wanted), f"{wanted} to be there")

    def check_clean(self) -> None:
        """No request is left, and no worker holds a page, a slot or a lease of one; every audit agrees."""
        wait_for(lambda: not self.router.stats().running + self.router.stats().waiting, "requests to end")
        found: dict[str, Any] = {}

        def clean() -> bool:
            found.clear()
            found.update(self.router.audit(PATIENCE_S))
            assert not any(a.fault for a in found.values()), found
            return found.keys() == self.names() and all(a.idle for a in found.values())

        wait_for(clean, lambda: f"workers to be idle: {found}")
        assert not any(m.given or any(m.claimed.values()) for m in self.router.members)


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what if isinstance(what, str) else what()}"
        time.sleep(0.01)


def alone(artifact: Path, asked: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[int]]:
    """The tokens that one engine in this process gives each of these requests."""
    return [[o.token_id for o in outputs if o.token_id is not None] for outputs in all_of(artifact, asked)]


def all_of(artifact: Path, asked: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Output]]:
    """All that one engine in this process says to each of these requests."""
    manifest = load_manifest(artifact)
    engine = launch_engine(artifact, manifest, LaunchOptions(), _ends(artifact))
    said: dict[str, list[Output]] = {}
    for i, (prompt, params) in enumerate(asked):
        said[str(i)] = []
        engine.submit(Request(str(i), prompt, params))
    while engine.has_work:
        for event in engine.step():
            said[event.request_id] += outputs_of(event)
            assert event.end is None or event.end.error is None, event
    return [said[str(i)] for i in range(len(asked))]


def _ends(artifact: Path) -> tuple[int, ...]:
    return tuple(codec_of(artifact, LaunchOptions()).eos_token_ids)


def mixed(
    count: int, seed: int, vocab: int, longest: int = 1500, most: int = 24
) -> list[tuple[list[int], SamplingParams]]:
    """Requests of 1 to `longest` tokens, greedy and seeded, some of which begin alike."""
    draw = random.Random(seed)
    shared = [draw.randrange(4, vocab) for _ in range(longest)]
    asked = []
    for i in range(count):
        length = min(longest, int(2 ** draw.uniform(0, 10.6)))
        common = draw.choice([0, 0, draw.randint(0, length)])
        prompt = shared[:common] + [draw.randrange(4, vocab) for _ in range(length - common)]
        more: dict[str, Any] = {"temperature": 0.0}
        if i % 2:
            more = {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(2**40), "frequency_penalty": 0.2}
        asked.append((prompt, SamplingParams(max_tokens=draw.randint(1, most), **more)))
    return asked
