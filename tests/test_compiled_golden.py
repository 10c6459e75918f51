"""The compiled program against the official reference's float32 results: logits and the streams of every layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import ModelConfig, StateLayout, Target
from dsv4c.model import make_step
from dsv4c.model.state import columns, group_ratios
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.loader import load

TOLERANCE = 5e-5
LAYOUT = StateLayout()
LENGTH = 300


@dataclass
class Rows:
    """Pools as `make_step` lays them out."""

    pages: dict[str, int]
    slots: int
    snapshots: int = 0


def rows(config: ModelConfig, requests: int, tokens: int) -> Rows:
    pages = {g: 1 + requests * columns(config, LAYOUT, g, tokens) for g in group_ratios(config)}
    return Rows(pages, requests + 1)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(golden_dir / "tiny_expected_fp32.pt", weights_only=True)


@pytest.fixture(scope="module")
def artifact(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "tiny-cpu"
    config = Checkpoint(golden_dir / "tiny").config
    options = Options(max_context=1024, max_tokens=1024, max_requests=8)
    compile_artifact(config, Target("cpu"), folder, options, checkpoint=golden_dir / "tiny")
    return folder


@pytest.fixture
def executor(artifact: Path) -> tuple[Manifest, ModelConfig, ArtifactExecutor]:
    source = Checkpoint(artifact / "weights")
    manifest = load_manifest(artifact)
    return manifest, source.config, load(artifact, source, rows(source.config, 2, LENGTH))


def streams_after_layers(manifest: Manifest) -> list[str]:
    """Names of the buffers that hold the streams after the embedding and after each layer."""
    kernels, names = manifest.kernels, []
    for segment in manifest.programs["step"].segments:
        for call in segment.calls:
            op = kernels[call.kernel].op
            entering = op == "hc_post_pre_norm" and call.scope.endswith(".attn")
            if op in ("embed_streams", "hc_post") or entering:
                names.append(str(call.args[len(call.args) - call.outputs]))
    return names


def test_one_shot_prefill_gives_logits_and_streams(executor, golden: dict[str, torch.Tensor]) -> None:
    manifest, config, program = executor
    step = make_step(config, LAYOUT, [(r, 0, golden["ids"][r]) for r in range(2)], LENGTH)
    names = streams_after_layers(manifest)
    assert len(names) == len(golden["streams"])
    logits = manifest.programs["step"].outputs["logits"]
    got = program.run(step, [*names, logits])
    for layer, (name, expected) in enumerate(zip(names, golden["streams"], strict=True)):
        assert (got[name].view_as(expected) - expected).abs().max() < TOLERANCE, f"after {layer} layers"
    assert (got[logits].view_as(golden["logits"]) - golden["logits"]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "cuts", [[0, 150, *range(151, 301)], [0, 37, 100, 101, 256, 300]], ids=["decode", "ragged-chunks"]
)
def test_chunks_give_the_same_logits(executor, golden: dict[str, torch.Tensor], cuts: list[int]) -> None:
    _, config, program = executor
    parts = []
    for start, stop in itertools.pairwise(cuts):
        spans = [(r, start, golden["ids"][r, start:stop]) for r in range(2)]
        parts.append(program.step(make_step(config, LAYOUT, spans, LENGTH)).clone().view(2, stop - start, -1))
    assert (torch.cat(parts, 1) - golden["logits"]).abs().max() < TOLERANCE


def test_mixed_batch_of_different_lengths(executor, golden: dict[str, torch.Tensor]) -> None:
    _, config, program = executor
    ids, got = golden["ids"], torch.zeros_like(golden["logits"])
    plan = [[(0, 0, 40)], [(1, 0, 129), (0, 40, 41)], [(0, 41, 42), (1, 129, 130)], [(1, 130, 300), (0, 42, 260)]]
    for spans in plan:
        logits = program.step(make_step(config, LAYOUT, [(r, a, ids[r, a:b]) for r, a, b in spans], LENGTH))
        row = 0
        for r, a, b in spans:
            got[r, a:b] = logits[row : row + b - a]
            row += b - a
    expected = golden["logits"].clone()
    expected[0, 260:] = 0
    assert (got - expected).abs().max() < TOLERANCE


def test_the_same_inputs_give_the_same_bytes(artifact: Path, golden_dir: Path, tmp_path: Path) -> None:
    config = Checkpoint(golden_dir / "tiny").config
    options = Options(max_context=1024, max_tokens=1024, max_requests=8)
    again = tmp_path / "again"
    compile_artifact(
        config, Target("cpu"), again, options, checkpoint=golden_dir / "tiny", cache=artifact.parent / ".dsv4c-cache"
    )
    assert (again / "manifest.json").read_bytes() == (artifact / "manifest.json").read_bytes()
    assert sorted(f.name for f in (again / "kernels").iterdir()) == sorted(
        f.name for f in (artifact / "kernels").iterdir()
    )
