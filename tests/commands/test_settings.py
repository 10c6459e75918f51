"""Options from the command line and from a file: which wins, where each came from, and what cannot be set."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from dsv4c import cli
from dsv4c.commands.run_options import FIXED, RUN_OPTIONS
from dsv4c.commands.settings import Setting, add_options, print_settings, settle
from dsv4c.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settled(*argv: str) -> dict[str, Setting]:
    parser = argparse.ArgumentParser()
    add_options(parser, RUN_OPTIONS)
    return {s.option.name: s for s in settle(parser.parse_args(argv), RUN_OPTIONS, "run", FIXED)}


def test_the_command_line_wins_over_the_file_over_the_default(folder: Path) -> None:
    (folder / "dsv4c.toml").write_text(
        '[run]\nartifact = "here"\nport = 9000\nmax-queue = 7\nstrict = true\nbreak = ["L07.*", "L08.*"]\n',
        encoding="utf-8",
    )
    found = settled("--port", "9001", "--api-key", "one", "--api-key", "two")
    assert {n: (s.value, s.origin) for n, s in found.items() if s.origin != "default"} == {
        "artifact": ("here", "dsv4c.toml"), "port": (9001, "command line"), "max-queue": (7, "dsv4c.toml"),
        "strict": (True, "dsv4c.toml"), "break": (("L07.*", "L08.*"), "dsv4c.toml"),
        "api-key": (("one", "two"), "command line"),
    }  # fmt: skip
    assert found["host"].value == "127.0.0.1" and found["request-timeout"].value is None
    assert settled("x", "--break", "L01")["break"].value == ("L01",)


def test_a_flag_of_the_file_is_taken_back_by_its_opposite(folder: Path) -> None:
    flags = [option for option in RUN_OPTIONS if option.flag]
    text = "".join(f"{option.name} = true\n" for option in flags)
    (folder / "dsv4c.toml").write_text(f"[run]\n{text}", encoding="utf-8")
    assert all(settled()[option.name].value for option in flags)
    taken = settled("--no-thinking", "--no-strict", "--page", "--prefix-cache", "--no-shadow", "--no-debug-contracts")
    assert {option.name for option in flags} == {
        name for name, setting in taken.items() if setting.value is False and setting.origin == "command line"
    }
    assert settled("--no-thinking", "--default-thinking")["default-thinking"].value is True, "the last one holds"
    assert settled("--default-thinking", "--no-thinking")["default-thinking"].value is False
    assert len({name for option in flags for name in (option.name, option.off)}) == 2 * len(flags)


def test_what_is_printed_sets_the_same(folder: Path) -> None:
    found = settled(
        "dir", "--temperature", "0.25", "--no-page", "--cors-origin", "https://a.b", "--api-key", "very secret"
    )
    text = print_settings(list(found.values()), "run", {"target": "cpu"})
    assert "very secret" not in text and '# target = "cpu"' in text and "# command line" in text
    (folder / "other.toml").write_text(text, encoding="utf-8")
    again = settled("--config", "other.toml")
    masked = {"api-key", "prompt"}
    assert {n: s.value for n, s in again.items() if n not in masked} == {
        n: s.value for n, s in found.items() if n not in masked
    }
    assert set(tomllib.loads(text)) == {"run"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nport = 'x'", "`port` in `dsv4c.toml`"),
        ("[run]\nport = true", "must be a text or a number"),
        ("[run]\nstrict = 1", "must be true or false"),
        ("[run]\nexecutor = 'fast'", "is `fast`"),
        ("[run]\nmax-queue = 0", "not positive"),
        ("[run]\nno_page = true", "is no option"),
        ("[run]\nprompt = 'x'", "is no option"),
        ("[run]\ntarget = 'sm_90a'", "fixed by the artifact"),
        ("port = 1", "not understood"),
        ("[serve]\nport = 1", "not understood"),
        ("[run\n", "is no TOML"),
    ],
)
def test_a_file_that_is_wrong_names_the_fault(folder: Path, text: str, message: str) -> None:
    (folder / "dsv4c.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        settled("dir")


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        settled("dir", "--config", "absent.toml")


def test_print_config(nano_artifact: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(nano_artifact), "--print-config", "--max-queue", "9"]) == 0
    out = capsys.readouterr().out
    assert "max-queue = 9" in out and "# command line" in out and '# target = "cpu"' in out
    assert cli.main(["run"]) == 2 and "which artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--executor", "eager", "--shadow"], "exclude each other"),
        (["--ssl-certfile", "a.pem"], "TLS needs both"),
        (["--api-key", "short"], "API key 1 of 1"),
        (["--cors-origin", "example.org"], "is no origin"),
        (["--request-timeout", "-1"], "not a positive length"),
        (["--drain-delay", "-1"], "zero or more"),
        (["--otlp-endpoint", "localhost"], "no address"),
    ],
)
def test_options_that_contradict(
    nano_artifact: Path, folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(nano_artifact), *argv]) == 2
    assert message in capsys.readouterr().err
