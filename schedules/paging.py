"""What a step prepares once: pool rows of tokens and entries, RoPE tables, and row gathers. All tiny beside a layer."""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, cost, float_rows
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms


def _slots(node: OpNode, config: Config) -> Build:
    ends = node.op == "entry_slots"
    defines = {"ENDS": int(ends), "RATIO": int(node.attrs.get("ratio", 1)), "ENTRIES": node.attrs["entries_per_page"]}
    return Build("cpp", "slots.cc", defines)


def _tables(node: OpNode, config: Config) -> Build:
    ends = node.op == "entry_rope_table"
    return Build("cpp", "rope_table.cc", {"ENDS": int(ends), "RATIO": int(node.attrs.get("ratio", 1))})


def _take(node: OpNode, config: Config) -> Build:
    return Build("cpp", "rows.cc", {"BF16": 0, "COPIES": 1, "INDEX_FIRST": 0})


def _embed(node: OpNode, config: Config) -> Build:
    weight = node.inputs[1]
    assert weight is not None
    narrow = int(weight.exact == "bfloat16")
    return Build("cpp", "rows.cc", {"BF16": narrow, "COPIES": node.attrs.get("hc_mult", 1), "INDEX_FIRST": 1})


def _embed_layouts(node: OpNode) -> dict[int, Transforms]:
    weight = node.inputs[1]
    assert weight is not None
    return {1: (("narrow", weight.exact),)} if weight.exact else {}


SCHEDULES = (
    Schedule("token_slots.cpp_rows", "token_slots", CPU, _slots, cost(0.1), tolerance=0.0),
    Schedule("entry_slots.cpp_rows", "entry_slots", CPU, _slots, cost(0.1), tolerance=0.0),
    *(
        Schedule(f"{op}.cpp_scalar", op, CPU, _tables, cost(0.1), tolerance=1e-6)  # exact range reduction: libm's
        for op in ("rope_table", "entry_rope_table")
    ),
    Schedule("take_rows.cpp_rows", "take_rows", CPU, _take, cost(0.1), float_rows(), tolerance=0.0),
    *(
        Schedule(f"{op}.cpp_rows", op, CPU, _embed, cost(0.1), float_rows(), _embed_layouts, tolerance=0.0)
        for op in ("embed", "embed_streams")
    ),
)
