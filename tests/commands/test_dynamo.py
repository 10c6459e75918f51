"""`dsv4c dynamo`: its options, and what it says where Dynamo is not there."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from dsv4c.cli import main
from dsv4c.commands.dynamo_options import DYNAMO_OPTIONS
from dsv4c.commands.run import launch_options
from dsv4c.commands.settings import add_options, namespace, settle


def test_options_are_all_that_launching_reads() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, DYNAMO_OPTIONS)
    args = parser.parse_args(["folder", "--max-requests", "4", "--role", "decode"])
    found = namespace(settle(args, DYNAMO_OPTIONS, "dynamo"))
    assert launch_options(found).max_requests == 4 and found.role == "decode" and found.hand_over == "completed"


def test_without_dynamo_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(package: str) -> Any:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("dsv4c.runtime.dynamo.version.version", absent)
    assert main(["dynamo", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "NVIDIA Dynamo is not installed" in said and "CONTRIBUTING.md" in said


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dsv4c.runtime.dynamo.version.version", lambda package: "1.5.2")
    assert main(["dynamo", "nowhere"]) == 2
    assert "`ai-dynamo` is 1.5.2" in capsys.readouterr().err
