"""The report of a small model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.compile import Options
from dsv4c.config import FLASH, Target
from dsv4c.report import Load, Measured, Report, render, report_of_model


@pytest.fixture(scope="session")
def report() -> Report:
    """Flash's first five layers for a Hopper GPU: every kind of sublayer, every pass, decode and prefill."""
    config = FLASH.truncated(5)
    options = Options(max_context=16384, max_tokens=256, max_requests=16)
    rows = {"capture": ("0",), "pack-state": ("3.1e-2",), "store-linears": ("0.71",), "compiled program": ("2.0e-6",)}
    said = "0.71 is beyond 0.25"
    measured = Measured(
        what="10 prompts",
        columns=("max rel",),
        rows=rows,
        schedules={("take_rows", "take_rows.triton_rows"): "1.1e-3"},
        broken={"store-linears": said},
        verdict=f"broken: pass `store-linears` {said}",
        notes=("random weights",),
    )
    load = Load(memory_bytes=80 * 10**9, context=8192, requests=4)
    return report_of_model(config, "flash-5", Target("sm_90a"), options, load, measured=measured)


@pytest.fixture(scope="session")
def html(report: Report) -> str:
    return render(report)


@pytest.fixture(scope="session")
def page_file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html, encoding="utf-8")
    return file
