"""Fixtures that several areas share."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden files beside the checkout; tests that need it are skipped where it is absent."""
    if not (GOLDEN / "tiny" / "config.json").is_file():
        pytest.skip("no golden files: the folder ../shared/golden beside the checkout is absent")
    return GOLDEN
