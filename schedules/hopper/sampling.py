"""Sampling on Hopper: a cluster of blocks cuts each row's tail in registers, one block a row draws from what is left.

A row is read once; the search costs rounds of counting registers and meeting in the cluster, about a microsecond each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

HOPPER = frozenset({"sm_90a"})
SEGMENT = 128  # tokens of one partial sum: one load of a warp, 4 floats a lane
_PER_THREAD = 64  # most weights of a thread: beyond it registers spill
_KERNELS = "dsv4c.schedules.triton.sampling"
_PENALTIES = ("slots", "counts", "repetition", "frequency", "presence")


def _vocab(node: OpNode) -> int:
    logits = node.inputs[0]
    assert logits is not None
    return int(logits.shape[1])


def _segments(vocab: int) -> int:
    """Segments that cover the vocabulary: a power of two."""
    return 1 << max(0, -(-vocab // SEGMENT) - 1).bit_length()


def _fits(vocab: int, config: Config) -> bool:
    threads = 32 * config["ctas"] * config["warps"]
    return SEGMENT * _segments(vocab) <= _PER_THREAD * threads and config["ctas"] * config["warps"] <= _segments(vocab)


_CONFIGS: tuple[dict[str, int], ...] = tuple(
    {"ctas": ctas, "warps": warps} for ctas, warps in ((8, 16), (8, 8), (4, 16), (2, 8), (1, 8), (1, 4), (1, 1))
)


def _accepts(node: OpNode) -> str | None:
    logits = node.inputs[0]
    assert logits is not None
    if logits.strides is not None:
        return "logits are strided"
    if not any(_fits(_vocab(node), config) for config in _CONFIGS):
        return f"{_vocab(node)} logits of a row do not fit a cluster's registers"
    return None


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    return tuple(config for config in _CONFIGS if _fits(_vocab(node), config))[:3]


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """Best and cut of each row, and the kept weight of each segment."""
    return Value(("S",), "float32"), Value(("S",), "float32"), Value(("S", _segments(_vocab(node))), "float32")


def _build(node: OpNode, config: Config) -> Build:
    vocab, inputs = _vocab(node), len(node.inputs)
    best, cut, sums, out = (ptr(inputs + i) for i in range(4))
    common: dict[str, LaunchArg] = {"logits": ptr(0), "temperature": ptr(1), "min_p": ptr(4)}
    constants: dict[str, Any] = {
        "V": vocab, "G": _segments(vocab), "W": SEGMENT, "PENALISED": node.op == "sample_penalised",
    }  # fmt: skip
    if constants["PENALISED"]:
        common |= {name: ptr(7 + i) for i, name in enumerate(_PENALTIES)}
    else:
        constants |= dict.fromkeys(_PENALTIES)
    cutting = TritonLaunch(
        f"{_KERNELS}:cut_rows",
        {**common, "top_k": ptr(2), "top_p": ptr(3), "best_out": best, "cut_out": cut, "sums_out": sums},
        constants,
        ("a0_0", 1, 1),
        num_warps=config["warps"],
        num_ctas=config["ctas"],
    )
    drawing = TritonLaunch(
        f"{_KERNELS}:draw_rows",
        {**common, "keys": ptr(5), "counters": ptr(6), "bests": best, "cuts": cut, "sums": sums, "out": out},
        constants,
        ("a0_0", 1, 1),
        num_warps=4,
    )
    return Build("gpu", launches=(cutting, drawing))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """One pass over the logits, and about 20 rounds of 4 operations on each weight."""
    rows, vocab = symbols["S"], _vocab(node)
    penalised = node.op == "sample_penalised"
    moved = rows * vocab * (6.0 if penalised else 4.0)
    return Work(moved, 80.0 * rows * vocab, "gpu", 0.5, launches=2)


def _edit_build(node: OpNode, config: Config) -> Build:
    args = {"logits": ptr(0), "starts": ptr(1), "tokens": ptr(2), "values": ptr(3)}
    # 128 edits of a row at a time: most rows have none, few have more than the 300 of an OpenAI request
    launch = TritonLaunch(f"{_KERNELS}:edit_rows", args, {"V": _vocab(node), "BLOCK": 128}, ("a0_0", 1, 1), num_warps=4)
    return Build("gpu", launches=(launch,))


def _edit_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(20.0 * symbols.get("M", 0), 0.0, "gpu")


# how far outside its interval of the distribution a draw may fall: float32 weights and sums of a row
_TOLERANCE = 1e-5

SCHEDULES = (
    *(
        Schedule(
            f"{op}.triton_cut", op, HOPPER, _build, _cost, _accepts,
            workspace=_workspace, space=_space, tolerance=_TOLERANCE,
        )
        for op in ("sample", "sample_penalised")
    ),
    Schedule("edit_logits.triton_rows", "edit_logits", HOPPER, _edit_build, _edit_cost, tolerance=0.0),
)  # fmt: skip
