"""MODEL on the command line: a checkpoint folder, or the name of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.config import ModelConfig


def preset_or_folder(name: str) -> ModelConfig:
    """The preset of this name; raises ConfigError for a path that does not exist, or an unknown name."""
    from dsv4c.config import preset

    if any(c in name for c in "/\\.") or Path(name).is_absolute():
        raise ConfigError(f"`{name}` does not exist", hint="MODEL is a checkpoint folder, or flash, pro, nano")
    return preset(name)
