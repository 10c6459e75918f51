"""Prefill on one card, decode on another, and the same two cards each doing both: `flash` layers with dummy weights.

usage: python benchmarks/two_cards.py ARTIFACT [--lengths 4096 32768 100000] [--clients 16 64 128] [--input 2048]
                                      [--output 256] [--seconds 12] [--speculative-tokens 0] [--rows FILE]

Two processes, one a card, each a node with NIXL (VRAM); this process sends requests and hands over what a router would.

    equal        one request at a time, by both ways and by one card alone: the same tokens
    bandwidth    state of a finished prefill, pulled at once; beside it one READ of as many contiguous bytes, and
                 PyTorch's copy between the cards
    served       closed loop of so many clients: tokens a second, time to first token, time between tokens

Clocks: CLOCK_MONOTONIC, which the processes share.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Message = tuple[Any, ...]


# a process with a card


def serve(card: int, options: argparse.Namespace, link: Connection) -> None:
    """A node on a card, driven by messages; everything it says goes back with the request's id first."""
    import torch

    from dsv4c.artifact import load_manifest
    from dsv4c.launch import LaunchOptions, launch_engine
    from dsv4c.runtime.params import SamplingParams
    from dsv4c.runtime.request import Event, Request
    from dsv4c.runtime.transfer.nixl import nixl_node
    from dsv4c.runtime.transfer.node import Granted, Prefilled, prefill_params

    manifest = load_manifest(options.artifact)
    on_cards = manifest.target != "cpu"
    if on_cards:
        torch.cuda.set_device(card)
    engine = launch_engine(
        options.artifact,
        manifest,
        LaunchOptions(
            device=card if on_cards else 0, dummy_seed=0, prefix_cache=False,
            speculative_tokens=options.speculative_tokens, max_requests=options.max_requests,
            gpu_memory_utilization=options.gpu_memory if on_cards else None, threads=None if on_cards else 1,
        ),
    )  # fmt: skip
    node = nixl_node(engine, manifest, engine.runner.executor.states, deadline_s=30.0).start()
    lock = threading.Lock()

    def tell(*message: Any) -> None:
        with lock:
            link.send(message)

    def said(request_id: str, event: Event) -> None:
        error = event.end.error.message if event.end is not None and event.end.error is not None else None
        tell(request_id, "tokens", time.monotonic(), event.tokens, event.end is not None, error)

    def prefilled(request_id: str, found: Granted | Prefilled | Event) -> None:
        if isinstance(found, Granted):
            tell(request_id, "granted", time.monotonic(), found.handle)
        elif isinstance(found, Prefilled):
            tell(request_id, "prefilled", time.monotonic(), found.tokens)
        else:
            said(request_id, found)

    tell("", "ready", card)
    while True:
        kind, *rest = link.recv()
        if kind == "close":
            node.close(drain=False)
            return
        if kind == "stats":
            moved = node.stats()
            tell("", "stats", moved.transfer.pulled, moved.transfer.pulled_bytes, moved.transfer.early_bytes,
                 moved.transfer.pull_s, moved.recomputed, moved.transfer.pulled_ranges)  # fmt: skip
        elif kind == "plain":
            tell("", "plain", *plain_read(node, rest[0], rest[1]))
        elif kind == "describe":
            node._connector.watch(1)  # an owner sees to readers while something is exported
            tell("", "description", node._connector.backend.describe())
        elif kind == "unwatch":
            node._connector.watch(0)
        elif kind == "prefilled":
            node.prefilled(rest[0], Prefilled(tuple(rest[1])))
        else:
            request_id, prompt, params, handle, first = rest
            sampling = SamplingParams(**params)
            if kind == "prefill":
                made = Request(request_id, prompt, prefill_params(sampling), keep=True)
                node.prefill(made, partial(prefilled, request_id))
            else:
                token = None if first is None else Prefilled(tuple(first))
                node.decode(Request(request_id, prompt, sampling), handle, partial(said, request_id), token)


def plain_read(node: Any, description: dict[str, Any], nbytes: int) -> tuple[int, float]:
    """Bytes and seconds of contiguous READs from the largest pool of a peer, one at a time; the best of five."""
    backend, over, found = node._connector.backend, threading.Event(), []

    def measure() -> None:  # in the thread that may touch the agent
        peer = backend.open(description)
        pool = int(np.argmax(backend._sizes))
        size = min(nbytes, int(backend._sizes[pool]))
        for _ in range(5):
            local = np.array([[backend._addresses[pool], size, backend._device]], np.int64)
            remote = np.array([[peer.memory.addresses[pool], size, peer.memory.device]], np.int64)
            began = time.perf_counter()
            handle, done = backend.begin(peer, "pools", local, remote)
            while not done:
                done = backend.over(peer, backend._agent.check_xfer_state(handle))
            found.append((size, time.perf_counter() - began))
            backend._agent.release_xfer_handle(handle)
        over.set()

    node._connector.after(0.0, measure)
    if not over.wait(60):
        raise SystemExit("a plain READ hangs")
    return min(found, key=lambda item: item[1])


# the one who asks


@dataclass
class Asked:
    """A request on its way, and what is known of it."""

    prompt: list[int]
    params: dict[str, Any]
    began_s: float = 0.0
    prefilled_s: float = 0.0
    first: list[int] | None = None
    handle: Any = None
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: str | None = None
    over: threading.Event = field(default_factory=threading.Event)


class Cards:
    """Two processes, and the hand-overs between them."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.links: list[Connection] = []
        self._asked: dict[str, Asked] = {}
        self._answers: dict[tuple[int, str], Any] = {}
        self._changed = threading.Condition()
        self._number, self._gone = itertools.count(), False
        self._locks = [threading.Lock(), threading.Lock()]
        self.eager = True
        """The state is pulled while the prompt is computed; else when it is."""
        for card in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(card, options, theirs), daemon=True).start()
            theirs.close()
            self.links.append(ours)
        for card, link in enumerate(self.links):
            threading.Thread(target=self._listen, args=(card, link), daemon=True).start()
        for card in range(2):
            self.answer(card, "ready")

    def send(self, card: int, message: Message) -> None:
        with self._locks[card]:
            self.links[card].send(message)

    def ask(self, card: int, *message: Any, answer: str) -> Message:
        self.send(card, message)
        return self.answer(card, answer)

    def answer(self, card: int, kind: str) -> Message:
        with self._changed:
            if not self._changed.wait_for(lambda: (card, kind) in self._answers or self._gone, 120) or self._gone:
                raise SystemExit(f"card {card} does not answer")
            return tuple(self._answers.pop((card, kind)))

    def submit(self, prompt: list[int], params: dict[str, Any], way: int | None) -> Asked:
        """`way`: the card that does it all, or None: prefill on card 0, decode on card 1."""
        asked = Asked(prompt, params, time.monotonic())
        name = str(next(self._number))
        self._asked[name] = asked
        card, kind = (0, "prefill") if way is None else (way, "decode")
        self.send(card, (kind, name, prompt, params, None, None))
        return asked

    def _listen(self, card: int, link: Connection) -> None:
        while True:
            try:
                name, kind, *rest = link.recv()
            except EOFError:
                with self._changed:
                    self._gone = True
                    self._changed.notify_all()
                return
            if not name:
                with self._changed:
                    self._answers[card, kind] = rest
                    self._changed.notify_all()
                continue
            asked = self._asked[name]
            if kind == "granted":
                asked.handle = rest[1]
                if self.eager:
                    self.send(1, ("decode", name, asked.prompt, asked.params, rest[1], None))
            elif kind == "prefilled":
                asked.prefilled_s, asked.first = rest[0], list(rest[1])
                if self.eager:
                    self.send(1, ("prefilled", name, rest[1]))
                else:
                    self.send(1, ("decode", name, asked.prompt, asked.params, asked.handle, rest[1]))
            else:
                when, tokens, ended, error = rest
                asked.tokens += tokens
                asked.times_s += [when] * len(tokens)
                if ended:
                    asked.error = error
                    del self._asked[name]
                    asked.over.set()

    def run(self, prompt: list[int], params: dict[str, Any], way: int | None) -> Asked:
        asked = self.submit(prompt, params, way)
        if not asked.over.wait(60):
            raise SystemExit(f"a request of {len(prompt)} tokens hangs")
        if asked.error:
            raise SystemExit(asked.error)
        return asked

    def close(self) -> None:
        for card in range(2):
            self.send(card, ("close",))


def prompt_of(length: int, seed: int, vocab: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def equal(cards: Cards, vocab: int, longest: int) -> Row:
    """Requests one at a time, by every way."""
    lengths = [n for n in (1, 5, 64, 127, 128, 129, 255, 256, 257, 900, 2048, 4097, 9000, 20000) if n + 48 <= longest]
    same = same_card = 0
    worst = []
    for i, length in enumerate(lengths):
        for temperature in (0.0, 1.0):
            params = {"max_tokens": 48, "temperature": temperature, "seed": i, "ignore_eos": True}
            ways = [cards.run(prompt_of(length, i, vocab), params, way).tokens for way in (None, 0, 1)]
            same += ways[0] == ways[2]
            same_card += ways[1] == ways[2]
            if ways[0] != ways[2]:
                part = next(k for k, (a, b) in enumerate(zip(ways[0], ways[2], strict=True)) if a != b)
                worst.append([length, temperature, part])
    return {"phase": "equal", "requests": 2 * len(lengths), "same": same, "same_on_both_cards": same_card,
            "parted": worst}  # fmt: skip


def bandwidth(cards: Cards, lengths: Iterable[int], vocab: int) -> list[Row]:
    """State pulled when the prefill is over, and the plain rates of as many bytes."""
    cards.eager, out = False, []
    params = {"max_tokens": 2, "temperature": 0.0, "seed": 0, "ignore_eos": True}
    for length in lengths:
        found = []
        for run in range(3):
            before = cards.ask(1, "stats", answer="stats")
            asked = cards.run(prompt_of(length, run, vocab), params, None)
            after = cards.ask(1, "stats", answer="stats")
            found.append((after[3] - before[3], after[1] - before[1], after[5] - before[5],
                          asked.times_s[0] - asked.prefilled_s))  # fmt: skip
        seconds, nbytes, ranges, first = min(found)
        description = cards.ask(0, "describe", answer="description")[0]
        size, plain = cards.ask(1, "plain", description, nbytes, answer="plain")
        cards.send(0, ("unwatch",))
        out.append({
            "phase": "bandwidth", "tokens": length, "bytes": nbytes, "ranges": ranges,
            "pull_ms": round(seconds * 1e3, 3), "gb_s": round(nbytes / seconds / 1e9, 2),
            "plain_bytes": size, "plain_gb_s": round(size / plain / 1e9, 2),
            "first_token_after_prefill_ms": round(first * 1e3, 3), "first_pull_ms": round(found[0][0] * 1e3, 1),
        })  # fmt: skip
    cards.eager = True
    for length in lengths:
        after = [
            (asked.times_s[0] - asked.prefilled_s) * 1e3
            for asked in (cards.run(prompt_of(length, run, vocab), params, None) for run in range(3))
        ]
        out.append({"phase": "streamed", "tokens": length, "first_token_after_prefill_ms": round(min(after), 3)})
    return out


def served(cards: Cards, way: str, clients: int, options: argparse.Namespace, vocab: int) -> Row:
    """A closed loop; only what ends between warm-up and the end counts."""
    done: list[Asked] = []
    end_s = time.monotonic() + options.warm_up + options.seconds
    seeds = iter(range(1_000_000 * clients, 1_000_000 * (clients + 1)))
    params = {"max_tokens": options.output, "temperature": 1.0, "ignore_eos": True}

    def client(number: int) -> None:
        while time.monotonic() < end_s:
            seed = next(seeds)
            where = number % 2 if way == "aggregated" else None
            prompt = prompt_of(options.input, seed, vocab)
            asked = cards.submit(prompt, {**params, "seed": seed}, where)
            if not asked.over.wait(120) or asked.error:
                raise SystemExit(asked.error or "a request hangs")
            done.append(asked)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start_s = end_s - options.seconds
    tokens = sum(start_s <= t < end_s for a in done for t in a.times_s)
    inside = [a for a in done if start_s <= a.times_s[0] < end_s]
    first = [(a.times_s[0] - a.began_s) * 1e3 for a in inside]
    between = [(a.times_s[-1] - a.times_s[0]) / (len(a.times_s) - 1) * 1e3 for a in inside]
    gaps = [(b - a) * 1e3 for one in inside for a, b in zip(one.times_s, one.times_s[1:], strict=False)]
    rank: Callable[[list[float], float], float] = lambda values, q: round(float(np.percentile(values, q)), 2)  # noqa: E731
    return {
        "phase": "served", "way": way, "clients": clients, "input": options.input, "output": options.output,
        "requests": len(inside), "tokens_per_s": round(tokens / options.seconds), "ttft_p50_ms": rank(first, 50),
        "ttft_p99_ms": rank(first, 99), "tpot_p50_ms": rank(between, 50), "tpot_p99_ms": rank(between, 99),
        "itl_p50_ms": rank(gaps, 50), "itl_p99_ms": rank(gaps, 99), "itl_mean_ms": round(statistics.fmean(gaps), 2),
    }  # fmt: skip


def copy_rate() -> Row:
    """PyTorch's copy of 1 GiB from card 0 to card 1."""
    import torch

    source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    times = []
    for _ in range(6):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        times.append(time.perf_counter() - began)
    access = bool(torch.cuda.can_device_access_peer(0, 1))
    return {"phase": "copy", "gb_s": round((1 << 30) / min(times) / 1e9, 1), "peer_access": access,
            "device": torch.cuda.get_device_name(0), "torch": torch.__version__}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 32768, 100000])
    parser.add_argument("--no-equal", action="store_true")
    parser.add_argument("--clients", type=int, nargs="*", default=[16, 64, 128])
    parser.add_argument("--input", type=int, default=2048)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--warm-up", type=float, default=4.0)
    parser.add_argument("--max-requests", type=int, default=128)
    parser.add_argument("--gpu-memory", type=float, default=0.85)
    parser.add_argument("--speculative-tokens", type=int, default=0)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args(argv)
    manifest = json.loads((options.artifact / "manifest.json").read_text())
    vocab, layers = manifest["vocab_size"], manifest["model"]["num_hidden_layers"]
    stamp = {"date": datetime.date.today().isoformat(), "cards": 2, "layers": layers}

    def report(row: Row) -> None:
        print(json.dumps(row), flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps({**stamp, **row}) + "\n")

    if manifest["target"] != "cpu":
        report(copy_rate())
    cards = Cards(options)
    for card in (0, 1, None):
        cards.run(prompt_of(300, 1, vocab), {"max_tokens": 4, "seed": 1, "ignore_eos": True}, card)
    if not options.no_equal:
        report(equal(cards, vocab, manifest["max_context"]))
    for row in bandwidth(cards, options.lengths, vocab):
        report(row)
    for clients in options.clients:
        for way in ("aggregated", "1P1D"):
            report(served(cards, way, clients, options, vocab))
    stats = cards.ask(1, "stats", answer="stats")
    report({"phase": "end", "pulled": stats[0], "pulled_bytes": stats[1], "early_bytes": stats[2],
            "recomputed": stats[4]})  # fmt: skip
    cards.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
