"""Experts' activations in scaled formats: which calls, which stay, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4c.compile import Options, lower
from dsv4c.config import NANO
from dsv4c.errors import PassError
from dsv4c.ops import Op
from dsv4c.passes import default_pipeline
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.program import Program
from dsv4c.weights import stored_formats

PASS = QuantiseActivations()


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
    assert not PASS.exact and PASS.why and PASS.tolerance > 0
