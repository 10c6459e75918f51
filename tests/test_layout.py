"""The shape of the repository: one package through three symlinks, small files, a version that agrees."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "schedules", "runtime")
WALL = 500  # lines; 150 is the habit


def sources(*trees: str) -> list[Path]:
    return sorted(
        p for tree in trees for p in (ROOT / tree).rglob("*.py") if not any(q.is_symlink() for q in p.parents)
    )


@pytest.mark.parametrize("name", LINKED)
def test_the_symlinks_are_relative_and_lead_to_the_root_folders(name: str) -> None:
    link = ROOT / "dsv4c" / name
    assert link.is_symlink(), f"`dsv4c/{name}` should be a symlink to `../{name}`"
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


def test_every_file_has_one_reason_and_stays_under_the_wall() -> None:
    problems: list[str] = []
    for path in sources("dsv4c", *LINKED, "tests", "examples", "benchmarks"):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        lines = text.count("\n")
        if lines > WALL:
            problems.append(f"{name}: {lines} lines, more than {WALL}; split it by reason")
        if text.strip() and ast.get_docstring(ast.parse(text)) is None:
            problems.append(f"{name}: no docstring on top that says what the file is for")
        if re.fullmatch(r"(utils?|common|helpers?|misc)", path.stem):
            problems.append(f"{name}: not a name for one reason")
    assert not problems, "\n".join(problems)


def test_no_environment_variable_is_read_below_the_command_line() -> None:
    problems: list[str] = []
    for path in sources("dsv4c", *LINKED):
        if path == ROOT / "dsv4c" / "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: reads the environment")
    assert not problems, "\n".join(problems)


def test_a_wheel_holds_one_package_with_the_linked_folders(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed; see the extra `dev`")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"dsv4c"}
    tracked = subprocess.run(
        ["git", "ls-files", *LINKED], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    missing = [path for path in tracked if f"dsv4c/{path}" not in names and (ROOT / path).exists()]
    assert not missing, f"files left out of the wheel: {missing}"


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "dsv4c" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    assert match, "dsv4c/__init__.py should set `__version__`"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{match[1]}]" in changelog, f"CHANGELOG.md has no section for {match[1]}"
