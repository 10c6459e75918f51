"""One example of every logical op, of any number of tokens, as the planner would describe it, with random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4c.ops import OPS
from dsv4c.schedules._schedule import OpNode, Role, Value

N, D, H, C, R = 4, 64, 8, 32, 16  # streams, hidden, heads, head channels, rotated channels
WINDOW, PAGE, RATIO, ENTRIES, TOPK = 24, 16, 4, 8, 12
EXPERTS, PICKED, INNER, VOCAB = 8, 2, 48, 96
BLOCK, RANK = 5, 32


@dataclass
class Inputs:
    """Tensors of one call, with the symbols of their shapes."""

    tensors: list[Tensor] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def add(self, tensor: Tensor, *symbols: str, role: Role = "activation", exact: bool = False) -> Tensor:
        """`symbols` name the leading dims; the others are fixed."""
        shape = (*symbols, *tensor.shape[len(symbols) :])
        dtype = str(tensor.dtype).removeprefix("torch.")
        strides = None if tensor.is_contiguous() or 0 in tensor.shape or tensor.shape[0] < 2 else tensor.stride()
        self.tensors.append(tensor)
        self.values.append(Value(shape, dtype, role, strides, "bfloat16" if exact else None))
        return tensor

    def weight(self, *shape: int, exact: bool = False) -> Tensor:
        tensor = torch.randn(shape) * shape[-1] ** -0.5
        return self.add(tensor.bfloat16().float() if exact else tensor, role="weight", exact=exact)


@dataclass
class Batch:
    """A ragged batch of `tokens` rows: requests of a few lengths and starts, with shuffled pages."""

    tokens: int

    def __post_init__(self) -> None:
        lengths, starts = [], []
        left = self.tokens
        for i in range(1000):
            if not left:
                break
            lengths.append(min(left, (1, 5, 30, 17)[i % 4]))
            starts.append((0, 70, 3, 41)[i % 4])
            left -= lengths[-1]
        self.starts = torch.tensor(starts, dtype=torch.int64)
        self.ends = self.starts + torch.tensor(lengths, dtype=torch.int64)
        self.requests = torch.repeat_interleave(torch.arange(len(lengths)), self.ends - self.starts)
        first = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - torch.tensor(lengths, dtype=torch.int64)
        self.positions = torch.arange(self.tokens) - first[self.requests] + self.starts[self.requests]
        self.slots = 1 + torch.randperm(len(lengths))
        self.completed = torch.nonzero((self.positions + 1) % RATIO == 0).squeeze(1)
        self.num_requests = len(lengths)

    def table(self, tokens_a_page: int) -> tuple[Tensor, int]:
        """Page table [R, P], and the number of pages with the null page."""
        columns = -(-128 // tokens_a_page)
        pages = 1 + torch.randperm(self.num_requests * columns)
        return pages.view(self.num_requests, columns), 1 + self.num_requests * columns


@dataclass
class Case:
    node: OpNode
    inputs: list[Tensor]
    """As the op takes them; the test lays weights out as the schedule says."""


Make = Callable[[Inputs, int], dict[str, object]]


def _table_rows(inputs: Inputs, tokens: int, symbol: str = "T") -> None:
    angle = torch.rand(tokens, R // 2) * 6
    inputs.add(torch.cat((angle.cos(), angle.sin()), -1), symbol)


def _strided(inputs: Inputs, tokens: int, channels: int, symbol: str = "T") -> Tensor:
    """Columns of a wider tensor, as a fused linear map leaves them."""
    wide = torch.randn(tokens, channels + 48)
    return inputs.add(wide[:, 32 : 32 + channels], symbol)


def _embed_streams(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randint(0, VOCAB, (t,)), "T", role="input")
    i.weight(VOCAB, D, exact=True)
    return {"hc_mult": N}


def _embed(i: Inputs, t: int) -> dict[str, object]:
    _embed_streams(i, t)
    return {}


def _take_rows(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t + 1, N, D), "T")
    i.add(torch.randint(0, t + 1, (t,)), "S", role="input")
    return {}


def _rope_table(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randint(0, 4096, (t,)), "T", role="input")
    i.add(torch.rand(R // 2), role="weight")
    return {}


def _entry_rope_table(i: Inputs, t: int) -> dict[str, object]:
    batch = Batch(t)
    i.add(batch.positions, "T", role="input")
    i.add(batch.completed, "E", role="input")
    i.add(torch.rand(R // 2), role="weight")
    return {"ratio": RATIO}


def _token_slots(i: Inputs, t: int) -> dict[str, object]:
    batch = Batch(t)
    i.add(batch.table(PAGE)[0], "R", "P", role="input")
    i.add(batch.requests, "T", role="input")
    i.add(batch.positions, "T", role="input")
    return {"entries_per_page": PAGE}


def _entry_slots(i: Inputs, t: int) -> dict[str, object]:
    batch = Batch(t)
    i.add(batch.table(ENTRIES * RATIO)[0], "R", "P", role="input")
    i.add(batch.requests, "T", role="input")
    i.add(batch.positions, "T", role="input")
    i.add(batch.completed, "E", role="input")
    return {"ratio": RATIO, "entries_per_page": ENTRIES}


def _hc_weights(i: Inputs, rows: int, scales: int) -> None:
    i.weight(rows, N * D)
    i.add(torch.randn(rows) * 0.5, role="weight")
    i.add(torch.rand(scales) + 0.5, role="weight")


def _hc_post_inputs(i: Inputs, t: int) -> None:
    i.add(torch.randn(t, D), "T")
    i.add(torch.randn(t, N, D), "T")
    i.add(torch.rand(t, N), "T")
    i.add(torch.rand(t, N, N), "T")


_MIX = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}


def _hc_pre(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, N, D), "T")
    _hc_weights(i, N * (2 + N), 3)
    return dict(_MIX)


def _hc_pre_norm(i: Inputs, t: int) -> dict[str, object]:
    _hc_pre(i, t)
    i.weight(D)
    return {**_MIX, "out_eps": 1e-6}


def _hc_post(i: Inputs, t: int) -> dict[str, object]:
    _hc_post_inputs(i, t)
    return {}


def _hc_post_pre_norm(i: Inputs, t: int) -> dict[str, object]:
    _hc_post_inputs(i, t)
    _hc_weights(i, N * (2 + N), 3)
    i.weight(D)
    return {**_MIX, "out_eps": 1e-6}


def _hc_head(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, N, D), "T")
    _hc_weights(i, N, 1)
    return {"norm_eps": 1e-6, "eps": 1e-6}


def _hc_head_norm(i: Inputs, t: int) -> dict[str, object]:
    _hc_head(i, t)
    i.weight(D)
    return {"norm_eps": 1e-6, "eps": 1e-6, "out_eps": 1e-6}


def _rms_norm(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, D)
    i.weight(D)
    return {"eps": 1e-6}


def _head_norm(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, H * C)
    return {"num_heads": H, "eps": 1e-6}


def _rope(inverse: bool) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        i.add(torch.randn(t, H, C), "T")
        _table_rows(i, t)
        return {"inverse": inverse}

    return make


def _head_norm_rope(i: Inputs, t: int) -> dict[str, object]:
    _head_norm(i, t)
    _table_rows(i, t)
    return {"num_heads": H, "eps": 1e-6}


def _split_heads_rope(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, H * C)
    _table_rows(i, t)
    return {"num_heads": H}


def _norm_rope_write(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t + 9, C), "N", role="pool")
    i.add(1 + torch.randperm(t + 8)[:t], "T", role="input")
    _strided(i, t, C)
    i.weight(C)
    _table_rows(i, t)
    return {"eps": 1e-6}


def _page_write(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t + 9, C), "N", role="pool")
    i.add(1 + torch.randperm(t + 8)[:t], "T", role="input")
    _strided(i, t, C)
    return {}


def _linear(exact: bool, channels: int, float32: bool = False) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        _strided(i, t, D)
        i.weight(channels, D, exact=exact)
        return {"float32": float32}

    return make


def _linear_streams(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, N, D), "T")
    i.weight(D, D, exact=True)
    return {"float32": False}


def _grouped_linear(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, H, C), "T")
    i.weight(2 * 48, H * C // 2, exact=True)
    return {"groups": 2}


def _compress(overlap: bool) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        batch = Batch(t)
        channels = 2 * C if overlap else C
        ring = (2 * RATIO if overlap else RATIO) + 3
        _strided(i, t, channels)
        _strided(i, t, channels)
        i.weight(RATIO, channels)
        i.add(torch.randn(batch.num_requests + 1, ring, channels), "Z", role="pool")
        i.add(torch.randn(batch.num_requests + 1, ring, channels), "Z", role="pool")
        i.add(batch.positions, "T", role="input")
        i.add(batch.requests, "T", role="input")
        i.add(batch.starts, "R", role="input")
        i.add(batch.ends, "R", role="input")
        i.add(batch.slots, "R", role="input")
        i.add(batch.completed, "E", role="input")
        return {"ratio": RATIO, "overlap": overlap}

    return make


def _attend(kind: str) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        batch = Batch(t)
        i.add(torch.randn(t, H, C), "T")
        table, pages = batch.table(PAGE)
        i.add(torch.randn(pages * PAGE, C), "N", role="pool")
        i.add(table, "R", "P", role="input")
        attrs: dict[str, object] = {"window": WINDOW, "page": PAGE}
        if kind != "window":
            table, pages = batch.table(ENTRIES * RATIO)
            i.add(torch.randn(pages * ENTRIES, C), "M", role="pool")
            i.add(table, "R", "Q", role="input")
            attrs["entries_per_page"] = ENTRIES
        if kind == "csa":
            seen = (batch.positions + 1) // RATIO
            picks = torch.rand(t, 64).masked_fill(torch.arange(64) >= seen.unsqueeze(1), 2).argsort(-1)[:, :TOPK]
            i.add(picks.masked_fill(torch.arange(TOPK) >= seen.unsqueeze(1), -1), "T")
        if kind == "hca":
            attrs["ratio"] = RATIO
        i.add(batch.requests, "T", role="input")
        i.add(batch.positions, "T", role="input")
        i.add(torch.randn(H), role="weight")
        return attrs

    return make


def _mean_streams(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, N, D), "T")
    return {}


def _extend_tap(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, 2 * D), "T")
    return _mean_streams(i, t)


def _blocks(requests: int) -> Tensor:
    """The first row of each request's block; blocks may come in any order."""
    return torch.randperm(requests) * BLOCK


def _attend_block(i: Inputs, t: int) -> dict[str, object]:
    """`t` requests: one that is new, others with less than a window, and with more."""
    starts = torch.tensor([(0, 1, 17, 24, 70, 103)[r % 6] for r in range(t)], dtype=torch.int64)
    rows = _blocks(t)
    requests = torch.empty(t * BLOCK, dtype=torch.int64)
    requests[(rows.unsqueeze(1) + torch.arange(BLOCK)).flatten()] = torch.arange(t).repeat_interleave(BLOCK)
    columns = -(-128 // PAGE)
    i.add(torch.randn(t * BLOCK, H, C), "T")
    i.add(torch.randn((1 + t * columns) * PAGE, C), "N", role="pool")
    i.add(1 + torch.randperm(t * columns).view(t, columns), "R", "P", role="input")
    i.add(torch.randn(t * BLOCK, C), "T")
    i.add(requests, "T", role="input")
    i.add(starts[requests] + torch.arange(BLOCK).repeat(t), "T", role="input")
    i.add(rows, "R", role="input")
    i.add(torch.randn(H), role="weight")
    return {"window": WINDOW, "page": PAGE, "block": BLOCK}


def _markov_draft(exact: bool) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        i.add(torch.randn(t * BLOCK, VOCAB), "T")
        i.add(torch.randn(t * BLOCK, D), "T")
        i.add(torch.randint(0, VOCAB, (t * BLOCK,)), "T", role="input")
        i.add(_blocks(t), "R", role="input")
        i.weight(VOCAB, RANK, exact=exact)
        i.weight(VOCAB, RANK, exact=exact)
        i.weight(1, D + RANK)
        return {"block": BLOCK}

    return make


def _index_topk(i: Inputs, t: int) -> dict[str, object]:
    batch = Batch(t)
    i.add(torch.randn(t, H, C), "T")
    _strided(i, t, H)
    table, pages = batch.table(ENTRIES * RATIO)
    i.add(torch.randn(pages * ENTRIES, C), "N", role="pool")
    i.add(table, "R", "P", role="input")
    i.add(batch.requests, "T", role="input")
    i.add(batch.positions, "T", role="input")
    return {"ratio": RATIO, "entries_per_page": ENTRIES, "topk": TOPK}


def _gate_bias(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, EXPERTS)
    i.add(torch.randn(EXPERTS) * 0.1, role="weight")
    return {"topk": PICKED, "scaling": 1.5}


def _gate_hash(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, EXPERTS)
    i.add(torch.randint(0, VOCAB, (t,)), "T", role="input")
    i.add(torch.rand(VOCAB, EXPERTS).argsort(-1)[:, :PICKED].contiguous(), role="weight")
    return {"scaling": 1.5}


def _swiglu(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, INNER)
    _strided(i, t, INNER)
    return {"limit": 1.0}


def _swiglu_pair(i: Inputs, t: int) -> dict[str, object]:
    _strided(i, t, 2 * INNER)
    return {"limit": 1.0}


def _experts(exact: bool) -> Make:
    def make(i: Inputs, t: int) -> dict[str, object]:
        i.add(torch.randn(t, D), "T")
        i.add(torch.rand(t, EXPERTS).argsort(-1)[:, :PICKED].contiguous(), "T")
        i.add(torch.rand(t, PICKED), "T")
        for shape in ((EXPERTS, INNER, D), (EXPERTS, INNER, D), (EXPERTS, D, INNER)):
            i.weight(*shape, exact=exact)
        i.add(torch.randn(t, D), "T")
        return {"limit": 1.0}

    return make


def _add_embedding(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, D), "T")
    i.add(torch.randn(t, N, D), "T")
    return {}


def _quantise_kv(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, C), "T")
    return {"rope_dim": R, "group": 16}


def _quantise_index(i: Inputs, t: int) -> dict[str, object]:
    i.add(torch.randn(t, H, C), "T")
    return {"group": 32}


CASES: dict[str, tuple[str, Make]] = {
    "embed": ("embed", _embed),
    "embed_streams": ("embed_streams", _embed_streams),
    "take_rows": ("take_rows", _take_rows),
    "rope_table": ("rope_table", _rope_table),
    "entry_rope_table": ("entry_rope_table", _entry_rope_table),
    "token_slots": ("token_slots", _token_slots),
    "entry_slots": ("entry_slots", _entry_slots),
    "hc_pre": ("hc_pre", _hc_pre),
    "hc_post": ("hc_post", _hc_post),
    "hc_head": ("hc_head", _hc_head),
    "hc_pre_norm": ("hc_pre_norm", _hc_pre_norm),
    "hc_post_pre_norm": ("hc_post_pre_norm", _hc_post_pre_norm),
    "hc_head_norm": ("hc_head_norm", _hc_head_norm),
    "rms_norm": ("rms_norm", _rms_norm),
    "head_norm": ("head_norm", _head_norm),
    "rope": ("rope", _rope(False)),
    "rope-inverse": ("rope", _rope(True)),
    "head_norm_rope": ("head_norm_rope", _head_norm_rope),
    "split_heads_rope": ("split_heads_rope", _split_heads_rope),
    "norm_rope_write": ("norm_rope_write", _norm_rope_write),
    "page_write": ("page_write", _page_write),
    "linear-bfloat16": ("linear", _linear(True, 96)),
    "linear-float32": ("linear", _linear(False, 80, True)),
    "linear-streams": ("linear", _linear_streams),
    "linear-odd": ("linear", _linear(False, 37)),
    "grouped_linear": ("grouped_linear", _grouped_linear),
    "compress-csa": ("compress", _compress(True)),
    "compress-hca": ("compress", _compress(False)),
    "attend_window": ("attend_window", _attend("window")),
    "attend_csa": ("attend_csa", _attend("csa")),
    "attend_hca": ("attend_hca", _attend("hca")),
    "mean_streams": ("mean_streams", _mean_streams),
    "extend_tap": ("extend_tap", _extend_tap),
    "attend_block": ("attend_block", _attend_block),
    "markov_draft-bfloat16": ("markov_draft", _markov_draft(True)),
    "markov_draft-float32": ("markov_draft", _markov_draft(False)),
    "index_topk": ("index_topk", _index_topk),
    "gate_bias": ("gate_bias", _gate_bias),
    "gate_hash": ("gate_hash", _gate_hash),
    "swiglu": ("swiglu", _swiglu),
    "swiglu_pair": ("swiglu_pair", _swiglu_pair),
    "experts-bfloat16": ("experts", _experts(True)),
    "experts-float32": ("experts", _experts(False)),
    "add_embedding": ("add_embedding", _add_embedding),
    "quantise_kv": ("quantise_kv", _quantise_kv),
    "quantise_index": ("quantise_index", _quantise_index),
}


def make_case(name: str, tokens: int, seed: int = 0) -> Case:
    """The case `name` for a batch of `tokens` rows. Its node does not depend on `tokens`."""
    torch.manual_seed(1000 * seed + tokens)
    op_name, make = CASES[name]
    op = OPS[op_name]
    example = Inputs()
    attrs = make(example, 9)  # enough rows for every stride to show
    inputs = Inputs()
    make(inputs, tokens)
    meta = [t.to("meta") for t in example.tensors]
    with torch.no_grad():
        results = op.reference(*example.tensors, **attrs)
    results = results if isinstance(results, tuple) else (results,)
    written = [r for i, r in enumerate(results) if i not in op.in_place]
    del meta
    outputs = tuple(_output(r, example) for r in written)
    mutates = tuple(sorted(op.parameters.index(p) for p in op.in_place.values()))
    return Case(OpNode(op_name, attrs, tuple(example.values), outputs, mutates), inputs.tensors)


def _output(result: Tensor, example: Inputs) -> Value:
    """Its leading size is the symbol whose value in the example it equals."""
    sizes = {
        t.shape[0]: v.shape[0]
        for t, v in reversed(list(zip(example.tensors, example.values, strict=True)))
        if isinstance(v.shape[0], str)
    }
    return Value((sizes[result.shape[0]], *result.shape[1:]), str(result.dtype).removeprefix("torch."))
