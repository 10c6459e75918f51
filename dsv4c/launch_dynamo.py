"""Launched artifact -> a worker of NVIDIA Dynamo: the folder that the frontend reads, the engine's card, the end."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsv4c.artifact import Manifest
from dsv4c.launch import Launched
from dsv4c.runtime.dynamo.version import check_installed
from dsv4c.runtime.grammar import Grammars
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.poolsizes import block_tokens

MODEL_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class DynamoOptions:
    """How the worker serves."""

    role: str = "both"
    namespace: str = "dynamo"
    component: str | None = None
    discovery: str = "file"
    request_plane: str = "tcp"
    event_plane: str = "zmq"
    kv_events: bool = True
    default_thinking: bool = False
    drain_s: float = 30.0
    stream_interval: int = 1


def serve_dynamo(launched: Launched, tokenizer: Path, options: DynamoOptions) -> None:
    """Serves until a signal comes. `tokenizer`: the folder it was read from. Raises ConfigError without Dynamo."""
    check_installed()
    # there only where Dynamo is installed
    from dsv4c.runtime.dynamo.engine import Card, DynamoEngine
    from dsv4c.runtime.dynamo.worker import WorkerOptions, run, worker_config

    engine, manifest = launched.engine, launched.manifest
    grammars = Grammars(launched.codec) if manifest.target == "cpu" else None  # masks are applied on the host
    block = block_tokens(engine.pool.groups)
    with tempfile.TemporaryDirectory(prefix="dsv4c-dynamo-") as folder:
        write_model_folder(Path(folder), tokenizer, manifest, engine.max_context, launched.codec.eos_token_ids)
        loop = EngineLoop(engine).start()
        card = Card(
            model=folder,
            served_model_name=launched.model_name,
            bos_token_id=int(manifest.model["bos_token_id"]),
            block_tokens=block,
            total_blocks=total_blocks(launched),
            max_requests=engine.scheduler.limits.max_requests,
            max_step_tokens=engine.scheduler.limits.max_step_tokens,
        )
        worker = DynamoEngine(
            loop, launched.codec, card, grammars=grammars, drain_s=options.drain_s,
            stream_interval=options.stream_interval,
        )  # fmt: skip
        chosen = WorkerOptions(
            options.role, options.namespace, options.component, options.discovery, options.request_plane,
            options.event_plane, options.kv_events, options.default_thinking,
        )  # fmt: skip
        try:
            run(worker, worker_config(folder, launched.model_name, chosen))
        finally:
            loop.close(drain=False)


def total_blocks(launched: Launched) -> int:
    """Blocks of the prefix cache that the pools without a horizon hold; the scarcest of them counts."""
    pool = launched.engine.pool
    block, pages = block_tokens(pool.groups), pool.total_pages()
    return min(pages[g.name] * g.page_tokens // block for g in pool.groups if g.horizon is None)


def write_model_folder(
    folder: Path, tokenizer: Path, manifest: Manifest, max_context: int, eos_token_ids: tuple[int, ...]
) -> None:
    """What the frontend reads of a model: its kind, its context, its tokenizer. No weights."""
    for name in MODEL_FILES:
        if (tokenizer / name).is_file():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    model = dict(manifest.model)
    config = {
        "model_type": model.get("model_type", "deepseek_v4"),
        "architectures": model.get("architectures", ["DeepseekV4ForCausalLM"]),
        "vocab_size": manifest.vocab_size,
        "bos_token_id": model["bos_token_id"],
        "eos_token_id": list(eos_token_ids) if len(eos_token_ids) > 1 else eos_token_ids[0],
        "max_position_embeddings": max_context,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
