"""What `dsv4c verify` wrote, in the report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dsv4c.apart import Difference
from dsv4c.errors import ConfigError
from dsv4c.numerics import Check
from dsv4c.report import read_measured
from dsv4c.verifying import Row, ScheduleRow, Verification

FAR = Check(
    equal=False,
    results=(Difference("logits", 0.5, 0.02, 0.999), Difference("streams", 0.1, 0.01, 0.999)),
    equal_inputs=0.7,
    kl=0.003,
    greedy=0.97,
)  # fmt: skip
FOUND = Verification(
    "nano",
    "cpu",
    ("text: 2 requests, 285 tokens of text (1,034 bytes)",),
    (
        Row("capture", "exact", True, Check(equal=True), 0.0, 1.0, 1.25),
        Row("canonicalize", "exact", False, Check(equal=True), 0.0, 1.0, 1.25),
        Row("fuse-linears", "to 1e-06", True, FAR, 0.003, 0.97, 1.26, broken="0.7 is beyond 1e-06"),
        Row("compiled program", "each schedule its own", True, FAR, math.inf, 0.97, 1.26),
    ),
    (ScheduleRow("rope", "rope.cpp_rows", 2e-7, 1e-5),),
    ("seed 0",),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "verified.json"
    path.write_text(FOUND.to_json(), encoding="utf-8")
    return path


def test_a_verification_becomes_texts(file: Path) -> None:
    found = read_measured(file, "cpu")
    assert all(len(row) == len(found.columns) for row in found.rows.values())
    rows = {name: dict(zip(found.columns, row, strict=True)) for name, row in found.rows.items()}
    assert rows["capture"]["on equal inputs"] == "bit-equal" and rows["canonicalize"]["on equal inputs"] == "unchanged"
    assert rows["fuse-linears"]["logits"] == "0.020" and rows["fuse-linears"]["bits a byte"] == "1.2600"
    assert found.broken == {"fuse-linears": "0.7 is beyond 1e-06"} and found.verdict.startswith("broken: ")
    assert found.schedules == {("rope", "rope.cpp_rows"): "2.0e-07"}
    assert found.around(["canonicalize", "fuse-linears"]) == (["capture"], ["compiled program"])


def test_a_verification_of_another_target(file: Path) -> None:
    with pytest.raises(ConfigError, match="is of passes for cpu, the report is of sm_90a"):
        read_measured(file, "sm_90a")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 1}'])
def test_a_file_that_is_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not what `dsv4c verify --json` writes"):
        read_measured(path, "cpu")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read") as caught:
        read_measured(tmp_path / "no.json", "cpu")
    assert caught.value.exit_code == 2
