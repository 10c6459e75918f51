"""NVFP4 experts: what is read, what config files and tensors must agree on, and what is refused by its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.names import expert_kind, inventory, stored_tensors
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.shard import DTYPES
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import FLASH, FLASH_0731, ModelConfig
from dsv4c.errors import CheckpointError, ConfigError, Dsv4cError
from dsv4c.nvfp4 import stated_blocks, statement
from tests.nvfp4 import Form, convert, value_of

from .conftest import SMALL

EXPERT = "layers.1.ffn.experts.2.w3"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "mxfp4"
    write_checkpoint(folder, SMALL, load_model_state(DummySource(SMALL, seed=1)))
    return folder


def changed(source: Path, tmp_path: Path, change: Change, form: Form = "layers") -> Path:
    return convert(source, tmp_path / "nvfp4", form, edit=lambda tensors, config: change(tensors, config) and None)


@pytest.mark.parametrize("form", ["layers", "matrices", "bare"])
@pytest.mark.parametrize("mtp", [False, True])
def test_values_are_codes_times_both_scales(source: Path, tmp_path: Path, form: Form, mtp: bool) -> None:
    folder = convert(source, tmp_path / "nvfp4", form, mtp=mtp)
    checkpoint = Checkpoint(folder)
    checkpoint.validate()
    assert checkpoint.config.nvfp4_layers == ((0, 1, 2, 3) if mtp else (0, 1, 2))
    assert checkpoint.config.nvfp4_blocks[-1] == ("mtp.0" if mtp else "layers.2")
    tensors = load_file(folder / "model.safetensors")
    for name in (EXPERT, "layers.0.ffn.experts.0.w1", "layers.2.ffn.experts.3.w2"):
        assert torch.equal(checkpoint.dequantised(f"{name}.weight"), value_of(tensors, name))
        assert [part.name.rpartition(".")[2] for part in checkpoint.parts(f"{name}.weight")] == [
            "weight", "weight_scale", "weight_scale_2"
        ]  # fmt: skip
    state = load_model_state(checkpoint)
    assert torch.equal(state["layers.1.ffn.experts.w3"][2], value_of(tensors, EXPERT))
    plain = load_model_state(Checkpoint(source))
    error = (state["layers.1.ffn.experts.w3"] - plain["layers.1.ffn.experts.w3"]).norm()
    assert 0 < error < 0.1 * plain["layers.1.ffn.experts.w3"].norm()
    assert torch.equal(state["mtp.0.ffn.experts.w1"], plain["mtp.0.ffn.experts.w1"]) != mtp


def test_the_config_says_it_as_hugging_face_does() -> None:
    flash = FLASH.with_nvfp4(())
    said = flash.to_dict()["quantization_config"]
    assert said["moe_quant_algo"] == "NVFP4" and said["quant_method"] == "fp8" and "mtp.*" in said["ignore"]
    assert said["quantized_layers"]["layers.42.ffn.experts"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert ModelConfig.from_dict(flash.to_dict()) == flash != FLASH
    assert "nvfp4_layers" not in flash.to_dict() and "moe_quant_algo" not in FLASH.to_dict()["quantization_config"]
    assert [expert_kind(flash, layer) for layer in (0, 42, 43)] == ["nvfp4", "nvfp4", "fp4"]
    assert flash.truncated(4).nvfp4_layers == (0, 1, 2, 3)
    every = FLASH_0731.with_nvfp4(["layers.3", "layers.42", "mtp.2"])
    assert every.nvfp4_layers == (3, 42, 45) and every.truncated(4).nvfp4_layers == (3, 6)
    assert ModelConfig.from_dict(every.to_dict()) == every


def test_a_matrix_is_four_tensors() -> None:
    spec = inventory(FLASH.with_nvfp4(()))["layers.7.ffn.experts.9.w2.weight"]
    assert [(t.name.rpartition(".")[2], t.dtype, t.shape) for t in stored_tensors(spec)] == [
        ("weight", "U8", (4096, 1024)), ("weight_scale", "F8_E4M3", (4096, 128)), ("weight_scale_2", "F32", ()),
        ("input_scale", "F32", ()),
    ]  # fmt: skip


def test_factors_may_be_vectors_of_one(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for end in ("weight_scale_2", "input_scale"):
            tensors[f"{EXPERT}.{end}"] = tensors[f"{EXPERT}.{end}"].reshape(1)

    checkpoint = Checkpoint(changed(source, tmp_path, change))
    checkpoint.validate()
    assert checkpoint.stored(f"{EXPERT}.input_scale").shape == ()
    checkpoint.dequantised(f"{EXPERT}.weight")


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name] = make(tensors[name])

    return change


def drop(*names: str) -> Change:
    return lambda tensors, config: [tensors.pop(name) for name in names]


def poked(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        wide = tensor.float().clone()
        wide.view(-1)[0] = value
        return wide.to(tensor.dtype)

    return make


def back_to_mxfp4(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """One matrix as the source has it."""
    rows, groups = tensors[f"{EXPERT}.weight_scale"].shape
    tensors[f"{EXPERT}.scale"] = torch.full((rows, groups // 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for end in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{EXPERT}.{end}"]


def with_attention(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    base = "layers.0.attn.wq_a"
    rows, channels = tensors[f"{base}.weight"].shape
    tensors[f"{base}.weight"] = torch.zeros(rows, channels // 2, dtype=torch.uint8)
    tensors[f"{base}.weight_scale"] = torch.zeros(rows, channels // 16).to(torch.float8_e4m3fn)
    del tensors[f"{base}.scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{EXPERT}.weight_scale", lambda t: t[:, ::2].contiguous()),
         rf"`{EXPERT}.weight_scale` in .* shape is \[96, 6\], expected \[96, 12\], a scale for 16 channels"),
        (put(f"{EXPERT}.weight_scale", lambda t: t.to(torch.bfloat16)), r"dtype is BF16, expected F8_E4M3"),
        (put(f"{EXPERT}.weight_scale", lambda t: t.view(torch.uint8)), r"dtype is U8, expected F8_E4M3"),
        (put(f"{EXPERT}.weight_scale_2", lambda t: t.to(torch.bfloat16)), r"weight_scale_2` in .* dtype is BF16"),
        (put(f"{EXPERT}.weight_scale_2", lambda t: t.expand(96).contiguous()), r"shape is \[96\], expected \[\]"),
        (drop(f"{EXPERT}.weight_scale_2"), rf"`{EXPERT}.weight_scale_2` is missing"),
        (drop(f"{EXPERT}.input_scale"), rf"`{EXPERT}.input_scale` is missing"),
        (drop(f"{EXPERT}.weight_scale"), rf"`{EXPERT}.weight_scale` is missing"),
        (put(f"{EXPERT}.weight_scale", poked(float("nan"))), rf"`{EXPERT}.weight_scale` in .* found 1 NaN"),
        (put(f"{EXPERT}.weight_scale", poked(-2.0)), r"found 1 NaN, infinite or negative scales"),
        (put(f"{EXPERT}.weight_scale_2", poked(-1.0)), rf"`{EXPERT}.weight_scale_2` in .* negative scales"),
        (put(f"{EXPERT}.weight_scale_2", poked(float("inf"))), rf"`{EXPERT}.weight_scale_2` in .* infinite"),
        (put(f"{EXPERT}.input_scale", poked(0.0)), rf"`{EXPERT}.input_scale` in .* negative or zero scales"),
        (put(f"{EXPERT}.weight", lambda t: t[:, :-8].contiguous()), r"shape is \[96, 88\], expected \[96, 96\] for U8"),
        (back_to_mxfp4, rf"`{EXPERT}.weight_scale` is missing.*it is MXFP4, by `{EXPERT}.scale`"),
        (with_attention, r"`layers.0.attn.wq_a.scale` is missing.*NVFP4, by its `weight_scale`, which only routed"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(source: Path, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(changed(source, tmp_path, change)).validate()


def test_channels_that_are_no_multiple_of_the_group_are_refused(tmp_path: Path) -> None:
    """moe_intermediate_size 80 is five groups of 16, and two and a half of 32."""
    config = {**SMALL.to_dict(), "moe_intermediate_size": 80}
    small = ModelConfig.from_dict({**config, "expert_dtype": "bf16"})
    write_checkpoint(tmp_path / "bf16", small, load_model_state(DummySource(small, seed=1)), expert_format="bf16")
    Checkpoint(tmp_path / "bf16").validate()
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    name = "layers.0.ffn.experts.0.w2"
    tensors[f"{name}.weight"] = torch.zeros(192, 40, dtype=torch.int8)
    tensors[f"{name}.scale"] = torch.full((192, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "bf16" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"`{name}.weight` in .*: 80 input channels are no multiple of 32"):
        Checkpoint(tmp_path / "bf16").validate()
    odd = ModelConfig.from_dict({**config, "moe_intermediate_size": 72}).with_nvfp4(())
    checkpoint = of_zeros(tmp_path / "odd", odd)
    with pytest.raises(CheckpointError, match=rf"`{name}.weight` in .*: 72 input channels are no multiple of 16"):
        checkpoint.validate()


def of_zeros(folder: Path, config: ModelConfig) -> Checkpoint:
    """A checkpoint of this config with its stored tensors all zero: their shapes are as they must be."""
    tensors = {
        t.name: torch.zeros(t.shape, dtype=torch.uint8).view(DTYPES[t.dtype])
        if t.dtype in ("F8_E4M3", "F8_E8M0", "I8")
        else torch.ones(t.shape, dtype=DTYPES[t.dtype])
        for spec in inventory(config).values()
        for t in stored_tensors(spec)
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return Checkpoint(folder)


def quantization(**changes: object) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        said = config["quantization_config"]
        for key, value in changes.items():
            if value is None:
                said.pop(key)
            else:
                said[key] = value

    return change


LISTED = {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantization(moe_quant_algo="NVFP4_AWQ"), r"`moe_quant_algo` is `NVFP4_AWQ`, expected `NVFP4`"),
        (quantization(group_size=32), r"`group_size` is 32, NVFP4 has a scale for 16 channels"),
        (quantization(quantized_layers={**LISTED, "layers.1.ffn.experts": {"quant_algo": "NVFP4", "group_size": 32}}),
         r"`layers.1.ffn.experts.group_size` is 32"),
        (quantization(quantized_layers={**LISTED, "layers.0.attn.wq_b": {"quant_algo": "NVFP4"}}),
         r"`layers.0.attn.wq_b` is `NVFP4`, expected FP8"),
        (quantization(quantized_layers={**LISTED, "layers.1.ffn.experts": {"quant_algo": "W4A16_AWQ"}}),
         r"`layers.1.ffn.experts` is `W4A16_AWQ`"),
        (quantization(quantized_layers={**LISTED, "layers.7.ffn.experts": {"quant_algo": "NVFP4"}}),
         r"names `layers.7.ffn.experts`, the model has 3 layers|names `mtp.4"),
        (quantization(quantized_layers=[]), None),
        (quantization(quantized_layers=["layers.0"]), r"`quantized_layers` is no mapping"),
        (quantization(quantized_layers={"layers.0.ffn.experts": 16}), r"says nothing of `layers.0.ffn.experts`"),
        (quantization(quantized_layers={k: v for k, v in LISTED.items() if "1" not in k}),
         r"makes `layers.1.ffn.experts` NVFP4, `quantized_layers` of .* names it not"),
        (quantization(quantized_layers={**LISTED, "mtp.0.ffn.experts": {"quant_algo": "NVFP4"}}),
         r"`mtp.0.ffn.experts` is NVFP4 by config.json of .*, but its matrices have no `weight_scale`"),
        (quantization(quantized_layers={**LISTED, "layers.1.attn.wq_a": {"quant_algo": "FP8"}}), None),
        (quantization(moe_quant_algo=None, quantized_layers=None),
         r"`layers.0.ffn.experts.\d.w\d.weight_scale` makes `layers.0.ffn.experts` NVFP4, but config.json .* says"),
    ],
)  # fmt: skip
def test_what_config_json_says_must_be_true(source: Path, tmp_path: Path, change: Change, message: str | None) -> None:
    folder = changed(source, tmp_path, change)
    if message is None:
        Checkpoint(folder).validate()
        return
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        Checkpoint(folder)
    assert isinstance(error.value, Dsv4cError)


def test_mxfp4_tensors_under_an_nvfp4_config_are_refused(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "nvfp4")
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"`layers.0.ffn.experts` is NVFP4 by .*have no `weight_scale`") as error:
        Checkpoint(folder)
    assert "MXFP4" in error.value.hint


def test_other_layouts_of_nvfp4_are_named(source: Path, tmp_path: Path) -> None:
    packed = put(f"{EXPERT}.weight", lambda t: t)
    folder = changed(source, tmp_path, packed)
    data = load_file(folder / "model.safetensors")
    for name, layout in (
        (f"{EXPERT}.weight_packed", "compressed-tensors"),
        ("model.layers.1.mlp.experts.2.up_proj.weight_scale", "transformers' names"),
    ):
        save_file({**data, name: torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"`{name}` in .* is of {layout}") as error:
            Checkpoint(folder)
        assert "nvidia/DeepSeek-V4-Flash-NVFP4" in error.value.hint


def test_a_damaged_quantisation_file_is_refused(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "nvfp4", "matrices")
    (folder / "hf_quant_config.json").write_text('{"quantization": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot read `.*hf_quant_config.json`"):
        Checkpoint(folder)
    (folder / "hf_quant_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"holds no mapping"):
        Checkpoint(folder)


def test_a_tensor_twice_is_refused(source: Path, tmp_path: Path) -> None:
    """In one header, which JSON allows."""
    folder = convert(source, tmp_path / "nvfp4")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].decode()
    name = f'"{EXPERT}.input_scale"'
    at = header.index(f'"{EXPERT}.weight_scale_2"')
    doubled = header[:at] + name + header[at + len(f'"{EXPERT}.weight_scale_2"') :]
    doubled += " " * (length - len(doubled))
    file.write_bytes(data[:8] + doubled.encode() + data[8 + length :])
    with pytest.raises(CheckpointError, match=rf"`{EXPERT}.input_scale` is there twice"):
        Checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "two", SMALL, load_model_state(DummySource(SMALL, seed=1)), shard_bytes=1 << 16)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    name, file = next((n, f) for n, f in index["weight_map"].items() if "00001" not in f)
    first = tmp_path / "two" / next(f for f in index["weight_map"].values() if "00001" in f)
    save_file({**load_file(first), name: load_file(tmp_path / "two" / file)[name]}, first)
    with pytest.raises(CheckpointError, match=rf"`{name}` is in `{file}` and in `{first.name}`, expected it once"):
        Checkpoint(tmp_path / "two").validate()


def test_tensors_that_share_bytes_are_refused(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "nvfp4")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[f"{EXPERT}.input_scale"]["data_offsets"] = header[f"{EXPERT}.weight_scale_2"]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(data[:8] + text[:length] + data[8 + length :])
    with pytest.raises(CheckpointError, match=rf"`{EXPERT}.input_scale` and `{EXPERT}.weight_scale_2` in .* share byt"):
        Checkpoint(folder)


def test_what_a_statement_says_is_read_again() -> None:
    blocks = ["layers.0", "layers.11", "mtp.0"]
    assert stated_blocks(statement(blocks), "x") == set(blocks)
    assert stated_blocks({"quant_method": "fp8"}, "x") is None and stated_blocks(None, "x") is None
    assert stated_blocks({"quant_algo": "NVFP4", "exclude_modules": ["*.attn.*"]}, "x") == frozenset()
    with pytest.raises(ConfigError, match="is no mapping"):
        stated_blocks("NVFP4", "x")
