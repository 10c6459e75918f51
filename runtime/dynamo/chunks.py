"""What the engine says about a request, as the chunks that Dynamo's frontend reads.

    {"token_ids": [...], "index": choice}                            any number of tokens
    ... "log_probs": [...], "top_logprobs": [[{rank, token_id, logprob}]]   one each, where asked for
    ... "finish_reason", "completion_usage"                          the last chunk of a choice

The token that ended a request is among its tokens: the frontend knows which of them are not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4c.errors import Dsv4cError, EngineError
from dsv4c.runtime.request import Event
from dsv4c.runtime.sampler import TokenLogprob

Chunk = dict[str, Any]
REASONS = {"stop": "stop", "length": "length", "cancelled": "cancelled"}


def chunk_of(events: Sequence[Event], index: int, num_prompt: int, cached: int, *, scored: bool) -> Chunk:
    """One chunk for successive events of one choice; the last may be its end, which must not be a failure.

    `cached`: of the `num_prompt` tokens of the prompt, those that were not computed. `scored`: logprobs are wanted.
    """
    chunk: Chunk = {"token_ids": [token for event in events for token in event.tokens], "index": index}
    scores = [score for event in events for score in event.logprobs]
    if scored and scores:
        chunk["log_probs"] = [score.logprob for score in scores]
        chunk["top_logprobs"] = [_top(score) for score in scores]
    prompt = next((event.prompt_logprobs for event in events if event.prompt_logprobs), ())
    if prompt:
        chunk["engine_data"] = {"prompt_logprobs": [_prompt(entry) for entry in prompt]}
    end = events[-1].end
    if end is not None:
        chunk["finish_reason"] = REASONS[end.reason]
        chunk["completion_usage"] = usage(num_prompt, end.generated_tokens, cached)
    return chunk


def apart(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """A last chunk as one that has its tokens, and one that says how the choice ended."""
    end = {name: chunk.pop(name) for name in ("finish_reason", "completion_usage")}
    return chunk, {"token_ids": [], "index": chunk["index"], **end}


def failure_of(event: Event) -> Dsv4cError | None:
    """Why the request failed, if this is how it ended."""
    if event.end is None or event.end.reason != "failed":
        return None
    return event.end.error or EngineError("the request failed without a reason")


def usage(num_prompt: int, num_generated: int, cached: int) -> dict[str, Any]:
    """Tokens of one choice, as OpenAI counts them."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _top(score: TokenLogprob) -> list[dict[str, Any]]:
    """The token chosen first, which is wanted whether or not it is among the most likely ones; they follow."""
    ranks = {token: rank for rank, (token, _) in enumerate(score.top, 1)}
    chosen = {"token_id": score.token_id, "logprob": score.logprob, "rank": ranks.get(score.token_id, 0)}
    others = [
        {"token_id": token, "logprob": logprob, "rank": ranks[token]}
        for token, logprob in score.top
        if token != score.token_id
    ]
    return [chosen, *others]


def _prompt(entry: TokenLogprob | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    found = {str(token): {"logprob": logprob, "rank": rank} for rank, (token, logprob) in enumerate(entry.top, 1)}
    found.setdefault(str(entry.token_id), {"logprob": entry.logprob})
    return found
