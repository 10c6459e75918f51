"""Raising: every component is recognised, and a module that is not what its op says is refused by name."""

from __future__ import annotations

import pytest
import torch

from dsv4c.capturing import capture
from dsv4c.errors import RaiseError
from dsv4c.model import hyper, moe, rope
from dsv4c.passes import RAISE
from dsv4c.pipeline import Pipeline
from dsv4c.program import Program
from tests.passes.conftest import LAYOUT, SMALL

# ruff: noqa: E501
HEAD = """\
graph head {
  %weight.norm.weight : f32[32]
  %weight.hc_head_fn : f32[4, 128]
  %weight.hc_head_base : f32[4]
  %weight.hc_head_scale : f32[1]
  %weight.head.weight : f32[64, 32]
  %streams.streams : f32[T, 4, 32]
  %input.logit_rows : i64[S]
  %0 = dsv4.take_rows(%streams.streams, %input.logit_rows) : f32[S, 4, 32]  # head
  %1 = dsv4.hc_head(%0, %weight.hc_head_fn, %weight.hc_head_base, %weight.hc_head_scale) {eps=1e-06, norm_eps=1e-06} : f32[S, 32]  # head
  %2 = dsv4.rms_norm(%1, %weight.norm.weight) {eps=1e-06} : f32[S, 32]  # head
  %3 = dsv4.linear(%2, %weight.head.weight) {float32=True} : f32[S, 64]  # head
  return logits=%3
}"""


def raised(program: Program) -> Program:
    return Pipeline(tuple(p for p in RAISE if p.name != "stitch")).run(program)


def test_the_head_is_raised_to_four_ops(captured: Program) -> None:
    text = raised(captured).dump()
    order = [line for line in HEAD.splitlines() if " = " in line]
    assert all(line in text for line in order)


def test_fake_quantisation_is_raised_too() -> None:
    program = raised(capture(SMALL, LAYOUT, fake_quant=True, only=["attention.csa"]))
    assert program.find("dsv4.quantise_kv") and program.find("dsv4.quantise_index")


def _no_clamp(self: moe.Swiglu, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(gate) * up).to(gate.dtype)


def _transposed(
    self: hyper.HyperPost, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    mixed = torch.einsum("tkj,tjd->tkd", comb, x.float())
    return (post.unsqueeze(-1) * y.float().unsqueeze(1) + mixed).to(x.dtype)


def _half_rotation(self: rope.Rope, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    size = table.shape[-1]
    plain, pairs = x.split([x.shape[-1] - size, size], -1)
    cos, sin = table.chunk(2, -1)
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = pairs.float().chunk(2, -1)
    return torch.cat((plain, torch.cat((left * cos - right * sin, right * cos + left * sin), -1)), -1)


@pytest.mark.parametrize(
    ("cls", "forward", "op", "piece"),
    [
        (moe.Swiglu, _no_clamp, "swiglu", "ffn.hash"),
        (hyper.HyperPost, _transposed, "hc_post", "ffn.hash"),
        (rope.Rope, _half_rotation, "rope", "attention.window"),
    ],
)
def test_a_changed_module_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, cls: type, forward: object, op: str, piece: str
) -> None:
    monkeypatch.setattr(cls, "forward", forward)
    with pytest.raises(RaiseError, match=rf"module `.*` \(.*{cls.__name__}\) is not `dsv4.{op}`: step \d+ is"):
        raised(capture(SMALL, LAYOUT, only=[piece]))
