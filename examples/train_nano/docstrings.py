"""Prose that lives in source code: Python docstrings, Perl's pod, and botocore's service models.

Each function gives the blocks of one file as `corpus.page_blocks` does; corpus.py filters and joins them.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from lxml import html

Block = tuple[str, str]

_ROLE = re.compile(r":[a-z:]+:`~?(?:[^`<]*<)?([^`>]*)>?`")
_POD = re.compile(r"[BCEFILSX]<+ ?([^<>]*?) ?>+")


def _paragraphs(text: str) -> Iterator[Block]:
    for part in re.split(r"\n\s*\n", text):
        lines = part.split("\n")
        if not part.strip() or any(re.fullmatch(r"\s*[-=~^*#+]{3,}\s*", line) for line in lines):
            continue
        if lines[0].startswith(">>> ") or all(line.startswith("    ") for line in lines):
            yield "code", inspect.cleandoc(part)
            continue
        flat = " ".join(line.strip() for line in lines)
        flat = _ROLE.sub(r"\1", flat).replace("``", "").replace("`", "").replace("**", "")
        yield ("item", flat[2:]) if flat.startswith(("- ", "* ")) else ("text", flat)


def python_blocks(source: bytes, module: str) -> list[Block]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    out: list[Block] = []

    def visit(node: ast.AST, name: str, level: int) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 40:
                out.append(("head", "#" * min(level, 3) + " " + name))
                out.extend(_paragraphs(doc))
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    own = child.name if level == 1 else f"{name}.{child.name}"
                    visit(child, own, level + 1)

    visit(tree, module, 1)
    return out


def pod_blocks(source: bytes) -> list[Block]:
    out: list[Block] = []
    for part in re.split(r"\n\s*\n", source.decode(errors="replace")):
        command = re.match(r"=(head\d|item|over|back|cut|begin|end|for|encoding|pod)\b\s*(.*)", part, re.S)
        if part.startswith((" ", "\t")):
            out.append(("code", inspect.cleandoc(part)))
            continue
        text = command.group(2) if command else part
        for _ in range(3):
            text = _POD.sub(lambda m: m.group(1).split("|")[0], text)
        text = " ".join(text.split())
        if command is None:
            out.append(("text", text))
        elif command.group(1).startswith("head"):
            out.append(("head", "#" * min(3, int(command.group(1)[4:])) + " " + text.capitalize()))
        elif command.group(1) == "item" and len(text) > 2:
            out.append(("term", text))
    return out


def service_blocks(packed: bytes) -> list[Block]:
    """One AWS service: what its operations do, then what its structures hold."""
    model: dict[str, Any] = json.loads(gzip.decompress(packed))
    service = model["metadata"].get("serviceFullName", "")
    out: list[Block] = [("head", "# " + service)]

    def add(kind: str, title: str, text: str | None) -> None:
        if text:
            root = html.fromstring(f"<div>{text}</div>")
            out.append((kind, title))
            parts = root.xpath(".//p[not(ancestor::li)] | .//li") or [root]
            out.extend(
                ("item" if part.tag == "li" else "text", " ".join(part.text_content().split())) for part in parts
            )

    add("head", "# " + service, model.get("documentation"))
    for name, operation in model["operations"].items():
        add("head", "## " + name, operation.get("documentation"))
    for name, shape in model["shapes"].items():
        add("head", "## " + name, shape.get("documentation"))
        for member, reference in shape.get("members", {}).items():
            add("term", member, reference.get("documentation"))
    return out
