"""nano on a card: the same tokens from every executor, contracts and shadows on the way, and the CPU's tokens beside.

usage: python benchmarks/nano_card.py reference CPU_ARTIFACT CARD_ARTIFACT -o FILE [--prompts 100] [--new 64]
       python benchmarks/nano_card.py run CARD_ARTIFACT FILE [--weights FOLDER] [--rows FILE] [--only graph eager ...]

`reference` needs no card: greedy tokens of the compiled CPU artifact (`float32`), and of the card's own program run by
the references of its ops (`program`), each with its log-probability and its distance to the second best token. `run`
generates with the graph, eager, contract and shadow executors, which must agree bit for bit, log-probabilities
included; then it scores both references' completions on the card. Where greedy tokens part, the texts differ from
there on, so two things are told: the share of tokens before the first that differs, and, along the reference's own
text, how often the card likes the same token best and how far log-probabilities lie apart. A difference counts as
explained where the reference's two best tokens are nearer to each other than twice that distance at its 99.9th
percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import datetime
import decimal
import difflib
import email
import json
import logging
import pathlib
import pydoc
import random
import socket
import string
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.reference import References, plain_weights
from dsv4c.runtime.contracts import ContractExecutor
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import bounds_of
from dsv4c.runtime.loader import device_rows, load, load_device
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.weights import load_weights
from dsv4c.shadow import Shadow, ShadowExecutor

CONTEXT, REQUESTS = 1024, 32
KINDS = ("graph", "eager", "contract", "shadow")


@dataclass(frozen=True)
class Text:
    """One completion: tokens, their log-probabilities, and how far behind the second best token was."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


def prompts(tokenizer: Path, count: int) -> list[list[int]]:
    """Prompts of 16 to 600 tokens: pieces of the standard library's own documentation."""
    from dsv4c.chat.tokenizer import Tokenizer

    modules = (argparse, asyncio, collections, decimal, difflib, email, logging, pathlib, socket, string, typing)
    text = "\n\n".join(pydoc.plain(pydoc.render_doc(m)) for m in modules)
    ids = Tokenizer.from_file(tokenizer).encode(text[:400_000])
    draw = random.Random(0)
    lengths = [16, 600, *(draw.randint(16, 600) for _ in range(98))][:count]
    starts = [draw.randrange(len(ids) - 600) for _ in lengths]
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def serve(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Event]]:
    """All events, by request. Raises the first error that a request ends with."""
    out: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                raise event.end.error
            out[event.request_id].append(event)
    engine.audit()
    return out


def generate(engine: Engine, given: Sequence[Sequence[int]], new: int) -> list[Text]:
    """Greedy completions."""
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, logprobs=2)
    events = serve(engine, [Request(str(i), ids, params) for i, ids in enumerate(given)])
    out = []
    for i in range(len(given)):
        entries = [entry for event in events[str(i)] for entry in event.logprobs]
        tokens = [token for event in events[str(i)] for token in event.tokens]
        gaps = [entry.top[0][1] - entry.top[1][1] for entry in entries]
        out.append(Text(tokens, [entry.logprob for entry in entries], gaps))
    return out


def score(engine: Engine, given: Sequence[Sequence[int]], texts: Sequence[Text]) -> tuple[Any, Any]:
    """Along these completions: whether the token is the best [N, new], and its log-probability."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    whole = [[*ids, *text.tokens] for ids, text in zip(given, texts, strict=True)]
    events = serve(engine, [Request(str(i), ids, params) for i, ids in enumerate(whole)])
    best, logprobs = [], []
    for i, (ids, text) in enumerate(zip(given, texts, strict=True)):
        entries = [x for event in events[str(i)] for x in event.prompt_logprobs][len(ids) :]
        best.append([x.top[0][0] == token for x, token in zip(entries, text.tokens, strict=True) if x])
        logprobs.append([x.logprob for x in entries if x])
    return np.array(best), np.array(logprobs)


def device_engine(manifest: Manifest, executor: GraphExecutor, sizes: PoolSizes) -> Engine:
    pool, bounds = KVPool(manifest.kv_groups, sizes, track=True), bounds_of(manifest)
    runner = DeviceRunner(executor, pool, vocab_size=manifest.vocab_size)
    limits = Limits(sizes.max_requests, bounds.tokens, max_logit_rows=bounds.rows)
    return Engine(runner, pool=pool, vocab_size=manifest.vocab_size, limits=limits)


def sizes_for(manifest: Manifest) -> PoolSizes:
    bounds = bounds_of(manifest)
    context, requests = min(CONTEXT, manifest.max_context), min(REQUESTS, bounds.requests)
    return PoolSizes.for_requests(manifest.kv_groups, requests, context, step_tokens=bounds.tokens)


def reference(args: argparse.Namespace) -> None:
    """Writes what `run` compares with."""
    given = prompts(args.cpu / "tokenizer", args.prompts)
    plain, card = load_manifest(args.cpu), load_manifest(args.card)
    sizes = sizes_for(plain)
    executor = load(args.cpu, Checkpoint(args.cpu / "weights"), sizes, manifest=plain)
    limits = Limits(sizes.max_requests, min(512, bounds_of(plain).tokens))
    texts = {"float32": generate(Engine.for_manifest(executor, plain, sizes, limits=limits), given, args.new)}
    print(f"float32: {len(given)} completions", flush=True)
    weights, _ = load_weights(card.weights, Checkpoint(args.card / "weights"))
    engine = by_references(card, weights)
    texts["program"] = generate(engine, given, args.new)
    print("program: by references", flush=True)
    for name in ("float32", "program"):
        print(name, compared(texts[name], texts["program"], *score(engine, given, texts[name]), new=args.new))
    data = {"prompts": given, "new": args.new, "texts": {n: [vars(t) for t in found] for n, found in texts.items()}}
    args.output.write_text(json.dumps(data), encoding="utf-8")


def by_references(manifest: Manifest, weights: Mapping[str, Tensor]) -> Engine:
    """The card's program on this CPU."""
    sizes, device = sizes_for(manifest), torch.device("cpu")
    references = References(manifest.kernels, plain_weights(manifest, weights))
    states, rows = allocate(manifest, sizes, device), device_rows(manifest, sizes)
    executor = GraphExecutor(manifest.programs, references, weights, states, device, rows=rows)
    return device_engine(manifest, executor, sizes)


def compared(known: Sequence[Text], found: Sequence[Text], best: Any, logprobs: Any, *, new: int) -> dict[str, Any]:
    """Completions beside a reference's, and scores along the reference's own text."""
    firsts = [
        next((j for j in range(new) if a.tokens[j] != b.tokens[j]), new) for a, b in zip(known, found, strict=True)
    ]
    gaps = [text.gaps[first] for text, first in zip(known, firsts, strict=True) if first < new]
    apart = np.abs(logprobs - np.array([text.logprobs for text in known]))
    all_gaps = np.array([text.gaps for text in known])
    limit = 2 * float(np.quantile(apart, 0.999))
    clear = all_gaps > limit
    return {
        "before_first_difference": round(sum(firsts) / (new * len(known)), 4),
        "completions_that_differ": len(gaps),
        "their_gaps": {q: round(float(np.quantile(gaps, p)), 4) if gaps else 0.0
                       for q, p in (("median", 0.5), ("p90", 0.9), ("largest", 1.0))},
        "logprob_apart": {"mean": round(float(apart.mean()), 5), "p999": round(limit / 2, 4),
                          "largest": round(float(apart.max()), 4)},
        "same_best_token": round(float(best.mean()), 4),
        "same_best_token_where_clear": round(float(best[clear].mean()), 5) if clear.any() else None,
        "clear": round(float(clear.mean()), 4),
        "explained_by_gaps": sum(gap <= limit for gap in gaps),
        "tolerance_nats": round(limit, 4),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Every executor on the card; prints, and appends one row."""
    data = json.loads(args.reference.read_text(encoding="utf-8"))
    given, new = data["prompts"], data["new"]
    texts = {name: [Text(**text) for text in found] for name, found in data["texts"].items()}
    manifest, device = load_manifest(args.card), torch.device("cuda:0")
    sizes = sizes_for(manifest)
    weights, _ = load_weights(manifest.weights, Checkpoint(args.weights or args.card / "weights"), device=device)
    shadow = Shadow(manifest, plain_weights(manifest, weights), lambda found: print(f"  {found}", flush=True))
    makes: Mapping[str, Callable[..., GraphExecutor]] = {
        "graph": GraphExecutor, "eager": GraphExecutor, "contract": partial(ContractExecutor, manifest=manifest),
        "shadow": partial(ShadowExecutor, shadow=shadow),
    }  # fmt: skip
    found: dict[str, list[Text]] = {}
    seconds, scores = {}, {}
    for kind in args.only:
        executor = load_device(args.card, manifest, weights, sizes, device, make=makes[kind])
        executor.warm_up()
        if kind == "graph":
            executor.capture()
        engine = device_engine(manifest, executor, sizes)
        began = time.perf_counter()
        found[kind] = generate(engine, given, new)
        torch.cuda.synchronize()
        seconds[kind] = round(time.perf_counter() - began, 2)
        print(f"{kind}: {len(given)} completions, {engine.stats().steps} steps, {seconds[kind]} s", flush=True)
        if kind == args.only[0]:
            scores = {name: score(engine, given, known) for name, known in texts.items()}
        del executor, engine
        torch.cuda.empty_cache()
    first = found[args.only[0]]
    equal = {kind: other == first for kind, other in found.items()}
    beside = {name: compared(known, first, *scores[name], new=new) for name, known in texts.items()}
    row = {
        "benchmark": "nano_card", "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(), "model_sha256": manifest.model_sha256[:12], "prompts": len(given),
        "new": new, "equal_bit_for_bit": equal, "seconds": seconds, "beside": beside,
        "shadow": {
            "steps": shadow.steps, "differences": [str(one) for one in shadow.differences],
            "nearest": [f"{op} {schedule} {error:.2g} of {limit:.2g}" for op, schedule, error, limit in
                        shadow.summary()[:12]],
        },
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if not all(equal.values()) or shadow.differences:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("reference")
    one.add_argument("cpu", type=Path)
    one.add_argument("card", type=Path)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--prompts", type=int, default=100)
    one.add_argument("--new", type=int, default=64)
    one.set_defaults(run=reference)
    two = commands.add_parser("run")
    two.add_argument("card", type=Path)
    two.add_argument("reference", type=Path)
    two.add_argument("--weights", type=Path)
    two.add_argument("--rows", type=Path)
    two.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    two.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
