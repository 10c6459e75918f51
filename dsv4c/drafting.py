"""DSpark's programs of an artifact for the host: what they ask for, and their plans beside the step's.

step  --hidden: the tap-->  dspark.absorb  --windows-->  dspark.draft  --drafts, confidences-->  the next step
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.artifact import Drafter, Input
from dsv4c.capturing import dspark_inputs
from dsv4c.config import DSpark, ModelConfig
from dsv4c.errors import CompileError, ConfigError
from dsv4c.plan import Plan, plan
from dsv4c.program import Program


def block_inputs(config: ModelConfig) -> tuple[Input, ...]:
    """What DSpark's programs ask for besides a step's inputs."""
    kinds = dspark_inputs(config)
    return (
        Input("tap", "hidden", kinds["tap"].shape, dtype="float32"),
        Input("block_rows", "block_rows", kinds["block_rows"].shape),
    )


def block_drafter(config: ModelConfig, max_tokens: int) -> Drafter:
    """What the manifest says of a DSpark drafter of which a step verifies at most `max_tokens` drafts.

    Raises ConfigError for more than a block.
    """
    spark = _spark(config)
    if max_tokens > spark.block_size:
        raise ConfigError(
            f"`--speculative-tokens` is {max_tokens}, DSpark drafts {spark.block_size} at once",
            hint=f"it can be 0 to {spark.block_size}",
        )
    return Drafter("dspark", max_tokens, spark.block_size, spark.noise_token_id)


def block_plans(
    program: Program, target: str, symbols: Mapping[str, int], inputs: tuple[Input, ...]
) -> tuple[Plan, Plan]:
    """`dspark.absorb` for as many tokens as a step, `dspark.draft` for a block of every request.

    `symbols` and `inputs` are the step's. Raises CompileError if the model has no DSpark drafter.
    """
    spark = _spark(program.config)
    inputs = (*inputs, *block_inputs(program.config))
    blocks = {**symbols, "T": symbols["R"] * spark.block_size}
    return (
        plan(program, "dspark.absorb", "dspark.absorb", "draft", target, symbols, inputs),
        plan(program, "dspark.draft", "dspark.draft", "draft", target, blocks, inputs),
    )


def _spark(config: ModelConfig) -> DSpark:
    if config.dspark is None:
        raise CompileError("the model has no DSpark drafter", hint="its config has no `dspark_*` keys")
    return config.dspark
