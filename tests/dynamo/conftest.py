"""Deployments of NVIDIA Dynamo on this host, over the nano model compiled for a context of 2,048 tokens."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import Target
from dsv4c.launch import Launched, LaunchOptions, launch
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 2048
SHOWN = {"logprobs": 0, "return_tokens_as_token_ids": True}
"""Fields of a completion request that have its tokens told by id."""


def load_example() -> Any:
    """`examples/dynamo/serve.py`, whose Deployment is what the tests drive."""
    spec = importlib.util.spec_from_file_location("dynamo_example", ROOT / "examples" / "dynamo" / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with a context of 2,048 tokens."""
    folder, nano = tmp_path_factory.mktemp("nano") / "nano-cpu", ROOT / "examples" / "nano"
    options = Options(max_context=CONTEXT)
    config = Checkpoint(nano).config
    compile_artifact(config, Target("cpu"), folder, options, checkpoint=nano, cache=ROOT / "build" / "kernels")
    return folder


@pytest.fixture(scope="session")
def launched(artifact: Path) -> Launched:
    """The same model in this process, alone: what it says is right."""
    return launch(artifact, LaunchOptions(max_requests=16))


@pytest.fixture(scope="session")
def says(launched: Launched) -> Callable[[list[int], SamplingParams], list[int]]:
    """The tokens that one engine generates for a prompt."""
    numbers = iter(range(1_000_000))

    def says(prompt: list[int], params: SamplingParams) -> list[int]:
        engine: Engine = launched.engine
        engine.submit(Request(f"alone-{next(numbers)}", prompt, params))
        tokens: list[int] = []
        while engine.has_work:
            for event in engine.step():
                tokens += event.tokens
        return tokens

    return says


@pytest.fixture
def deploy(artifact: Path) -> Callable[..., Any]:
    """`with deploy("both", "both") as deployment`: ready, and ended with the test."""
    example = load_example()

    @contextmanager
    def deploy(
        *roles: str, options: tuple[str, ...] = (), workers: dict[str, str] | None = None, **more: Any
    ) -> Iterator[Any]:
        with example.Deployment(artifact, **more) as deployment:
            started = [deployment.worker(role, *options, **(workers or {})) for role in roles]
            deployment.wait(*started)
            yield deployment

    return deploy


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, the extremes among them."""
    draw = random.Random(seed)
    lengths = [1, longest, *(draw.randint(1, longest) for _ in range(count - 2))][:count]
    return [[draw.randrange(10, 4000) for _ in range(n)] for n in lengths]


def ids(choice: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def stream(deployment: Any, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data = json.dumps({"model": deployment.model, "stream": True, **body}).encode()
    url = f"http://127.0.0.1:{deployment.port}{path}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
