"""Pools in memory that is given: laid out as said, zeroed, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import mmap
import struct
from typing import Any

import pytest
import torch

from dsv4c.artifact import KVGroup, Manifest, Pool, StateGroup
from dsv4c.errors import ConfigError
from dsv4c.runtime.marks import calls_to_marks, marks_of
from dsv4c.runtime.pools import ALIGNMENT, allocate, pool_layout
from dsv4c.runtime.poolsizes import PoolSizes
from tests.runtime import toy

GROUPS = (
    KVGroup("window", 1, 4, 8, (Pool("a", (3, 2), "bfloat16"), Pool("b", (5,), "uint8"))),
    KVGroup("c4", 4, 16, None, (Pool("c", (2,), "float32"),)),
)
STATES = (StateGroup("ring", (Pool("r", (8, 2), "float32"),)), StateGroup("count", (Pool("n", (), "int64"),), 1))


@pytest.fixture
def manifest() -> Manifest:
    return dataclasses.replace(toy.manifest(), kv_groups=GROUPS, state_groups=STATES)


SIZES = PoolSizes({"window": 7, "c4": 5}, 4, 64, snapshots=2)


def test_pools_are_views_of_the_memory_that_is_given(manifest: Manifest) -> None:
    layout = pool_layout(manifest, SIZES)
    assert list(layout.offsets) == ["a", "b", "c", "r", "n"]
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())
    memory = mmap.mmap(-1, layout.total_bytes)
    memory.write(b"\xff" * layout.total_bytes)
    given, own = allocate(manifest, SIZES, memory=memory), allocate(manifest, SIZES)
    for name, tensor in own.items():
        assert (given[name].shape, given[name].dtype) == (tensor.shape, tensor.dtype)
        assert bool((given[name] == 0).all()) and given[name].is_contiguous()
    assert given["r"].shape[0] == 4 + 2 and given["n"].shape[0] == 4
    given["c"][3, 1] = 1.5
    at = layout.offsets["c"] + 4 * (3 * 2 + 1)
    assert struct.unpack("<f", memory[at : at + 4]) == (1.5,)
    given["b"][2, 4] = 9
    assert memory[layout.offsets["b"] + 2 * 5 + 4] == 9


@pytest.mark.parametrize("wrong", ["short", "long", "read-only", "device"])
def test_memory_that_does_not_fit_is_refused(manifest: Manifest, wrong: str) -> None:
    size = pool_layout(manifest, SIZES).total_bytes + {"short": -1, "long": 1}.get(wrong, 0)
    memory: Any = memoryview(bytes(size)) if wrong == "read-only" else bytearray(size)
    device = torch.device("meta") if wrong == "device" else None
    with pytest.raises(ConfigError, match="cannot lie in"):
        allocate(manifest, SIZES, device, memory)


def test_marks_come_behind_the_last_touch_of_a_scope() -> None:
    program = toy.manifest().programs["decode.1"]
    names = ("bank", "all", "sampling.last_tokens", "logits")
    # `sampling` reads and writes last tokens last; `prelude` and `head` have nothing left that is theirs
    assert marks_of(program, names) == (("bank",), ("all",), ("logits", "sampling.last_tokens"))
    assert calls_to_marks(program, names) == (2, 3, 6)
    assert marks_of(program, []) == ()
