"""`dsv4c run`: what it says of the chat format, and what of its options reaches the server."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv4c.launch
from dsv4c.cli import main
from dsv4c.launch import ServeOptions

SMALL = ("--max-requests", "2", "--max-context", "1K", "--kv-memory", "0.006")


@pytest.mark.parametrize(
    ("file", "argv", "thinking", "strict"),
    [
        ("", [], False, False),
        ("", ["--default-thinking", "--strict"], True, True),
        ("default-thinking = true\nstrict = true", [], True, True),
        ("default-thinking = true\nstrict = true", ["--no-thinking", "--no-strict"], False, False),
    ],
    ids=["default", "command line", "file", "file taken back"],
)
def test_thinking_and_strictness(
    nano_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    argv: list[str],
    thinking: bool,
    strict: bool,
) -> None:
    seen: list[ServeOptions] = []
    monkeypatch.setattr(dsv4c.launch, "serve", lambda _launched, _sock, options: seen.append(options))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dsv4c.toml").write_text(f"[run]\n{file}\n", encoding="utf-8")
    assert main(["run", str(nano_artifact), "--port", "0", *SMALL, *argv]) == 0
    assert [(options.default_thinking, options.strict) for options in seen] == [(thinking, strict)]


def test_the_release_of_the_chat_format_is_said(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(nano_artifact), "--prompt", "a", "--max-new-tokens", "1", *SMALL]
    assert main(command) == 0
    assert "chat format: preview, as the checkpoint does not say\n" in capsys.readouterr().err
    assert main([*command, "--chat-release", "0731"]) == 0
    assert "chat format: 0731\n" in capsys.readouterr().err
