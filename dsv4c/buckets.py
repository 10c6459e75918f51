"""The sizes at which a GPU artifact's programs run: request buckets for decoding, token buckets for prefill.

A CUDA graph has fixed sizes, so a step is padded to the next bucket. Decode buckets are close where a step is short
(half as many tokens again at most); a prefill step mixes chunks of prompts with decoding requests and comes in two
widths of logit rows, few and all, because the head costs as much as a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv4c.config import ModelConfig

DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PREFILL = (64, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
FEW_ROWS = 16  # of logits: prompts that end in one step, while nobody or few decode
PROMPT_ROWS = 64  # more than one a request, for log-probabilities of prompts
EDITS_PER_ROW = 512  # logit biases and masked stop tokens of a request; OpenAI allows 300 biases


@dataclass(frozen=True)
class Bucket:
    """Exact sizes of one program: tokens, and rows of logits."""

    phase: Literal["decode", "prefill"]
    tokens: int
    rows: int

    @property
    def name(self) -> str:
        """Its key in the manifest: `decode.64`, `prefill.8192.16`."""
        return f"decode.{self.tokens}" if self.phase == "decode" else f"prefill.{self.tokens}.{self.rows}"

    def symbols(self, config: ModelConfig, shared: Mapping[str, int]) -> dict[str, int]:
        """Sizes of this program; `shared` holds those of state and page tables."""
        out = {**shared, "T": self.tokens, "S": self.rows, "M": EDITS_PER_ROW * self.rows}
        for ratio in config.ratios:  # a chunk completes a window more than its length holds
            out[f"E_{ratio}"] = min(self.tokens, self.tokens // ratio + self.rows)
        return out


def gpu_buckets(max_tokens: int, max_requests: int) -> tuple[Bucket, ...]:
    """Buckets for steps of up to `max_tokens` tokens and `max_requests` requests."""
    decode = (*(n for n in DECODE if n < max_requests), max_requests)
    prefill = (*(n for n in PREFILL if n < max_tokens), max_tokens)
    out = [Bucket("decode", n, n) for n in decode]
    for tokens in prefill:
        widths = {min(tokens, FEW_ROWS, max_requests), min(tokens, max_requests + PROMPT_ROWS)}
        out += [Bucket("prefill", tokens, rows) for rows in sorted(widths)]
    return tuple(out)
