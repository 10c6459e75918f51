"""What rounding the experts' activations costs nano: bits per byte, divergence and drafts on held-out text, on a CPU.

usage: python -m benchmarks.accuracy PART HELDOUT [--documents 32] [--tokens 512] [--rows FILE]
PART:  formats   every format, with and without a Hadamard rotation, all else in float32
       layers    one layer, or one of its two products, at a time; and what keeping some of them gives
       target    the whole program of sm_103a: FP8 linears, packed KV, BF16 between ops
       drafts    greedy text of the same formats with three drafts a step: how many are kept

       claims    what one call of the experts is off by, at most, where it reads what it read: the pass's tolerance

HELDOUT is the held-out text that examples/train_nano/corpus.py leaves: a JSON object with a `text` a line; of shuffled
pages the first `--tokens` each. Programs are those of the passes, run on the references of their ops: MXFP8 and MXFP4
by `quantise-activations`, the rest by `rounding.py`. Errors are standard errors over documents, of differences from
float32 on the same document where the figure is a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rounding import Experts, activation_factors, rounded_experts, stored_experts, weights_of
from dsv4c.aligned import EqualInputs, Values, counterparts
from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, lower
from dsv4c.config import StateLayout
from dsv4c.inputs import Inputs
from dsv4c.interpret import program_state, program_weights, run
from dsv4c.model.state import init_state, make_step
from dsv4c.numerics import Runs
from dsv4c.passes import default_pipeline
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.program import Program
from dsv4c.prompts import OWN, read_prompts
from dsv4c.weights import stored_formats

MODEL = Path(__file__).resolve().parents[1] / "examples" / "nano"
Row = dict[str, Any]
Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A program to compare with the one in float32, and its weights. `said`: what makes its row, in the row's words."""

    said: Row
    program: Program
    weights: Mapping[str, Tensor]


class Study:
    """nano's programs: `wide` (float32 experts), `stored` (the same on FP4 as stored), and their weights."""

    def __init__(self, folder: Path = MODEL) -> None:
        self.source = Checkpoint(folder)
        self.config = self.source.config
        self.tokenizer = Tokenizer.from_file(folder)
        self.wide = lower(self.config, Options())
        self.stored = stored_experts(self.wide)
        self.weights = {**program_weights(self.wide, self.source), **program_weights(self.stored, self.source)}
        self._experts: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._factors: dict[int, dict[tuple[str, str], float]] = {}

    def baseline(self) -> Variant:
        """float32 throughout, the checkpoint's weights widened."""
        return Variant({"activations": "float32"}, self.stored, self.weights)

    def passes(self, activations: str, keep: Sequence[str] = ()) -> Variant:
        """What `--activations` and `--keep` make of the experts, on FP4 weights as stored."""
        program = self.stored.clone()
        QuantiseActivations(activations, tuple(keep)).apply(program)  # type: ignore[arg-type]
        said: Row = {"activations": activations, **({"keep": list(keep)} if keep else {})}
        return Variant(said, program, self.weights)

    def rounded(self, experts: Experts, weights: str = "stored", **said: Any) -> Variant:
        """Activations as `experts` says, on `weights` rounded again (`mxfp4`, `nvfp4`) or as they are (`stored`)."""
        factors = self.factors(experts.hadamard) if "nvfp4" in (experts.x, experts.hidden) else {}
        program = rounded_experts(self.wide, experts, factors)
        return Variant({**experts.said(), "weights": weights, **said}, program, self.experts(weights, experts.hadamard))

    def factors(self, hadamard: int) -> dict[tuple[str, str], float]:
        """NVFP4's factor for each layer's activations, from the largest in dsv4c's own prompts."""
        if hadamard not in self._factors:
            runs = Runs(Inputs.of_prompts(self.source, self.tokenizer, read_prompts(OWN)), self.weights)
            self._factors[hadamard] = activation_factors(self.wide, hadamard, runs)
        return self._factors[hadamard]

    def experts(self, fmt: str, hadamard: int) -> dict[str, Tensor]:
        """All weights, the experts' rounded to `fmt` behind a rotation, and rotated back."""
        key = (fmt, hadamard)
        if key not in self._experts:
            self._experts[key] = {**self.weights, **weights_of(self.weights, fmt, hadamard)}
        return self._experts[key]

    def texts(self, heldout: Path) -> list[str]:
        """Held-out pages in an order drawn once."""
        texts = [json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(texts)
        return texts

    def batches(self, texts: Sequence[str], tokens: int, together: int = 8) -> Iterator[Inputs]:
        """Documents in steps of prefill, `together` at once."""
        for first in range(0, len(texts), together):
            some = texts[first : first + together]
            yield dataclasses.replace(Inputs.of_prompts(self.source, self.tokenizer, some, tokens), step_tokens=2048)


@dataclass
class Document:
    """Sums over one document: nats of its tokens, their divergence from float32, and argmaxes that agree."""

    tokens: int
    bytes: int
    nats: float
    kl: float
    greedy: int
    drafts: int


def documents(inputs: Inputs, tokenizer: Tokenizer, found: Results, reference: Tensor) -> list[Document]:
    """What every request of a run gave, beside the reference's distributions (their logarithms, [S, V])."""
    layout = StateLayout()
    steps = inputs.steps(layout)
    owner = torch.cat([(s["state_slots"] - 1)[s["request_rows"]][s["logit_rows"]] for s in steps])
    place = torch.cat([s["positions"][s["logit_rows"]] for s in steps])
    log_q = found["logits"].double().log_softmax(-1)
    nats = F.nll_loss(log_q, inputs.targets(layout), reduction="none")
    kl = (reference.exp() * (reference - log_q)).sum(-1)
    best, draft = log_q.argmax(-1), found["mtp.logits"].argmax(-1)
    same = best == reference.argmax(-1)
    out = []
    for i, ids in enumerate(inputs.ids):
        rows = (owner == i).nonzero().squeeze(1)
        rows = rows[place[rows].argsort()]
        agree = draft[rows][:-1] == best[rows][1:]  # made a token earlier, for the same place
        size = sum(len(tokenizer.token_bytes(token)) for token in ids[1:].tolist())
        out.append(
            Document(len(rows), size, float(nats[rows].sum()), float(kl[rows].sum()), int(same[rows].sum()),
                     int(agree.sum()))
        )  # fmt: skip
    return out


def ratio(values: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """Sum over sum, and its standard error over documents (of a ratio, by linearisation)."""
    whole, count = sum(sizes), len(values)
    mean = sum(values) / whole
    spread = sum((v - mean * s) ** 2 for v, s in zip(values, sizes, strict=True))
    return mean, math.sqrt(spread * count / max(1, count - 1)) / whole


def figures(found: Sequence[Document], reference: Sequence[Document]) -> Row:
    """A row's numbers: paired with the reference document by document."""
    size, tokens = [d.bytes for d in found], [d.tokens for d in found]
    drafts = [d.tokens - 1 for d in found]
    bits, _ = ratio([d.nats / math.log(2) for d in found], size)
    more, more_se = ratio([(d.nats - r.nats) / math.log(2) for d, r in zip(found, reference, strict=True)], size)
    kl, kl_se = ratio([d.kl for d in found], tokens)
    agree, _ = ratio([d.drafts for d in found], drafts)
    lost, lost_se = ratio([d.drafts - r.drafts for d, r in zip(found, reference, strict=True)], drafts)
    greedy, _ = ratio([d.greedy for d in found], tokens)
    return {
        "bits_per_byte": round(bits, 5), "more_bits": round(more, 6), "more_bits_se": round(more_se, 6),
        "kl": float(f"{kl:.4g}"), "kl_se": float(f"{kl_se:.3g}"), "greedy": round(greedy, 5),
        "drafts": round(agree, 5), "more_drafts": round(lost, 5), "more_drafts_se": round(lost_se, 5),
        "documents": len(found), "tokens": sum(tokens), "bytes": sum(size),
    }  # fmt: skip


def compared(
    study: Study, variants: Sequence[Variant], batches: Iterator[Inputs], tell: Callable[[list[Row]], object]
) -> list[Row]:
    """A row for the reference and every variant; `tell` is given the rows after every batch of documents."""
    reference = study.baseline()
    sums: list[list[Document]] = [[] for _ in (reference, *variants)]
    rows: list[Row] = []
    for inputs in batches:
        plain = Runs(inputs, reference.weights).results(reference.program)
        expected = plain["logits"].double().log_softmax(-1)
        sums[0] += documents(inputs, study.tokenizer, plain, expected)
        for i, variant in enumerate(variants, 1):
            found = Runs(inputs, variant.weights).results(variant.program)
            sums[i] += documents(inputs, study.tokenizer, found, expected)
        rows = [{**v.said, **figures(s, sums[0])} for v, s in zip((reference, *variants), sums, strict=True)]
        tell(rows)
    return rows


FORMATS = ("mxfp8", "mxfp4", "nvfp4")
OWN_WEIGHTS = {"mxfp8": "mxfp4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}  # what each format is multiplied with


def formats(study: Study) -> list[Variant]:
    """Part `formats`."""
    out = [study.rounded(Experts("bf16", "bf16")), study.passes("mxfp8"), study.passes("mxfp4")]
    out += [study.rounded(Experts("nvfp4", "nvfp4")), study.rounded(Experts("nvfp4", "nvfp4"), "nvfp4")]
    out += [study.rounded(Experts("float32", "float32"), "nvfp4")]
    for size in (16, 32, 128):
        out.append(study.rounded(Experts("float32", "float32", size), "mxfp4"))
        for fmt in FORMATS:
            out += [study.rounded(Experts(fmt, fmt, size), weights) for weights in ("stored", OWN_WEIGHTS[fmt])]
    out.append(study.rounded(Experts("float32", "float32", 16), "nvfp4"))
    out += [study.rounded(Experts("mxfp4-floor", "mxfp4-floor"))]
    return out


def layers(study: Study) -> list[Variant]:
    """Part `layers`."""
    scopes = [*(f"L{i:02d}.ffn" for i in range(study.config.num_hidden_layers)), "MTP.ffn"]
    out = [study.passes("mxfp8"), study.passes("mxfp4")]
    for fmt in ("mxfp4", "nvfp4"):
        out += [study.rounded(Experts(fmt, "float32")), study.rounded(Experts("float32", fmt))]
    out += [study.rounded(Experts("mxfp8", "mxfp4")), study.rounded(Experts("mxfp4", "mxfp8"))]
    for scope in scopes:
        out.append(study.passes("mxfp4", [s for s in scopes if s != scope]))
        if scope != "MTP.ffn":  # behind the logits: it only drafts
            out.append(study.rounded(Experts("mxfp4", "float32", only=(scope,))))
            out.append(study.rounded(Experts("float32", "mxfp4", only=(scope,))))
    out += [study.passes("mxfp4", keep) for keep in ((scopes[0], scopes[-2]), scopes[:2], scopes[1:4])]
    return out


def target_program(study: Study) -> Program:
    """sm_103a's, all experts kept on BF16 activations."""
    pipeline = default_pipeline(stored_formats(study.config), "sm_103a").without(QuantiseActivations.name)
    return lower(study.config, Options(), None, "sm_103a", pipeline)


def target(study: Study) -> list[Variant]:
    """Part `target`."""
    kept = target_program(study)
    weights = program_weights(kept, study.source)
    out = [Variant({"program": "sm_103a", "activations": "W4A16"}, kept, weights)]
    for fmt in ("mxfp8", "mxfp4"):
        program = kept.clone()
        QuantiseActivations(fmt).apply(program)  # type: ignore[arg-type]
        out.append(Variant({"program": "sm_103a", "activations": fmt}, program, weights))
    for experts in (Experts("nvfp4", "nvfp4"), Experts("mxfp8", "mxfp4")):
        program = rounded_experts(kept, experts, study.factors(0))
        out.append(Variant({"program": "sm_103a", **experts.said()}, program, weights))
    return out


def claims(study: Study, batches: Iterator[Inputs], tell: Callable[[list[Row]], object], seeds: int = 10) -> list[Row]:
    """Part `claims`: the program of sm_103a on text, and on random inputs with weights that reach its clamps."""
    before = target_program(study)
    given = [("text", inputs) for inputs in batches]
    given += [("random", Inputs.random(study.config, seed)) for seed in range(seeds)]
    worst: dict[tuple[str, str, str], float] = {}
    tokens: dict[str, int] = {}
    rows: list[Row] = []
    for name, inputs in given:
        runs, values = Runs(inputs), Values()
        runs.results(before, values.watch)
        tokens[name] = tokens.get(name, 0) + sum(len(ids) - 1 for ids in inputs.ids)
        for fmt in ("mxfp8", "mxfp4"):
            after = before.clone()
            QuantiseActivations(fmt).apply(after)  # type: ignore[arg-type]
            forced = EqualInputs(values, counterparts(before, after))
            runs.results(after, forced.watch)
            for (_, node), error in forced.errors.items():
                key = (name, fmt, node.meta["scope"])
                worst[key] = max(worst.get(key, 0.0), error)
        rows = [
            {"inputs": name, "activations": fmt, "scope": scope, "error": round(error, 4), "tokens": tokens[name]}
            for (name, fmt, scope), error in sorted(worst.items())
        ]
        tell(rows)
    return rows


@dataclass
class Greedy:
    """One prompt's greedy text and, for each of its tokens, the drafts made behind it."""

    tokens: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)

    def kept(self) -> list[int]:
        """Drafts kept by each verifying step, as an engine would walk the text."""
        at, out = 0, []
        while at + len(self.drafts[0]) < len(self.tokens):
            following = self.tokens[at + 1 :]
            right = [a == b for a, b in zip(self.drafts[at], following, strict=False)]
            kept = right.index(False) if False in right else len(right)
            out.append(kept)
            at += kept + 1
        return out


@torch.no_grad()
def generate(study: Study, variant: Variant, prompts: Sequence[Tensor], new: int, most: int) -> list[Greedy]:
    """Greedy continuations of `new` tokens, `most` chained drafts of the MTP block behind each."""
    config, layout, program = study.config, StateLayout(), variant.program
    room = max(map(len, prompts)) + new + most + 1
    state = program_state(program, init_state(config, layout, len(prompts), room))
    out = [Greedy() for _ in prompts]
    spans = [(i, 0, ids) for i, ids in enumerate(prompts)]
    for _ in range(new):
        step = make_step(config, layout, spans, room, logits="last")
        found = run(program, "step", step, state, variant.weights)
        state.update({k.removeprefix("state."): v for k, v in found.items() if k.startswith("state.")})
        chosen = found["logits"].argmax(-1)
        following = torch.cat([torch.cat((ids[1:], chosen[i : i + 1])) for i, (_, _, ids) in enumerate(spans)])
        block = run(program, "mtp", {**step, "streams": found["streams"], "next_ids": following}, state,
                    variant.weights)  # fmt: skip
        state["mtp.0.window"] = block["state.mtp.0.window"]
        spans = [(i, start + len(ids), chosen[i : i + 1]) for i, start, ids in spans]
        drafts = [block["logits"].argmax(-1)]
        ahead, streams, at = dict(state), block["streams"][step["logit_rows"]], spans
        while len(drafts) < most:
            step = make_step(config, layout, at, room)
            block = run(program, "mtp", {**step, "streams": streams, "next_ids": drafts[-1]}, ahead, variant.weights)
            ahead["mtp.0.window"], streams = block["state.mtp.0.window"], block["streams"]
            drafts.append(block["logits"].argmax(-1))
            at = [(i, start + 1, ids) for i, start, ids in at]
        for i, one in enumerate(out):
            one.tokens.append(int(chosen[i]))
            one.drafts.append([int(draft[i]) for draft in drafts])
    return out


def drafted(
    study: Study, variants: Sequence[Variant], prompts: Sequence[Tensor], tell: Callable[[list[Row]], object],
    new: int, most: int = 3,
) -> list[Row]:  # fmt: skip
    """Part `drafts`: acceptance of the first draft, and tokens of a step with `most`."""
    rows: list[Row] = []
    first: list[Greedy] = []
    for variant in (study.baseline(), *variants):
        found = generate(study, variant, prompts, new, most)
        first = first or found
        right = [sum(d[0] == t for d, t in zip(g.drafts, g.tokens[1:], strict=False)) for g in found]
        steps = [g.kept() for g in found]
        accepted, accepted_se = ratio(right, [new - 1] * len(found))
        length, length_se = ratio([sum(s) + len(s) for s in steps], [len(s) for s in steps])
        same = sum(a == b for g, f in zip(found, first, strict=True) for a, b in zip(g.tokens, f.tokens, strict=True))
        rows.append(
            {**variant.said, "accepted": round(accepted, 4), "accepted_se": round(accepted_se, 4),
             "tokens_a_step": round(length, 3), "tokens_a_step_se": round(length_se, 3), "max_drafts": most,
             "same_tokens": round(same / (new * len(found)), 4), "prompts": len(found), "tokens": new * len(found)}
        )  # fmt: skip
        tell(rows)
    return rows


def prompts_of(study: Study, texts: Sequence[str], count: int) -> list[Tensor]:
    """Beginnings of held-out pages, 32 to 200 tokens long."""
    draw, out = random.Random(1), []
    for text in texts:
        ids = study.tokenizer.encode(text[:2000])
        if len(ids) >= 200 and len(out) < count:
            out.append(torch.tensor([study.tokenizer.bos_token_id, *ids[: draw.randint(32, 200)]]))
    return out


def write(path: Path | None, part: str, rows: Sequence[Row]) -> None:
    """Prints the rows, and puts them in place of the file's rows of this part."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = [{"benchmark": "accuracy", "part": part, "date": date, **row} for row in rows]
    print(*map(json.dumps, made), sep="\n", flush=True)
    if path is not None:
        known = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in known if json.loads(line)["part"] != part]
        path.write_text("\n".join([*kept, *map(json.dumps, made)]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("formats", "layers", "target", "drafts", "claims"))
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--documents", type=int, default=32, help="pages, or prompts of part drafts")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new", type=int, default=40, help="tokens after each prompt of part drafts")
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study()
    texts = study.texts(args.heldout)

    def tell(rows: list[Row]) -> None:
        write(args.rows, args.part, rows)

    if args.part == "drafts":
        asked = [study.passes("mxfp8"), study.passes("mxfp4"), study.rounded(Experts("nvfp4", "nvfp4"))]
        asked += [study.rounded(Experts(fmt, fmt, 32), OWN_WEIGHTS[fmt]) for fmt in FORMATS]
        asked += [study.rounded(Experts(fmt, fmt, 32)) for fmt in FORMATS]
        drafted(study, asked, prompts_of(study, texts, args.documents), tell, args.new)
        return
    if args.part == "claims":
        claims(study, study.batches(texts[: args.documents], args.tokens), tell)
        return
    parts = {"formats": formats, "layers": layers, "target": target}
    compared(study, parts[args.part](study), study.batches(texts[: args.documents], args.tokens), tell)


if __name__ == "__main__":
    main()
