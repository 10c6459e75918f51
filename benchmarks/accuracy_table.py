"""The tables of docs/blackwell.md from the rows of benchmarks/accuracy.py, as Markdown.

usage: python benchmarks/accuracy_table.py benchmarks/accuracy.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAMES = {"float32": "float32", "bf16": "W4A16", "W4A16": "W4A16", "mxfp8": "W4A8 MXFP8", "mxfp4": "W4A4 MXFP4",
         "nvfp4": "W4A4 NVFP4", "mxfp4-floor": "W4A4 MXFP4, OCP's scale"}  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name(row: Row) -> str:
    """`W4A4 MXFP4`, or a format for each product."""
    parts = row["activations"].split(", ")
    if len(parts) == 2:
        return ", then ".join(NAMES[p].split()[-1] for p in parts)
    return NAMES[parts[0]]


def compared(row: Row) -> list[str]:
    """The figures of a row that is compared with float32; thousandths of a bit a byte."""
    return [
        f"{row['bits_per_byte']:.4f}",
        f"{1000 * row['more_bits']:+.1f} ± {1000 * row['more_bits_se']:.1f}",
        f"{1000 * row['kl']:.2f} ± {1000 * row['kl_se']:.2f}",
        f"{100 * row['greedy']:.1f} %",
        f"{100 * row['drafts']:.1f} %",
        f"{100 * row['more_drafts']:+.1f} ± {100 * row['more_drafts_se']:.1f}",
    ]


FIGURES = ("bits a byte", "more, in 1/1000", "KL, 1/1000 nat", "greedy", "drafts", "more, points")


def formats(rows: Sequence[Row]) -> str:
    """Without a rotation, and with one in blocks of 32; other blocks are in the rows."""
    rows = [r for r in rows if r.get("hadamard", 32) == 32]
    weights = {"stored": "as stored", "mxfp4": "MXFP4 again", "nvfp4": "NVFP4"}
    return markdown(
        ("activations", "Hadamard", "weights", *FIGURES),
        [[name(r), str(r.get("hadamard", "")), weights[r.get("weights", "stored")], *compared(r)] for r in rows],
    )


def layers(rows: Sequence[Row]) -> str:
    """What rounding some of it costs; and, of MXFP4, each layer alone."""
    whole = [r for r in rows if "only" not in r and len(r.get("keep", ())) <= 3]
    first = markdown(
        ("activations", "kept", "KL, 1/1000 nat", "more bits a byte, in 1/1000", "drafts: more, points"),
        [[name(r), ", ".join(k.split(".")[0] for k in r.get("keep", ())), *(compared(r)[i] for i in (2, 1, 5))]
         for r in whole],
    )  # fmt: skip
    scopes = sorted({r["only"][0] for r in rows if "only" in r})
    alone = {(r["only"][0], r["activations"]): r["kl"] for r in rows if "only" in r}
    for row in rows:
        left = set(scopes) - set(row.get("keep", scopes))
        if len(left) == 1:
            alone[left.pop(), "both"] = row["kl"]
    lines = [("both products", "both"), ("first", "mxfp4, float32"), ("second", "float32, mxfp4")]
    second = markdown(
        ("MXFP4 alone in: KL, 1/1000 nat", *(s.split(".")[0] for s in scopes)),
        [[said, *(f"{1000 * alone[s, key]:.1f}" for s in scopes)] for said, key in lines],
    )
    return f"{first}\n\n{second}"


def target(rows: Sequence[Row]) -> str:
    return markdown(("activations", *FIGURES), [[name(r), *compared(r)] for r in rows])


def drafts(rows: Sequence[Row]) -> str:
    weights = {"stored": "as stored", "mxfp4": "MXFP4 again", "nvfp4": "NVFP4"}
    return markdown(
        ("activations", "Hadamard", "weights", "first draft kept", "tokens a step", "same text"),
        [
            [
                name(r), str(r.get("hadamard", "")), weights[r.get("weights", "stored")],
                f"{100 * r['accepted']:.1f} ± {100 * r['accepted_se']:.1f} %",
                f"{r['tokens_a_step']:.2f} ± {r['tokens_a_step_se']:.2f}", f"{100 * r['same_tokens']:.0f} %",
            ]
            for r in rows
        ],
    )  # fmt: skip


def claims(rows: Sequence[Row]) -> str:
    scopes = sorted({r["scope"] for r in rows})
    found = {(r["activations"], r["inputs"], r["scope"]): r["error"] for r in rows}
    tokens = {r["inputs"]: r["tokens"] for r in rows}
    kinds = sorted({(r["activations"], r["inputs"]) for r in rows}, key=lambda k: (k[0] != "mxfp8", k[1]))
    lines = []
    for fmt, what in kinds:
        errors = [f"{found[fmt, what, s]:.3f}" for s in scopes]
        lines.append([NAMES[fmt], f"{what}, {tokens[what]:,} tokens", *errors])
    return markdown(("activations", "inputs", *(s.split(".")[0] for s in scopes)), lines)


PARTS: dict[str, Callable[[Sequence[Row]], str]] = {
    "formats": formats, "drafts": drafts, "target": target, "layers": layers, "claims": claims,
}  # fmt: skip


def tables(rows: Sequence[Row]) -> Iterator[str]:
    for part, make in PARTS.items():
        found = [row for row in rows if row["part"] == part]
        if found:
            size = {key: found[0][key] for key in ("documents", "prompts", "tokens", "bytes") if key in found[0]}
            yield f"### {part}: {size}\n\n{make(found)}\n"


if __name__ == "__main__":
    print(*tables([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]), sep="\n")
