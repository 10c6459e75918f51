"""How an engine becomes a node: the layout of its artifact, memory that peers can reach, and what goes on top.

segment = make_segment(manifest, sizes)                        shm: before loading
executor = load(directory, source, sizes, memory=segment.memory)
engine = Engine.for_manifest(executor, manifest, sizes)
node = shm_node(engine, manifest, executor.states, segment).start()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from dsv4c.artifact import Manifest
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.marks import marks_of
from dsv4c.runtime.pools import pool_layout
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.transfer.backend import Backend
from dsv4c.runtime.transfer.connector import Connector
from dsv4c.runtime.transfer.layout import Int64Array, Layout
from dsv4c.runtime.transfer.leases import Leases
from dsv4c.runtime.transfer.ledger import Ledger, row_words
from dsv4c.runtime.transfer.local import Hub, LocalBackend
from dsv4c.runtime.transfer.node import Node
from dsv4c.runtime.transfer.shm import FOLDER, Segment, ShmBackend, remove_left_over


def layout_of(manifest: Manifest, extra: Mapping[str, str] | None = None) -> Layout:
    """The artifact's layout, with its program's marks if it is run call by call: graphs on a GPU say nothing midway."""
    pools = [p.name for group in manifest.kv_groups for p in group.pools]
    pools += [p.name for states in manifest.state_groups for p in states.pools]
    marks = marks_of(manifest.programs["step"], pools) if manifest.target == "cpu" else ()
    return Layout.of(manifest, marks, extra)


def make_segment(manifest: Manifest, sizes: PoolSizes, folder: Path = FOLDER) -> Segment:
    """Shared memory for an engine's pools and its leases; removes what workers before have left behind, first.

    Raises ConfigError if there is not as much.
    """
    remove_left_over(folder)
    columns = layout_of(manifest).columns(sizes.max_context)
    return Segment.create(pool_layout(manifest, sizes).total_bytes, sizes.slots, columns, folder)


def make_node(
    engine: Engine,
    layout: Layout,
    make: Callable[[Layout, Ledger], Backend],
    *,
    words: Int64Array | None = None,
    ttl_s: float = 30.0,
    deadline_s: float = 10.0,
) -> Node:
    """A node over any backend. `words`: where the ledger is to lie, if that is for the backend to say."""
    sizes = engine.pool.sizes
    columns = layout.columns(sizes.max_context)
    if words is None:
        words = np.zeros((sizes.slots, row_words(columns)), np.int64)
    ledger = Ledger(words, columns)
    connector = Connector(make(layout, ledger), layout, columns, deadline_s=deadline_s)
    return Node(engine, connector, Leases(ledger, engine.pool, lag=engine.runner.lag), ttl_s=ttl_s)


def shm_node(
    engine: Engine,
    manifest: Manifest,
    pools: Mapping[str, Tensor],
    segment: Segment,
    *,
    extra: Mapping[str, str] | None = None,
    ttl_s: float = 30.0,
    deadline_s: float = 10.0,
    folder: Path = FOLDER,
) -> Node:
    """A node whose pools lie in its segment, which it closes."""

    def make(layout: Layout, ledger: Ledger) -> Backend:
        return ShmBackend(segment, layout, pools, ledger, folder)

    layout = layout_of(manifest, extra)
    return make_node(engine, layout, make, words=segment.words, ttl_s=ttl_s, deadline_s=deadline_s)


def local_node(
    engine: Engine,
    manifest: Manifest,
    pools: Mapping[str, Tensor],
    hub: Hub,
    *,
    extra: Mapping[str, str] | None = None,
    ttl_s: float = 30.0,
    deadline_s: float = 10.0,
) -> Node:
    """A node among others of this process."""

    def make(layout: Layout, ledger: Ledger) -> Backend:
        return LocalBackend(hub, layout, pools, ledger)

    return make_node(engine, layout_of(manifest, extra), make, ttl_s=ttl_s, deadline_s=deadline_s)
