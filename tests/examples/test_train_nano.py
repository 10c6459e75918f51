"""The training forward computes the plain model's function: logits, MTP logits, and where selection matters."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from dsv4c.config import preset
from dsv4c.model.state import init_state, make_step
from dsv4c.model.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_nano"))
import whole

SMALL = dataclasses.replace(
    preset("nano"), vocab_size=96, hidden_size=64, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_lora_rank=32, sliding_window=32, compress_ratios=(0, 4, 32, 4, 0), num_hidden_layers=4,
    index_topk=8, n_routed_experts=4, moe_intermediate_size=32,
)  # fmt: skip


def randomised(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(SMALL).float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 or name.endswith("ape"):
                value.add_(torch.randn_like(value) * 0.3)
    return model


def parameters(model: Transformer) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if "tid2eid" in k}}


@pytest.mark.parametrize("length", [32, 128])
def test_whole_sequences_give_the_plain_models_logits(length: int) -> None:
    model = randomised(length)
    ids = torch.randint(SMALL.vocab_size, (2, length + 1))
    state = init_state(SMALL, model.layout, 2, length)
    step = make_step(SMALL, model.layout, [(0, 0, ids[0, :-1]), (1, 0, ids[1, :-1])], length)
    with torch.no_grad():
        streams, after = model.run(step, state)
        expected = model.logits(streams[-1], step["logit_rows"])
        expected_mtp, _ = model.mtp_logits(streams[-1], ids[:, 1:].flatten(), step, after)
        run = whole.Whole(SMALL, length, "cpu", lambda f: f)
        result = run(parameters(model), ids[:, :-1], ids[:, 1:], torch.float32)
        head = model.head.weight
    torch.testing.assert_close(result.main_TD @ head.T, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(result.mtp_TD @ head.T, expected_mtp, atol=2e-4, rtol=1e-4)
    assert [int(load.sum()) for load in result.loads] == [2 * length * SMALL.num_experts_per_tok] * 5


def test_sinkhorn_gradient_is_that_of_the_loop_at_convergence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(50, 16)
    (whole._sinkhorn_loop(logits, 20, 1e-6) * weight).sum().backward()
    expected, logits.grad = logits.grad, None
    (whole.sinkhorn(logits, 20, 1e-6) * weight).sum().backward()
    assert logits.grad is not None and expected is not None
    torch.testing.assert_close(logits.grad, expected, atol=1e-4, rtol=1e-2)


def test_every_parameter_but_the_selection_bias_gets_a_gradient() -> None:
    model = randomised(1)
    ids = torch.randint(SMALL.vocab_size, (2, 129))
    run = whole.Whole(SMALL, 128, "cpu", lambda f: f)
    result = run(parameters(model), ids[:, :-1], ids[:, 1:], torch.float32)
    logits = (result.main_TD + result.mtp_TD) @ model.head.weight.T
    (torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) + result.index_loss).backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if name.endswith("gate.bias")}
