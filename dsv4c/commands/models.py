"""MODEL on the command line: a checkpoint folder, or the name of a preset."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.config import ModelConfig


@dataclass(frozen=True)
class Chosen:
    """A model: its config, its checkpoint's folder if it has one, and how many layers it had if some are left out."""

    config: ModelConfig
    folder: Path | None
    truncated_from: int | None


def chosen_model(name: str, num_layers: int | None) -> Chosen:
    """The model of MODEL and `--num-layers`; says on stderr if layers are left out.

    Raises ConfigError for an unknown preset or a path that does not exist, CheckpointError for a bad checkpoint.
    """
    from dsv4c.checkpoint.reader import Checkpoint
    from dsv4c.config import PRESETS

    folder = Path(name) if name not in PRESETS and Path(name).exists() else None
    if folder is not None:
        checkpoint = Checkpoint(folder)
        checkpoint.validate()
        config = checkpoint.config
    else:
        config = _preset(name)
    whole = config.num_hidden_layers
    if num_layers is None or num_layers == whole:
        return Chosen(config, folder, None)
    if folder is not None:
        raise ConfigError("`--num-layers` is for presets", hint="compile a preset, and give it `--weights`")
    config = config.truncated(num_layers)
    print(f"a truncated model: the first {num_layers} of {whole} layers, for measurement", file=sys.stderr)
    return Chosen(config, None, whole)


def _preset(name: str) -> ModelConfig:
    from dsv4c.config import PRESETS, preset

    if any(c in name for c in "/\\.") or Path(name).is_absolute():
        raise ConfigError(f"`{name}` does not exist", hint=f"MODEL is a checkpoint folder, or {', '.join(PRESETS)}")
    return preset(name)
