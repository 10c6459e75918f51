"""Which release of the model a checkpoint is: they differ in what the levels of reasoning effort say.

A checkpoint says so in the encoder that it ships, `encoding/encoding_dsv4.py`, of which the text is searched and
nothing is run; an artifact in `chat.json` beside its tokenizer. Configuration and weights do not tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from dsv4c.chat.prompts import EFFORTS, Release
from dsv4c.errors import ConfigError

RELEASES: tuple[Release, ...] = get_args(Release)
SETTINGS = "chat.json"
_ENCODER = Path("encoding") / "encoding_dsv4.py"


def release_of(folder: Path) -> Release | None:
    """The release of the checkpoint in `folder`, or of the artifact whose tokenizer it holds; None: it does not say.

    Raises ConfigError for a file that names none that is known.
    """
    if (settings := folder / SETTINGS).is_file():
        return _from_settings(settings)
    if (encoder := folder / _ENCODER).is_file():
        return _from_encoder(encoder)
    return None


def write_release(folder: Path, release: Release) -> None:
    """Records the release beside the tokenizer in an existing folder."""
    (folder / SETTINGS).write_text(json.dumps({"release": release}) + "\n", encoding="utf-8")


def _from_settings(path: Path) -> Release:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read `{path}`: {error}", hint="compile the artifact again") from error
    found = settings.get("release") if isinstance(settings, dict) else None
    for release in RELEASES:
        if found == release:
            return release
    raise ConfigError(f"`{path}` names no release of {', '.join(RELEASES)}", hint="compile the artifact again")


def _from_encoder(path: Path) -> Release:
    """The last release of which the strongest effort's first sentence occurs: later encoders keep the older ones'."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read `{path}`: {error}", hint="is the checkpoint complete?") from error
    for release in reversed(RELEASES):
        if EFFORTS[release]["max"].partition("\n")[0] in source:
            return release
    raise ConfigError(
        f"`{path}` is an encoder of no release that is known: {', '.join(RELEASES)}",
        hint="`--chat-release` says which one to serve; to compile, leave its folder `encoding` out",
    )
