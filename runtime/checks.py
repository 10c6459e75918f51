"""What can never be served, in the same words whoever refuses it: an engine, or a router for its workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4c.errors import RequestError
from dsv4c.runtime.params import SamplingParams


def check_tokens(tokens: npt.NDArray[np.int64], params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError (400) for tokens outside the vocabulary, in prompt or parameters, and for several choices."""
    params.check_vocab(vocab_size)
    if params.n != 1:
        raise RequestError("one request makes one choice", param="n", hint="expand it into `n` requests")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise RequestError(
            f"the prompt has token {wrong}, the vocabulary has {vocab_size}", param="prompt", code="invalid_value"
        )


def check_lengths(prompt: int, asked: int | None, context: int, longest: int) -> None:
    """Raises RequestError if a request is too long: 400, or 503 where more memory would help.

    `prompt`: its tokens; `asked`: its `max_tokens`; `context`: most tokens of prompt and completion; `longest`: those
    that one request alone can reach in the pools.
    """
    if prompt < 1:
        raise RequestError("`prompt` is empty", param="prompt", code="invalid_value", hint="give at least 1 token")
    if prompt >= context:
        raise RequestError(
            f"the prompt has {prompt} tokens, the context is {context} with at least 1 to generate",
            param="prompt",
            code="context_length_exceeded",
            hint="shorten the prompt",
        )
    if prompt + (asked or 1) > context:
        raise RequestError(
            f"the prompt's {prompt} tokens and `max_tokens` {asked} exceed the context of {context}",
            param="max_tokens",
            code="context_length_exceeded",
            hint=f"`max_tokens` can be {context - prompt} at most",
        )
    if prompt + (asked or 1) > longest:
        raise RequestError(
            f"{prompt + (asked or 1)} tokens do not fit the KV memory, which holds {longest}",
            status=503,
            param="max_tokens" if prompt < longest else "prompt",
            code="out_of_pages",
            hint="serve with more KV memory, or ask for fewer tokens",
        )
