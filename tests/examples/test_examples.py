"""Every example runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_inspect_passes_prints_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("inspect_passes").main(["fuse-hc-norm"]) == 0
    out = capsys.readouterr().out
    assert "check-lowered" in out and "+  %" in out


def test_generate_completes_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("generate").main(["To install the package"]) == 0
    assert len(capsys.readouterr().out) > 40
