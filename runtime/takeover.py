"""How sampling of a request begins: fresh, or behind tokens that another engine has generated."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import SamplerState


def begin_sampling(request: Request, eos_token_ids: Sequence[int]) -> None:
    """Gives a new request its stop tokens and its sampler's state, with the tokens it was given counted.

    The stop hook is told of them too. Raises RequestError if they have ended the request already, or if the hook fails.
    """
    params, given = request.params, request.tokens(request.num_prompt).tolist()
    request.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
    prompt = request.tokens(0, request.num_prompt)
    sampler = request.sampler = SamplerState(params, prompt, sorted(request.stop_ids), request.choice)
    for count, token in enumerate(given, 1):
        sampler.accept(token)
        stopped = token not in request.stop_ids and _push(request, token) and count >= params.min_tokens
        grammar = sampler.grammar
        if token in request.stop_ids or stopped or (grammar is not None and grammar.over):
            raise RequestError(
                f"the tokens generated so far end the request at the {count}th of {len(given)}",
                param="generated",
                code="invalid_value",
            )


def _push(request: Request, token: int) -> bool:
    try:
        return request.text_stop is not None and request.text_stop.push(token)
    except Exception as error:  # a hook is foreign code: its failure ends its own request only
        failed = EngineError(f"the stop hook failed: {error}")
        raise RequestError(failed.message, status=500, code="internal") from error
