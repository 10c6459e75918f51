"""Experts' activations in scaled formats: which calls, which stay, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import pytest

from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checked import run_checked
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, lower
from dsv4c.config import NANO
from dsv4c.errors import PassError
from dsv4c.inputs import Inputs
from dsv4c.numerics import Check, Runs, on_equal_inputs
from dsv4c.ops import Op
from dsv4c.passes import default_pipeline
from dsv4c.passes.quantise_activations import TOLERANCE, QuantiseActivations
from dsv4c.program import Program
from dsv4c.prompts import OWN, read_prompts
from dsv4c.weights import stored_formats

PASS = QuantiseActivations()
NANO_FOLDER = Path(__file__).parents[2] / "examples" / "nano"


@pytest.fixture(scope="module")
def hopper() -> Program:
    """What the passes before it leave: experts on BF16 activations."""
    return lower(NANO, Options(), arch="sm_90a")


def experts(program: Program) -> Counter[tuple[str, str]]:
    found = (n for n in program.graphs["step"].nodes if isinstance(n.target, Op) and n.target.name.startswith("expe"))
    return Counter((n.target.name, str(n.kwargs.get("activations", ""))) for n in found)  # type: ignore[union-attr]


def test_every_call_takes_the_format_and_a_second_run_changes_nothing(hopper: Program) -> None:
    program = hopper.clone()
    layers = NANO.num_hidden_layers
    assert experts(program) == {("experts_fp4", ""): layers}
    assert PASS.apply(program) >= layers
    assert experts(program) == {("experts_mx", "mxfp8"): layers}
    text = program.dump()
    assert PASS.apply(program) == 0 and program.dump() == text


def test_what_is_kept_stays_as_it_was(hopper: Program) -> None:
    program = hopper.clone()
    QuantiseActivations(experts="mxfp4", keep=("L00*", "L05.ffn")).apply(program)
    assert experts(program) == {("experts_fp4", ""): 2, ("experts_mx", "mxfp4"): NANO.num_hidden_layers - 2}


def test_a_pattern_that_matches_nothing_is_refused_with_the_scopes(hopper: Program) -> None:
    with pytest.raises(PassError, match="`L99\\*` matches no routed experts") as error:
        QuantiseActivations(keep=("L99*",)).apply(hopper.clone())
    assert "L00.ffn" in error.value.hint


def test_it_is_the_default_of_blackwell_alone() -> None:
    formats = stored_formats(NANO)
    names = {arch: {p.name for p in default_pipeline(formats, arch).passes} for arch in ("cpu", "sm_90a", "sm_103a")}
    assert {arch for arch, found in names.items() if PASS.name in found} == {"sm_103a"}
    assert not PASS.exact and PASS.why


@pytest.mark.parametrize("activations", ["mxfp8", "mxfp4"])
def test_no_call_is_further_off_than_the_manifest_says(hopper: Program, activations: Literal["mxfp8", "mxfp4"]) -> None:
    """On text with nano's own weights, and on random inputs; benchmarks/accuracy.py takes more of both."""
    one = QuantiseActivations(activations)
    after = hopper.clone()
    one.apply(after)
    stated = one.tolerance_in(after)
    source = Checkpoint(NANO_FOLDER)
    text = Inputs.of_prompts(source, Tokenizer.from_file(NANO_FOLDER), read_prompts(OWN))
    for inputs in (text, Inputs.random(NANO, 3)):
        found = on_equal_inputs(Check(equal=False), hopper, after, Runs(inputs))
        assert found.worst_op is not None and found.worst_op.startswith("`dsv4.experts_mx` in `")  # paired, op by op
        assert found.equal_inputs is not None and stated / 8 < found.equal_inputs < stated


def test_the_coarsest_format_of_a_program_is_what_its_record_states(hopper: Program) -> None:
    stated = []
    for one in (QuantiseActivations("mxfp8"), QuantiseActivations("mxfp4"), QuantiseActivations("mxfp4", ("*",))):
        program = hopper.clone()
        record = run_checked(one, hopper, program, {})
        assert program.history[-1] == record
        stated.append(record.tolerance)
    assert stated == [TOLERANCE["mxfp8"], TOLERANCE["mxfp4"], PASS.tolerance]
    assert 0 < stated[0] < stated[1] == PASS.tolerance == max(TOLERANCE.values())
