"""Linear maps on Blackwell: FP8 with block scales as MXFP8, BF16 with float32 sums, and the gates behind such a map.

Few tokens read the weight once at the card's bandwidth: programs share its channels until they fill the card. Many
tokens are bound by the matrix units.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._gpu import SHARED_LIMIT
from dsv4c.schedules._launch import Desc, LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work
from dsv4c.schedules.hopper.gate import gate_accepts, gate_launch, router_product

_KERNELS = "dsv4c.schedules.triton.linear_scaled"
_ROWS = 128  # of a weight tile: what the matrix unit takes, and the lanes of tensor memory
_ADDED = 1024  # elements that one program of the sum over parts takes


def _fp8(node: OpNode) -> bool:
    return node.op.endswith("fp8")


def _sizes(node: OpNode) -> tuple[int, int, int]:
    """Output channels in all, input channels of a group, groups."""
    weight = node.inputs[2 if _fp8(node) else 1]
    assert weight is not None
    return int(weight.shape[0]), int(weight.shape[1]), int(node.attrs.get("groups", 1))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _accepts(node: OpNode) -> str | None:
    n, k, groups = _sizes(node)
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    step = 128 if _fp8(node) else 64
    if k % step:
        return f"{k} input channels are no multiple of {step}"
    if groups > 1 and n // groups % _ROWS:
        return f"{n // groups} output channels of a group are no multiple of {_ROWS}"
    return None


def _layouts(node: OpNode) -> dict[int, Transforms]:
    """Scales as the bytes that the matrix unit takes; one that is no power of two is refused when it is loaded."""
    return {3: (("narrow", "float8_e8m0fnu"),)} if _fp8(node) else {}


def _space(node: OpNode, symbols: Mapping[str, int], *, sms: int) -> tuple[Config, ...]:
    """As many columns as tokens, 16 to 128; parts of the channels while the tiles leave multiprocessors idle.

    `blocks` of 128 channels make a step. Programs that have one tile each share a multiprocessor with another; where
    they take several, roles of warps run across these.
    """
    n, k, _ = _sizes(node)
    tokens = max(1, symbols["T"])
    columns = max(16, min(128, 1 << (tokens - 1).bit_length()))
    tiles = _cdiv(n, _ROWS) * _cdiv(tokens, columns)
    blocks = 2 if _fp8(node) and k % 512 == 0 else 1
    steps = k // (128 * blocks if _fp8(node) else 64)
    fits = [s for s in (1, 2, 4, 8, 16) if steps % s == 0 and (s == 1 or tiles * s <= 2 * sms)]
    out = []
    for parts in dict.fromkeys((fits[-1] if tokens <= 512 else 1, 1)):
        share = 2 if columns < 128 and tiles * parts <= 2 * sms else 1
        out.append({
            "columns": columns, "blocks": blocks, "share": share, "parts": parts,
            "stages": _stages(node, columns, blocks, share), "warps": 8 if columns == 128 else 4,
            # parts are written as float32: with roles across tiles the warps of 128 columns that do so would spill
            "roles": "loop" if share == 2 or parts > 1 or tiles * parts <= sms else "tiles",
        })  # fmt: skip
    return tuple(out)


def _stages(node: OpNode, columns: int, blocks: int, share: int) -> int:
    """Steps in flight: as many as fit in the share of shared memory that a block has, beside what it finishes with."""
    each = (_ROWS + columns) * 128 * blocks + (16 * columns if blocks > 1 else 0)
    room = (SHARED_LIMIT + 1024) // share - 1024 - (20 << 10 if share == 1 else 4 << 10)
    return max(2, min(6, room // each))


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    if config["parts"] == 1:
        return ()
    return (Value((int(config["parts"]), "T", _sizes(node)[0]), "float32"),)


def product(node: OpNode, config: Config, work: int, out: int, *, sms: int, native: bool) -> tuple[TritonLaunch, ...]:
    """The launches of a map that writes argument `out`, with its parts in argument `work`. `native`: with roles."""
    n, k, groups = _sizes(node)
    columns, parts, blocks = int(config["columns"]), int(config["parts"]), int(config["blocks"])
    programs = max(1, sms * int(config["share"]) // parts)
    grid = (f"min({programs}, cdiv(a0_0, {columns}) * {_cdiv(n, _ROWS)})", parts, 1)
    constants = {
        "N": n, "K": k, "S": parts, "BM": _ROWS, "BT": columns, "STAGES": int(config["stages"]),
        "ROLES": config["roles"] if native else "none",
    }  # fmt: skip
    args: dict[str, LaunchArg] = {"out": ptr(work if parts > 1 else out), "tokens": i32("a0_0")}
    width = groups * k
    if _fp8(node):
        scales = width // 128
        args |= {
            "data": Desc(0, ("a0_0", width), (width, 1), (columns, 128 * blocks)),
            "scale": ptr(1) if blocks == 1 else Desc(1, ("a0_0", scales), (scales, 1), (columns, 4)),
            "weight": Desc(2, (n, k), (k, 1), (_ROWS, 128 * blocks)), "weight_scale": ptr(3),
        }  # fmt: skip
        constants |= {"ROWS": n // groups, "B": blocks}
    else:
        args |= {
            "x": Desc(0, ("a0_0", k), (k, 1), (columns, 64)), "weight": Desc(1, (n, k), (k, 1), (_ROWS, 64)),
        }  # fmt: skip
        constants["BK"] = 64
    first = TritonLaunch(
        f"{_KERNELS}:{'scaled' if _fp8(node) else 'mixed'}", args, constants, grid,
        num_warps=int(config["warps"]), num_stages=int(config["stages"]), pdl=True,
        maxnreg=128 if native and config["share"] == 2 else None,  # of 8 warps, so that two blocks fit
    )  # fmt: skip
    if parts == 1:
        return (first,)
    count = f"a0_0 * {n}"
    add = TritonLaunch(
        f"{_KERNELS}:add_parts",
        {"parts": ptr(work), "out": ptr(out), "count": i32(count)},
        {"S": parts, "B": _ADDED},
        (f"cdiv({count}, {_ADDED})", 1, 1),
        pdl=True,
    )
    return first, add


def _build(node: OpNode, config: Config, *, sms: int, native: bool) -> Build:
    inputs = len(node.inputs)
    out = inputs + (config["parts"] > 1)
    return Build("gpu", launches=product(node, config, inputs, out, sms=sms, native=native))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config, *, sms: int) -> Work:
    n, k, _ = _sizes(node)
    tokens, columns, parts = max(1, symbols["T"]), int(config["columns"]), int(config["parts"])
    tiles = _cdiv(tokens, columns)
    moved = float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))
    moved += 8.0 * parts * tokens * n if parts > 1 else 0
    busy = min(1.0, tiles * _cdiv(n, _ROWS) * parts / sms)
    flops = 2.0 * tiles * columns * n * k
    unit = "fp8" if _fp8(node) else "bf16"
    share = 0.7 * busy * min(1.0, columns / 128)
    return Work(moved / 0.85 / busy, flops, "gpu", share, unit, launches=1 + (parts > 1))  # type: ignore[arg-type]


# The gates: the map's sums into a workspace, in parts if it has some, then the gate, which adds the parts


def _gate_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    inner = router_product(node)
    return _workspace(inner, config) or (Value(inner.outputs[0].shape, "float32"),)


def _gate_build(node: OpNode, config: Config, *, sms: int, native: bool) -> Build:
    inputs = len(node.inputs)
    first, *_ = product(router_product(node), config, inputs, inputs, sms=sms, native=native)
    gate = gate_launch(node, 1, inputs, tuple(range(2, inputs)), inputs + 1, int(config["parts"]))
    return Build("gpu", launches=(first, gate))


def _gate_space(node: OpNode, symbols: Mapping[str, int], *, sms: int) -> tuple[Config, ...]:
    return _space(router_product(node), symbols, sms=sms)


def _gate_cost(node: OpNode, symbols: Mapping[str, int], config: Config, *, sms: int) -> Work:
    inner = _cost(router_product(node), symbols, config, sms=sms)
    return Work(inner.bytes_moved, inner.flops, "gpu", inner.efficiency, "bf16", launches=2)


def _gate_accepts(node: OpNode) -> str | None:
    return gate_accepts(node) or _accepts(router_product(node))


# as on Hopper: bfloat16 results may round the other way, float32 sums run in another order
_FP8_TOLERANCE, _MIXED_TOLERANCE, _GATE_TOLERANCE = 8e-3, 2e-5, 1e-4


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one Blackwell architecture, or for `sm_90a`: the same kernels, their products emulated, to check
    numbers on a card."""
    targets, sms = frozenset({arch}), MACHINES[arch].multiprocessors
    native = arch != "sm_90a"
    space, cost = partial(_space, sms=sms), partial(_cost, sms=sms)
    build, gate_build = (partial(make, sms=sms, native=native) for make in (_build, _gate_build))
    maps = {
        "linear_fp8": _FP8_TOLERANCE, "grouped_linear_fp8": _FP8_TOLERANCE, "linear_mixed": _MIXED_TOLERANCE,
    }  # fmt: skip
    return (
        *(
            Schedule(
                f"{op}.triton_scaled" if op.endswith("fp8") else f"{op}.triton_tiles", op, targets, build, cost,
                _accepts, layouts=_layouts, workspace=_workspace, space=space, tolerance=tolerance,
            )
            for op, tolerance in maps.items()
        ),
        *(
            Schedule(
                f"{op}.triton_tiles", op, targets, gate_build, partial(_gate_cost, sms=sms), _gate_accepts,
                workspace=_gate_workspace, space=partial(_gate_space, sms=sms), tolerance=_GATE_TOLERANCE,
            )
            for op in ("gate_linear_bias", "gate_linear_hash")
        ),
    )  # fmt: skip
