"""nano's drafts: acceptance by position and temperature, and that no draft changes a token. On the CPU, then on a card.

usage: python benchmarks/drafts.py host CPU_ARTIFACT HELDOUT -o FILE [--prompts 200] [--new 256] [--rows FILE]
       python benchmarks/drafts.py card CARD_ARTIFACT FILE [--weights FOLDER] [--rows FILE]

Artifacts are compiled with `--speculative-tokens`. HELDOUT is the held-out text that examples/train_nano/corpus.py
leaves: a JSON object with a `text` a line. `host` serves the prompts greedily with 0 to K drafts, one at a time and 32
together, with requests preempted at random, and compares all tokens; it measures the plain model's acceptance along the
same text, and writes prompts and figures for `card`, which does the same on a GPU and compares acceptances.

Acceptance is drafts kept of drafts verified, as a step with one draft would: whoever is right skips a place.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.config import ModelConfig
from dsv4c.launch import LaunchOptions, launch_engine
from dsv4c.model.state import init_state, make_step
from dsv4c.model.transformer import Transformer
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.limits import drafts_of
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from dsv4c.runtime.speculation import Speculation

Row = dict[str, Any]
TEMPERATURES = (0.3, 0.7, 1.0)
PREEMPTED = 0.01  # of steps


def prompts_of(tokenizer: Path, heldout: Path, count: int) -> list[list[int]]:
    """Beginnings of held-out pages, 32 to 200 tokens long."""
    from dsv4c.chat.tokenizer import Tokenizer

    encode, draw, out = Tokenizer.from_file(tokenizer).encode, random.Random(0), []
    texts = [json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines()]
    draw.shuffle(texts)
    for text in texts:
        ids = encode(text[:2000])
        if len(ids) >= 200 and len(out) < count:
            out.append(ids[: draw.randint(32, 200)])
    return out


def set_drafts(engine: Engine, drafts: int, requests: int) -> None:
    """From now on every step verifies so many, and at most so many requests run."""
    engine.speculation = Speculation(engine.speculation.max_tokens)
    engine.scheduler._lengths = lambda _: drafts
    object.__setattr__(engine.scheduler.limits, "max_requests", requests)


def serve(engine: Engine, prompts: Sequence[Sequence[int]], preempt: random.Random | None, **params: Any) -> list[Any]:
    """The tokens of each completion."""
    out: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, SamplingParams(ignore_eos=True, seed=i, **params)))
    while engine.has_work:
        if preempt is not None and engine.scheduler.running and preempt.random() < PREEMPTED:
            engine.scheduler.preempt_newest()
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                raise event.end.error
            out[int(event.request_id)] += event.tokens
    engine.audit()
    return out


def acceptance(engine: Engine) -> list[float]:
    stats = engine.stats().speculation
    return [round(kept / max(1, tried), 4) for kept, tried in zip(stats.kept, stats.tried, strict=True)]


def measured(
    engine: Engine, most: int, prompts: Sequence[Sequence[int]], new: int, batches: Sequence[int]
) -> Iterator[Row]:
    """A row for each batch and number of drafts, greedy; then one for each temperature. `texts`: of no drafts."""
    set_drafts(engine, 0, batches[-1])
    texts = serve(engine, prompts, None, max_tokens=new, temperature=0.0)
    yield {"phase": "texts", "texts": texts}
    for batch in batches:
        for drafts in range(most + 1):
            set_drafts(engine, drafts, batch)
            before = engine.stats()
            began, cpu = time.perf_counter(), time.process_time()
            found = serve(engine, prompts, random.Random(drafts), max_tokens=new, temperature=0.0)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            after = engine.stats()
            yield {
                "phase": "greedy", "batch": batch, "drafts": drafts, "equal": found == texts,
                "differ": sum(a != b for a, b in zip(found, texts, strict=True)),
                "acceptance": acceptance(engine)[:drafts], "steps": after.steps - before.steps,
                "preemptions": after.preemptions - before.preemptions,
                "tokens_per_s": round(len(prompts) * new / wall), "tokens_per_cpu_s": round(len(prompts) * new / cpu),
            }  # fmt: skip
    for temperature in TEMPERATURES:
        kept = {}
        for drafts in sorted({0, 1, most}):
            set_drafts(engine, drafts, batches[-1])
            kept[drafts] = serve(engine, prompts, None, max_tokens=new, temperature=temperature)
            if drafts:
                yield {
                    "phase": "drawn", "temperature": temperature, "batch": batches[-1], "drafts": drafts,
                    "equal": kept[drafts] == kept[0], "acceptance": acceptance(engine),
                }  # fmt: skip


def plain_acceptance(
    folder: Path, config: ModelConfig, prompts: Sequence[Sequence[int]], texts: Sequence[Any]
) -> float:
    """Of the plain float32 model's first draft along these greedy completions."""
    model = Transformer(config)
    model.load_state_dict(load_model_state(Checkpoint(folder)))
    model.float().eval()
    kept = tried = 0
    with torch.no_grad():
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([*prompt, *text])
            count = len(ids) - 1
            step = make_step(config, model.layout, [(0, 0, ids[:-1])], count)
            streams, after = model.run(step, init_state(config, model.layout, 1, count))
            draft, _ = model.mtp_logits(streams[-1], ids[1:], step, after)
            agrees = (draft[:-1].argmax(-1) == ids[2:]).tolist()  # agrees[j]: the draft for token j + 2
            at = len(prompt) + 1
            while at < len(ids) - 1:
                tried += 1
                kept += agrees[at - 2]
                at += 2 if agrees[at - 2] else 1
    return kept / tried


def engine_of(folder: Path, manifest: Manifest, weights: Path | None, executor: Any = "graph") -> Engine:
    options = LaunchOptions(
        weights=weights,
        executor=executor,
        prefix_cache=False,
        max_requests=32,
        max_context=512,
        kv_memory_bytes=400_000_000,
    )  # fmt: skip
    return launch_engine(folder, manifest, options)


def host(args: argparse.Namespace) -> list[Row]:
    manifest = load_manifest(args.artifact)
    given = prompts_of(args.artifact / "tokenizer", args.heldout, args.prompts)
    rows, texts = [], []
    for row in measured(engine_of(args.artifact, manifest, None), drafts_of(manifest), given, args.new, args.batches):
        texts = row.pop("texts", texts)
        rows += show(row)
    plain = plain_acceptance(args.artifact / "weights", ModelConfig.from_dict(manifest.model), given[:64], texts[:64])
    rows += show({"phase": "plain", "prompts": 64, "acceptance": [round(plain, 4)]})
    args.output.write_text(json.dumps({"prompts": given, "new": args.new, "rows": rows}), encoding="utf-8")
    return rows


def card(args: argparse.Namespace) -> list[Row]:
    known = json.loads(args.reference.read_text(encoding="utf-8"))
    manifest = load_manifest(args.artifact)
    engine = engine_of(args.artifact, manifest, args.weights, args.executor)
    rows, given = [], known["prompts"][: args.prompts]
    for row in measured(engine, drafts_of(manifest), given, args.new or known["new"], args.batches):
        texts = row.pop("texts", None)
        if texts and args.texts:
            args.texts.write_text(json.dumps(texts), encoding="utf-8")
        keys = {k: row[k] for k in ("phase", "batch", "drafts", "temperature") if k in row}
        beside = next((r for r in known["rows"] if keys.items() <= r.items()), {})
        rows += show({**row, "executor": args.executor, "acceptance_on_cpu": beside.get("acceptance")})
    return rows


def show(row: Row) -> list[Row]:
    print(json.dumps(row), flush=True)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("host")
    one.add_argument("artifact", type=Path)
    one.add_argument("heldout", type=Path)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--prompts", type=int, default=200)
    one.add_argument("--new", type=int, default=256)
    one.set_defaults(run=host)
    two = commands.add_parser("card")
    two.add_argument("artifact", type=Path)
    two.add_argument("reference", type=Path)
    two.add_argument("--weights", type=Path)
    two.add_argument("--executor", default="graph", help="graph, eager, contracts or shadow")
    two.add_argument("--prompts", type=int, help="only the first so many")
    two.add_argument("--new", type=int, help="fewer tokens of each")
    two.add_argument("--texts", type=Path, help="file for the greedy tokens, to compare executors by")
    two.set_defaults(run=card)
    for each in (one, two):
        each.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="requests that run at once")
        each.add_argument("--rows", type=Path, help="JSONL file to append to")
    args = parser.parse_args()
    found = args.run(args)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    head = {"benchmark": "drafts", "hardware": hardware, "date": datetime.date.today().isoformat()}
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**head, **row}) + "\n" for row in found)


if __name__ == "__main__":
    main()
