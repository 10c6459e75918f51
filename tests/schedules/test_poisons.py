"""What is no number stays none through the schedules of the CPU: a bad value in each input of each op."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4c.ops import OPS

from .cases import make_case
from .conftest import PAIRS, Built
from .poisons import Args, decoded, judge, poisons
from .test_schedules import reference, results_of

DRAFTS = "markov_draft"  # a draft is verified: whatever it is, it changes no token


@pytest.mark.parametrize(("name", "schedule"), [pair for pair in PAIRS if not pair[0].startswith(DRAFTS)])
def test_a_bad_value_is_kept_where_it_is(name: str, schedule: str, built: Built) -> None:
    torch.set_num_threads(1)
    case = make_case(name, 17)
    op, attrs, clean_inputs = OPS[case.node.op], case.node.attrs, list(case.inputs)
    generator = torch.Generator()
    generator.manual_seed(1)

    def both() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        args: Args = [*case.inputs]
        return tuple(  # type: ignore[return-value]
            decoded(op, attrs, args, some)
            for some in (results_of(case, built, schedule), reference(case, torch.float32))
        )

    clean, clean_expected = both()
    for poison in poisons(op, attrs, [*clean_inputs], generator):
        case.inputs[:] = [t for t in poison.args if t is not None]
        verdict = judge(clean, clean_expected, *both())
        if poison.name.startswith("pool_NC") and name.startswith("attend"):
            # up to 8 tokens of a request share packed keys, and a weight of 0 does not hide a NaN from those before it
            verdict = replace(verdict, spread=max(0, verdict.spread - 7))
        assert verdict.good, f"{poison.name}: {verdict}"


@pytest.mark.parametrize("family", ["rows", "hyper", "compress", "index", "gate"])
def test_kernels_keep_bad_values_in_the_interpreter(family: str) -> None:
    """Two of each kernel; `python -m tests.schedules.hopper.interpret_poisons FAMILY` tries all."""
    part = {
        "rows": ("", "flash decode 3"),
        "hyper": ("norm_quantise", "nano decode 1"),
        "index": ("index_query", "nano"),
    }
    op, label = part.get(family, ("", "nano"))
    command = [sys.executable, "-m", "tests.schedules.hopper.interpret_poisons", family, "--op", op, "--label", label]
    ran = subprocess.run(
        [*command, "--few", "2"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("ok ") >= 2
