"""What an artifact's programs and pools allow an engine: its limits where none are asked for, a refusal otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.artifact import Manifest
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.runtime.batch import step_inputs
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.scheduler import Limits


@dataclass(frozen=True)
class Bounds:
    """The most that the programs of an artifact hold: tokens of a step, requests, rows of logits."""

    tokens: int
    requests: int
    rows: int


def bounds_of(manifest: Manifest) -> Bounds:
    """What one step can be; 2**62 for a size that nothing bounds."""
    phases = {program.phase for program in manifest.programs.values()} - {"draft"}
    if phases == {"decode", "prefill"}:
        sizes = {phase: [p.symbols for p in manifest.programs.values() if p.phase == phase] for phase in phases}
        largest = max(sizes["prefill"], key=lambda s: (s["T"], s["S"]))
        return Bounds(largest["T"], max(s.get("D", s["T"]) for s in sizes["decode"]), largest["S"])
    if phases != {"mixed"}:
        raise ArtifactError(
            f"the artifact has programs of phase {', '.join(sorted(phases)) or 'none'}, this runtime serves `mixed` "
            "alone, or `decode` and `prefill`",
            hint="compile it again with this version",
        )
    inputs, symbols = step_inputs(manifest)
    most = {i.kind: symbols.get(str(i.shape[0]), 2**62) for i in inputs}
    tokens, rows = most.get("token_ids", 2**62), most.get("logit_rows", 2**62)
    return Bounds(tokens, min(most.get("seq_starts", 2**62), tokens, rows), rows)


def drafts_of(manifest: Manifest) -> int:
    """Most drafts of a request in one step."""
    return 0 if manifest.drafter is None else manifest.drafter.max_tokens


def limits_for(manifest: Manifest, sizes: PoolSizes, asked: Limits | None = None) -> Limits:
    """The limits asked for, or the manifest's own.

    Raises ConfigError if limits or sizes exceed what its programs were made for.
    """
    bounds = bounds_of(manifest)
    requests = min(bounds.requests, sizes.max_requests)
    rows = min(512, bounds.tokens, bounds.rows)
    limits = asked or Limits(requests, min(512, bounds.tokens), max_logit_rows=rows)
    if limits.speculative_tokens > drafts_of(manifest):
        raise ConfigError(
            f"`--speculative-tokens` is {limits.speculative_tokens}, the artifact drafts {drafts_of(manifest)} at most",
            hint="compile it with `--speculative-tokens`",
        )
    for name, value, most in (
        ("max_requests", limits.max_requests, requests),
        ("max_step_tokens", limits.max_step_tokens, bounds.tokens),
        ("max_logit_rows", limits.logit_rows, bounds.rows),
        ("max_context", sizes.max_context, manifest.max_context),
    ):
        if value > most:
            raise ConfigError(
                f"`{name}` is {value}, the artifact and its pools allow {most}",
                hint=f"lower `{name}`, or compile for more",
            )
    return limits
