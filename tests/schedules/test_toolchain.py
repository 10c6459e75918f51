"""Tools too old for a target are refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.errors import ScheduleError
from dsv4c.schedules._toolchain import Toolchain, check_toolchain

TARGETS = ("sm_90a", "sm_100a", "sm_103a")


@pytest.mark.parametrize("arch", TARGETS)
def test_the_tools_of_the_extra_will_do(arch: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    check_toolchain(arch)


def test_an_older_triton_is_named() -> None:
    """It widens block-scaled operands without a word."""
    old = Toolchain("3.8.1", Path("ptxas"), frozenset(TARGETS))
    with pytest.raises(ScheduleError, match=r"Triton 3.8.1 lacks instructions of target `sm_103a`, .* 3.9") as error:
        old.check("sm_103a")
    assert "extra `gpu`" in error.value.hint
    Toolchain("3.10.0+git1234", Path("ptxas"), frozenset(TARGETS)).check("sm_103a")


def test_an_assembler_without_the_target_is_named() -> None:
    old = Toolchain("3.9.0", Path("/usr/bin/ptxas"), frozenset({"sm_90", "sm_90a", "sm_100a"}))
    old.check("sm_100a")
    with pytest.raises(ScheduleError, match=r"`/usr/bin/ptxas` lacks target `sm_103a`, it knows sm_100a, sm_90a"):
        old.check("sm_103a")


def test_an_assembler_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    monkeypatch.setattr("dsv4c.schedules._toolchain.ptxas_path", lambda arch: tmp_path / "ptxas")
    with pytest.raises(ScheduleError, match="cannot run the assembler"):
        check_toolchain("sm_103a")
