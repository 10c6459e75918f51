"""Servers that several files of server tests share: the toy one for every test, the bundled nano model for most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4c.launch import LaunchOptions, launch
from tests.runtime.live import Live, start, start_toy


@pytest.fixture(scope="session")
def toy_server() -> Iterator[Live]:
    """The stand-in behind real HTTP."""
    live, _ = start_toy()
    yield live
    live.close()


@pytest.fixture(scope="session")
def nano_server(nano_artifact: Path) -> Iterator[Live]:
    """The compiled nano model behind real HTTP."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    launched = launch(nano_artifact, LaunchOptions(kv_memory_bytes=200_000_000))
    live = start(launched.engine, launched.codec, launched.model_name)
    yield live
    live.close()
