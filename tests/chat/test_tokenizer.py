"""Tokenizer and Detokenizer: agreement with the library on any ids, whole characters only, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.chat import tokens
from dsv4c.chat.bpe import train_bpe
from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.errors import ConfigError, RequestError
from tests.chat.conftest import TEXTS


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_deltas_are_decode_of_all_ids(any_tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=40))
    stream = any_tokenizer.detokenizer(skip_special_tokens=skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == any_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60))
def test_text_streams_back_without_a_broken_character(any_tokenizer: Tokenizer, text: str) -> None:
    stream = any_tokenizer.detokenizer(skip_special_tokens=False)
    so_far = ""
    for token_id in any_tokenizer.encode(text):
        so_far += stream.push(token_id)
        assert text.startswith(so_far)
    assert so_far + stream.flush() == text


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_token_bytes_join_to_the_text(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=20))
    joined = b"".join(map(any_tokenizer.token_bytes, ids))
    assert joined.decode(errors="replace") == any_tokenizer.decode(ids, skip_special_tokens=False)


def test_unfinished_character_comes_out_on_flush(small: Tokenizer) -> None:
    ids = small.encode("ab𝄞")
    stream = small.detokenizer()
    assert "".join(map(stream.push, ids[:-1])) == "ab"
    assert stream.flush() == "�"
    assert stream.push(small.encode("c")[0]) == "c"


def test_skip_special_tokens_drops_eos_and_keeps_roles(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode(f"{tokens.BOS}a{tokens.USER}b{tokens.THINK_END}c{tokens.EOS}")
    assert any_tokenizer.decode(ids) == f"a{tokens.USER}b{tokens.THINK_END}c"
    stream = any_tokenizer.detokenizer()
    assert "".join(map(stream.push, ids)) == f"a{tokens.USER}b{tokens.THINK_END}c"


def test_released_ids(released: Tokenizer) -> None:
    expected = {
        tokens.BOS: 0, tokens.EOS: 1, tokens.PAD: 2, tokens.NOISE: 128799, tokens.FIM_HOLE: 128800,
        tokens.FIM_BEGIN: 128801, tokens.FIM_END: 128802, tokens.USER: 128803, tokens.ASSISTANT: 128804,
        tokens.THINK_START: 128821, tokens.THINK_END: 128822, tokens.DSML: 128825, tokens.LATEST_REMINDER: 128828,
        tokens.TASKS["action"]: 128829, tokens.TASKS["query"]: 128830, tokens.TASKS["authority"]: 128831,
        tokens.TASKS["domain"]: 128832, tokens.TASKS["title"]: 128836, tokens.EXTRACTED_URL: 128844,
        tokens.TASKS["read_url"]: 128845, tokens.END_OF_QUERY: 128846,
    }  # fmt: skip
    assert {name: released.id_of(name) for name in expected} == expected
    assert released.vocab_size == 129280
    assert (released.bos_token_id, released.eos_token_id) == (0, 1)


def test_encode_adds_nothing_and_splits_like_the_release(released: Tokenizer) -> None:
    assert released.encode("") == []
    assert [released.token_bytes(i) for i in released.encode("  <img 12345")] == [
        b" ",
        b" <",
        b"img",
        b" ",
        b"123",
        b"45",
    ]
    assert [released.token_bytes(i) for i in released.encode("<｜DSML｜tool_calls>")][1] == "｜DSML｜".encode()


def test_ids_without_a_token_are_nothing(small: Tokenizer) -> None:
    assert small.token_bytes(10**6) == b""
    assert small.detokenizer().push(10**6) == small.decode([10**6]) == ""


def test_truncation_and_padding_in_the_file_are_ignored(small_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    data = json.loads(small_backend.to_str())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert len(Tokenizer.from_file(tmp_path).encode("one two three")) > 2


def test_lone_surrogate_is_a_bad_request(small: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate '\\ud800'") as caught:
        small.encode("a\ud800b")
    assert (caught.value.status, caught.value.code) == (400, "invalid_unicode")


def test_missing_token_names_it_and_the_file(tmp_path: Path) -> None:
    data = json.loads(train_bpe(TEXTS, 300).to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in (tokens.USER, tokens.DSML)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Tokenizer.from_file(path)
    assert caught.value.message == f"`{path}` lacks the tokens `<｜User｜>`, `｜DSML｜`"


def test_unknown_name_is_refused(small: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="lacks the token `<｜System｜>`"):
        small.id_of("<｜System｜>")


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)
