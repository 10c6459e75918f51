"""Loads an artifact: manifest, kernels, weights, pools -> an executor. Refuses what does not match, with the fix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.errors import ArtifactError
from dsv4c.runtime.dummy import DeviceDummies, make_weights
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.gpu import check_card
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Kernels
from dsv4c.runtime.pools import Buffer, PoolRows, allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.weights import LoadReport, Progress, WeightSource, load_weights

_ISAS = ("default", "avx2", "avx512")  # each can run what the ones before it need


def load(
    directory: str | Path,
    source: WeightSource | DeviceDummies,
    rows: PoolRows,
    progress: Progress | None = None,
    *,
    manifest: Manifest | None = None,
    report: Callable[[LoadReport], None] | None = None,
    make: Callable[..., ArtifactExecutor] = ArtifactExecutor,
    memory: Buffer | None = None,
) -> ArtifactExecutor:
    """The executor of a CPU artifact in `directory`, with weights from `source` and zeroed pools of `rows`.

    `manifest` saves reading it again; `report` is told what was loaded and how fast; `make`: a kind of executor that
    takes what ArtifactExecutor does; `memory`: where the pools are to lie, see `allocate`. Raises ArtifactError if
    the artifact is corrupt or made for another target or instruction set, CheckpointError if the weights do not fit.
    """
    directory = Path(directory)
    if manifest is None:
        manifest = load_manifest(directory)
    check_host(manifest)
    drafting = {None: set(), "mtp": {"mtp"}, "dspark": {"dspark.absorb", "dspark.draft"}}
    if set(manifest.programs) != {"step"} | drafting[manifest.drafter.kind if manifest.drafter else None]:
        raise ArtifactError(
            f"the artifact has programs {', '.join(sorted(manifest.programs)) or 'none'}, this runtime runs `step`",
            hint="compile it again with this version",
        )
    kernels = Kernels(manifest.kernels, directory, manifest.target)
    states = allocate(manifest, rows, memory=memory)
    weights, loaded = weights_on(torch.device("cpu"), manifest, source, progress)
    if report:
        report(loaded)
    return make(manifest.programs["step"], kernels, weights, states)


def load_device(
    directory: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    sizes: PoolSizes,
    device: torch.device,
    breaks: Sequence[str] = (),
    make: Callable[..., GraphExecutor] = GraphExecutor,
) -> GraphExecutor:
    """The executor of a GPU artifact over weights that are on `device`, with zeroed pools; nothing captured yet.

    `breaks`: scopes to keep out of the graphs; `make`: a kind of executor that takes what GraphExecutor does. Raises
    ArtifactError as `load` does, ConfigError for a pattern that matches nothing.
    """
    check_host(manifest, device.index or 0)
    kernels = Kernels(manifest.kernels, directory, manifest.target, device.index or 0)
    states = allocate(manifest, sizes, device)
    rows = device_rows(manifest, sizes)
    return make(manifest.programs, kernels, weights, states, device, rows=rows, breaks=breaks)


def device_rows(manifest: Manifest, sizes: PoolSizes) -> dict[str, int]:
    """Sizes of the symbols that state has on a device: a row a slot, page tables for the longest context."""
    rows = {"R": sizes.slots, "Z": sizes.slots}
    page_tokens = {group.name: group.page_tokens for group in manifest.kv_groups}
    for program in manifest.programs.values():
        for item in program.inputs:
            if item.kind == "page_table":
                columns = -(-sizes.max_context // page_tokens[str(item.group)])
                rows[str(item.shape[1])] = max(item.min_columns, columns)
    return rows


def weights_on(
    device: torch.device, manifest: Manifest, source: WeightSource | DeviceDummies, progress: Progress | None = None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The artifact's weights by name, streamed from a source or made on the device."""
    if isinstance(source, DeviceDummies):
        return make_weights(manifest, source.seed, progress, device)
    return load_weights(manifest.weights, source, progress, device)


def check_host(manifest: Manifest, device: int = 0) -> None:
    """Raises ArtifactError if this machine, or its card of this number, cannot run the artifact's kernels."""
    if manifest.target != "cpu":
        check_card(manifest.target, device)
        return
    host = torch.backends.cpu.get_cpu_capability().lower()
    runs = _ISAS[: _ISAS.index(host) + 1] if host in _ISAS else (host,)
    if manifest.isa not in runs:
        raise ArtifactError(
            f"the artifact needs the instruction set `{manifest.isa}`, this machine has `{host}`",
            hint="compile it on this machine",
        )
