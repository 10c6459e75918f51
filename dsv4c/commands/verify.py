"""`dsv4c verify`: the plain model, every pass and the compiled program on the same inputs, held to what they claim."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import positive
from dsv4c.commands.models import chosen_model
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4c.verifying import Verification


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("verify", help="whether every pass and schedule keeps what it claims of numbers")
    parser.add_argument("what", metavar="MODEL|DIR", help="a checkpoint folder, nano, or an artifact's folder")
    parser.add_argument("--inputs", type=Path, metavar="FILE", help="prompts, one a line (default: dsv4c's own)")
    parser.add_argument("--target", help="of a model: cpu (default), or sm_90a (Hopper)")
    parser.add_argument("--passes-only", action="store_true", help="of a model: build no kernels")
    parser.add_argument("--weights", type=Path, help="checkpoint folder, if an artifact holds no weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--max-tokens", type=positive, default=512, help="of a prompt; what is longer is cut")
    parser.add_argument("--cache", type=Path, default=Path("build/kernels"), help="folder for built kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, for `inspect --report`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 if every claim holds, 1 if one is broken."""
    from dsv4c.describe_numerics import verification_table

    with progress_bars("{task.fields[amount]}") as progress:
        task = progress.add_task("verify", total=None, detail="", amount="")
        found = _verify(args, lambda name: progress.update(task, detail=name))
    if args.json is not None:
        try:
            args.json.write_text(found.to_json(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write `{args.json}`: {error.strerror}") from error
    console().print(verification_table(found))
    return 0 if found.ok else 1


def _verify(args: argparse.Namespace, watch: Callable[[str], object]) -> Verification:
    if (Path(args.what) / "manifest.json").is_file():
        for option in ("target", "passes_only"):
            if getattr(args, option):
                raise ConfigError(f"`{args.what}` is an artifact: `--{option.replace('_', '-')}` is for models")
        return _verify_artifact(args, Path(args.what), watch)
    if args.weights is not None:
        raise ConfigError("`--weights` is for artifacts", hint="give the checkpoint's folder as MODEL")
    return _verify_model(args, watch)


def _verify_model(args: argparse.Namespace, watch: Callable[[str], object]) -> Verification:
    """Compiles it to a temporary artifact, so that what is verified is what is written."""
    from dsv4c.capturing import capture
    from dsv4c.compile import Options, compile_artifact
    from dsv4c.config import Target
    from dsv4c.lineage import of_pipeline
    from dsv4c.pipeline import Pipeline
    from dsv4c.verifying import check_room, verify_lineage
    from dsv4c.verifying_inputs import cases

    target, model = Target(args.target or "cpu"), chosen_model(args.what, None)
    check_room(model.config)
    asked = cases(model.config, model.folder, args.inputs, args.seed, args.max_tokens)
    if not args.passes_only and target.arch == "cpu":
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            watch("compile")
            compile_artifact(model.config, target, folder, Options(), checkpoint=model.folder, cache=args.cache)
            return _verify_artifact(args, folder, watch, model.folder, args.what)
    watch("capture")
    lineage = of_pipeline(Pipeline.default(target), capture(model.config), watch)
    why = "as asked" if args.passes_only else f"kernels for {target.arch} are built by `compile`; give the artifact"
    return verify_lineage(
        lineage, asked, model=args.what, target=target.arch, notes=(f"no kernels were run: {why}",), watch=watch
    )


def _verify_artifact(
    args: argparse.Namespace,
    directory: Path,
    watch: Callable[[str], object],
    weights: Path | None = None,
    name: str | None = None,
) -> Verification:
    from dsv4c.compiled import Compiled
    from dsv4c.config import ModelConfig
    from dsv4c.lineage import of_artifact
    from dsv4c.opened import load
    from dsv4c.verifying import check_room, quantised_in_training, verify_lineage
    from dsv4c.verifying_inputs import cases, weights_of

    artifact = load(directory)
    manifest, config = artifact.manifest, ModelConfig.from_dict(artifact.manifest.model)
    lineage = of_artifact(artifact)
    check_room(config)
    asked = cases(config, weights_of(artifact, args.weights or weights), args.inputs, args.seed, args.max_tokens)
    compiled, notes = None, ()
    if manifest.target == "cpu":
        compiled = Compiled(directory, manifest)
    else:
        notes = (
            f"no kernels were run: they are for {manifest.target}; the passes were, on the references of their ops",
        )
    return verify_lineage(
        lineage, asked, compiled=compiled, fake_quant=quantised_in_training(lineage), model=name or str(directory),
        target=manifest.target, notes=notes, watch=watch,
    )  # fmt: skip
