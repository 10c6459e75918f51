"""How fast state moves between two engines, and how much of it is hidden behind the prefill.

usage: python benchmarks/transfer.py [--rows FILE] bandwidth
       python benchmarks/transfer.py [--rows FILE] overlap ARTIFACT [--delay-us N] [--link-mbps N]

bandwidth  a pull of whole requests, with the pages of the first 20 layers of `flash`, from another process through
           shared memory and from another engine of this process; beside it, in turns, one memcpy of as many bytes from
           the same memory, and the copies of the pull alone, without its ledger, threads and proofs. Pages either
           follow each other, or lie scattered on both sides
overlap    nano, prefilled in one process and decoded in this one; every token of a step takes `--delay-us` longer, and
           bytes come over a link of `--link-mbps` (0: as fast as they do). From the end of the prefill to the first
           token that is decoded: with the pull beside the prefill, and, to compare, with a pull that begins at its end
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4c.artifact import KVGroup, Pool, StateGroup, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import DTYPE_BYTES, PoolSizes, ceil_div
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.transfer.backend import DONE, Backend
from dsv4c.runtime.transfer.connector import Connector, Pull
from dsv4c.runtime.transfer.handle import Handle, tokens_sha256
from dsv4c.runtime.transfer.layout import Int64Array, Layout, Ranges
from dsv4c.runtime.transfer.leases import Leases
from dsv4c.runtime.transfer.ledger import Ledger, row_words
from dsv4c.runtime.transfer.local import Hub, LocalBackend
from dsv4c.runtime.transfer.node import Granted, Node, Prefilled, prefill_params
from dsv4c.runtime.transfer.pull import Place, PullSteps
from dsv4c.runtime.transfer.setup import layout_of, make_node, make_segment, shm_node
from dsv4c.runtime.transfer.shm import Segment, ShmBackend

Times = tuple[float, float]
ROUNDS = 21
CONTEXT = 1 << 17
LENGTHS = (2048, 8192, 32768, 131071)


def group(name: str, ratio: int, page: int, horizon: int | None, pools: int, entry: int) -> KVGroup:
    return KVGroup(name, ratio, page, horizon, tuple(Pool(f"{name}.{i}", (entry,), "uint8") for i in range(pools)))


# what `dsv4c compile flash --target sm_90a --num-layers 20` makes
GROUPS = (
    group("window", 1, 64, 128, 20, 584), group("c4", 4, 256, None, 9, 584), group("index", 4, 256, None, 9, 132),
    group("c128", 128, 256, None, 9, 584),
)  # fmt: skip
STATES = (
    StateGroup("compressor_4", tuple(Pool(f"ring_4.{i}", (24, 1024), "float32") for i in range(36))),
    StateGroup("compressor_128", tuple(Pool(f"ring_128.{i}", (144, 512), "float32") for i in range(18)), 128),
)
LAYOUT = Layout(GROUPS, STATES, {"model_sha256": "flash, 20 layers"})
COLUMNS = LAYOUT.columns(CONTEXT)
SIZES = PoolSizes.for_requests(GROUPS, 1, CONTEXT, 4096)


def pools_in(memory: Any) -> dict[str, Tensor]:
    """Pools by name, in this memory or, for None, anywhere."""
    out, at = {}, 0
    counts = [SIZES.pages[g.name] for g in GROUPS for _ in g.pools] + [SIZES.slots for s in STATES for _ in s.pools]
    for name, count, unit in zip(LAYOUT.pools, counts, LAYOUT.unit_bytes.tolist(), strict=True):
        size = count * unit
        part = (
            torch.zeros(size, dtype=torch.uint8)
            if memory is None
            else torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=at)
        )
        out[name] = part.fill_(7).reshape(count, unit)
        at += ceil_div(size, 4096) * 4096
    return out


def pools_bytes() -> int:
    per = [
        SIZES.pages[g.name] * g.entries_per_page * len(g.pools) * int(np.prod(g.pools[0].entry_shape)) for g in GROUPS
    ]
    states = [
        SIZES.slots * len(s.pools) * int(np.prod(s.pools[0].entry_shape)) * DTYPE_BYTES["float32"] for s in STATES
    ]
    return sum(per) + sum(states) + 4096 * len(LAYOUT.pools)


def shuffled(pool: KVPool, seed: int | None) -> KVPool:
    """Its free pages in another order."""
    for of in pool._groups if seed is not None else ():
        np.random.default_rng(seed).shuffle(of.free)
    return pool


class Owner:
    """Requests that were computed: their pages hold anything, their rows of the ledger say so."""

    def __init__(self, ledger: Ledger, seed: int | None) -> None:
        self.pool = shuffled(KVPool(GROUPS, SIZES), seed)
        self.leases = Leases(ledger, self.pool)

    def kept(self, tokens: int) -> tuple[int, int]:
        """Row and lease of a request of so many tokens, the only one."""
        for request_id in self.leases.ids():
            lease = self.leases.of(request_id)
            assert lease is not None
            self.leases.free(lease)
            self.pool.release(lease.request.slot)
        request = Request("r", np.zeros(tokens, np.int64), SamplingParams(max_tokens=1))
        slot = self.pool.admit()
        assert slot is not None
        request.slot = slot
        self.pool.open(slot, tokens)
        assert self.pool.grow(slot, tokens)
        self.leases.admitted(request)
        self.leases.ended(request, True)
        lease = self.leases.of("r")
        assert lease is not None
        return lease.row, lease.number


def shm_owner(pipe: Connection, folder: str, seed: int | None) -> None:
    """The other process: makes requests of the lengths that it is asked for."""
    segment = Segment.create(pools_bytes(), SIZES.slots, COLUMNS, Path(folder))
    pools = pools_in(segment.memory)
    ledger = Ledger(segment.words, COLUMNS)
    owner = Owner(ledger, seed)
    backend = ShmBackend(segment, LAYOUT, pools, ledger, Path(folder))
    pipe.send((backend.peer_id, backend.describe()))
    while (tokens := pipe.recv()) is not None:
        pipe.send(owner.kept(tokens))
    backend.close()


def place_in(pool: KVPool, tokens: int) -> Place:
    slot = pool.admit()
    assert slot is not None
    pool.open(slot, tokens)
    assert pool.grow(slot, tokens)
    return Place(slot, 0, tokens, pool.columns_of(slot))


def bandwidth(backend: str, scattered: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        seeds = (1, 2) if scattered else (None, None)
        hub, ledger = Hub(), Ledger(np.zeros((SIZES.slots, row_words(COLUMNS)), np.int64), COLUMNS)
        if backend == "shm":
            context = multiprocessing.get_context("spawn")
            pipe, other = context.Pipe()
            process = context.Process(target=shm_owner, args=(other, folder, seeds[0]), daemon=True)
            process.start()
            peer_id, at = pipe.recv()

            def kept(tokens: int) -> tuple[int, int]:
                pipe.send(tokens)
                found: tuple[int, int] = pipe.recv()
                return found

            segment = Segment.create(pools_bytes(), SIZES.slots, COLUMNS, Path(folder))
            own: Backend = ShmBackend(segment, LAYOUT, pools_in(segment.memory), ledger, Path(folder))
        else:
            owner = Owner(ledger, seeds[0])
            theirs = LocalBackend(hub, LAYOUT, pools_in(None), ledger)
            peer_id, at, kept = theirs.peer_id, theirs.describe(), owner.kept
            own = LocalBackend(hub, LAYOUT, pools_in(None), Ledger(np.zeros_like(ledger.words), COLUMNS))
        connector = Connector(own, LAYOUT, COLUMNS)
        pool = shuffled(KVPool(GROUPS, SIZES), seeds[1])
        for tokens in LENGTHS:
            sha = tokens_sha256(np.zeros(tokens, np.int64))
            place = place_in(pool, tokens)
            pulls: list[Times] = []
            copies: list[Times] = []
            alone: list[Times] = []
            moved = None
            for _ in range(ROUNDS + 1):
                row, lease = kept(tokens)
                handle = Handle(
                    own.kind, peer_id, row, lease, tokens, sha, COLUMNS, LAYOUT.fingerprint, LAYOUT.fields, at
                )
                pull, times = timed(connector, handle, place)
                moved = pull.moved
                pulls.append(times)
                copies.append(memcpy(connector, own, peer_id, moved.bytes))
                alone.append(only_copies(connector, peer_id, place, handle))
            pool.release(place.slot)
            assert moved is not None
            middle = {
                name: [statistics.median(t[i] for t in times[1:]) for i in (0, 1)]
                for name, times in (("pull", pulls), ("memcpy", copies), ("copies", alone))
            }
            rows.append({
                "measures": "bandwidth", "backend": backend, "pages": "scattered" if scattered else "in order",
                "tokens": tokens, "bytes": moved.bytes, "ranges": moved.ranges,
                **{f"{name}_ms": round(both[0] * 1e3, 3) for name, both in middle.items()},
                **{f"{name}_cpu_ms": round(both[1] * 1e3, 3) for name, both in middle.items()},
                "gb_s": round(moved.bytes / middle["pull"][0] / 1e9, 2),
                "to_memcpy": round(middle["memcpy"][0] / middle["pull"][0], 3),
                "to_memcpy_cpu": round(middle["memcpy"][1] / middle["pull"][1], 3),
                "to_copies": round(middle["copies"][0] / middle["pull"][0], 3),
                "to_copies_cpu": round(middle["copies"][1] / middle["pull"][1], 3),
                "first_pull_ms": round(pulls[0][0] * 1e3, 3), "load": round(os.getloadavg()[0], 1),
            })  # fmt: skip
            say(rows[-1])
        connector.close()
        if backend == "shm":
            pipe.send(None)
            process.join()
    return rows


def timed(connector: Connector, handle: Handle, place: Place) -> tuple[Pull, Times]:
    over = threading.Event()
    began = clocks()
    pull = connector.pull(handle, place, lambda pull: over.set(), lambda pull: None)
    over.wait()
    times = since(began)
    assert pull.error is None, pull.error
    return pull, times


def clocks() -> Times:
    """Seconds on the wall's clock, and those that this process has computed: what a busy machine adds to the former."""
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    now = clocks()
    return now[0] - began[0], now[1] - began[1]


def only_copies(connector: Connector, peer_id: str, place: Place, handle: Handle) -> Times:
    """For the same copies, made one after the other."""
    peer = connector._peers[peer_id]
    made: list[Ranges] = []

    class Noting:
        """The peer, whose reads are noted and not made."""

        words, release, check, close = peer.words, peer.release, peer.check, peer.close

        def read(self, ranges: Ranges) -> Any:
            made.append(ranges)
            return DONE

    for step in PullSteps(LAYOUT, handle, place, Noting()).run():
        assert step is not None
    began = clocks()
    for ranges in made:
        peer.read(ranges)
    return since(began)


def memcpy(connector: Connector, own: Backend, peer_id: str, nbytes: int) -> Times:
    """For as many bytes from the peer's pools to our own, from the first on: what the machine does at best."""
    peer: Any = connector._peers[peer_id]
    copy = peer._copy if isinstance(own, ShmBackend) else peer._host
    sources, targets, room = copy._from.tolist(), copy._to.tolist(), copy._sizes[0].tolist()
    began = clocks()
    for source, target, size in zip(sources, targets, room, strict=True):
        part = min(size, nbytes)
        ctypes.memmove(target, source, part)
        nbytes -= part
    assert not nbytes
    return since(began)


# overlap


class Slowed(ArtifactExecutor):
    """Every token of a step takes longer, spread over the step's marks, so that layers do."""

    delay_s = 0.0
    marks = 1

    def step(self, inputs: Mapping[str, Tensor], on_mark: Callable[[int], None] | None = None) -> Tensor:
        pause = self.delay_s * inputs["token_ids"].shape[0]
        if on_mark is None:
            time.sleep(pause)
            return super().step(inputs)

        def mark(number: int) -> None:
            time.sleep(pause / self.marks)
            on_mark(number)

        return super().step(inputs, mark)


class Link:
    """A backend behind a link of so many bytes a second."""

    def __init__(self, of: Backend, rate: float) -> None:
        self.of, self.rate, self.free_s = of, rate, 0.0
        self.kind, self.peer_id, self.released_poll_s = of.kind, of.peer_id, of.released_poll_s
        self.describe, self.poll_released, self.close = of.describe, of.poll_released, of.close

    def open(self, description: Mapping[str, Any]) -> LinkPeer:
        return LinkPeer(self, self.of.open(description))


class LinkPeer:
    def __init__(self, link: Link, of: Any) -> None:
        self.link, self.of = link, of
        self.words, self.release, self.check, self.close = of.words, of.release, of.check, of.close

    def read(self, ranges: Ranges) -> Arriving:
        self.of.read(ranges)
        link = self.link
        link.free_s = max(link.free_s, time.monotonic()) + (ranges.total_bytes / link.rate if link.rate else 0.0)
        return Arriving(link.free_s)


class Arriving:
    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def poll(self) -> bool:
        return time.monotonic() >= self.at_s


def nano_node(artifact: Path, folder: Path, chunk: int, delay_us: float, rate: float) -> Node:
    manifest = load_manifest(artifact)
    context = manifest.max_context
    sizes = PoolSizes.for_requests(manifest.kv_groups, 2, context, manifest.programs["step"].symbols["T"])
    segment = make_segment(manifest, sizes, folder)
    source = Checkpoint(artifact / "weights")
    executor = load(artifact, source, sizes, manifest=manifest, memory=segment.memory, make=Slowed)
    assert isinstance(executor, Slowed)
    layout = layout_of(manifest)
    executor.delay_s, executor.marks = delay_us / 1e6, max(1, len(layout.marks))
    limits = Limits(2, max_step_tokens=chunk, prefix_cache=False)
    engine = Engine.for_manifest(executor, manifest, sizes, limits=limits)
    if not rate:
        return shm_node(engine, manifest, executor.states, segment, folder=folder)

    def make(layout: Layout, ledger: Ledger) -> Backend:
        return Link(ShmBackend(segment, layout, executor.states, ledger, folder), rate)

    words: Int64Array = segment.words
    return make_node(engine, layout, make, words=words)


def prefill_worker(pipe: Connection, artifact: str, folder: str, chunk: int, delay_us: float) -> None:
    torch.set_num_threads(1)
    node = nano_node(Path(artifact), Path(folder), chunk, delay_us, 0).start()
    pipe.send("ready")

    def hears(said: Granted | Prefilled | Event) -> None:
        now = time.perf_counter()
        if isinstance(said, Granted):
            pipe.send(said.handle)
        else:
            assert isinstance(said, Prefilled)
            pipe.send((said.tokens, now))

    while (asked := pipe.recv()) is not None:
        request_id, prompt = asked
        params = prefill_params(SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=4))
        node.prefill(Request(request_id, prompt, params, keep=True), hears)
    node.close(drain=False)


def overlap(artifact: Path, delay_us: float, link_mbps: float) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows, chunk = [], 256
    context = load_manifest(artifact).max_context
    lengths = [n for n in range(chunk, 8 * chunk, chunk) if n + 8 < context]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        spawned = multiprocessing.get_context("spawn")
        pipe, other = spawned.Pipe()
        process = spawned.Process(
            target=prefill_worker, args=(other, str(artifact), folder, chunk, delay_us), daemon=True
        )
        process.start()
        node = nano_node(artifact, Path(folder), chunk, 0, link_mbps * 1e6).start()
        assert pipe.recv() == "ready"
        found: dict[tuple[bool, int], list[tuple[float, float]]] = {}
        early = {}
        for turn in range(ROUNDS + 1):
            for beside in (True, False):
                for n in lengths:
                    before = node.stats().transfer
                    firsts = once(node, pipe, f"{turn}-{beside}-{n}", np.arange(n) % 97 + turn, beside)
                    after = node.stats().transfer
                    early[beside, n] = (
                        after.early_bytes - before.early_bytes,
                        after.pulled_bytes - before.pulled_bytes,
                    )
                    if turn:
                        found.setdefault((beside, n), []).append(firsts)
        pipe.send(None)
        process.join()
        node.close()
    for (beside, n), times in found.items():
        rows.append({
            "measures": "overlap", "backend": "shm", "artifact": artifact.name, "delay_us_per_token": delay_us,
            "link_mb_s": link_mbps, "chunk": chunk, "pull": "beside the prefill" if beside else "after it", "tokens": n,
            "bytes": early[beside, n][1], "early_bytes": early[beside, n][0],
            "first_token_ms": round(statistics.median(t[0] for t in times) * 1e3, 2),
            "decoded_token_ms": round(statistics.median(t[1] for t in times) * 1e3, 2),
            "load": round(os.getloadavg()[0], 1),
        })  # fmt: skip
        say(rows[-1])
    for beside in (True, False):
        ends = [statistics.median(t[1] for t in found[beside, n]) for n in lengths]
        print(f"pull {'beside the prefill' if beside else 'after it'}: longest to shortest {max(ends) / min(ends):.2f}")
    return rows


def once(node: Node, pipe: Connection, request_id: str, prompt: np.ndarray, beside: bool) -> tuple[float, float]:
    """Seconds from the prefill's end to the first token's event here, and to that of the first decoded one."""
    stamps: list[float] = []
    over = threading.Event()

    def sink(event: Event) -> None:
        stamps.extend(time.perf_counter() for _ in event.tokens)
        if event.end is not None:
            assert event.end.error is None
            over.set()

    request = Request(request_id, prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=4))
    pipe.send((request_id, prompt))
    handle = pipe.recv()
    if beside:
        node.decode(request, handle, sink)
        tokens, ended = pipe.recv()
        node.prefilled(request_id, Prefilled(tokens))
    else:
        tokens, ended = pipe.recv()
        node.decode(request, handle, sink, first=Prefilled(tokens))
    over.wait()
    assert not node.stats().recomputed
    return stamps[0] - ended, stamps[1] - ended


def say(row: dict[str, Any]) -> None:
    print(" ".join(f"{key}={value}" for key, value in row.items() if key != "measures"), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bandwidth")
    second = commands.add_parser("overlap")
    second.add_argument("artifact", type=Path)
    second.add_argument("--delay-us", type=float, default=100.0)
    second.add_argument("--link-mbps", type=float, default=0.0)
    args = parser.parse_args()
    if args.command == "overlap":
        rows = overlap(args.artifact, args.delay_us, args.link_mbps)
    else:
        rows = [row for kind in ("shm", "local") for order in (False, True) for row in bandwidth(kind, order)]
    if args.rows:
        with args.rows.open("a") as file:
            file.writelines(json.dumps({"date": datetime.date.today().isoformat(), **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
