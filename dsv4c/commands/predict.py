"""`dsv4c predict`: how long steps of a model should take on a GPU, without building or running anything."""

from __future__ import annotations

import argparse
import json

from dsv4c.commands.arguments import positive
from dsv4c.commands.models import chosen_model
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError

BATCHES = "1,8,64,256"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "predict",
        help="how long decode and prefill steps should take on a GPU, before anything is built or run",
        description="Predicts the time, bytes and operations of whole steps and of every op, for one card. Plans only: "
        "needs no GPU and builds no kernel. Its error on measured H200 steps and ops is in docs/predicted.md.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or flash, pro, nano")
    parser.add_argument(
        "--target", required=True, help="sm_90a (H200), sm_100a (B200) or sm_103a (GB300); only the first was measured"
    )
    parser.add_argument(
        "--batch", default=BATCHES, metavar="N,N",
        help=f"requests that decode together, 0 for no decode step (default {BATCHES})",
    )  # fmt: skip
    parser.add_argument("--context", metavar="TOKENS", help="of every request, such as 128K (default 8192)")
    parser.add_argument("--prefill", metavar="N,N", help="tokens of a prefill step of one prompt, at most 8192")
    parser.add_argument("--before", metavar="TOKENS", help="of the prompt, computed before that step (default 0)")
    parser.add_argument(
        "--activations", choices=("mxfp8", "mxfp4"), help="of routed experts on sm_100a and sm_103a (default mxfp8)"
    )
    parser.add_argument("--num-layers", type=positive, help="only the first layers of a preset")
    parser.add_argument("--ops", action="store_true", help="every op of every step too")
    parser.add_argument("--json", action="store_true", help="steps and ops as JSON: seconds, bytes, operations")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the steps; 0 when done."""
    from dsv4c.describe_predict import notes, ops_table, steps_json, steps_table
    from dsv4c.predict import Predictor, check_context
    from dsv4c.units import parse_tokens

    batches = _counts("--batch", args.batch)
    prompts = [] if args.prefill is None else _counts("--prefill", args.prefill)
    if not batches and not prompts:
        raise ConfigError("there is no step to predict", hint="give `--batch 64`, or `--prefill 8192`")
    if args.before is not None and not prompts:
        raise ConfigError("`--before` is of a prefill step", hint="give `--prefill` too, or `--context` for decoding")
    model = chosen_model(args.model, args.num_layers)
    usual = min(8192, model.config.max_position_embeddings)
    context = usual if args.context is None else parse_tokens(args.context)
    before = 0 if args.before is None else parse_tokens(args.before)
    check_context(model.config, max([context, *(before + tokens for tokens in prompts)]))
    with progress_bars() as progress:
        passes = progress.add_task("passes", total=None, detail="")
        predictor = Predictor(
            model.config, args.target, activations=args.activations,
            watch=lambda step: progress.update(passes, advance=1, detail=step.name),
        )  # fmt: skip
    steps = [predictor.decode(batch, context) for batch in batches]
    steps += [predictor.prefill(tokens, before) for tokens in prompts]
    if args.json:
        print(json.dumps(steps_json(args.model, args.target, steps), indent=1))
        return 0
    out = console()
    out.print(steps_table(steps))
    for step in steps if args.ops else ():
        out.print(ops_table(step))
    out.print(notes(args.target, steps), highlight=False)
    return 0


def _counts(name: str, text: str) -> list[int]:
    """`1,8,64` as numbers; none for `0`. Raises ConfigError naming the option."""
    from dsv4c.units import parse_tokens

    if text.strip() == "0":
        return []
    try:
        return [parse_tokens(part) for part in text.split(",")]
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error.message}", hint="numbers with commas between, such as `1,8,64`") from error
