"""What a model or artifact is verified on: text with its own weights where it has both, and seeded random corners."""

from __future__ import annotations

from pathlib import Path

from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.config import ModelConfig
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.inputs import Inputs
from dsv4c.numerics import Runs
from dsv4c.opened import Artifact
from dsv4c.prompts import OWN, read_prompts
from dsv4c.verifying import Case


def cases(config: ModelConfig, weights: Path | None, prompts: Path | None, seed: int, most: int) -> list[Case]:
    """Prompts with the checkpoint in `weights`, if there is one; and random inputs with random weights.

    The checkpoint's folder holds the tokenizer, or the folder `tokenizer` beside it. Raises ConfigError for prompts
    without a checkpoint, CheckpointError for a checkpoint of another model.
    """
    asked = read_prompts(prompts or OWN)
    out = [Case("random", Runs(Inputs.random(config, seed)))]
    if weights is None:
        if prompts is not None:
            raise ConfigError("prompts need weights", hint="give a checkpoint's folder, not a preset")
        return out
    source = Checkpoint(weights)
    source.validate()
    if source.config != config:
        raise ArtifactError(f"the weights in `{weights}` are of another model", hint="give the model's own")
    beside = weights.parent / "tokenizer"
    tokenizer = Tokenizer.from_file(beside if beside.is_dir() else weights)
    return [Case("text", Runs(Inputs.of_prompts(source, tokenizer, asked, most))), *out]


def weights_of(artifact: Artifact, given: Path | None) -> Path | None:
    """The folder of an artifact's checkpoint: what is given, or what it holds."""
    if given is not None:
        return given
    return artifact.directory / "weights" if artifact.manifest.embedded_weights else None
