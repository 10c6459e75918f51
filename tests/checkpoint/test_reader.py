"""The reader: every accepted storage, and an error with tensor, file and both values for every kind of damage."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4c.checkpoint.names import inventory, parameter_sources
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.source import Stored
from dsv4c.errors import CheckpointError, ConfigError
from tests.checkpoint.conftest import Edit, edit, file_of

WQ_A = "layers.0.attn.wq_a.weight"
EXPERT = "layers.1.ffn.experts.2.w1.weight"
TABLE = "layers.0.ffn.gate.tid2eid"
NORM = "norm.weight"


def as_float(name: str, dtype: torch.dtype) -> Edit:
    """Stores a quantised weight as a float, without a scale."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name.replace(".weight", ".scale")]
        tensors[name] = torch.full(EXPERT_SHAPE if "experts" in name else (96, 192), 0.5, dtype=dtype)

    return change


EXPERT_SHAPE = (96, 192)


def drop_from_index(path: Path, names: list[str]) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        data = json.loads(index.read_text())
        for name in names:
            del data["weight_map"][name]
        index.write_text(json.dumps(data))


def test_golden_checkpoint(golden_dir: Path) -> None:
    checkpoint = Checkpoint(golden_dir / "tiny")
    checkpoint.validate()
    assert checkpoint.has_mtp
    stored = load_file(golden_dir / "tiny" / "model.safetensors")
    assert checkpoint.names() == sorted(stored)
    for name, tensor in stored.items():
        raw = checkpoint.raw(name)
        assert raw.dtype == tensor.dtype
        assert torch.equal(raw.view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_written_checkpoint_is_valid(small: Path, small_state: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(small)
    checkpoint.validate()
    state = load_model_state(checkpoint)
    assert list(state) == list(parameter_sources(checkpoint.config))
    assert all(torch.equal(state[name], tensor) for name, tensor in small_state.items())


def test_bfloat16_state_is_the_rounded_float32_state(small: Path) -> None:
    checkpoint = Checkpoint(small)
    exact, state = load_model_state(checkpoint), load_model_state(checkpoint, torch.bfloat16)
    assert state[TABLE].dtype == torch.int64
    assert all(torch.equal(state[k], exact[k].bfloat16()) for k in state if k != TABLE and "tid2eid" not in k)


def test_dequantised_is_a_new_tensor(small: Path) -> None:
    checkpoint = Checkpoint(small)
    before = checkpoint.raw("embed.weight").clone()
    checkpoint.dequantised("embed.weight", torch.bfloat16).zero_()
    assert torch.equal(checkpoint.raw("embed.weight"), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [WQ_A, EXPERT])
def test_any_linear_may_be_a_float(small: Path, name: str, dtype: torch.dtype) -> None:
    edit(small, name, as_float(name, dtype))
    drop_from_index(small, [name.replace(".weight", ".scale")])
    checkpoint = Checkpoint(small)
    checkpoint.validate()
    assert (checkpoint.dequantised(name) == 0.5).all()


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_experts_may_be_fp8(small: Path, scale_dtype: torch.dtype) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT] = torch.full(EXPERT_SHAPE, 3.0).to(torch.float8_e4m3fn)
        tensors[EXPERT.replace(".weight", ".scale")] = torch.tensor([[0.5, 2.0]]).to(scale_dtype)

    edit(small, EXPERT, change)
    checkpoint = Checkpoint(small)
    checkpoint.validate()
    assert checkpoint.dequantised(EXPERT)[0].tolist() == [1.5] * 128 + [6.0] * 64


def test_plain_tensors_may_be_float32_and_packed_bytes_unsigned(small: Path) -> None:
    expected = Checkpoint(small).dequantised(EXPERT)
    edit(small, NORM, lambda tensors: tensors.update({NORM: torch.full((192,), 1.25)}))
    edit(small, EXPERT, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].view(torch.uint8)}))
    checkpoint = Checkpoint(small)
    checkpoint.validate()
    assert torch.equal(checkpoint.dequantised(NORM), torch.full((192,), 1.25))
    assert torch.equal(checkpoint.dequantised(EXPERT), expected)


def test_mtp_may_be_absent(small: Path) -> None:
    names = [name for name in Checkpoint(small).names() if name.startswith("mtp.")]
    for name in names:
        edit(small, name, lambda tensors, name=name: tensors.pop(name))
    drop_from_index(small, names)
    checkpoint = Checkpoint(small)
    checkpoint.validate()
    assert not checkpoint.has_mtp
    assert not any(name.startswith("mtp.") for name in load_model_state(checkpoint))


def replace(name: str, make: object) -> Edit:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def nan_byte(scale: Tensor) -> Tensor:
    scale.view(torch.uint8)[0, 0] = 255
    return scale


def set_row(values: list[int]) -> object:
    def change(table: Tensor) -> Tensor:
        table[5] = torch.tensor(values)
        return table

    return change


FAULTS = {
    "misshapen": (WQ_A, lambda t: t[:, :190].contiguous(), WQ_A, "shape is [96, 190], expected [96, 192] for F8_E4M3"),
    "misshapen-fp4": (
        EXPERT,
        lambda t: t[:, :95].contiguous(),
        EXPERT,
        "shape is [96, 95], expected [96, 96] for I8",
    ),
    "misshapen-norm": (NORM, lambda t: t[:3].clone(), NORM, "shape is [3], expected [192] for BF16"),
    "wrong-dtype": (
        WQ_A,
        lambda t: t.float().half(),
        WQ_A,
        "dtype is F16, expected F8_E4M3 or I8 or U8 or BF16 or F32",
    ),
    "quantised-norm": (NORM, lambda t: t.to(torch.float8_e4m3fn), NORM, "dtype is F8_E4M3, expected BF16 or F32"),
    "short-table": (TABLE, lambda t: t.int(), TABLE, "dtype is I32, expected I64"),
    "misshapen-scale": (
        "layers.0.attn.wq_a.scale",
        lambda t: t[:, :1].clone(),
        "layers.0.attn.wq_a.scale",
        "shape is [1, 1], expected [1, 2]",
    ),
    "wrong-scale-dtype": (
        "layers.0.attn.wq_a.scale",
        lambda t: t.view(torch.uint8),
        "layers.0.attn.wq_a.scale",
        "dtype is U8, expected F8_E8M0 or F32",
    ),
    "nan-scale": (
        "layers.0.attn.wq_a.scale",
        nan_byte,
        "layers.0.attn.wq_a.scale",
        "found 1 NaN or infinite scales, expected all 2 to be finite",
    ),
    "nan-float-scale": (
        "layers.0.attn.wq_a.scale",
        lambda t: torch.full(t.shape, float("nan")),
        "layers.0.attn.wq_a.scale",
        "found 2 NaN or infinite scales, expected all 2 to be finite",
    ),
    "nan-expert-scale": (
        "layers.1.ffn.experts.2.w1.scale",
        nan_byte,
        "layers.1.ffn.experts.2.w1.scale",
        "found 1 NaN or infinite scales, expected all 576 to be finite",
    ),
    "expert-out-of-range": (TABLE, set_row([4, 0]), TABLE, "found expert 4, expected 0 to 3"),
    "negative-expert": (TABLE, set_row([0, -1]), TABLE, "found expert -1, expected 0 to 3"),
    "repeated-expert": (TABLE, set_row([3, 3]), TABLE, "row 5 is [3, 3], expected 2 distinct experts"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_tensors_are_named(small: Path, fault: str) -> None:
    edited, make, blamed, values = FAULTS[fault]
    file = edit(small, edited, replace(edited, make))
    checkpoint = Checkpoint(small)
    with pytest.raises(CheckpointError) as validated:
        checkpoint.validate()
    assert f"`{blamed}` in `{file}`: {values}" == validated.value.message
    assert validated.value.hint
    with pytest.raises(CheckpointError, match=re.escape(values)):
        load_model_state(checkpoint)


def test_missing_tensor(small: Path) -> None:
    file = edit(small, EXPERT, lambda tensors: tensors.pop(EXPERT))
    checkpoint = Checkpoint(small)
    with pytest.raises(CheckpointError) as error:
        checkpoint.validate()
    assert f"`{EXPERT}` is missing in `" in error.value.message
    assert "expected I8 [96, 96]" in error.value.message
    if file != "model.safetensors":
        assert file in error.value.message  # the index says it should be there
    with pytest.raises(CheckpointError, match="is missing"):
        load_model_state(checkpoint)


def test_missing_scale(small: Path) -> None:
    name = EXPERT.replace(".weight", ".scale")
    edit(small, name, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=re.escape(f"`{name}` is missing in `")):
        Checkpoint(small).validate()


def test_unexpected_tensor(small: Path) -> None:
    file = edit(small, NORM, lambda tensors: tensors.update(stray=torch.zeros(3)))
    with pytest.raises(CheckpointError) as error:
        Checkpoint(small).validate()
    assert error.value.message == f"`stray` in `{file}` is unexpected: found F32 [3], expected no such tensor"


def test_partial_mtp_is_an_error(small: Path) -> None:
    edit(small, "mtp.0.enorm.weight", lambda tensors: tensors.pop("mtp.0.enorm.weight"))
    with pytest.raises(CheckpointError, match=r"`mtp\.0\.enorm\.weight` is missing"):
        Checkpoint(small).validate()


def test_many_problems_make_one_short_error(small: Path) -> None:
    data = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**data, "hidden_size": 128}))
    with pytest.raises(CheckpointError, match=r"; and \d+ more") as error:
        Checkpoint(small).validate()
    assert len(error.value.message) < 2000


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_file(small: Path, keep: int) -> None:
    file = file_of(small, NORM)
    data = (small / file).read_bytes()
    (small / file).write_bytes(data[:keep])
    size = len(data[:keep])
    with pytest.raises(CheckpointError, match=rf"has {size} bytes") as error:
        Checkpoint(small).validate()
    assert file in error.value.message
    if keep == -1:
        assert re.search(rf"`[a-z0-9_.]+` in `.*`: data ends at byte {size + 1}", error.value.message)


def test_trailing_bytes(small: Path) -> None:
    file = small / file_of(small, NORM)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=f"has {size + 1} bytes, expected {size} from its header"):
        Checkpoint(small).validate()


def bad_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<html>not found</html>" * 9, "for its header"),
        (bad_header(b"{nonsense"), "no safetensors header"),
        (bad_header(b"[1, 2]"), "no safetensors header"),
        (bad_header(b'{"norm.weight": {"dtype": "BF16"}}'), "no safetensors header"),
        (
            bad_header(b'{"norm.weight": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 1]}}') + b"0",
            "unknown dtype `Q3`",
        ),
        (
            bad_header(b'{"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}') + b"0" * 7,
            "header gives it 7 bytes, expected 8 for F32 [2]",
        ),
    ],
    ids=["html", "no-json", "list", "no-shape", "dtype", "size"],
)
def test_corrupt_header(small: Path, data: bytes, says: str) -> None:
    file = file_of(small, NORM)
    (small / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(says)) as error:
        Checkpoint(small).validate()
    assert file in error.value.message


def test_unaligned_tensors_are_read(tmp_path: Path, small: Path) -> None:
    """The format does not promise alignment; the first tensor here ends at an odd byte."""
    from dsv4c.checkpoint.shard import Shard

    header = json.dumps(
        {
            "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
            "c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [11, 11]},
        }
    ).encode()
    (tmp_path / "x.safetensors").write_bytes(bad_header(header) + b"\1\2\3" + struct.pack("<2f", 1.5, -2.0))
    shard = Shard(tmp_path / "x.safetensors")
    assert shard.view("a").tolist() == [1, 2, 3]
    assert shard.view("b").tolist() == [1.5, -2.0]
    assert shard.view("c").shape == (0, 4)


def test_missing_shard(small: Path) -> None:
    file = file_of(small, NORM)
    (small / file).unlink()
    with pytest.raises(CheckpointError, match=re.escape(file)):
        Checkpoint(small).validate()


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_bad_index(small: Path, index: str) -> None:
    (small / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="has no readable `weight_map`"):
        Checkpoint(small)


def test_index_never_leaves_the_folder(small: Path) -> None:
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"puts `norm.weight` in `../other.safetensors`, expected a plain file name"
    ):
        Checkpoint(small)


def test_folders_that_are_no_checkpoints(tmp_path: Path, small: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint: there is no such folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        Checkpoint(tmp_path)


def test_unknown_names(small: Path) -> None:
    checkpoint = Checkpoint(small)
    with pytest.raises(CheckpointError, match="`nonsense` is no tensor of this model"):
        checkpoint.dequantised("nonsense")
    with pytest.raises(CheckpointError, match="`nonsense` is missing"):
        checkpoint.raw("nonsense")
    assert set(inventory(checkpoint.config)) <= set(checkpoint.names())


# Some rows at a time: what loading asks of a source.


@pytest.mark.parametrize("name", [WQ_A, EXPERT, TABLE, NORM])
def test_parts_read_and_widened_by_rows_are_the_dequantised_tensor(small: Path, name: str) -> None:
    checkpoint = Checkpoint(small)
    whole, parts = checkpoint.dequantised(name), checkpoint.parts(name)
    assert checkpoint.shape(name) == tuple(whole.shape)
    step, rows = max(part.covers for part in parts), []
    for first in range(0, whole.shape[0], step):
        end = min(first + step, whole.shape[0])
        rows.append(checkpoint.widen([some_rows(checkpoint, part, first, end) for part in parts]))
    assert torch.equal(torch.cat(rows), whole)


def some_rows(checkpoint: Checkpoint, part: Stored, first: int, end: int) -> Tensor:
    """Rows of a part that belong to rows [first, end) of its logical tensor, read as bytes."""
    first, end = first // part.covers, -(-end // part.covers)
    size = math.prod(part.shape[1:]) * part.dtype.itemsize
    data = torch.empty((end - first) * size, dtype=torch.uint8)
    checkpoint.read(part.name, first * size, data)
    return data.view(part.dtype).view(end - first, *part.shape[1:])


@pytest.mark.parametrize(
    ("name", "make", "found"),
    [
        ("layers.0.attn.wq_a.scale", nan_byte, 1),
        ("layers.0.attn.wq_a.scale", lambda t: torch.full(t.shape, float("inf")), 2),
        (TABLE, set_row([4, 0]), 1),
        (TABLE, set_row([0, -1]), 1),
        (TABLE, set_row([3, 3]), 1),
        (NORM, lambda t: t, None),
        (WQ_A, lambda t: t, 0),
    ],
)
def test_what_is_suspect_is_also_said(small: Path, name: str, make: object, found: int | None) -> None:
    edit(small, name, replace(name, make))
    checkpoint = Checkpoint(small)
    logical = name.replace(".scale", ".weight")
    suspect = checkpoint.suspect(logical, [checkpoint.raw(part.name) for part in checkpoint.parts(logical)])
    assert (None if suspect is None else int(suspect)) == found
    if found:
        with pytest.raises(CheckpointError, match=re.escape(name)):
            checkpoint.check(logical)
    else:
        checkpoint.check(logical)


def test_a_file_that_shrinks_is_an_error_when_it_is_read(small: Path) -> None:
    checkpoint = Checkpoint(small)
    part = checkpoint.stored("head.weight")
    data = torch.empty(math.prod(part.shape) * part.dtype.itemsize, dtype=torch.uint8)
    file = small / file_of(small, "head.weight")
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match=r"`head\.weight` in .*: data ends at byte \d+, but the file has 1000"):
        checkpoint.read("head.weight", 0, data)
