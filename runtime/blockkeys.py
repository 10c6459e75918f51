"""Names of blocks of tokens that mean the same in every process: what routers compare prefixes by.

A block's hash covers its tokens and, through its parent's, all tokens before it and the salt: signed 64-bit, blake2b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class KVEvent:
    """What a prefix tree has stored or removed: one block, or with `cleared` all of them.

    `parent_hash`: None for the first block of a prompt. `tokens`: of a stored block.
    """

    kind: Literal["stored", "removed", "cleared"]
    hash: int = 0
    parent_hash: int | None = None
    tokens: tuple[int, ...] = ()


def block_key(tokens: npt.NDArray[np.int64]) -> bytes:
    """The tokens of a block as the prefix tree calls them."""
    return tokens.astype("<i4").tobytes()


def tokens_of(key: bytes) -> tuple[int, ...]:
    """What `block_key` was made from."""
    return tuple(np.frombuffer(key, dtype="<i4").tolist())


def root_hash(salt: Hashable) -> int:
    """What stands for the parent of first blocks."""
    return 0 if salt is None else _digest(f"{type(salt).__name__}:{salt!r}".encode())


def block_hash(parent: int, key: bytes) -> int:
    """The hash of a block behind the one with hash `parent`."""
    return _digest(parent.to_bytes(8, "little", signed=True) + key)


def block_hashes(tokens: Sequence[int] | npt.NDArray[np.int64], block: int, salt: Hashable = None) -> list[int]:
    """The hashes of all whole blocks of `block` tokens that these tokens begin with."""
    ids = np.asarray(tokens, dtype=np.int64)
    out, parent = [], root_hash(salt)
    for start in range(0, ids.size - block + 1, block):
        parent = block_hash(parent, block_key(ids[start : start + block]))
        out.append(parent)
    return out


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
