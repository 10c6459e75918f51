"""The smallest program that samples: logits are rows of a bank by token, so every token depends on the one before.

    feed_tokens -> take_rows (bank) -> take_rows (logit rows) -> edit_logits -> sample_penalised -> keep_tokens

With every input that a real program has; run by references. `HostBank` computes the same logits for a HostRunner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsv4c.artifact import (
    Buffer,
    Call,
    Contract,
    IndexRange,
    Input,
    Kernel,
    KVGroup,
    Manifest,
    Pool,
    Program,
    Segment,
    StateGroup,
)
from dsv4c.compile import sampling_inputs
from dsv4c.ops import OPS

VOCAB = 47
PAGE, BLOCK, HORIZON = 4, 16, 8
OPS_USED = ("feed_tokens", "take_rows", "edit_logits", "sample_penalised", "keep_tokens")


def groups() -> tuple[KVGroup, ...]:
    """Small pages, and a window that requests outgrow."""
    return tuple(
        KVGroup(name, ratio, size, horizon, (Pool(f"{name}.pool", (1,), "uint8"),))
        for name, ratio, size, horizon in (
            ("window", 1, PAGE, HORIZON), ("c4", 4, BLOCK, None), ("c128", 128, 128, None), ("index", 4, BLOCK, None),
        )
    )  # fmt: skip


STATES = (
    StateGroup("sampling", (Pool("sampling.counts", (VOCAB,), "int16"), Pool("sampling.last_tokens", (), "int64")), 1),
)

STEP_INPUTS = (
    Input("token_ids", "token_ids", ("T",)),
    Input("positions", "positions", ("T",)),
    Input("request_rows", "request_rows", ("T",)),
    Input("seq_starts", "seq_starts", ("R",)),
    Input("seq_ends", "seq_ends", ("R",)),
    Input("state_slots", "state_slots", ("R",)),
    Input("pages_window", "page_table", ("R", "P_window"), group="window"),
    Input("pages_c4", "page_table", ("R", "P_c4"), group="c4"),
    Input("pages_c128", "page_table", ("R", "P_c128"), group="c128"),
    Input("pages_index", "page_table", ("R", "P_index"), group="index", min_columns=2),
    Input("ends_4", "window_ends", ("E_4",), ratio=4),
    Input("ends_128", "window_ends", ("E_128",), ratio=128),
    Input("logit_rows", "logit_rows", ("S",)),
)


def _buffers(tokens: int, rows: int, edits: int) -> Iterator[Buffer]:
    at = 0
    for name, shape, dtype, size in (
        ("fed", ("T",), "int64", 8 * tokens), ("all", ("T", VOCAB), "float32", 4 * VOCAB * tokens),
        ("logits", ("S", VOCAB), "float32", 4 * VOCAB * rows), ("replaced", ("M",), "float32", 4 * edits),
        ("tokens", ("S",), "int64", 8 * rows),
    ):  # fmt: skip
        yield Buffer(name, shape, dtype, (VOCAB, 1) if len(shape) == 2 else (1,), at)
        at += -(-size // 256) * 256


def _program(phase: str, tokens: int, rows: int, slots: int) -> Program:
    edits = 512 * rows
    calls = (
        Call("feed_tokens", ("token_ids", "sampling.last_tokens", "request_rows", "fed"), 1, "prelude"),
        Call("take_rows", ("bank", "fed", "all"), 1, "L00.bank"),
        Call("take_rows", ("all", "logit_rows", "logits"), 1, "head"),
        Call("edit_logits", ("logits", "edit_starts", "edit_stops", "edit_tokens", "edit_values", "replaced"), 1,
             "sampling"),
        Call("sample_penalised", ("logits", "temperature", "top_k", "top_p", "min_p", "noise_keys", "noise_counters",
                                  "penalty_seats", "sampling.counts", "repetition", "frequency", "presence",
                                  "mask_rows", "masks", "tokens"),
             1, "sampling"),
        Call("keep_tokens", ("sampling.last_tokens", "token_seats", "tokens"), 0, "sampling"),
    )  # fmt: skip
    contract = Contract(
        ("E_128", "E_4", "G", "M", "T"),
        {},
        (IndexRange("fed", 0, (VOCAB,)), IndexRange("logit_rows", 0, ("T",)), IndexRange("tokens", -1, (VOCAB,))),
    )
    buffers = tuple(_buffers(tokens, rows, edits))
    symbols = {
        "T": tokens, "S": rows, "M": edits, "G": 1 + rows, "E_4": min(tokens, tokens // 4 + rows),
        "E_128": min(tokens, tokens // 128 + rows), "R": slots, "Z": slots,
        "P_window": 64, "P_c4": 16, "P_c128": 2, "P_index": 16,
    }  # fmt: skip
    last = buffers[-1]
    arena = (last.offset or 0) + -(-8 * rows // 256) * 256
    return Program(
        "decode" if phase == "decode" else "prefill", symbols, (*STEP_INPUTS, *sampling_inputs(VOCAB)), buffers,
        (Segment("graph", calls, "", contract),), {n: n for n in ("logits", "tokens", "replaced")}, arena,
    )  # fmt: skip


def manifest(requests: int = 8, tokens: int = 32) -> Manifest:
    """Decode programs for 1, 2, 4 and all requests, prefill programs of 8 and all tokens."""
    decode = {f"decode.{n}": _program("decode", n, n, requests + 1) for n in (1, 2, 4, requests)}
    prefill = {
        f"prefill.{n}.{rows}": _program("prefill", n, rows, requests + 1)
        for n, rows in ((8, 2), (8, 8), (tokens, 2), (tokens, tokens))
    }
    kernels = {
        name: Kernel(name, "gpu", name, f"{name}.none", "a toy", 0.0, "")
        for name in OPS_USED
        if set(OPS[name].attributes) == set()
    }
    return Manifest(
        3, {}, "", "sm_90a", "sm_90a", "float32", 256, VOCAB, {}, (), (), kernels, {**decode, **prefill}, groups(),
        STATES, (), False,
    )  # fmt: skip


def bank(seed: int = 0) -> Tensor:
    """Logits by the token before, with a few close races."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class HostBank:
    """An executor for HostRunner: the bank's rows."""

    def __init__(self, rows: Tensor) -> None:
        self.bank = rows
        self.states: Mapping[str, Tensor] = {}

    def step(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.bank[inputs["token_ids"]][inputs["logit_rows"]]
