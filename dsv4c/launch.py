"""Artifact -> something that answers: weights, pools, engine, codec and server put together.

The one place where the spine hands its checkpoint reader and chat codec to the runtime, which knows neither.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dsv4c.artifact import Manifest, Program, load_manifest
from dsv4c.chat.codec import ChatCodec
from dsv4c.chat.prompts import Release
from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.checkpoint.source import WeightSource
from dsv4c.config import ModelConfig
from dsv4c.errors import ArtifactError, ConfigError, EngineError
from dsv4c.reference import plain_weights
from dsv4c.rehearsal import rehearse
from dsv4c.room import measured_room, plan_of
from dsv4c.runtime.contracts import ContractExecutor
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.dummy import DeviceDummies
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Binder
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import drafts_of, limits_for
from dsv4c.runtime.loader import check_host, load, load_device, weights_on
from dsv4c.runtime.logs import LogFormat
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.memory import MemoryPlan, Room
from dsv4c.runtime.operations import Operations
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes, snapshot_states
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import Speculation, predicted_cost
from dsv4c.runtime.tls import Tls
from dsv4c.runtime.weights import LoadProgress, LoadReport
from dsv4c.shadow import Difference, HostShadowExecutor, Shadow, ShadowExecutor

if TYPE_CHECKING:
    from dsv4c.runtime.grammar import Grammars
    from dsv4c.runtime.pools import Buffer
    from dsv4c.runtime.service import Engine as ServiceEngine

Progress = Callable[[str, int, int, str], None]
"""(phase, done, in all, name of the last); phases are `load` (in bytes), `warm up`, `capture`."""
PlanWatch = Callable[[MemoryPlan, Room, PoolSizes], None]
"""Told what serving will take, before anything is loaded."""
LoadWatch = Callable[[LoadReport], None]
"""Told what was loaded and how fast."""
PoolMemory = Callable[[Manifest, PoolSizes], "Buffer"]
"""Memory for pools of these sizes."""
ExecutorKind = Literal["graph", "eager", "contracts", "shadow"]
SNAPSHOTS = 2  # for each request that runs: the one it moves along, and one where its prompt or a shared prefix ended


@dataclass(frozen=True)
class LaunchOptions:
    """How to serve an artifact. None: what the artifact was compiled for, or what it holds."""

    weights: Path | None = None
    dummy_seed: int | None = None
    tokenizer: Path | None = None
    chat_release: Release | None = None
    """Whose reasoning efforts to speak. None: those of the checkpoint that the artifact was compiled from."""
    model_name: str | None = None
    max_requests: int | None = None
    max_context: int | None = None
    max_queue: int = 512
    kv_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    """Of the card's memory, the share to fill; what others hold counts. None: the plan's own."""
    prefix_cache: bool = True
    speculative_tokens: int | None = None
    """Most drafts of a request in a step; None: what the artifact was compiled for."""
    budget_tokens: int | None = None
    """Tokens beside those a request has for which there must be room to admit it; None: it may have to wait again."""
    threads: int | None = None
    device: int = 0
    """Which card serves a GPU artifact."""
    executor: ExecutorKind = "graph"
    """How a GPU artifact's segments run: captured; call by call; with every segment's contract checked; or with the
    reference of every call beside it."""
    breaks: tuple[str, ...] = ()
    """Scopes that stay out of the graphs, e.g. `L07.*`."""


@dataclass(frozen=True)
class ServeOptions:
    """How to serve what was launched: clients, TLS, the end, logs."""

    operations: Operations = field(default_factory=Operations)
    strict: bool = False
    """Unknown fields of requests are errors."""
    default_thinking: bool = False
    tls: Tls | None = None
    drain_s: float = 30.0
    drain_delay_s: float = 0.0
    log_level: str = "info"
    log_format: LogFormat = "text"


@dataclass(frozen=True)
class Launched:
    """An engine that is ready, its codec, and the name clients use."""

    engine: Engine
    codec: ChatCodec
    manifest: Manifest
    model_name: str


def launch(
    directory: Path,
    options: LaunchOptions,
    progress: Progress | None = None,
    planned: PlanWatch | None = None,
    loaded: LoadWatch | None = None,
    memory: PoolMemory | None = None,
) -> Launched:
    """Loads an artifact and its weights. Raises InputErrors that name what is missing, does not match or not fit."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    manifest = load_manifest(directory)
    check_host(manifest, options.device)
    codec = codec_of(directory, options)
    if codec.vocab_size > manifest.vocab_size:
        raise ArtifactError(
            f"the tokenizer has {codec.vocab_size} tokens, the model {manifest.vocab_size}",
            hint="give the model's own with `--tokenizer`",
        )
    engine = launch_engine(directory, manifest, options, codec.eos_token_ids, progress, planned, loaded, memory)
    return Launched(engine, codec, manifest, options.model_name or directory.resolve().name)


def launch_engine(
    directory: Path,
    manifest: Manifest,
    options: LaunchOptions,
    eos_token_ids: Sequence[int] = (),
    progress: Progress | None = None,
    planned: PlanWatch | None = None,
    loaded: LoadWatch | None = None,
    memory: PoolMemory | None = None,
) -> Engine:
    """The engine alone: weights loaded, pools allocated, graphs captured. Raises InputErrors as `launch` does.

    `memory`: where the pools of an engine on the host shall lie.
    """
    if manifest.target == "cpu" and options.device:
        raise ConfigError("`--device` is for GPU artifacts, this is for `cpu`", hint="leave it out")
    plan = plan_of(directory, manifest)
    room = measured_room(manifest.target, options.gpu_memory_utilization, options.device)
    requests, context = options.max_requests or plan.bounds.requests, options.max_context or plan.max_context
    snapshots = SNAPSHOTS if options.prefix_cache else 0
    sizes = plan.reserve(room, requests, context, options.kv_memory_bytes, snapshots)
    if planned:
        planned(plan, room, sizes)
    source = _source(directory, manifest, options)
    drafts = options.speculative_tokens
    limits = Limits(
        requests, plan.bounds.tokens, options.max_queue, plan.bounds.rows,
        speculative_tokens=drafts_of(manifest) if drafts is None else drafts,
        mixed_drafts=manifest.target == "cpu", late_masks=manifest.target != "cpu",
        prefix_cache=options.prefix_cache, budget_tokens=options.budget_tokens,
    )  # fmt: skip
    if manifest.target == "cpu":
        if options.executor not in ("graph", "shadow") or options.breaks:
            raise ConfigError(
                "`--executor`, `--break` and `--debug-contracts` are for GPU artifacts, this is for `cpu`",
                hint="`dsv4c compile --target sm_90a` makes one",
            )
        make = partial(_host_shadow, manifest) if options.executor == "shadow" else ArtifactExecutor
        executor = load(
            directory, source, sizes, _bytes_of(progress), manifest=manifest, report=loaded, make=make,
            memory=None if memory is None else memory(manifest, sizes),
        )  # fmt: skip
        engine = Engine.for_manifest(executor, manifest, sizes, limits=limits, eos_token_ids=eos_token_ids)
    else:
        runner, pool = _device_runner(directory, manifest, source, sizes, options, progress, loaded)
        limits = limits_for(manifest, sizes, limits)
        speculation = Speculation(limits.speculative_tokens, predicted_cost(manifest.programs.values()))
        engine = Engine(
            runner, pool=pool, vocab_size=manifest.vocab_size, limits=limits, eos_token_ids=eos_token_ids,
            speculation=speculation,
        )  # fmt: skip
    rehearse(engine)
    return engine.renewed()


def _device_runner(
    directory: Path,
    manifest: Manifest,
    source: WeightSource | DeviceDummies,
    sizes: PoolSizes,
    options: LaunchOptions,
    progress: Progress | None,
    loaded: LoadWatch | None,
) -> tuple[DeviceRunner, KVPool]:
    """Loads, warms up and captures; everything that serving needs is there when it returns."""
    device = torch.device("cuda", options.device)
    weights, report = weights_on(device, manifest, source, _bytes_of(progress))
    if loaded:
        loaded(report)
    make = _executor_kind(options, manifest, weights)
    executor = load_device(directory, manifest, weights, sizes, device, options.breaks, make)
    executor.warm_up(_of(progress, "warm up"))
    if options.executor == "graph":
        executor.capture(_of(progress, "capture"))
    pool = KVPool(manifest.kv_groups, sizes, track=True)
    copied = snapshot_states(manifest.state_groups, manifest.kv_groups)
    states = [state.name for group in copied for state in group.pools]
    return DeviceRunner(executor, pool, vocab_size=manifest.vocab_size, states=states), pool


def _executor_kind(
    options: LaunchOptions, manifest: Manifest, weights: Mapping[str, Tensor]
) -> Callable[..., GraphExecutor]:
    """What makes the executor that the options ask for. Shadows hold the weights that have a layout a second time."""
    if options.executor == "contracts":
        return partial(ContractExecutor, manifest=manifest)
    if options.executor == "shadow":
        shadow = Shadow(manifest, plain_weights(manifest, weights), _report_difference)
        return partial(ShadowExecutor, shadow=shadow)
    return GraphExecutor


def _host_shadow(
    manifest: Manifest, program: Program, kernels: Binder, weights: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> ArtifactExecutor:
    shadow = Shadow(manifest, plain_weights(manifest, weights), _report_difference)
    return HostShadowExecutor(program, kernels, weights, states, shadow=shadow)


def _report_difference(found: Difference) -> None:
    logging.getLogger("dsv4c").error("%s", found)


def _of(progress: Progress | None, phase: str) -> Callable[[int, int, str], None] | None:
    """The progress of one phase."""
    return None if progress is None else lambda done, total, name: progress(phase, done, total, name)


def _bytes_of(progress: Progress | None) -> Callable[[LoadProgress], None] | None:
    """The progress of loading."""
    if progress is None:
        return None
    return lambda now: progress("load", now.bytes, now.num_bytes, f"{now.weights:,}/{now.num_weights:,} {now.name}")


def answer(launched: Launched, prompt: str, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The completion of one prompt, piece by piece."""
    ids = launched.codec.encode(prompt)
    if not ids:
        raise ConfigError("the prompt is empty", hint="give `--prompt` some text")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    request = Request("prompt", ids, params)
    launched.engine.submit(request)
    text = launched.codec.detokenizer()
    while launched.engine.has_work:
        for event in launched.engine.step():
            if event.end is not None and event.end.error is not None:
                raise EngineError(event.end.error.message, hint=event.end.error.hint)
            stop = event.end.stop_token if event.end is not None else None
            yield "".join(text.push(token) for token in event.tokens if token != stop)
    yield text.flush()


def serve(launched: Launched, sock: socket.socket, options: ServeOptions | None = None) -> None:
    """Serves on a bound socket until a signal comes, then lets requests in flight finish."""
    # a machine that only measures needs no web framework
    from dsv4c.rehearsal import rehearse_app
    from dsv4c.runtime.grammar import Grammars
    from dsv4c.runtime.outputs import ServedEngine
    from dsv4c.runtime.serve import serve as serve_app

    chosen = options or ServeOptions()
    grammars = Grammars(launched.codec)
    app_of = partial(app_over, launched.codec, launched.manifest, launched.model_name, grammars, chosen)
    trial = EngineLoop(launched.engine).start()
    try:
        rehearse_app(app_of(ServedEngine(trial), Operations(observers=())), launched.model_name)
    finally:
        trial.close(drain=False)
    loop = EngineLoop(launched.engine.renewed()).start()
    app = app_of(ServedEngine(loop), chosen.operations)
    try:
        serve_app(
            app, sock=sock, drain_s=chosen.drain_s, drain_delay_s=chosen.drain_delay_s, tls=chosen.tls,
            log_level=chosen.log_level, log_format=chosen.log_format,
        )  # fmt: skip
    finally:
        loop.close(drain=False)
        grammars.close()


def app_over(
    codec: ChatCodec,
    manifest: Manifest,
    model_name: str,
    grammars: Grammars | None,
    options: ServeOptions,
    engine: ServiceEngine,
    operations: Operations,
) -> Any:
    """The application for an engine, or what looks like one."""
    from dsv4c.runtime.app import create_app

    return create_app(
        engine, codec, model_name, default_thinking=options.default_thinking, strict=options.strict,
        operations=operations, fingerprint=f"{manifest.target}-{manifest.model_sha256[:12]}", grammars=grammars,
    )  # fmt: skip


def codec_of(directory: Path, options: LaunchOptions) -> ChatCodec:
    folder = options.tokenizer or directory / "tokenizer"
    if options.tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"`{directory}` holds no tokenizer", hint="give one with `--tokenizer FILE`")
    return ChatCodec.from_folder(folder, release=options.chat_release)


def _source(directory: Path, manifest: Manifest, options: LaunchOptions) -> WeightSource | DeviceDummies:
    if options.dummy_seed is not None:
        if options.weights is not None:
            raise ConfigError("`--weights` and `--load-format dummy` exclude each other")
        if manifest.target != "cpu":
            return DeviceDummies(options.dummy_seed)
        return DummySource(ModelConfig.from_dict(manifest.model), options.dummy_seed)
    if options.weights is None and not manifest.embedded_weights:
        raise ArtifactError(
            f"`{directory}` holds no weights",
            hint="give a checkpoint with `--weights FOLDER`, or `--load-format dummy`",
        )
    checkpoint = Checkpoint(options.weights or directory / "weights")
    _check_model(manifest, checkpoint.config)
    return checkpoint


def _check_model(manifest: Manifest, config: ModelConfig) -> None:
    """Raises ArtifactError with the first key in which the checkpoint is another model than the artifact's.

    An artifact of a model's first layers takes the whole model's checkpoint, of which it reads these layers.
    """
    compiled = ModelConfig.from_dict(manifest.model)
    if manifest.truncated_from == config.num_hidden_layers:
        config = config.truncated(compiled.num_hidden_layers)
    if compiled.nvfp4_layers != config.nvfp4_layers:
        raise ArtifactError(
            f"the artifact was compiled for experts in {compiled.expert_formats}, "
            f"the weights have {config.expert_formats}",
            hint="compile the artifact from this checkpoint",
        )
    expected = compiled.to_dict()
    for key, found in config.to_dict().items():
        if expected[key] != found:
            raise ArtifactError(
                f"the artifact was compiled for `{key}` {json.dumps(expected[key])}, the weights have "
                f"{json.dumps(found)}",
                hint="compile the artifact from this checkpoint",
            )
