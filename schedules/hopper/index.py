"""The lightning indexer on Hopper: queries, scores over paged keys, exact top-k, and scores and top-k as one call.

Three ways to score. `pages` deals pages of keys out over the card, each for one token: decode, where reading the keys
binds. `keys` holds keys in registers and streams the tokens of a request past them: prefill, where products bind.
`tokens` is `pages` for other numbers of heads and channels than the published models have.

The whole op keeps its scores in a workspace of T / chunks rows and goes through the batch in `chunks` pieces, and one
more for the rows that are left over, so any batch runs with any config and the config only bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dsv4c.ops.formats import index_sizes
from dsv4c.schedules._launch import Desc, Expr, LaunchArg, TritonLaunch, i32, i64, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

HOPPER = frozenset({"sm_90a"})
PAGE = 64  # keys of an index page, as StateLayout has it and the kernels assume
GROUP = 16  # entries whose maximum the scores leave for top-k
ROW = PAGE + PAGE // GROUP  # floats of scores and maxima for a page of a row
SCORE_BYTES = 512 << 20  # that a workspace of scores may take
_CHUNKS = (1, 2, 4, 8, 16, 32, 64)

Symbols = Mapping[str, int]


def _value(node: OpNode, index: int) -> Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _row_stride(value: Value) -> int:
    return value.strides[0] if value.strides else int(value.shape[1])


# --- queries


def _accepts_query(node: OpNode) -> str | None:
    q, table, weight = (_value(node, i) for i in range(3))
    heads = node.attrs["num_heads"]
    dim = int(q.shape[1]) // heads
    if q.dtype != "bfloat16" or weight.dtype not in ("bfloat16", "float32") or table.dtype != "float32":
        return f"needs a bfloat16 query, not {q.dtype}"
    if dim not in (32, 64, 128) or 64 % heads:
        return f"needs 32, 64 or 128 channels and a number of heads that divides 64, not {dim} and {heads}"
    if any(v.strides and v.strides[1] != 1 for v in (q, weight)) or _row_stride(q) % 8:
        return "needs rows of 16-byte steps"
    return None


def _build_query(node: OpNode, config: Config, *, sms: int) -> Build:
    q, table, weight = (_value(node, i) for i in range(3))
    heads = node.attrs["num_heads"]
    launch = TritonLaunch(
        "dsv4c.schedules.triton.index:index_query",
        args={
            "q": ptr(0), "table": ptr(1), "weight": ptr(2), "data": ptr(3), "scaled": ptr(4),
            "rows": i32(f"a0_0 * {heads}", heads),
        },
        constants={
            "Q_STRIDE": _row_stride(q), "W_STRIDE": _row_stride(weight), "H": heads, "C": int(q.shape[1]) // heads,
            "R": int(table.shape[1]), "FP4": node.attrs["format"] == "fp4", "BM": 64,
        },
        grid=(f"min(cdiv(a0_0 * {heads}, 64), {sms * config['blocks']})", 1, 1),
        num_warps=config["warps"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _query_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    return tuple({"warps": warps, "blocks": blocks} for warps in (4, 8) for blocks in (2, 4))


def _query_cost(node: OpNode, symbols: Symbols, config: Config) -> Work:
    q = _value(node, 0)
    tokens, width = symbols["T"], int(q.shape[1])
    dim = width // node.attrs["num_heads"]
    return Work(3.0 * tokens * width, 2.0 * tokens * width * dim, "gpu", 0.5, "bf16")


# --- scores


def accepts_scores(node: OpNode) -> str | None:
    data, weight, pool, pages = (_value(node, i) for i in range(4))
    heads, dim = int(data.shape[1]), int(data.shape[2])
    if data.dtype != "uint8" or pool.dtype != "uint8" or weight.dtype != "float32" or pages.dtype != "int64":
        return "needs E4M3 bytes, float32 weights and a packed pool"
    if node.attrs["entries_per_page"] != PAGE:
        return f"needs pages of {PAGE} keys, not {node.attrs['entries_per_page']}"
    if int(pool.shape[1]) != sum(index_sizes(dim, node.attrs["format"])):
        return f"the pool holds no {node.attrs['format']} keys of {dim} channels"
    if heads not in (16, 32, 64) or dim not in (32, 64, 128):
        return f"needs 16, 32 or 64 heads of 32, 64 or 128 channels, not {heads} of {dim}"
    if any(v.strides for v in (data, weight, pool)):
        return "needs dense queries, weights and pool"
    return None


def _accepts_gluon(node: OpNode) -> str | None:
    data = _value(node, 0)
    if tuple(data.shape[1:]) != (64, 128):
        return f"needs 64 heads of 128 channels, not {data.shape[1]} of {data.shape[2]}"
    return accepts_scores(node)


def _tokens_launch(
    node: OpNode, config: Config, sms: int, scores: int, first: Expr, count: Expr, maxima_at: Expr | None, least: int
) -> TritonLaunch:
    data = _value(node, 0)
    args: dict[str, LaunchArg] = {
        "data": ptr(0), "weight": ptr(1), "pool": ptr(2), "pages": ptr(3), "requests": ptr(4), "positions": ptr(5),
        "scores": ptr(scores), "columns": i32("a3_1"), "first": i32(first), "count": i32(count),
        "maxima_at": i64(maxima_at or 0),
    }  # fmt: skip
    constants = {
        "RATIO": node.attrs["ratio"], "H": int(data.shape[1]), "C": int(data.shape[2]),
        "FP4": node.attrs["format"] == "fp4", "LEAST": least, "MAXIMA": maxima_at is not None,
        "BT": 256, "BN": config["keys"],  # 256 tokens: a decode batch is one deal
    }  # fmt: skip
    return TritonLaunch(
        "dsv4c.schedules.triton.index:score_tokens", args, constants,
        grid=(f"min({count}, 1) * {sms * config['blocks']}", 1, 1),
        num_warps=config["warps"], num_stages=config["stages"], pdl=True,
    )  # fmt: skip


def _pages_launch(
    node: OpNode, config: Config, sms: int, scores: int, first: Expr, count: Expr, maxima_at: Expr | None, least: int
) -> TritonLaunch:
    args: dict[str, LaunchArg] = {
        "data": ptr(0), "weight": ptr(1), "keys": _key_tiles(node, 128),
        # a page is a multiple of 256 bytes: its data, then 256 bytes of scales
        "marks": Desc(2, (f"a2_0 * {_key_bytes(node) + 4} // 256", 64), (64, 1), (1, 64), "float32"),
        "pages": ptr(3), "requests": ptr(4), "positions": ptr(5), "scores": ptr(scores), "columns": i32("a3_1"),
        "first": i32(first), "count": i32(count), "maxima_at": i64(maxima_at or 0),
    }  # fmt: skip
    constants = {
        "RATIO": node.attrs["ratio"], "FP4": node.attrs["format"] == "fp4", "LEAST": least,
        "MAXIMA": maxima_at is not None, "BT": 256,  # 256 tokens: a decode batch is one deal
        "PS": config["pages"], "STAGES": config["stages"], "NUM_WARPS": 4,
    }  # fmt: skip
    return TritonLaunch(
        "dsv4c.schedules.triton.index_keys:score_pages", args, constants,
        grid=(f"min({count}, 1) * {sms * config['blocks']}", 1, 1), num_warps=4, pdl=True,
        maxnreg=config["registers"] or None,
    )  # fmt: skip


def _keys_launch(
    node: OpNode, config: Config, sms: int, scores: int, first: Expr, count: Expr, maxima_at: Expr | None, least: int
) -> TritonLaunch:
    step = config["step"]
    args: dict[str, LaunchArg] = {
        "data": Desc(0, ("a0_0 * 64", 128), (128, 1), (64 * step, 128), "float8_e4m3fn"),
        "weight": Desc(1, ("a0_0", 64), (64, 1), (step, 64)), "keys": _key_tiles(node, _key_bytes(node)),
        "pool": ptr(2), "pages": ptr(3), "requests": ptr(4), "positions": ptr(5), "scores": ptr(scores),
        "entries": i32(f"a3_1 * {PAGE}", PAGE), "columns": i32("a3_1"), "first": i32(first), "count": i32(count),
        "maxima_at": i64(maxima_at or 0),
    }  # fmt: skip
    constants = {
        "RATIO": node.attrs["ratio"], "FP4": node.attrs["format"] == "fp4", "LEAST": least,
        "MAXIMA": maxima_at is not None, "BT": config["tokens"], "TS": step, "MT": config["tiles"],
        "STAGES": config["stages"], "NUM_WARPS": config["warps"],
    }  # fmt: skip
    return TritonLaunch(
        "dsv4c.schedules.triton.index_keys:score_keys", args, constants,
        grid=(f"cdiv(a3_1 * {PAGE}, {_block_keys(config)})", f"cdiv({count}, {config['tokens']})", 1),
        num_warps=config["warps"], pdl=True,
    )  # fmt: skip


def _key_bytes(node: OpNode) -> int:
    return index_sizes(int(_value(node, 0).shape[2]), node.attrs["format"])[0]


def _key_tiles(node: OpNode, width: int) -> Desc:
    """The pool as rows of `width` bytes, in tiles of a page's data: a page begins at a multiple of a row."""
    size = _key_bytes(node)
    dtype = "uint8" if node.attrs["format"] == "fp4" else "float8_e4m3fn"
    return Desc(2, (f"a2_0 * {size + 4} // {width}", width), (width, 1), (PAGE * size // width, width), dtype)


def _block_keys(config: Config) -> int:
    """Keys of a tile or a block: rows are written in steps of them."""
    if config["way"] == "keys":
        return 16 * int(config["warps"]) * int(config["tiles"])
    return PAGE if config["way"] == "pages" else int(config["keys"])


def _score_launch(node: OpNode, config: Config, sms: int, *rest: Any) -> TritonLaunch:
    make = {"tokens": _tokens_launch, "pages": _pages_launch, "keys": _keys_launch}[config["way"]]
    return make(node, config, sms, *rest)


def build_scores(
    node: OpNode, config: Config, *, sms: int, score: Callable[..., TritonLaunch] = _score_launch
) -> Build:
    out = len(node.inputs)
    fill = TritonLaunch(
        "dsv4c.schedules.triton.index:fill_hidden",
        args={"scores": ptr(out), "positions": ptr(5), "entries": i32(f"a3_1 * {PAGE}", PAGE)},
        constants={"RATIO": node.attrs["ratio"], "BN": _block_keys(config), "BLOCK": 1024},
        grid=("a0_0", f"cdiv(a3_1 * {PAGE}, 16384)", 1),
        pdl=True,
    )
    return Build("gpu", launches=(score(node, config, sms, out, 0, "a0_0", None, 0), fill))


def _tokens_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    return (
        {"way": "tokens", "keys": 64, "warps": 4, "stages": 4, "blocks": 4},
        {"way": "tokens", "keys": 128, "warps": 8, "stages": 4, "blocks": 2},
    )


def _pages_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    # pages of a stage, stages of a block, blocks of an SM, registers of a thread
    shapes = ((2, 3, 3, 168), (4, 2, 2, 255), (2, 3, 4, 128), (1, 6, 4, 128))
    return tuple({"way": "pages", "pages": p, "stages": s, "blocks": b, "registers": r} for p, s, b, r in shapes)


def _keys_space(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
    # tokens of a block, tokens of a stage, stages: 256 keys in the registers of a warpgroup, two blocks an SM
    shapes = ((128, 4, 2), (256, 4, 2))
    return tuple({"way": "keys", "tokens": n, "warps": 4, "tiles": 4, "step": t, "stages": s} for n, t, s in shapes)


def score_work(node: OpNode, symbols: Symbols, shared: bool) -> tuple[float, float]:
    """Bytes read and flops where every token sees a full page table; `shared`: a request's tokens share its keys."""
    data = _value(node, 0)
    heads, dim = int(data.shape[1]), int(data.shape[2])
    entries, tokens = symbols["P_index"] * PAGE, symbols["T"]
    readers = min(tokens, max(symbols["R"], tokens // 128)) if shared else tokens
    keys = float(entries) * sum(index_sizes(dim, node.attrs["format"]))
    return readers * keys + 4.0 * tokens * entries, 2.0 * tokens * entries * heads * dim


def _tokens_cost(node: OpNode, symbols: Symbols, config: Config) -> Work:
    moved, flops = score_work(node, symbols, shared=False)
    # measured: 106 us where `pages` takes 81 (64 requests of 128 K tokens, FP8)
    return Work(1.3 * moved, flops, "gpu", 0.4, "fp8", launches=2 * config.get("chunks", 1))


def _pages_cost(node: OpNode, symbols: Symbols, config: Config) -> Work:
    moved, flops = score_work(node, symbols, shared=False)
    return Work(moved, flops, "gpu", 0.6, "fp8", launches=2 * config.get("chunks", 1))


def _keys_cost(node: OpNode, symbols: Symbols, config: Config) -> Work:
    moved, flops = score_work(node, symbols, shared=True)
    # a run of few tokens pays for the loading of its keys: as if it had 32
    few = max(1.0, 32.0 * symbols["R"] / max(1, symbols["T"]))
    return Work(moved, flops * few, "gpu", 0.75, "fp8", launches=2 * config.get("chunks", 1))


# --- top-k


def _accepts_rows(node: OpNode) -> str | None:
    scores = _value(node, 0)
    topk = node.attrs["topk"]
    if scores.dtype != "float32" or scores.strides:
        return "needs dense float32 scores"
    if int(scores.shape[2]) % PAGE:
        return f"needs pages of a multiple of {PAGE} scores"
    if topk not in (64, 128, 256, 512, 1024):
        return f"needs a topk of 64, 128, 256, 512 or 1024, not {topk}"
    return None


def _select_launch(
    node: OpNode, config: Config, scores: int, maxima: int, positions: int, picks: int, entries: Expr,
    first: Expr, count: Expr, maxima_at: Expr,
) -> TritonLaunch:  # fmt: skip
    return TritonLaunch(
        "dsv4c.schedules.triton.topk:select_rows",
        args={
            "scores": ptr(scores), "maxima": ptr(maxima, "int32"), "positions": ptr(positions), "picks": ptr(picks),
            "entries": i32(entries, PAGE), "first": i32(first), "maxima_at": i64(maxima_at),
        },
        constants={
            "RATIO": node.attrs["ratio"], "K": node.attrs["topk"], "LONG": config["long"],
            "NUM_WARPS": config["select_warps"],
        },
        grid=(count, 1, 1),
        num_warps=config["select_warps"], maxnreg=config["select_registers"] or None, pdl=True,
    )  # fmt: skip


def _build_rows(node: OpNode, config: Config) -> Build:
    entries = f"a0_1 * {node.inputs[0].shape[2] if node.inputs[0] else PAGE}"
    maxima = TritonLaunch(
        "dsv4c.schedules.triton.topk:group_maxima",
        args={"scores": ptr(0), "positions": ptr(1), "maxima": ptr(2), "entries": i32(entries, PAGE)},
        constants={"RATIO": node.attrs["ratio"], "BLOCK": config["block"]},
        grid=("a0_0", f"cdiv({entries}, {config['block'] * config['steps']})", 1),
        pdl=True,
    )
    return Build("gpu", launches=(maxima, _select_launch(node, config, 0, 2, 1, 3, entries, 0, "a0_0", 0)))


def _rows_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    tokens, columns, entries = _value(node, 0).shape
    return (Value((tokens, columns, int(entries) // GROUP), "int32"),)


def select_space(node: OpNode, symbols: Symbols, sms: int, capped: bool) -> tuple[dict[str, Any], ...]:
    """Few rows want few steps, many rows want two blocks an SM: half of the registers.

    `capped`: a cap on registers was measured to pay although some of them spill."""
    long, many = symbols["P_index"] * PAGE > 1 << 15, symbols["T"] > 2 * sms
    if long:
        shapes = [(16, 0), (8, 0)]
    elif node.attrs["topk"] > 512:
        shapes = [(16, 64), (16, 0), (8, 0)] if many else [(8, 0), (16, 0)]
    else:
        shapes = [(8, 128), (16, 64)] if many else [(8, 0), (8, 128)]
    if not capped:  # what fits without a spill: of a thread 32 keys with 16 warps, 64 with 8, but long lists of 1,024
        wide = node.attrs["topk"] > 512
        long = long and not wide
        shapes = [(16, 0)] if wide else [(16, 0), (8, 0)] if many and not long else [(8, 0)]
    return tuple({"long": long, "select_warps": w, "select_registers": r} for w, r in dict.fromkeys(shapes))


def _rows_space(node: OpNode, symbols: Symbols, *, sms: int, capped: bool) -> tuple[Config, ...]:
    return tuple(
        {**select, "block": block, "steps": steps}
        for select in select_space(node, symbols, sms, capped)
        for block, steps in ((4096, 4), (2048, 2))
    )


def _rows_cost(node: OpNode, symbols: Symbols, config: Config) -> Work:
    entries = symbols["P_index"] * int(_value(node, 0).shape[2])
    return Work(4.0 * symbols["T"] * (entries * 1.2 + node.attrs["topk"] * GROUP), 0.0, "gpu", launches=2)


# --- scores and top-k


def accepts_topk(node: OpNode) -> str | None:
    if node.attrs["topk"] not in (64, 128, 256, 512, 1024):
        return f"needs a topk of 64, 128, 256, 512 or 1024, not {node.attrs['topk']}"
    return accepts_scores(node)


def _accepts_topk_gluon(node: OpNode) -> str | None:
    return accepts_topk(node) or _accepts_gluon(node)


def build_topk(node: OpNode, config: Config, *, sms: int, score: Callable[..., TritonLaunch] = _score_launch) -> Build:
    chunks, inputs = config["chunks"], len(node.inputs)
    out = inputs + (1 if chunks == 1 else 2)
    pieces: list[tuple[int, Expr, Expr]] = [(inputs, 0, "a0_0")]  # workspace, first row, rows
    if chunks > 1:
        pieces = [(inputs, f"a0_0 // {chunks} * {i}", f"a0_0 // {chunks}") for i in range(chunks)]
        pieces.append((inputs + 1, f"a0_0 // {chunks} * {chunks}", f"a0_0 % {chunks}"))
    launches: list[TritonLaunch] = []
    entries = f"a3_1 * {PAGE}"
    for scores, first, count in pieces:
        at = f"({count}) * {entries}"
        launches.append(score(node, config, sms, scores, first, count, at, node.attrs["topk"]))
        launches.append(_select_launch(node, config, scores, scores, 5, out, entries, first, count, at))
    return Build("gpu", launches=tuple(launches))


def topk_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    columns, chunks = _value(node, 3).shape[1], config["chunks"]
    whole = Value(("T", columns, -(-ROW // chunks)), "float32")
    return (whole,) if chunks == 1 else (whole, Value((chunks, columns, ROW), "float32"))


def _chunks(symbols: Symbols) -> int:
    """Pieces of the batch, so that the scores of one fit SCORE_BYTES."""
    whole = 4 * ROW * symbols["T"] * symbols["P_index"]
    return next((c for c in _CHUNKS if whole <= c * SCORE_BYTES), _CHUNKS[-1])


def with_select(
    space: Callable[[OpNode, Symbols], tuple[Config, ...]], sms: int, capped: bool
) -> Callable[[OpNode, Symbols], tuple[Config, ...]]:
    """The space of scores and top-k: every way to score with the best way to select, and the best with the others."""

    def both(node: OpNode, symbols: Symbols) -> tuple[Config, ...]:
        select, score = select_space(node, symbols, sms, capped), space(node, symbols)
        pairs = [(one, select[0]) for one in score] + [(score[0], other) for other in select[1:]]
        return tuple({**one, **other, "chunks": _chunks(symbols)} for one, other in pairs)

    return both


QUERY_ERROR = 2e-3  # by norm: one value in 10^4 rounds to the other neighbour
SCORE_ERROR = 1e-3  # the matrix unit adds E4M3 products with 14 bits: measured 4e-4


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture; scores are written for Hopper, Blackwell has its own."""
    targets, sms, capped = frozenset({arch}), MACHINES[arch].multiprocessors, MACHINES[arch].measured
    every: tuple[Schedule, ...] = (
        Schedule(
            "index_query.triton_rows",
            "index_query",
            targets,
            partial(_build_query, sms=sms),
            _query_cost,
            _accepts_query,
            space=_query_space,
            tolerance=QUERY_ERROR,
        ),
        Schedule(
            "index_scores.gluon_pages",
            "index_scores",
            HOPPER,
            partial(build_scores, sms=sms),
            _pages_cost,
            _accepts_gluon,
            space=_pages_space,
            tolerance=SCORE_ERROR,
        ),
        Schedule(
            "index_scores.gluon_keys",
            "index_scores",
            HOPPER,
            partial(build_scores, sms=sms),
            _keys_cost,
            _accepts_gluon,
            space=_keys_space,
            tolerance=SCORE_ERROR,
        ),
        Schedule(
            "index_scores.triton_tokens",
            "index_scores",
            HOPPER,
            partial(build_scores, sms=sms),
            _tokens_cost,
            accepts_scores,
            space=_tokens_space,
            tolerance=SCORE_ERROR,
        ),
        Schedule(
            "topk_rows.gluon_groups",
            "topk_rows",
            targets,
            _build_rows,
            _rows_cost,
            _accepts_rows,
            workspace=_rows_workspace,
            space=partial(_rows_space, sms=sms, capped=capped),
            tolerance=0.0,
        ),
        Schedule(
            "index_topk_packed.gluon_pages",
            "index_topk_packed",
            HOPPER,
            partial(build_topk, sms=sms),
            _pages_cost,
            _accepts_topk_gluon,
            workspace=topk_workspace,
            space=with_select(_pages_space, sms, capped),
            tolerance=SCORE_ERROR,
        ),
        Schedule(
            "index_topk_packed.gluon_keys",
            "index_topk_packed",
            HOPPER,
            partial(build_topk, sms=sms),
            _keys_cost,
            _accepts_topk_gluon,
            workspace=topk_workspace,
            space=with_select(_keys_space, sms, capped),
            tolerance=SCORE_ERROR,
        ),
        Schedule(
            "index_topk_packed.triton_tokens",
            "index_topk_packed",
            HOPPER,
            partial(build_topk, sms=sms),
            _tokens_cost,
            accepts_topk,
            workspace=topk_workspace,
            space=with_select(_tokens_space, sms, capped),
            tolerance=SCORE_ERROR,
        ),
    )
    return tuple(schedule for schedule in every if arch in schedule.targets)


SCHEDULES = schedules("sm_90a")
