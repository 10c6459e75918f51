"""What Dynamo's frontend asks of a worker, read and checked: token ids and parameters, in this engine's words.

A field that asks for something this engine cannot do is refused, never ignored; what only concerns text (stop strings,
special tokens, echo) is the frontend's and not read. None stands for a field that the client did not give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4c.errors import RequestError
from dsv4c.runtime.params import SamplingParams

_SAMPLING = {
    "temperature": float, "top_p": float, "min_p": float, "top_k": int, "seed": int, "n": int,
    "presence_penalty": float, "frequency_penalty": float, "repetition_penalty": float,
}  # fmt: skip
_STOPPING = {"max_tokens": int, "min_tokens": int}
_GUIDES = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Guide:
    """The grammar that is asked for: one of `json`, `regex`, `choice`, `grammar`, with its value."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Asked:
    """One request. `params.n` choices; `params.grammar` is still to be compiled from `guide`."""

    prompt: tuple[int, ...]
    params: SamplingParams
    guide: Guide | None = None
    generated: tuple[int, ...] = ()
    """What another worker has generated and the client has. `params` count it."""


AnswerStart = Callable[[Sequence[int]], int | None]
"""Where in a chat's tokens the answer begins that is asked for; None for what is no chat."""


def read_request(
    request: Mapping[str, Any], eos_token_ids: Collection[int], answer_start: AnswerStart = lambda tokens: None
) -> Asked:
    """The request of the frontend. Raises RequestError (400) that names the field at fault.

    A request that was moved from another worker comes with what that has generated behind its prompt, and with that
    much less to generate, but does not say so. Of a chat it can be seen: behind its prompt nothing else can be. Of
    other requests it cannot; they go on as if it were prompt.
    """
    prompt = _token_ids(request.get("token_ids"), "token_ids")
    if not prompt:
        raise _refuse("prompt", "has no tokens")
    for name in ("multi_modal_data", "prompt_embeds", "encoder_result"):
        if request.get(name):
            raise _refuse(name, "is not supported: the model reads text")
    sampling, stopping = _section(request, "sampling_options"), _section(request, "stop_conditions")
    output = _section(request, "output_options")
    if sampling.get("use_beam_search"):
        raise _refuse("use_beam_search", "is not supported")
    if sampling.get("best_of") not in (None, 1, sampling.get("n")):
        raise _refuse("best_of", "is not supported")
    if stopping.get("max_thinking_tokens") is not None:
        raise _refuse("max_thinking_tokens", "is not supported")
    given: dict[str, Any] = {}
    for section, kinds in ((sampling, _SAMPLING), (stopping, _STOPPING)):
        given |= {name: value for name, kind in kinds.items() if (value := _number(section, name, kind)) is not None}
    for name in ("logprobs", "prompt_logprobs"):
        if (count := _number(output, name, int)) is not None:
            given[name] = count
    bias = sampling.get("logit_bias")
    if bias is not None:
        given["logit_bias"] = _bias(bias)
    ignore_eos = bool(stopping.get("ignore_eos"))
    stops = _stop_ids(stopping) - set(eos_token_ids)
    start = answer_start(prompt) if _is_chat(request) else None
    prompt, generated = (prompt, ()) if start is None else (prompt[:start], prompt[start:])
    if generated and "max_tokens" in given:
        given["max_tokens"] += len(generated)
    if given.get("min_tokens", 0) > given.get("max_tokens", math.inf):
        # Dynamo lowers `max_tokens` alone: to 1 for a prefill worker, and for a worker that a request is moved to
        given["min_tokens"] = given["max_tokens"]
    params = SamplingParams(**given, stop_token_ids=tuple(sorted(stops)), ignore_eos=ignore_eos)
    return Asked(prompt, params, _guide(sampling.get("guided_decoding")), generated)


def _is_chat(request: Mapping[str, Any]) -> bool:
    """Whether the frontend rendered messages: it then passes on what it rendered them with."""
    extra = request.get("extra_args")
    return isinstance(extra, Mapping) and "reasoning_parser_kwargs" in extra


def _section(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = request.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _refuse(name, "must be an object")
    return found


def _number(section: Mapping[str, Any], name: str, kind: type) -> int | float | None:
    value = section.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise _refuse(name, f"must be {'a whole number' if kind is int else 'a number'}, not {value!r}")
    return int(value) if kind is int else float(value)


def _token_ids(value: Any, name: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(type(token) is int for token in value):
        raise _refuse(name, "must be a list of token ids")
    return tuple(value)


def _stop_ids(stopping: Mapping[str, Any]) -> set[int]:
    """Every token that ends the request, whether its text is shown or not: that is the frontend's affair."""
    names = ("stop_token_ids", "stop_token_ids_hidden", "stop_token_ids_visible")
    return {token for name in names for token in _token_ids(stopping.get(name), name)}


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", "must be an object")
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except (TypeError, ValueError):
        raise _refuse("logit_bias", "must map token ids to numbers") from None


def _guide(value: Any) -> Guide | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse("guided_decoding", "must be an object")
    if value.get("structural_tag") is not None:
        raise _refuse("structural_tag", "is not supported")
    found = list(_guides(value))
    if len(found) > 1:
        raise _refuse("guided_decoding", f"asks for `{found[0].kind}` and `{found[1].kind}`, which exclude each other")
    return found[0] if found else None


def _guides(value: Mapping[str, Any]) -> Iterator[Guide]:
    for kind in _GUIDES:
        if value.get(kind) is not None:
            yield Guide(kind, value[kind])


def _refuse(param: str, message: str) -> RequestError:
    return RequestError(f"`{param}` {message}", param=param, code="invalid_value")
