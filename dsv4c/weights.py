"""The weight map: from checkpoint tensors to the tensors a program's kernels read, as data.

A model parameter comes from one checkpoint tensor, or (routed experts) from one tensor an expert, stacked. A weight
that a pass concatenated comes from the rows of several. What a schedule wants besides is appended as it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.artifact import Plain, Weight
from dsv4c.checkpoint.names import inventory, nvfp4_name, parameter_sources, scale_name
from dsv4c.config import ModelConfig
from dsv4c.ops import TensorType
from dsv4c.program import Program, Stored

Transforms = tuple[tuple[Any, ...], ...]


def stored_formats(config: ModelConfig) -> dict[str, str]:
    """Model parameter -> the format in which a checkpoint usually stores it (`fp8`, `fp4`, `nvfp4`, `bf16`, ...)."""
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
    stored = program.stored.get(value)
    whole = stored.of if stored is not None else value
    parts = program.weight_sources.get(whole, (whole,))
    tensors = tuple(tensor for part in parts for tensor in sources[part])
    kind = program.weight_types[value]
    if stored is not None and stored.part != "data":
        tensors = tuple(scale_name(t) if stored.part == "scale" else nvfp4_name(t, stored.part) for t in tensors)
    if stored is not None and stored.part in _SCALARS:
        joined = _scalars(stored, kind, len(tensors))
    else:
        joined = (*_joining(parts, tensors), *_typing(program, value))
    transforms = (*_reading(program, value), *joined)
    plain = Plain(tuple(int(size) for size in kind.shape), kind.dtype, len(transforms)) if layout else None
    return Weight(name, shape, dtype, tensors, (*transforms, *layout), plain)


_SCALARS = ("weight_scale_2", "input_scale")
_LEAST = {"weight_scale": 0.0, "weight_scale_2": 0.0, "input_scale": 2.0**-126}
"""NVFP4's scales are not negative; `input_scale` is divided by, so it is not 0 either."""


def _scalars(stored: Stored, kind: TensorType, count: int) -> Transforms:
    """One number a matrix; or the largest of them, where one operand is multiplied with all of these matrices."""
    largest = (("largest",),) if kind.shape == (1,) and count > 1 else ()
    return (("stack",), ("cast", "float32"), ("at_least", _LEAST[stored.part]), *largest)


def _reading(program: Program, value: str) -> Transforms:
    if value in program.stored:
        return (("stored",),)
    return () if program.weight_types[value].dtype == "int64" else (("dequantise",),)


def _joining(parts: tuple[str, ...], tensors: tuple[str, ...]) -> Transforms:
    if len(parts) > 1:
        return (("concat", 0),)
    return (("stack",),) if len(tensors) > 1 else ()


def _typing(program: Program, value: str) -> Transforms:
    """What makes the bytes of a checkpoint the dtype that the program says; no value changes."""
    kind = program.weight_types[value].dtype
    if value in program.stored:
        least = (("at_least", _LEAST["weight_scale"]),) if program.stored[value].part == "weight_scale" else ()
        return (("cast", "float32"),) if kind == "float32" else (("view", kind), *least)
    return (("narrow", kind),) if kind == "bfloat16" else ()


def constant(program: Program, value: str, layout: Transforms) -> Weight:
    """The artifact's entry for a constant of the model: its values stand in the manifest."""
    tensor = program.constants[value]
    transforms = (("values", [float(v) for v in tensor.flatten()]), ("reshape", list(tensor.shape)))
    plain = Plain(tuple(tensor.shape), "float32", len(transforms)) if layout else None
    return Weight(value, tuple(tensor.shape), "float32", (), (*transforms, *layout), plain)
