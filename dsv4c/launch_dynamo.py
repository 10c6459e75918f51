"""Launched artifact -> a worker of NVIDIA Dynamo: the folder that the frontend reads, the engine's card, the end."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv4c.artifact import Manifest
from dsv4c.chat.prompts import Release
from dsv4c.chat.template import chat_template
from dsv4c.errors import ConfigError
from dsv4c.launch import Launched
from dsv4c.runtime.dynamo.figures import TransferCollector
from dsv4c.runtime.dynamo.publish import Publishing
from dsv4c.runtime.dynamo.rendezvous import Rendezvous
from dsv4c.runtime.dynamo.serving import Role, Serving
from dsv4c.runtime.dynamo.version import check_installed
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.grammar import Grammars
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.poolsizes import block_tokens
from dsv4c.runtime.transfer.layout import weights_sha256
from dsv4c.runtime.transfer.nixl import nixl_node
from dsv4c.runtime.transfer.node import Node

MODEL_TYPE = "dsv4c"
"""Dynamo's frontend knows nothing of it, so it takes the template: its own text of `deepseek_v4` is one release's."""
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class DynamoOptions:
    """How the worker serves."""

    role: Role = "both"
    namespace: str = "dynamo"
    component: str | None = None
    discovery: str = "file"
    request_plane: str = "tcp"
    event_plane: str = "zmq"
    kv_events: bool = True
    default_thinking: bool = False
    drain_s: float = 30.0
    stream_interval: int = 1
    hand_over: Literal["completed", "bootstrap"] = "completed"
    host: str = "127.0.0.1"
    """Of a prefill worker: where it listens for decode workers."""
    advertise: str | None = None
    """Where they find it; None: `host`."""
    bootstrap_port: int = 0
    nixl_devices: str = "lo"
    """UCX's network devices."""
    lease_ttl_s: float = 30.0
    """How long a prefill that is done waits for its reader."""
    transfer_timeout_s: float = 10.0
    """How long nothing may come from a prefill worker."""


def serve_dynamo(launched: Launched, tokenizer: Path, options: DynamoOptions) -> None:
    """Serves until a signal comes. `tokenizer`: the folder it was read from. Raises ConfigError without Dynamo."""
    check_installed()
    # there only where Dynamo is installed
    from dsv4c.runtime.dynamo.engine import Card, DynamoEngine
    from dsv4c.runtime.dynamo.worker import WorkerOptions, run, worker_config

    engine, manifest, codec = launched.engine, launched.manifest, launched.codec
    grammars = Grammars(codec)
    folder = model_folder(tokenizer, manifest, engine.max_context, codec.eos_token_ids, codec.release)
    meets = options.role == "prefill" and options.hand_over == "bootstrap"
    card = Card(
        model=str(folder),
        served_model_name=launched.model_name,
        bos_token_id=int(manifest.model["bos_token_id"]),
        block_tokens=block_tokens(engine.pool.groups),
        total_blocks=total_blocks(launched),
        max_requests=engine.scheduler.limits.max_requests,
        max_step_tokens=engine.scheduler.limits.max_step_tokens,
        bootstrap=(options.host, options.advertise or options.host, options.bootstrap_port) if meets else None,
    )
    node = node_of(launched, options).start()
    try:
        metrics = Metrics(node.loop.stats, launched.model_name)
        if options.role != "both":
            metrics.registry.register(TransferCollector(node.stats))
        publishing = Publishing(node.loop, card.block_tokens)
        rendezvous = Rendezvous() if meets else None
        serving = Serving(
            node, codec, metrics, publishing,
            role=options.role, grammars=grammars, rendezvous=rendezvous, stream_interval=options.stream_interval,
        )  # fmt: skip
        worker = DynamoEngine(node, serving, card, metrics, publishing, rendezvous, drain_s=options.drain_s)
        chosen = WorkerOptions(
            options.role, options.namespace, options.component, options.discovery, options.request_plane,
            options.event_plane, options.kv_events, options.default_thinking,
        )  # fmt: skip
        run(worker, worker_config(card.model, card.served_model_name, chosen))
    finally:
        node.close(drain=False)
        grammars.close()


def node_of(launched: Launched, options: DynamoOptions) -> Node:
    """The engine as a node: of both roles it computes alone, of one it moves state through NIXL."""
    if options.role == "both":
        return Node(launched.engine)
    executor: ArtifactExecutor | GraphExecutor = launched.engine.runner.executor  # type: ignore[attr-defined]
    return nixl_node(
        launched.engine, launched.manifest, executor.states, extra={"weights": weights_sha256(executor.weights)},
        devices=options.nixl_devices, ttl_s=options.lease_ttl_s, deadline_s=options.transfer_timeout_s,
    )  # fmt: skip


def total_blocks(launched: Launched) -> int:
    """Blocks of the prefix cache that the pools without a horizon hold; the scarcest of them counts."""
    pool = launched.engine.pool
    block, pages = block_tokens(pool.groups), pool.total_pages()
    return min(pages[g.name] * g.page_tokens // block for g in pool.groups if g.horizon is None)


def model_folder(
    tokenizer: Path, manifest: Manifest, max_context: int, eos_token_ids: tuple[int, ...], release: Release
) -> Path:
    """The folder of what the frontend reads of a model: its kind, its context, its tokenizer; no weights.

    Its name follows from its content, since workers of one model register with equal cards or are refused, and a card
    names the folder. It stays for other workers. Raises ConfigError if somebody else's is in its place.
    """
    model = manifest.model
    config = {
        "model_type": MODEL_TYPE,
        "architectures": model.get("architectures", ["DeepseekV4ForCausalLM"]),
        "vocab_size": manifest.vocab_size,
        "bos_token_id": model["bos_token_id"],
        "eos_token_id": list(eos_token_ids) if len(eos_token_ids) > 1 else eos_token_ids[0],
        "max_position_embeddings": max_context,
    }
    files = {name: (tokenizer / name).read_bytes() for name in MODEL_FILES if (tokenizer / name).is_file()}
    files["chat_template.jinja"] = chat_template(release).encode()
    files["config.json"] = json.dumps(config, sort_keys=True).encode()
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dsv4c-dynamo-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"`{folder}` belongs to somebody else", hint="remove it")
    for name, data in files.items():
        handle, part = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(part).replace(folder / name)  # whole, whoever else writes the same
    return folder
