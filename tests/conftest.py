"""Fixtures that several areas share."""

from __future__ import annotations

import argparse
import asyncio
import collections
import decimal
import difflib
import email
import logging
import os
import pathlib
import pydoc
import random
import socket
import string
import typing
from pathlib import Path

import pytest
import torch

from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import Target

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: threads of one that wait for a core keep the others from it."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden files beside the checkout; tests that need it are skipped where it is absent."""
    if not (GOLDEN / "tiny" / "config.json").is_file():
        pytest.skip("no golden files: the folder ../shared/golden beside the checkout is absent")
    return GOLDEN


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
