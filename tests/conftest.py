"""What every test shares: threads, and the folder of golden data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # One thread a process: pytest-xdist already runs a process a core, and results do not depend on the machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """`../shared/golden`: a tiny checkpoint and its expected float32 results, kept beside the repository."""
    directory = ROOT.parent / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip(f"no golden data: `{directory}` is absent (it lies beside the repository, not in it)")
    return directory
