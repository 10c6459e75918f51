"""Options that are set on the command line or in a TOML file, each with where its value came from.

    command line > [run] in the file of --config, or ./dsv4c.toml > default

One table of `Option` makes the arguments of the parser, the keys of the file, and the text of `--print-config`.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4c.errors import ConfigError

DEFAULT_FILE = Path("dsv4c.toml")
SECTIONS = ("run", "dynamo")
"""Of commands that read a file; one file may have them all."""
_MASK = "***"


@dataclass(frozen=True)
class Option:
    """`name` is `--name` on the command line, `name = ...` in the file, and `args.name` (`-` is `_`) in the code."""

    name: str
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    flag: bool = False
    opposite: str = ""
    """Of a flag: what takes it back on the command line, if not `--no-name` (or, of a `--no-name`, `--name`)."""
    repeated: bool = False
    positional: bool = False
    secret: bool = False
    """Never printed."""
    saved: bool = True
    """Whether a file may set it."""
    unset: str = ""
    """What None means."""

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")

    @property
    def initial(self) -> Any:
        return False if self.flag else () if self.repeated else self.default

    @property
    def off(self) -> str:
        """The name of a flag's opposite."""
        other = self.name.removeprefix("no-")
        return self.opposite or (f"no-{self.name}" if other == self.name else other)

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Adds it to a parser, which will only say what was given."""
        default = self.unset or ("" if self.default is None else str(self.default))
        text = (f"{self.help} (default {default})" if default else self.help).replace("%", "%%")
        given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if self.positional:
            parser.add_argument(self.dest, nargs="?", metavar=self.metavar, **given)
        elif self.flag:
            parser.add_argument(f"--{self.name}", action="store_true", **given)
            back = {**given, "help": f"takes --{self.name} back, where a file says so"}
            parser.add_argument(f"--{self.off}", dest=self.dest, action="store_false", **back)
        else:
            given |= {"type": self.type, "choices": self.choices, "metavar": self.metavar}
            given |= {"action": "append"} if self.repeated else {}
            parser.add_argument(f"--{self.name}", **given)

    def read(self, value: Any, where: str) -> Any:
        """A value of the file, checked as if it had been typed. Raises ConfigError that names it."""
        if self.flag:
            if not isinstance(value, bool):
                raise ConfigError(f"{where} must be true or false, not {json.dumps(value, default=str)}")
            return value
        if self.repeated:
            items = value if isinstance(value, list) else [value]
            return tuple(self._read_one(item, where) for item in items)
        return self._read_one(value, where)

    def _read_one(self, value: Any, where: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(f"{where} must be a text or a number, not {json.dumps(value, default=str)[:60]}")
        try:
            found = self.type(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if self.choices is not None and found not in self.choices:
            raise ConfigError(f"{where} is `{found}`", hint=f"one of {', '.join(f'`{c}`' for c in self.choices)}")
        return found


@dataclass(frozen=True)
class Setting:
    """An option's value and its origin: `command line`, the file's name, or `default`."""

    option: Option
    value: Any
    origin: str


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    """Adds all of them, `--config` and `--print-config`."""
    for option in options:
        option.add(parser)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"options as TOML (default: ./{DEFAULT_FILE}, if there)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every option and its origin as TOML, and exit"
    )


def settle(
    args: argparse.Namespace, options: Sequence[Option], section: str, fixed: Sequence[str] = ()
) -> list[Setting]:
    """The value of every option. `fixed`: keys that the file cannot set whatever the value.

    Raises ConfigError for a file that is not there or no TOML, and for keys and values that are not understood.
    """
    file = args.config if args.config is not None or not DEFAULT_FILE.is_file() else DEFAULT_FILE
    saved = {} if file is None else _read_file(file, section)
    known = {option.name: option for option in options}
    for key in saved:
        if key in fixed:
            raise ConfigError(
                f"`{key}` in `{file}` is fixed by the artifact and cannot be set", hint="compile another artifact"
            )
        if key not in known or not known[key].saved:
            raise ConfigError(
                f"`{key}` in `{file}` is no option", hint=f"those of `dsv4c {section} --help`, without `--`"
            )
    settings = []
    for option in options:
        if hasattr(args, option.dest):
            value, origin = getattr(args, option.dest), "command line"
            value = tuple(value) if option.repeated else value
        elif option.name in saved:
            value, origin = option.read(saved[option.name], f"`{option.name}` in `{file}`"), str(file)
        else:
            value, origin = option.initial, "default"
        settings.append(Setting(option, value, origin))
    return settings


def namespace(settings: Sequence[Setting]) -> argparse.Namespace:
    """The values by name, as a command reads them."""
    return argparse.Namespace(**{setting.option.dest: setting.value for setting in settings})


def print_settings(settings: Sequence[Setting], section: str, facts: Mapping[str, Any]) -> str:
    """A TOML file that sets the same, with the origin of every value. `facts`: what the artifact fixes."""
    lines = [f"[{section}]", *(_line(setting) for setting in settings if setting.option.saved)]
    if facts:
        lines += ["", "# fixed by the artifact: no option changes it"]
        lines += [f"# {name} = {_toml(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def _line(setting: Setting) -> str:
    option, value = setting.option, setting.value
    if option.secret and value:
        return f"# {option.name} = {_toml([_MASK] * len(value))}".ljust(48) + f"# {setting.origin}, not shown"
    if value is None:
        return f"# {option.name} =".ljust(48) + f"# {setting.origin}{': ' if option.unset else ''}{option.unset}"
    return f"{option.name} = {_toml(value)}".ljust(48) + f"# {setting.origin}"


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)


def _read_file(file: Path, section: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read `{file}`: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{file}` is no TOML: {error}") from error
    for name, value in data.items():
        if name not in SECTIONS or not isinstance(value, dict):
            raise ConfigError(f"`{name}` in `{file}` is not understood", hint=f"options go under `[{section}]`")
    return dict(data.get(section, {}))


def option_table(options: Sequence[Option]) -> Iterator[str]:
    """Rows of a table in Markdown."""
    yield "| option | default | |"
    yield "| --- | --- | --- |"
    for option in options:
        name = option.name if option.positional else f"--{option.name}"
        default = option.unset or ("" if option.flag or option.initial in (None, ()) else f"`{option.initial}`")
        more = f"; one of {', '.join(f'`{choice}`' for choice in option.choices)}" if option.choices else ""
        more += "; may be given several times" if option.repeated else ""
        name += f" {option.metavar}" if option.metavar and not option.positional else ""
        shown = f"`{name}`, `--{option.off}`" if option.flag else f"`{name}`"
        yield f"| {shown} | {default} | {option.help}{more} |"
