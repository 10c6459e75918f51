"""GPU kernels built without a GPU: what a launch record says, that bytes repeat, and what is refused, with names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dsv4c import artifact
from dsv4c.errors import ScheduleError
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import Desc, LaunchArg, TritonLaunch, f32, i32, ptr
from dsv4c.schedules._schedule import Build, OpNode, Schedule, Value, Work
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose
from dsv4c.strictjson import decode

pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")

X = Value(("T", 64), "bfloat16")
SCALE: Mapping[str, LaunchArg] = {"x": ptr(0), "y": ptr(1), "n": i32("a0_0 * 64", 16)}


def launch(kernel: str, args: Mapping[str, LaunchArg], **constants: Any) -> TritonLaunch:
    return TritonLaunch(f"tests.schedules.gpu_kernels:{kernel}", args, constants, ("cdiv(a0_0, 16)", 1, 1))


def build(one: TritonLaunch, cache: Path) -> Compiled:
    return compile_launch(Request("scale(bfloat16[T, 64])", one, (X, X), "sm_90a"), cache)


def test_a_record_says_all_that_a_launcher_needs(tmp_path: Path) -> None:
    made = build(launch("scale", SCALE, FACTOR=2.0, BLOCK=1024), tmp_path)
    record = made.record
    assert [a.kind for a in record.args] == ["ptr", "ptr", "i32", "null", "null"]
    assert [a.arg for a in record.args[:2]] == [0, 1] and record.args[2].multiple == 16
    assert (record.symbol, record.threads, record.cluster) == ("scale", 128, (1, 1, 1))
    assert record.sha256 == hashlib.sha256(made.image).hexdigest() and made.spills == 0 and record.registers > 0
    assert decode(artifact.Launch, _json(record)) == record


def _json(record: artifact.Launch) -> Any:
    import json

    return json.loads(json.dumps(asdict(record)))


def test_descriptors_become_tensor_maps_with_sizes_and_strides(tmp_path: Path) -> None:
    tile = Desc(0, ("a0_0", 64), (64, 1), (64, 64)), Desc(1, ("a1_0", 64), (64, 1), (64, 64))
    out = Desc(2, ("a2_0", 64), (64, 1), (64, 64))
    one = launch("product", {"a": tile[0], "b": tile[1], "c": out}, K=64, BM=64, BN=64, BK=64)
    record = compile_launch(Request("product", one, (X, X, X), "sm_90a"), tmp_path).record
    assert [a.kind for a in record.args] == ["map", "i32", "i32", "i64", "i64"] * 3 + ["null", "null"]
    first = record.args[0].map
    assert first is not None
    assert (first.dtype, first.box, first.swizzle, first.sizes) == ("bfloat16", (64, 64), 128, ("a0_0", 64))


def test_the_same_source_gives_the_same_bytes_in_another_folder(tmp_path: Path) -> None:
    one = launch("scale", SCALE, FACTOR=3.0, BLOCK=512)
    first, again = build(one, tmp_path / "a"), build(one, tmp_path / "b")
    assert first.image == again.image and first.record == again.record
    assert build(one, tmp_path / "a").image == first.image
    assert str(tmp_path).encode() not in first.image


def test_constants_change_the_kernel(tmp_path: Path) -> None:
    images = {build(launch("scale", SCALE, FACTOR=f, BLOCK=512), tmp_path).image for f in (1.5, 2.5)}
    assert len(images) == 2


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (launch("scale", SCALE, FACTOR=2.0), "lacks parameters ['BLOCK']"),
        (launch("scale", {**SCALE, "z": f32(1.0)}, FACTOR=2.0, BLOCK=16), "unknown parameters ['z']"),
        (launch("scale", {**SCALE, "y": ptr(7)}, FACTOR=2.0, BLOCK=16), "argument 7, which is absent"),
        (launch("scale", SCALE, FACTOR=2.0, BLOCK=17), "does not compile"),
        (launch("scratch", {"x": ptr(0), "y": ptr(1), "n": i32("a0_0")}, BLOCK=16), "bytes of scratch memory"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(one: TritonLaunch, says: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError) as error:
        build(one, tmp_path)
    assert says in error.value.message and "scale(bfloat16[T, 64])" in error.value.message
    assert error.value.hint or "absent" in says


def test_shared_memory_over_the_limit_is_refused_with_both_sizes(tmp_path: Path) -> None:
    wide = Value(("T", 1024), "bfloat16")
    tile = tuple(Desc(i, (f"a{i}_0", 1024), (1024, 1), (256, 256)) for i in range(3))
    one = launch("product", {"a": tile[0], "b": tile[1], "c": tile[2]}, K=1024, BM=256, BN=256, BK=256)
    with pytest.raises(ScheduleError, match=r"needs \d+ bytes of shared memory, `sm_90a` has 232448"):
        compile_launch(Request("product", one, (wide, wide, wide), "sm_90a"), tmp_path)


def test_emit_writes_cubins_and_one_launcher_beside_them(tmp_path: Path) -> None:
    node = OpNode("scale", {}, (X,), (X,))
    schedule = Schedule(
        "scale.triton", "scale", frozenset({"sm_90a"}),
        lambda node, config: Build("gpu", launches=(launch("scale", SCALE, FACTOR=2.0, BLOCK=config["BLOCK"]),)),
        lambda node, symbols, config: Work(1.0, launch="gpu"), space=lambda node, symbols: ({"BLOCK": 256},),
    )  # fmt: skip
    choice = choose(schedule, node, "sm_90a", {"T": 8}, "only one accepts")
    assert choice.config == {"BLOCK": 256}
    outputs = []
    for folder in ("one", "two"):
        kernels = emit({choice.kernel: choice}, tmp_path / folder, tmp_path / folder / "cache", arch="sm_90a")
        outputs.append(kernels)
        kernel = kernels[choice.kernel]
        assert kernel.kind == "gpu" and len(kernel.launches) == 1
        for file, sha in artifact.kernel_files(kernels.values()).items():
            assert artifact.sha256_of(tmp_path / folder / file) == sha
    assert outputs[0] == outputs[1]
