"""Structured output on a card: random JSON schemas at temperature 1, company, and what grammars cost a step.

usage: python benchmarks/structured_card.py answers ARTIFACT FILE [--schemas 500] [--seed 0] [--beside 0]
       python benchmarks/structured_card.py judge FILE [--rows FILE]
       python benchmarks/structured_card.py company ARTIFACT [--rows FILE]
       python benchmarks/structured_card.py cost ARTIFACT [--tokenizer FOLDER] [--batches 1 16 64] [--rows FILE]

`answers` writes the schemas of benchmarks/structured.py, bounded ones, with what the model said under them, 64 at a
time, `--beside` requests without a grammar; `judge` needs no card: what ended must be JSON that `jsonschema` accepts,
formats included. `company`: requests without a grammar, alone and beside as many that have one, in a program of one
size: the same tokens and log-probabilities. `cost`: milliseconds a decode step with no grammar in the batch, in half
of the requests, in all of them; these interleaved, medians of rounds; and of that what filling masks takes.
`--tokenizer`: of a model whose weights are made up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from structured import PROMPT, grammar_of, judge, random_schema

from dsv4c.artifact import load_manifest
from dsv4c.launch import Launched, LaunchOptions, launch, launch_engine
from dsv4c.runtime import device
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.grammar import Grammar, Grammars
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request

Row = dict[str, Any]
TOGETHER, MAX_TOKENS = 64, 1500
STEPS, ROUNDS = 96, 5
COMPANY = 32


def options_of(tokenizer: Path | None, weights: Path | None) -> LaunchOptions:
    """Weights are made up for a model whose tokenizer must be given."""
    dummy = None if tokenizer is None else 0
    return LaunchOptions(
        kv_memory_bytes=2 * 10**9, prefix_cache=False, tokenizer=tokenizer, weights=weights, dummy_seed=dummy
    )


def endless(launched: Launched, grammars: Grammars) -> Grammar:
    """A list of objects that goes on for longer than anybody asks."""
    item = {"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"},
                                             "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
            "required": ["name", "size", "tags"], "additionalProperties": False}  # fmt: skip
    return grammar_of(grammars, launched.codec, {"type": "array", "items": item, "minItems": 10_000})


def answers(launched: Launched, schemas: int, seed: int, beside: int) -> list[Row]:
    """What the model says under each schema, and how that ended."""
    draw, engine, codec, grammars = random.Random(seed), launched.engine, launched.codec, Grammars(launched.codec)
    prompt, todo, out = codec.encode(PROMPT), [], {}
    for number in range(schemas):
        schema = random_schema(draw)
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, seed=number, grammar=grammar_of(grammars, codec, schema)
        )
        todo.append(Request(f"s{number}", prompt, params))
        out[f"s{number}"] = {"schema": schema, "tokens": []}
    free = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    for number in range(beside):
        engine.submit(Request(f"f{number}", prompt[: 1 + number % len(prompt)], free))
    began, todo = time.perf_counter(), todo[::-1]
    while todo or engine.has_work:
        while todo and engine.stats().running + engine.stats().waiting < TOGETHER:
            engine.submit(todo.pop())
        for event in engine.step():
            row = out.get(event.request_id)
            if row is None:
                continue
            row["tokens"] += event.tokens
            if event.end is not None:
                row["end"], row["error"] = event.end.reason, str(event.end.error or "")
                row["text"] = codec.decode([t for t in row["tokens"] if t not in codec.eos_token_ids])
    tokens, spent = sum(len(row["tokens"]) for row in out.values()), time.perf_counter() - began
    speculation = engine.stats().speculation
    head = {
        "benchmark": "structured", "what": "answers", "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(), "schemas": schemas, "together": TOGETHER, "seed": seed,
        "tokens": tokens, "seconds": round(spent, 2), "us_per_token": round(1e6 * spent / tokens, 1),
        "beside": beside, "drafted": speculation.drafted, "accepted": speculation.accepted,
    }  # fmt: skip
    return [head, *({k: v for k, v in row.items() if k != "tokens"} for row in out.values())]


def judged(rows: Sequence[Row]) -> Row:
    """How the answers ended, and how many of those that were complete are not valid."""
    head, *found = rows
    faults = [(r, judge(r["schema"], r["text"])) for r in found if r["end"] == "stop"]
    for row, why in [(r, why) for r, why in faults if why][:10]:
        print(f"FAULT {why}\n  {json.dumps(row['schema'])}\n  {row['text']!r}", file=sys.stderr)
    errors = [r["error"] for r in found if r["error"]]
    return {
        **head,
        "ended": dict(Counter(r["end"] for r in found)),
        "invalid": sum(bool(why) for _, why in faults),
        "errors": errors[:3],
    }


def generated(engine: Engine, asked: Sequence[Request]) -> dict[str, list[Any]]:
    """Tokens and log-probabilities by request."""
    out: dict[str, list[Any]] = {request.id: [] for request in asked}
    for request in asked:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                raise event.end.error
            out[event.request_id] += [*event.tokens, *event.logprobs]
    engine.audit()
    return out


def company(path: Path, options: LaunchOptions) -> Row:
    """Programs of one size: all prompts in one step, then all decode together."""
    manifest = load_manifest(path)
    sizes = {phase: [n for n, p in manifest.programs.items() if p.phase == phase] for phase in ("decode", "prefill")}
    plain = [n for n in sizes["decode"] if "accepted" not in manifest.programs[n].outputs]
    chosen = [
        max(names, key=lambda n: (manifest.programs[n].symbols["T"], manifest.programs[n].symbols["S"]))
        for names in (plain, sizes["prefill"])
    ]
    manifest = replace(manifest, programs={name: manifest.programs[name] for name in chosen})
    launched = launch(path, options)
    engine = launch_engine(path, manifest, options, launched.codec.eos_token_ids)
    codec, rule = launched.codec, endless(launched, Grammars(launched.codec))

    def asked(ruled: bool) -> list[Request]:
        out = []
        for i in range(COMPANY):
            params = SamplingParams(
                max_tokens=100, temperature=float(i % 2), seed=i, ignore_eos=True, logprobs=2,
                grammar=rule if ruled else None,
            )  # fmt: skip
            out.append(Request(f"{'r' if ruled else 'f'}{i}", codec.encode(f"Number {i} of the list is ")[:8], params))
        return out

    free, ruled = generated(engine, asked(False)), generated(engine, asked(True))
    mixed = [request for pair in zip(asked(False), asked(True), strict=True) for request in pair]
    together = generated(engine, mixed)
    return {
        "benchmark": "structured", "what": "company", "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(), "programs": chosen, "requests": COMPANY,
        "same_without_grammar": sum(together[name] == found for name, found in free.items()),
        "same_with_grammar": sum(together[name] == found for name, found in ruled.items()),
    }  # fmt: skip


class Clock:
    """Seconds that masks take."""

    def __init__(self) -> None:
        self.spent_s, self._fill = 0.0, device.fill_wide
        device.fill_wide = self.fill

    def fill(self, *args: Any) -> None:
        began = time.perf_counter()
        self._fill(*args)
        self.spent_s += time.perf_counter() - began


def decode_ms(engine: Engine, prompt: Sequence[int], batch: int, rule: Grammar | None, ruled: int, seed: int) -> float:
    """Milliseconds a step in which so many requests decode, the first `ruled` of them under the grammar."""
    params = SamplingParams(max_tokens=STEPS + 8, temperature=1.0, ignore_eos=True)
    for i in range(batch):
        mine = replace(params, seed=seed * batch + i, grammar=rule if i < ruled else None)
        engine.submit(Request(f"c{i}", prompt, mine))
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    first, began = engine.stats().steps, time.perf_counter()
    while engine.has_work:
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                raise event.end.error
    return 1e3 * (time.perf_counter() - began) / (engine.stats().steps - first)


def cost(path: Path, options: LaunchOptions, batches: Sequence[int]) -> list[Row]:
    """See the file's docstring."""
    launched = launch(path, options)
    engine = launched.engine
    prompt, rule = launched.codec.encode(PROMPT), endless(launched, Grammars(launched.codec))
    clock, out = Clock(), []
    head = {
        "benchmark": "structured", "what": "cost", "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(), "vocabulary": launched.manifest.vocab_size,
        "layers": launched.manifest.model["num_hidden_layers"],
    }  # fmt: skip
    for batch in batches:
        kinds = {"none": 0, "all": batch, **({"half": batch // 2} if batch > 1 else {})}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        filling: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(ROUNDS + 1):
            for kind, ruled in kinds.items():
                clock.spent_s = 0.0
                found = decode_ms(engine, prompt, batch, rule, ruled, turn)
                if turn:  # the first warms up
                    times[kind].append(found)
                    filling[kind].append(1e3 * clock.spent_s / (STEPS + 8))
        ms = {kind: round(statistics.median(found), 4) for kind, found in times.items()}
        fills = {kind: round(statistics.median(found), 4) for kind, found in filling.items() if any(found)}
        out.append({**head, "requests": batch, "step_ms": ms, "fill_ms": fills})
        print(json.dumps(out[-1]), flush=True)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "judge", "company", "cost"))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("file", type=Path, nargs="?", help="of `answers`: where they go")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--rows", type=Path, help="JSONL file to append to")
    args = parser.parse_args()
    options = options_of(args.tokenizer, args.weights)
    if args.what == "judge":
        rows = [judged([json.loads(line) for line in args.artifact.read_text(encoding="utf-8").splitlines()])]
    elif args.what == "answers":
        found = answers(launch(args.artifact, options), args.schemas, args.seed, args.beside)
        args.file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        rows = found[:1]
    elif args.what == "company":
        rows = [company(args.artifact, options)]
    else:
        rows = cost(args.artifact, options, args.batches)
    for row in rows if args.what != "cost" else ():
        print(json.dumps(row))
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return 1 if any(row.get("invalid") or row.get("errors") for row in rows) else 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
