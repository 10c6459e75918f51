"""Prompts to verify with: one a line of a UTF-8 text file; empty lines do not count."""

from __future__ import annotations

from pathlib import Path

from dsv4c.errors import ConfigError

OWN = Path(__file__).with_name("prompts.txt")
"""Prose about this project, written after nano was trained: none of it was in its training text."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file. Raises ConfigError if it cannot be read, is not UTF-8, or holds no prompt."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read `{path}`: {error.strerror}", hint="a text file with one prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"`{path}` is not UTF-8 at byte {error.start}", hint="a text file with one prompt a line, in UTF-8"
        ) from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"`{path}` holds no prompt", hint="a text file with one prompt a line")
    return found
