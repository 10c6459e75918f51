"""The drafter of an artifact that is run on the host."""

from __future__ import annotations

from dsv4c.artifact import Manifest
from dsv4c.runtime.blocks import BlockDrafter
from dsv4c.runtime.drafts import Drafter, MtpDrafter
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.runner import Executor


def drafter_of(executor: Executor, manifest: Manifest) -> Drafter:
    """Runs its programs beside `executor`, over the same pools."""
    assert isinstance(executor, ArtifactExecutor) and manifest.drafter is not None
    programs = manifest.programs
    if manifest.drafter.kind == "mtp":
        return MtpDrafter(executor, executor.beside(programs["mtp"]), programs["mtp"].inputs)
    absorb, draft = (programs[f"dspark.{name}"] for name in ("absorb", "draft"))
    inputs = {item.name: item for item in (*absorb.inputs, *draft.inputs)}.values()
    absorbing, drafting = executor.beside(absorb).outputs, executor.beside(draft).outputs
    return BlockDrafter(executor, absorbing, drafting, inputs, manifest.drafter)
