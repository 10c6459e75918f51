"""A stand-in for the artifact executor whose next token depends on everything it can see, read through the pools.

It writes token ids into the window pools, completes c4, index and c128 entries from a ring of recent tokens in the
state slot, and hashes all a query sees (windowed for the window group, completed entries for the others) into its
logits. Any mistake in page tables, eviction, window ends, state slots, chunking or positions changes its tokens, and so
does resuming with a page or a ring row that is not the request's. `direct_logits` computes the same from the list of
tokens alone. `wide` is the ratio of the group c128, for tests with blocks of a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from dsv4c.artifact import Input, KVGroup, Pool, StateGroup
from dsv4c.runtime.drafts import Drafter
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import PoolSizes, snapshot_states
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import Speculation
from tests.runtime.lagged import LaggedRunner

VOCAB = 61
HORIZON = 128
SPARE_ROWS = 16  # of a ring, where steps verify drafts
C4_RING = 8  # rows: an entry of c4 pools its own window of 4 tokens and the one before
C4_SALT, WIDE_SALT = 4, 128


def kv_groups(window_page: int = 64, block: int = 256, horizon: int = HORIZON, wide: int = 128) -> tuple[KVGroup, ...]:
    """The four groups of the real manifest."""
    pool = (Pool("p", (1,), "float32"),)
    return (
        KVGroup("window", 1, window_page, horizon, pool),
        KVGroup("c4", 4, block, None, pool),
        KVGroup("c128", wide, block, None, pool),
        KVGroup("index", 4, block, None, pool),
    )


def state_groups(wide: int = 128) -> tuple[StateGroup, ...]:
    """The rings, as the real manifest groups them."""
    return (
        StateGroup("compressor_4", (Pool("c4", (C4_RING,), "int64"),)),
        StateGroup("compressor_128", (Pool("c128", (wide,), "int64"),), empty_every=wide),
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


_PLACES = _mix(np.arange(1, 1 << 16, dtype=_U))
_WORDS = np.arange(VOCAB, dtype=_U) * _U(0x9E3779B97F4A7C15)


def _digests(values: np.ndarray, salt: int) -> np.ndarray:
    """An order-dependent hash of each row of numbers."""
    places = _PLACES[: values.shape[1]]
    return _mix((_mix(values.astype(_U) + _U(salt)) * places).sum(1, dtype=_U) + _U(salt))


def _entries(tokens: np.ndarray, salt: int) -> np.ndarray:
    """Compressed entries: a hash of each row of tokens that one is pooled from, small enough for int64."""
    return (_digests(tokens, salt) >> _U(2)).astype(np.int64)


def _logits(parts: Sequence[np.ndarray], position: int) -> np.ndarray:
    seen = np.concatenate([_digests(p[None], 7 + i) for i, p in enumerate(parts)])
    key = _digests(seen[None], position)[0]
    bits = _mix(_WORDS + key)
    return (bits >> _U(40)).astype(np.float32) / np.float32(2**24) * np.float32(8) - np.float32(4)


def direct_logits(tokens: Sequence[int], horizon: int = HORIZON, wide: int = 128) -> np.ndarray:
    """Logits [vocab] after these tokens, without any pool."""
    t = np.asarray(tokens, dtype=np.int64)
    padded = np.concatenate([np.full(4, -1), t])  # the first window has no predecessor
    starts = np.arange(t.size // 4)[:, None] * 4
    c4 = _entries(padded[starts + np.arange(C4_RING)], C4_SALT)
    c128 = _entries(t[: t.size // wide * wide].reshape(-1, wide), WIDE_SALT)
    parts = [t[max(0, t.size - horizon) :], c4, c4 ^ 5, c128]
    return _logits(parts, t.size - 1)


def direct_greedy(prompt: Sequence[int], count: int, horizon: int = HORIZON, wide: int = 128) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(direct_logits(tokens, horizon, wide).argmax()))
    return tokens[len(prompt) :]


class StandIn:
    """Executor over numpy pools. `fail_at`: numbers of steps that raise; `log`: shapes of the steps it ran.

    `spare_rows`: of the rings, so that rejected tokens overwrite nothing that is still wanted.
    """

    def __init__(
        self, groups: Sequence[KVGroup], sizes: PoolSizes, horizon: int = HORIZON, spare_rows: int = 0
    ) -> None:
        self.groups = {g.name: g for g in groups}
        self.pools = {g.name: np.full(sizes.pages[g.name] * g.entries_per_page, 10**9, np.int64) for g in groups}
        self.wide = self.groups["c128"].tokens_per_entry
        self.rings = {
            "c4": np.full((sizes.slots + sizes.snapshots, C4_RING + spare_rows), 10**9, np.int64),
            "c128": np.full((sizes.slots, self.wide + spare_rows), 10**9, np.int64),
        }
        self.states = {name: torch.from_numpy(ring) for name, ring in self.rings.items()}
        self.horizon = horizon
        self.steps = 0
        self.fail_at: set[int] = set()
        self.fail_with: Exception = RuntimeError("kernel exploded")
        self.log: list[dict[str, tuple[int, ...]]] = []

    def _rows(
        self, inputs: Mapping[str, np.ndarray], group: str, row: int | np.ndarray, entries: np.ndarray
    ) -> np.ndarray:
        """Pool rows of these entries of batch request `row`."""
        per = self.groups[group].entries_per_page
        pages = inputs[f"pages_{group}"][row, entries // per]
        assert (pages > 0).all(), f"{group}: an entry on the null page"
        return pages * per + entries % per

    def _pooled(self, a: Mapping[str, np.ndarray], ring: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
        """[E, width] tokens that the entries completed in batch rows `ends` pool: of this step, or from the ring."""
        back = np.arange(width - 1, -1, -1)
        request = a["request_rows"][ends][:, None]
        position = a["positions"][ends][:, None] - back
        fresh = position >= a["seq_starts"][request]
        found = np.where(
            fresh,
            a["token_ids"][np.maximum(ends[:, None] - back, 0)],
            ring[a["state_slots"][request], position % ring.shape[1]],
        )
        return np.where(position < 0, -1, found)

    def step(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert set(inputs) == {i.name for i in INPUTS}
        assert all(x.dtype == torch.int64 for x in inputs.values())
        self.steps += 1
        self.log.append({k: tuple(v.shape) for k, v in inputs.items()})
        if self.steps in self.fail_at:
            raise self.fail_with
        a = {k: v.numpy() for k, v in inputs.items()}
        rows, positions = a["request_rows"], a["positions"]
        slots = a["state_slots"][rows]
        assert (slots > 0).all()
        assert (a["seq_starts"][rows] <= positions).all() and (positions < a["seq_ends"][rows]).all()
        self.pools["window"][self._rows(a, "window", rows, positions)] = a["token_ids"]
        of4, of128 = a["ends_4"], a["ends_128"]
        c4 = _entries(self._pooled(a, self.rings["c4"], of4, C4_RING), C4_SALT)
        self.pools["c4"][self._rows(a, "c4", rows[of4], positions[of4] // 4)] = c4
        self.pools["index"][self._rows(a, "index", rows[of4], positions[of4] // 4)] = c4 ^ 5
        c128 = _entries(self._pooled(a, self.rings["c128"], of128, self.wide), WIDE_SALT)
        self.pools["c128"][self._rows(a, "c128", rows[of128], positions[of128] // self.wide)] = c128
        for ring in self.rings.values():
            kept = positions >= a["seq_ends"][rows] - ring.shape[1]
            ring[slots[kept], positions[kept] % ring.shape[1]] = a["token_ids"][kept]
        out = np.zeros((a["logit_rows"].size, VOCAB), np.float32)
        for i, t in enumerate(a["logit_rows"].tolist()):
            row, p = int(rows[t]), int(positions[t])
            seen = {
                "window": np.arange(max(0, p + 1 - self.horizon), p + 1),
                "c4": np.arange((p + 1) // 4),
                "index": np.arange((p + 1) // 4),
                "c128": np.arange((p + 1) // self.wide),
            }
            out[i] = _logits([self.pools[g][self._rows(a, g, row, e)] for g, e in seen.items()], p)
        return torch.from_numpy(out)


def make_engine(
    sizes: PoolSizes | None = None,
    limits: Limits | None = None,
    groups: tuple[KVGroup, ...] | None = None,
    eos: Sequence[int] = (),
    horizon: int = HORIZON,
    lag: int = 0,
    drafter: Drafter | None = None,
    speculation: Speculation | None = None,
) -> tuple[Engine, StandIn]:
    """An engine over a stand-in; by default 33 slots, 1024 tokens of context and pages for all, and no lag.

    With a drafter, as many drafts as `limits` says, always, unless `speculation` says otherwise.
    """
    groups = groups or kv_groups(horizon=horizon)
    limits = limits or Limits(max_requests=32, max_step_tokens=256)
    sizes = sizes or PoolSizes.for_requests(groups, 32, 1024, limits.max_step_tokens)
    standin = StandIn(groups, sizes, horizon, SPARE_ROWS if drafter else 0)
    pool = KVPool(groups, sizes)
    make_runner = (HostRunner, LaggedRunner)[lag]
    inputs = [replace(i, ratio=standin.wide) if i.name == "ends_128" else i for i in INPUTS]
    states = [p.name for group in snapshot_states(state_groups(standin.wide), groups) for p in group.pools]
    runner = make_runner(standin, inputs, pool, vocab_size=VOCAB, states=states, drafter=drafter)
    speculation = speculation or Speculation(limits.speculative_tokens, fixed=True)
    engine = Engine(runner, pool=pool, vocab_size=VOCAB, limits=limits, eos_token_ids=eos, speculation=speculation)
    return engine, standin
