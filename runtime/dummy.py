"""Dummy weights, made on the device in the layout that kernels read: seeded, and of a trained model's magnitudes.

A weight depends on its name and the seed alone. Values are drawn independently, so layouts, which only permute them,
need not be applied. Linears have variance 1 / in_features, so that activations stay near 1; FP8 and FP4 weights are
drawn as bytes, with two neighbouring powers of two as scales in the mix that gives that variance (of NVFP4, scales from
0.5 to 2 and a factor for the rest). Routing spreads as
in a trained model: expert tables name distinct experts, evenly, and routers have independent rows and little bias.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.artifact import Manifest, Weight
from dsv4c.errors import ArtifactError
from dsv4c.runtime.recipe import constant, dtype_of, transforms_of
from dsv4c.runtime.weights import LoadProgress, LoadReport, Progress

_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_STD = math.sqrt(sum(v * v for v in _E2M1_VALUES) / len(_E2M1_VALUES))  # of uniformly random codes
_E4M3_STD = 64.0  # of the stored FP8 values: 448 is seven deviations away
_E4M3_MAX = 448.0  # beyond it float8_e4m3fn has nothing but NaN
_E8M0_ONE = 127  # the byte that stands for 1

_STD = {"ape": 0.5, "attn_sink": 1.0, "bias": 0.01, "base": 0.5}
"""Deviation by the last word of the name. 0.05 of router bias gave the busiest of 256 experts 3.3 times the mean."""

_NVFP4_SCALES = (0.5, 2.0)  # drawn evenly in between
_NVFP4_RMS = math.sqrt(1.75)  # of such scales
_INPUT_SCALE = 16 / (6 * 448)  # of activations up to 16

_CHUNK = 1 << 24  # values drawn at once where the dtype cannot be drawn in place: 64 MB of float32


@dataclass(frozen=True)
class DeviceDummies:
    """Stands where a source of weights does, and says that they are made instead of read."""

    seed: int = 0


def make_weights(
    manifest: Manifest, seed: int, progress: Progress | None = None, device: torch.device | None = None
) -> tuple[dict[str, Tensor], LoadReport]:
    """Every weight of an artifact for a GPU by name, on `device` (default: the CPU).

    Raises ArtifactError for a weight that is not stored or plain, as those of a CPU artifact are.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    made = _Maker(manifest, seed, device)
    out: dict[str, Tensor] = {}
    total = sum(math.prod(w.shape) * dtype_of(w).itemsize for w in manifest.weights)
    done = 0
    for count, weight in enumerate(manifest.weights, 1):
        tensor = out[weight.name] = made.weight(weight)
        done += tensor.nbytes
        if progress:
            progress(LoadProgress(count, len(manifest.weights), done, total, weight.name))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # of what was drawn on the way
    return out, LoadReport(len(out), total, time.perf_counter() - started, made=True)


class _Maker:
    def __init__(self, manifest: Manifest, seed: int, device: torch.device) -> None:
        self._experts = int(manifest.model["n_routed_experts"])
        self._seed = seed
        self._device = device
        self._data = {weight.sources: weight for weight in manifest.weights}

    def weight(self, weight: Weight) -> Tensor:
        value = constant(weight)
        if value is not None:
            return value.to(self._device)
        out = torch.empty(weight.shape, dtype=dtype_of(weight), device=self._device)
        generator = self._generator(weight.name)
        names = [name for name, _ in transforms_of(weight)]
        if "stored" not in names:
            if any(name in ("reshape", "transpose", "permute") for name in names):
                raise ArtifactError(
                    f"weight `{weight.name}` is laid out as for a CPU, dummy weights are made for GPUs only",
                    hint="use the dummy weights of a checkpoint's form",
                )
            return self._table(out, generator) if out.dtype == torch.int64 else _plain(weight, out, generator)
        if weight.sources[0].endswith(".input_scale"):
            return out.fill_(_INPUT_SCALE)
        if weight.sources[0].endswith(".weight_scale"):
            return out.copy_(torch.empty_like(out, dtype=torch.float32).uniform_(*_NVFP4_SCALES, generator=generator))
        if weight.sources[0].endswith(".weight_scale_2"):
            wanted = (2 * self._data_of(weight).shape[-1]) ** -0.5 / (_E2M1_STD * _NVFP4_RMS)
            return out.uniform_(0.9 * wanted, 1.1 * wanted, generator=generator)
        if weight.sources[0].endswith(".scale"):
            return _scale(self._data_of(weight), out, generator)
        return _bytes(weight, out, generator)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def _table(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """[V, k] ids: the first k of a random order of the experts, for every token."""
        rows = max(1, _CHUNK // self._experts)
        for part in out.split(rows):
            order = torch.rand(part.shape[0], self._experts, generator=generator, device=self._device)
            part.copy_(order.topk(part.shape[1]).indices)
        return out

    def _data_of(self, scale: Weight) -> Weight:
        """The weight whose scales these are."""
        sources = tuple(name.rpartition(".")[0] + ".weight" for name in scale.sources)
        if sources not in self._data:
            raise ArtifactError(
                f"weight `{scale.name}` scales no weight of the artifact", hint="compile it again with this version"
            )
        return self._data[sources]


def _scale(data: Weight, out: Tensor, generator: torch.Generator) -> Tensor:
    """2^k or 2^(k+1) at random, as an E8M0 byte or in float32: their mean square gives in_features^-0.5."""
    fp4 = data.dtype == "uint8"
    in_features = data.shape[-1] * (2 if fp4 else 1)
    wanted = in_features**-0.5 / (_E2M1_STD if fp4 else _E4M3_STD)
    k = math.floor(math.log2(wanted))
    share = ((wanted / 2.0**k) ** 2 - 1) / 3  # p * 4 + (1 - p) * 1 = (wanted / 2^k)^2
    out.bernoulli_(share, generator=generator)
    return out.add_(_E8M0_ONE + k) if out.dtype == torch.uint8 else out.add_(k).exp2_()


def _bytes(weight: Weight, out: Tensor, generator: torch.Generator) -> Tensor:
    """FP4 codes, of which all sixteen are numbers, or FP8 values, none of them NaN."""
    if out.dtype == torch.uint8:
        return out.random_(0, 256, generator=generator)
    if out.dtype != torch.float8_e4m3fn:
        raise ArtifactError(f"weight `{weight.name}` is stored as {weight.dtype}, of which no dummy is known")
    for part in out.view(-1).split(_CHUNK):
        drawn = torch.randn(part.shape, generator=generator, device=out.device)
        part.copy_(drawn.mul_(_E4M3_STD).clamp_(-_E4M3_MAX, _E4M3_MAX))
    return out


def _plain(weight: Weight, out: Tensor, generator: torch.Generator) -> Tensor:
    """Norms, embeddings, routers and everything else that is never quantised."""
    source = weight.sources[0]
    words: Sequence[str] = source.replace("_", ".").split(".")
    if out.dim() == 1 and words[-1] in ("weight", "scale"):
        return out.uniform_(0.75, 1.25, generator=generator)
    std = _STD.get(source.rsplit(".", 1)[-1], _STD.get(words[-1]))
    if std is None:
        std = 1.0 if source == "embed.weight" else out.shape[-1] ** -0.5
    return out.normal_(0.0, std, generator=generator)
