"""Numbers and names as the report writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from dsv4c.places import locate
from dsv4c.runtime.memory import text_of


def count_text(value: float) -> str:
    """`1,945`"""
    return f"{int(value):,}"


def bytes_text(value: float) -> str:
    """`2.21 GB`"""
    return text_of(int(value))


def flops_text(value: float) -> str:
    """`19.2 GFLOP`"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}FLOP"
    return f"{value:,.0f} FLOP"


def time_text(microseconds: float) -> str:
    """`850 us`, `2.08 ms`"""
    return f"{microseconds / 1e3:,.2f} ms" if microseconds >= 1000 else f"{microseconds:,.0f} us"


def change_text(before: float, now: float) -> str:
    """`-63 %`, `+8.9 %`; nothing where it is below a tenth of a percent."""
    if before == now or not before:
        return ""
    share = 100 * (now - before) / before
    return f"{share:+.0f} %" if abs(share) >= 10 else f"{share:+.1f} %" if abs(share) >= 0.05 else ""


def span_text(before: int, after: int) -> str:
    """`1,945 → 1,559`, or one number."""
    return f"{before:,} → {after:,}" if before != after else f"{after:,}"


def between_text(values: Iterable[float], text: Any = count_text) -> str:
    """`1 to 64`, or one number."""
    found = sorted(set(values))
    return text(found[0]) if len(found) == 1 else f"{text(found[0])} to {text(found[-1])}"


def layers_text(sections: Iterable[str]) -> str:
    """`L04, L06-L09` for sublayers of one kind, which is said elsewhere; other names as they are."""
    numbers, others = set(), []
    for section in sections:
        if section.startswith("L") and section[1:3].isdigit():
            numbers.add(int(section[1:3]))
        else:
            others.append(section)
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    shown = [f"L{r[0]:02d}" if len(r) == 1 else f"L{r[0]:02d}-L{r[-1]:02d}" for r in runs]
    return ", ".join([*shown, *others])


def counted_text(labels: Iterable[str]) -> str:
    """`linear x3, rope`"""
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(label if n == 1 else f"{label} x{n}" for label, n in counts.items())


def origin_text(origin: Iterable[str]) -> str:
    """A line for each place in the model: `attention.py:194 latent = ...`."""
    places = [locate(place) for place in dict.fromkeys(origin)]
    return "\n".join(f"{place.where} {place.text}".strip() for place in places)


def pairs_json(pairs: Iterable[tuple[str, str]]) -> str:
    """JSON for an attribute; nothing for no pairs."""
    held = list(pairs)
    return json.dumps(held, separators=(",", ":"), ensure_ascii=False) if held else ""


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    return Markup(text)  # no `<` is left to end the element
