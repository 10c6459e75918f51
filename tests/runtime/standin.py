"""A stand-in for the artifact executor whose next token depends on everything it can see, read through the pools.

It writes token ids into the window pools, completes c4, index and c128 entries from a ring of recent tokens in the
state slot, and hashes all a query sees (windowed for the window group, completed entries for the others) into its
logits. Any mistake in page tables, eviction, window ends, state slots, chunking or positions changes its tokens.
`direct_logits` computes the same from the list of tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dsv4c.artifact import Input, KVGroup, Pool
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.scheduler import Limits
from tests.runtime.lagged import LaggedRunner

VOCAB = 61
HORIZON = 128
RING = {"c4": 8, "c128": 128}


def kv_groups(window_page: int = 64, block: int = 256, horizon: int = HORIZON) -> tuple[KVGroup, ...]:
    """The four groups of the real manifest."""
    pool = (Pool("p", (1,), "float32"),)
    return (
        KVGroup("window", 1, window_page, horizon, pool),
        KVGroup("c4", 4, block, None, pool),
        KVGroup("c128", 128, block, None, pool),
        KVGroup("index", 4, block, None, pool),
    )


INPUTS = (
    Input("token_ids", "token_ids", ("T",)),
    Input("positions", "positions", ("T",)),
    Input("request_rows", "request_rows", ("T",)),
    Input("seq_starts", "seq_starts", ("R",)),
    Input("seq_ends", "seq_ends", ("R",)),
    Input("state_slots", "state_slots", ("R",)),
    Input("pages_window", "page_table", ("R", "Pw"), group="window", min_columns=2),
    Input("pages_c4", "page_table", ("R", "P4"), group="c4"),
    Input("pages_c128", "page_table", ("R", "P128"), group="c128"),
    Input("pages_index", "page_table", ("R", "P4"), group="index", min_columns=2),
    Input("ends_4", "window_ends", ("E4",), ratio=4),
    Input("ends_128", "window_ends", ("E128",), ratio=128),
    Input("logit_rows", "logit_rows", ("S",)),
)

_U = np.uint64


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> _U(33))) * _U(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> _U(33))) * _U(0xC4CEB9FE1A85EC53)
    return x ^ (x >> _U(33))


def _digest(values: np.ndarray, salt: int) -> np.uint64:
    """An order-dependent hash of a row of numbers."""
    at = np.arange(1, values.size + 1, dtype=_U)
    return _mix(np.array([(_mix(values.astype(_U) + _U(salt)) * _mix(at)).sum(dtype=_U) + _U(salt)], dtype=_U))[0]


def _entry(tokens: np.ndarray, salt: int) -> int:
    """A compressed entry: a hash of the tokens it is pooled from, small enough for int64."""
    return int(_digest(tokens, salt) >> _U(2))


def _logits(parts: Sequence[np.ndarray], position: int) -> np.ndarray:
    key = _digest(np.array([_digest(p, 7 + i) for i, p in enumerate(parts)], dtype=_U), position)
    bits = _mix(np.arange(VOCAB, dtype=_U) * _U(0x9E3779B97F4A7C15) + key)
    return (bits >> _U(40)).astype(np.float32) / np.float32(2**24) * np.float32(8) - np.float32(4)


def direct_logits(tokens: Sequence[int], horizon: int = HORIZON) -> np.ndarray:
    """Logits [vocab] after these tokens, without any pool."""
    t = np.asarray(tokens, dtype=np.int64)
    padded = np.concatenate([np.full(4, -1), t])  # the first window has no predecessor
    c4 = np.array([_entry(padded[4 * e : 4 * e + 8], 4) for e in range(t.size // 4)], np.int64)
    c128 = np.array([_entry(t[128 * e : 128 * e + 128], 128) for e in range(t.size // 128)], np.int64)
    parts = [t[max(0, t.size - horizon) :], c4, c4 ^ 5, c128]
    return _logits(parts, t.size - 1)


def direct_greedy(prompt: Sequence[int], count: int, horizon: int = HORIZON) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(direct_logits(tokens, horizon).argmax()))
    return tokens[len(prompt) :]


class StandIn:
    """Executor over numpy pools. `fail_at`: numbers of steps that raise; `log`: shapes of the steps it ran."""

    def __init__(self, groups: Sequence[KVGroup], sizes: PoolSizes, horizon: int = HORIZON) -> None:
        self.groups = {g.name: g for g in groups}
        self.pools = {g.name: np.full(sizes.pages[g.name] * g.entries_per_page, 10**9, np.int64) for g in groups}
        self.rings = {name: np.full((sizes.slots, n), 10**9, np.int64) for name, n in RING.items()}
        self.states = {name: torch.from_numpy(ring) for name, ring in self.rings.items()}
        self.horizon = horizon
        self.steps = 0
        self.fail_at: set[int] = set()
        self.fail_with: Exception = RuntimeError("kernel exploded")
        self.log: list[dict[str, tuple[int, ...]]] = []

    def _rows(self, inputs: Mapping[str, np.ndarray], group: str, row: int, entries: np.ndarray) -> np.ndarray:
        per = self.groups[group].entries_per_page
        pages = inputs[f"pages_{group}"][row, entries // per]
        assert (pages > 0).all(), f"{group}: an entry on the null page"
        return pages * per + entries % per

    def step(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert set(inputs) == {i.name for i in INPUTS}
        assert all(x.dtype == torch.int64 for x in inputs.values())
        self.steps += 1
        self.log.append({k: tuple(v.shape) for k, v in inputs.items()})
        if self.steps in self.fail_at:
            raise self.fail_with
        a = {k: v.numpy() for k, v in inputs.items()}
        ends = {4: set(a["ends_4"].tolist()), 128: set(a["ends_128"].tolist())}
        wanted = {row: i for i, row in enumerate(a["logit_rows"].tolist())}
        out = np.zeros((len(wanted), VOCAB), np.float32)
        for t, (token, p, r) in enumerate(zip(a["token_ids"], a["positions"], a["request_rows"], strict=True)):
            slot, p = int(a["state_slots"][r]), int(p)
            assert slot > 0 and a["seq_starts"][r] <= p < a["seq_ends"][r]
            self.pools["window"][self._rows(a, "window", r, np.array([p]))] = token
            for name, ring in self.rings.items():
                ring[slot, p % RING[name]] = token
            if t in ends[4]:
                at = np.arange(p - 7, p + 1)
                pooled = np.where(at < 0, -1, self.rings["c4"][slot, at % 8])
                self.pools["c4"][self._rows(a, "c4", r, np.array([p // 4]))] = _entry(pooled, 4)
                self.pools["index"][self._rows(a, "index", r, np.array([p // 4]))] = _entry(pooled, 4) ^ 5
            if t in ends[128]:
                pooled = self.rings["c128"][slot, np.arange(p - 127, p + 1) % 128]
                self.pools["c128"][self._rows(a, "c128", r, np.array([p // 128]))] = _entry(pooled, 128)
            if t in wanted:
                seen = {
                    "window": np.arange(max(0, p + 1 - self.horizon), p + 1),
                    "c4": np.arange((p + 1) // 4),
                    "index": np.arange((p + 1) // 4),
                    "c128": np.arange((p + 1) // 128),
                }
                out[wanted[t]] = _logits([self.pools[g][self._rows(a, g, r, e)] for g, e in seen.items()], p)
        return torch.from_numpy(out)


def make_engine(
    sizes: PoolSizes | None = None,
    limits: Limits | None = None,
    groups: tuple[KVGroup, ...] | None = None,
    eos: Sequence[int] = (),
    horizon: int = HORIZON,
    lag: int = 0,
) -> tuple[Engine, StandIn]:
    """An engine over a stand-in; by default 33 slots, 1024 tokens of context and pages for all, and no lag."""
    groups = groups or kv_groups(horizon=horizon)
    limits = limits or Limits(max_requests=32, max_step_tokens=256)
    sizes = sizes or PoolSizes.for_requests(groups, 32, 1024, limits.max_step_tokens)
    standin = StandIn(groups, sizes, horizon)
    pool = KVPool(groups, sizes)
    make_runner = (HostRunner, LaggedRunner)[lag]
    runner = make_runner(standin, INPUTS, pool, vocab_size=VOCAB, states=tuple(RING))
    return Engine(runner, pool=pool, vocab_size=VOCAB, limits=limits, eos_token_ids=eos), standin
