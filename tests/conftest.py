"""What every test shares: threads, golden data, and the bundled nano model, plain and compiled."""

from __future__ import annotations

import argparse
import asyncio
import collections
import decimal
import difflib
import email
import logging
import pathlib
import pydoc
import random
import shutil
import socket
import string
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import Target

if typing.TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "random moments at which every fault of tests/runtime/cluster/test_faults.py is done"
    parser.addoption("--fault-moments", type=int, default=2, metavar="N", help=text)
    parser.addoption("--fault-table", metavar="FILE", help="write the table of faults and outcomes into this file")


def pytest_configure(config: pytest.Config) -> None:
    # One thread a process: pytest-xdist already runs a process a core, and results do not depend on the machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """`../shared/golden`: a tiny checkpoint and its expected float32 results, kept beside the repository."""
    directory = ROOT.parent / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip(f"no golden data: `{directory}` is absent (it lies beside the repository, not in it)")
    return directory


@pytest.fixture(scope="session")
def nano_dir() -> Path:
    """The bundled nano checkpoint."""
    return ROOT / "examples" / "nano"


@pytest.fixture(scope="session")
def nano_artifact(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint compiled for this machine; kernels come from build/ if they were built before."""
    folder = tmp_path_factory.mktemp("nano") / "nano-cpu"
    config = Checkpoint(nano_dir).config
    compile_artifact(config, Target("cpu"), folder, Options(), checkpoint=nano_dir, cache=ROOT / "build" / "kernels")
    return folder


@pytest.fixture(scope="session")
def nano_prompts(nano_dir: Path) -> list[list[int]]:
    """100 prompts of 16 to 600 tokens: pieces of the standard library's own documentation."""
    modules = (argparse, asyncio, collections, decimal, difflib, email, logging, pathlib, socket, string, typing)
    text = "\n\n".join(pydoc.plain(pydoc.render_doc(m)) for m in modules)
    ids = Tokenizer.from_file(nano_dir).encode(text[:400_000])
    draw = random.Random(0)
    lengths = [16, 600, *(draw.randint(16, 600) for _ in range(98))]
    starts = [draw.randrange(len(ids) - 600) for _ in lengths]
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, driven by Playwright. Of one file: while it is open, this thread runs an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see the extra `dev`")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
