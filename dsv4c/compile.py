"""The compiler's driver: capture -> passes -> plan -> emit -> artifact. Reads as a table of contents.

`lower` and `plan_artifact` need no weights; `compile_artifact` does all of it and writes the directory. The same
inputs give the same bytes, but for the kernels of a toolchain that does not.
"""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from dsv4c import __version__, artifact
from dsv4c.buckets import gpu_buckets
from dsv4c.capturing import capture, step_inputs
from dsv4c.chat.release import release_of, write_release
from dsv4c.config import ModelConfig, StateLayout, Target
from dsv4c.drafting import block_drafter, block_plans
from dsv4c.errors import ArtifactError, ConfigError, ScheduleError
from dsv4c.facts import COUNTS, LAST_TOKENS, LENGTH, PENDING
from dsv4c.irfiles import StageWriter
from dsv4c.model.state import group_ratios, min_columns, page_tokens, state_tensors
from dsv4c.ops import VIEWS, Op, TensorType
from dsv4c.passes import default_pipeline
from dsv4c.passes.append_drafts import CHAIN_INPUTS, DRAFT_INPUTS, graph_name
from dsv4c.passes.append_sampling import ROW_INPUTS, shared_inputs
from dsv4c.pipeline import Pipeline, Step
from dsv4c.plan import Plan, plan
from dsv4c.program import Program
from dsv4c.schedules._gpu import ptxas_version
from dsv4c.schedules._schedule import Progress, Schedule
from dsv4c.schedules._toolchain import check_toolchain
from dsv4c.schedules.emit import emit, records
from dsv4c.schedules.select import SCHEDULES
from dsv4c.weights import stored_formats

MAX_DRAFTS = 3  # a step's tokens of one request then complete at most one window of 4
DRAFT_RING = 16  # rows: an entry's tokens stay while 3 drafts are overwritten, and until a snapshot 8 tokens later


@dataclass(frozen=True)
class Options:
    """What the user chooses when compiling. Counts are upper bounds that the memory plan is made for."""

    max_context: int = 4096
    """Tokens of the longest request."""
    max_tokens: int = 512
    """Tokens of one step: the chunk size of prefill and the most requests that decode together."""
    max_requests: int = 64
    """Requests of one step."""
    fake_quant: bool = False
    """Whether KV entries are fake-quantised as in training."""
    speculative_tokens: int = 0
    """Most drafts of the MTP block that a step verifies for a request; 0 compiles no drafter."""

    def layout(self) -> StateLayout:
        """Rings are longer by what drafts may overwrite, and by what a snapshot may come late."""
        return StateLayout(extra_ring=DRAFT_RING if self.speculative_tokens else 0)


def usual_options(config: ModelConfig, target: Target) -> Options:
    """What is chosen where nobody says otherwise: contexts of 128K, and steps that suit the target."""
    tokens, requests = (512, 64) if target.arch == "cpu" else (8192, 256)
    return Options(min(config.max_position_embeddings, 131072), tokens, requests)


def lower(
    config: ModelConfig,
    options: Options,
    watch: Callable[[Step], None] | None = None,
    arch: str = "cpu",
    pipeline: Pipeline | None = None,
) -> Program:
    """The lowered program of a model: capture, then every pass of `pipeline` (by default that of `arch`).

    `config`: the model; of `options` what shapes the program; `arch`: of a target; `watch` is called after every pass.
    Raises PassError where a pass breaks its contract.
    """
    drafts = options.speculative_tokens
    program = capture(
        config, options.layout(), fake_quant=options.fake_quant, drafter=drafts > 0 or config.drafter != "dspark"
    )
    pipeline = pipeline or default_pipeline(stored_formats(config), arch, drafts, options.max_context)
    for step in pipeline.steps(program):
        program = step.after
        if watch:
            watch(step)
    return program


def largest_symbols(config: ModelConfig, layout: StateLayout, options: Options) -> dict[str, int]:
    """The largest value of every symbol that a buffer of the `step` program may depend on."""
    tokens, requests = options.max_tokens, options.max_requests
    out = {**state_symbols(config, layout, options), "T": tokens, "S": tokens, "R": requests}
    for ratio in config.ratios:
        out[f"E_{ratio}"] = min(tokens, tokens // ratio + requests)
    return out


def state_symbols(config: ModelConfig, layout: StateLayout, options: Options) -> dict[str, int]:
    """Sizes of page tables, pools and slots; per-request inputs have a row for every slot."""
    requests = options.max_requests
    out = {"R": requests + 1, "Z": requests + 1}
    for group, ratio in group_ratios(config).items():
        columns = max(min_columns(config, layout, group), math.ceil(options.max_context / page_tokens(layout, ratio)))
        out[f"P_{group}"] = columns
        out[f"N_{group}"] = (1 + requests * columns) * layout.entries_per_page(ratio)
    return out


def artifact_inputs(config: ModelConfig, layout: StateLayout) -> tuple[artifact.Input, ...]:
    """The step's inputs as the engine must make them."""
    kinds = {
        "request_rows": "request_rows", "seq_starts": "seq_starts", "seq_ends": "seq_ends",
        "state_slots": "state_slots", "token_ids": "token_ids", "positions": "positions", "logit_rows": "logit_rows",
    }  # fmt: skip
    out = []
    for name, kind in step_inputs(config).items():
        if name.startswith("pages_"):
            group = name.removeprefix("pages_")
            least = min_columns(config, layout, group)
            out.append(artifact.Input(name, "page_table", kind.shape, group=group, min_columns=least))
        elif name.startswith("ends_"):
            ratio = int(name.removeprefix("ends_"))
            out.append(artifact.Input(name, "window_ends", kind.shape, ratio=ratio))
        else:
            out.append(artifact.Input(name, kinds[name], kind.shape))  # type: ignore[arg-type]
    return tuple(out)


def draft_inputs(config: ModelConfig) -> tuple[artifact.Input, ...]:
    """What one pass of the MTP block asks for besides."""
    streams = ("T", config.hc_mult, config.hidden_size)
    return (
        artifact.Input("streams", "hidden", streams, dtype="float32"),
        artifact.Input("next_ids", "next_ids", ("T",)),
    )


def sampling_inputs(vocab_size: int, drafts: int = 0) -> tuple[artifact.Input, ...]:
    """What a program that samples (and verifies drafts) asks for besides. What most steps lack, edits and masks, comes
    last.
    """
    sizes: list[tuple[str, Mapping[str, str]]] = [("S", ROW_INPUTS)]
    if drafts:
        sizes = [("T", {"next_ids": "int64"}), ("S", CHAIN_INPUTS), ("D", DRAFT_INPUTS)]
    kinds = {name: TensorType((size,), dtype) for size, inputs in sizes for name, dtype in inputs.items()}
    return tuple(
        artifact.Input(name, name, kind.shape, dtype=kind.dtype)  # type: ignore[arg-type]
        for name, kind in {**kinds, **shared_inputs(vocab_size)}.items()
    )


def kv_groups(
    program: Program, names: set[str]
) -> tuple[tuple[artifact.KVGroup, ...], tuple[artifact.StateGroup, ...]]:
    """The pools that the program reads, by group, and its per-request state, as its passes store them."""
    config, layout = program.config, program.layout
    types = {n.meta["value"].name: n.meta["type"] for n in program.nodes() if n.op == "placeholder"}
    tensors = [(t, _pool(t.name, types[t.name])) for t in state_tensors(config, layout) if t.name in names]
    groups = []
    for group, ratio in group_ratios(config).items():
        pools = tuple(pool for t, pool in tensors if t.group == group)
        horizon = config.sliding_window if ratio == 0 else None
        groups.append(artifact.KVGroup(group, max(ratio, 1), page_tokens(layout, ratio), horizon, pools))
    states = []
    for ratio, overlap in sorted({(t.ratio, t.overlap) for t, _ in tensors if t.group is None}):
        rings = tuple(pool for t, pool in tensors if t.group is None and (t.ratio, t.overlap) == (ratio, overlap))
        # where windows overlap, the next entry pools the last one's tokens too: such rings are never empty
        states.append(artifact.StateGroup(f"compressor_{ratio}", rings, None if overlap else ratio))
    sampling = tuple(_pool(name, types[name]) for name in (COUNTS, LAST_TOKENS, PENDING, LENGTH) if name in names)
    if sampling:  # the host knows all of it once a request is resumed
        states.append(artifact.StateGroup("sampling", sampling, 1))
    return tuple(groups), tuple(states)


def _pool(name: str, kind: TensorType) -> artifact.Pool:
    return artifact.Pool(name, tuple(int(s) for s in kind.shape[1:]), kind.dtype)


def plan_artifact(program: Program, target: Target, options: Options, schedules: Sequence[Schedule] = ()) -> Plan:
    """Schedules, buffers and segments: of `step` for a CPU, of every bucket for a GPU.

    `schedules` are to choose from besides dsv4c's own. Raises ScheduleError if none accepts an op.
    """
    choose_from = (*SCHEDULES, *schedules)
    _check_ops(program, target.arch, choose_from)
    config, layout = program.config, program.layout
    inputs, drafts = artifact_inputs(config, layout), options.speculative_tokens
    if target.arch == "cpu":
        symbols = largest_symbols(config, layout, options)
        step = plan(program, "step", "step", "mixed", target.arch, symbols, inputs, choose_from, hidden=drafts > 0)
        if not drafts:
            return step
        if config.drafter == "dspark":
            return Plan.joined((step, *block_plans(program, target.arch, symbols, inputs)))
        inputs = (*inputs, *draft_inputs(config))
        block = plan(program, "mtp", "mtp", "draft", target.arch, symbols, inputs, choose_from, hidden=True)
        return Plan.joined((step, block))
    inputs = (*inputs, *sampling_inputs(config.vocab_size, drafts))
    shared = state_symbols(config, layout, options)
    return Plan.joined(
        plan(
            program, graph_name(bucket.drafts), bucket.name, bucket.phase, target.arch,
            bucket.symbols(config, shared), inputs, choose_from,
        )
        for bucket in gpu_buckets(options.max_tokens, options.max_requests, drafts)
    )  # fmt: skip


def _check_ops(program: Program, arch: str, schedules: Sequence[Schedule]) -> None:
    """Raises ScheduleError naming every op of the program for which this target has no schedule at all."""
    known = {schedule.op for schedule in schedules if arch in schedule.targets}
    ops = {node.target.name for node in program.nodes() if isinstance(node.target, Op)} - VIEWS
    missing = sorted(ops - known) if "*" not in known else []
    if not missing:
        return
    hint = "nothing is computed by a reference instead; give schedules of your own, or take another target"
    if missing == ["experts_nvfp4"]:
        hint = "NVFP4 experts are for sm_100a, sm_103a and cpu; elsewhere take the MXFP4 checkpoint"
    raise ScheduleError(
        f"target `{arch}` has no schedule for {len(missing)} ops of this model: `{'`, `'.join(missing)}`", hint=hint
    )


def numerics(program: Program, options: Options) -> tuple[str, ...]:
    """What makes results differ from the plain float32 model."""
    out = [f"pass {r.name}: {r.why} (to {r.tolerance:.2g})" for r in program.history if not r.exact and r.rewrites]
    if options.fake_quant:
        out.append("KV entries and index vectors are fake-quantised (FP8 groups of 64, FP4 groups of 32)")
    if "state-packed" not in program.facts:
        out.append("activations and state are float32; FP8 and FP4 weights are widened exactly when loaded")
        if program.config.nvfp4_layers:
            out.append("NVFP4 weights are widened with one rounding, their input_scale is not used")
    return tuple(out)


def planned_manifest(program: Program, target: Target, options: Options) -> artifact.Manifest:
    """What the artifact of a lowered program would say, with no kernel built: for references and for planning."""
    return manifest_of_plan(program, plan_artifact(program, target, options), target, options)


def manifest_of_plan(program: Program, made: Plan, target: Target, options: Options) -> artifact.Manifest:
    """The same of a program that is planned already."""
    return _manifest(program, made, records(made.choices), target, options, {}, embedded=False, truncated_from=None)


def compile_artifact(
    config: ModelConfig,
    target: Target,
    output: Path,
    options: Options,
    *,
    checkpoint: Path | None = None,
    truncated_from: int | None = None,
    cache: Path | None = None,
    watch: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
    pipeline: Pipeline | None = None,
    schedules: Sequence[Schedule] = (),
) -> artifact.Manifest:
    """Compiles `config` for `target` into the directory `output`, with the files of `checkpoint` if one is given.

    `options`: the largest step; `pipeline`: other passes than the target's default; `schedules`: more to choose from.
    `truncated_from`: layers of the model if `config` is only its first ones (`ModelConfig.truncated`).
    `cache`: a directory of kernels built before (by default `.dsv4c-cache` beside `output`). `watch` is called after
    every pass, `progress` with kernels built and kernels in all.
    The directory appears whole or not at all: it is written beside `output` and moved into place. Raises ConfigError
    for options out of range, ArtifactError if `output` holds something else than an artifact.
    """
    _check_options(config, options, output)
    if target.arch != "cpu":
        check_toolchain(target.arch)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        directory = Path(scratch) / "artifact"
        (directory / "kernels").mkdir(parents=True)
        stages = StageWriter(directory)
        program = lower(config, options, _both(stages.watch, watch), target.arch, pipeline)
        made = plan_artifact(program, target, options, schedules)
        kernels = emit(made.choices, directory, cache or output.parent / ".dsv4c-cache", progress, arch=target.arch)
        tools, embedded = _tools(target), checkpoint is not None
        manifest = _manifest(
            program, made, kernels, target, options, tools, embedded=embedded, truncated_from=truncated_from
        )
        stages.finish(made.sources)
        if checkpoint is not None:
            _embed(checkpoint, directory)
        artifact.save_manifest(manifest, directory)
        if output.exists():
            shutil.rmtree(output)
        directory.rename(output)
    return manifest


def _both(first: Callable[[Step], None], second: Callable[[Step], None] | None) -> Callable[[Step], None]:
    def watch(step: Step) -> None:
        first(step)
        if second is not None:
            second(step)

    return watch


def _check_options(config: ModelConfig, options: Options, output: Path) -> None:
    if not 1 <= options.max_context <= config.max_position_embeddings:
        raise ConfigError(f"max context {options.max_context} is not within 1 and {config.max_position_embeddings}")
    if options.max_tokens < 1 or options.max_requests < 1:
        raise ConfigError("max tokens and max requests must be at least 1")
    if options.max_requests > options.max_tokens:
        raise ConfigError(
            f"max requests {options.max_requests} is larger than max tokens {options.max_tokens}",
            hint="every decoding request is one token of a step",
        )
    most = MAX_DRAFTS if config.dspark is None else config.dspark.block_size
    if not 0 <= options.speculative_tokens <= most:
        raise ConfigError(
            f"`--speculative-tokens` is {options.speculative_tokens}, it can be 0 to {most}",
            hint="the MTP block drafts one token a pass, a DSpark drafter `dspark_block_size` at once",
        )
    if options.speculative_tokens and config.drafter is None:
        raise ConfigError(
            "`--speculative-tokens` needs an MTP block, the model has none",
            hint="`num_nextn_predict_layers` is 0, or `compress_ratios` has no entry for it",
        )
    if options.max_requests * (1 + options.speculative_tokens) > options.max_tokens:
        raise ConfigError(
            f"{options.max_requests} requests with {options.speculative_tokens} drafts each are more than max tokens "
            f"{options.max_tokens}",
            hint="lower `--max-requests` or `--speculative-tokens`, or raise `--max-tokens`",
        )
    if output.exists() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        raise ArtifactError(f"`{output}` exists and is not an artifact", hint="choose another folder, or remove it")


def _manifest(
    program: Program,
    made: Plan,
    kernels: Mapping[str, artifact.Kernel],
    target: Target,
    options: Options,
    tools: Mapping[str, str],
    *,
    embedded: bool,
    truncated_from: int | None,
) -> artifact.Manifest:
    groups, states = kv_groups(program, made.states)
    model = program.config.to_dict()
    return artifact.Manifest(
        format_version=artifact.FORMAT_VERSION,
        model=model,
        model_sha256=artifact.config_sha256(model),
        target=target.arch,
        isa=torch.backends.cpu.get_cpu_capability().lower() if target.arch == "cpu" else target.arch,
        compute_dtype="float32" if target.arch == "cpu" else "bfloat16",
        max_context=options.max_context,
        vocab_size=program.config.vocab_size,
        tools={**tools, "dsv4c": __version__, "python": platform.python_version(), "torch": torch.__version__},
        passes=program.history,
        numerics=numerics(program, options),
        kernels=dict(sorted(kernels.items())),
        programs=made.programs,
        kv_groups=groups,
        state_groups=states,
        weights=tuple(made.weights[name] for name in sorted(made.weights)),
        embedded_weights=embedded,
        truncated_from=truncated_from,
        drafter=_drafter(program.config, options.speculative_tokens),
    )


def _drafter(config: ModelConfig, tokens: int) -> artifact.Drafter | None:
    if not tokens:
        return None
    return block_drafter(config, tokens) if config.drafter == "dspark" else artifact.Drafter("mtp", tokens)


def _tools(target: Target) -> dict[str, str]:
    """Versions of the kernel compilers, where kernels are for a GPU."""
    if target.arch == "cpu":
        return {}
    return {"ptxas": ptxas_version(), **{name: version(name) for name in ("tilelang", "triton")}}


_CHECKPOINT_FILES = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


def _embed(checkpoint: Path, directory: Path) -> None:
    """Weights as hard links where the file system allows it, else copies; tokenizer and chat format beside them."""
    (directory / "weights").mkdir()
    (directory / "tokenizer").mkdir()
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors" or file.name in _CHECKPOINT_FILES:
            _link(file, directory / "weights" / file.name)
        elif file.name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(file, directory / "tokenizer" / file.name)
    if (release := release_of(checkpoint)) is not None:
        write_release(directory / "tokenizer", release)


def _link(source: Path, target: Path) -> None:
    if source.stat().st_dev == target.parent.stat().st_dev:
        target.hardlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)
