"""Types of command-line arguments: each says what is wrong in argparse's way."""

from __future__ import annotations

import argparse


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
