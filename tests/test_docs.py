"""Generated pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["passes.md", "schedules.md", "api.md"])
def test_generated_page_is_current(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == module.PAGES[name](), (
        "run `python tools/generate_docs.py`"
    )
