"""Every block of code in README and docs runs, in a folder with `examples/`, `build/nano-cpu` and `build/nano-other`.

A block that cannot says why, in the line before it: `<!-- not run: it serves until it is stopped -->`. Its `dsv4c`
lines are parsed all the same. A Python line that ends in `# -> text` prints the text. Blocks of no language are texts.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv4c import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run:(?P<reason>.*?)-->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Text between fences; its first line has number `line`, from 1. `reason`: why it is not run, if it is not."""

    line: int
    language: str
    text: str
    reason: str | None

    def commands(self) -> Iterator[tuple[int, list[str]]]:
        """(line, words) of every command of a shell block, without comments."""
        number, lines = self.line, iter(self.text.splitlines())
        for text in lines:
            first, used = number, 1
            while text.endswith("\\"):
                text, used = text[:-1] + next(lines), used + 1
            number += used
            if words := shlex.split(text, comments=True):
                yield first, words


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text[: m.start("text")].count("\n") + 1, m["language"], m["text"], m["reason"])
        for m in BLOCK.finditer(text)
    ]


def execute(block: Block, page: Path, names: dict[str, object]) -> None:
    """Runs a Python block with `names`, and checks what it says that it prints; an error says the page's own line."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        exec(code, names)
    printed = iter(out.getvalue().splitlines())
    for text in re.findall(r"# -> (.*)$", block.text, flags=re.M):
        assert text in printed, f"{page.name}:{block.line}: prints no `{text}` but\n{out.getvalue()}"


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.fixture(scope="module")
def folder(nano_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' blocks run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "build").mkdir()
    (folder / "build" / "nano-cpu").symlink_to(nano_artifact)
    shutil.copytree(nano_artifact, folder / "build" / "nano-other")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_is_of_a_known_language_and_says_why_it_is_not_run(page: Path) -> None:
    text, found = page.read_text(encoding="utf-8"), blocks(page)
    assert len(re.findall(r"^```", text, flags=re.M)) == 2 * len(found), "a fence that no block begins or ends with"
    assert text.count("<!-- not run") == sum(b.reason is not None for b in found), "a mark belongs before a block"
    for block in found:
        assert block.language in ("", "python", "bash"), f"{page.name}:{block.line}"
        assert block.reason is None or len(block.reason.split()) >= 3, f"{page.name}:{block.line} gives no reason"


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda p: p.name)
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            execute(block, page, names)


@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda p: p.name)
def test_commands_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for block in blocks(page):
        for line, words in block.commands() if block.language == "bash" else ():
            where, ours = f"{page.name}:{line}", Path(words[0]).name == "dsv4c"
            if ours:
                cli.parser().parse_args([w for w in words[1:] if w != "&"])
            if block.reason is not None:
                continue
            if ours:
                assert cli.main(words[1:]) == 0, f"{where}: {capsys.readouterr().err}"
                assert capsys.readouterr().out, f"{where} prints nothing"
            else:
                assert words[0] == "python", f"{where}: `{words[0]}` is neither dsv4c nor python: say why it is not run"
                subprocess.run([sys.executable, *words[1:]], check=True, stdout=subprocess.PIPE)


def test_an_error_says_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```python\nprint(1)  # -> 1\n1 / 0\n```\n\n```python\nprint(1)  # -> 2\n```\n\n"
        "<!-- not run: takes an hour -->\n```bash\ndsv4c plan a \\\n  --memory 1GB  # b\ndsv4c inspect b\n```\n",
        encoding="utf-8",
    )
    python, false, bash = blocks(page)
    with pytest.raises(AssertionError, match=r"page\.md:9: prints no `2` but\n"):
        execute(false, page, {})
    with pytest.raises(ZeroDivisionError) as error:
        execute(python, page, {})
    assert error.traceback[-1].lineno + 1 == 5
    assert python.reason is None and bash.reason == " takes an hour "
    assert list(bash.commands()) == [(14, ["dsv4c", "plan", "a", "--memory", "1GB"]), (16, ["dsv4c", "inspect", "b"])]
