"""Writes a model's parameters as a checkpoint in DeepSeek's original layout: FP4 experts, FP8 linears, e8m0 scales.

The same state gives the same bytes. One file's tensors are in memory at a time. The files are:

    DIR/config.json, DIR/model.safetensors                                            if all fits in one file
    DIR/config.json, DIR/model-0000i-of-0000n.safetensors, DIR/model.safetensors.index.json   otherwise
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4c.checkpoint.dequantise import quantise_fp4, quantise_fp8_block
from dsv4c.checkpoint.names import (
    GROUP,
    Kind,
    TensorSpec,
    inventory,
    is_mtp,
    parameter_sources,
    stored_tensors,
)
from dsv4c.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError

Format = Literal["fp4", "fp8", "bf16", "f32"]

DEFAULT_SHARD_BYTES = 4 * 2**30
_FLOAT_DTYPES: dict[Kind, torch.dtype] = {"bf16": torch.bfloat16, "f32": torch.float32}


def write_checkpoint(
    path: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    expert_format: Format = "fp4",
    linear_format: Format = "fp8",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes `state` (plain model's parameter name -> tensor, experts stacked) into the folder `path`.

    `shard_bytes` bounds the tensor bytes of a file, unless one tensor is larger. config.json says
    `expert_format` as `expert_dtype`. MTP parameters may be absent altogether. A checkpoint that the folder held
    before is replaced; other files there are left alone.

    Raises CheckpointError naming the parameter that is missing, unexpected, misshapen or not finite.
    """
    path = Path(path)
    config = dataclasses.replace(config, expert_dtype=expert_format)
    mtp = any(is_mtp(name) for name in state)
    specs = inventory(config, mtp=mtp)
    origins = _check_state(config, specs, state, mtp)
    formats: dict[str, Kind] = {"expert": expert_format, "linear": linear_format}
    kinds = {spec.name: formats.get(spec.role, spec.kind) for spec in specs.values()}
    _check_fp4(specs, kinds)

    path.mkdir(parents=True, exist_ok=True)
    _remove_old(path)
    (path / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shards = _shards(specs, kinds, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for spec in shard:
            parameter, row = origins[spec.name]
            tensor = state[parameter].detach().cpu()
            tensors |= _store(spec, kinds[spec.name], tensor if row is None else tensor[row])
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_state(
    config: ModelConfig, specs: Mapping[str, TensorSpec], state: Mapping[str, Tensor], mtp: bool
) -> dict[str, tuple[str, int | None]]:
    """Where each checkpoint tensor comes from: a parameter, and a row of it if it stacks experts."""
    hint = "give the state dict of the plain model of this config"
    origins: dict[str, tuple[str, int | None]] = {}
    sources = parameter_sources(config, mtp=mtp)
    for name in state:
        if name not in sources:
            raise CheckpointError(f"`{name}` is no parameter of this model", hint=hint)
    for parameter, names in sources.items():
        if parameter not in state:
            raise CheckpointError(f"parameter `{parameter}` is missing", hint=hint)
        spec, tensor = specs[names[0]], state[parameter]
        stacked = spec.role == "expert"
        shape = (len(names), *spec.shape) if stacked else spec.shape
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"parameter `{parameter}`: shape is {list(tensor.shape)}, expected {list(shape)}", hint=hint
            )
        if tensor.is_floating_point() != (spec.role != "table"):
            expected = "int64" if spec.role == "table" else "a float dtype"
            raise CheckpointError(f"parameter `{parameter}`: dtype is {tensor.dtype}, expected {expected}", hint=hint)
        for row, name in enumerate(names):
            origins[name] = (parameter, row if stacked else None)
    return origins


def _check_fp4(specs: Mapping[str, TensorSpec], kinds: Mapping[str, Kind]) -> None:
    for spec in specs.values():
        if kinds[spec.name] == "fp4" and spec.shape[1] % GROUP:
            raise CheckpointError(
                f"`{spec.name}` has {spec.shape[1]} input channels, expected a multiple of {GROUP} for FP4",
                hint="write it as fp8 or bf16",
            )


def _shards(specs: Mapping[str, TensorSpec], kinds: Mapping[str, Kind], limit: int) -> list[list[TensorSpec]]:
    """Tensors in model order, cut where a file would exceed `limit` bytes; a weight stays with its scale."""
    shards: list[list[TensorSpec]] = [[]]
    room = limit
    for spec in specs.values():
        size = sum(tensor.nbytes for tensor in stored_tensors(spec, kinds[spec.name]))
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(spec)
        room -= size
    return shards


def _store(spec: TensorSpec, kind: Kind, tensor: Tensor) -> dict[str, Tensor]:
    """The stored tensors of one logical tensor, by name."""
    if kind == "i64":
        return {spec.name: tensor.to(torch.int64).contiguous()}
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"`{spec.name}`: found {bad} NaN or infinite values, expected all {tensor.numel()} to be finite",
            hint="did training diverge?",
        )
    if kind in ("fp8", "fp4"):
        weight, scale = quantise_fp8_block(tensor) if kind == "fp8" else quantise_fp4(tensor)
        return {spec.name: weight.contiguous(), spec.scale_name: scale.contiguous()}
    return {spec.name: tensor.to(_FLOAT_DTYPES[kind], copy=True).contiguous()}


def _remove_old(path: Path) -> None:
    old = [path / INDEX_FILE, path / SINGLE_FILE, *path.glob("model-?????-of-?????.safetensors")]
    for file in old:
        file.unlink(missing_ok=True)
