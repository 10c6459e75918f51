"""What a client may ask of sampling, validated once, with the parameter at fault named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv4c.errors import RequestError
from dsv4c.runtime.grammar import Grammar

MAX_LOGPROBS = 20  # OpenAI's limit for chat
MAX_TEMPERATURE = 1e6  # all tokens are as likely long before; beyond float32 a masked logit would be NaN
MAX_REPETITION_PENALTY = 1000.0  # logits times more, or by less, may leave float32
MAX_CHOICES = 128  # OpenAI's limit for n


def _refuse(param: str, message: str, hint: str = "") -> RequestError:
    return RequestError(f"`{param}` {message}", param=param, code="invalid_value", hint=hint)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names are those of the OpenAI API and of vLLM's extensions.

    Raises RequestError (400) that names the parameter when a value is out of range.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None fills the context."""
    min_tokens: int = 0
    """No stop token, and no stop string, ends the request before this many tokens."""
    temperature: float = 1.0
    """0 is greedy; 1,000,000 at most."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 keep all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    """None draws one from the operating system."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """None: none. k: the chosen token's, and the k most likely ones'."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    priority: int = 0
    """Of those that wait, the lowest goes first, and among equals the one that came first."""
    grammar: Grammar | None = field(default=None, compare=False, repr=False)
    """What the generated text must match; it ends where this does, whatever `min_tokens`."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise _refuse(f.name, f"must be finite, not {value}")
        self._check_lengths()
        self._range("temperature", 0.0, MAX_TEMPERATURE)
        if not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", f"must be above 0 and at most 1, not {self.top_p}", "use 1 to keep all tokens")
        if self.top_k < -1:
            raise _refuse("top_k", f"must be -1, 0 or positive, not {self.top_k}", "use 0 to keep all tokens")
        self._range("min_p", 0.0, 1.0)
        self._range("presence_penalty", -2.0, 2.0)
        self._range("frequency_penalty", -2.0, 2.0)
        self._range("repetition_penalty", 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        if self.seed is not None:
            self._range("seed", -(2**63), 2**64 - 1)
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise _refuse("logit_bias", f"of token {token} must be between -100 and 100, not {bias}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._range(name, 0, MAX_LOGPROBS)
        self._range("n", 1, MAX_CHOICES)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _refuse("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if self.min_tokens < 0:
            raise _refuse("min_tokens", f"must not be negative, not {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", f"is {self.min_tokens}, more than `max_tokens` {self.max_tokens}")

    def _range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if low <= value <= high:
            return
        raise _refuse(name, f"must be between {low:,} and {high:,}, not {value}")

    def check_vocab(self, vocab_size: int) -> None:
        """Raises RequestError (400) if a token id lies outside the vocabulary."""
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise _refuse(name, f"has token {token}, the vocabulary has {vocab_size}")
