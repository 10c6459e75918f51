"""The direction of the arrows: passes say what, schedules say how, the artifact says it, the runtime does.

Reads the syntax tree of every file, so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = ("dsv4c", "passes", "schedules", "runtime", "tests", "examples", "benchmarks")
NEED_DYNAMO = [ROOT / "runtime" / "dynamo" / name for name in ("engine.py", "worker.py")]  # which need not be there
COMPILE_SIDE = ("triton", "tilelang", "torch._inductor", "torch._dynamo", "torch.export", "torch.fx", "torch.compile")


@dataclass(frozen=True)
class Rule:
    """Files under `where` import no name of `never`; of dsv4c, only names of `only` (all if empty)."""

    where: tuple[str, ...]
    never: tuple[str, ...]
    why: str
    only: tuple[str, ...] = ()


RULES = (
    Rule(("passes/",), ("dsv4c.schedules", "dsv4c.runtime"), "passes say what to compute, never how or when"),
    Rule(("schedules/",), ("dsv4c.passes", "dsv4c.runtime"), "schedules see one op, not the program or the server"),
    Rule(
        ("runtime/",),
        COMPILE_SIDE,
        "nothing is compiled while serving; kernels are loaded by `torch._C._aoti`",
        only=("dsv4c.artifact", "dsv4c.errors", "dsv4c.runtime"),
    ),
    Rule(
        ("dsv4c/model/", "dsv4c/checkpoint/", "dsv4c/chat/"),
        ("dsv4c.passes", "dsv4c.schedules", "dsv4c.runtime"),
        "the model and its formats know neither compiler nor server",
    ),
    Rule(("dsv4c/artifact.py", "dsv4c/config.py", "dsv4c/errors.py"), ("torch", "numpy"), "contracts are plain values"),
    Rule(("",), ("passes", "schedules", "runtime"), "import it as `dsv4c.<name>`: a wheel installs one package"),
)

# No exceptions. To load an AOTInductor package the runtime uses torch._C._aoti (AOTIModelPackageLoader), which is
# torch's own C++ loader; torch._inductor.aoti_load_package wraps it and imports 800 modules of compiler to do so.


@dataclass(frozen=True)
class Import:
    """One imported (or, below torch, mentioned) dotted name."""

    file: str
    line: int
    name: str


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("dsv4c", *parts) if parts[0] in ("passes", "schedules", "runtime") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports_of(source: str, file: str, module: str) -> Iterator[Import]:
    """Every dotted name that `source` imports; `from a import b` gives `a.b`; `torch.x.y` in code counts as well."""
    package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(file, node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("torch."):
            yield Import(file, node.lineno, dotted(node))


def inside(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def offences(found: Import) -> Iterator[str]:
    for rule in RULES:
        if not found.file.startswith(rule.where):
            continue
        outside = bool(rule.only) and inside(found.name, ("dsv4c",)) and not inside(found.name, rule.only)
        if inside(found.name, rule.never) or outside:
            yield f"{found.file}:{found.line}: `{found.name}` breaks the arrows: {rule.why}"


def python_files() -> list[Path]:
    # rglob does not enter the symlinks dsv4c/passes, ...: every file is read once, under its real path.
    found = (path for tree in TREES for path in (ROOT / tree).rglob("*.py"))
    return sorted(path for path in found if not any(p.is_symlink() for p in path.parents))


def test_import_direction() -> None:
    files = python_files()
    assert files, "no Python file found"
    problems: list[str] = []
    for path in files:
        file = path.relative_to(ROOT).as_posix()
        for found in imports_of(path.read_text(encoding="utf-8"), file, module_name(path)):
            problems += offences(found)
    assert not problems, "imports against the arrows:\n" + "\n".join(dict.fromkeys(problems))


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("passes/x.py", "from dsv4c.schedules import select", True),
        ("passes/x.py", "from dsv4c import runtime", True),
        ("passes/x.py", "from dsv4c.program import Program", False),
        ("schedules/moe/x.py", "def f():\n    import dsv4c.passes.stitch", True),
        ("runtime/x.py", "from dsv4c.config import ModelConfig", True),
        ("runtime/x.py", "from dsv4c import __version__", True),
        ("runtime/x.py", "from dsv4c.artifact import Manifest\nfrom dsv4c.runtime.kvpool import Pool", False),
        ("runtime/x.py", "from . import kvpool\nfrom .batch import Batch", False),
        ("runtime/x.py", "from ..config import ModelConfig", True),
        ("runtime/x.py", "import torch\nf = torch.compile", True),
        ("runtime/x.py", "import torch\nload = torch._inductor.aoti_load_package", True),
        ("runtime/kernels.py", "from torch._C._aoti import AOTIModelPackageLoader", False),
        ("dsv4c/config.py", "import torch", True),
        ("examples/x.py", "from runtime.kvpool import Pool", True),
        ("examples/x.py", "import runtimes", False),
    ],
)
def test_the_table_finds_what_it_should(file: str, line: str, wrong: bool) -> None:
    found = [problem for i in imports_of(line, file, module_name(ROOT / file)) for problem in offences(i)]
    assert bool(found) == wrong, found


def test_the_runtime_loads_without_the_compile_side() -> None:
    """Imports every runtime module in a fresh interpreter: nothing of the compiler comes along, not even by torch."""
    modules = sorted(module_name(p) for p in (ROOT / "runtime").rglob("*.py") if p not in NEED_DYNAMO)
    code = (
        "import importlib, sys, torch; before = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"bad = {('triton', 'tilelang', 'torch._inductor', 'torch._dynamo', 'dsv4c.passes', 'dsv4c.schedules')!r}\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.startswith(bad)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing the runtime also imported {done.stdout}"
