"""What an engine counts, for metrics and logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv4c.runtime.speculation import SpeculationStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: what is queued and held now, and totals since the engine was made. Seconds are wall time."""

    running: int = 0
    waiting: int = 0
    arriving: int = 0
    """Requests whose state is on its way in."""
    kept: int = 0
    """Requests that have ended and hold their pages, for others to read."""
    unsettled: int = 0
    """Slots that nobody wants and a transfer may still write."""
    max_waiting: int = 0
    """How many may wait; more are refused. 0: not said."""
    pages_used: Mapping[str, int] = field(default_factory=dict)
    pages_total: Mapping[str, int] = field(default_factory=dict)
    pages_cached: Mapping[str, int] = field(default_factory=dict)
    """Pages that no request uses now, kept by the prefix cache until somebody needs the room."""
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Tokens computed, recomputed ones included."""
    prompt_tokens: int = 0
    """Tokens of the prompts of requests that were accepted."""
    prefix_queried_tokens: int = 0
    """Tokens of prompts that were looked up in the prefix cache, once a request."""
    prefix_hit_tokens: int = 0
    """Of these, tokens that were found and not computed."""
    generated_tokens: int = 0
    failed_steps: int = 0
    """Steps that raised, whether or not any request was left to tell."""
    step_s: float = 0.0
    """Seconds in `Engine.step`."""
    launch_s: float = 0.0
    """Of these, in the runner's `launch`: with lag 0 the computation itself."""
    wait_s: float = 0.0
    """Of these, in the runner's `collect`: waiting for the device."""
    last_step_s: float = 0.0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    ended: Mapping[str, int] = field(default_factory=dict)
    """Requests ended, by reason."""

    @property
    def host_s(self) -> float:
        """Seconds in steps outside waiting; divided by `steps`, what the host spends on one."""
        return self.step_s - self.wait_s
