"""A step's inputs on their way to the device: one pinned buffer, one copy, one tensor for every input.

    staging = Staging(programs, device)
    views = staging.begin("decode.64")     numpy views of a pinned buffer that no copy reads any more, padded
    views["token_ids"][:n] = ...
    staging.send("decode.64")              asynchronous, on the current stream

Every program lays its inputs out from the start of the same device buffer: programs run one after another. Page tables
and state slots are not staged: they stay on the device (runtime/tables.py). A fresh buffer holds a step of nobody:
tokens of slot 0 at position 0, no ends, rows of slot 0; only what a step writes must be undone, see `_PADDING`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv4c.artifact import Input, Program
from dsv4c.runtime.buffers import sizes_of

RESIDENT = frozenset({"page_table", "state_slots"})
"""Kinds of inputs that stay on the device."""
ALIGNMENT = 256
FAR = 2**30
"""End of the null slot's sequence: far away, so that no ring keeps a padded token."""
_PADDING: Mapping[str, int | float] = {
    "window_ends": -1, "temperature": 0.0, "top_p": 1.0, "repetition": 1.0, "draft_top_p": 1.0
}  # fmt: skip
_EDITS = frozenset({"edit_tokens", "edit_values"})
_SHARED = _EDITS | {"masks"}
"""Kinds that rows of logits refer to, of which only what is used is sent."""


class _Layout:
    """Where each input of a program lies, and the bytes of all but edits and masks and of all."""

    def __init__(self, program: Program, rows: Mapping[str, int]) -> None:
        self.places: dict[str, tuple[Input, tuple[int, ...], int]] = {}
        at = self.plain_bytes = 0
        staged = [item for item in program.inputs if item.kind not in RESIDENT]
        for item in sorted(staged, key=lambda i: i.kind in _SHARED):  # a stable sort: they come last
            sizes = sizes_of(item.shape, {**program.symbols, **rows})
            size = int(np.prod(sizes)) * getattr(torch, item.dtype).itemsize
            self.places[item.name] = item, sizes, at
            at += -(-size // ALIGNMENT) * ALIGNMENT
            if item.kind not in _SHARED:
                self.plain_bytes = at
        self.total_bytes = at


class Staging:
    """Pinned buffers in rotation and the device buffer they are copied to.

    `rows` gives the sizes that the runtime chose, by symbol (`R`). `turns` buffers: as many steps may be on their way
    and one being built, which is for the caller to see to.
    """

    def __init__(
        self, programs: Mapping[str, Program], device: torch.device, rows: Mapping[str, int], turns: int = 3
    ) -> None:
        self._layouts = {name: _Layout(program, rows) for name, program in programs.items()}
        size = max(layout.total_bytes for layout in self._layouts.values())
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(turns)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._bytes = [host.numpy() for host in self._hosts]
        self._views = [
            {name: self._numpy(layout, host) for name, layout in self._layouts.items()} for host in self._bytes
        ]
        self._turn = 0

    @staticmethod
    def _numpy(layout: _Layout, host: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        out = {}
        for name, (item, sizes, at) in layout.places.items():
            size = int(np.prod(sizes)) * getattr(torch, item.dtype).itemsize
            out[name] = host[at : at + size].view(item.dtype).reshape(sizes)
        return out

    @property
    def device_bytes(self) -> int:
        return self._device.numel()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The device tensors of a program's inputs."""
        out = {}
        for key, (item, sizes, at) in self._layouts[name].places.items():
            dtype: torch.dtype = getattr(torch, item.dtype)
            size = int(np.prod(sizes)) * dtype.itemsize
            out[key] = self._device[at : at + size].view(dtype).reshape(sizes)
        return out

    def begin(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Views of the next buffer, by input: a step of nobody. Edits and masks are left as they are."""
        self._turn = (self._turn + 1) % len(self._hosts)
        views, layout = self._views[self._turn][name], self._layouts[name]
        self._bytes[self._turn][: layout.plain_bytes] = 0
        for key, (item, _, _) in layout.places.items():
            if item.kind in _PADDING:
                views[key].fill(_PADDING[item.kind])
            elif item.kind == "seq_ends":
                views[key][0] = FAR
        return views

    def send(self, name: str, edits: int = 0) -> None:
        """Copies what `begin` gave to the device, with the first `edits` edits."""
        host, layout = self._hosts[self._turn], self._layouts[name]
        size = layout.plain_bytes
        self._device[:size].copy_(host[:size], non_blocking=True)
        for item, _, at in layout.places.values() if edits else ():
            if item.kind in _EDITS:
                stop = at + edits * getattr(torch, item.dtype).itemsize
                self._device[at:stop].copy_(host[at:stop], non_blocking=True)

    def send_masks(self, name: str, count: int) -> None:
        """Copies masks 1 to `count`. They may be written, and sent, behind all else that `begin` gave."""
        item, sizes, at = self._layouts[name].places["masks"]
        row = sizes[1] * getattr(torch, item.dtype).itemsize
        stop = at + row * (1 + count)
        self._device[at + row : stop].copy_(self._hosts[self._turn][at + row : stop], non_blocking=True)
