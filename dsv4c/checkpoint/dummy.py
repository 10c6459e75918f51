"""Seeded random weights for any config, with a checkpoint's interface and storage, made one tensor at a time.

A tensor depends on its name and the seed alone. Linears have variance 1 / in_features, so that activations stay near
1; FP4 and FP8 weights are drawn directly in their storage, with two neighbouring powers of two as scales in the mix
that gives that variance; NVFP4 with scales from 0.5 to 2 and a factor for the rest. Norms are near 1, everything that
a fresh model leaves constant (sinks, ape, hc base and scale, gate bias) varies, and expert tables hold distinct
experts, evenly spread.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4c.checkpoint.dequantise import E2M1_VALUES, widen
from dsv4c.checkpoint.names import (
    BLOCK,
    Kind,
    TensorSpec,
    inventory,
    num_mtp_layers,
    scale_shape,
    stored_tensors,
)
from dsv4c.checkpoint.shard import DTYPES
from dsv4c.checkpoint.source import Stored
from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError

_E2M1_STD = math.sqrt(sum(v * v for v in E2M1_VALUES) / len(E2M1_VALUES))  # of uniformly random codes
_NVFP4_SCALES = (0.5, 2.0)  # drawn evenly in between
_NVFP4_RMS = math.sqrt(1.75)  # of such scales
_INPUT_SCALE = 16 / (6 * 448)  # of activations up to 16
_E4M3_STD = 64.0  # of the stored FP8 values: 448 is seven deviations away, so nothing is clipped

_STD = {"ape": 0.5, "attn_sink": 1.0, "bias": 0.05, "base": 0.5}
"""Deviation by the last word of the name; the gate bias is small beside scores, which spread by about 0.25."""


class DummySource:
    """Random weights of a model, as if read from a checkpoint (see `WeightSource`).

    config: the model; seed: any int. Raises CheckpointError for a name that the model lacks.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.has_mtp = num_mtp_layers(config) > 0
        self._specs = inventory(config)
        self._stored = {t.name: spec for spec in self._specs.values() for t in stored_tensors(spec)}
        self._last: tuple[str, Tensor] | None = None  # the tensor of which some rows were read last
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of all stored tensors, scales included, sorted."""
        return sorted(self._stored)

    def raw(self, name: str) -> Tensor:
        """The tensor in its storage: FP8 or packed FP4 bytes, e8m0 scales, BF16, F32 or I64."""
        spec = self._stored.get(name)
        if spec is None:
            raise CheckpointError(f"`{name}` is no tensor of this model", hint="see `names()`")
        generator = self._generator(name)
        if name != spec.name:
            return _random_nvfp4(spec, name, generator) if spec.kind == "nvfp4" else _random_scale(spec, generator)
        if spec.kind == "nvfp4":
            packed_shape = stored_tensors(spec)[0].shape
            return torch.randint(0, 256, packed_shape, dtype=torch.uint8, generator=generator)
        if spec.kind == "fp4":
            packed_shape = stored_tensors(spec)[0].shape
            return torch.randint(-128, 128, packed_shape, dtype=torch.int8, generator=generator)
        if spec.kind == "fp8":
            values = torch.randn(spec.shape, generator=generator).mul_(_E4M3_STD)
            return values.clamp_(-448, 448).to(torch.float8_e4m3fn)
        if spec.kind == "i64":
            return self._table(spec, generator)
        return _random_plain(spec, generator)

    def release(self) -> None:
        """Forgets the tensor that was read last; nothing else is kept."""
        with self._lock:
            self._last = None

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A logical tensor as a new `dtype` tensor; tables of ids stay int64."""
        return widen([self.raw(part.name) for part in self.parts(name)], dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical tensor."""
        return self._spec(name).shape

    def stored(self, name: str) -> Stored:
        """What is stored under this name."""
        if name not in self._stored:
            raise CheckpointError(f"`{name}` is no tensor of this model", hint="see `names()`")
        tensor = next(t for t in stored_tensors(self._stored[name]) if t.name == name)
        return Stored(name, DTYPES[tensor.dtype], tensor.shape)

    def parts(self, name: str) -> tuple[Stored, ...]:
        """The stored tensors that make a logical one: itself, then its scale, then, of NVFP4, its factor."""
        spec = self._spec(name)
        tensors = stored_tensors(spec)[:3]  # without NVFP4's `input_scale`
        covers = {spec.scale_name: BLOCK} if spec.kind == "fp8" else {t.name: spec.shape[0] for t in tensors[2:]}
        return tuple(self.stored(t.name)._replace(covers=covers.get(t.name, 1)) for t in tensors)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills `into` (uint8 [n]) with a stored tensor's bytes from `start` on; made once for reads in a row."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = name, self.raw(name).reshape(-1).view(torch.uint8)
            into.copy_(self._last[1][start : start + into.numel()])

    def widen(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same rows of a logical tensor's parts -> these rows as `dtype`, where the parts are; ids stay int64."""
        return widen(parts, dtype)

    def suspect(self, name: str, parts: Sequence[Tensor]) -> Tensor | None:
        """Nothing: scales are finite and tables hold distinct experts."""
        return None

    def check(self, name: str) -> None:
        """Nothing is wrong with any tensor."""

    def _spec(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None:
            raise CheckpointError(f"`{name}` is no tensor of this model", hint="see `names()`")
        return spec

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def _table(self, spec: TensorSpec, generator: torch.Generator) -> Tensor:
        """[V, k] ids: the first k of a random order of the experts, for every token."""
        vocab, count = spec.shape
        experts = self.config.n_routed_experts
        order: Tensor = torch.rand((vocab, experts), generator=generator).argsort(-1)
        return order[:, :count].contiguous()


def _random_scale(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """e8m0 scales, 2^k or 2^(k+1) at random, whose mean square makes the weight's deviation in_features^-0.5."""
    kind: Kind = spec.kind
    wanted = spec.shape[1] ** -0.5 / (_E2M1_STD if kind == "fp4" else _E4M3_STD)
    k = math.floor(math.log2(wanted))
    share = ((wanted / 2.0**k) ** 2 - 1) / 3  # p * 4 + (1 - p) * 1 = (wanted / 2^k)^2
    up = torch.rand(scale_shape(spec.shape, kind), generator=generator) < share
    exponent: Tensor = up.to(torch.uint8) + (127 + k)
    return exponent.view(torch.float8_e8m0fnu)


def _random_nvfp4(spec: TensorSpec, name: str, generator: torch.Generator) -> Tensor:
    """E4M3 scales around 1, the factor that makes the weight's deviation in_features^-0.5, or that of its input."""
    if name.endswith(".input_scale"):
        return torch.tensor(_INPUT_SCALE)
    if name.endswith(".weight_scale_2"):
        wanted = spec.shape[1] ** -0.5 / (_E2M1_STD * _NVFP4_RMS)
        factor: Tensor = torch.empty(()).uniform_(0.9, 1.1, generator=generator) * wanted
        return factor
    scale = torch.empty(scale_shape(spec.shape, "nvfp4")).uniform_(*_NVFP4_SCALES, generator=generator)
    return scale.to(torch.float8_e4m3fn)


def _random_plain(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Norms, embeddings, routers and everything else that is never quantised."""
    dtype = torch.bfloat16 if spec.kind == "bf16" else torch.float32
    words = spec.name.replace("_", ".").split(".")
    if len(spec.shape) == 1 and words[-1] in ("weight", "scale"):
        return torch.empty(spec.shape).uniform_(0.75, 1.25, generator=generator).to(dtype)
    last = spec.name.rsplit(".", 1)[-1]
    std = _STD.get(last, _STD.get(words[-1]))
    if std is None:
        std = 1.0 if spec.name == "embed.weight" else spec.shape[-1] ** -0.5
    return torch.randn(spec.shape, generator=generator).mul_(std).to(dtype)
