"""MODEL|DIR of `dsv4c verify` and `dsv4c bisect`: stages, kernels and inputs of a model or an artifact."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import positive
from dsv4c.commands.models import chosen_model
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4c.compiled import Compiled
    from dsv4c.lineage import Lineage
    from dsv4c.verifying import Case


@dataclass(frozen=True)
class Subject:
    """What is verified. `notes`: what cannot be run here, and why; `fake_quant`: captured as it was trained."""

    name: str
    target: str
    lineage: Lineage
    cases: list[Case]
    compiled: Compiled | None
    fake_quant: bool
    notes: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how a MODEL|DIR is run."""
    parser.add_argument("--inputs", type=Path, metavar="FILE", help="prompts, one a line (default: dsv4c's own)")
    parser.add_argument("--target", help="of a model: cpu (default), sm_90a (Hopper), sm_100a (B200) or sm_103a (B300)")
    parser.add_argument("--passes-only", action="store_true", help="of a model: build no kernels")
    parser.add_argument("--weights", type=Path, help="checkpoint folder, if an artifact holds no weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--max-tokens", type=positive, default=512, help="of a prompt; what is longer is cut")
    parser.add_argument("--cache", type=Path, default=Path("build/kernels"), help="folder for built kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found")


def check_json(file: Path | None) -> None:
    """Raises ConfigError for a file in no folder, before anything runs."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ConfigError(f"cannot write `{file}`", hint="give a file in a folder that exists as `--json FILE`")


def write_json(file: Path, text: str) -> None:
    """Raises ConfigError for a file that cannot be written."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write `{file}`: {error.strerror}", hint="give another `--json FILE`") from error


def open_subject(what: str, args: argparse.Namespace, scratch: Path, watch: Callable[[str], object]) -> Subject:
    """An artifact, or a model: compiled to `scratch` for a CPU, so that what is run is what `compile` writes.

    Raises ConfigError for options that do not fit, CheckpointError or ArtifactError for a damaged folder.
    """
    if (Path(what) / "manifest.json").is_file():
        for option in ("target", "passes_only"):
            if getattr(args, option):
                raise ConfigError(
                    f"`{what}` is an artifact: `--{option.replace('_', '-')}` is for models",
                    hint="its target and kernels are those that it was compiled with",
                )
        return _artifact(args, Path(what), args.weights, what)
    if args.weights is not None:
        raise ConfigError("`--weights` is for artifacts", hint="give the checkpoint's folder as MODEL")
    return _model(what, args, scratch, watch)


def _model(what: str, args: argparse.Namespace, scratch: Path, watch: Callable[[str], object]) -> Subject:
    from dsv4c.capturing import capture
    from dsv4c.compile import Options, compile_artifact
    from dsv4c.config import Target
    from dsv4c.lineage import of_pipeline
    from dsv4c.pipeline import Pipeline
    from dsv4c.verifying import check_room
    from dsv4c.verifying_inputs import cases

    target, model = Target(args.target or "cpu"), chosen_model(what, None)
    check_room(model.config)
    asked = cases(model.config, model.folder, args.inputs, args.seed, args.max_tokens)
    if not args.passes_only and target.arch == "cpu":
        watch("compile")
        folder = scratch / "artifact"
        compile_artifact(model.config, target, folder, Options(), checkpoint=model.folder, cache=args.cache)
        return _artifact(args, folder, model.folder, what)
    watch("capture")
    lineage = of_pipeline(Pipeline.default(target), capture(model.config), watch)
    why = "as asked" if args.passes_only else f"kernels for {target.arch} need its device: see `dsv4c run --shadow`"
    return Subject(what, target.arch, lineage, asked, None, False, (f"no kernels were run: {why}",))


def _artifact(args: argparse.Namespace, directory: Path, weights: Path | None, name: str) -> Subject:
    from dsv4c.compiled import Compiled
    from dsv4c.config import ModelConfig
    from dsv4c.lineage import of_artifact
    from dsv4c.opened import load
    from dsv4c.verifying import check_room, quantised_in_training
    from dsv4c.verifying_inputs import cases, weights_of

    artifact = load(directory)
    manifest, config = artifact.manifest, ModelConfig.from_dict(artifact.manifest.model)
    lineage = of_artifact(artifact)
    check_room(config)
    asked = cases(config, weights_of(artifact, weights), args.inputs, args.seed, args.max_tokens)
    fake_quant = quantised_in_training(lineage)
    if manifest.target == "cpu":
        compiled = Compiled(directory, manifest)
        for case in asked:
            compiled.check_fits(case.runs.inputs)
        return Subject(name, "cpu", lineage, asked, compiled, fake_quant, ())
    note = f"no kernels were run: those for {manifest.target} need its device; the passes ran on references of ops"
    return Subject(name, manifest.target, lineage, asked, None, fake_quant, (note,))
