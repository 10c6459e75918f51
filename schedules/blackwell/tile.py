"""TileLang's FP8 linear maps on Blackwell: many tokens, in clusters of two blocks that share one product.

An alternative to linear.py that no card has measured: the cost model is told a rate below Triton's, so that it is taken
by a tuned row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._launch import TileLaunch
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Work

_KERNEL = "dsv4c.schedules.tilelang.linear_scaled:scaled"
_TOKENS, _COLUMNS = 256, 256  # of a cluster's tile
_CONFIG: Config = {"stages": 6, "slots": 2}  # tiles and panels of scales in flight: 211 KB of shared memory
_SHARE = 0.35  # of the stated rate, half of what linear.py is credited with: not measured


def _sizes(node: OpNode) -> tuple[int, int]:
    """Output and input channels."""
    weight = node.inputs[2]
    assert weight is not None
    return int(weight.shape[0]), int(weight.shape[1])


def _accepts(node: OpNode) -> str | None:
    n, k = _sizes(node)
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    if n % _COLUMNS or k % 512:
        return f"{n} x {k} is no multiple of {_COLUMNS} x 512"
    return None


def _layouts(node: OpNode) -> dict[int, Transforms]:
    return {3: (("narrow", "float8_e8m0fnu"),)}  # linear.py's


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    return (_CONFIG,)


def _build(node: OpNode, config: Config, *, pairs: int) -> Build:
    n, k = _sizes(node)
    beside = next(g for g in (8, 4, 2, 1) if n // _COLUMNS % g == 0)
    constants = {"N": n, "K": k, "CLUSTERS": pairs, "G": beside, **config}
    launch = TileLaunch(_KERNEL, (0, 1, 2, 3, 4), constants, (2 * pairs, 1, 1), 256, {"M": "a0_0"})
    return Build("gpu", launches=(launch,))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config, *, pairs: int) -> Work:
    n, k = _sizes(node)
    tiles = -(-max(1, symbols["T"]) // _TOKENS) * (n // _COLUMNS)
    busy = min(1.0, tiles / pairs)
    moved = float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))
    return Work(moved / 0.8 / busy, 2.0 * tiles * _TOKENS * _COLUMNS * k, "gpu", _SHARE * busy, "fp8")


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one Blackwell architecture."""
    pairs = MACHINES[arch].multiprocessors // 2
    return (
        Schedule(
            "linear_fp8.tilelang_pairs", "linear_fp8", frozenset({arch}), partial(_build, pairs=pairs),
            partial(_cost, pairs=pairs), _accepts, layouts=_layouts, space=_space, tolerance=8e-3,
        ),
    )  # fmt: skip
