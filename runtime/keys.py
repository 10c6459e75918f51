"""API keys: compared in constant time, never kept or shown in clear."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from dsv4c.errors import ConfigError

_SHORTEST = 8  # characters; shorter ones are guessed


class KeyRing:
    """The keys that open a server. Holds SHA-256 digests: all have one length, so a comparison says nothing of it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(dict.fromkeys(_digest(key) for key in keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def match(self, key: str) -> str | None:
        """The name of a key that is one of ours (8 hexadecimal digits), or None. Every key is compared, always."""
        given, found = _digest(key), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = digest.hex()[:8]
        return found


def read_keys(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    """The keys given and those of a file: one a line, `#` begins a comment. Raises ConfigError that tells no key."""
    keys = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read `{file}`: {error}", hint="one API key a line") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"`{file}` holds no API key", hint="one API key a line")
        keys += found
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"API key {number} of {len(keys)} is not {_SHORTEST} or more printable characters without a space",
                hint='make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`',
            )
    return tuple(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
