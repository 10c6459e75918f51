"""What the scheduler may do: the numbers that a server sets, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a step and the queue may hold: counts of requests, tokens and logit rows."""

    max_requests: int = 64
    """Running at once."""
    max_step_tokens: int = 512
    """Token budget of a step, decode and prefill together; the largest chunk."""
    max_waiting: int = 1024
    """A longer queue refuses new requests with 503."""
    max_logit_rows: int | None = None
    """Rows of logits in a step; None: as many as tokens. Bounds the chunks of prompts whose logprobs are wanted."""
    speculative_tokens: int = 0
    """Most drafts of a request that a step verifies."""
    mixed_drafts: bool = True
    """Whether a step that computes prompts verifies drafts too."""
    late_masks: bool = False
    """Whether a step with a grammar can be launched before the tokens are known on which its masks depend.

    The runner fills them when they are. Drafts, which such a runner does not tell, are then made for others alone.
    """
    prefix_cache: bool = True
    """Whether requests share the prefixes they have computed; needs `PoolSizes.snapshots`."""
    budget_tokens: int | None = None
    """A request is admitted when it and all others can generate so many more without lacking a page; None: none."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_step_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        least = f"`max_requests` {self.max_requests}"
        if self.decode_tokens > self.max_requests:
            least += f" with {self.speculative_tokens} drafts each"
        if self.budget_tokens is not None and self.budget_tokens < 0:
            raise ConfigError(f"`budget_tokens` must be at least 0, not {self.budget_tokens}")
        if self.max_step_tokens < self.decode_tokens:
            raise ConfigError(
                f"`max_step_tokens` is {self.max_step_tokens}, fewer than {least}",
                hint="every running request decodes one token a step, and its drafts",
            )
        if self.logit_rows < self.decode_tokens:
            raise ConfigError(
                f"`max_logit_rows` is {self.logit_rows}, fewer than {least}",
                hint="every running request needs a row to choose its next token from, and one for each draft",
            )

    @property
    def decode_tokens(self) -> int:
        """Tokens of a step that may compute prompts beside, in which all running requests decode."""
        return self.max_requests * (1 + (self.speculative_tokens if self.mixed_drafts else 0))

    @property
    def prompt_rows(self) -> int:
        """Rows of logits that are left for prompts in any step."""
        return self.logit_rows - self.decode_tokens

    @property
    def logit_rows(self) -> int:
        return self.max_step_tokens if self.max_logit_rows is None else self.max_logit_rows
