"""The order of benchmarks/accuracy.py's table where it is significant, on dsv4c's own prompts; and that its rows mean
what the product's ops compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import Document, Study, Variant, documents, figures, generate, ratio
from benchmarks.rounding import Experts, Rounding, rotated, weights_of
from dsv4c.inputs import Inputs
from dsv4c.numerics import Runs
from dsv4c.ops.mx import experts_nvfp4
from dsv4c.program import Program
from dsv4c.prompts import OWN, read_prompts

LAYER = "layers.2.ffn.experts"


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


@pytest.fixture(scope="module")
def inputs(study: Study) -> Inputs:
    return Inputs.of_prompts(study.source, study.tokenizer, read_prompts(OWN)[:3])


class Table:
    """Rows of variants on the same inputs."""

    def __init__(self, study: Study, inputs: Inputs) -> None:
        self.study, self.inputs = study, inputs
        self.plain = self.results(study.baseline())
        self.expected = self.plain["logits"].double().log_softmax(-1)
        self.reference = self.documents(self.plain)

    def results(self, variant: Variant) -> Mapping[str, Tensor]:
        return Runs(self.inputs, variant.weights).results(variant.program)

    def documents(self, found: Mapping[str, Tensor]) -> list[Document]:
        return documents(self.inputs, self.study.tokenizer, found, self.expected)

    def kl(self, variant: Variant) -> float:
        kl: float = figures(self.documents(self.results(variant)), self.reference)["kl"]
        return kl


@pytest.fixture(scope="module")
def table(study: Study, inputs: Inputs) -> Table:
    return Table(study, inputs)


def test_the_reference_is_the_plain_model(table: Table) -> None:
    plain = Runs(table.inputs).plain()
    torch.testing.assert_close(table.plain["logits"], plain["logits"], rtol=1e-4, atol=1e-4)
    assert figures(table.reference, table.reference)["kl"] == 0


def test_the_fewer_bits_the_further_and_finer_groups_are_nearer(table: Table) -> None:
    study = table.study
    bf16, mxfp8 = table.kl(study.rounded(Experts("bf16", "bf16"))), table.kl(study.passes("mxfp8"))
    nvfp4, mxfp4 = table.kl(study.rounded(Experts("nvfp4", "nvfp4"))), table.kl(study.passes("mxfp4"))
    assert 0 < 10 * bf16 < mxfp8 < nvfp4 / 4 and nvfp4 < mxfp4


def test_a_rotation_costs_more_than_it_gives_where_weights_are_fp4_already(table: Table) -> None:
    """It is nearer on weights that are not rounded again; their rounding costs as much as the activations'."""
    study = table.study
    mxfp4 = table.kl(study.passes("mxfp4"))
    turned = Experts("mxfp4", "mxfp4", 32)
    assert table.kl(study.rounded(turned)) < mxfp4 < table.kl(study.rounded(turned, "mxfp4"))


def test_what_is_kept_comes_nearer(table: Table) -> None:
    study = table.study
    whole, kept = study.passes("mxfp4"), study.passes("mxfp4", ["L0[1-5]*"])
    assert 0 < table.kl(kept) < table.kl(whole)
    assert table.kl(study.passes("mxfp4", ["L0*"])) == 0  # the MTP block is behind the logits


def test_rows_of_passes_and_of_the_benchmark_are_the_same_numbers(table: Table) -> None:
    study = table.study
    for fmt in ("mxfp8", "mxfp4"):
        ours, theirs = table.results(study.passes(fmt)), table.results(study.rounded(Experts(fmt, fmt)))
        assert torch.equal(ours["logits"], theirs["logits"]) and torch.equal(ours["mtp.logits"], theirs["mtp.logits"])


def nvfp4_of(data: Tensor, byte: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 weights [E, ...] as NVFP4 holds them, value for value."""
    power = torch.ldexp(torch.ones(byte.shape), byte.int() - 127)
    factor = power.amax((1, 2)) / 256
    scale = (power / factor.view(-1, 1, 1)).to(torch.float8_e4m3fn)
    return data, scale.repeat_interleave(2, -1), factor


def test_the_nvfp4_row_is_what_the_op_computes_on_weights_that_nvfp4_holds_exactly(study: Study) -> None:
    """nano's FP4 weights need no rounding to be NVFP4's."""
    draw = torch.Generator().manual_seed(1)
    x, shared = torch.randn(9, 256, generator=draw), torch.randn(9, 256, generator=draw)
    chosen, weight = torch.randint(0, 16, (9, 2), generator=draw), torch.rand(9, 2, generator=draw)
    args = [part for w in ("w1", "w3", "w2") for part in nvfp4_of(*_stored(study, f"{LAYER}.{w}"))]
    factors = torch.tensor([0.01]), torch.full((16,), 0.002)
    found = experts_nvfp4(x, chosen, weight, *args, *factors, shared, limit=10.0, activations="nvfp4")
    program = study.rounded(Experts("nvfp4", "nvfp4")).program
    op = next(n.target for n in program.graphs["step"].nodes if "hidden" in n.kwargs)
    rounds = [
        dataclasses.replace(_rounding(program, which), factor=factor)
        for which, factor in (("x", factors[0]), ("hidden", factors[1][0]))
    ]
    wide = [study.weights[f"{LAYER}.{w}"] for w in ("w1", "w3", "w2")]
    expected = op(x, chosen, weight, *wide, shared, limit=10.0, x=rounds[0], hidden=rounds[1])
    assert torch.equal(found, expected) and not torch.equal(found, shared)


def _stored(study: Study, name: str) -> tuple[Tensor, Tensor]:
    return study.weights[f"{name}.data"], study.weights[f"{name}.scale"]


def _rounding(program: Program, which: str) -> Rounding:
    found = next(n.kwargs[which] for n in program.graphs["step"].nodes if "hidden" in n.kwargs)
    assert isinstance(found, Rounding)
    return found


def test_weights_are_rounded_once_and_a_rotation_is_undone(study: Study) -> None:
    again = weights_of(study.weights, "mxfp4", 0)
    assert f"{LAYER}.w1" in again and len(again) == 3 * 7
    assert all(torch.equal(value, study.weights[name]) for name, value in again.items())  # they are MXFP4 already
    w = study.weights[f"{LAYER}.w2"]
    for size in (16, 32, 128):
        torch.testing.assert_close(rotated(rotated(w, size), size), w, rtol=1e-5, atol=1e-6)
    turned = weights_of(study.weights, "mxfp4", 32)[f"{LAYER}.w2"]
    assert 0.05 < float((turned - w).norm() / w.norm()) < 0.2


def test_figures_are_paired_by_document() -> None:
    assert ratio([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    mean, error = ratio([1.0, 0.0, 1.0, 0.0], [1.0] * 4)
    assert mean == 0.5 and error == pytest.approx((1 / 3 / 4) ** 0.5)


def test_greedy_text_and_its_drafts(study: Study) -> None:
    """Chained drafts begin at the first of the plain run; steps walk the text."""
    prompts = [torch.tensor([0, *study.tokenizer.encode(p)[:20]]) for p in read_prompts(OWN)[:2]]
    found = generate(study, study.baseline(), prompts, 8, 3)
    for one, prompt in zip(found, prompts, strict=True):
        inputs = Inputs((torch.tensor([*prompt.tolist(), *one.tokens]),), study.source)
        plain = Runs(inputs).plain()
        first = len(prompt) - 1
        assert plain["logits"][first : first + 8].argmax(-1).tolist() == one.tokens
        assert plain["mtp.logits"][first : first + 8].argmax(-1).tolist() == [d[0] for d in one.drafts]
        assert all(0 <= kept <= 3 for kept in one.kept())
