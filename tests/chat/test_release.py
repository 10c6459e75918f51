"""The release of the chat format is the checkpoint's: told by its encoder, kept by the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from dsv4c.chat.bpe import save_tokenizer
from dsv4c.chat.codec import ChatCodec
from dsv4c.chat.prompts import EFFORTS, Release
from dsv4c.chat.release import RELEASES, release_of, write_release
from dsv4c.errors import ConfigError


def ship(folder: Path, text: str) -> None:
    """Puts an encoder beside the weights, as the checkpoints have it."""
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("release", RELEASES)
def test_the_encoder_tells(tmp_path: Path, release: Release) -> None:
    ship(tmp_path, "REASONING_EFFORT_MAX = (\n" + "\n".join(repr(t) for t in EFFORTS[release].values()) + ")\n")
    assert release_of(tmp_path) == release


@pytest.mark.parametrize("release", RELEASES)
def test_the_artifact_keeps_it(tmp_path: Path, small_backend: tokenizers.Tokenizer, release: Release) -> None:
    save_tokenizer(small_backend, tmp_path, model_max_length=4096)
    assumed = ChatCodec.from_folder(tmp_path)
    assert (assumed.release, assumed.release_known) == ("preview", False)
    write_release(tmp_path, release)
    assert ChatCodec.from_folder(tmp_path).release == release
    assert ChatCodec.from_folder(tmp_path).release_known
    assert ChatCodec.from_folder(tmp_path / "tokenizer.json").release == release
    assert ChatCodec.from_folder(tmp_path, release="0731").release == "0731", "what is asked for is stronger"


def test_compiling_keeps_what_the_checkpoint_says(tmp_path: Path, small_backend: tokenizers.Tokenizer) -> None:
    from dsv4c.compile import _embed

    checkpoint, artifact = tmp_path / "checkpoint", tmp_path / "artifact"
    checkpoint.mkdir()
    artifact.mkdir()
    save_tokenizer(small_backend, checkpoint, model_max_length=4096)
    ship(checkpoint, EFFORTS["0731"]["max"])
    _embed(checkpoint, artifact)
    assert ChatCodec.from_folder(artifact / "tokenizer").release == "0731"


def test_a_checkpoint_that_does_not_say(tmp_path: Path) -> None:
    assert release_of(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"release": "0815"}'])
def test_bad_settings_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(ConfigError, match=r"chat\.json"):
        release_of(tmp_path)


def test_an_unknown_encoder_is_refused(tmp_path: Path) -> None:
    ship(tmp_path, "print('hello')")
    with pytest.raises(ConfigError, match="encoder of no release"):
        release_of(tmp_path)
