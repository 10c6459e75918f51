"""Where on this machine a place in the model is: `attention.py:Attention.forward `latent = ...`` -> path and line."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Place:
    """One place of a provenance: a function of a file, and the text of a line in it.

    `file` and `line` are None where this dsv4c's model has no such line any more, or never had (a pass's own).
    """

    text: str
    function: str
    file: Path | None = None
    line: int | None = None

    @property
    def where(self) -> str:
        """`attention.py:194` if it was found, else the name of the file alone; empty for what no file has."""
        if self.file is None:
            return ""
        return f"{self.file.name}:{self.line}" if self.line is not None else self.file.name


def locate(place: str, folder: Path = MODEL) -> Place:
    """Finds a place of `origin` in the sources of the model."""
    match = re.fullmatch(r"([\w.]+\.py):([\w.<>]+) `(.*)`", place)
    if match is None:
        return Place(place, "")
    file, function, text = folder / match[1], match[2], match[3]
    for (name, first), last in _functions(file).items() if file.is_file() else ():
        if name == function:
            lines = file.read_text(encoding="utf-8").splitlines()
            line = next((i for i in range(first, last + 1) if lines[i - 1].strip() == text), None)
            if line is not None:
                return Place(text, function, file, line)
    return Place(text, function, file)


@functools.lru_cache(maxsize=64)
def _functions(file: Path) -> dict[tuple[str, int], int]:
    """(qualified name, first line) -> last line of every function in a file."""
    out: dict[tuple[str, int], int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                out[prefix + child.name, child.lineno] = child.end_lineno or child.lineno
                visit(child, f"{prefix}{child.name}.<locals>.")
            else:
                visit(child, prefix)

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return out
