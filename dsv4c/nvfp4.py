"""What config.json and hf_quant_config.json say of experts in NVFP4, read and written.

NVIDIA's exporter of DeepSeek-V4 (github.com/NVIDIA/Model-Optimizer, examples/deepseek/deepseek_v4/quantize_to_nvfp4.py,
of which nvidia/DeepSeek-V4-Flash-NVFP4 and -Pro-NVFP4 are made) leaves everything but the main layers' routed experts
as DeepSeek stores it, and says in config.json:

    "expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION", "group_size": 16, "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}, ...}, ...}

hf_quant_config.json says the same under `quantization`, with `exclude_modules` in place of `ignore`. Its first versions
wrote `moe_quant_algo` alone into config.json, and a layer for each matrix, `layers.0.ffn.experts.0.w1` with
`awq_block_size`, into the other file. Files are read in all of these forms.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsv4c.errors import ConfigError

NVFP4_GROUP = 16
"""Channels of a row that share a scale: the matrix units take no other number."""

_EXPERTS = re.compile(r"^(?:model\.)?(layers|mtp)\.(\d+)\.ffn\.experts(?:\.\d+\.w[123])?$")
_SIZES = ("group_size", "awq_block_size")


def stated_blocks(quantization: object, file: str) -> frozenset[str] | None:
    """Blocks (`layers.3`, `mtp.0`) whose experts a quantisation config calls NVFP4; None if it speaks of none.

    Empty: it says that experts are NVFP4, but not which. `file` is for messages. Raises ConfigError for another
    algorithm or group size of experts, and for NVFP4 in what is no routed expert.
    """
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"`{file}`: the quantisation is no mapping, but {type(quantization).__name__}")
    whole = quantization.get("moe_quant_algo") or quantization.get("quant_algo")
    layers = quantization.get("quantized_layers") or {}
    if not isinstance(layers, Mapping):
        raise ConfigError(f"`{file}`: `quantized_layers` is no mapping, but {type(layers).__name__}")
    blocks = {block for name, entry in layers.items() if (block := _block(str(name), entry, file)) is not None}
    algorithm = quantization.get("moe_quant_algo")
    if algorithm is not None and algorithm != "NVFP4":
        raise ConfigError(
            f"`{file}`: `moe_quant_algo` is `{algorithm}`, expected `NVFP4`",
            hint="experts are read as MXFP4 (no such key), NVFP4, FP8 or BF16",
        )
    if not blocks and whole != "NVFP4":
        return None
    _check_group(quantization.get("group_size"), "group_size", file)
    return frozenset(blocks)


def _block(name: str, entry: object, file: str) -> str | None:
    """The block of an entry of `quantized_layers`; None for one that stays FP8."""
    algorithm = entry.get("quant_algo") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(algorithm, str):
        raise ConfigError(f"`{file}`: `quantized_layers` says nothing of `{name}`: it lacks `quant_algo`")
    if algorithm.startswith("FP8"):
        return None
    found = _EXPERTS.match(name)
    if found is None or algorithm != "NVFP4":
        raise ConfigError(
            f"`{file}`: `{name}` is `{algorithm}`, expected FP8 or, of routed experts, NVFP4",
            hint="take a checkpoint whose attention and shared experts stay FP8, as NVIDIA publishes them",
        )
    for key in _SIZES:
        _check_group(entry.get(key), f"{name}.{key}", file)
    return f"{found[1]}.{found[2]}"


def _check_group(size: object, what: str, file: str) -> None:
    if size is not None and size != NVFP4_GROUP:
        raise ConfigError(
            f"`{file}`: `{what}` is {size}, NVFP4 has a scale for {NVFP4_GROUP} channels",
            hint="quantise the checkpoint with groups of 16",
        )


def block_name(layer: int, num_layers: int) -> str:
    """`layers.3`, or `mtp.0` for the first layer behind the main ones."""
    return f"layers.{layer}" if layer < num_layers else f"mtp.{layer - num_layers}"


def block_index(block: str, num_layers: int) -> int:
    """The layer's place in `compress_ratios`."""
    kind, _, number = block.partition(".")
    return int(number) + (num_layers if kind == "mtp" else 0)


def statement(blocks: Iterable[str]) -> dict[str, Any]:
    """The keys that `quantization_config` has for these blocks besides those of FP8, as NVIDIA writes them."""
    names = list(blocks)
    ignored = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    return {
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "group_size": NVFP4_GROUP,
        "ignore": ignored if any(name.startswith("mtp.") for name in names) else [*ignored, "mtp.*"],
        "quantized_layers": {
            f"{name}.ffn.experts": {"quant_algo": "NVFP4", "group_size": NVFP4_GROUP} for name in names
        },
    }
