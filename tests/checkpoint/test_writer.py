"""The writer: what is written is read back, the bytes are fixed, and a bad state is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4c.checkpoint.names import inventory, parameter_sources, stored_tensors
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.writer import Format, write_checkpoint
from dsv4c.errors import CheckpointError
from tests.checkpoint.conftest import SMALL

EXPERTS = "layers.1.ffn.experts.w2"


@pytest.fixture
def random_state(small_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that no format holds exactly, as after training."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: t if t.dtype == torch.int64 else t * torch.empty_like(t).uniform_(0.9, 1.1, generator=generator)
        for name, t in small_state.items()
    }


def test_default_storage_is_the_inventory(tmp_path: Path, random_state: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, SMALL, random_state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    checkpoint = Checkpoint(tmp_path)
    expected = {t.name: t for spec in inventory(SMALL).values() for t in stored_tensors(spec)}
    assert checkpoint.names() == sorted(expected)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tuple(tensor.shape) == expected[name].shape
    assert checkpoint.config == SMALL


@pytest.mark.parametrize("linear", ["fp8", "fp4", "bf16", "f32"])
@pytest.mark.parametrize("expert", ["fp4", "fp8", "bf16", "f32"])
def test_every_format_is_read_back(
    tmp_path: Path, random_state: dict[str, Tensor], expert: Format, linear: Format
) -> None:
    write_checkpoint(tmp_path, SMALL, random_state, expert_format=expert, linear_format=linear)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.validate()
    assert checkpoint.config.expert_dtype == expert
    state = load_model_state(checkpoint)
    tolerance = {"fp4": 0.2, "fp8": 0.05, "bf16": 0.01, "f32": 0.0, "i64": 0.0}
    specs, sources = inventory(SMALL), parameter_sources(SMALL)
    for name, tensor in random_state.items():
        spec = specs[sources[name][0]]
        kind = {"expert": expert, "linear": linear}.get(spec.role, spec.kind)
        error = (state[name] - tensor).abs().float().square().mean().sqrt()
        assert error <= tolerance[kind] * tensor.float().square().mean().sqrt(), name


def test_writing_what_was_read_changes_nothing(tmp_path: Path, random_state: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path / "a", SMALL, random_state)
    first = load_model_state(Checkpoint(tmp_path / "a"))
    write_checkpoint(tmp_path / "b", SMALL, first)
    second = load_model_state(Checkpoint(tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("limit", [1 << 40, 1 << 16])
def test_the_same_state_gives_the_same_bytes(tmp_path: Path, random_state: dict[str, Tensor], limit: int) -> None:
    backwards = dict(reversed(random_state.items()))
    write_checkpoint(tmp_path / "a", SMALL, random_state, shard_bytes=limit)
    write_checkpoint(tmp_path / "b", SMALL, backwards, shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_shards_keep_to_their_size(tmp_path: Path, random_state: dict[str, Tensor]) -> None:
    limit = 100_000
    write_checkpoint(tmp_path, SMALL, random_state, shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = []
    for file in files:
        tensors = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= limit or len(tensors) <= 2
        assert all(
            n.replace(".weight", ".scale") in tensors for n, t in tensors.items() if t.itemsize == 1 and "weight" in n
        )
    assert sum(sizes) == index["metadata"]["total_size"]


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path, random_state: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, SMALL, random_state, shard_bytes=1 << 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(tmp_path, SMALL, random_state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    Checkpoint(tmp_path).validate()


def test_without_mtp(tmp_path: Path, random_state: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, SMALL, {k: v for k, v in random_state.items() if not k.startswith("mtp.")})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.validate()
    assert not checkpoint.has_mtp


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stray": torch.zeros(1)}, "`stray` is no parameter of this model"),
        ({"norm.weight": None}, "parameter `norm.weight` is missing"),
        ({"norm.weight": torch.zeros(3)}, "parameter `norm.weight`: shape is [3], expected [192]"),
        ({EXPERTS: torch.zeros(4, 96, 192)}, f"`{EXPERTS}`: shape is [4, 96, 192], expected [4, 192, 96]"),
        ({"norm.weight": torch.zeros(192, dtype=torch.int64)}, "dtype is torch.int64, expected a float dtype"),
        ({"layers.0.ffn.gate.tid2eid": torch.zeros(64, 2)}, "dtype is torch.float32, expected int64"),
        ({"norm.weight": torch.full((192,), float("inf"))}, "`norm.weight`: found 192 NaN or infinite values"),
        ({EXPERTS: torch.full((4, 192, 96), float("nan"))}, "`layers.1.ffn.experts.0.w2.weight`: found 18432 NaN"),
    ],
)
def test_bad_states_are_refused(
    tmp_path: Path, random_state: dict[str, Tensor], change: dict[str, Tensor | None], says: str
) -> None:
    state = {k: v for k, v in (random_state | change).items() if v is not None}
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(tmp_path, SMALL, state)
    assert says in error.value.message


def test_fp4_needs_whole_groups(tmp_path: Path) -> None:
    import dataclasses

    from dsv4c.checkpoint.dummy import DummySource

    config = dataclasses.replace(SMALL, moe_intermediate_size=80, expert_dtype="bf16")
    with pytest.raises(CheckpointError, match=r"w2\.weight` has 80 input channels, expected a multiple of 32 for FP4"):
        write_checkpoint(tmp_path, config, load_model_state(DummySource(config)))
