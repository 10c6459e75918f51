"""Generated pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dsv4c.pipeline import Pipeline
from dsv4c.verifying import Verification

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "name",
    ["passes.md", "schedules.md", "api.md", "numerics.md", "metrics.md", "configuration.md", "grafana.json"],
)
def test_generated_page_is_current(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == module.PAGES[name](), (
        "run `python tools/generate_docs.py`"
    )


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_recorded_numerics_are_of_todays_passes(target: str) -> None:
    """Names and claims; the figures are those of the day they were measured."""
    text = (ROOT / "docs" / "measured" / f"nano-{target}.json").read_text(encoding="utf-8")
    found = Verification.from_json(text)
    passes = Pipeline.default(target).ordered()
    claims = {p.name: "exact" if p.exact else f"to {p.tolerance:.2g}" for p in passes}
    rows = {row.name: row.claim for row in found.rows if row.name not in ("capture", "compiled program")}
    again = f"run `dsv4c verify examples/nano --target {target} --json docs/measured/nano-{target}.json`"
    assert found.ok and rows == claims, again
