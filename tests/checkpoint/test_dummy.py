"""Dummy weights: a checkpoint in all but the files, of the right spread, and the same at every call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.names import inventory, stored_tensors
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.checkpoint.source import WeightSource, load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import FLASH, NANO, StateLayout
from dsv4c.errors import CheckpointError
from dsv4c.model import Transformer, init_state, make_step
from tests.checkpoint.conftest import SMALL


def test_a_tensor_depends_on_its_name_and_the_seed() -> None:
    a, b, c = DummySource(SMALL, 1), DummySource(SMALL, 1), DummySource(SMALL, 2)
    names = a.names()
    first = {name: a.raw(name) for name in names}
    for name in reversed(names):
        assert torch.equal(b.raw(name).view(torch.uint8), first[name].view(torch.uint8)), name
    assert not torch.equal(c.raw("embed.weight"), first["embed.weight"])
    assert not torch.equal(a.raw("layers.0.attn_norm.weight"), a.raw("layers.1.attn_norm.weight"))


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8", "bf16"])
def test_storage_is_the_inventory(expert_dtype: str) -> None:
    config = dataclasses.replace(SMALL, expert_dtype=expert_dtype)
    source: WeightSource = DummySource(config)
    expected = {t.name: t for spec in inventory(config).values() for t in stored_tensors(spec)}
    assert source.names() == sorted(expected)
    for name, tensor in expected.items():
        assert tuple(source.raw(name).shape) == tensor.shape
        assert source.raw(name).nbytes == tensor.nbytes


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8", "bf16"])
def test_linears_have_variance_one_over_in_features(expert_dtype: str) -> None:
    config = dataclasses.replace(NANO, expert_dtype=expert_dtype)
    source = DummySource(config)
    for spec in inventory(config).values():
        if spec.role not in ("linear", "expert") or not spec.name.startswith("layers.2."):
            continue
        w = source.dequantised(spec.name)
        # Few tiles mean few FP8 scales, each one of two powers of two.
        assert 0.6 < w.std() * spec.shape[1] ** 0.5 < 1.6, spec.name
        assert abs(w.mean()) < 0.1 * w.std()


def test_written_and_read_back(tmp_path: Path) -> None:
    state = load_model_state(DummySource(SMALL, 5))
    write_checkpoint(tmp_path, SMALL, state)
    again = load_model_state(Checkpoint(tmp_path))
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_flash_tensors_are_made_one_at_a_time() -> None:
    source = DummySource(FLASH)
    packed = source.raw("layers.40.ffn.experts.255.w2.weight")
    assert packed.dtype == torch.int8
    assert packed.shape == (4096, 1024)
    assert source.dequantised("layers.42.attn.wkv.weight", torch.bfloat16).shape == (512, 4096)
    w = source.dequantised("layers.40.ffn.experts.255.w2.weight", torch.bfloat16).float()
    assert abs(w.std() * 2048**0.5 - 1) < 0.01


def test_tables_hold_distinct_experts_evenly() -> None:
    table = DummySource(NANO).dequantised("layers.0.ffn.gate.tid2eid")
    assert table.dtype == torch.int64
    assert table.shape == (4096, 2)
    assert (table[:, 0] != table[:, 1]).all()
    counts = table.flatten().bincount(minlength=16)
    assert counts.min() > 0.8 * counts.float().mean()


@torch.no_grad()
def test_activations_stay_near_one_and_routing_spreads() -> None:
    model = Transformer(NANO, StateLayout()).eval()
    model.load_state_dict(load_model_state(DummySource(NANO)))
    chosen: list[torch.Tensor] = []
    gate = model.layers[4].ffn
    gate.choose.register_forward_hook(lambda _module, _args, out: chosen.append(out[0]))
    ids = torch.randint(0, NANO.vocab_size, (300,), generator=torch.Generator().manual_seed(0))
    step = make_step(NANO, StateLayout(), [(0, 0, ids)], 300)
    streams, _ = model.run(step, init_state(NANO, StateLayout(), 1, 300))
    assert all(0.1 < x.square().mean().sqrt() < 10 for x in streams)
    logits = model.logits(streams[-1], torch.arange(300))
    assert 0.3 < logits.std() < 3
    experts = next(t for t in chosen if t.dtype == torch.int64)
    counts = experts.flatten().bincount(minlength=NANO.n_routed_experts)
    assert (counts > 0).all()
    assert counts.max() < 0.4 * counts.sum()


def test_unknown_names() -> None:
    source = DummySource(SMALL)
    for read in (source.raw, source.dequantised, source.parts, source.stored, source.shape):
        with pytest.raises(CheckpointError, match="`nonsense` is no tensor of this model"):
            read("nonsense")


def test_bytes_are_those_of_the_tensor_wherever_reading_begins() -> None:
    source = DummySource(SMALL, 2)
    for name in ("layers.1.ffn.experts.2.w1.weight", "layers.0.attn.wq_a.scale", "layers.0.ffn.gate.tid2eid"):
        expected = source.raw(name).flatten().view(torch.uint8)
        part = source.stored(name)
        assert (part.dtype, part.shape) == (source.raw(name).dtype, tuple(source.raw(name).shape))
        for start in (0, len(expected) // 3, len(expected) - 1):
            into = torch.empty(min(100, len(expected) - start), dtype=torch.uint8)
            source.read(name, start, into)
            assert torch.equal(into, expected[start : start + len(into)])
    source.release()
