"""The command line: parsing and printing, nothing else. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 a fault of ours, 2 the user's input. Each command is a file of `dsv4c/commands/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsv4c import __version__
from dsv4c.commands import COMMANDS
from dsv4c.errors import ConfigError, Dsv4cError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args = parser().parse_args(argv)
        return int(args.run(args))
    except Dsv4cError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The whole command line; `parse_args` raises ConfigError for what it does not take."""
    parser = _Parser(prog="dsv4c", description="Compile DeepSeek-V4 to an artifact, and serve it.")
    parser.add_argument("--version", action="version", version=f"dsv4c {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=_Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
