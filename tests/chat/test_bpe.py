"""The trained BPE: fixed ids, the released pre-tokeniser, exact size, determinism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from dsv4c.chat import tokens
from dsv4c.chat.bpe import MIN_VOCAB_SIZE, NUM_ADDED, save_tokenizer, train_bpe
from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.errors import ConfigError
from tests.chat.conftest import TEXTS


def test_ids_of_added_tokens(small_backend: tokenizers.Tokenizer) -> None:
    assert small_backend.get_vocab_size() == 320
    assert [small_backend.token_to_id(name) for name in tokens.LEADING] == [0, 1, 2]
    added = [small_backend.token_to_id(name) for name in tokens.TEXTUAL + tokens.HIDDEN]
    assert added == list(range(320 - NUM_ADDED, 320))


def test_special_flags_are_the_released_ones(small: Tokenizer, released_file: Path) -> None:
    data = json.loads(released_file.read_text(encoding="utf-8"))
    flags = {token["content"]: token["special"] for token in data["added_tokens"]}
    names = tokens.LEADING + tokens.TEXTUAL + tokens.HIDDEN
    assert {n: small.id_of(n) in small.special_ids for n in names} == {n: flags[n] for n in names}


def test_pre_tokenizer_is_the_released_one(small_backend: tokenizers.Tokenizer, released_file: Path) -> None:
    released = json.loads(released_file.read_text(encoding="utf-8"))
    assert json.loads(small_backend.to_str())["pre_tokenizer"] == released["pre_tokenizer"]


def test_training_is_deterministic(small_backend: tokenizers.Tokenizer) -> None:
    assert train_bpe(iter(TEXTS), 320).to_str() == small_backend.to_str()


def test_any_text_round_trips(small: Tokenizer) -> None:
    text = "<｜User｜>tabs\t\r\n  and ¤ € 𝄞 \x00 0001234</think>"
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert ids[0] == small.id_of(tokens.USER)
    assert ids[-1] == small.id_of(tokens.THINK_END)


def test_saved_folder_loads_here_and_in_transformers(small_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(small_backend, tmp_path, model_max_length=4096)
    text = "<｜begin▁of▁sentence｜>The engine<｜User｜>serves 123"
    ids = Tokenizer.from_file(tmp_path).encode(text)
    assert ids == small_backend.encode(text).ids
    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert fast.encode(text) == ids
    assert (fast.bos_token_id, fast.eos_token_id, fast.model_max_length) == (0, 1, 4096)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"below {MIN_VOCAB_SIZE}"):
        train_bpe(TEXTS, MIN_VOCAB_SIZE - 1)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the texts fill 2.. of `vocab_size` 4096"):
        train_bpe(["aa"], 4096)
