"""Text to token ids and back, by a checkpoint's `tokenizer.json`; ids of special tokens are looked up by name.

A byte-level BPE writes every byte as one printable character; `token_bytes` undoes that, so that a stream of tokens
can be decoded byte by byte: `Detokenizer` holds back an unfinished character and emits it when it is whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from dsv4c.chat import tokens
from dsv4c.errors import ConfigError, RequestError


class Tokenizer:
    """A tokenizer that has DeepSeek-V4's special tokens. Adds nothing to a text: the prompt carries its own BOS."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer.json") -> None:
        """Raises ConfigError naming the required tokens that `backend` lacks and `source`, the file it is from."""
        missing = [name for name in tokens.REQUIRED if backend.token_to_id(name) is None]
        if missing:
            raise ConfigError(
                f"`{source}` lacks the token{'s' if len(missing) > 1 else ''} `{'`, `'.join(missing)}`",
                hint="is it the tokenizer of a DeepSeek-V4 checkpoint?",
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._source = source
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Ids that `skip_special_tokens` drops. Role, think, task and DSML tokens are not among them."""
        self.added_ids = frozenset(added)
        """Ids of all added tokens: what they stand for is no text of the model's own vocabulary."""
        self.vocab_size = max(backend.get_vocab_size(), 1 + max(added))
        self.bos_token_id = self.id_of(tokens.BOS)
        self.eos_token_id = self.id_of(tokens.EOS)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a `tokenizer.json`, or the one in a folder. Raises ConfigError if it cannot be read."""
        path = Path(path)
        if path.is_dir():
            path /= "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read `{path}`: {error.strerror}", hint="a checkpoint holds one") from error
        except Exception as error:  # the library raises no narrower class, for bad JSON as for a bad model
            raise ConfigError(f"`{path}` is not a tokenizer: {error}") from error
        return cls(backend, str(path))

    def id_of(self, name: str) -> int:
        """Id of the token of exactly this name. Raises ConfigError if there is none."""
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise ConfigError(f"`{self._source}` lacks the token `{name}`")
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; names of added tokens in it become those tokens. Raises RequestError for lone surrogates."""
        try:
            text.encode()  # the library would say only that this is no string
        except UnicodeEncodeError as error:
            at = text[error.start : error.end]
            raise RequestError(f"the text holds a lone surrogate {at!a}", code="invalid_unicode") from error
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that the token stands for, perhaps not whole characters; b"" for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _to_bytes(self._backend.id_to_token(token_id) or "")
        return known

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Decodes a stream of tokens: the deltas joined are `decode` of all ids, each token in constant time."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known: whole characters, often one token late."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is held back, as U+FFFD if it is an unfinished character; then the stream starts anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _to_bytes(token: str) -> bytes:
    """Undoes the byte level; a token with any character outside of the alphabet (an added one) is plain text."""
    mapped = [_BYTE_OF.get(character) for character in token]
    whole = [byte for byte in mapped if byte is not None]
    return bytes(whole) if len(whole) == len(mapped) else token.encode()
