"""The inventory reproduces the published totals, and the parameters are the plain model's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dsv4c.checkpoint.names import (
    expert_kind,
    inventory,
    num_mtp_layers,
    parameter_sources,
    stored_kind,
    stored_tensors,
)
from dsv4c.config import FLASH, NANO, PRO, ModelConfig
from dsv4c.model import Transformer
from tests.checkpoint.conftest import SMALL


def stored(config: ModelConfig) -> list[tuple[str, int, str]]:
    return [(t.name, t.nbytes, t.dtype) for spec in inventory(config).values() for t in stored_tensors(spec)]


@pytest.mark.parametrize(
    ("config", "count", "nbytes"),
    [(FLASH, 69_187, 159_609_485_896), (PRO, 145_116, 864_704_792_696)],
    ids=["flash", "pro"],
)
def test_published_totals(config: ModelConfig, count: int, nbytes: int) -> None:
    tensors = stored(config)
    assert len({name for name, _, _ in tensors}) == len(tensors) == count
    assert sum(size for _, size, _ in tensors) == nbytes


def test_published_dtype_counts_of_flash() -> None:
    expected = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}
    assert Counter(dtype for _, _, dtype in stored(FLASH)) == expected


@pytest.mark.parametrize("config", [SMALL, NANO], ids=["small", "nano"])
def test_parameters_are_the_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    specs, sources = inventory(config), parameter_sources(config)
    shapes = {}
    for parameter, names in sources.items():
        shape = specs[names[0]].shape
        shapes[parameter] = (len(names), *shape) if specs[names[0]].role == "expert" else shape
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_every_tensor_feeds_one_parameter() -> None:
    used = [name for names in parameter_sources(SMALL).values() for name in names]
    assert len(set(used)) == len(used)
    assert set(used) == set(inventory(SMALL))


def test_experts_are_stacked_in_order() -> None:
    names = parameter_sources(FLASH)["layers.7.ffn.experts.w3"]
    assert names == tuple(f"layers.7.ffn.experts.{e}.w3.weight" for e in range(256))


def test_without_mtp() -> None:
    assert num_mtp_layers(SMALL) == 1
    rest = inventory(SMALL, mtp=False)
    assert not any(name.startswith("mtp.") for name in rest)
    assert rest.keys() | {n for n in inventory(SMALL) if n.startswith("mtp.")} == inventory(SMALL).keys()


def test_storage_is_decided_by_the_stored_type() -> None:
    specs = inventory(SMALL)
    linear, norm = specs["layers.0.attn.wq_a.weight"], specs["norm.weight"]
    assert [stored_kind(linear, d) for d in ("F8_E4M3", "I8", "U8", "BF16", "F32")] == [
        "fp8",
        "fp4",
        "fp4",
        "bf16",
        "f32",
    ]
    assert stored_kind(norm, "F8_E4M3") is None
    assert stored_kind(specs["layers.0.ffn.gate.tid2eid"], "BF16") is None
    assert expert_kind(SMALL, 0) == "fp4"
