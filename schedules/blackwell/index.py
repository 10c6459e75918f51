"""Index scores on Blackwell, and scores with top-k; queries and top-k over rows are Hopper's for this card.

`tiles` deals tiles of 128 keys out over the card, each for one token: decode, where reading the keys binds; three
blocks a multiprocessor have enough on their way. `runs` keeps a tile of keys and takes the tokens of a request past it,
128 columns of heads a product: prefill. There the matrix unit needs 256 cycles a tile, relu and sums as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._launch import Expr, LaunchArg, TritonLaunch, i32, i64, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Config, OpNode, Schedule, Work
from dsv4c.schedules.hopper import index as hopper
from dsv4c.schedules.hopper.index import (
    PAGE,
    SCORE_ERROR,
    Symbols,
    accepts_scores,
    accepts_topk,
    build_scores,
    build_topk,
    score_work,
    topk_workspace,
    with_select,
)

_KEYS = 128  # of a tile: the rows of the matrix unit
_COLUMNS = 128  # heads of tokens that `runs` multiplies at a time


def _launch(
    node: OpNode, config: Config, sms: int, scores: int, first: Expr, count: Expr, maxima_at: Expr | None, least: int
) -> TritonLaunch:
    data = node.inputs[0]
    assert data is not None
    args: dict[str, LaunchArg] = {
        "data": ptr(0), "weight": ptr(1), "pool": ptr(2), "pages": ptr(3), "requests": ptr(4), "positions": ptr(5),
        "scores": ptr(scores), "columns": i32("a3_1"), "first": i32(first), "count": i32(count),
        "maxima_at": i64(maxima_at or 0),
    }  # fmt: skip
    heads = int(data.shape[1])
    constants = {
        "RATIO": node.attrs["ratio"], "H": heads, "C": int(data.shape[2]), "FP4": node.attrs["format"] == "fp4",
        "LEAST": least, "MAXIMA": maxima_at is not None, "BN": _KEYS, "BT": config["tokens"],
    }  # fmt: skip
    grid: tuple[Expr, Expr, Expr] = (f"min({count}, 1) * {sms * config['blocks']}", 1, 1)
    if config["way"] == "runs":
        constants["TS"] = max(1, _COLUMNS // heads)
        grid = (f"cdiv(a3_1 * {PAGE}, {_KEYS})", f"cdiv({count}, {config['tokens']})", 1)
    return TritonLaunch(
        f"dsv4c.schedules.triton.index_scaled:score_{config['way']}", args, constants, grid=grid,
        num_warps=config["warps"], num_stages=config["stages"], pdl=True,
    )  # fmt: skip


def _tiles_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    # 256 tokens: a decode batch is one deal; three blocks are what the registers of a multiprocessor hold
    return tuple(
        {"way": "tiles", "keys": _KEYS, "tokens": 256, "warps": 4, "stages": stages, "blocks": 3} for stages in (4, 3)
    )


def _runs_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    return tuple(
        {"way": "runs", "keys": _KEYS, "tokens": tokens, "warps": 4, "stages": 3, "blocks": 0} for tokens in (128, 256)
    )


def _tiles_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    moved, flops = score_work(node, symbols, shared=False)
    return Work(moved, flops, "gpu", 0.4, "fp8", launches=2 * config.get("chunks", 1))


def _runs_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    moved, flops = score_work(node, symbols, shared=True)
    # a run of few tokens pays for the loading of its keys: as if it had 32
    few = max(1.0, 32.0 * symbols["R"] / max(1, symbols["T"]))
    return Work(moved, flops * few, "gpu", 0.6, "fp8", launches=2 * config.get("chunks", 1))


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one of Blackwell's architectures."""
    targets, sms, capped = frozenset({arch}), MACHINES[arch].multiprocessors, MACHINES[arch].measured
    ways = (("tiles", _tiles_space, _tiles_cost), ("runs", _runs_space, _runs_cost))
    scores = tuple(
        Schedule(
            f"index_scores.triton_{way}",
            "index_scores",
            targets,
            partial(build_scores, sms=sms, score=_launch),
            cost,
            accepts_scores,
            space=space,
            tolerance=SCORE_ERROR,
        )
        for way, space, cost in ways
    )
    picks = tuple(
        Schedule(
            f"index_topk_packed.triton_{way}",
            "index_topk_packed",
            targets,
            partial(build_topk, sms=sms, score=_launch),
            cost,
            accepts_topk,
            workspace=topk_workspace,
            space=with_select(space, sms, capped),
            tolerance=SCORE_ERROR,
        )
        for way, space, cost in ways
    )
    return (*hopper.schedules(arch), *scores, *picks)
