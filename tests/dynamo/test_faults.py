"""Workers that die or leave while they serve: the client hears the same answer, survivors hold nothing.

`python -m tests.dynamo.faults ARTIFACT` injects more faults at more moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("dynamo._core", reason="NVIDIA Dynamo is not installed: `make test-dynamo` installs it")
pytest.importorskip("nixl_cu12", reason="NIXL is not installed: `make test-dynamo` installs it")

from tests.dynamo.faults import FAULTS, Scene

QUICK = ("decode worker SIGKILL", "prefill worker SIGKILL", "decode worker SIGTERM", "another client gone")


@pytest.fixture(scope="module")
def scene(artifact: Path) -> Iterator[Scene]:
    with Scene(artifact, "completed").open() as opened:
        yield opened


@pytest.mark.parametrize("name", QUICK)
def test_the_client_hears_the_same(scene: Scene, name: str) -> None:
    role, fault = FAULTS[name]
    found = scene.meet(fault, role, 2)
    assert not found.wrong and not found.errors and found.same == 2
