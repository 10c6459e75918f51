"""Checkpoints with a DSpark drafter: published totals, and a tiny one written, read, and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.names import inventory, parameter_sources, stored_tensors
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.checkpoint.source import load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import FLASH, FLASH_0731
from dsv4c.errors import CheckpointError
from dsv4c.model import Transformer, init_state, make_draft, make_step
from tests.checkpoint.conftest import edit
from tests.dspark import LAYOUT, TINY, tiny_model


def test_published_totals_of_flash_0731() -> None:
    stored = [t for spec in inventory(FLASH_0731).values() for t in stored_tensors(spec)]
    drafter = [t for t in stored if t.name.startswith("mtp.")]
    assert (len(drafter), sum(t.nbytes for t in drafter)) == (4_705, 10_862_838_300)
    assert (len(stored), sum(t.nbytes for t in stored)) == (72_317, 166_878_536_440)
    assert len({t.name for t in stored}) == len(stored)


def test_the_main_model_is_flash() -> None:
    assert inventory(FLASH_0731, mtp=False) == inventory(FLASH, mtp=False)


def test_parameters_are_the_models() -> None:
    with torch.device("meta"):
        state = Transformer(TINY).state_dict()
    specs = inventory(TINY)
    shapes = {}
    for parameter, names in parameter_sources(TINY).items():
        shape = specs[names[0]].shape
        shapes[parameter] = (len(names), *shape) if specs[names[0]].role == "expert" else shape
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("limit", [1 << 40, 1 << 16])
def test_written_and_read_back(tmp_path: Path, limit: int) -> None:
    state = load_model_state(DummySource(TINY, 3))
    write_checkpoint(tmp_path, TINY, state, shard_bytes=limit)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.validate()
    assert (checkpoint.config, checkpoint.has_mtp) == (TINY, True)
    again = load_model_state(checkpoint)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert {"mtp.0.main_proj.scale", "mtp.2.confidence_head.proj.weight"} <= set(checkpoint.names())


@torch.no_grad()
def test_a_model_read_back_drafts(tmp_path: Path) -> None:
    """Norms, embeddings and the drafter's heads are rounded to BF16, which moves its confidence a little."""
    model = tiny_model(5)
    write_checkpoint(tmp_path, TINY, model.state_dict(), expert_format="f32", linear_format="f32")
    read = Transformer(TINY, LAYOUT).eval()
    read.load_state_dict(load_model_state(Checkpoint(tmp_path)))
    step = make_step(TINY, LAYOUT, [(0, 0, torch.arange(20))], 32)
    found = []
    for one in (model, read):
        streams, state = one.run(step, init_state(TINY, LAYOUT, 1, 32))
        state = one.absorb(one.tap(streams), step, state)
        found.append(one.draft(make_draft(TINY, LAYOUT, [(0, 20, 9)], 32), state))
    assert found[0][0].shape == found[1][0].shape == (1, 5)
    torch.testing.assert_close(found[0][1][:, 0], found[1][1][:, 0], rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.0.main_proj.weight", "mtp.0.main_proj.scale", "mtp.0.main_norm.weight", "mtp.1.attn.wkv.weight",
        "mtp.1.ffn.experts.2.w3.weight", "mtp.2.norm.weight", "mtp.2.hc_head_base",
        "mtp.2.markov_head.markov_w2.weight", "mtp.2.confidence_head.proj.weight",
    ],
)  # fmt: skip
def test_a_stage_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, TINY, load_model_state(DummySource(TINY)))
    edit(tmp_path, name, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"`{name}` is missing in"):
        Checkpoint(tmp_path).validate()
    with pytest.raises(CheckpointError, match=rf"`{name}` is missing in"):
        load_model_state(Checkpoint(tmp_path))


def test_a_checkpoint_without_its_second_stage_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, load_model_state(DummySource(TINY)))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.1.")]:
            del tensors[name]

    edit(tmp_path, "mtp.1.attn_norm.weight", drop)
    with pytest.raises(CheckpointError, match=r"`mtp\.1\.hc_attn_fn` is missing"):
        load_model_state(Checkpoint(tmp_path))


def test_an_mtp_layer_is_no_stage(tmp_path: Path) -> None:
    """Tensors of a NextN block under a config with `dspark_*` keys are unexpected, those of the stages missing."""
    write_checkpoint(tmp_path, TINY, load_model_state(DummySource(TINY)))
    edit(tmp_path, "norm.weight", lambda tensors: tensors.update({"mtp.0.enorm.weight": torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"`mtp\.0\.enorm\.weight` in `.*` is unexpected"):
        Checkpoint(tmp_path).validate()


def test_without_a_drafter_it_is_a_model_still(tmp_path: Path) -> None:
    state = load_model_state(DummySource(TINY))
    write_checkpoint(tmp_path, TINY, {k: v for k, v in state.items() if not k.startswith("mtp.")})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.validate()
    assert not checkpoint.has_mtp
