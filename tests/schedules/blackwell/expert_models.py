"""Cases of the expert kernels, and exact models of every stage: what it must write, given what the one before wrote.

A value that falls to its neighbour in a narrow format in one stage is thus no error of the next. Nothing here needs
Triton: the interpreter's runs and the card's are judged alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.ops.formats import from_e8m0
from dsv4c.ops.mx import dequantise_mx, mx_group, quantise_mx
from dsv4c.runtime import layouts
from dsv4c.schedules._schedule import Config, OpNode, Schedule, Value
from dsv4c.schedules.blackwell.experts import WORKSPACE, _config, _step, schedules

FORMATS = ("mxfp8", "mxfp4", "nvfp4", "bf16")
SCHEDULES: Mapping[str, Schedule] = {schedule.op: schedule for schedule in schedules("sm_103a")}
LIMIT = 10.0
NO_NUMBERS = {"NaN": float("nan"), "infinity": float("inf")}


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call."""

    tokens: int
    experts: int
    topk: int
    dim: int
    inner: int
    columns: int
    routing: str
    """`random`, `one` (all tokens choose the same experts), `last` (the first experts stay empty)."""
    scale: str
    """`usual`, `extreme` (bytes from 0 to 129, or every E4M3), `tiny` (E8M0 0 to 3, E4M3 subnormals), `zero` (0 alone),
    `largest` (E8M0 up to 254, E4M3 448)."""
    rows: str
    """`usual`, `zeros` (groups of nothing but 0), `large` (the format's largest, and far more), `max` (2^127), `NaN`
    and `infinity` (such values among the rows, one of the routing weights, one NaN among the scales of w1)."""
    seed: int
    apart: bool = False
    """Sort and gather are launches of their own."""


@dataclass(frozen=True)
class Stage:
    """The error of one stage where it is largest beside what is allowed there; `bits`: results that must be equal."""

    name: str
    error: float
    allowed: float
    bits: bool = False

    @property
    def good(self) -> bool:
        return self.error <= self.allowed


def node_of(case: Case, fmt: str) -> OpNode:
    nv, row = fmt == "nvfp4", Value(("T", case.dim), "bfloat16")
    inputs = [row, Value(("T", case.topk), "int32"), Value(("T", case.topk), "float32")]
    for lines, channels in ((case.inner, case.dim), (case.inner, case.dim), (case.dim, case.inner)):
        inputs += [Value((case.experts, lines, channels // 2), "uint8", "weight")]
        kind, group = ("float8_e4m3fn", 16) if nv else ("uint8", 32)
        inputs += [Value((case.experts, lines, channels // group), kind, "weight")]
        inputs += [Value((case.experts,), "float32", "weight")] if nv else []
    inputs += [Value((1,), "float32", "weight"), Value((case.experts,), "float32", "weight")] if nv else []
    attrs: dict[str, object] = {"limit": LIMIT, **({} if fmt == "bf16" else {"activations": fmt})}
    op = {"nvfp4": "experts_nvfp4", "bf16": "experts_fp4"}.get(fmt, "experts_mx")
    return OpNode(op, attrs, (*inputs, row), (row,))


def config_of(case: Case, what: OpNode) -> Config:
    """The schedule's config of these columns, at the case's number of tokens."""
    config = dict(_config(what, case.columns, case.tokens))
    return {**config, "sort": 0} if case.apart else config


def inputs_of(case: Case, fmt: str, what: OpNode, device: str = "cpu") -> list[Tensor]:
    """As the op takes them, before layouts."""
    generator = torch.Generator().manual_seed(case.seed)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores = scores[:1].expand_as(scores)
    if case.routing == "last":
        scores = scores + torch.arange(case.experts)
    weight = torch.rand(case.tokens, case.topk, generator=generator) + 0.1
    if case.rows in NO_NUMBERS:
        weight[case.seed % case.tokens, 0] = NO_NUMBERS[case.rows]
    args = [_rows(case, generator), scores.topk(case.topk, -1).indices.to(torch.int32), weight]
    each = 3 if fmt == "nvfp4" else 2
    for i, value in enumerate(what.inputs[3 : 3 + 3 * each]):
        assert value is not None
        shape, last = tuple(int(size) for size in value.shape), i // each == 2
        if i % each == 0:
            args.append(_weight(case, shape, last, generator))
        elif i % each == 1:
            args.append(_weight_scales(case, fmt, shape, last, generator))
            if i == 1 and case.rows in NO_NUMBERS:  # a channel of hidden, and so its group
                args[-1].view(torch.uint8)[0, case.seed % case.inner, 0] = 127 if fmt == "nvfp4" else 255
        else:
            args.append(torch.rand(shape, generator=generator) + 0.01)
    if fmt == "nvfp4":
        args += [torch.tensor([0.02]), torch.rand(case.experts, generator=generator) + 0.1]
    args.append(torch.randn(case.tokens, case.dim, generator=generator).to(torch.bfloat16))
    return [arg.to(device) for arg in args]


def _rows(case: Case, generator: torch.Generator) -> Tensor:
    x = torch.randn(case.tokens, case.dim, generator=generator)
    if case.rows == "zeros":
        x.unflatten(-1, (-1, 16))[:, ::3] = 0
        x.unflatten(-1, (-1, 32))[:, ::2] = 0
    if case.rows == "large":
        x.unflatten(-1, (-1, 16))[:, ::2] *= 2.0**30
        x[:, 0] = 448.0
    if case.rows == "max":  # one a row, and room to round up: else the exact result would be no float32
        most = 2.0**100 if case.scale in ("extreme", "largest") else 2.0**127
        x[:, case.seed % case.dim] = 0.99 * most * (1 if case.seed % 2 else -1)
    if case.scale == "largest":
        x *= 2.0**-122  # times 2^127 it is an ordinary number
    if case.rows in NO_NUMBERS:
        few = torch.rand(x.shape, generator=generator) < 0.5 / case.dim  # two rows of five have some
        x = torch.where(few, torch.copysign(torch.tensor(NO_NUMBERS[case.rows]), x), x)
    return x.to(torch.bfloat16)


def _weight(case: Case, shape: tuple[int, ...], last: bool, generator: torch.Generator) -> Tensor:
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if case.scale == "largest" and not last:
        return data & 0xBB  # 1.5 at most: 2 * 2^127 is no float32
    return data


def _weight_scales(case: Case, fmt: str, shape: tuple[int, ...], last: bool, generator: torch.Generator) -> Tensor:
    if fmt == "nvfp4":
        if case.scale in ("usual", "largest"):
            usual = (torch.rand(shape, generator=generator) * 2 + 0.1).to(torch.float8_e4m3fn)
            return usual if case.scale == "usual" else torch.full_like(usual, 448.0)
        high = {"extreme": 127, "tiny": 8, "zero": 1}[case.scale]  # E4M3 subnormals are 1 to 7
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    kinds = {"usual": (118, 124), "extreme": (110, 130), "tiny": (0, 4), "zero": (0, 1), "largest": (250, 255)}
    low, high = kinds["usual" if case.scale == "largest" and last else case.scale]
    byte = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
    if case.scale == "extreme":  # the largest products must stay finite, the smallest may be anything
        rare = torch.rand(shape, generator=generator) < 0.1
        byte = torch.where(rare, torch.randint(0, 128, shape, generator=generator, dtype=torch.uint8), byte)
    return byte


def laid_out(args: Sequence[Tensor], what: OpNode) -> list[Tensor]:
    """The inputs as the kernels take them."""
    by_index = SCHEDULES[what.op].layouts(what)
    return [layouts.apply(arg, by_index[i]) if i in by_index else arg for i, arg in enumerate(args)]


def buffers_of(case: Case, what: OpNode, config: Config, device: str = "cpu") -> list[Tensor]:
    """Workspace and output, poisoned."""
    out = []
    for value in (*SCHEDULES[what.op].workspace(what, config), *what.outputs):
        tensor = torch.empty(value.sizes({"T": case.tokens}), dtype=getattr(torch, value.dtype), device=device)
        tensor.view(torch.uint8).fill_(0xFF)
        out.append(tensor)
    return out


def rows_scales(block: Tensor, slots: Tensor, channels: int, columns: int, fmt: str) -> Tensor:
    """The scales [rows, groups] of the rows in these slots, read back from their tiles' blocks."""
    group, tiles = mx_group(fmt), block.shape[0]  # type: ignore[arg-type]
    groups, each = channels // group, _step(channels, fmt) // group
    if columns == 128:
        plain = block.reshape(tiles, groups // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    else:
        plain = block.reshape(tiles, groups // each, columns, each).transpose(1, 2)
    return plain.reshape(tiles * columns, groups)[slots.long()]


def stages(fmt: str, case: Case, args: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[Stage]:
    """Every stage's error. `args` before layouts; `buffers`: the workspace and the result."""
    named = dict(zip(WORKSPACE, buffers, strict=False))
    out, pairs = buffers[-1], case.tokens * case.topk
    pair, place, slots = (named[name].flatten().long() for name in ("pair", "place", "slots"))
    expert, token = args[1].flatten().long()[pair], pair // case.topk
    one = torch.ones(case.experts, device=pair.device)
    x_global, hidden_global = (args[12], args[13]) if fmt == "nvfp4" else (one[:1], one)
    hidden_global = hidden_global[expert].unsqueeze(1)  # of each row
    tiles = named["tiles"].reshape(-1, 4)[: int(named["meta"][0])].long()
    yield _sorted(pair, place, slots, expert, tiles, case, pairs)
    given = named["slot_weight"].flatten()[slots]
    yield _equal("weights", given, args[2].flatten()[pair])

    data = named["data"].flatten(0, 1)
    if fmt == "bf16":
        x = data.double()
        yield _equal("tokens", data, args[0][token])
    else:
        scale = rows_scales(named["scale"], slots, case.dim, case.columns, fmt)
        wanted = quantise_mx(args[0][token], fmt, x_global)  # type: ignore[arg-type]
        yield _equal("tokens' scales", scale, wanted[1])
        same = dequantise_mx(*wanted, fmt, x_global).isnan()  # type: ignore[arg-type]
        same = same if fmt == "mxfp8" else same[:, ::2]
        yield _equal("tokens", *(one.view(torch.uint8).masked_fill(same, 0) for one in (data, wanted[0])))
        x = dequantise_mx(data, scale, fmt, x_global).double()  # type: ignore[arg-type]

    w1, w3, w2 = _wide(args, fmt)
    weight = given.double()[:, None]
    gate, up = _by_expert(x, w1, expert), _by_expert(x, w3, expert)
    # sums are float32: an error of a few ulps of the largest term
    reach = _by_expert(x.abs(), w1.abs(), expert) + _by_expert(x.abs(), w3.abs(), expert)
    model = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * weight
    slack = 1.2e-4 * reach.clamp(max=2e6) * weight + 1e-6 * model.abs() + 1e-30
    hidden = named["hidden"].flatten(0, 1)
    if fmt == "bf16":
        found, rounding, group = hidden.double(), 2.0**-8 * model.abs(), 1
    else:
        stored = rows_scales(named["hidden_scale"], slots, case.inner, case.columns, fmt)
        found = dequantise_mx(hidden, stored, fmt, hidden_global).double()  # type: ignore[arg-type]
        rounding, group = _rounding(fmt, stored, model, hidden_global), mx_group(fmt)  # type: ignore[arg-type]
    # an infinite weight times what float32 rounds to 0 is NaN: of BF16 neither is told from the other
    numbers = (_whole_groups(one, of) for one, of in ((found, 1), (model, group)))
    yield _within("hidden", *numbers, rounding + slack)

    result = _by_expert(found, w2, expert)
    reach = _by_expert(found.abs(), w2.abs(), expert)
    rows = named["rows"].flatten(0, 1).double()
    yield _within("rows of pairs", rows, result, 2.0**-8 * result.abs() + 1e-5 * reach + 1e-37)

    total = args[-1].double().index_add(0, token, rows)
    most = rows.nan_to_num(0, 0, 0).abs().max()
    yield _within("sum", out.double(), total, 2.0**-8 * total.abs() + 1e-6 * most + 1e-30)


def _by_expert(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """x [rows, C] by weight [E, lines, C] of each row's expert."""
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64, device=x.device)
    for e in expert.unique().tolist():
        out[expert == e] = x[expert == e] @ weight[e].T
    return out


def _rounding(fmt: str, stored: Tensor, model: Tensor, factor: Tensor) -> Tensor:
    """Half a step where it is coarsest, and what saturates: a sixteenth of 6 in NVFP4, and what its scale cuts off."""
    group = mx_group(fmt)  # type: ignore[arg-type]
    step = stored.float() * factor if fmt == "nvfp4" else from_e8m0(stored)
    step = step.double().repeat_interleave(group, 1)
    if fmt != "nvfp4":
        return step * (16.0 if fmt == "mxfp8" else 1.0)
    most = model.abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, 1)
    # a normal scale is off by a sixteenth of itself, a subnormal one by 2^-10; the largest of 6 steps saturates as far
    rounding = step + 6 * torch.maximum(step / 16, factor.double() * 2.0**-10)
    return torch.where(most > 6 * 448 * factor, most, rounding)


def _whole_groups(model: Tensor, group: int) -> Tensor:
    """NaN throughout the groups of channels that hold a NaN or an infinity."""
    finite = model.isfinite().unflatten(1, (-1, group)).all(-1)
    return model.where(finite.repeat_interleave(group, 1), torch.nan)


def _sorted(pair: Tensor, place: Tensor, slots: Tensor, expert: Tensor, tiles: Tensor, case: Case, pairs: int) -> Stage:
    """Rows are a permutation by expert, tiles cover them, each row's slot is in its tile."""
    device = pair.device
    good = torch.equal(pair.sort().values, torch.arange(pairs, device=device)) and bool((expert.diff() >= 0).all())
    good = good and torch.equal(pair[place], torch.arange(pairs, device=device))
    within = torch.cat([torch.arange(int(n), device=device) for n in tiles[:, 2]])
    tile = torch.arange(len(tiles), device=device).repeat_interleave(tiles[:, 2])
    good = good and len(within) == pairs and torch.equal(tiles[tile, 1] + within, torch.arange(pairs, device=device))
    good = good and torch.equal(tiles[tile, 0], expert) and torch.equal(slots, tile * case.columns + within)
    return Stage("sort", 0.0 if good else 1.0, 0.0, bits=True)


def _equal(name: str, found: Tensor, wanted: Tensor) -> Stage:
    apart = (found.contiguous().view(torch.uint8) != wanted.contiguous().view(torch.uint8)).sum()
    return Stage(name, float(apart), 0.0, bits=True)


def _within(name: str, found: Tensor, wanted: Tensor, allowed: Tensor) -> Stage:
    """Error and what is allowed, where their ratio is largest; NaN and infinities must be the same ones."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    error = (found - wanted).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0)
    allowed = allowed.masked_fill(~wanted.isfinite(), 0)
    worst = int((error / allowed).nan_to_num(torch.inf, torch.inf).masked_fill(same, 0).argmax())
    return Stage(name, float(error.flatten()[worst]), float(allowed.flatten()[worst]))


def _wide(args: Sequence[Tensor], fmt: str) -> list[Tensor]:
    """w1, w3, w2 in float64."""
    if fmt == "nvfp4":
        return [
            dequantise_mx(args[i], args[i + 1], "nvfp4").double() * args[i + 2].double()[:, None, None]
            for i in (3, 6, 9)
        ]
    return [dequantise_mx(args[i], args[i + 1], "mxfp4").double() for i in (3, 5, 7)]
