"""Sparse attention with a sink, and the lightning indexer.

A task is up to 8 neighbouring tokens of one request and 16 heads; its logits are the only ones kept, so memory does
not grow with tokens x heads x keys. Keys are transposed 16 at a time into GEMM panels; the values product reads the
pool rows themselves. 4 C operations a key, head and token: a decode token of nano with 192 keys is 0.4 MFLOP.
"""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, LANES, cost, float_rows
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule

_KINDS = {"attend_window": 0, "attend_csa": 1, "attend_hca": 2, "attend_block": 3}


def _accepts(node: OpNode) -> str | None:
    pool = node.inputs[1]
    rows = (0, 1, 3) if node.op == "attend_block" else (0, 1)
    return float_rows(*rows)(node) if pool is not None else "no pool"


def _build(node: OpNode, config: Config) -> Build:
    q, attrs = node.inputs[0], node.attrs
    assert q is not None
    heads, dim = int(q.shape[1]), int(q.shape[2])
    defines = {
        "KIND": _KINDS[node.op], "HEADS": heads, "DIM": dim, "WINDOW": attrs["window"], "PAGE": attrs["page"],
        "ENTRIES": attrs.get("entries_per_page", 1), "RATIO": attrs.get("ratio", 1), "ATTEND_SCALE": dim**-0.5,
        "BLOCK": attrs.get("block", 1),
    }  # fmt: skip
    return Build("cpp", "attend.cc", defines)


def _index(node: OpNode, config: Config) -> Build:
    attrs = node.attrs
    return Build(
        "cpp", "index.cc", {"RATIO": attrs["ratio"], "ENTRIES": attrs["entries_per_page"], "TOPK": attrs["topk"]}
    )


def _accepts_index(node: OpNode) -> str | None:
    q = node.inputs[0]
    assert q is not None
    if int(q.shape[2]) % LANES:
        return f"{q.shape[2]} channels are no multiple of {LANES}"
    return float_rows(0, 2)(node)


SCHEDULES = (
    *(Schedule(f"{op}.cpp_tiles", op, CPU, _build, cost(0.5), _accepts, tolerance=5e-6) for op in _KINDS),
    Schedule("index_topk.cpp_tiles", "index_topk", CPU, _index, cost(0.4), _accepts_index, tolerance=0.0),
)
