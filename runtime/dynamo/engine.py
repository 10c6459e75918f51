"""The worker as NVIDIA Dynamo drives it: one class, over `Serving`.

    start -> generate, abort, ... -> is_quiescent (prefill) -> cleanup      Rust owns signals, registration and health

`cleanup` comes while requests run: it lets them finish for `drain_s` seconds and then raises in those that have not,
so that the frontend moves them to another worker with what they have. A stream never just ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo._core import Context
from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload, is_probe
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
from dynamo.llm.exceptions import DynamoException, EngineShutdown, InvalidArgument, Unknown, WorkerUnavailable

from dsv4c.errors import ConfigError, Dsv4cError, RequestError
from dsv4c.runtime.dynamo.chunks import Chunk
from dsv4c.runtime.dynamo.publish import Publishing
from dsv4c.runtime.dynamo.rendezvous import Rendezvous
from dsv4c.runtime.dynamo.serving import Serving
from dsv4c.runtime.dynamo.watchdog import Watchdog
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.transfer.node import Node

_LOG = logging.getLogger("dsv4c.dynamo")
_LAST_WORDS_S = 2.0  # for what was raised in streams to reach the frontend
_TICK_S = 0.02


@dataclass(frozen=True)
class Card:
    """What the worker registers itself with."""

    model: str
    """A folder with `config.json` and the tokenizer, which the frontend reads."""
    served_model_name: str
    bos_token_id: int
    block_tokens: int
    """Of the prefix cache, and so of the router's."""
    total_blocks: int
    max_requests: int
    max_step_tokens: int
    bootstrap: tuple[str, str, int] | None = None
    """Of a prefill worker that is met: address to bind, address to tell, port (0: any)."""


class DynamoEngine(LLMEngine):  # type: ignore[misc]  # Dynamo is not installed where types are checked
    """One node, already started, as a worker of Dynamo."""

    def __init__(
        self,
        node: Node,
        serving: Serving,
        card: Card,
        metrics: Metrics,
        publishing: Publishing,
        rendezvous: Rendezvous | None = None,
        *,
        drain_s: float = 30.0,
    ) -> None:
        self._node, self._serving, self._card, self._metrics = node, serving, card, metrics
        self._publishing, self._rendezvous = publishing, rendezvous
        self._drain_s = drain_s
        self._watchdog: asyncio.Future[None] | None = None
        self._closing = self._closed = False

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        """Dynamo's own way to start a worker. Raises ConfigError: it is `dsv4c dynamo` that knows how to load one."""
        raise ConfigError("this engine is not started by its class", hint="`dsv4c dynamo ARTIFACT --role both`")

    async def start(self, worker_id: int) -> EngineConfig:
        """What to register; the engine serves already."""
        card, host, port = self._card, None, None
        if self._rendezvous is not None and card.bootstrap is not None:
            await self._rendezvous.start(card.bootstrap[0], card.bootstrap[2])
            host, port = card.bootstrap[1], self._rendezvous.port
        self._publishing.begin()
        _LOG.info("worker %d serves `%s`", worker_id, card.served_model_name)
        return EngineConfig(
            model=card.model,
            served_model_name=card.served_model_name,
            llm=LlmRegistration(
                context_length=self._node.loop.max_context,
                kv_cache_block_size=card.block_tokens,
                total_kv_blocks=card.total_blocks,
                max_num_seqs=card.max_requests,
                max_num_batched_tokens=card.max_step_tokens,
                bootstrap_host=host,
                bootstrap_port=port,
            ),
        )

    async def on_endpoint_ready(self, endpoint: Any) -> None:
        """Begins to watch whether the worker stays registered."""
        client = await endpoint.client()
        watchdog = Watchdog(endpoint.connection_id(), client.instance_ids, _end_worker)
        self._watchdog = asyncio.ensure_future(watchdog.run())

    async def generate(self, request: Mapping[str, Any], context: Context) -> AsyncGenerator[Chunk, None]:
        """Chunks of every choice until all have ended. Raises what Dynamo knows: see `_translated`."""
        if self._closing:
            raise EngineShutdown("the worker is shutting down")
        try:
            async for chunk in self._serving.answer(request, context, probe=is_probe(request)):
                yield chunk
        except Dsv4cError as error:
            raise self._translated(error) from error

    def _translated(self, error: Dsv4cError) -> DynamoException:
        """The error as Dynamo knows it: 400 for a request at fault, else one after which another worker is tried."""
        text = f"{error.message}; {error.hint}" if error.hint else error.message
        if self._node.loop.failure is not None and not self._closing:
            _end_worker()  # it will compute nothing any more
            return EngineShutdown(text)
        if self._closing:
            return EngineShutdown(text)
        if isinstance(error, RequestError):
            return InvalidArgument(text) if error.status < 500 else WorkerUnavailable(text)
        return Unknown(text)

    # what Dynamo publishes

    async def kv_event_sources(self) -> list[PushSource]:
        """The prefix cache's blocks."""
        return [PushSource(on_ready=self._publishing.start, dp_rank=0)]

    def component_metrics_dp_ranks(self) -> list[int]:
        """One rank."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Has the engine's load published."""
        self._publishing.snapshot = lambda stats: publisher.publish(0, self._snapshot(stats))

    def _snapshot(self, stats: EngineStats) -> ComponentSnapshot:
        shares = [stats.pages_used.get(group, 0) / max(1, total) for group, total in stats.pages_total.items()]
        share, queried = max(shares, default=0.0), stats.prefix_queried_tokens
        return ComponentSnapshot(
            kv_used_blocks=round(share * self._card.total_blocks),
            kv_total_blocks=self._card.total_blocks,
            gpu_cache_usage=share,
            dp_rank=0,
            kv_cache_hit_rate=stats.prefix_hit_tokens / queried if queried else None,
        )

    async def register_prometheus(self, metrics: Any) -> None:
        """Adds the engine's own numbers, `dsv4c_...`, to the worker's /metrics."""
        register_engine_registry(metrics, self._metrics.registry)

    async def health_check_payload(self) -> dict[str, Any]:
        """A request of one token, sent when nothing else has come for a while."""
        return dict(build_health_check_payload(bos_token_id=self._card.bos_token_id))

    # what operators ask

    def supported_controls(self) -> set[str]:
        """`POST /engine/control/audit`."""
        return {"audit"}

    async def engine_control(self, control: str, body: dict[str, Any]) -> dict[str, Any]:
        """Proves that pages, slots, leases and moves agree, between two steps; says what does not."""
        if control != "audit":
            return {"status": "error", "message": f"there is no control `{control}`"}
        try:
            await asyncio.to_thread(self._node.audit)
        except Dsv4cError as error:
            return {"status": "error", "message": error.message}
        stats = self._node.stats()
        held = {name: count for name, count in stats.engine.pages_used.items() if count}
        return {"status": "ok", "pages_used": held, "leases": stats.leases, "moving": stats.moving}

    # the end

    async def is_quiescent(self) -> bool:
        """Whether all that was handed over has been pulled, or has expired."""
        return self._node.quiescent()

    async def cleanup(self) -> None:
        """Lets requests finish, for `drain_s` seconds; the rest is raised out of. May be called again."""
        self._closing = True
        if self._closed:
            return
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not await self._settled(self._drain_s):
            _LOG.warning(
                "%d requests have not finished in %g s: others take them", self._serving.num_jobs, self._drain_s
            )
            self._serving.fail_all(EngineShutdown("the worker is shutting down"))
            await self._settled(_LAST_WORDS_S)
        self._publishing.close()
        if self._rendezvous is not None:
            await self._rendezvous.close()
        await asyncio.to_thread(self._node.close, drain=False)

    async def _settled(self, seconds: float) -> bool:
        """Whether no request is left within as many seconds."""
        clock = asyncio.get_running_loop()
        end = clock.time() + seconds
        while self._serving.num_jobs and clock.time() < end:
            await asyncio.sleep(_TICK_S)
        return not self._serving.num_jobs


def _end_worker() -> None:
    """Ends this process as SIGTERM does: what can finish does, and whoever runs it starts it again."""
    signal.raise_signal(signal.SIGTERM)
