"""Sampling on Hopper: four small kernels a batch, whatever its rows ask for.

The logits are read twice at the card's bandwidth, by chunks of a row, and never sorted; what a row's filters need is
decided on lists of candidates in one block's registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

CHUNK = 4096  # tokens of one program: 32 a thread, and 32 programs a row of 129280
BINS = 128  # of a quarter nat each
LISTED = 1024  # of a chunk's tokens: 32 chunks make 64 candidates a thread of the drawing block
_KERNELS = "dsv4c.schedules.triton.sampling"
_PENALTIES = ("slots", "counts", "repetition", "frequency", "presence")
_MASKS = ("mask_rows", "masks")
_DRAFTS = ("chain", "drafted")
_PENALISED = {"sample": 0, "sample_penalised": 1, "sample_drafted": 2}
"""Op -> what the kernels call PENALISED: none, COUNTED, DRAFTED."""
_FILTERS = ("top_k", "top_p", "min_p")


def _vocab(node: OpNode) -> int:
    logits = node.inputs[0]
    assert logits is not None
    return int(logits.shape[1])


def _chunks(node: OpNode) -> int:
    return -(-_vocab(node) // CHUNK)


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _accepts(node: OpNode) -> str | None:
    logits = node.inputs[0]
    assert logits is not None
    if logits.strides is not None:
        return "logits are strided"
    return f"{_vocab(node)} logits of a row are more than 64 chunks" if _chunks(node) > 64 else None


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Warps of the scanning and of the drawing blocks."""
    return ({"scan": 8, "draw": 16}, {"scan": 4, "draw": 16})


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """Of chunks: bests, sums, bins; of rows: best, total, bound, mode; of chunks: listed logits, their ids, numbers,
    the time of the first arrival, and which token that is."""
    chunks = _chunks(node)
    return (
        Value(("T", chunks), "float32"), Value(("T", chunks), "float32"), Value(("T", chunks, BINS), "int32"),
        Value(("T",), "float32"), Value(("T",), "float32"), Value(("T",), "float32"), Value(("T",), "int32"),
        Value(("T", chunks, LISTED), "float32"), Value(("T", chunks, LISTED), "int32"), Value(("T", chunks), "int32"),
        Value(("T", chunks), "float32"), Value(("T", chunks), "int32"),
    )  # fmt: skip


def _build(node: OpNode, config: Config) -> Build:
    vocab, chunks, inputs = _vocab(node), _chunks(node), len(node.inputs)
    (bests, sums, bins, best, total, bound, mode, listed, places, numbers, times, firsts, out) = (
        ptr(inputs + i) for i in range(13)
    )
    constants: dict[str, Any] = {"V": vocab, "C": chunks, "W": CHUNK, "PENALISED": _PENALISED[node.op]}
    rows: dict[str, LaunchArg] = {"logits": ptr(0)}
    for i, name in enumerate((*_PENALTIES, *_MASKS, *_DRAFTS), 7):
        if i < inputs:
            rows[name] = ptr(i)
        else:
            constants[name] = None
    asked: dict[str, LaunchArg] = {"temperature": ptr(1), **{name: ptr(2 + i) for i, name in enumerate(_FILTERS)}}
    noise: dict[str, LaunchArg] = {"keys": ptr(5), "counters": ptr(6)}
    padded = {"PC": _power(chunks)}
    scan = TritonLaunch(
        f"{_KERNELS}:scan_rows",
        {**rows, **asked, **noise, "bests": bests, "sums": sums, "bins": bins, "times": times, "firsts": firsts},
        {**constants, "B": BINS},
        ("a0_0", chunks, 1),
        num_warps=config["scan"],
        pdl=True,
    )
    limit = TritonLaunch(
        f"{_KERNELS}:bound_rows",
        {
            **asked, "bests": bests, "sums": sums, "bins": bins, "best_out": best, "total_out": total,
            "bound_out": bound, "mode_out": mode,
        },
        {"V": vocab, "C": chunks, "B": BINS, **padded},
        ("a0_0", 1, 1),
        num_warps=4,
        pdl=True,
    )  # fmt: skip
    pick = TritonLaunch(
        f"{_KERNELS}:list_rows",
        {**rows, "bounds": bound, "modes": mode, "listed": listed, "places": places, "numbers": numbers},
        {**constants, "L": LISTED},
        ("a0_0", chunks, 1),
        num_warps=config["scan"],
        pdl=True,
    )
    draw = TritonLaunch(
        f"{_KERNELS}:draw_rows",
        {
            **rows, **asked, **noise, "bests": bests, "times": times, "firsts": firsts, "best_in": best,
            "total_in": total, "modes": mode, "listed": listed, "places": places, "numbers": numbers, "out": out,
        },
        {**constants, "L": LISTED, **padded},
        ("a0_0", 1, 1),
        num_warps=config["draw"],
        pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(scan, limit, pick, draw))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Two passes over the logits (and counts)."""
    rows, vocab = symbols["T"], _vocab(node)
    moved = 2.0 * rows * vocab * (6 if _PENALISED[node.op] else 4)
    return Work(moved, 0.0, "gpu", launches=4)


def _edit_build(node: OpNode, config: Config) -> Build:
    names = ("logits", "starts", "stops", "tokens", "values", "replaced")
    args = {name: ptr(i) for i, name in enumerate(names)}
    # 128 edits of a row at a time: most rows have none, few have more than the 300 of an OpenAI request
    launch = TritonLaunch(
        f"{_KERNELS}:edit_rows", args, {"V": _vocab(node), "BLOCK": 128}, ("a0_0", 1, 1), num_warps=4, pdl=True
    )
    return Build("gpu", launches=(launch,))


def _feed_build(node: OpNode, config: Config) -> Build:
    """Tokens of a step to their seats, or back: a few kilobytes."""
    feeds = node.op == "feed_tokens"
    names = ("token_ids", "last_tokens", "seats", "out") if feeds else ("last_tokens", "seats", "tokens")
    count = "a0_0" if feeds else "a1_0"
    args: dict[str, LaunchArg] = {name: ptr(i) for i, name in enumerate(names)}
    args["count"] = i32(count)
    launch = TritonLaunch(
        f"{_KERNELS}:{'feed' if feeds else 'keep'}",
        args,
        {"N": 128},
        (f"cdiv({count}, 128)", 1, 1),
        num_warps=4,
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


def _edit_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(20.0 * symbols.get("M", 0), 0.0, "gpu")


def _feed_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(32.0 * symbols["T"], 0.0, "gpu")


# nats by which a drawn token may arrive later than the first: float32 weights and noise
_TOLERANCE = 1e-5


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: plain Triton."""
    targets = frozenset({arch})
    return (
        *(
            Schedule(
                f"{op}.triton_lists",
                op,
                targets,
                _build,
                _cost,
                _accepts,
                workspace=_workspace,
                space=_space,
                tolerance=_TOLERANCE,
            )
            for op in _PENALISED
        ),
        Schedule("edit_logits.triton_rows", "edit_logits", targets, _edit_build, _edit_cost, tolerance=0.0),
        *(
            Schedule(f"{op}.triton_rows", op, targets, _feed_build, _feed_cost, tolerance=0.0)
            for op in ("feed_tokens", "keep_tokens")
        ),
    )


SCHEDULES = schedules("sm_90a")
