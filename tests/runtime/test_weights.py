"""The interpreter of weight transforms: what each does, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4c.artifact import Weight
from dsv4c.errors import ArtifactError, CheckpointError, EngineError
from dsv4c.runtime.weights import LoadProgress, LoadReport, ReadAhead, load_weights
from tests.runtime.memory_source import MemorySource as Source
from tests.runtime.plain_weights import load_weight as plain

# As the host's, and so small that every weight takes several units.
AHEADS = [None, ReadAhead(1, 2, 1), ReadAhead(16, 3, 2)]


def weight(shape: tuple[int, ...], dtype: str, sources: tuple[str, ...], *transforms: tuple[Any, ...]) -> Weight:
    return Weight("w", shape, dtype, sources, transforms)


def load(made: Weight, source: Source, ahead: ReadAhead | None = None) -> Tensor:
    return load_weights([made], source, ahead=ahead)[0]["w"]


A, B = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)


@pytest.mark.parametrize("ahead", AHEADS)
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
        (weight((3, 2), "float32", ("a",), ("dequantise",), ("transpose",)), A.t()),
        (weight((3, 4), "float32", ("a", "b"), ("dequantise",), ("concat", 0), ("permute", [1, 0])),
         torch.cat((A, B)).t()),
        (weight((3, 2, 2), "float32", ("a", "b"), ("dequantise",), ("stack",), ("permute", [2, 0, 1])),
         torch.stack((A, B)).permute(2, 0, 1)),
        (weight((2, 3, 2), "float32", ("a", "b"), ("concat", 0), ("reshape", [2, 2, 3]), ("transpose",)),
         torch.cat((A, B)).view(2, 2, 3).transpose(1, 2)),
        (weight((6, 2), "float32", ("a", "b"), ("concat", 0), ("reshape", [6, 2])), torch.cat((A, B)).view(6, 2)),
        (weight((2,), "float32", (), ("values", [1.5, 2.5]), ("reshape", [2])), torch.tensor([1.5, 2.5])),
        (weight((3,), "int64", ("t",)), torch.tensor([4, 5, 6])),
    ],
)  # fmt: skip
def test_transforms(made: Weight, expected: Tensor, ahead: ReadAhead | None) -> None:
    source = Source(a=A, b=B, t=torch.tensor([4, 5, 6]))
    got = load(made, source, ahead)
    assert got.is_contiguous() and got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(plain(made, source), expected)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (weight((3, 3), "float32", ("a",), ("dequantise",)), CheckpointError, r"\[2, 3\], the artifact expects"),
        (weight((5, 3), "float32", ("a",), ("reshape", [5, 3])), CheckpointError, "cannot be laid out as"),
        (weight((2, 2, 3), "float32", ("a", "c"), ("stack",)), CheckpointError, "do not fit together"),
        (weight((5, 3), "float32", ("a", "b"), ("concat", 0)), CheckpointError, "has 4 rows, expected 5"),
        (weight((3, 3), "float32", ("a", "b"), ("concat", 0)), CheckpointError, "do not fit together"),
        (weight((2, 3), "bfloat16", ("odd",), ("narrow", "bfloat16")), CheckpointError, "`odd` holds values"),
        (weight((2, 3), "float32", ("a", "b"), ("dequantise",)), ArtifactError, "joins 2 sources"),
        (weight((2, 3), "float32", ("a",), ("rotate",)), ArtifactError, "unknown transform `rotate`"),
        (weight((2, 3), "float99", ("a",)), ArtifactError, "unknown dtype `float99`"),
    ],
)
def test_what_does_not_fit_is_refused(made: Weight, error: type[Exception], message: str) -> None:
    source = Source(a=A, b=B, c=torch.zeros(3, 3), odd=torch.full((2, 3), 1.001))
    for loader in (load, plain):
        with pytest.raises(error, match=message):
            loader(made, source)


def test_shapes_are_refused_before_anything_is_read() -> None:
    source = Source(a=A, c=torch.zeros(3, 3))
    made = [weight((2, 3), "float32", ("a",)), weight((2, 2, 3), "float32", ("a", "c"), ("stack",))]
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_weights(made, source)
    with pytest.raises(CheckpointError, match="`absent` is missing"):
        load_weights([made[0], weight((2, 3), "float32", ("absent",))], source)
    assert not source.asked


def test_a_cast_may_round_where_narrow_may_not() -> None:
    got = load(weight((2,), "bfloat16", ("odd",), ("cast", "bfloat16")), Source(odd=torch.full((2,), 1.001)))
    assert torch.equal(got, torch.ones(2, dtype=torch.bfloat16))


def test_all_weights_are_loaded_in_order_with_progress() -> None:
    seen: list[LoadProgress] = []
    source = Source(a=A, b=B)
    made = [Weight(n, (2, 3), "float32", (n,), (("dequantise",),)) for n in ("b", "a")]
    made.append(Weight("one", (1,), "float32", (), (("values", [1.0]),)))
    got, report = load_weights(made, source, seen.append, ahead=ReadAhead(12, 2, 1))
    assert list(got) == ["b", "a", "one"] and source.asked == ["b", "b", "a", "a"]
    assert seen == [
        LoadProgress(1, 3, 12, 48, "b"), LoadProgress(2, 3, 24, 48, "b"),
        LoadProgress(2, 3, 36, 48, "a"), LoadProgress(3, 3, 48, 48, "a"),
    ]  # fmt: skip
    assert (report.weights, report.bytes, report.made) == (3, 48, False)


def test_a_report_says_bytes_seconds_and_rate() -> None:
    assert str(LoadReport(1332, 21_500_000_000, 4.0)) == "loaded 1,332 weights, 21.50 GB in 4.0 s (5.4 GB/s)"
    assert str(LoadReport(2, 10**9, 0.5, made=True)) == "made 2 weights, 1.00 GB in 0.5 s (2.0 GB/s)"


@pytest.mark.parametrize("ahead", AHEADS)
def test_stored_bytes_come_through_unchanged_and_scales_widened(ahead: ReadAhead | None) -> None:
    data = torch.randn(4, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0]]).to(torch.float8_e8m0fnu)
    packed = torch.randint(-128, 128, (3, 5), dtype=torch.int8)
    source = Source(data=data, scale=scale, packed=packed)
    e4m3 = "float8_e4m3fn"
    got = load(weight((8, 6), e4m3, ("data", "data"), ("stored",), ("concat", 0), ("view", e4m3)), source, ahead)
    assert torch.equal(got.view(torch.uint8), torch.cat((data, data)).view(torch.uint8))
    got = load(weight((1, 2), "float32", ("scale",), ("stored",), ("cast", "float32")), source, ahead)
    assert torch.equal(got, torch.tensor([[0.5, 2.0]]))
    stack = (("stored",), ("stack",), ("view", "uint8"))
    got = load(weight((2, 3, 5), "uint8", ("packed", "packed"), *stack), source, ahead)
    assert torch.equal(got, torch.stack((packed, packed)).view(torch.uint8))
    got = load(weight((5, 3, 3), "uint8", ("packed",) * 3, *stack, ("permute", [2, 0, 1])), source, ahead)
    assert torch.equal(got, torch.stack((packed,) * 3).view(torch.uint8).permute(2, 0, 1))


def test_a_tensor_stored_in_other_bits_is_refused() -> None:
    made = weight((2, 3), "uint8", ("a",), ("stored",), ("view", "uint8"))
    with pytest.raises(CheckpointError, match=r"`a` is stored as torch\.float32, the artifact reads it as uint8"):
        load(made, Source(a=A))


def test_a_bound_names_the_weight_and_the_value() -> None:
    source = Source(a=torch.tensor([[1, 2], [3, 129]], dtype=torch.uint8), b=torch.zeros(2, 2, dtype=torch.uint8))
    made = weight((2, 2, 2), "uint8", ("b", "a"), ("stored",), ("stack",), ("view", "uint8"), ("at_most", 128))
    for loader in (load, plain):
        message = "weight `w` does not fit its layout: a stored value is 129, the kernel takes 128 at most"
        with pytest.raises(CheckpointError, match=message):
            loader(made, source)
    assert load(weight(made.shape, made.dtype, made.sources, *made.transforms[:-1], ("at_most", 129)), source).sum() > 0


def test_of_several_offenders_the_first_is_named() -> None:
    """Conditions are looked at together, and in the order in which weights are loaded."""
    source = Source(a=A, x=torch.full((2, 3), 1.001), y=torch.full((2, 3), 1.001))
    made = [Weight(n, (2, 3), "bfloat16", (n,), (("narrow", "bfloat16"),)) for n in ("a", "y", "x")]
    with pytest.raises(CheckpointError, match="`y` holds values that bfloat16 cannot hold exactly"):
        load_weights(made, source)


def test_scales_that_are_no_numbers_are_refused() -> None:
    scale = torch.tensor([[127, 255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    made = weight((1, 2), "float32", ("scale",), ("stored",), ("cast", "float32"))
    with pytest.raises(CheckpointError, match="`scale` holds 1 NaN or infinite scales"):
        load(made, Source(scale=scale))


def test_what_only_the_device_finds_wrong_is_no_fault_of_the_checkpoint() -> None:
    class Suspicious(Source):
        def suspect(self, name: str, parts: Any) -> Tensor:
            return torch.tensor(1)

    with pytest.raises(EngineError, match="`a` is damaged on the device but whole in its file"):
        load(weight((2, 3), "float32", ("a",)), Suspicious(a=A))
