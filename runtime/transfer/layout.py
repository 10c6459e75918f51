"""What lies where in pools, said so that two engines can compare it; and which bytes of a pool a page is.

A page of a KV group is `entries_per_page` rows of each of its pools, a state row one row of each: contiguous bytes of
the pool's tensor. Pages that follow each other on both sides are one range.

Two engines may exchange state if everything that gives bytes their meaning is equal: the fields here, in this order.
How many pages either has does not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv4c.artifact import KVGroup, Manifest, StateGroup
from dsv4c.errors import HandleError
from dsv4c.runtime.poolsizes import DTYPE_BYTES, ceil_div

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranges:
    """Copies from a peer's pools into our own: for each the pool's number and byte offsets within its two tensors."""

    pool: Int64Array
    source: Int64Array
    target: Int64Array
    nbytes: Int64Array

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum())

    def __len__(self) -> int:
        return int(self.pool.size)

    @classmethod
    def none(cls) -> Ranges:
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, empty)

    @classmethod
    def join(cls, parts: Sequence[Ranges]) -> Ranges:
        """All of them, in order."""
        if not parts:
            return cls.none()
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))

    def pieces(self, most_bytes: int) -> list[Ranges]:
        """The same in parts of at most `most_bytes` each; a range larger than that is cut."""
        if self.nbytes.size and int(self.nbytes.max()) > most_bytes:
            return self._cut(most_bytes).pieces(most_bytes)
        ends, parts, start = np.cumsum(self.nbytes), [], 0
        if ends.size and ends[-1] <= most_bytes:
            return [self]
        while start < len(self):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + most_bytes, side="right"))
            parts.append(Ranges(*(getattr(self, f.name)[start:stop] for f in dataclasses.fields(self))))
            start = stop
        return parts

    def _cut(self, most_bytes: int) -> Ranges:
        counts = -(-self.nbytes // most_bytes)
        of = np.repeat(np.arange(len(self)), counts)
        skipped = (np.arange(of.size) - np.repeat(np.cumsum(counts) - counts, counts)) * most_bytes
        nbytes = np.minimum(self.nbytes[of] - skipped, most_bytes)
        return Ranges(self.pool[of], self.source[of] + skipped, self.target[of] + skipped, nbytes)


def merge(source: Int64Array, target: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Runs of pages that follow each other on both sides: first source page, first target page, pages."""
    if not source.size:
        return source, target, source
    breaks = np.flatnonzero((source[1:] - source[:-1] != 1) | (target[1:] - target[:-1] != 1))
    edges = np.empty(breaks.size + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, breaks + 1, source.size
    starts = edges[:-1]
    return source[starts], target[starts], edges[1:] - starts


class Layout:
    """The pools of an artifact: KV groups' first, then states', in the manifest's order. Plain numbers, no memory."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        states: Sequence[StateGroup],
        fields: Mapping[str, str],
        marks: Sequence[Sequence[str]] = (),
    ) -> None:
        self.groups = tuple(groups)
        self.states = tuple(states)
        self.marks = tuple(tuple(names) for names in marks)
        """Pools that are final behind each mark of the program, while a step is computed."""
        self.fields = {
            **fields,
            "kv_groups": _hash([dataclasses.asdict(g) for g in groups]),
            "state_groups": _hash([dataclasses.asdict(g) for g in states]),
            "marks": _hash(self.marks),
        }
        """What must be equal on both sides, in the order in which it is compared; long ones by their hash."""
        self.fingerprint = hashlib.sha256(json.dumps(self.fields).encode()).hexdigest()
        of_kv = [(p, g.entries_per_page) for g in groups for p in g.pools]
        of_states = [(p, 1) for s in states for p in s.pools]
        self.pools = tuple(p.name for p, _ in of_kv + of_states)
        self.unit_bytes: Int64Array = np.array(
            [n * int(np.prod(p.entry_shape, dtype=np.int64)) * DTYPE_BYTES[p.dtype] for p, n in of_kv + of_states],
            np.int64,
        )
        """Of each pool: bytes of a page, or of a state row."""
        self.pools_of: dict[str, tuple[int, ...]] = {}
        """Group or state -> numbers of its pools."""
        at = 0
        for name, count in [(g.name, len(g.pools)) for g in groups] + [(s.name, len(s.pools)) for s in states]:
            self.pools_of[name] = tuple(range(at, at + count))
            at += count
        number_of = {name: k for k, names in enumerate(self.marks) for name in names}
        self.by_mark: dict[str, list[tuple[int | None, list[int]]]] = {}
        """Group or state -> its pools that are final behind the same mark, or none."""
        for name, numbers in self.pools_of.items():
            found: dict[int | None, list[int]] = {}
            for number in numbers:
                found.setdefault(number_of.get(self.pools[number]), []).append(number)
            self.by_mark[name] = list(found.items())

    @classmethod
    def of(
        cls, manifest: Manifest, marks: Sequence[Sequence[str]] = (), extra: Mapping[str, str] | None = None
    ) -> Layout:
        """The layout of an artifact. `extra`: more that both sides must agree on, as which weights they serve."""
        fields = {
            "format_version": str(manifest.format_version),
            "model_sha256": manifest.model_sha256,
            "target": manifest.target,
            "compute_dtype": manifest.compute_dtype,
            **(extra or {}),
        }
        return cls(manifest.kv_groups, manifest.state_groups, fields, marks)

    def columns(self, max_context: int) -> tuple[int, ...]:
        """Columns of every group's page table for requests of `max_context` tokens."""
        return tuple(ceil_div(max_context, g.page_tokens) for g in self.groups)

    def check(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Raises HandleError that names the first field in which another side differs."""
        if fingerprint == self.fingerprint and dict(fields) == self.fields:
            return
        for name in [*self.fields, *fields]:
            ours, theirs = self.fields.get(name, "nothing"), fields.get(name, "nothing")
            if ours != theirs:
                raise HandleError(
                    f"the prefill side has `{name}` {theirs[:16]}, this one {ours[:16]}",
                    hint="serve the same artifact with the same weights in every role",
                )
        raise HandleError("the handle's fingerprint is not that of its fields")

    def ranges(self, pools: Sequence[int], source: Int64Array, target: Int64Array) -> Ranges:
        """Pages (or rows) `source` of the peer into `target` here, merged, in each of these pools."""
        first, to, count = merge(source, target)
        unit = self.unit_bytes[list(pools)][:, None]
        shape = (len(pools), first.size)
        return Ranges(
            np.repeat(np.array(pools, np.int64), first.size),
            (unit * first).reshape(-1),
            (unit * to).reshape(-1),
            np.broadcast_to(unit * count, shape).reshape(-1),
        )


SAMPLES = 64
"""Values of every weight that say which one it is: training changes nearly all of them."""
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Which weights these are: of each its name, dtype, shape and a sample of its values, spread over all of it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.dtype} {list(weight.shape)} ".encode())
        if weight.numel():
            plain = weight.detach().view(_SAME_SIZE[weight.element_size()])
            at = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long()
            index = torch.unravel_index(at, weight.shape) if weight.dim() else (at,)
            found = (plain if weight.dim() else plain.reshape(1))[tuple(i.to(weight.device) for i in index)]
            digest.update(found.cpu().numpy().tobytes())
    return digest.hexdigest()


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
