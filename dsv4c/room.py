"""What the memory plan must know of the world: sizes of an artifact's files, and the memory of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dsv4c.artifact import Manifest
from dsv4c.errors import ConfigError
from dsv4c.runtime.footprint import code_files
from dsv4c.runtime.memory import CARD_SHARE, MemoryPlan, Room


def plan_of(directory: Path, manifest: Manifest) -> MemoryPlan:
    """The memory plan of the artifact in `directory`."""
    return MemoryPlan.of(manifest, sum((directory / file).stat().st_size for file in code_files(manifest)))


def given_room(target: str, total_bytes: int, share: float | None = None) -> Room:
    """A card, or a machine, with so much memory and nobody else on it."""
    if target == "cpu":
        _check_host_share(share)
        return Room.of_host(total_bytes)
    return Room.of_card(total_bytes, share=CARD_SHARE if share is None else share)


def measured_room(target: str, share: float | None = None, device: int = 0) -> Room:
    """This machine's memory, or that of its card `device`, without what others hold of it.

    Raises ConfigError for a GPU target without a GPU.
    """
    if target == "cpu":
        _check_host_share(share)
        return Room.of_host(_available_bytes())
    if not torch.cuda.is_available():
        raise ConfigError(
            f"the artifact is for `{target}`, and this machine has no CUDA device to take the memory of",
            hint="give the card's with `--gpu-memory`, such as `--gpu-memory 141GB`",
        )
    free, total = torch.cuda.mem_get_info(device)
    return Room.of_card(int(total), int(free), CARD_SHARE if share is None else share)


def _check_host_share(share: float | None) -> None:
    if share is not None:
        raise ConfigError("`--gpu-memory-utilization` is for GPU targets, the artifact is for `cpu`")


def _available_bytes() -> int:
    """Host memory that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
