"""One NaN or infinity in an op's inputs, and what then must hold of its results.

Where the reference's result is no number the schedule's must be none either: a finite number there is a fault
(`laundered`). Rows that the reference leaves as they were must be the schedule's own of a clean run, bit for bit
(`spread`). In the other rows what is finite in both must agree (`apart`).

Packed pools, quantised bytes and their scales are compared as the numbers they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.ops import Op
from dsv4c.ops.formats import index_sizes, kv_group, kv_sizes, read_entries, unpack_index, unpack_kv

Args = list[Tensor | None]
VALUES = (float("nan"), float("inf"), -float("inf"))
BYTES = {"data", "data_TK", "data_TGK", "data_TIC"}
"""Parameters that hold E4M3 values, as such or as bytes: 0x7F is NaN, and no byte is infinity."""
PARAMETERS = {"fn", "base", "scale", "bias", "bias_E", "ape", "sink", "sink_H", "tid2eid", "tid2eid_VK"}
"""Weights that are not called so. A checkpoint that holds a NaN or an infinity is refused, so they get none here."""

WISHES = {"temperature_S", "top_p_S", "min_p_S", "repetition_S", "frequency_S", "presence_S", "values_M"}
"""What a request asks for: checked when it comes."""


@dataclass(frozen=True)
class Poison:
    """The inputs of a call with one bad value."""

    name: str
    args: Args


def is_weight(parameter: str) -> bool:
    """Whether a parameter comes from a checkpoint."""
    if parameter in ("weight_TI", "weight_TK"):  # of heads, of chosen experts
        return False
    known = ("weight", "w1", "w2", "w3", "s1", "s2", "s3", "g1", "g2", "g3", "x_global", "hidden_global", "table_VD")
    return parameter in PARAMETERS or parameter.split("_")[0] in known or parameter.endswith("weight")


def poisons(op: Op, attrs: Mapping[str, Any], args: Args, generator: torch.Generator) -> Iterator[Poison]:
    """Copies of the inputs with one bad value each: every value in every activation, and NaN in pools that are read."""
    written = set(op.in_place.values())
    for i, (name, value) in enumerate(zip(op.parameters, args, strict=True)):
        if value is None or not value.numel() or is_weight(name) or name in WISHES:
            continue
        if value.dtype == torch.float8_e4m3fn or name in BYTES:
            yield Poison(f"{name} NaN", _with(args, i, _byte(value, generator)))
        elif value.is_floating_point() and "pool" in name and name not in written:
            yield from _in_plain_pool(op, attrs, args, i)
        elif value.is_floating_point():
            for bad in VALUES[:1] if name.startswith("scale_T") else VALUES:  # no quantiser gives an infinite scale
                yield Poison(f"{name} {bad:g}", _with(args, i, _element(value, bad, generator)))
        elif "pool" in name and name not in written:
            yield from _in_packed_pool(op, attrs, args, i)


def _with(args: Args, i: int, value: Tensor) -> Args:
    return [*args[:i], value, *args[i + 1 :]]


def _copy(value: Tensor) -> Tensor:
    """With the same strides: what is given may be columns of something wider."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _place(value: Tensor, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(
        int(torch.randint(n, (), generator=generator, device=generator.device)) for n in value.shape
    )  # fmt: skip


def _element(value: Tensor, bad: float, generator: torch.Generator) -> Tensor:
    out = _copy(value)
    out[_place(value, generator)] = bad
    return out


def _byte(value: Tensor, generator: torch.Generator) -> Tensor:
    out = value.clone()
    out.view(torch.uint8)[_place(value, generator)] = 0x7F
    return out


def _seen_row(op: Op, attrs: Mapping[str, Any], given: Mapping[str, Tensor], parameter: str) -> tuple[int, int] | None:
    """A pool's row that the token which sees most reads, and the entries of a page; None if it reads nothing there.

    What nobody reads may hold anything, and a reference may multiply it by 0.
    """
    positions = given["positions"]
    if not len(positions):
        return None
    token = int(positions.argmax())
    request, position = int(given["request_rows"][token]), int(positions[token])
    if "block" in attrs:  # its window ends before its first row
        position = int(positions[given["block_rows"][request]]) - 1
    if parameter.startswith("entry") or op.name.startswith("index"):
        per_page, entry = attrs["entries_per_page"], ((position + 1) // attrs.get("ratio", 1)) // 2
        pages = (
            given["entry_pages_RP"]
            if parameter.startswith("entry")
            else given["pages_SP" if "pages_SP" in given else "pages_RP"]
        )
        if "picks_TK" in given:
            picked = given["picks_TK"][token]
            entry = int(picked.max())
        elif position + 1 < attrs["ratio"]:
            entry = -1
    else:
        per_page, entry, pages = attrs["page"], position, given["pages_RP"]
    if entry < 0:
        return None
    return int(pages[request, entry // per_page]) * per_page + entry % per_page, per_page


def _in_plain_pool(op: Op, attrs: Mapping[str, Any], args: Args, i: int) -> Iterator[Poison]:
    given = {name: value for name, value in zip(op.parameters, args, strict=True) if value is not None}
    found, value = _seen_row(op, attrs, given, op.parameters[i]), args[i]
    if found is not None and value is not None:
        for bad in VALUES:
            out = value.clone()
            out[found[0], value.shape[1] // 3] = bad
            yield Poison(f"{op.parameters[i]} {bad:g}", _with(args, i, out))


def _in_packed_pool(op: Op, attrs: Mapping[str, Any], args: Args, i: int) -> Iterator[Poison]:
    """A NaN as the packing ops leave it, and in the parts of an entry that may each hold one."""
    given = {name: value for name, value in zip(op.parameters, args, strict=True) if value is not None}
    found, pool = _seen_row(op, attrs, given, op.parameters[i]), args[i]
    if found is None or pool is None:
        return
    row, per_page = found
    nan = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8, device=pool.device)  # float32; its end is bfloat16's
    changes: dict[str, tuple[tuple[slice, Tensor | int] | None, tuple[slice, Tensor | int] | None]]
    if "format" in attrs:
        data, scales = index_sizes(given["data_TIC"].shape[2], attrs["format"])
        changes = {"scale": (None, (slice(0, 1), 255))}
        if attrs["format"] == "fp8":
            changes = {"scale": (None, (slice(0, 4), nan)), "data": ((slice(3, 4), 0x7F), None)}
    else:
        head, turned = given["q_THC"].shape[2], attrs["rope_dim"]
        data, scales = kv_sizes(head, turned)
        group = kv_group(head, turned)
        changes = {
            "group": ((slice(0, group), 0x7F), (slice(0, 1), 255)),
            "turned": ((slice(head - turned + 2, head - turned + 4), nan[2:]), None),
        }
    for what, (in_data, in_scale) in changes.items():
        out = pool.clone()
        page = out.view(-1, per_page * (data + scales))[row // per_page]
        parts = page[: per_page * data].view(per_page, data), page[per_page * data :].view(per_page, scales)
        for part, change in zip(parts, (in_data, in_scale), strict=True):
            if change is not None:
                part[row % per_page, change[0]] = change[1]
        yield Poison(f"{op.parameters[i]} {what}", _with(args, i, out))


def decoded(op: Op, attrs: Mapping[str, Any], args: Args, results: Sequence[Tensor]) -> list[Tensor]:
    """The results as tensors whose first dimension are rows; float where they stand for numbers."""
    given = {name: value for name, value in zip(op.parameters, args, strict=True) if value is not None}
    out: list[Tensor] = []
    for i, result in enumerate(results):
        name = op.in_place.get(i, "")
        if name == "pool_NB":
            out.append(_entries(op, attrs, given, result))
        elif result.dtype == torch.float8_e4m3fn or (op.name == "index_query" and result.dtype == torch.uint8):
            out.append(result.view(torch.float8_e4m3fn).float())
        elif name == "state_Z3C":
            out.append(result[1:, 1:])  # its maxima only keep the sums in range; slot 0 is nobody's
        elif name.startswith("ring"):
            out.append(result[1:])
        elif op.name == "index_topk":  # picks have no order, and are all entries if they fit
            some = (given["positions"] + 1) // attrs["ratio"] > attrs["topk"]
            out.append(result[some].sort(-1).values)
        else:
            out.append(result)
    return out


def _entries(op: Op, attrs: Mapping[str, Any], given: Mapping[str, Tensor], pool: Tensor) -> Tensor:
    """The entries that the call has written, of the null page none."""
    per_page, fmt = attrs["entries_per_page"], attrs.get("format", "kv")
    slots = given["slots"]
    live = slots >= per_page
    if "ends" in given:
        live = live & (given["ends"] >= 0)
    dim = given["kv_weight" if "kv_weight" in given else "norm_weight" if "norm_weight" in given else "weight"].shape[0]
    if fmt == "kv":
        turned = given["entry_table_ER" if "entry_table_ER" in given else "table_TR"].shape[1]
        data, scales = read_entries(pool, slots[live], kv_sizes(dim, turned)[0], entries_per_page=per_page)
        return unpack_kv(data, scales, turned)
    data, scales = read_entries(pool, slots[live], index_sizes(dim, fmt)[0], entries_per_page=per_page)
    return unpack_index(data, scales, fmt)


@dataclass(frozen=True)
class Verdict:
    """Elements by what went wrong with them, and how many of the reference's are no number."""

    none: int
    laundered: int
    spread: int
    apart: int

    @property
    def good(self) -> bool:
        return not (self.laundered or self.spread or self.apart)

    def __str__(self) -> str:
        return f"{self.none} no number, {self.laundered} laundered, {self.spread} spread, {self.apart} apart"


def judge(
    clean: Sequence[Tensor], clean_expected: Sequence[Tensor], got: Sequence[Tensor], expected: Sequence[Tensor]
) -> Verdict:
    """Of decoded results."""
    none = laundered = spread = apart = 0
    for before, ref_before, out, ref in zip(clean, clean_expected, got, expected, strict=True):
        assert out.shape == ref.shape == before.shape == ref_before.shape
        if not out.numel():
            continue
        if before.is_floating_point() and bool((ref_before.isfinite() & ~before.isfinite()).any()):
            raise AssertionError("a result without any bad value is no number")
        same = _rows_equal(ref, ref_before)
        spread += int((~_rows_equal(out, before) & same).sum())
        out, ref = out[~same], ref[~same]
        if not out.numel():
            continue
        if not ref.is_floating_point():
            if out.dim() == 2:  # choices of a row: sums of another order may swap two that are all but equal
                other = int((out.unsqueeze(2) != ref.unsqueeze(1)).all(2).sum())
                apart += other if other > out.numel() // 100 else 0
            else:
                apart += int((out != ref).sum())
            continue
        out, ref = out.double(), ref.double()
        bad = ~ref.isfinite()
        none += int(bad.sum())
        laundered += int((bad & out.isfinite()).sum())
        both = ~bad & out.isfinite()
        size = torch.where(both, ref.abs(), 0.0).reshape(len(ref), -1).amax(1).view(-1, *[1] * (ref.dim() - 1))
        apart += int((both & ((out - ref).abs() > 0.25 * ref.abs() + 0.05 * size)).sum())
    return Verdict(none, laundered, spread, apart)


def _rows_equal(a: Tensor, b: Tensor) -> Tensor:
    """Which rows are the same bytes."""
    bytes_a, bytes_b = (t.contiguous().view(torch.uint8).reshape(len(t), -1) for t in (a, b))
    return (bytes_a == bytes_b).all(1)
