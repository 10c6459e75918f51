"""Artifact -> a router that answers over workers, or one of these workers.

run --decode-workers D: router | processes: run --role ... -> Launched -> Node -> Worker
                               | or, with `local`, the same in threads of the one process
"""

from __future__ import annotations

import logging
import logging.config
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.errors import ConfigError
from dsv4c.launch import (
    Launched,
    LaunchOptions,
    LoadWatch,
    PlanWatch,
    Progress,
    ServeOptions,
    app_over,
    codec_of,
    launch,
)
from dsv4c.runtime.blockkeys import block_hashes
from dsv4c.runtime.cluster.address import Address
from dsv4c.runtime.cluster.figures import RouterCollector
from dsv4c.runtime.cluster.lifecycle import Policy
from dsv4c.runtime.cluster.link import Link, Port, dial, pair
from dsv4c.runtime.cluster.processes import Parent, Processes
from dsv4c.runtime.cluster.reception import Reception
from dsv4c.runtime.cluster.router import Router
from dsv4c.runtime.cluster.wire import Role
from dsv4c.runtime.cluster.worker import Worker, hello_of
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.grammar import Grammars
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.logs import LogFormat, log_config
from dsv4c.runtime.poolsizes import PoolSizes, block_tokens
from dsv4c.runtime.serve import serve as serve_app
from dsv4c.runtime.transfer.layout import weights_sha256
from dsv4c.runtime.transfer.local import Hub
from dsv4c.runtime.transfer.nixl import nixl_node
from dsv4c.runtime.transfer.node import Node
from dsv4c.runtime.transfer.setup import layout_of, local_node, make_segment, shm_node
from dsv4c.runtime.transfer.shm import Segment

_REDIAL_S = 3.0  # a child whose parent does not answer for so long has lost it
_LOG = logging.getLogger("dsv4c")


@dataclass(frozen=True)
class ClusterOptions:
    """A router and its own workers. `secret`: what workers must know to join at `address`."""

    address: Address
    secret: str
    prefill_workers: int
    decode_workers: int
    transfer: str
    silence_s: float = 5.0
    budget_tokens: int | None = None
    max_queue: int = 512


@dataclass(frozen=True)
class WorkerOptions:
    """A worker of a router. `transfer`: None is what fits the artifact's target."""

    role: Role
    name: str
    router: Address
    secret: str
    transfer: str | None = None
    lease_ttl_s: float = 30.0
    """How long a prompt that is computed is kept for whoever pulls it."""
    transfer_timeout_s: float = 10.0
    """How long a transfer may stand still."""
    nixl_devices: str = "lo"
    drain_s: float = 30.0
    log_level: str = "info"
    log_format: LogFormat = "text"


@dataclass(frozen=True)
class LaunchedWorker(Launched):
    """A node that is ready to serve a router."""

    node: Node
    transfer: str
    layout: dict[str, str]
    """What peers must have too, by name; its weights among it."""


def launch_worker(
    directory: Path,
    options: LaunchOptions,
    worker: WorkerOptions,
    progress: Progress | None = None,
    planned: PlanWatch | None = None,
    loaded: LoadWatch | None = None,
    hub: Hub | None = None,
) -> LaunchedWorker:
    """An engine whose state others can pull. `hub`: for `local`. Raises InputErrors as `launch` does."""
    manifest = load_manifest(directory)
    transfer = worker.transfer or ("shm" if manifest.target == "cpu" else "nixl")
    segments: list[Segment] = []

    def memory(manifest: Manifest, sizes: PoolSizes) -> memoryview:
        segments.append(make_segment(manifest, sizes))
        return segments[0].memory

    try:
        launched = launch(directory, options, progress, planned, loaded, memory if transfer == "shm" else None)
        engine = launched.engine
        executor: ArtifactExecutor | GraphExecutor = engine.runner.executor  # type: ignore[attr-defined]
        pools, extra = executor.states, {"weights": weights_sha256(executor.weights)}
        ttl_s, deadline_s = worker.lease_ttl_s, worker.transfer_timeout_s
        if transfer == "shm":
            node = shm_node(engine, manifest, pools, segments[0], extra=extra, ttl_s=ttl_s, deadline_s=deadline_s)
        elif transfer == "nixl":
            node = nixl_node(
                engine, manifest, pools, devices=worker.nixl_devices, extra=extra, ttl_s=ttl_s, deadline_s=deadline_s
            )
        elif hub is not None:
            node = local_node(engine, manifest, pools, hub, extra=extra, ttl_s=ttl_s, deadline_s=deadline_s)
        else:
            raise ConfigError("`local` moves state within one process", hint="use `shm` or `nixl`")
    except BaseException:
        for segment in segments:
            segment.close()
        raise
    layout = dict(layout_of(manifest, extra).fields)
    return LaunchedWorker(engine, launched.codec, manifest, launched.model_name, node, transfer, layout)


def serve_worker(launched: LaunchedWorker, options: WorkerOptions, parent: Parent | None = None) -> None:
    """Serves a router until SIGTERM, until the parent ends, or until the engine fails."""
    logging.config.dictConfig(log_config(options.log_level, options.log_format))
    secret = options.secret.encode()
    grammars = Grammars(launched.codec)
    worker = _worker(
        launched, options, partial(dial, options.router, secret), grammars, None if parent is None else _REDIAL_S
    )
    if parent is not None:
        parent.ended = worker.stop

    def on_signal(number: int, _frame: Any) -> None:
        worker.stop() if worker.leaving and number == signal.SIGINT else worker.leave()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    launched.node.start()
    try:
        worker.run()
    finally:
        launched.node.close(drain=False)
        grammars.close()


def serve_router(
    directory: Path,
    options: LaunchOptions,
    serving: ServeOptions,
    cluster: ClusterOptions,
    sock: socket.socket,
    listener: socket.socket,
    processes: Processes,
) -> None:
    """Serves clients on a bound socket over these processes and whoever joins, until a signal comes.

    `listener`: listens at the cluster's address already, so that workers may start meanwhile.
    """
    logging.config.dictConfig(log_config(serving.log_level, serving.log_format))
    router, reception = _router(directory, cluster)
    processes.joined = router.knows
    port = Port(cluster.address, cluster.secret.encode(), reception.serve, listener).start()
    if cluster.address.name[:1] != "\0":
        _LOG.info("workers join at %s; the link is authenticated, not encrypted", port.address)
    if not port.address.on_this_machine:
        _LOG.warning("%s can be reached from other machines: keep it in a private network", port.address)
    router.start()
    try:
        processes.await_all()
        _serve_clients(router, directory, options, serving, sock)
    finally:
        port.close()
        router.close()


def serve_local(
    directory: Path, options: LaunchOptions, serving: ServeOptions, cluster: ClusterOptions, sock: socket.socket
) -> None:
    """The same with every worker in this process: no memory but the engines' is shared, and all share its cores."""
    logging.config.dictConfig(log_config(serving.log_level, serving.log_format))
    router, reception = _router(directory, cluster)
    router.start()
    prefill: Role = "prefill"
    decode: Role = "decode"
    roles = [prefill] * cluster.prefill_workers + [decode] * cluster.decode_workers
    try:
        with LocalWorkers(directory, options, reception.serve, roles):
            try:
                _serve_clients(router, directory, options, serving, sock)
            finally:
                router.close()
    finally:
        router.close()


class LocalWorkers:
    """Workers in threads of this process, that hand over to each other. Use as a context: leaving it ends them."""

    def __init__(
        self, directory: Path, options: LaunchOptions, reception: Callable[[Link], None], roles: Sequence[Role]
    ) -> None:
        """`reception`: what serves the router's side of a link, for as long as that is open."""
        self._directory = directory
        self._options = options
        self._reception = reception
        self._roles = roles
        self._grammars: Grammars | None = None
        self._running: list[tuple[LaunchedWorker, Worker, threading.Thread]] = []

    def __enter__(self) -> LocalWorkers:
        hub, numbers = Hub(), Counter[str]()
        try:
            for role in self._roles:
                self._begin(WorkerOptions(role, f"{role}-{numbers[role]}", Address(), "", "local"), hub)
                numbers[role] += 1
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for _launched, worker, _thread in self._running:
            worker.stop()
        for launched, _worker, thread in self._running:
            thread.join()
            launched.node.close(drain=False)
        if self._grammars is not None:
            self._grammars.close()

    def _begin(self, chosen: WorkerOptions, hub: Hub) -> None:
        launched = launch_worker(self._directory, self._options, chosen, hub=hub)
        if self._grammars is None:
            self._grammars = Grammars(launched.codec)
        worker = _worker(launched, chosen, self._call, self._grammars, 0.0)
        launched.node.start()
        thread = threading.Thread(target=worker.run, name=f"dsv4c-{chosen.name}", daemon=True)
        thread.start()
        self._running.append((launched, worker, thread))

    def _call(self) -> Link:
        ours, theirs = pair()
        threading.Thread(target=self._reception, args=(theirs,), name="dsv4c-reception", daemon=True).start()
        return ours


def _router(directory: Path, cluster: ClusterOptions) -> tuple[Router, Reception]:
    manifest = load_manifest(directory)
    block = block_tokens(manifest.kv_groups)
    policy = Policy(cluster.max_queue, cluster.silence_s, budget_tokens=cluster.budget_tokens)
    router = Router(manifest, block, lambda tokens: block_hashes(tokens, block), policy)
    return router, Reception(router, layout_of(manifest).fields)


def _serve_clients(
    router: Router, directory: Path, options: LaunchOptions, serving: ServeOptions, sock: socket.socket
) -> None:
    manifest, codec = load_manifest(directory), codec_of(directory, options)
    grammars = Grammars(codec)
    name = options.model_name or directory.resolve().name
    app = app_over(codec, manifest, name, grammars, serving, router, serving.operations)
    app.state.server.metrics.registry.register(RouterCollector(router))
    try:
        serve_app(
            app, sock=sock, drain_s=serving.drain_s, drain_delay_s=serving.drain_delay_s, tls=serving.tls,
            log_level=serving.log_level, log_format=serving.log_format,
        )  # fmt: skip
    finally:
        grammars.close()


def _worker(
    launched: LaunchedWorker,
    options: WorkerOptions,
    call: Callable[[], Link],
    grammars: Grammars | None,
    patience_s: float | None,
) -> Worker:
    hello = hello_of(
        options.role, options.name, launched.layout, launched.engine, launched.transfer, launched.node.peer_id
    )
    return Worker(launched.node, hello, call, grammars=grammars, patience_s=patience_s, drain_s=options.drain_s)
