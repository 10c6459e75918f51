"""What several files share: servers (a toy one, and the bundled nano model), and nano's weights as for Hopper."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.compile import Options, lower, plan_artifact
from dsv4c.config import ModelConfig, Target
from dsv4c.launch import LaunchOptions, launch
from dsv4c.runtime.grammar import Grammars
from tests.runtime.devices import Planned
from tests.runtime.live import Live, start, start_toy


@pytest.fixture(scope="session")
def toy_server() -> Iterator[Live]:
    """The stand-in behind real HTTP."""
    live, _ = start_toy()
    yield live
    live.close()


@pytest.fixture(scope="session")
def nano_server(nano_artifact: Path) -> Iterator[Live]:
    """The compiled nano model behind real HTTP."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    launched = launch(nano_artifact, LaunchOptions(kv_memory_bytes=200_000_000))
    live = start(launched.engine, launched.codec, launched.model_name, grammars=Grammars(launched.codec))
    yield live
    live.close()


@pytest.fixture(scope="session")
def hopper_manifest(nano_artifact: Path) -> Manifest:
    """What loading needs of a manifest of nano for Hopper: its weights. Planned, without kernels."""
    manifest = load_manifest(nano_artifact)
    config, options = ModelConfig.from_dict(manifest.model), Options(max_tokens=1, max_requests=1)
    plan = plan_artifact(lower(config, options, arch="sm_90a"), Target("sm_90a"), options)
    weights = tuple(plan.weights[name] for name in sorted(plan.weights))
    return dataclasses.replace(manifest, target="sm_90a", weights=weights)


@pytest.fixture(scope="session")
def nano_planned(nano_dir: Path) -> Planned:
    """The nano model planned for a card, to be run by references."""
    return Planned.of(nano_dir)
