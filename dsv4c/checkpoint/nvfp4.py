"""Which of a checkpoint's experts are NVFP4: by the names of its tensors, which must agree with its config.

    layers.0.ffn.experts.7.w1.weight           U8 [out, in / 2]        E2M1 pairs, the even channel in the low nibble
    layers.0.ffn.experts.7.w1.weight_scale     F8_E4M3 [out, in / 16]  for 16 channels of a row
    layers.0.ffn.experts.7.w1.weight_scale_2   F32 []                  weight = code * weight_scale * weight_scale_2
    layers.0.ffn.experts.7.w1.input_scale      F32 []                  calibrated amax of its input / (6 * 448)

The names and types are those of NVIDIA's exporter for DeepSeek-V4 (see dsv4c/nvfp4.py), and of its DeepSeek-R1 and V3
checkpoints but for the layers' names. The main layers are converted, `mtp.*` stays MXFP4; other choices of whole
layers are read as well. w1 and w3 usually share a `weight_scale_2`, which nothing here relies on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError
from dsv4c.nvfp4 import stated_blocks

QUANT_FILE = "hf_quant_config.json"
_SCALE = re.compile(r"^((?:layers|mtp)\.\d+)\.ffn\.experts\.\d+\.w[123]\.weight_scale$")
_OTHER_LAYOUTS = {
    ".weight_packed": "compressed-tensors' form of NVFP4",
    ".mlp.experts.": "transformers' names",
}
"""What the name of a tensor says of a checkpoint that cannot be read."""
PUBLISHED = "take one in DeepSeek's own layout, such as nvidia/DeepSeek-V4-Flash-NVFP4"


def with_stored_experts(config: ModelConfig, path: Path, names: Collection[str]) -> ModelConfig:
    """The config of the checkpoint in `path`, with those layers NVFP4 whose tensors are.

    `names`: of all its tensors. Raises CheckpointError where its config files and its tensors say different things, or
    for a layout that is not read, ConfigError for a quantisation that is none of ours.
    """
    _check_layout(path, names)
    found = {match[1]: name for name in sorted(names, reverse=True) if (match := _SCALE.match(name))}
    stated = _stated(path)
    if stated is None:
        if found:
            block = min(found)
            raise CheckpointError(
                f"`{found[block]}` makes `{block}.ffn.experts` NVFP4, but config.json of `{path}` says nothing of it",
                hint="`quantization_config.moe_quant_algo` is `NVFP4` in such a checkpoint; is config.json another's?",
            )
        return config
    for block in sorted(stated or config.nvfp4_blocks or ["layers.0"]):
        if block not in found and (block.startswith("layers.") or any(name.startswith("mtp.") for name in names)):
            raise CheckpointError(
                f"`{block}.ffn.experts` is NVFP4 by config.json of `{path}`, but its matrices have no `weight_scale`",
                hint="are these the weights of the MXFP4 checkpoint, or is the download not whole?",
            )
    for block in sorted(found.keys() - stated) if stated else ():
        raise CheckpointError(
            f"`{found[block]}` makes `{block}.ffn.experts` NVFP4, `quantized_layers` of `{path}` names it not",
            hint="is config.json that of this checkpoint?",
        )
    return config.with_nvfp4(found)


def _stated(path: Path) -> frozenset[str] | None:
    """What config.json and, where that says less, hf_quant_config.json of the folder call NVFP4."""
    stated = stated_blocks(_read(path / "config.json").get("quantization_config"), "config.json")
    if stated or not (path / QUANT_FILE).is_file():
        return stated
    other = stated_blocks(_read(path / QUANT_FILE).get("quantization"), QUANT_FILE)
    return stated if other is None else other


def _read(file: Path) -> dict[str, object]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read `{file}`: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"`{file}` holds no mapping", hint="is the download whole?")
    return data


def _check_layout(path: Path, names: Collection[str]) -> None:
    for name in sorted(names):
        for mark, layout in _OTHER_LAYOUTS.items():
            if mark in name:
                raise CheckpointError(f"`{name}` in `{path}` is of {layout}, which is not read", hint=PUBLISHED)
