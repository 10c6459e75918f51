"""A program's text says all that it computes: what is read back prints the same and gives the same bits."""

from __future__ import annotations

import pytest
import torch

from dsv4c.errors import ArtifactError
from dsv4c.inputs import Inputs
from dsv4c.irread import read_program
from dsv4c.numerics import Runs, compare
from tests.numerics.conftest import ARCHS, Steps, random_config


@pytest.mark.parametrize("arch", ARCHS)
def test_every_stage_is_read_back(steps_of: Steps, arch: str) -> None:
    steps = steps_of(1, arch)
    for step in steps:
        text = step.after.dump()
        again = read_program(text, step.after.config)
        assert again.dump() == text, step.name
        assert again.stitched == step.after.stitched


@pytest.mark.parametrize(("arch", "name"), [("cpu", "capture"), ("cpu", "fuse-linears"), ("sm_90a", "store-experts")])
def test_what_is_read_gives_the_same_bits(steps_of: Steps, arch: str, name: str) -> None:
    steps = steps_of(1, arch)
    program = steps[0].before if name == "capture" else next(s.after for s in steps if s.name == name)
    runs = Runs(Inputs.random(program.config, 4))
    again = read_program(program.dump(), program.config)
    assert compare(runs.results(again), runs.results(program)).equal


def test_constants_and_parts_of_weights_are_in_the_text(steps_of: Steps) -> None:
    program = steps_of(1, "sm_90a")[-1].after
    text = program.dump()
    for value in program.constants["prelude.rope_window.frequency"]:
        assert repr(float(value)) in text
    assert "wkv.weight.scale : f32[2, 1] stored fp8 scale of layers.0.attn.wq_a.weight+wkv.weight from " in text
    other = program.clone()
    other.constants["prelude.rope_window.frequency"] = program.constants["prelude.rope_window.frequency"] / 2
    assert other.dump() != text and torch.equal(
        read_program(other.dump(), program.config).constants["prelude.rope_window.frequency"],
        other.constants["prelude.rope_window.frequency"],
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("dsv4.rms_norm", "dsv4.rms_nrom", "dsv4.rms_nrom"),
        ("%0 = ", "%0 := ", "%0 :="),
        ("(%8, ", "(%999, ", "%999"),
        ("{eps=1e-06", "{eps=open('x')", "open('x')"),
        ("graph ", "gaph ", "no graph of a program"),
        (".frequency : f32[8] = [1.0, ", ".frequency : f32[8] = [", "frequency"),
        (".frequency : f32[8] = [1.0, ", ".frequency : f32[8]  [", "frequency"),
        (" from layers.0", " form layers.0", "form layers.0"),
        ("  return ", "  retrun ", "retrun "),
    ],
)
def test_a_damaged_text_is_refused_with_its_line(steps_of: Steps, old: str, new: str, said: str) -> None:
    text = steps_of(1, "cpu")[-1].before.dump()
    assert old in text
    with pytest.raises(ArtifactError, match=r"is no line of|means nothing in|no graph of") as found:
        read_program(text.replace(old, new), random_config(1))
    assert said in str(found.value)
