"""What a logical op is: a name, a reference, which outputs live in which inputs, and the work it does.

An `Op` is callable (its reference runs), so a graph of ops can be interpreted as it stands. Positional parameters
of the reference are tensors, keyword-only ones are attributes. Shapes are `TensorType`s whose sizes are ints or
symbols (`"T"`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Size = int | str


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype (`float32`, `int64`, ...) of a value; a str size is a symbol or an expression of symbols."""

    shape: tuple[Size, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{_SHORT.get(self.dtype, self.dtype)}[{', '.join(map(str, self.shape))}]"

    def numel(self, symbols: Mapping[str, int]) -> int:
        """Elements, with each symbol at the given size."""
        total = 1
        for size in self.shape:
            total *= size if isinstance(size, int) else symbols[size]
        return total

    def bytes(self, symbols: Mapping[str, int]) -> int:
        """Dense bytes, with each symbol at the given size."""
        return self.numel(symbols) * DTYPE_BYTES[self.dtype]


_SHORT = {"float32": "f32", "bfloat16": "bf16", "int64": "i64", "bool": "b8"}
LONG = {short: dtype for dtype, short in _SHORT.items()}
"""How dtypes are printed -> their names."""
DTYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Index:
    """Integers that index something: at least `low`, and below the product of sizes `dims` of the parameter `of`.

    `times`: an attribute that this product is multiplied by (`entries_per_page`, where pages are counted).
    """

    of: str
    dims: tuple[int, ...] = (0,)
    low: int = 0
    times: str | None = None


Work = Callable[[Sequence[TensorType], Mapping[str, Any], Mapping[str, int]], int]


@dataclass(frozen=True)
class Op:
    """A logical op of the dialect.

    `in_place` maps an output index to the tensor parameter it may overwrite (pools and rings). `flops` counts
    multiply-adds twice, from the input types, the attributes and the size of every symbol; None means that bytes
    are all that matters. `indices` says which parameters (by name) and outputs (by number) are indices, and of what.
    `module`: what the model's module computes, where the op is defined for more than it is ever given there.
    """

    name: str
    reference: Callable[..., Any]
    outputs: int = 1
    in_place: Mapping[int, str] = field(default_factory=dict)
    flops: Work | None = None
    indices: Mapping[str | int, Index] = field(default_factory=dict)
    module: Callable[..., Any] | None = None

    @property
    def __name__(self) -> str:
        return f"dsv4.{self.name}"

    def __call__(self, *args: Any, **attrs: Any) -> Any:
        return self.reference(*args, **attrs)

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensor parameters, in order."""
        return tuple(
            p.name for p in inspect.signature(self.reference).parameters.values() if p.kind is not p.KEYWORD_ONLY
        )

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes, in order."""
        return tuple(p.name for p in inspect.signature(self.reference).parameters.values() if p.kind is p.KEYWORD_ONLY)
