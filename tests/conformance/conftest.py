"""The bundled nano model behind real HTTP, with scripts for what it cannot be coaxed to say, and its clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import torch
from hypothesis import settings

from dsv4c.launch import LaunchOptions, launch
from dsv4c.runtime.grammar import Grammars
from tests.conformance.scripted_sampler import Scripted
from tests.runtime.live import Live, start

settings.register_profile("long", max_examples=5000)  # of test_fuzz.py
FUZZED: pytest.StashKey[Counter[tuple[str, str, int]]] = pytest.StashKey()
"""What test_fuzz.py counted: kind of request, endpoint, status."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(FUZZED, None)
    if not counts or counts.total() < 5000:
        return
    terminalreporter.section("answers to fuzzed requests")
    for kind, endpoint in sorted({key[:2] for key in counts}):
        told = {status: count for (*place, status), count in sorted(counts.items()) if place == [kind, endpoint]}
        terminalreporter.line(f"{kind}: {endpoint}: " + ", ".join(f"{n} x {status}" for status, n in told.items()))
    terminalreporter.line(f"{counts.total()} requests")


class Host:
    """A server, what it will say next, and how to reach it."""

    def __init__(self, live: Live, scripted: Scripted) -> None:
        self.live = live
        self.url, self.model, self.codec = live.url, live.model, live.codec
        self._scripted = scripted

    def will_say(self, *texts: str) -> None:
        """The next requests' completions, in the order of submission."""
        self._scripted.scripts.extend(self.codec.encode(text) for text in texts)

    @property
    def num_unsaid(self) -> int:
        return len(self._scripted.scripts)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        given = {"model": self.model, **body}
        return httpx.post(self.url + path, json=given, timeout=120, **options)


def start_nano(artifact: Path, max_context: int | None = None, **options: Any) -> Host:
    """Another server over nano."""
    launched = launch(artifact, LaunchOptions(kv_memory_bytes=200_000_000, model_name="nano", max_context=max_context))
    engine = launched.engine
    scripted = Scripted(engine.runner, launched.codec.eos_token_ids[0])
    engine.runner = scripted
    given = {"grammars": Grammars(launched.codec), **options}
    return Host(start(engine, launched.codec, launched.model_name, **given), scripted)


@pytest.fixture(scope="session")
def nano_host(nano_artifact: Path) -> Iterator[Host]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    host = start_nano(nano_artifact)
    yield host
    host.live.close()


@pytest.fixture
def host(nano_host: Host) -> Iterator[Host]:
    """The server, with no script left over before or after."""
    assert nano_host.num_unsaid == 0
    yield nano_host
    left = nano_host.num_unsaid
    nano_host._scripted.scripts.clear()
    assert left == 0, f"{left} scripts were not asked for"


@pytest.fixture
def client(host: Host) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{host.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def claude(host: Host) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=host.url, api_key="unused", max_retries=0)
