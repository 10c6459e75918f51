"""Makes an NVFP4 checkpoint of an MXFP4 one, as NVIDIA's exporter does, and reads it back: with nothing of dsv4c's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.cat((GRID, -GRID))  # by code: bit 3 is the sign
Form = Literal["layers", "matrices", "bare"]
"""What says which layers: `quantized_layers` of config.json; that of hf_quant_config.json, a matrix each; nothing."""
Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def unpacked(packed: Tensor) -> Tensor:
    """[out, in/2] bytes -> the values of their codes [out, in]."""
    byte = packed.view(torch.uint8).int()
    return CODES[torch.stack((byte & 15, byte >> 4), -1).flatten(-2)]


def packed(values: Tensor) -> Tensor:
    """The nearest codes of [out, in] values up to 6, two a byte; halves go up."""
    code = (values.abs().unsqueeze(-1) >= (GRID[1:] + GRID[:-1]) / 2).sum(-1) + 8 * (values < 0)
    return (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of 16 channels and the factor of [out, in]: the largest group's scale is 448."""
    factor = weight.abs().max() / (6 * 448)
    groups = weight.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
    step = scale.float() * factor
    return packed((groups / torch.where(step > 0, step, 1.0).unsqueeze(-1)).flatten(1).clamp(-6, 6)), scale, factor


def value_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    """An NVFP4 matrix (name without `.weight`) in float32."""
    wide = unpacked(tensors[f"{name}.weight"]).unflatten(1, (-1, 16))
    return (wide * tensors[f"{name}.weight_scale"].float().unsqueeze(-1)).flatten(1) * tensors[f"{name}.weight_scale_2"]


def is_expert(name: str, *, mtp: bool) -> bool:
    return ".ffn.experts." in name and name.endswith(".weight") and (mtp or name.startswith("layers."))


def convert(source: Path, target: Path, form: Form = "layers", *, mtp: bool = False, edit: Edit | None = None) -> Path:
    """Writes the checkpoint of one file in `source` to the folder `target`, its experts in NVFP4.

    `mtp`: those of `mtp.*` too, as the exporter does when asked. `edit` changes the tensors and config.json before
    they are written. Every matrix has a factor of its own, also w1 and w3, which the exporter makes equal.
    """
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers: dict[str, None] = {}
    for name in [name for name in tensors if is_expert(name, mtp=mtp)]:
        base = name.removesuffix(".weight")
        powers = tensors.pop(f"{base}.scale").float().unsqueeze(-1)
        wide = (unpacked(tensors[name]).unflatten(1, (-1, 32)) * powers).flatten(1)
        tensors[name], tensors[f"{base}.weight_scale"], tensors[f"{base}.weight_scale_2"] = quantised(wide)
        most = 12.0 if base.endswith("w2") else 4.0  # the bundled nano's activations reach 4
        most *= 1.0037 + int(base.split(".")[-2]) / 97  # no round number: products then never lie between two codes
        tensors[f"{base}.input_scale"] = torch.tensor(most / (6 * 448))
        layers[base if form == "matrices" else base.rsplit(".", 2)[0]] = None
    config["quantization_config"]["moe_quant_algo"] = "NVFP4"
    target.mkdir(parents=True)
    if form == "layers":
        listed = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in layers}
        config["quantization_config"] |= {
            "quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": listed,
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", *([] if mtp else ["mtp.*"])],
            "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        }  # fmt: skip
    if form == "matrices":
        listed = {name: {"quant_algo": "NVFP4", "awq_block_size": 16} for name in layers}
        says = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "quantized_layers": listed}}
        (target / "hf_quant_config.json").write_text(json.dumps(says), encoding="utf-8")
    if edit is not None:
        edit(tensors, config)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in source.glob("tokenizer*.json"):
        shutil.copyfile(file, target / file.name)
    return target
