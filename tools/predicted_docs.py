"""Writes docs/predicted.md, docs/predicted.svg and the tables of docs/blackwell.md: predicted steps, and their error.

usage: python tools/predicted_docs.py        (a few minutes: it lowers each model for each target)
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import predicted
from dsv4c.config import preset
from dsv4c.predict import Predictor, StepCost

DOCS = Path(__file__).parent.parent / "docs"
MODELS = ("flash", "pro")
TARGETS = {"sm_103a": "GB300", "sm_100a": "B200", "sm_90a": "H200"}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (1, 8, 64, 256)
CONTEXT = 8192
PROMPTS = ((1024, 0), (8192, 0), (8192, 122880))
COLOURS = {"sm_103a": "#2a7d2e", "sm_100a": "#1f5fa8", "sm_90a": "#b3541e"}

BEGIN, END = "<!-- predicted: begin -->", "<!-- predicted: end -->"

Steps = Mapping[tuple[str, str], tuple[Sequence[StepCost], Sequence[StepCost]]]


def predict() -> Steps:
    """(model, target) -> steps of every batch, and of every prompt."""
    out = {}
    for model in MODELS:
        for target in TARGETS:
            print(model, target, file=sys.stderr, flush=True)
            predictor = Predictor(preset(model), target)
            decode = [predictor.decode(batch, CONTEXT) for batch in BATCHES]
            out[model, target] = decode, [predictor.prefill(*prompt) for prompt in PROMPTS]
    return out


def plot(steps: Steps, file: Path) -> None:
    """Milliseconds of a decode step by batch: the prediction, and for Blackwell the band from low to high."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dsv4c", "font.size": 9})
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(9, 3.6))
    for panel, model in zip(panels, MODELS, strict=True):
        for target, card in TARGETS.items():
            decode, _ = steps[model, target]
            expected = [1e3 * step.seconds for step in decode]
            panel.plot(BATCHES, expected, color=COLOURS[target], marker="o", markersize=3, linewidth=1.2, label=card)
            if target == "sm_103a":
                low, high = [1e3 * step.low for step in decode], [1e3 * step.high for step in decode]
                panel.fill_between(BATCHES, low, high, color=COLOURS[target], alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        panel.set_title(f"{model}: decode at a context of 8K, one card", fontsize=9)
        panel.set_xlabel("requests")
        panel.grid(True, which="both", linewidth=0.3)
    panels[0].set_ylabel("ms a step")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None, "Creator": None})


def _step_rows(steps: Steps, model: str) -> Iterator[str]:
    yield "| step | GB | TFLOP | " + " | ".join(f"{card}, ms | from, to" for card in TARGETS.values()) + " |"
    yield "| --- " * (3 + 2 * len(TARGETS)) + "|"
    found = [steps[model, target] for target in TARGETS]
    chosen = [[step for step, batch in zip(decode, BATCHES, strict=True) if batch in SHOWN] for decode, _ in found]
    for row in zip(*(few + list(prompts) for few, (_, prompts) in zip(chosen, found, strict=True)), strict=True):
        before = row[0].context - row[0].tokens if row[0].phase == "prefill" else 0
        name = f"{row[0].phase} {row[0].tokens:,}" + (f" behind {before:,}" if before else "")
        cells = (f"{1e3 * step.seconds:.2f} | {1e3 * step.low:.2f}, {1e3 * step.high:.2f}" for step in row)
        yield f"| {name} | {row[0].bytes / 1e9:.0f} | {row[0].flops / 1e12:.2f} | {' | '.join(cells)} |"


def _op_rows(step: StepCost, least: float = 0.01) -> Iterator[str]:
    yield "| op | schedule | calls | us a call | ms | from, to | GB | TFLOP | rates of |"
    yield "| --- " * 9 + "|"
    whole = sum(op.seconds for op in step.ops)
    shown = [op for op in step.ops if op.seconds >= least * whole]
    for op in shown:
        yield (
            f"| `{op.op}` | `{op.schedule.partition('.')[2]}` | {op.calls} | {1e6 * op.seconds / op.calls:.1f} "
            f"| {1e3 * op.seconds:.2f} | {1e3 * op.low:.2f}, {1e3 * op.high:.2f} | {op.bytes / 1e9:.2f} "
            f"| {op.flops / 1e12:.3f} | {'itself' if op.measured else 'its like'} |"
        )
    rest = [op for op in step.ops if op.seconds < least * whole]
    yield (
        f"| {len(rest)} others | | {sum(op.calls for op in rest)} | | {1e3 * sum(op.seconds for op in rest):.2f} "
        f"| | {sum(op.bytes for op in rest) / 1e9:.2f} | {sum(op.flops for op in rest) / 1e12:.3f} | |"
    )


def _format_rows() -> Iterator[str]:
    """Steps of flash on a GB300 by what its experts multiply."""
    yield "| experts | step | experts, ms | from, to | whole step, ms | from, to |"
    yield "| --- " * 6 + "|"
    for words, predictor in (
        ("W4A8 MXFP8", Predictor(preset("flash"), "sm_103a")),
        ("W4A4 MXFP4", Predictor(preset("flash"), "sm_103a", activations="mxfp4")),
        ("NVFP4 checkpoint", Predictor(preset("flash-nvfp4"), "sm_103a")),
    ):
        for name, step in (
            ("decode 64", predictor.decode(64, CONTEXT)), ("decode 256", predictor.decode(256, CONTEXT)),
            ("prefill 8,192", predictor.prefill(8192)),
        ):  # fmt: skip
            experts = [op for op in step.ops if op.op.startswith("experts_")]
            cells = (
                f"{1e3 * sum(part.seconds for part in parts):.2f} "
                f"| {1e3 * sum(part.low for part in parts):.2f}, {1e3 * sum(part.high for part in parts):.2f}"
                for parts in (experts, (step,))
            )
            yield f"| {words} | {name} | {' | '.join(cells)} |"


def page(steps: Steps) -> str:
    """The whole page."""
    errors, args = io.StringIO(), ["--steps"]
    with redirect_stdout(errors):
        predicted.main(args)
    ops, summary, whole = errors.getvalue().strip().split("\n\n")
    flash = dict(zip(BATCHES, steps["flash", "sm_103a"][0], strict=True))
    lines = [
        TEXT.format(date=date.today().isoformat()),
        "## Steps", "", "![decode steps by batch](predicted.svg)", "",
        *(line for model in MODELS for line in (f"### `{model}`, context 8,192", "", *_step_rows(steps, model), "")),
        "## Ops of `flash` on a GB300", "",
        *(line for batch in (1, 64, 256) for line in (f"### decode {batch}", "", *_op_rows(flash[batch]), "")),
        "### prefill 8,192", "", *_op_rows(steps["flash", "sm_103a"][1][1]), "",
        "## Formats of the experts", "", FORMATS, *_format_rows(), "",
        "## Error on an H200", "", ERROR, "### Ops above 20 us", "", ops, "",
        *(f"- {line}" for line in summary.splitlines()), "", MISSES, "### Whole steps", "", STEPS, whole, "",
    ]  # fmt: skip
    return "\n".join(lines)


TEXT = """\
# Predicted

Written by `python tools/predicted_docs.py` on {date}, for the schedules of that commit; `dsv4c predict` says the same
for any model, batch, context and prompt:

<!-- not run: lowering a layer of each kind of flash takes half a minute -->
```bash
dsv4c predict flash --target sm_103a --batch 1,8,64,256 --prefill 8192 --ops
```

**No Blackwell card was measured.** A kernel's constants come from an H200; the card's rates are what NVIDIA states
times the share that an H200 reaches of its own (`schedules/_roofline.py`, with sources). Each time stands between two
others:

- *from*: NVIDIA's stated rates for the bytes and operations that the result needs, nothing exposed but 1 us a launch.
- the prediction: each kernel at its share of an H200. *Rates of* says whose: *itself*, the same source was measured on
  an H200; *its like*, a kernel that no card has run takes the constants of Hopper's kernel for its op.
- *to*: kernels of the second sort reach half of these shares. It is an assumption, not a bound: kernels that were never
  tuned on a card can be slower.

Assumed besides, and not measured: the L2 cache's rate grows with multiprocessors and clock (11 TB/s on an H200, of
which its FP8 products reach 10.2); launches, first loads and rounds cost the microseconds that they cost on an H200;
kernels that reach less than 30 % of the matrix units are held up by instructions, which grow with multiprocessors and
clock too (1.92 GHz for `sm_103a`, 1.85 for `sm_100a`); a tile of fewer than 64 columns takes as long as one of 64, the
time in which its 128 rows of weights are read from shared memory at 128 bytes a clock.

One card, no communication. `pro` fits none (its weights are 865 GB): its times are those of one card as if it did.
Routing is even, contexts are equal, rows sample with a temperature, drafts are off. GB and TFLOP are what a step must
move and compute: each weight that routing touches once, activations between calls, the keys that are seen.
"""
FORMATS = """\
`flash` on a GB300, context 8,192. Decoding reads weights, which are FP4 in all three: narrower activations are next to
nothing there, and a prompt's experts alone are faster. What they cost in accuracy: [blackwell.md](blackwell.md).
"""
ERROR = """\
A call is its kernels one after another; a kernel takes

    fixed + rounds x round + (memory^4 + cache^4 + arithmetic^4)^(1/4)

with memory its bytes over the copy rate times a share, cache what it reads again over the L2's rate, arithmetic the
operations of whole tiles (padded rows, experts that even routing hits, each in its smallest tile, the last round of
blocks as if it were full) over the unit's rate times a share. Four constants a kernel, fitted on the tuned rows of an
H200 at every other size (model, tokens, requests, context); held out are the rows at the other sizes. The form was
chosen with all rows in view, the constants were not. `python benchmarks/predicted.py` repeats it, `--calibrate` fits
anew; all rows are in `benchmarks/predicted.jsonl`. Not counted: sampling with filters (its time depends on the logits:
63 us for one row with top-p, 660 for 64 mixed ones) and skewed routing.
"""
MISSES = """\
`index_scores` alone is in no program (`index_topk_packed` is): what no token sees is filled in by a kernel that is
calibrated at contexts where little is unseen. FP4 keys in decode are bound by instructions, which the form knows only
as a share of the matrix units.
"""
STEPS = """\
`flash` with 4 and 20 layers through the engine, device time, medians of the runs of the last day that measured a step
(`benchmarks/gpu_engine.jsonl`). No step calibrated anything. Lanes overlap as the planner's model of the machine plays
them. Steps of one token, but for 20 layers at 8,192, were measured before hyper-connections of few tokens took one
launch: 8.2 us a call then, 4.9 as predicted here, two calls a layer.
"""


def _insert(page: Path, lines: Sequence[str]) -> None:
    """Puts lines between the page's two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    steps = predict()
    short = [line for model in MODELS for line in (f"`{model}`, context 8,192:", "", *_step_rows(steps, model), "")]
    _insert(DOCS / "blackwell.md", ["", *short])
    plot(steps, DOCS / "predicted.svg")
    (DOCS / "predicted.md").write_text(page(steps), encoding="utf-8")


if __name__ == "__main__":
    main()
