"""Three random configs with every kind of sublayer, small, captured once each."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest

from dsv4c.capturing import capture
from dsv4c.config import ModelConfig
from dsv4c.pipeline import Pipeline, Step
from dsv4c.program import Program

SEEDS = (1, 2, 3)
"""Of the random configs."""
ARCHS = ("cpu", "sm_90a")
Captured = Callable[[int], Program]
Steps = Callable[[int, str], tuple[Step, ...]]


def random_config(seed: int) -> ModelConfig:
    """A small model that every target's schedules and passes accept: FP8 rows need multiples of 128 channels."""
    draw = random.Random(seed)
    ratios = [0, 4, 16]
    layers = draw.sample(ratios, 3)
    heads, groups = draw.choice((2, 4)), draw.choice((1, 2))
    return ModelConfig(
        vocab_size=draw.randint(40, 120),
        hidden_size=128,
        num_hidden_layers=len(layers),
        num_attention_heads=heads * groups,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=128,
        o_groups=groups,
        o_lora_rank=128,
        sliding_window=draw.choice((8, 12, 20)),
        compress_ratios=(*layers, 0),
        index_n_heads=draw.choice((4, 8)),
        index_head_dim=draw.choice((16, 32)),
        index_topk=draw.choice((2, 4)),
        n_routed_experts=draw.randint(3, 8),
        num_experts_per_tok=draw.randint(1, 3),
        moe_intermediate_size=128,
        num_hash_layers=draw.randint(0, 1),
        routed_scaling_factor=draw.choice((1.0, 1.5, 2.5)),
        hc_mult=draw.choice((2, 4)),
        hc_sinkhorn_iters=draw.choice((2, 5)),
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def captured_config() -> Captured:
    """seed -> the captured program of that random config."""
    return functools.cache(lambda seed: capture(random_config(seed)))


@pytest.fixture(scope="session")
def steps_of(captured_config: Captured) -> Steps:
    """(seed, target) -> the passes of its default pipeline that change that config's program."""
    return functools.cache(lambda seed, arch: tuple(changing(Pipeline.default(arch), captured_config(seed))))


def changing(pipeline: Pipeline, program: Program) -> list[Step]:
    return [step for step in pipeline.steps(program) if step.changed]
