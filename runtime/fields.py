"""The request fields that every generating endpoint shares, checked one by one, to the engine's parameters.

    object --a body model--> typed fields --sampling()--> SamplingParams

Fields we do not know are not an error (clients send many); the server names them in a response header, so that no
knob is ignored unseen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dsv4c.runtime.grammar import Grammar
from dsv4c.runtime.params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from dsv4c.runtime.protocol import refuse, whole
from dsv4c.runtime.structured import StructuredFields

MAX_SEQUENCES = 256  # prompts times n in one HTTP request: a batch of an evaluation harness fits, a typo does not
MAX_STOPS = 16
MANY = 2**31  # beyond any context; keeps absurd numbers out of messages
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_KNOBS = ("temperature", "top_p", "top_k", "min_p", "min_tokens", "priority", *_PENALTIES)

# Fields of the official client without meaning for one model on one machine, and hints of caching, which is automatic.
INERT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Fields of vLLM's that have one value here: sent with it they change nothing, with another they are named.
_FIXED = {
    "add_special_tokens": False,
    "detokenize": True,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
}


class Body(BaseModel):
    """A request's body. `None` always means the default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {name: whole(value) for name, value in data.items()}

    @property
    def unknown(self) -> list[str]:
        """Names of the fields that were sent and that no model knows."""
        return unknown_keys("", self.model_extra, INERT)


class GenerationBody(StructuredFields, Body):
    """What every endpoint that generates shares."""

    model: str
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Any = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, lt=MANY)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64 - MAX_CHOICES)
    max_tokens: int | None = Field(None, lt=MANY)
    min_tokens: int | None = Field(None, lt=MANY)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    priority: int | None = Field(None, gt=-MANY, lt=MANY)

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _whole_ids(cls, value: Any) -> Any:
        return [whole(item) for item in value] if isinstance(value, list) else value

    def check_scores(self) -> None:
        """Raises RequestError for scores of the prompt in a stream, which has no place for them."""
        if self.prompt_logprobs is not None and self.stream:
            refuse("`prompt_logprobs` does not go with `stream: true`", "prompt_logprobs")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def ignored_fields(self) -> list[str]:
        """Names of the fields that were sent and have no effect, those inside of objects too."""
        extra = self.model_extra or {}
        known = INERT | {name for name, value in _FIXED.items() if extra.get(name) == value}
        options = unknown_keys("stream_options", self.stream_options, ("include_usage", "continuous_usage_stats"))
        return sorted((*unknown_keys("", extra, known), *options))

    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk. Raises RequestError on bad stream options."""
        wanted = self._stream_option("include_usage")
        if self._stream_option("continuous_usage_stats") and not wanted:
            param = "stream_options.continuous_usage_stats"
            refuse(f"`{param}` needs `include_usage: true`", param)
        return wanted

    def continuous_usage(self) -> bool:
        """Whether every chunk carries the usage so far."""
        return self._stream_option("continuous_usage_stats")

    def _stream_option(self, name: str) -> bool:
        options = self.stream_options
        if options is None:
            return False
        if not self.stream:
            refuse("`stream_options` needs `stream: true`", "stream_options")
        value = options.get(name, False)
        if not isinstance(value, bool):
            refuse(f"`stream_options.{name}` must be true or false", f"stream_options.{name}")
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
            digits = key.isascii() and key.isdigit() and len(key) < 12 and (key == "0" or key[0] != "0")
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
        grammar: Grammar | None = None,
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
            grammar=grammar,
            **given,
        )
        params.check_vocab(vocab_size)
        return params


def unknown_keys(name: str, value: Mapping[str, Any] | None, known: Collection[str]) -> list[str]:
    """The keys of an object that say something and are not known, as `name.key`. A null says nothing."""
    prefix = f"{name}." if name else ""
    return [prefix + key for key, given in (value or {}).items() if given is not None and key not in known]
