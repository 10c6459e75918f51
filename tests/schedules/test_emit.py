"""Building is reproducible, cached, parallel and loud; the same texts serve AVX2 machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4c.artifact import sha256_of
from dsv4c.errors import ScheduleError
from dsv4c.runtime.kernels import Kernels
from dsv4c.schedules._schedule import Build, Choice
from dsv4c.schedules.emit import Toolchain, emit
from dsv4c.schedules.inductor import generate

from .cases import make_case
from .conftest import Built, choice_of
from .test_schedules import check, reference


def small() -> dict[str, Choice]:
    choices = [choice_of(make_case("token_slots", 9), "token_slots.cpp_rows")]
    choices += [choice_of(make_case("linear-odd", 9), "linear.aten")]
    return {c.kernel: c for c in choices}


def test_the_same_plan_gives_the_same_bytes_and_comes_from_the_cache(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = emit(small(), tmp_path / "a", tmp_path / "cache-a", lambda done, total, _: seen.append((done, total)))
    second = emit(small(), tmp_path / "b", tmp_path / "cache-b")
    assert first == second
    assert seen == [(1, 2), (2, 2)]
    native = next(k for k in first.values() if k.kind == "cpp")
    assert native.file is not None and native.sha256 == sha256_of(tmp_path / "a" / native.file)
    assert Path(native.file).stem == native.sha256
    assert str(tmp_path).encode() not in (tmp_path / "a" / native.file).read_bytes()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache-a").iterdir()}
    emit(small(), tmp_path / "c", tmp_path / "cache-a")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache-a").iterdir()}


def test_a_vendor_kernel_has_no_file(tmp_path: Path) -> None:
    vendor = next(k for k in emit(small(), tmp_path, tmp_path / "cache").values() if k.kind == "aten")
    assert (vendor.file, vendor.symbol, vendor.attrs) == (None, "aten.linear", {"groups": 1})


def test_a_text_that_does_not_compile_names_the_op(tmp_path: Path) -> None:
    choice = choice_of(make_case("token_slots", 9), "token_slots.cpp_rows")
    broken = Choice(**{**vars(choice), "build": Build("cpp", "slots.cc", {"ENDS": 0})})
    with pytest.raises(ScheduleError, match=r"`token_slots.* does not compile"):
        emit({broken.kernel: broken}, tmp_path, tmp_path / "cache")


def test_an_op_that_inductor_would_call_a_library_for_does_not_compile(tmp_path: Path) -> None:
    case = make_case("linear-float32", 9)
    choice = choice_of(case, "any.inductor")
    with pytest.raises(ScheduleError, match="`linear"):
        emit({choice.kernel: choice}, tmp_path, tmp_path / "cache")


def test_inductor_stores_into_the_outputs_without_a_copy(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    for name in ("swiglu_pair", "rms_norm"):
        text = generate(make_case(name, 9).node, tmp_path)
        temporaries = text.count("aoti_torch_empty_strided")
        assert temporaries == (name == "rms_norm")  # the sums of squares; no result
        assert text == generate(make_case(name, 9).node, tmp_path)


def test_narrower_machines_run_the_same_texts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Built for AVX2 wherever this runs: a vector is then two registers, and the tiles are smaller."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    pairs = [
        ("linear-bfloat16", "linear.cpp_packed"), ("attend_csa", "attend_csa.cpp_tiles"),
        ("hc_post_pre_norm", "hc_post_pre_norm.cpp_lanes"), ("experts-bfloat16", "experts.cpp_sorted"),
    ]  # fmt: skip
    choices = {c.kernel: c for c in (choice_of(make_case(n, 9), s) for n, s in pairs)}
    cache = Path(request.config.cache.mkdir("kernels"))
    built = Built(Kernels(emit(choices, tmp_path, cache, toolchain=Toolchain.of_host("avx2")), tmp_path))
    for name, schedule in pairs:
        case = make_case(name, 65)
        for got, expected in zip(built.run(case, schedule, case.inputs), reference(case, torch.float64), strict=True):
            check(got, expected, 1e-5, case)


def test_no_compiler_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ScheduleError, match=r"no C\+\+ compiler") as error:
        Toolchain.of_host()
    assert "install" in error.value.hint
