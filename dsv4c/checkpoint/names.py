"""Which tensors a checkpoint of a ModelConfig holds, under which names, and which model parameter each one feeds.

Pure data: strings and shapes, no torch. Storage types are written as safetensors writes them (`F8_E4M3`, `I8`, ...).
The kind of a tensor is only its usual storage; a reader decides by the stored type and shape (`stored_kind`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsv4c.config import DSpark, ModelConfig
from dsv4c.nvfp4 import NVFP4_GROUP

Kind = Literal["fp8", "fp4", "nvfp4", "bf16", "f32", "i64"]
Role = Literal["linear", "expert", "plain", "table"]

BLOCK = 128  # an FP8 scale covers a tile of 128 x 128 weights; tiles at the edges are partial
GROUP = 32  # an FP4 scale covers 32 consecutive input channels of one output row

ITEM_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F32": 4, "I64": 8}
"""Bytes per element of every storage type that a checkpoint may use."""

_PLAIN_DTYPES: dict[str, Kind] = {"BF16": "bf16", "F32": "f32"}
_KIND_DTYPES: dict[Kind, str] = {
    "fp8": "F8_E4M3", "fp4": "I8", "nvfp4": "U8", "bf16": "BF16", "f32": "F32", "i64": "I64",
}  # fmt: skip
NVFP4_SCALARS = (".weight_scale_2", ".input_scale")
"""float32, one of each for an NVFP4 matrix: its own factor, and that of what it is multiplied with."""


def scale_name(name: str) -> str:
    """Name of the companion tensor of a quantised tensor."""
    return name.removesuffix(".weight") + ".scale"


def nvfp4_name(name: str, part: str) -> str:
    """Name of an NVFP4 matrix's `weight_scale` (E4M3, for 16 channels of a row), `weight_scale_2` or `input_scale`."""
    return f"{name.removesuffix('.weight')}.{part}"


@dataclass(frozen=True)
class TensorSpec:
    """One logical tensor: its name, its shape after dequantisation, its usual storage and its role.

    Only linears and experts may be quantised. A table holds expert ids (int64).
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    role: Role = "plain"

    @property
    def scale_name(self) -> str:
        """Name of the companion tensor if this one is quantised."""
        return scale_name(self.name)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file holds it; `dtype` is safetensors' name of the type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def scale_shape(shape: tuple[int, ...], kind: Kind) -> tuple[int, int]:
    """Shape of the scale of a quantised [out, in] weight."""
    out, inner = shape
    return (-(-out // BLOCK), -(-inner // BLOCK)) if kind == "fp8" else (out, -(-inner // group_of(kind)))


def group_of(kind: Kind) -> int:
    """Input channels of a row that share a scale of this kind, which divides them; 1 where none do."""
    return {"fp4": GROUP, "nvfp4": NVFP4_GROUP}.get(kind, 1)


def stored_tensors(spec: TensorSpec, kind: Kind | None = None) -> tuple[StoredTensor, ...]:
    """What a file holds for a logical tensor stored as `kind` (default: its usual one): itself, then its scales."""
    kind = kind or spec.kind
    shape = (spec.shape[0], spec.shape[1] // 2) if kind in ("fp4", "nvfp4") else spec.shape
    weight = StoredTensor(spec.name, shape, _KIND_DTYPES[kind])
    if kind == "nvfp4":
        scale = StoredTensor(nvfp4_name(spec.name, "weight_scale"), scale_shape(spec.shape, kind), "F8_E4M3")
        scalars = (StoredTensor(spec.name.removesuffix(".weight") + end, (), "F32") for end in NVFP4_SCALARS)
        return weight, scale, *scalars
    if kind not in ("fp8", "fp4"):
        return (weight,)
    return weight, StoredTensor(spec.scale_name, scale_shape(spec.shape, kind), "F8_E8M0")


def allowed_dtypes(spec: TensorSpec) -> tuple[str, ...]:
    """Storage types in which a reader accepts this tensor."""
    if spec.role == "table":
        return ("I64",)
    if spec.role == "plain":
        return ("BF16", "F32")
    return ("F8_E4M3", "I8", "U8", "BF16", "F32")


def stored_kind(spec: TensorSpec, dtype: str) -> Kind | None:
    """The kind that a stored type means for this tensor; None if it may not have that type.

    Bytes are NVFP4 where the tensor's usual kind is, MXFP4 elsewhere: the names of the scales tell them apart.
    """
    if dtype not in allowed_dtypes(spec):
        return None
    if dtype == "F8_E4M3":
        return "fp8"
    if dtype in ("I8", "U8"):
        return "nvfp4" if spec.kind == "nvfp4" else "fp4"
    return "i64" if dtype == "I64" else _PLAIN_DTYPES[dtype]


def num_mtp_layers(config: ModelConfig) -> int:
    """MTP blocks or DSpark stages of the model: the entries of `compress_ratios` past the main layers."""
    return len(config.compress_ratios) - config.num_hidden_layers


def _compressor(prefix: str, ratio: int, dim: int, overlap: bool, hidden: int) -> Iterator[TensorSpec]:
    channels = dim * 2 if overlap else dim
    yield TensorSpec(f"{prefix}.ape", (ratio, channels), "f32")
    yield TensorSpec(f"{prefix}.wkv.weight", (channels, hidden), "bf16")
    yield TensorSpec(f"{prefix}.wgate.weight", (channels, hidden), "bf16")
    yield TensorSpec(f"{prefix}.norm.weight", (dim,), "bf16")


def _attention(config: ModelConfig, prefix: str, ratio: int, overlap: bool) -> Iterator[TensorSpec]:
    hidden, heads, dim, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    mid = config.o_groups * config.o_lora_rank
    yield TensorSpec(f"{prefix}.attn_sink", (heads,), "f32")
    yield TensorSpec(f"{prefix}.wq_a.weight", (rank, hidden), "fp8", "linear")
    yield TensorSpec(f"{prefix}.q_norm.weight", (rank,), "bf16")
    yield TensorSpec(f"{prefix}.wq_b.weight", (heads * dim, rank), "fp8", "linear")
    yield TensorSpec(f"{prefix}.wkv.weight", (dim, hidden), "fp8", "linear")
    yield TensorSpec(f"{prefix}.kv_norm.weight", (dim,), "bf16")
    yield TensorSpec(f"{prefix}.wo_a.weight", (mid, heads * dim // config.o_groups), "fp8", "linear")
    yield TensorSpec(f"{prefix}.wo_b.weight", (hidden, mid), "fp8", "linear")
    if ratio == 0:
        return
    yield from _compressor(f"{prefix}.compressor", ratio, dim, overlap, hidden)
    if not overlap:
        return
    index = f"{prefix}.indexer"
    yield TensorSpec(f"{index}.wq_b.weight", (config.index_n_heads * config.index_head_dim, rank), "fp8", "linear")
    yield TensorSpec(f"{index}.weights_proj.weight", (config.index_n_heads, hidden), "bf16")
    yield from _compressor(f"{index}.compressor", ratio, config.index_head_dim, overlap, hidden)


def _experts(config: ModelConfig, prefix: str, inner: int, kind: Kind, role: Role) -> Iterator[TensorSpec]:
    hidden = config.hidden_size
    yield TensorSpec(f"{prefix}.w1.weight", (inner, hidden), kind, role)
    yield TensorSpec(f"{prefix}.w2.weight", (hidden, inner), kind, role)
    yield TensorSpec(f"{prefix}.w3.weight", (inner, hidden), kind, role)


def expert_kind(config: ModelConfig, layer: int) -> Kind:
    """Usual storage of a layer's routed experts: NVFP4 where `nvfp4_layers` says so, else from `expert_dtype`, of which
    anything but `fp8`, `bf16` and `f32` means `fp4`.
    """
    if layer in config.nvfp4_layers:
        return "nvfp4"
    kinds: dict[str, Kind] = {"fp8": "fp8", "bf16": "bf16", "f32": "f32"}
    return kinds.get(config.expert_dtype, "fp4")


def _ffn(config: ModelConfig, prefix: str, layer: int, hashed: bool) -> Iterator[TensorSpec]:
    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    yield TensorSpec(f"{prefix}.gate.weight", (experts, config.hidden_size), "bf16")
    if hashed:
        yield TensorSpec(f"{prefix}.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "i64", "table")
    else:
        yield TensorSpec(f"{prefix}.gate.bias", (experts,), "f32")
    kind = expert_kind(config, layer)
    for expert in range(experts):
        yield from _experts(config, f"{prefix}.experts.{expert}", inner, kind, "expert")
    yield from _experts(config, f"{prefix}.shared_experts", inner * config.n_shared_experts, "fp8", "linear")


def _hyper_head(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    n = config.hc_mult
    yield TensorSpec(f"{prefix}hc_head_fn", (n, n * config.hidden_size), "f32")
    yield TensorSpec(f"{prefix}hc_head_base", (n,), "f32")
    yield TensorSpec(f"{prefix}hc_head_scale", (1,), "f32")


def _block(config: ModelConfig, prefix: str, layer: int, hashed: bool) -> Iterator[TensorSpec]:
    n = config.hc_mult
    for part in ("attn", "ffn"):
        yield TensorSpec(f"{prefix}.hc_{part}_fn", (n * (n + 2), n * config.hidden_size), "f32")
        yield TensorSpec(f"{prefix}.hc_{part}_base", (n * (n + 2),), "f32")
        yield TensorSpec(f"{prefix}.hc_{part}_scale", (3,), "f32")
        yield TensorSpec(f"{prefix}.{part}_norm.weight", (config.hidden_size,), "bf16")
    overlap = config.attention_kind(layer) == "csa"
    yield from _attention(config, f"{prefix}.attn", config.compress_ratios[layer], overlap)
    yield from _ffn(config, f"{prefix}.ffn", layer, hashed)


def _mtp(config: ModelConfig, index: int) -> Iterator[TensorSpec]:
    prefix, hidden = f"mtp.{index}", config.hidden_size
    yield TensorSpec(f"{prefix}.e_proj.weight", (hidden, hidden), "fp8", "linear")
    yield TensorSpec(f"{prefix}.h_proj.weight", (hidden, hidden), "fp8", "linear")
    for norm in ("enorm", "hnorm", "norm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", (hidden,), "bf16")
    yield from _hyper_head(config, f"{prefix}.")
    yield from _block(config, prefix, config.num_hidden_layers + index, hashed=False)


def _dspark(config: ModelConfig, spark: DSpark, stage: int) -> Iterator[TensorSpec]:
    """A DSpark stage: the first reads the main model, the last one drafts."""
    prefix, hidden, vocab, rank = f"mtp.{stage}", config.hidden_size, config.vocab_size, spark.markov_rank
    if stage == 0:
        tapped = hidden * len(spark.target_layer_ids)
        yield TensorSpec(f"{prefix}.main_proj.weight", (hidden, tapped), "fp8", "linear")
        yield TensorSpec(f"{prefix}.main_norm.weight", (hidden,), "bf16")
    yield from _block(config, prefix, config.num_hidden_layers + stage, hashed=False)
    if stage == spark.num_stages - 1:
        yield from _hyper_head(config, f"{prefix}.")
        yield TensorSpec(f"{prefix}.norm.weight", (hidden,), "bf16")
        yield TensorSpec(f"{prefix}.markov_head.markov_w1.weight", (vocab, rank), "bf16")
        yield TensorSpec(f"{prefix}.markov_head.markov_w2.weight", (vocab, rank), "bf16")
        yield TensorSpec(f"{prefix}.confidence_head.proj.weight", (1, hidden + rank), "bf16")


def _tensors(config: ModelConfig, mtp: bool) -> Iterator[TensorSpec]:
    vocab, hidden = config.vocab_size, config.hidden_size
    yield TensorSpec("embed.weight", (vocab, hidden), "bf16")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, f"layers.{layer}", layer, config.gate_kind(layer) == "hash")
    yield from _hyper_head(config, "")
    yield TensorSpec("norm.weight", (hidden,), "bf16")
    yield TensorSpec("head.weight", (vocab, hidden), "bf16")
    spark = config.dspark
    for index in range(num_mtp_layers(config) if mtp else 0):
        yield from _mtp(config, index) if spark is None else _dspark(config, spark, index)


def inventory(config: ModelConfig, *, mtp: bool = True) -> dict[str, TensorSpec]:
    """Every logical tensor of a checkpoint by name, in model order; scales are not listed (see `stored_tensors`)."""
    return {spec.name: spec for spec in _tensors(config, mtp)}


def is_mtp(name: str) -> bool:
    """Whether a tensor or parameter belongs to an MTP block or a DSpark stage."""
    return name.startswith("mtp.")


def parameter_sources(config: ModelConfig, *, mtp: bool = True) -> dict[str, tuple[str, ...]]:
    """Parameter (or buffer) of the plain model -> the checkpoint tensors it holds, in model order.

    Names are equal, but for routed experts: `layers.N.ffn.experts.w1` [E, I, D], `.w2` [E, D, I] and `.w3` [E, I, D]
    stack `layers.N.ffn.experts.0.w1.weight`, `layers.N.ffn.experts.1.w1.weight`, ... along a new first dim.
    """
    sources: dict[str, list[str]] = {}
    for spec in _tensors(config, mtp):
        parameter = spec.name
        if spec.role == "expert":
            prefix, _expert, matrix, _weight = spec.name.rsplit(".", 3)
            parameter = f"{prefix}.{matrix}"
        sources.setdefault(parameter, []).append(spec.name)
    return {parameter: tuple(names) for parameter, names in sources.items()}
