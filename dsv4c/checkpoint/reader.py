"""Reads a checkpoint in DeepSeek's original layout: lazily, memory-mapped, deciding storage tensor by tensor.

    DIR/config.json
    DIR/model.safetensors                  or, in several files:
    DIR/model.safetensors.index.json       {"weight_map": {tensor name: file name}}

A linear may be FP8 (e8m0 or float32 scales), packed FP4, BF16 or F32, whatever config.json says; experts may be NVFP4,
where config.json says so too (nvfp4.py). Names and shapes come from the config (`names.inventory`); MTP tensors may be
absent altogether.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.checkpoint.dequantise import bad_scales, widen
from dsv4c.checkpoint.names import (
    BLOCK,
    NVFP4_SCALARS,
    Kind,
    StoredTensor,
    TensorSpec,
    allowed_dtypes,
    group_of,
    inventory,
    is_mtp,
    num_mtp_layers,
    nvfp4_name,
    stored_kind,
    stored_tensors,
)
from dsv4c.checkpoint.nvfp4 import PUBLISHED, with_stored_experts
from dsv4c.checkpoint.shard import DTYPES, Entry, Shard, no_repeats
from dsv4c.checkpoint.source import Stored, load_model_state
from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError

__all__ = ["Checkpoint", "load_model_state"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MOST_PROBLEMS = 8  # listed in one error; a wrong config gives thousands
_SCALED: tuple[Kind, ...] = ("fp8", "fp4", "nvfp4")


_LEAST_INPUT = torch.finfo(torch.float32).tiny


def _is_scalar(name: str, entry: Entry) -> bool:
    """Whether this is one of an NVFP4 matrix's factors, which some write as a vector of one."""
    return name.endswith(NVFP4_SCALARS) and entry.shape in ((), (1,))


class Checkpoint:
    """A checkpoint folder. Opening it reads config.json and the list of tensors; data is mapped when asked for.

    Raises CheckpointError for a folder that is no checkpoint or whose index is damaged, ConfigError for a bad
    config.json.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            what = "it has no config.json" if self.path.is_dir() else "there is no such folder"
            raise CheckpointError(
                f"`{self.path}` is not a checkpoint: {what}",
                hint="give a folder with config.json and safetensors files",
            )
        config = ModelConfig.from_file(self.path / "config.json")
        self._shards: dict[str, Shard] = {}
        self._files = self._file_of_each_tensor()
        self.config = with_stored_experts(config, self.path, self._files)
        self.has_mtp = num_mtp_layers(self.config) > 0 and any(is_mtp(name) for name in self._files)
        self._specs = inventory(self.config, mtp=self.has_mtp)

    def names(self) -> list[str]:
        """Names of all stored tensors, scales included, sorted."""
        return sorted(self._files)

    def raw(self, name: str) -> Tensor:
        """The stored tensor as a view of its mapped file: read-only by contract."""
        return self._shard_of(name).view(name)

    def release(self) -> None:
        """Gives resident pages of the files back; call it after copying raw tensors. Views of them stay valid."""
        for shard in self._shards.values():
            shard.release()

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A logical tensor ([out, in] of a linear, ...) as a new `dtype` tensor; tables of ids stay int64.

        Raises CheckpointError if it is no tensor of the model, is missing, misshapen or of a wrong type, if a scale
        is not finite, or if a table row repeats an expert or leaves the range.
        """
        parts = [self.raw(part.name) for part in self.parts(name)]
        self.check(name)
        out = widen(parts, dtype)
        out = out.clone() if out.data_ptr() == parts[0].data_ptr() else out
        for part in self.parts(name):
            self._shard_of(part.name).release()
        return out

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical tensor. Raises CheckpointError if it is no tensor of the model."""
        return self._spec(name).shape

    def stored(self, name: str) -> Stored:
        """What is stored under this name. Raises CheckpointError if nothing is."""
        entry = self._shard_of(name).entries.get(name)
        if entry is None:
            raise CheckpointError(f"`{name}` is missing in {self._where(name)}", hint=self._hint())
        return Stored(name, DTYPES[entry.dtype], () if _is_scalar(name, entry) else entry.shape)

    def parts(self, name: str) -> tuple[Stored, ...]:
        """The stored tensors that make a logical one: itself, then its scale, then, of NVFP4, its factor.

        Raises CheckpointError if one is missing, misshapen or of a wrong type.
        """
        spec = self._spec(name)
        problem = self._stored_problem(spec)
        if problem:
            raise CheckpointError(problem, hint=self._hint())
        kind = self._kind(spec)
        if kind not in _SCALED:
            return (self.stored(name),)
        if kind == "nvfp4":
            factor = self.stored(nvfp4_name(name, "weight_scale_2"))._replace(covers=spec.shape[0])
            return self.stored(name), self.stored(nvfp4_name(name, "weight_scale")), factor
        covers = BLOCK if kind == "fp8" else 1
        return self.stored(name), self.stored(spec.scale_name)._replace(covers=covers)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills `into` (uint8 [n], on the host) with a stored tensor's bytes from `start` on; from any thread."""
        self._shard_of(name).read(name, start, into)

    def widen(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same rows of a logical tensor's parts -> these rows as `dtype`, where the parts are; ids stay int64."""
        return widen(parts, dtype)

    def suspect(self, name: str, parts: Sequence[Tensor]) -> Tensor | None:
        """How many scales of these rows cannot be right, or rows of a table that name no distinct experts."""
        if len(parts) > 1:
            return torch.stack([bad_scales(part, 0.0 if len(parts) > 2 else None) for part in parts[1:]]).sum()
        if self._spec(name).role != "table":
            return None
        rows = parts[0].sort(-1).values
        bad = (rows[:, :1] < 0) | (rows[:, -1:] >= self.config.n_routed_experts)
        return (bad | (rows[:, 1:] == rows[:, :-1])).sum()

    def check(self, name: str) -> None:
        """Raises CheckpointError if a scale cannot be right, or a table row repeats an expert or leaves the range."""
        problem = self._data_problem(self._spec(name))
        if problem:
            raise CheckpointError(problem, hint=self._hint())

    def validate(self) -> None:
        """Compares every tensor with what the config demands, and reads all scales and expert tables.

        Raises one CheckpointError that names the first tensors at fault, their files and both values.
        """
        for name in self._files:
            self._shard_of(name)
        problems = list(self._problems())
        if not problems:
            return
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise CheckpointError("; ".join(shown), hint=self._hint())

    def _problems(self) -> Iterator[str]:
        known = set()
        for spec in self._specs.values():
            known.add(spec.name)
            problem = self._stored_problem(spec)
            kind = self._kind(spec) or spec.kind
            known.update(tensor.name for tensor in stored_tensors(spec, kind))
            if problem is None:
                problem = self._data_problem(spec)
            elif spec.role in ("linear", "expert"):  # one complaint a weight
                known.add(spec.scale_name)
                known.update(tensor.name for tensor in stored_tensors(spec, "nvfp4"))
            if problem:
                yield problem
        for file, shard in self._shards.items():
            for name in shard.entries:
                if self._files.get(name, file) != file:
                    yield f"`{name}` is in `{self._files[name]}` and in `{file}`, expected it once"
        stored = {name: file for file, shard in self._shards.items() for name in shard.entries} | self._files
        for name in sorted(stored.keys() - known):
            entry = self._shards[stored[name]].entries.get(name)
            found = f"{entry.dtype} {list(entry.shape)}" if entry else "only its name in the index"
            yield f"`{name}` in `{stored[name]}` is unexpected: found {found}, expected no such tensor"

    def _stored_problem(self, spec: TensorSpec) -> str | None:
        """What is wrong with the presence, type or shape of a tensor or its scale."""
        entry = self._entry(spec.name)
        if entry is None:
            stored = stored_tensors(spec)[0]
            return f"`{spec.name}` is missing in {self._where(spec.name)}: expected {stored.dtype} {list(stored.shape)}"
        where = f"`{spec.name}` in {self._where(spec.name)}"
        kind = stored_kind(spec, entry.dtype)
        if kind is None:
            return f"{where}: dtype is {entry.dtype}, expected {' or '.join(allowed_dtypes(spec))}"
        weight, *scales = stored_tensors(spec, kind)
        if entry.shape != weight.shape:
            return f"{where}: shape is {list(entry.shape)}, expected {list(weight.shape)} for {entry.dtype}"
        if kind in ("fp4", "nvfp4") and spec.shape[1] % group_of(kind):
            return f"{where}: {spec.shape[1]} input channels are no multiple of {group_of(kind)}, which share a scale"
        problems = (self._scale_problem(spec, kind, scale) for scale in scales)
        return next((problem for problem in problems if problem), None)

    def _scale_problem(self, spec: TensorSpec, kind: Kind, due: StoredTensor) -> str | None:
        entry, dtypes = self._entry(due.name), (due.dtype, "F32") if kind == "fp8" else (due.dtype,)
        what = f"{' or '.join(dtypes)} {list(due.shape)}"
        if entry is None:
            missing = f"`{due.name}` is missing in {self._where(due.name)}: expected {what}"
            return missing + self._found_instead(spec, kind)
        where = f"`{due.name}` in {self._where(due.name)}"
        if entry.dtype not in dtypes:
            return f"{where}: dtype is {entry.dtype}, expected {' or '.join(dtypes)}"
        if entry.shape != due.shape and not (due.shape == () and _is_scalar(due.name, entry)):
            group = f", a scale for {group_of(kind)} channels" if group_of(kind) > 1 and due.shape else ""
            return f"{where}: shape is {list(entry.shape)}, expected {list(due.shape)}{group}"
        return None

    def _found_instead(self, spec: TensorSpec, kind: Kind) -> str:
        """Why a scale is missing, if the tensor has one of another format."""
        if kind == "nvfp4" and spec.scale_name in self._files:
            return f"; it is MXFP4, by `{spec.scale_name}`, while other experts of its layer are NVFP4"
        if kind == "fp4" and nvfp4_name(spec.name, "weight_scale") in self._files:
            return f"; it is NVFP4, by its `weight_scale`, which only routed experts may be: {PUBLISHED}"
        return ""

    def _data_problem(self, spec: TensorSpec) -> str | None:
        """What is wrong with the scales or the expert ids of a tensor that is stored as it should be."""
        kind = self._kind(spec)
        for tensor in stored_tensors(spec, kind)[1:]:
            scale, least, finite = self.raw(tensor.name), None, "NaN or infinite"
            if kind == "nvfp4":  # a factor of 0 stands for a matrix of zeros, but rows are divided by `input_scale`
                least = _LEAST_INPUT if tensor.name.endswith(".input_scale") else 0.0
                finite = "NaN, infinite, negative or zero" if least else "NaN, infinite or negative"
            bad = int(bad_scales(scale, least))
            self._shard_of(tensor.name).release()
            if bad:
                return (
                    f"`{tensor.name}` in {self._where(tensor.name)}: found {bad} {finite} scales, "
                    f"expected all {scale.numel()} to be finite{' and positive' if kind == 'nvfp4' else ''}"
                )
        return self._table_problem(spec) if spec.role == "table" else None

    def _table_problem(self, spec: TensorSpec) -> str | None:
        experts = self.config.n_routed_experts
        rows = self.raw(spec.name).sort(-1).values
        where = f"`{spec.name}` in {self._where(spec.name)}"
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= experts):
            found = int(rows.max()) if int(rows.max()) >= experts else int(rows.min())
            return f"{where}: found expert {found}, expected 0 to {experts - 1}"
        repeated = (rows[:, 1:] == rows[:, :-1]).any(-1).nonzero()
        if len(repeated):
            row = int(repeated[0])
            ids = self.raw(spec.name)[row].tolist()
            return f"{where}: row {row} is {ids}, expected {len(ids)} distinct experts"
        return None

    def _spec(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None:
            raise CheckpointError(f"`{name}` is no tensor of this model", hint=f"see config.json in `{self.path}`")
        return spec

    def _kind(self, spec: TensorSpec) -> Kind | None:
        entry = self._entry(spec.name)
        return stored_kind(spec, entry.dtype) if entry else None

    def _entry(self, name: str) -> Entry | None:
        return self._shard_of(name).entries.get(name) if name in self._files else None

    def _where(self, name: str) -> str:
        return f"`{self._files.get(name, self.path)}`"

    def _hint(self) -> str:
        return f"is config.json in `{self.path}` of this model, and is the download whole?"

    def _shard_of(self, name: str) -> Shard:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"`{name}` is missing in `{self.path}`", hint=self._hint())
        if file not in self._shards:
            if not (self.path / file).is_file():
                raise CheckpointError(
                    f"`{name}` should be in `{file}`, but `{self.path}` has no such file", hint=self._hint()
                )
            self._shards[file] = Shard(self.path / file)
        return self._shards[file]

    def _file_of_each_tensor(self) -> dict[str, str]:
        index = self.path / INDEX_FILE
        if not index.is_file():
            if not (self.path / SINGLE_FILE).is_file():
                raise CheckpointError(
                    f"`{self.path}` is not a checkpoint: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
                    hint="give a folder with config.json and safetensors files",
                )
            self._shards[SINGLE_FILE] = Shard(self.path / SINGLE_FILE)
            return dict.fromkeys(self._shards[SINGLE_FILE].entries, SINGLE_FILE)
        try:
            data = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_repeats)
            files = {str(name): str(file) for name, file in data["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"`{index}` has no readable `weight_map`: {error!r}", hint=self._hint()) from error
        for name, file in files.items():
            if Path(file).name != file:
                raise CheckpointError(
                    f"`{index}` puts `{name}` in `{file}`, expected a plain file name", hint=self._hint()
                )
        return files
