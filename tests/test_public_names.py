"""`import dsv4c`: every public name is there, imported when it is used, and says what it is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4c

SOURCE = Path(dsv4c.__file__)


def test_the_names_are_sorted_and_each_has_one_home() -> None:
    homes = [name for names in dsv4c._HOMES.values() for name in names]
    assert sorted(dsv4c.__all__) == sorted(homes)
    assert dsv4c.__all__ == sorted(dsv4c.__all__, key=_natural)
    assert sorted(dsv4c.__all__) == sorted(_imported_for_types())


def _natural(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def _imported_for_types() -> list[str]:
    block = next(n for n in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(n, ast.If))
    return [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]


@pytest.mark.parametrize("name", dsv4c.__all__)
def test_no_submodule_hides_a_public_name(name: str) -> None:
    assert not (SOURCE.parent / f"{name}.py").exists() and not (SOURCE.parent / name).is_dir()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dsv4c; dir(dsv4c); print(*(m for m in ('torch', 'numpy', 'rich') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no public name `pipelin`"):
        dsv4c.pipelin  # type: ignore[attr-defined]  # noqa: B018


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself, as functions."""
    for name, value in vars(kind).items():
        found = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        found = getattr(found, "fget", None) or getattr(found, "func", None) or found
        if not name.startswith("_") and inspect.isfunction(found):
            yield name, found


def documented_fields(kind: type) -> set[str]:
    """Fields with a string behind them, and those that the class's own docstring names."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    behind = {
        node.target.id
        for node, string in itertools.pairwise(tree.body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(string, ast.Expr)
    }
    return behind | set(re.findall(r"`(\w+)`", inspect.getdoc(kind) or ""))


def raised(function: Any) -> set[str]:
    """The dsv4c errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name) and call.func.id in dsv4c.__all__}


@pytest.mark.parametrize("name", dsv4c.__all__)
def test_every_public_name_says_what_it_is_its_fields_and_its_errors(name: str) -> None:
    value = getattr(dsv4c, name)
    if not callable(value):
        return  # docs/api.md, which is generated, has the string behind it
    functions = [(name, value)] if inspect.isfunction(value) else list(members(value))
    assert (inspect.getdoc(value) or "").strip(), name
    for member, function in functions:
        text = inspect.getdoc(function) or ""
        assert text, f"`{name}.{member}` has no docstring"
        for error in raised(function):
            assert error in text, f"`{name}.{member}` raises {error}, which its docstring does not say"
    if inspect.isfunction(value):
        unsaid = [p for p in inspect.signature(value).parameters if f"`{p}`" not in text]
        assert not unsaid, f"`{name}`: no word about {unsaid}"
    if dataclasses.is_dataclass(value) and name != "ModelConfig":  # its names are config.json's
        fields = {field.name for field in dataclasses.fields(value) if not field.name.startswith("_")}
        assert fields <= documented_fields(value), (
            f"`{name}`: no word about {sorted(fields - documented_fields(value))}"
        )
