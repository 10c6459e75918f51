"""The interpreter of weight transforms: what each does, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4c.artifact import Weight
from dsv4c.errors import ArtifactError, CheckpointError
from dsv4c.runtime.weights import load_weight, load_weights


class Source:
    """Tensors by name; remembers what was asked."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def raw(self, name: str) -> Tensor:
        return self.tensors[name]

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        self.asked.append(name)
        tensor = self.tensors[name]
        return tensor.clone() if tensor.dtype == torch.int64 else tensor.to(dtype)


def weight(shape: tuple[int, ...], dtype: str, sources: tuple[str, ...], *transforms: tuple[Any, ...]) -> Weight:
    return Weight("w", shape, dtype, sources, transforms)


A, B = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (weight((2, 3), "float32", ("a",), ("dequantise",)), A),
        (weight((2, 2, 3), "float32", ("a", "b"), ("dequantise",), ("stack",)), torch.stack((A, B))),
        (weight((4, 3), "float32", ("a", "b"), ("dequantise",), ("concat", 0)), torch.cat((A, B))),
        (weight((2, 6), "float32", ("a", "b"), ("dequantise",), ("concat", 1)), torch.cat((A, B), 1)),
        (weight((2, 3), "bfloat16", ("a",), ("dequantise",), ("narrow", "bfloat16")), A.bfloat16()),
        (weight((2, 3, 2), "bfloat16", ("a", "b"), ("dequantise",), ("stack",), ("transpose",), ("narrow", "bfloat16")),
         torch.stack((A, B)).transpose(1, 2).bfloat16()),
        (weight((1, 3, 2), "float32", ("a",), ("dequantise",), ("reshape", [1, 2, 3]), ("transpose",)), A.t()[None]),
        (weight((2,), "float32", (), ("values", [1.5, 2.5]), ("reshape", [2])), torch.tensor([1.5, 2.5])),
        (weight((3,), "int64", ("t",)), torch.tensor([4, 5, 6])),
    ],
)  # fmt: skip
def test_transforms(made: Weight, expected: Tensor) -> None:
    got = load_weight(made, Source(a=A, b=B, t=torch.tensor([4, 5, 6])))
    assert got.is_contiguous() and got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (weight((3, 3), "float32", ("a",), ("dequantise",)), CheckpointError, r"\[2, 3\], the artifact expects"),
        (weight((5, 3), "float32", ("a",), ("reshape", [5, 3])), CheckpointError, "cannot be laid out as"),
        (weight((2, 2, 3), "float32", ("a", "c"), ("stack",)), CheckpointError, "do not fit together"),
        (weight((2, 3), "bfloat16", ("odd",), ("narrow", "bfloat16")), CheckpointError, "`odd` holds values"),
        (weight((2, 3), "float32", ("a", "b"), ("dequantise",)), ArtifactError, "joins 2 sources"),
        (weight((2, 3), "float32", ("a",), ("rotate",)), ArtifactError, "unknown transform `rotate`"),
        (weight((2, 3), "float99", ("a",)), ArtifactError, "unknown dtype `float99`"),
    ],
)
def test_what_does_not_fit_is_refused(made: Weight, error: type[Exception], message: str) -> None:
    source = Source(a=A, b=B, c=torch.zeros(3, 3), odd=torch.full((2, 3), 1.001))
    with pytest.raises(error, match=message):
        load_weight(made, source)


def test_a_cast_may_round_where_narrow_may_not() -> None:
    got = load_weight(weight((2,), "bfloat16", ("odd",), ("cast", "bfloat16")), Source(odd=torch.full((2,), 1.001)))
    assert torch.equal(got, torch.ones(2, dtype=torch.bfloat16))


def test_all_weights_are_loaded_in_order_with_progress() -> None:
    source, seen = Source(a=A, b=B), []
    made = [Weight(n, (2, 3), "float32", (n,), (("dequantise",),)) for n in ("b", "a")]
    got = load_weights(made, source, lambda done, total, name: seen.append((done, total, name)))
    assert list(got) == ["b", "a"] == source.asked
    assert seen == [(1, 2, "b"), (2, 2, "a")]


def test_stored_bytes_come_through_unchanged_and_scales_widened() -> None:
    data = torch.randn(4, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0]]).to(torch.float8_e8m0fnu)
    packed = torch.randint(-128, 128, (3, 5), dtype=torch.int8)
    source = Source(data=data, scale=scale, packed=packed)
    got = load_weight(
        weight((8, 6), "float8_e4m3fn", ("data", "data"), ("stored",), ("concat", 0), ("view", "float8_e4m3fn")), source
    )
    assert torch.equal(got.view(torch.uint8), torch.cat((data, data)).view(torch.uint8))
    got = load_weight(weight((1, 2), "float32", ("scale",), ("stored",), ("cast", "float32")), source)
    assert torch.equal(got, torch.tensor([[0.5, 2.0]]))
    got = load_weight(
        weight((2, 3, 5), "uint8", ("packed", "packed"), ("stored",), ("stack",), ("view", "uint8")), source
    )
    assert torch.equal(got, torch.stack((packed, packed)).view(torch.uint8))


def test_a_tensor_stored_in_other_bits_is_refused() -> None:
    made = weight((2, 3), "uint8", ("a",), ("stored",), ("view", "uint8"))
    with pytest.raises(CheckpointError, match=r"`a` is stored as torch\.float32, the artifact reads it as uint8"):
        load_weight(made, Source(a=A))
