"""dsv4c: a compiler-centric runtime for DeepSeek-V4. Its public names; each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4c.bisecting import Bisection, Side, bisect_lineage, bisect_pair
    from dsv4c.capturing import capture
    from dsv4c.compile import Options, compile_artifact, lower
    from dsv4c.config import PRESETS, ModelConfig, Target, preset
    from dsv4c.errors import (
        ArtifactError,
        CheckpointError,
        CompileError,
        ConfigError,
        Dsv4cError,
        InputError,
        PassError,
        RaiseError,
        ScheduleError,
    )
    from dsv4c.inputs import Inputs
    from dsv4c.lineage import Staged, of_artifact, of_pipeline
    from dsv4c.numerics import Check, Runs
    from dsv4c.opened import Artifact, ArtifactProgram, PlacedCall, load
    from dsv4c.pipeline import Change, Pass, Pipeline, Step
    from dsv4c.program import Program
    from dsv4c.verifying import Case, Row, ScheduleRow, Verification, verify_lineage
    from dsv4c.work import Sizes, Work, node_work, work_of

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Artifact",
    "ArtifactError",
    "ArtifactProgram",
    "Bisection",
    "Case",
    "Change",
    "Check",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "Dsv4cError",
    "InputError",
    "Inputs",
    "ModelConfig",
    "Options",
    "Pass",
    "PassError",
    "Pipeline",
    "PlacedCall",
    "Program",
    "RaiseError",
    "Row",
    "Runs",
    "ScheduleError",
    "ScheduleRow",
    "Side",
    "Sizes",
    "Staged",
    "Step",
    "Target",
    "Verification",
    "Work",
    "bisect_lineage",
    "bisect_pair",
    "capture",
    "compile_artifact",
    "load",
    "lower",
    "node_work",
    "of_artifact",
    "of_pipeline",
    "preset",
    "verify_lineage",
    "work_of",
]

_HOMES = {
    "dsv4c.bisecting": ("Bisection", "Side", "bisect_lineage", "bisect_pair"),
    "dsv4c.capturing": ("capture",),
    "dsv4c.compile": ("Options", "compile_artifact", "lower"),
    "dsv4c.config": ("PRESETS", "ModelConfig", "Target", "preset"),
    "dsv4c.errors": (
        "ArtifactError", "CheckpointError", "CompileError", "ConfigError", "Dsv4cError", "InputError", "PassError",
        "RaiseError", "ScheduleError",
    ),
    "dsv4c.inputs": ("Inputs",),
    "dsv4c.lineage": ("Staged", "of_artifact", "of_pipeline"),
    "dsv4c.numerics": ("Check", "Runs"),
    "dsv4c.opened": ("Artifact", "ArtifactProgram", "PlacedCall", "load"),
    "dsv4c.pipeline": ("Change", "Pass", "Pipeline", "Step"),
    "dsv4c.program": ("Program",),
    "dsv4c.verifying": ("Case", "Row", "ScheduleRow", "Verification", "verify_lineage"),
    "dsv4c.work": ("Sizes", "Work", "node_work", "work_of"),
}  # fmt: skip
"""Module -> the public names that live there. No name is a module's own: an import of it would hide the name."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module `dsv4c` has no public name `{name}`")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
