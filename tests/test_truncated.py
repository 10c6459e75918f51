"""A model's first layers as an artifact: it says so, takes the whole model's checkpoint, and serves dummy weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dsv4c import cli
from dsv4c.artifact import load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import FLASH, NANO, ModelConfig, Target
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.launch import LaunchOptions, _check_model, answer, launch
from dsv4c.runtime.weights import LoadReport
from tests.conftest import ROOT

LAYERS = 2


@pytest.fixture(scope="module")
def config(nano_dir: Path) -> ModelConfig:
    return Checkpoint(nano_dir).config


@pytest.fixture(scope="module")
def truncated(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truncated") / "nano-2"
    compile_artifact(
        config.truncated(LAYERS), Target("cpu"), folder, Options(), truncated_from=config.num_hidden_layers,
        cache=ROOT / "build" / "kernels",
    )  # fmt: skip
    return folder


def test_a_truncated_config_keeps_kinds_head_and_mtp() -> None:
    four = FLASH.truncated(4)
    assert (four.num_hidden_layers, four.compress_ratios) == (4, (0, 0, 4, 128, 0))
    assert [four.gate_kind(i) for i in range(4)] == ["hash", "hash", "hash", "bias"]
    assert FLASH.truncated(43) == FLASH
    assert [FLASH.truncated(1).gate_kind(i) for i in range(2)] == ["hash", "bias"]  # the second is the MTP layer
    for layers in (0, 44):
        with pytest.raises(ConfigError, match=f"`--num-layers` is {layers}, the model has 43"):
            FLASH.truncated(layers)


def test_the_whole_models_checkpoint_is_served(
    truncated: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(truncated)
    assert manifest.truncated_from == 6
    assert not any(source.startswith("layers.2.") for weight in manifest.weights for source in weight.sources)
    reports: list[LoadReport] = []
    options = LaunchOptions(weights=nano_dir, tokenizer=nano_dir, kv_memory_bytes=50_000_000)
    launched = launch(truncated, options, loaded=reports.append)
    assert "".join(answer(launched, "The package provides", 8, 0.0, 0))
    assert [report.weights for report in reports] == [len(manifest.weights)] and reports[0].bytes > 1e6
    assert cli.main(["inspect", str(truncated)]) == 0
    assert "the first 2 of 6 layers" in capsys.readouterr().out


def test_only_a_truncated_artifact_takes_a_deeper_model(truncated: Path, config: ModelConfig) -> None:
    manifest = load_manifest(truncated)
    _check_model(manifest, config)
    _check_model(manifest, config.truncated(LAYERS))
    whole = dataclasses.replace(manifest, truncated_from=None)
    with pytest.raises(ArtifactError, match="compiled for `num_hidden_layers` 2, the weights have 6"):
        _check_model(whole, config)
    with pytest.raises(ArtifactError, match="compiled for `num_hidden_layers` 2, the weights have 4"):
        _check_model(manifest, config.truncated(4))
    other = dataclasses.replace(config, compress_ratios=(4, *config.compress_ratios[1:]))
    with pytest.raises(
        ArtifactError, match=r"compiled for `compress_ratios` \[0, 4, 0\], the weights have \[4, 4, 0\]"
    ):
        _check_model(manifest, other)
    with pytest.raises(ArtifactError, match="compiled for `index_topk`"):
        _check_model(manifest, dataclasses.replace(config, index_topk=32))


def test_dummy_weights_are_served_with_a_smaller_tokenizer(
    nano_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens that the tokenizer has not are no text, and no error."""
    wide = dataclasses.replace(NANO, vocab_size=3 * NANO.vocab_size).truncated(1)
    cache = ROOT / "build" / "kernels"
    compile_artifact(wide, Target("cpu"), tmp_path / "wide", Options(), truncated_from=6, cache=cache)
    command = ["run", str(tmp_path / "wide"), "--load-format", "dummy", "--prompt", "The package"]
    assert cli.main(command) == 2
    assert "hint: give one with `--tokenizer FILE`" in capsys.readouterr().err
    options = ["--tokenizer", str(nano_dir), "--max-new-tokens", "30", "--temperature", "1", "--max-requests", "4"]
    assert cli.main([*command, *options]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "loaded" in err and "GB/s" in err


def test_the_command_line_says_that_it_truncates(nano_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "nano", "--target", "cpu", "--num-layers", "1", "--dry-run"]) == 0
    assert "a truncated model: the first 1 of 6 layers, for measurement" in capsys.readouterr().err
    assert cli.main(["compile", "nano", "--target", "cpu", "--num-layers", "7", "--dry-run"]) == 2
    assert "`--num-layers` is 7, the model has 6" in capsys.readouterr().err
    assert cli.main(["compile", str(nano_dir), "--target", "cpu", "--num-layers", "1", "--dry-run"]) == 2
    assert "`--num-layers` is for presets" in capsys.readouterr().err


def test_the_manifest_keeps_it(truncated: Path) -> None:
    assert json.loads((truncated / "manifest.json").read_text())["truncated_from"] == 6
