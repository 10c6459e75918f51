"""Nodes over stand-ins, engines whose tokens depend on all that they can see; and who carries their messages."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dsv4c.artifact import Pool, StateGroup
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.transfer.backend import Backend
from dsv4c.runtime.transfer.layout import Layout
from dsv4c.runtime.transfer.ledger import Ledger
from dsv4c.runtime.transfer.local import Hub, LocalBackend
from dsv4c.runtime.transfer.node import Granted, Node, Prefilled, prefill_params
from dsv4c.runtime.transfer.setup import make_node
from tests.runtime.standin import StandIn, kv_groups, make_engine, state_groups

HORIZON, WIDE = 8, 8
GROUPS = kv_groups(window_page=4, block=16, horizon=HORIZON, wide=WIDE)
STATES = state_groups(WIDE)


def layout(model: str = "stand-in") -> Layout:
    """Of a stand-in: its arrays by names of their own."""
    groups = tuple(dataclasses.replace(g, pools=(Pool(f"{g.name}.p", (1,), "int64"),)) for g in GROUPS)
    states = tuple(
        StateGroup(s.name, (Pool(f"{s.name}.p", s.pools[0].entry_shape, "int64"),), s.empty_every) for s in STATES
    )
    return Layout(groups, states, {"model_sha256": model})


def pools_of(standin: StandIn) -> dict[str, torch.Tensor]:
    rings = {"compressor_4": "c4", "compressor_128": "c128"}
    out = {f"{name}.p": torch.from_numpy(array) for name, array in standin.pools.items()}
    return out | {f"{name}.p": torch.from_numpy(standin.rings[of]) for name, of in rings.items()}


def engine_of(lag: int = 0, *, requests: int = 6, context: int = 256, **options: Any) -> tuple[Engine, StandIn]:
    limits = Limits(max_requests=requests, **{"max_step_tokens": 64, **options})
    sizes = PoolSizes.for_requests(GROUPS, requests, context, limits.max_step_tokens, 8)
    return make_engine(sizes, limits, GROUPS, horizon=HORIZON, lag=lag)


Wrap = Callable[[Backend], Backend]


class Pair:
    """A prefill and a decode node of one process, and the messages between them."""

    def __init__(
        self, lag: int = 0, *, ttl_s: float = 60.0, deadline_s: float = 60.0, model: str = "stand-in",
        wrap: Wrap = lambda backend: backend, requests: tuple[int, int] = (6, 6), **options: Any,
    ) -> None:  # fmt: skip
        hub = Hub()
        self.engines = [engine_of(lag, requests=n, **options) for n in requests]

        def node(number: int, of: Layout) -> Node:
            engine, standin = self.engines[number]

            def make(layout: Layout, ledger: Ledger) -> Backend:
                backend = LocalBackend(hub, layout, pools_of(standin), ledger)
                return wrap(backend) if number else backend

            return make_node(engine, of, make, ttl_s=ttl_s, deadline_s=deadline_s)

        self.prefill, self.decode = node(0, layout()).start(), node(1, layout(model)).start()
        self.handles: dict[str, dict[str, Any]] = {}

    def serve(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, generated: Sequence[int] = (),
        first: bool = True,
    ) -> Client:  # fmt: skip
        """Has a request prefilled by one, and decoded by the other; `first`: whether the first token gets through."""
        client = Client()

        def hears(said: Granted | Prefilled | Event) -> None:
            if isinstance(said, Granted):
                self.handles[request_id] = said.handle
                request = Request(request_id, prompt, params, generated=generated)
                self.decode.decode(request, said.handle, client)
            elif isinstance(said, Prefilled):
                if first:
                    self.decode.prefilled(request_id, said)
            else:
                assert said.end is not None
                self.decode.prefill_failed(request_id, f"the prefill ended: {said.end.reason}")
            client.heard.append(said)

        asked = Request(request_id, prompt, prefill_params(params, len(generated)), generated=generated, keep=True)
        self.prefill.prefill(asked, hears)
        return client

    def audit(self) -> None:
        self.prefill.audit()
        self.decode.audit()

    def assert_empty(self) -> None:
        """Nothing is held, leased or under way on either side."""
        self.audit()
        for node, (engine, _) in zip((self.prefill, self.decode), self.engines, strict=True):
            assert not any(engine.pool.used_pages().values()), engine.pool.used_pages()
            assert node.quiescent() and not node.stats().moving

    def close(self) -> None:
        assert self.decode.close() and self.prefill.close()


class Client:
    """Gathers the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.heard: list[Granted | Prefilled | Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.end is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.events for t in e.tokens]

    def never_began(self) -> bool:
        """Whether its prefill ended before it was granted anything; waits until one of both is so."""
        while not self.heard:
            time.sleep(0.001)
        return isinstance(self.heard[0], Event)

    def wait(self) -> list[int]:
        """All its tokens, when it has ended."""
        assert self.over.wait(60)
        assert [e.end is not None for e in self.events] == [False] * (len(self.events) - 1) + [True]
        return self.tokens


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, 61, length).tolist()
