"""The compiled nano model, prefilled by one engine and decoded by another: the tokens of one that does both."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.transfer.local import Hub
from dsv4c.runtime.transfer.node import Granted, Node, Prefilled, prefill_params
from dsv4c.runtime.transfer.setup import local_node, make_segment, shm_node

REQUESTS, CONTEXT = 6, 1024


def engine_of(artifact: Path, manifest: Manifest, chunk: int, memory: Any = None) -> Engine:
    sizes = sizes_of(manifest)
    executor = load(artifact, Checkpoint(artifact / "weights"), sizes, manifest=manifest, memory=memory)
    return Engine.for_manifest(executor, manifest, sizes, limits=Limits(REQUESTS, max_step_tokens=chunk))


def sizes_of(manifest: Manifest) -> PoolSizes:
    tokens = manifest.programs["step"].symbols["T"]
    return PoolSizes.for_requests(manifest.kv_groups, REQUESTS, CONTEXT, step_tokens=tokens, snapshots=8)


class Client:
    def __init__(self, number: int, prompt: Sequence[int], params: SamplingParams) -> None:
        self.id, self.prompt, self.params = str(number), prompt, params
        self.tokens: list[int] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.tokens += event.tokens
        if event.end is not None:
            assert event.end.error is None
            self.over.set()


def serve(prefill: Node, decode: Node, clients: list[Client]) -> None:
    for client in clients:

        def hears(said: Granted | Prefilled | Event, client: Client = client) -> None:
            if isinstance(said, Granted):
                decode.decode(Request(client.id, client.prompt, client.params), said.handle, client)
            elif isinstance(said, Prefilled):
                decode.prefilled(client.id, said)

        prefill.prefill(Request(client.id, client.prompt, prefill_params(client.params), keep=True), hears)
    for client in clients:
        assert client.over.wait(120)


@pytest.fixture(scope="module")
def asked(nano_prompts: list[list[int]]) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and drawn, long and short, twice the same among them."""
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    drawn = [
        SamplingParams(max_tokens=24, seed=i, top_p=0.9, repetition_penalty=1.1, ignore_eos=True) for i in range(8)
    ]
    prompts = [nano_prompts[i][: 1 + 67 * i] for i in range(8)] + [nano_prompts[1], nano_prompts[1]]
    return [(p, greedy) for p in prompts] + list(zip(prompts[:8], drawn, strict=True))


@pytest.fixture(scope="module")
def expected(nano_artifact: Path, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    engine = engine_of(nano_artifact, load_manifest(nano_artifact), 512)
    for i, (prompt, params) in enumerate(asked):
        engine.submit(Request(str(i), prompt, params))
    out: list[list[int]] = [[] for _ in asked]
    while engine.has_work:
        for event in engine.step():
            out[int(event.request_id)] += event.tokens
    return out


@pytest.mark.parametrize("how", ["local", "shm"])
def test_the_same_tokens_as_one_engine(
    how: str, nano_artifact: Path, asked: list[tuple[list[int], SamplingParams]], expected: list[list[int]]
) -> None:
    manifest = load_manifest(nano_artifact)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        hub, nodes = Hub(), []
        for chunk in (96, 512):
            if how == "local":
                engine = engine_of(nano_artifact, manifest, chunk)
                nodes.append(local_node(engine, manifest, engine.runner.executor.states, hub))  # type: ignore[attr-defined]
            else:
                segment = make_segment(manifest, sizes_of(manifest), Path(folder))
                engine = engine_of(nano_artifact, manifest, chunk, segment.memory)
                states = engine.runner.executor.states  # type: ignore[attr-defined]
                nodes.append(shm_node(engine, manifest, states, segment, folder=Path(folder)))
        prefill, decode = nodes[0].start(), nodes[1].start()
        clients = [Client(i, *one) for i, one in enumerate(asked)]
        serve(prefill, decode, clients)
        assert [c.tokens for c in clients] == expected
        stats = decode.stats()
        assert (stats.moved, stats.recomputed) == (len(asked), 0)
        assert stats.transfer.early_bytes > stats.transfer.pulled_bytes / 2
        for node in (prefill, decode):
            node.audit()
            assert node.close()
