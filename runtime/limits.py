"""What an artifact's programs and pools allow an engine: its limits where none are asked for, a refusal otherwise."""

from __future__ import annotations

from dsv4c.artifact import Manifest
from dsv4c.errors import ConfigError
from dsv4c.runtime.batch import step_inputs
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.scheduler import Limits


def limits_for(manifest: Manifest, sizes: PoolSizes, asked: Limits | None = None) -> Limits:
    """The limits asked for, or the manifest's own.

    Raises ConfigError if limits or sizes exceed what its programs were made for.
    """
    inputs, symbols = step_inputs(manifest)
    largest = {i.kind: symbols.get(str(i.shape[0]), 2**62) for i in inputs}
    tokens, rows = largest.get("token_ids", 2**62), largest.get("logit_rows", 2**62)
    requests = min(largest.get("seq_starts", 2**62), sizes.max_requests, tokens, rows)
    limits = asked or Limits(requests, min(512, tokens), max_logit_rows=min(512, tokens, rows))
    for name, value, most in (
        ("max_requests", limits.max_requests, requests),
        ("max_step_tokens", limits.max_step_tokens, tokens),
        ("max_logit_rows", limits.logit_rows, rows),
        ("max_context", sizes.max_context, manifest.max_context),
    ):
        if value > most:
            raise ConfigError(
                f"`{name}` is {value}, the artifact and its pools allow {most}",
                hint=f"lower `{name}`, or compile for more",
            )
    return limits
