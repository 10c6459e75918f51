"""Verifying and keeping drafts: kernels of a few kilobytes, bound by their launch.

One thread a token, row or request, 128 to a block: more blocks than one only where steps are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Work

_KERNELS = "dsv4c.schedules.triton.speculation"
_THREADS = 128
_CHANNELS = 1024  # 8 a thread: 16 bytes

_PARAMETERS: Mapping[str, tuple[int, str]] = {
    "feed_drafts": (0, "token_ids positions seats pending length out_ids out_positions"),
    "feed_spans": (0, "starts ends length out_starts out_ends"),
    "feed_ends": (0, "ends positions seats starts stops out"),
    "row_facts": (2, "token_ids positions rows shifts drafted counters"),
    "accept_drafts": (
        5,
        "tokens drafted rows positions counters starts limits seats penalty_seats pending length counts accepted "
        "out_rows next_positions next_counters",
    ),
    "place_tokens": (1, "next_ids rows seats tokens"),
    "advance_rows": (0, "positions counters out_positions out_counters"),
    "keep_draft": (1, "pending seats drafts"),
}
"""Op -> the argument whose length is the number of threads, and its kernel's pointers in the order of arguments."""


def _constants(node: OpNode) -> dict[str, Any]:
    def columns(index: int) -> int:
        value = node.inputs[index]
        assert value is not None
        return int(value.shape[1])

    if node.op == "feed_drafts":
        return {"K1": columns(3)}
    if node.op == "feed_ends":
        return {"RATIO": node.attrs["ratio"]}
    if node.op == "accept_drafts":
        return {"K1": columns(9), "V": columns(11), "END": node.attrs["end"]}
    if node.op == "advance_rows":
        return {"BY": node.attrs["by"], "END": node.attrs["end"]}
    return {"K1": columns(0), "AT": node.attrs["at"]} if node.op == "keep_draft" else {}


def _build(node: OpNode, config: Config) -> Build:
    counted, names = _PARAMETERS[node.op]
    count = f"a{counted}_0"
    args: dict[str, LaunchArg] = {name: ptr(i) for i, name in enumerate(names.split())}
    args["count"] = i32(count)
    launch = TritonLaunch(
        f"{_KERNELS}:{node.op}",
        args,
        {**_constants(node), "N": _THREADS},
        (f"cdiv({count}, {_THREADS})", 1, 1),
        num_warps=4,
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    value = node.inputs[_PARAMETERS[node.op][0]]
    assert value is not None
    size = value.shape[0]
    rows = symbols[size] if isinstance(size, str) else size
    return Work(8.0 * rows * len(_PARAMETERS[node.op][1].split()), 0.0, "gpu")


# add_embedding: the MTP block's input, two reads and a write of the streams


def _add_accepts(node: OpNode) -> str | None:
    for value in (*node.inputs, *node.outputs):
        assert value is not None
        if value.dtype != "bfloat16" or value.strides is not None:
            return "streams that are strided, or not bfloat16"
    return None


def _add_build(node: OpNode, config: Config) -> Build:
    streams = node.inputs[1]
    assert streams is not None
    count, channels = int(streams.shape[1]), int(streams.shape[2])
    launch = TritonLaunch(
        f"{_KERNELS}:add_embedding",
        {"embedding": ptr(0), "streams": ptr(1), "out": ptr(2)},
        {"D": channels, "N": count, "BLOCK": _CHANNELS},
        ("a0_0", -(-channels // _CHANNELS), 1),
        num_warps=4,
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


def _add_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    streams = node.inputs[1]
    assert streams is not None
    channels = int(streams.shape[2])
    return Work(2.0 * symbols["T"] * channels * (1 + 2 * int(streams.shape[1])), 0.0, "gpu")


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: plain Triton."""
    targets = frozenset({arch})
    return (
        *(Schedule(f"{op}.triton_rows", op, targets, _build, _cost, tolerance=0.0) for op in _PARAMETERS),
        Schedule(
            "add_embedding.triton_rows", "add_embedding", targets, _add_build, _add_cost, _add_accepts, tolerance=0.0
        ),
    )


SCHEDULES = schedules("sm_90a")
