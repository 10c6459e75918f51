"""`dsv4c inspect`: what the passes did to a model, what an artifact holds, and what differs between two."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import positive
from dsv4c.commands.models import chosen_model
from dsv4c.commands.reporting import add_options, check_options, write_report
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.describe_passes import Shown
    from dsv4c.opened import Artifact
    from dsv4c.pipeline import Pipeline


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("inspect", help="what the passes do to a model, or an artifact, or two, in words")
    parser.add_argument(
        "what",
        metavar="MODEL|DIR",
        help="a preset (flash, pro, nano, ...), a checkpoint folder, or an artifact's folder",
    )
    parser.add_argument("other", metavar="DIR", nargs="?", help="another artifact: print what differs")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="one pass: its contract and what it replaced")
    parser.add_argument("--diff", action="store_true", help="the lines that the pass, or every pass, changed")
    parser.add_argument("--stop-after", metavar="NAME", help="run no pass behind this one, and print the program there")
    parser.add_argument(
        "--dump-ir", type=Path, metavar="DIR", help="write the program after every pass that changed it"
    )
    parser.add_argument("--target", help="of a model: cpu (default), sm_90a (Hopper), sm_100a (B200) or sm_103a (B300)")
    parser.add_argument("--num-layers", type=positive, help="of a preset: only the first layers")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what is asked for; 0 when done."""
    from dsv4c.describe import manifest_tables
    from dsv4c.opened import load

    asked = any((args.pass_name, args.diff, args.stop_after, args.dump_ir))
    check_options(args, asked or args.other is not None)
    if args.other is not None:
        if asked or args.target or args.num_layers:
            raise ConfigError("two artifacts are compared as they are", hint="`dsv4c inspect DIR DIR`, without options")
        return _compare(args)
    is_artifact = (Path(args.what) / "manifest.json").is_file()
    if is_artifact and (args.target or args.num_layers):
        raise ConfigError(f"`{args.what}` is an artifact: its target and layers are given")
    if args.report is not None:
        return write_report(args)
    if not is_artifact:
        return _inspect_model(args)
    artifact = load(args.what)
    if asked:
        return _inspect_artifact(args, artifact)
    console().print(manifest_tables(artifact.manifest))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dsv4c.compare import differences
    from dsv4c.describe import differences_table
    from dsv4c.opened import load

    found = differences(load(args.what), load(args.other))
    console().print(differences_table(found, args.what, args.other))
    return 0


def _inspect_model(args: argparse.Namespace) -> int:
    from dsv4c.capturing import capture
    from dsv4c.describe_passes import shown_steps, sizes_text
    from dsv4c.pipeline import Pipeline
    from dsv4c.work import Sizes

    pipeline = Pipeline.default(args.target or "cpu")
    for name in (args.pass_name, args.stop_after):
        if name is not None:
            pipeline.named(name)
    _check_order(args, [one.name for one in pipeline.ordered()])
    config, dump = chosen_model(args.what, args.num_layers).config, _dump(args)
    sizes = Sizes.usual(config)
    with progress_bars() as progress:
        task = progress.add_task("passes", total=None, detail="capture")
        program = capture(config)
        steps = pipeline.steps(program, lambda name: progress.update(task, advance=1, detail=name))
        words = sizes_text(sizes.tokens, sizes.requests, sizes.context, pipeline.machine)
        return _show(args, shown_steps(steps, sizes), words, pipeline, dump)


def _inspect_artifact(args: argparse.Namespace, artifact: Artifact) -> int:
    from dsv4c.describe_passes import shown_artifact, sizes_text
    from dsv4c.pipeline import Pipeline

    names = [record.name for record in artifact.manifest.passes]
    for name in (args.pass_name, args.stop_after):
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it was made by {', '.join(names)}"
            raise ConfigError(f"no pass `{name}` made `{args.what}`", hint=hint)
    _check_order(args, names)
    found = artifact.stages
    words = sizes_text(found.sizes["tokens"], found.sizes["requests"], found.sizes["context"], found.machine)
    return _show(args, shown_artifact(artifact), words, Pipeline.default(artifact.manifest.target), _dump(args))


def _check_order(args: argparse.Namespace, names: list[str]) -> None:
    if args.pass_name and args.stop_after and names.index(args.pass_name) > names.index(args.stop_after):
        raise ConfigError(f"pass `{args.pass_name}` runs behind `{args.stop_after}`", hint="leave out `--stop-after`")


def _show(args: argparse.Namespace, passes: Iterator[Shown], sizes: str, known: Pipeline, dump: _Dump | None) -> int:
    """Goes through the passes once and prints what the options ask for."""
    from dsv4c.describe_passes import PassRows, pass_detail, pass_diff

    out, rows, parts = console(), PassRows(sizes), []
    last: Shown | None = None
    for one in passes:
        last, name = one, one.record.name
        rows.add(one)
        if dump is not None:
            dump.add(one)
        if name == args.pass_name:
            made = next((p for p in known.passes if p.name == name), None)
            parts.append(pass_detail(one, made, _summary(made)))
        if args.diff and one.record.rewrites and args.pass_name in (None, name):
            parts += ["" if args.pass_name else f"\n{name}", *pass_diff(one)]
        if name == args.stop_after or (name == args.pass_name and args.stop_after is None and dump is None):
            break
    if args.pass_name is None:
        out.print(rows.table())
    for part in parts:
        out.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str) or args.diff)
    if args.stop_after and last is not None and dump is None and args.pass_name is None and not args.diff:
        out.print(f"\n{last.texts[1]}", highlight=False, markup=False, soft_wrap=True)
    if dump is not None:
        print(f"wrote {dump.count} programs to {args.dump_ir}", file=sys.stderr)
    return 0


def _summary(made: object) -> str:
    """The first sentence of the file that a pass is in."""
    module = sys.modules.get(type(made).__module__) if made is not None else None
    text = (module.__doc__ or "").strip() if module is not None else ""
    return text.split("\n\n")[0].replace("\n", " ")


def _dump(args: argparse.Namespace) -> _Dump | None:
    """Where `--dump-ir` writes. Raises ConfigError, before anything runs, if nothing can be written there."""
    return _Dump(args.dump_ir) if args.dump_ir else None


class _Dump:
    """Writes programs to a folder, named as in an artifact's ir/."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._place, self.count = folder, 0, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to `{folder}`: {error.strerror}", hint="choose another folder") from error

    def add(self, one: Shown) -> None:
        if self._place == 0:
            self._write("capture", one.texts[0])
        self._place += 1
        if one.record.rewrites:
            self._write(one.record.name, one.texts[1])

    def _write(self, name: str, text: str) -> None:
        file = self._folder / f"{self._place:02d}-{name}.txt"
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write `{file}`: {error.strerror}", hint="choose another folder") from error
        self.count += 1
