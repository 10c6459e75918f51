"""Writes the checkpoint from trained weights and measures it with the plain model: bits per byte, drafts, samples.

    python examples/train_nano/evaluate.py write WEIGHTS WORK OUT     # OUT: checkpoint + tokenizer + loss.png
    python examples/train_nano/evaluate.py measure OUT WORK [--weights WEIGHTS]

WEIGHTS is train.py's output, WORK the corpus folder. `measure` prints JSON: held-out bits per byte of the float32
weights (with --weights), of the stored FP4/FP8 weights, and of these with KV and index quantised as well; how often
the MTP block's first draft is the main model's greedy choice, on greedy continuations of held-out prompts and on the
held-out text itself; completions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from whole import Whole

from dsv4c.chat import tokens
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import ModelConfig, preset
from dsv4c.model.state import init_state, make_step
from dsv4c.model.transformer import Transformer

Facts = dict[str, Any]

PROMPTS = (
    "The function returns a list of",
    "To install the package, run",
    "# Error handling\n\nWhen a connection is closed by the server,",
    "A dictionary in Python is",
    "The compiler will",
    f"{tokens.BOS}{tokens.USER}What is a database index?{tokens.ASSISTANT}{tokens.THINK_END}",
)


def trained(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("weights-*.safetensors")):
        state.update(load_file(file))
    return {k: v.long() if v.dtype == torch.int32 else v.float() for k, v in state.items()}


def load(config: ModelConfig, state: dict[str, Tensor], *, fake_quant: bool = False) -> Transformer:
    model = Transformer(config, fake_quant=fake_quant)
    model.load_state_dict(state)
    return model.float().eval()


def heldout(work: Path) -> list[str]:
    with (work / "heldout.jsonl").open() as file:
        return [json.loads(line)["text"] for line in file]


@torch.no_grad()
def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: list[str], length: int, plain: bool) -> Facts:
    """The first `length` tokens of every text, seen from position 0 after BOS.

    `plain`: through the model itself, token rows gathered; else through its equal for whole sequences (whole.py).
    """
    bytes_ = 0
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:length]
        bytes_ += len(tokenizer.decode(ids).encode())
        pieces.append(torch.tensor([model.config.bos_token_id, *ids]))
    run = Whole(model.config, length, "cpu", lambda function: function)
    params = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if "tid2eid" in k}}
    nats = torch.zeros(length)
    seen = torch.zeros(length)
    same = drafts = 0
    for ids in pieces:
        count = len(ids) - 1
        if plain:
            step = make_step(model.config, model.layout, [(0, 0, ids[:-1])], count)
            streams, after = model.run(step, init_state(model.config, model.layout, 1, count))
            logits = model.logits(streams[-1], step["logit_rows"])
            draft, _ = model.mtp_logits(streams[-1], ids[1:], step, after)
        else:
            padded = F.pad(ids, (0, -count % model.config.sliding_window))
            result = run(params, padded[:-1].unsqueeze(0), padded[1:].unsqueeze(0), torch.float32)
            logits, draft = model.head(result.main_TD)[:count], model.head(result.mtp_TD)[:count]
        nats[:count] += F.cross_entropy(logits, ids[1:], reduction="none")
        seen[:count] += 1
        same += int((draft[:-1].argmax(-1) == logits[1:].argmax(-1)).sum())
        drafts += count - 1
    quarter = length // 4
    by_position = {
        f"{first}..{first + quarter - 1}": round(float(nats[first:][:quarter].sum() / seen[first:][:quarter].sum()), 3)
        for first in range(0, length, quarter)
    }
    return {
        "bits_per_byte": round(float(nats.sum()) / math.log(2) / bytes_, 4),
        "draft_agreement": round(same / drafts, 4),
        "nats_by_position": by_position,
        "tokens": int(seen.sum()),
        "bytes": bytes_,
    }


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[Tensor], new: int, temperature: float, seed: int
) -> tuple[list[list[int]], float]:
    """New tokens of every prompt, and how often the first draft was the token then chosen greedily."""
    config, layout = model.config, model.layout
    room = max(map(len, prompts)) + new + 1
    state = init_state(config, layout, len(prompts), room)
    generator = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in prompts]
    spans = [(i, 0, ids) for i, ids in enumerate(prompts)]
    drafts: Tensor | None = None
    hits = total = 0
    for _ in range(new):
        step = make_step(config, layout, spans, room)
        streams, state = model.run(step, state)
        ends = step["seq_ends"].new_tensor([len(ids) for _, _, ids in spans]).cumsum(0) - 1
        logits = model.logits(streams[-1], ends)
        greedy = logits.argmax(-1)
        chosen = greedy
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
        alive = torch.tensor([config.eos_token_id not in ids for ids in out])
        if drafts is not None:
            hits += int((drafts == greedy)[alive].sum())
            total += int(alive.sum())
        following = torch.cat([torch.cat((ids[1:], chosen[i : i + 1])) for i, (_, _, ids) in enumerate(spans)])
        mtp, state = model.mtp_logits(streams[-1], following, {**step, "logit_rows": ends}, state)
        drafts = mtp.argmax(-1)
        for ids, token in zip(out, chosen.tolist(), strict=True):
            ids.append(token)
        spans = [(i, start + len(ids), chosen[i : i + 1]) for i, start, ids in spans]
    kept = [ids[: ids.index(config.eos_token_id)] if config.eos_token_id in ids else ids for ids in out]
    return kept, hits / max(total, 1)


def measure(out: Path, work: Path, weights: Path | None, documents: int) -> Facts:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    config = ModelConfig.from_file(out / "config.json")
    stored = load_model_state(Checkpoint(out))
    texts = heldout(work)
    rng = random.Random(0)
    rng.shuffle(texts)
    most, few = texts[:documents], texts[:8]
    facts: Facts = {"heldout_documents": len(most)}
    models = {"stored": load(config, stored)}
    if weights is not None:
        models = {"float32": load(config, trained(weights)), **models}
    models["stored_kv_quantised"] = load(config, stored, fake_quant=True)
    for name, model in models.items():
        if name != "stored_kv_quantised":
            facts[name] = bits_per_byte(model, tokenizer, most, 2048, plain=False)
            print(name, facts[name], flush=True)
    for name, model in models.items():
        facts.setdefault(name, {})["on 8 documents, plain model"] = bits_per_byte(
            model, tokenizer, few, 512, plain=True
        )
        print(name, facts[name], flush=True)
    prompts = []
    for text in rng.sample(texts, min(32, len(texts))):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        prompts.append(torch.tensor(ids[: rng.randint(32, 200)]))
    for name, model in models.items():
        _, accepted = generate(model, prompts, 64, 0.0, 0)
        facts[name]["greedy_acceptance"] = round(accepted, 4)
        print(name, facts[name], flush=True)
    model = models["stored"]
    samples = []
    ids = [torch.tensor(tokenizer.encode(p, add_special_tokens=False).ids) for p in PROMPTS]
    greedy, _ = generate(model, ids, 80, 0.0, 0)
    drawn, _ = generate(model, ids, 80, 0.7, 1)
    for prompt, a, b in zip(PROMPTS, greedy, drawn, strict=True):
        samples.append({"prompt": prompt, "greedy": tokenizer.decode(a), "temperature 0.7": tokenizer.decode(b)})
    facts["samples"] = samples
    return facts


def write(weights: Path, work: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, preset("nano"), trained(weights))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((work / name).read_bytes())
    plot(json.loads((weights / "log.json").read_text())["log"], out / "loss.png")


def plot(log: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    millions = [entry["tokens"] / 1e6 for entry in log]
    axes.plot(millions, [entry["loss"] for entry in log], label="next token", linewidth=1)
    axes.plot(millions, [entry["mtp"] for entry in log], label="MTP: token after next", linewidth=1)
    rounded = [entry["tokens"] / 1e6 for entry in log if entry["rounded"]]
    if rounded:
        axes.axvline(rounded[0], color="grey", linestyle=":", label="weights rounded to FP4/FP8 from here")
    axes.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)", ylim=(1.5, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    for name in ("weights", "work", "out"):
        writing.add_argument(name, type=Path)
    measuring = commands.add_parser("measure")
    for name in ("out", "work"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--weights", type=Path)
    measuring.add_argument("--documents", type=int, default=120)
    measuring.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        write(args.weights, args.work, args.out)
        return
    facts = measure(args.out, args.work, args.weights, args.documents)
    print(json.dumps(facts, indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
