"""DSpark's programs of an artifact for the host: what they ask for, and their plans beside the step's.

step  --hidden: the tap-->  dspark.absorb  --windows-->  dspark.draft  --drafts, confidences-->  the next step
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.artifact import Input
from dsv4c.capturing import dspark_inputs
from dsv4c.config import ModelConfig
from dsv4c.errors import CompileError
from dsv4c.plan import Plan, plan
from dsv4c.program import Program


def block_inputs(config: ModelConfig) -> tuple[Input, ...]:
    """What DSpark's programs ask for besides a step's inputs."""
    kinds = dspark_inputs(config)
    return (
        Input("tap", "hidden", kinds["tap"].shape, dtype="float32"),
        Input("block_rows", "block_rows", kinds["block_rows"].shape),
    )


def block_plans(
    program: Program, target: str, symbols: Mapping[str, int], inputs: tuple[Input, ...]
) -> tuple[Plan, Plan]:
    """`dspark.absorb` for as many tokens as a step, `dspark.draft` for a block of every request.

    `symbols` and `inputs` are the step's. Raises CompileError if the model has no DSpark drafter.
    """
    spark = program.config.dspark
    if spark is None:
        raise CompileError("the model has no DSpark drafter", hint="its config has no `dspark_*` keys")
    inputs = (*inputs, *block_inputs(program.config))
    blocks = {**symbols, "T": symbols["R"] * spark.block_size}
    return (
        plan(program, "dspark.absorb", "dspark.absorb", "draft", target, symbols, inputs),
        plan(program, "dspark.draft", "dspark.draft", "draft", target, blocks, inputs),
    )
