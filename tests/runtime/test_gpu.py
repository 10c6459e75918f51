"""The GPU side of the runtime, as far as it goes without a card: sizes, refusals, and a launcher without a driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.artifact import Kernel
from dsv4c.errors import ArtifactError
from dsv4c.runtime import layouts
from dsv4c.runtime.gpu import CallSizes, GpuKernels, check_card

ARGS = [torch.zeros(5, 48), None, torch.zeros(7, dtype=torch.int64)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (3, 3), ("a0_0", 5), ("a0_0 * a0_1", 240), ("cdiv(a2_0, 4)", 2), ("cdiv(a0_0 - 5, 4)", 0),
        ("min(a0_0, 3) + max(a2_0, 9)", 12), ("(a0_1 + 1) // 10 % 3", 1), ("cdiv(a0_0, 2) * 8", 24),
    ],
)  # fmt: skip
def test_size_expressions(text: int | str, value: int) -> None:
    assert CallSizes("op", ARGS).value(text) == value


@pytest.mark.parametrize("text", ["a1_0", "a9_0", "a0_5", "T", "a0_0 ** 2", "__import__('os')", "a0_0 / 2", "1.5"])
def test_anything_else_is_refused_with_the_kernel_and_the_text(text: str) -> None:
    with pytest.raises(ArtifactError) as error:
        CallSizes("hc_pre_1234", ARGS).value(text)
    assert "hc_pre_1234" in error.value.message and text.split("(")[0] in error.value.message


def test_a_machine_without_a_card_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match="made for `sm_90a`, this machine has no usable CUDA device"):
        check_card("sm_90a", 0)


def test_another_card_is_refused_with_its_name_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ArtifactError) as error:
        check_card("sm_90a", 0)
    assert "A100" in error.value.message and "sm_80" in error.value.message
    assert error.value.hint == "compile it with `--target sm_80a`"


def test_a_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ArtifactError, match="no card 2: this machine has 2"):
        check_card("sm_90a", 2)


def test_kernels_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dsv4c.runtime.gpu.check_card", lambda arch, device: None)
    kernel = Kernel("k", "gpu", "op", "op.triton", "", 0.0, "")
    with pytest.raises(ArtifactError, match="name no single launcher"):
        GpuKernels({"k": kernel}, tmp_path, "sm_90a")


@pytest.mark.parametrize(
    ("transforms", "shape"),
    [((("reshape", (6, 4)),), (6, 4)), ((("transpose",),), (2, 4, 3)), ((("permute", (2, 0, 1)),), (4, 2, 3))],
)
def test_layouts_move_values_and_change_none(transforms: Any, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(2, 3, 4)
    out = layouts.apply(tensor, transforms)
    assert tuple(out.shape) == shape and out.is_contiguous()
    assert torch.equal(out.flatten().sort().values, tensor.flatten().sort().values)


def test_a_layout_may_bound_what_is_stored() -> None:
    tensor = torch.tensor([117, 128], dtype=torch.uint8)
    assert torch.equal(layouts.apply(tensor, (("at_most", 128),)), tensor)
    with pytest.raises(ValueError, match="a stored value is 128, the kernel takes 127 at most"):
        layouts.apply(tensor, (("at_most", 127),))
