"""Trains a byte-level BPE with DeepSeek-V4's pre-tokeniser and special tokens, for models with a small vocabulary.

Layout of the ids: BOS 0, EOS 1, pad 2, the 256 bytes, the merges, and last the other added tokens, as in the released
`tokenizer.json`. There is no normaliser and nothing is added to a text: the prompt string carries its own BOS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer

from dsv4c.chat import tokens
from dsv4c.errors import ConfigError

DIGITS = r"\p{N}{1,3}"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""The three splits of DeepSeek-V4's pre-tokeniser, applied in this order before the byte level."""

NUM_ADDED = len(tokens.TEXTUAL) + len(tokens.HIDDEN)
MIN_VOCAB_SIZE = len(tokens.LEADING) + 256 + NUM_ADDED


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` entries, added tokens included.

    Deterministic for the same texts in the same order. Raises ConfigError if `vocab_size` cannot hold the bytes and
    the added tokens, or if the texts have too few distinct pairs to fill it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"`vocab_size` {vocab_size} is below {MIN_VOCAB_SIZE}, the bytes and added tokens alone")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in tokens.LEADING],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in tokens.TEXTUAL])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokens.HIDDEN])
    got = tokenizer.get_vocab_size()
    if got != vocab_size:
        raise ConfigError(
            f"the texts fill {got} of `vocab_size` {vocab_size} entries",
            hint="train on more text, or ask for a smaller vocabulary",
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, model_max_length: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into an existing folder; `model_max_length` in tokens."""
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": tokens.BOS,
        "eos_token": tokens.EOS,
        "pad_token": tokens.EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _pre_tokenizer() -> PreTokenizer:
    splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in (DIGITS, CJK, WORDS)]
    sequence: PreTokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    return sequence
