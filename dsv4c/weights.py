"""The weight map: from checkpoint tensors to the tensors a program's kernels read, as data.

A model parameter comes from one checkpoint tensor, or (routed experts) from one tensor an expert, stacked. A weight
that a pass concatenated comes from the rows of several. What a schedule wants besides is appended as it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.artifact import Weight
from dsv4c.checkpoint.names import inventory, parameter_sources
from dsv4c.config import ModelConfig
from dsv4c.ops import TensorType
from dsv4c.program import Program

Transforms = tuple[tuple[Any, ...], ...]


def stored_formats(config: ModelConfig) -> dict[str, str]:
    """Model parameter -> the format in which a checkpoint usually stores it (`fp8`, `fp4`, `bf16`, `f32`, `i64`)."""
    kinds = {name: spec.kind for name, spec in inventory(config).items()}
    return {name: kinds[sources[0]] for name, sources in parameter_sources(config).items()}


def weight(
    program: Program,
    sources: Mapping[str, tuple[str, ...]],
    value: str,
    name: str,
    layout: Transforms,
    shape: tuple[int, ...],
    dtype: str,
) -> Weight:
    """The artifact's entry for the program's weight `value`, laid out by `layout` under `name`.

    `sources` is `parameter_sources(program.config)`.
    """
    parts = program.weight_sources.get(value, (value,))
    kind: TensorType = program.weight_types[value]
    if len(parts) > 1:
        tensors = tuple(tensor for part in parts for tensor in sources[part])
        transforms: Transforms = (("dequantise",), ("concat", 0))
    elif kind.dtype == "int64":
        tensors, transforms = sources[value], ()
    elif len(sources[value]) > 1:
        tensors, transforms = sources[value], (("dequantise",), ("stack",))
    else:
        tensors, transforms = sources[value], (("dequantise",),)
    return Weight(name, shape, dtype, tensors, (*transforms, *layout))


def constant(program: Program, value: str, layout: Transforms) -> Weight:
    """The artifact's entry for a constant of the model: its values stand in the manifest."""
    tensor = program.constants[value]
    values = ("values", [float(v) for v in tensor.flatten()])
    return Weight(value, tuple(tensor.shape), "float32", (), (values, ("reshape", list(tensor.shape)), *layout))
