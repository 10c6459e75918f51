"""A small config with every kind of layer, and checkpoints of it to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.source import load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import ModelConfig

# 192 and 96 are no multiples of 128: tiles at the edges are partial. 16 KB a file gives several files.
SMALL = ModelConfig(
    vocab_size=64, hidden_size=192, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=96, o_groups=2, o_lora_rank=32, sliding_window=16, compress_ratios=(0, 4, 128, 0), index_n_heads=4,
    index_head_dim=32, index_topk=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
    num_hash_layers=1, routed_scaling_factor=1.5,
)  # fmt: skip

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="session")
def small_state() -> dict[str, Tensor]:
    return load_model_state(DummySource(SMALL, seed=1))


@pytest.fixture(params=["single", "sharded"])
def small(request: pytest.FixtureRequest, tmp_path: Path, small_state: dict[str, Tensor]) -> Path:
    """A checkpoint of SMALL, in one file and in several."""
    limit = 1 << 40 if request.param == "single" else 1 << 16
    write_checkpoint(tmp_path / "model", SMALL, small_state, shard_bytes=limit)
    return tmp_path / "model"


def file_of(path: Path, name: str) -> str:
    """The file of a checkpoint that holds this tensor."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return "model.safetensors"
    file: str = json.loads(index.read_text())["weight_map"][name]
    return file


def edit(path: Path, name: str, change: Edit) -> str:
    """Applies `change` to the tensors of the file that holds `name`; returns the file's name."""
    file = file_of(path, name)
    tensors = {key: tensor.clone() for key, tensor in load_file(path / file).items()}
    change(tensors)
    save_file(tensors, path / file)
    return file
