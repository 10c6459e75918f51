"""The model's decoding state and the step inputs, without an engine: for tests, training and capture.

`state_shapes` is the one place that says which pools and rings a layer has. `make_step` lays out whole or partial
sequences with a fixed page assignment: request r owns consecutive pages of every group and slot r + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.config import ModelConfig, StateLayout


@dataclass(frozen=True)
class StateTensor:
    """A pool of KV group `group`, or (group None) a compressor's ring with one row a request slot.

    `overlap`: of a ring, that an entry pools the window before its own too.
    """

    name: str
    group: str | None
    entry_shape: tuple[int, ...]
    ratio: int = 0
    overlap: bool = False


def state_tensors(config: ModelConfig, layout: StateLayout) -> list[StateTensor]:
    """All state of the main layers and the MTP block or DSpark stages, in layer order."""
    out: list[StateTensor] = []
    for layer in range(len(config.compress_ratios)):
        main = layer < config.num_hidden_layers
        prefix = f"layers.{layer}." if main else f"mtp.{layer - config.num_hidden_layers}."
        out.append(StateTensor(prefix + "window", "window", (config.head_dim,)))
        ratio = config.compress_ratios[layer]
        if ratio == 0:
            continue
        csa = config.attention_kind(layer) == "csa"
        ring, channels = layout.ring(ratio, csa), config.head_dim * (2 if csa else 1)
        out.append(StateTensor(f"{prefix}c{ratio}", f"c{ratio}", (config.head_dim,), ratio))
        out.append(StateTensor(prefix + "ring_k", None, (ring, channels), ratio, csa))
        out.append(StateTensor(prefix + "ring_z", None, (ring, channels), ratio, csa))
        if csa:
            out.append(StateTensor(prefix + "index", "index", (config.index_head_dim,), ratio))
            out.append(StateTensor(prefix + "index_ring_k", None, (ring, 2 * config.index_head_dim), ratio, csa))
            out.append(StateTensor(prefix + "index_ring_z", None, (ring, 2 * config.index_head_dim), ratio, csa))
    return out


def group_ratios(config: ModelConfig) -> dict[str, int]:
    """KV group -> compression ratio (0 for the window)."""
    groups = {"window": 0}
    for layer in range(config.num_hidden_layers):
        ratio = config.compress_ratios[layer]
        if ratio:
            groups[f"c{ratio}"] = ratio
        if ratio and config.attention_kind(layer) == "csa":
            groups["index"] = ratio
    return groups


def page_tokens(layout: StateLayout, ratio: int) -> int:
    """Tokens that one page of a group of this ratio covers."""
    return layout.window_page if ratio == 0 else layout.block_tokens


def columns(config: ModelConfig, layout: StateLayout, group: str, tokens: int) -> int:
    """Width of a page table for `tokens` tokens."""
    ratio = group_ratios(config)[group]
    return max(min_columns(config, layout, group), math.ceil(tokens / page_tokens(layout, ratio)))


def min_columns(config: ModelConfig, layout: StateLayout, group: str) -> int:
    """Least width of a group's page table: that of the index group holds more than `index_topk` entries."""
    if group != "index":
        return 1
    return config.index_topk // layout.entries_per_page(group_ratios(config)[group]) + 1


def init_state(
    config: ModelConfig,
    layout: StateLayout,
    requests: int,
    tokens: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Zeroed state for `requests` requests of up to `tokens` tokens each, laid out as `make_step` expects."""
    state = {}
    for tensor in state_tensors(config, layout):
        if tensor.group is None:
            state[tensor.name] = torch.zeros(requests + 1, *tensor.entry_shape, device=device)
            continue
        ratio = group_ratios(config)[tensor.group]
        pages = 1 + requests * columns(config, layout, tensor.group, tokens)
        rows = pages * layout.entries_per_page(ratio)
        state[tensor.name] = torch.zeros(rows, *tensor.entry_shape, device=device, dtype=dtype)
    return state


def make_step(
    config: ModelConfig,
    layout: StateLayout,
    spans: Sequence[tuple[int, int, Tensor]],
    tokens: int,
    *,
    logits: str = "all",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Step inputs for `spans` of (request, first position, token ids). `tokens` as given to `init_state`.

    `logits`: `all` rows, or the `last` row of every span.
    """
    lengths = torch.tensor([len(ids) for _, _, ids in spans])
    starts = torch.tensor([start for _, start, _ in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), lengths)
    first = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - first[rows] + starts[rows]
    owner = torch.tensor([request for request, _, _ in spans])
    step = {
        "token_ids": torch.cat([ids.cpu() for _, _, ids in spans]).long(),
        "positions": positions,
        "request_rows": rows,
        "seq_starts": starts,
        "seq_ends": starts + lengths,
        "state_slots": owner + 1,
        "logit_rows": torch.arange(len(rows)) if logits == "all" else first + lengths - 1,
    }
    for group in group_ratios(config):
        width = columns(config, layout, group, tokens)
        step[f"pages_{group}"] = 1 + owner.unsqueeze(1) * width + torch.arange(width)
    for ratio in config.ratios:
        step[f"ends_{ratio}"] = torch.nonzero((positions + 1) % ratio == 0).squeeze(1)
    return {name: value.to(device) for name, value in step.items()}


def make_draft(
    config: ModelConfig,
    layout: StateLayout,
    accepted: Sequence[tuple[int, int, int]],
    tokens: int,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Inputs of a DSpark draft for `accepted` of (request, its position, token id). `tokens` as given to `init_state`.

    Everything before the position must have been absorbed. Adds `block_rows` [R], the first row of every block.
    """
    spark = config.dspark
    assert spark is not None
    noise = [spark.noise_token_id] * (spark.block_size - 1)
    spans = [(request, position, torch.tensor([token, *noise])) for request, position, token in accepted]
    step = make_step(config, layout, spans, tokens, device=device)
    return {**step, "block_rows": torch.arange(len(spans), device=device) * spark.block_size}
