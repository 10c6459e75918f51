"""Every example runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # where a dataclass looks its annotations up
    spec.loader.exec_module(loaded)
    return loaded


def test_inspect_passes_prints_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("inspect_passes").main(["fuse-hc-norm"]) == 0
    out = capsys.readouterr().out
    assert "check-lowered" in out and "+  %" in out


def test_generate_completes_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("generate").main(["To install the package"]) == 0
    assert len(capsys.readouterr().out) > 40


def test_a_pass_of_ones_own_joins_the_pipeline_and_keeps_its_claim(capsys: pytest.CaptureFixture[str]) -> None:
    example = module("own_pass")
    assert example.main() == 0
    out = capsys.readouterr().out
    assert "round-kv: 12 rewrites; kv-rounded holds now" in out and "comes from pass round-kv" in out
    found = re.search(r"([\d.]+) on equal inputs; first differs: `dsv4.quantise_kv` in `L00.attn`", out)
    assert found is not None and 0 < float(found[1]) < example.RoundKv.tolerance


def test_a_schedule_of_ones_own_is_chosen_and_computes_what_the_reference_does(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert module("own_schedule").main([]) == 0
    out, err = capfd.readouterr()
    assert "6 calls, such as that of L00.ffn: swiglu_pair.cpp_own, model " in out
    assert "off its reference" not in err
    assert len(out.splitlines()[-1]) > 40
