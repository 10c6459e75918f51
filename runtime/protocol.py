"""The wire format: OpenAI request bodies, checked field by field, and the OpenAI error body.

    bytes --parse_json--> object --CompletionBody / ChatBody--> typed fields --sampling()--> engine parameters

Whatever is wrong with a body becomes one RequestError that names the field. Fields we do not know are not an error
(clients send many); the server names them in a response header, so that no knob is ignored unseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv4c.errors import RequestError
from dsv4c.runtime.params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

MAX_SEQUENCES = 256  # prompts times n in one HTTP request: a batch of an evaluation harness fits, a typo does not
MAX_STOPS = 16
_MANY = 2**31  # beyond any context; keeps absurd numbers out of messages
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI documents it
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_KNOBS = ("temperature", "top_p", "top_k", "min_p", "min_tokens", *_PENALTIES)
_SCALARS = (str, int, float, bool)
_REASONS = {  # pydantic's error types in our words
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "too_short": "is empty",
}

# Fields of the official client that carry no meaning for one model on one machine.
_INERT = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity"))

Prompt = str | list[int]
BodyT = TypeVar("BodyT", bound="_Body")


class _Body(BaseModel):
    """What completions and chat share. `None` always means the default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Any = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, lt=_MANY)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64 - MAX_CHOICES)
    max_tokens: int | None = Field(None, lt=_MANY)
    min_tokens: int | None = Field(None, lt=_MANY)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def ignored_fields(self) -> list[str]:
        """Names of the fields that were sent and have no effect, unknown ones only."""
        return sorted(set(self.model_extra or ()) - _INERT)

    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk. Raises RequestError on bad stream options."""
        options = self.stream_options
        if options is None:
            return False
        if not self.stream:
            refuse("`stream_options` needs `stream: true`", "stream_options")
        value = options.get("include_usage", False)
        if not isinstance(value, bool):
            refuse("`stream_options.include_usage` must be true or false", "stream_options.include_usage")
        return value

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises RequestError unless it is a string or a short list of non-empty ones."""
        if self.stop is None:
            return ()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            refuse("`stop` must be a string or a list of strings", "stop")
        if len(stops) > MAX_STOPS:
            refuse(f"`stop` has {len(stops)} strings, at most {MAX_STOPS} are taken", "stop")
        if "" in stops:
            refuse("`stop` must not hold an empty string", "stop")
        return tuple(stops)

    def biases(self, vocab_size: int) -> dict[int, float]:
        """Token id -> bias. Raises RequestError for a key that is no token id."""
        result: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            digits = key.isascii() and key.isdigit() and len(key) < 12
            if not digits or int(key) >= vocab_size:
                refuse(f"`logit_bias` key `{key[:40]}` is not a token id below {vocab_size}", "logit_bias")
            result[int(key)] = value
        return result

    def sampling(
        self,
        *,
        choice: int,
        max_tokens: int,
        vocab_size: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Engine parameters of choice number `choice`; with a seed, choice i draws from `seed + i`.

        Raises RequestError that names the parameter out of range.
        """
        given = {
            name: getattr(self, name)
            for name in _KNOBS
            if getattr(self, name) is not None  # the defaults are the engine's
        }
        if self.seed is not None:
            given["seed"] = self.seed + choice
        if "min_tokens" in given and given["min_tokens"] > max_tokens:
            refuse(f"`min_tokens` is {given['min_tokens']}, more than the {max_tokens} that may follow", "min_tokens")
        params = SamplingParams(
            max_tokens=max_tokens,
            logit_bias=self.biases(vocab_size),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )
        params.check_vocab(vocab_size)
        return params


class CompletionBody(_Body):
    """Body of /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None

    def prompts(self, vocab_size: int) -> list[Prompt]:
        """One or more prompts, text or token ids. Raises RequestError for anything else."""
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            refuse("`prompt` must be a string, a list of strings, token ids, or a list of token id lists", "prompt")
        if all(type(item) is int for item in value):
            return [_token_ids(value, "prompt", vocab_size)]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if not all(isinstance(item, list) for item in value):
            refuse("`prompt` mixes strings, token ids and lists", "prompt")
        return [_token_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(value)]

    def new_tokens(self) -> int:
        """Most tokens to generate; 0 only together with `echo`, to score a prompt."""
        if self.max_tokens is None:
            return _DEFAULT_MAX_TOKENS
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.echo):
            hint = "0 is taken together with `echo` only" if self.max_tokens == 0 else ""
            refuse(f"`max_tokens` must be at least 1, not {self.max_tokens}", "max_tokens", hint=hint)
        return self.max_tokens

    def check(self) -> None:
        """Raises RequestError for options that contradict each other or are not offered."""
        if self.best_of not in (None, self.num_choices):
            refuse("`best_of` other than `n` is not supported", "best_of", hint="ask for `n` choices and pick one")
        if self.suffix:
            refuse("`suffix` is not supported", "suffix", hint="put the model's fill-in tokens into `prompt`")


class ChatBody(_Body):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, lt=_MANY)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: str | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None

    def new_tokens(self) -> int | None:
        """Most tokens to generate; None is as many as the context holds."""
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            refuse("`max_tokens` and `max_completion_tokens` contradict each other", "max_tokens")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        value = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if value is not None and value < 1:
            refuse(f"`{name}` must be at least 1, not {value}", name)
        return value

    def num_logprobs(self) -> int | None:
        """How many alternatives each token carries; None is no logprobs at all."""
        if not self.logprobs:
            if self.top_logprobs:
                refuse("`top_logprobs` needs `logprobs: true`", "top_logprobs")
            return None
        return self.top_logprobs or 0

    def mode(self, default_thinking: bool) -> tuple[bool, str | None]:
        """(thinking, effort) from the three spellings in use. Raises RequestError when they contradict."""
        said: dict[str, bool] = {}
        if self.thinking is not None:
            kind = self.thinking.get("type")
            if kind not in ("enabled", "disabled"):
                refuse("`thinking.type` must be `enabled` or `disabled`", "thinking.type")
            said["thinking"] = kind == "enabled"
        for key in ("thinking", "enable_thinking"):
            value = (self.chat_template_kwargs or {}).get(key)
            if value is None:
                continue
            if not isinstance(value, bool):
                refuse(f"`chat_template_kwargs.{key}` must be true or false", f"chat_template_kwargs.{key}")
            said[f"chat_template_kwargs.{key}"] = value
        effort = self.reasoning_effort
        if effort is not None:
            said["reasoning_effort"] = effort != "none"
        if len(set(said.values())) > 1:
            first, second = list(said)[:2]
            refuse(f"`{first}` and `{list(said)[-1] if said[first] == said[second] else second}` contradict", first)
        thinking = next(iter(said.values()), default_thinking)
        return thinking, None if effort == "none" else effort

    def prompt_tools(self) -> list[dict[str, Any]] | None:
        """The tools the prompt shows. Raises RequestError for a choice that cannot be kept."""
        choice = "auto" if self.tool_choice is None else self.tool_choice
        if choice == "none":
            return None
        if choice != "auto":
            refuse("`tool_choice` must be `auto` or `none`; forcing a call is not supported", "tool_choice")
        return self.tools or None

    def prompt_format(self) -> dict[str, Any] | None:
        """The response format the prompt shows: the model is told, not forced."""
        if self.response_format is None:
            return None
        kind = self.response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return self.response_format
        schema = self.response_format.get("json_schema")
        if kind != "json_schema" or not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            hint = "`text`, `json_object`, or `json_schema` with `json_schema.schema`"
            refuse("`response_format` is not understood", "response_format", hint=hint)
        if schema.get("strict"):
            refuse(
                "`response_format.json_schema.strict` is not supported",
                "response_format.json_schema.strict",
                hint="without `strict` the schema is put into the prompt and not enforced",
            )
        return self.response_format

    def check_content(self) -> None:
        """Raises RequestError for a content part that is not text; the rest of a message is the chat format's."""
        for i, message in enumerate(self.messages):
            content = message.get("content")
            for j, part in enumerate(content if isinstance(content, list) else ()):
                kind = part.get("type") if isinstance(part, dict) else None
                if kind != "text":
                    param = f"messages[{i}].content[{j}]"
                    what = f"`{param}` has type {json.dumps(kind)[:40]}, only `text` is supported"
                    refuse(what, param, code="unsupported_content")


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request; a prompt counts once, whatever `n`. `cached_tokens`: prompt tokens not computed."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int | None = None
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return body


def refuse(message: str, param: str | None, *, hint: str = "", status: int = 400, code: str | None = None) -> NoReturn:
    """Raises the RequestError of a bad value."""
    raise RequestError(message, status=status, param=param, code=code or "invalid_value", hint=hint)


def parse_json(raw: bytes) -> Mapping[str, Any]:
    """The JSON object in a request body. Raises RequestError (400) for anything else, however nasty."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in raw or b"\\uD" in raw:  # a lone surrogate is valid JSON and no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        refuse("the request body is nested too deeply", None, code="invalid_json")
    except UnicodeError:
        refuse("the request body is not UTF-8", None, code="invalid_json")
    except ValueError as error:
        reason = str(error).split(";")[0]  # what follows is advice to Python programmers
        refuse(f"the request body is not JSON: {reason}"[:200], None, code="invalid_json")
    if not isinstance(value, dict):
        refuse("the request body must be a JSON object", None, code="invalid_json")
    return value


def parse_body(kind: type[BodyT], data: Mapping[str, Any]) -> BodyT:
    """The typed body. Raises RequestError naming the first field at fault."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=True)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        refuse(f"`{param}` is missing", param, code="missing_required_parameter")
    given = first["input"]
    shown = f", not {json.dumps(given)[:60]}" if isinstance(given, _SCALARS) or given is None else ""
    reason = _REASONS.get(first["type"], "").format(**first.get("ctx", {}))
    if not reason:
        reason = first["msg"].replace("Input should be ", "must be ")
        reason = reason[0].lower() + reason[1:]
    refuse(f"`{param}` {reason}{shown}", param)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The OpenAI error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_kind(status: int) -> str:
    """OpenAI's `type` word for an HTTP status."""
    kinds = {404: "not_found_error", 503: "service_unavailable_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def logprob_number(value: float) -> float:
    """A finite logprob, as JSON has no infinity; -9999 is OpenAI's word for minus infinity."""
    return value if math.isfinite(value) else -9999.0


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"`{name}` is not a JSON number")


def _token_ids(value: list[Any], param: str, vocab_size: int) -> list[int]:
    if not value:
        refuse(f"`{param}` is empty", param)
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            refuse(f"`{param}` holds {str(token)[:40]}, which is not a token id below {vocab_size}", param)
    return value
