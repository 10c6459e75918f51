"""Launches on the recording driver: sound ones pass, and whatever would not reach a card as recorded is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4c.artifact import Buffer, Call, Kernel, Launch, Program, Segment
from dsv4c.cli import main
from dsv4c.errors import ArtifactError
from dsv4c.replay import Map, replay
from dsv4c.schedules.blackwell import experts
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose
from tests.schedules.blackwell.test_experts import mx_node

pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a CUDA driver is here: the recording one is not asked"
)
SYMBOLS = {"T": 5}
FP4 = "float4_e2m1fn_x2"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with the kernels of routed experts, and the manifest of a program that calls them once."""
    folder = tmp_path_factory.mktemp("replay")
    schedule = next(one for one in experts.schedules("sm_103a") if one.op == "experts_mx")
    choice = choose(schedule, mx_node("nano"), "sm_103a", SYMBOLS, "the test's")
    kernels = emit({choice.kernel: choice}, folder, folder / "cache", arch="sm_103a")
    values = (*choice.inputs, *choice.workspace, *choice.node.outputs)
    buffers = tuple(Buffer(f"v{i}", v.shape, v.dtype, ()) for i, v in enumerate(values) if v is not None)
    call = Call(choice.kernel, tuple(b.name for b in buffers), len(choice.node.outputs))
    program = Program("decode", SYMBOLS, (), buffers, (Segment("graph", (call,)),), {}, 0)
    return folder, SimpleNamespace(
        kernels=kernels, programs={"decode.5": program}, weights=(), kv_groups=(), state_groups=(), target="sm_103a"
    )


def faults(built: tuple[Path, Any], symbol: str | None = None, **changes: Any) -> list[str]:
    """What the replay finds, with one launch's record changed."""
    folder, manifest = built
    ((name, kernel),) = manifest.kernels.items()
    launches = tuple(replace(one, **changes) if one.symbol == symbol else one for one in kernel.launches)
    other = SimpleNamespace(**{**vars(manifest), "kernels": {name: replace(kernel, launches=launches)}})
    return [fault for one in replay(folder, other, folder / "cache") for fault in one.faults]


def launches(built: tuple[Path, Any]) -> tuple[Launch, ...]:
    kernel: Kernel
    (kernel,) = built[1].kernels.values()
    return kernel.launches


@pytest.fixture(scope="module")
def plain(built: tuple[Path, Any]) -> Launch:
    """A launch of addresses and numbers."""
    return next(one for one in launches(built) if {arg.kind for arg in one.args} == {"ptr", "i32", "null"})


@pytest.fixture(scope="module")
def mapped(built: tuple[Path, Any]) -> Launch:
    """A launch with a tensor map over padded FP4."""
    return next(one for one in launches(built) if any(a.map and a.map.dtype == FP4 for a in one.args))


def changed(launch: Launch, first: str, /, **values: Any) -> tuple[Any, ...]:
    """The launch's parameters, the first of this kind changed."""
    at = next(i for i, arg in enumerate(launch.args) if arg.kind == first)
    return tuple(replace(arg, **values) if i == at else arg for i, arg in enumerate(launch.args))


def test_every_launch_reaches_the_driver_as_recorded(built: tuple[Path, Any]) -> None:
    folder, manifest = built
    found = list(replay(folder, manifest, folder / "cache"))
    assert [one.launch for one in found] == list(launches(built))
    assert all(one.faults == () and one.program == "decode.5" and min(one.grid) > 0 for one in found)


def test_launches_that_a_card_would_not_take_are_found(built: tuple[Path, Any], plain: Launch, mapped: Launch) -> None:
    name = plain.symbol
    assert "its code is made for" in faults(built, name, threads=2 * plain.threads)[0]
    assert "more than a card takes" in faults(built, name, grid=(1, 1 << 16, 1))[0]
    assert "has a grid of (" in faults(built, name, grid=(7, 1, 1), cluster=(3, 1, 1))[0]
    assert faults(built, name, shared=1 << 16) == []  # the launcher asks for it first
    assert faults(built, name, args=changed(plain, "i32", value=1 << 40)) != []
    assert "has 4 bytes" in faults(built, name, args=changed(plain, "i32", kind="i64"))[0]
    tile = next(arg.map for arg in mapped.args if arg.map is not None and arg.map.dtype == FP4)
    for broken, said in (
        (replace(tile, box=(512, tile.box[1])), "not within 1 and 256"),
        (replace(tile, strides=(8, 1)), "is not aligned"),
        (replace(tile, box=(tile.box[0], 64)), "not 128"),
    ):
        args = tuple(arg if arg.map != tile else replace(arg, map=broken) for arg in mapped.args)
        assert any(said in fault for fault in faults(built, mapped.symbol, args=args)), said


def test_a_launch_with_other_parameters_than_its_code_is_refused(built: tuple[Path, Any], plain: Launch) -> None:
    with pytest.raises(ArtifactError, match="its code takes"):
        faults(built, plain.symbol, args=plain.args[:-1])


def test_rules_of_tensor_maps() -> None:
    """Those of `cuTensorMapEncodeTiled`, of padded FP4 (type 14) among them."""
    bytes_ = Map(0x1000, 0, (256, 64), (256,), (128, 64), 3)
    padded = Map(0x1000, 14, (256, 64), (128,), (128, 64), 3)
    assert bytes_.faults() == padded.faults() == []
    for wrong in (
        replace(bytes_, address=0x1008), replace(bytes_, strides=(120,)), replace(bytes_, box=(256, 64)),
        replace(bytes_, box=(8, 64)), replace(bytes_, sizes=(256, (1 << 32) + 1)), replace(bytes_, strides=(1 << 40,)),
        replace(padded, address=0x1010), replace(padded, strides=(144,)), replace(padded, box=(64, 64)),
        replace(padded, sizes=(192, 64)), replace(padded, swizzle=2),
    ):  # fmt: skip
        assert wrong.faults() != [], wrong


def test_the_command_says_what_it_found(
    built: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = built
    monkeypatch.setattr("dsv4c.artifact.load_manifest", lambda _: manifest)
    assert main(["audit", str(folder)]) == 0
    said = capsys.readouterr().out
    count = len(launches(built))
    assert f"{count} launches of 1 programs replayed" in said and "0 faults" in said and "UTCQMMA" in said
    assert main(["audit", str(folder), "--no-replay", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["replayed"] is None and len(told["launches"]) == count
    assert all(one["faults"] == [] and one["registers"] > 0 for one in told["launches"])
    ((name, kernel),) = manifest.kernels.items()
    broken = tuple(replace(one, threads=32) for one in kernel.launches)
    other = SimpleNamespace(**{**vars(manifest), "kernels": {name: replace(kernel, launches=broken)}})
    monkeypatch.setattr("dsv4c.artifact.load_manifest", lambda _: other)
    assert main(["audit", str(folder)]) == 1
    assert f"of {name} is launched with 32 threads" in capsys.readouterr().out


def test_an_artifact_without_machine_code_is_refused(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(nano_artifact)]) == 2
    said = capsys.readouterr().err
    assert "is for `cpu`" in said and "--target sm_103a" in said
