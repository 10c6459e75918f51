"""`import dsv4c`: every public name is there, imported when it is used, and says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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
