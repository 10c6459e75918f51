"""ChatCodec: what the server is given does what its docstring promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from dsv4c.chat.bpe import save_tokenizer
from dsv4c.chat.codec import ChatCodec
from dsv4c.errors import ConfigError, RequestError
from dsv4c.runtime.completion import TextCodec


@pytest.fixture(scope="module")
def codec(small_backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tokenizer(small_backend, folder, model_max_length=4096)
    return ChatCodec.from_folder(folder)


def test_it_is_what_the_server_asks_for(codec: ChatCodec) -> None:
    given: TextCodec = codec
    assert given.vocab_size == 320
    assert tuple(given.eos_token_ids) == (1,)


def test_chat_prompt_is_the_encoded_string(codec: ChatCodec) -> None:
    ids = codec.chat_prompt([{"role": "user", "content": "hi"}], thinking=True)
    assert ids == codec.encode("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>")
    assert ids[0] == 0
    assert codec.token_text(ids[-1]) == "<think>"
    assert codec.decode(ids) == "<｜User｜>hi<｜Assistant｜><think>"


def test_release_chooses_the_efforts(codec: ChatCodec, small_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(small_backend, tmp_path, model_max_length=4096)
    later = ChatCodec.from_folder(tmp_path, release="0731")
    messages = [{"role": "user", "content": "hi"}]
    assert later.chat_prompt(messages, thinking=True, effort="high") == codec.chat_prompt(
        messages, thinking=True, effort="max"
    )


def test_token_text_and_bytes(codec: ChatCodec) -> None:
    first, *_, last = codec.encode("𝄞")
    assert codec.token_text(0) == "<｜begin▁of▁sentence｜>"
    assert codec.token_bytes(first) == b"\xf0"
    assert codec.token_text(last) == "�"


def test_detokenizers_do_not_share_state(codec: ChatCodec) -> None:
    one, other = codec.detokenizer(), codec.detokenizer()
    ids = codec.encode("𝄞")
    assert one.push(ids[0]) == ""
    assert other.push(codec.encode("a")[0]) == "a"
    assert "".join(map(one.push, ids[1:])) == "𝄞"


def test_parser(codec: ChatCodec) -> None:
    assert codec.parser(True).push("a</think>b") == [("reasoning", "a"), ("content", "b")]


@pytest.mark.parametrize("role", ["system", "assistant", "latest_reminder"])
def test_messages_that_ask_for_nothing_are_refused(codec: ChatCodec, role: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": role, "content": "a"}]
    with pytest.raises(RequestError, match=f"of role `{role}`") as caught:
        codec.chat_prompt(messages, thinking=False)
    assert caught.value.param == "messages"


def test_an_open_prefix_is_answered(codec: ChatCodec) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "An", "prefix": True}]
    assert codec.decode(codec.chat_prompt(messages, thinking=False)) == "<｜User｜>q<｜Assistant｜></think>An"


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer.json`: No such file"):
        ChatCodec.from_folder(tmp_path)
