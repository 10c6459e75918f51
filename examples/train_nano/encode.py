"""Trains the tokenizer on the corpus and encodes it: DIR/tokenizer.json, DIR/train.npy and DIR/train.npy.xz.

    python examples/train_nano/encode.py DIR        # DIR as written by corpus.py

The stream is BOS document EOS BOS document EOS ... as uint16, in random order. About a tenth of it is questions and
answers in the prompt format of chat mode, made from a heading and the paragraphs below it, so that the model knows
where a turn ends.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from dsv4c.chat import tokens
from dsv4c.chat.bpe import save_tokenizer, train_bpe
from dsv4c.config import preset

_PATTERNS = (
    "What is {}?", "What is {}?", "Tell me about {}.", "Explain {}.", "{}", "How does {} work?", "Describe {}.",
    "Can you explain {}?", "What should I know about {}?",
)  # fmt: skip
_GENERIC = re.compile(r"introduction|overview|description|examples?|see also|notes?|parameters|returns|background|"
                      r"summary|abstract|usage|details|api|contents|references?|data types|exports", re.I)  # fmt: skip
MAX_CHATS = 45_000


def chats(text: str, rng: random.Random) -> Iterator[str]:
    """Chat transcripts from a page's headings and the prose that follows each."""
    blocks = text.strip().split("\n\n")
    title = blocks[0].lstrip("# ") if blocks[0].startswith("# ") else ""
    for i, block in enumerate(blocks[:-1]):
        if not re.match(r"#{1,3} \S", block) or "\n" in block:
            continue
        heading = block.lstrip("# ")
        if _GENERIC.fullmatch(heading):
            heading = title
        answer = ""
        for paragraph in blocks[i + 1 : i + 4]:
            if paragraph[0] in "# -" or (answer and len(answer) + len(paragraph) > 600):
                break
            answer += ("\n\n" if answer else "") + paragraph
        if not 4 < len(heading) < 60 or not 100 < len(answer) < 800 or answer[-1] not in ".!?":
            continue
        question = heading if heading.endswith("?") else rng.choice(_PATTERNS).format(heading)
        system = "You are a helpful assistant." if rng.random() < 0.2 else ""
        yield f"{system}{tokens.USER}{question}{tokens.ASSISTANT}{tokens.THINK_END}{answer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    config = preset("nano")
    rng = random.Random(0)
    with (args.work / "train.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    rng.shuffle(texts)
    tokenizer = train_bpe(texts[::3], config.vocab_size)
    save_tokenizer(tokenizer, args.work, model_max_length=config.max_position_embeddings)
    talks = [talk for text in texts for talk in chats(text, rng)]
    rng.shuffle(talks)
    talks = talks[:MAX_CHATS]
    print(f"{len(texts)} documents, {len(talks)} chats")
    pieces = [*texts, *(f"{tokens.EOS}{tokens.BOS}".join(talks[i : i + 8]) for i in range(0, len(talks), 8))]
    rng.shuffle(pieces)
    parts = []
    for first in range(0, len(pieces), 2000):
        for encoding in tokenizer.encode_batch(pieces[first : first + 2000], add_special_tokens=False):
            parts.append(np.array([config.bos_token_id, *encoding.ids, config.eos_token_id], dtype=np.uint16))
    stream = np.concatenate(parts)
    np.save(args.work / "train.npy", stream)
    with lzma.open(args.work / "train.npy.xz", "wb", preset=1) as packed:
        packed.write((args.work / "train.npy").read_bytes())
    size = sum(len(text) for text in texts)
    print(f"{len(stream) / 1e6:.2f} M tokens, {size / 1e6:.1f} MB of text, {size / len(stream):.2f} characters a token")


if __name__ == "__main__":
    main()
