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
    """Exact sizes of one program: tokens, rows of logits, requests that sample; drafts of each that it makes."""

    phase: Literal["decode", "prefill"]
    tokens: int
    rows: int
    requests: int
    drafts: int = 0

    @property
    def name(self) -> str:
        """Its key in the manifest: `decode.64`, `decode.64x2` (a draft each), `prefill.8192.16`."""
        if self.phase == "prefill":
            return f"prefill.{self.tokens}.{self.rows}"
        return f"decode.{self.requests}" + (f"x{1 + self.drafts}" if self.drafts else "")

    def symbols(self, config: ModelConfig, shared: Mapping[str, int]) -> dict[str, int]:
        """Sizes of this program; `shared` holds those of state and page tables."""
        out = {**shared, "T": self.tokens, "S": self.rows, "D": self.requests, "M": EDITS_PER_ROW * self.rows}
        out["G"] = 1 + self.requests  # a mask each; row 0 is nobody's
        if self.drafts:
            out |= {"T_streams": config.hc_mult * self.tokens, "D_streams": config.hc_mult * self.requests}
        for ratio in config.ratios:  # a chunk completes a window more than its length holds
            out[f"E_{ratio}"] = min(self.tokens, self.tokens // ratio + self.requests)
        return out


def gpu_buckets(max_tokens: int, max_requests: int, drafts: int = 0) -> tuple[Bucket, ...]:
    """Buckets for steps of up to `max_tokens` tokens and `max_requests` requests, with up to `drafts` drafts each.

    A decode bucket for every number of drafts; a prefill step makes the most of them and verifies none.
    """
    decode = (*(n for n in DECODE if n < max_requests), max_requests)
    prefill = (*(n for n in PREFILL if n < max_tokens), max_tokens)
    out = [Bucket("decode", n * (1 + k), n * (1 + k), n, k) for n in decode for k in range(1 + drafts)]
    for tokens in prefill:
        widths = {min(tokens, FEW_ROWS, max_requests), min(tokens, max_requests + PROMPT_ROWS)}
        out += [Bucket("prefill", tokens, rows, rows, drafts) for rows in sorted(widths)]
    return tuple(out)
