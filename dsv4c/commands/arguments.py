"""Types of command-line arguments: each says what is wrong in argparse's way."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def positive(text: str) -> int:
    """A whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def not_negative(text: str) -> int:
    """A whole number, zero included."""
    return 0 if text == "0" else positive(text)


def seconds(text: str) -> float:
    """A length of time above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of seconds") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} seconds is not a positive length of time")
    return value


def server_url(text: str) -> str:
    """The address of a server, without `/v1` and without a slash at its end."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"`{text}` is no address such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def client_key(file: Path | None) -> str | None:
    """The first key of a file, if one is given. Raises ConfigError."""
    from dsv4c.runtime.keys import read_keys

    return None if file is None else read_keys((), file)[0]
