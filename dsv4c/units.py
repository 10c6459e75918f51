"""Sizes as people type them: `141GB`, `131GiB`, `128K` tokens."""

from __future__ import annotations

import re

from dsv4c.errors import ConfigError

_BYTES = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_TOKENS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def parse_bytes(text: str) -> int:
    """`141GB` is 141 * 10^9 bytes, `131GiB` 131 * 2^30. Raises ConfigError without a unit or a positive number."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)", text.strip(), flags=re.IGNORECASE)
    size = int(float(found[1]) * _BYTES[found[2].upper()]) if found else 0
    if size < 1:
        raise ConfigError(f"`{text}` is no size of memory", hint="a number and a unit, such as `141GB` or `131GiB`")
    return size


def parse_tokens(text: str) -> int:
    """`8192`, `8K` (8 * 1024) or `1M` (1024 * 1024). Raises ConfigError for what is no positive whole number."""
    found = re.fullmatch(r"([0-9]+)([KM]?)", text.strip(), flags=re.IGNORECASE)
    count = int(found[1]) * _TOKENS[found[2].upper()] if found else 0
    if count < 1:
        raise ConfigError(f"`{text}` is no number of tokens", hint="such as `8192`, `128K` (x 1024) or `1M`")
    return count
