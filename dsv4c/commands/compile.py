"""`dsv4c compile`: a checkpoint folder or a preset to an artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import not_negative, positive
from dsv4c.commands.models import chosen_model
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.compile import Options
    from dsv4c.config import ModelConfig
    from dsv4c.pipeline import Pipeline


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("compile", help="compile a checkpoint folder or a preset to an artifact")
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, or a preset: flash, pro, flash-nvfp4, pro-nvfp4, nano"
    )
    parser.add_argument(
        "--target", required=True, help="what to compile for: cpu, sm_90a (Hopper), sm_100a (B200) or sm_103a (B300)"
    )
    parser.add_argument("-o", "--output", type=Path, help="the artifact's folder")
    parser.add_argument("--dry-run", action="store_true", help="everything but emitting; print the passes")
    parser.add_argument("--max-context", type=positive, help="longest request in tokens")
    parser.add_argument("--max-tokens", type=positive, help="tokens of one step (default 512, GPU 8192)")
    parser.add_argument("--max-requests", type=positive, help="requests of one step (default 64, GPU 256)")
    parser.add_argument(
        "--speculative-tokens", type=not_negative, default=0, metavar="K",
        help="compile the MTP block to draft up to K tokens a step, 1 to 3 (default 0: none)",
    )  # fmt: skip
    parser.add_argument(
        "--activations",
        choices=("mxfp8", "mxfp4"),
        help="of MXFP4 experts on sm_100a and sm_103a (default mxfp8); mxfp4 is W4A4, faster and coarser",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN",
        help="experts that keep BF16 activations there, such as 'L00*'; may be given again",
    )  # fmt: skip
    parser.add_argument("--num-layers", type=positive, help="only the first layers of a preset, to measure with")
    parser.add_argument("--fake-quant", action="store_true", help="fake-quantise KV entries as in training")
    parser.add_argument("--cache", type=Path, help="folder for built kernels (default: beside the artifact)")
    parser.set_defaults(run=run)


def _pipeline(args: argparse.Namespace, config: ModelConfig, options: Options) -> Pipeline | None:
    """The target's passes with what was asked for experts' activations; None if nothing was."""
    from dsv4c.passes import default_pipeline
    from dsv4c.passes.quantise_activations import QuantiseActivations
    from dsv4c.weights import stored_formats

    if args.activations is None and not args.keep:
        return None
    usual = default_pipeline(stored_formats(config), args.target, options.speculative_tokens, options.max_context)
    if not any(isinstance(one, QuantiseActivations) for one in usual.passes):
        raise ConfigError(
            f"target `{args.target}` computes experts on BF16 activations or wider",
            hint="`--activations` and `--keep` are for sm_100a and sm_103a",
        )
    if args.activations and not options.speculative_tokens and len(config.nvfp4_layers) >= config.num_hidden_layers:
        raise ConfigError(
            f"`--activations {args.activations}` fits no experts: all of this checkpoint are NVFP4",
            hint="leave it out: NVFP4 weights are multiplied with NVFP4 activations, by the checkpoint's input_scale",
        )
    chosen = QuantiseActivations(args.activations, tuple(args.keep))
    return usual.without(chosen.name).with_(chosen)


def run(args: argparse.Namespace) -> int:
    """Compiles, or with `--dry-run` lowers and plans; 0 when done."""
    from dsv4c.compile import Options, compile_artifact, lower, plan_artifact, usual_options
    from dsv4c.config import Target
    from dsv4c.describe import PassTable, plan_table

    target = Target(args.target)
    model = chosen_model(args.model, args.num_layers)
    config = model.config
    usual = usual_options(config, target)
    max_tokens = args.max_tokens or usual.max_tokens
    options = Options(
        max_context=args.max_context or usual.max_context,
        max_tokens=max_tokens,
        max_requests=min(args.max_requests or usual.max_requests, max_tokens),
        fake_quant=args.fake_quant,
        speculative_tokens=args.speculative_tokens,
    )
    pipeline = _pipeline(args, config, options)
    table = PassTable()
    if args.dry_run:
        program = lower(config, options, table.watch, target.arch, pipeline)
        made = plan_artifact(program, target, options)
        out = console()
        out.print(table.table(), plan_table(made))
        out.print(f"{table.seconds:.1f} s from start to plan")
        return 0
    if args.output is None:
        raise ConfigError("`compile` needs `-o DIR`", hint="or `--dry-run` to emit nothing")
    with progress_bars() as progress:
        passes = progress.add_task("passes", total=None, detail="")
        kernels = progress.add_task("kernels", total=None, detail="")

        def built(done: int, total: int, name: str) -> None:
            progress.update(kernels, completed=done, total=total, detail=name)

        compile_artifact(
            config, target, args.output, options, checkpoint=model.folder, cache=args.cache,
            truncated_from=model.truncated_from, pipeline=pipeline,
            watch=lambda step: progress.update(passes, advance=1, detail=step.name), progress=built,
        )  # fmt: skip
    print(f"wrote {args.output} in {table.seconds:.1f} s", file=sys.stderr)
    return 0
