"""Tuning as far as it goes without a card: what is built, in which order, and how rows replace older ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dsv4c import artifact
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.schedules._tuned import Row, read_rows
from dsv4c.schedules.hopper import SCHEDULES
from dsv4c.strictjson import decode
from dsv4c.trial import find_op
from dsv4c.tune import FAMILIES, choices_of, measure, merge_rows, shortlist, tune, workloads_of

ROW = Row(
    op="op", key="[]", symbols={"T": 1}, label="one", schedule="op.a", config={"x": 1}, microseconds=2.0, gb_per_s=1.0,
    tflops=0.0, limit=0.5, error=0.0, hardware="a card", date="2026-11-21",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_workload_has_a_schedule_a_name_of_its_own_and_an_op(family: str) -> None:
    workloads = workloads_of(family)
    assert len({(w.op, w.label) for w in workloads}) == len(workloads)
    for workload in workloads:
        assert find_op(workload.op).name == workload.op
        assert choices_of(workload, SCHEDULES, "sm_90a", 1), f"{workload.op} {workload.label}"
        assert workload.bytes_moved >= 0 and workload.flops >= 0 and workload.purpose


def test_candidates_come_in_the_order_of_the_cost_model_and_every_schedule_keeps_one() -> None:
    workload = next(w for w in workloads_of("linear") if "bench" in w.purpose and "prefill" in w.label)
    choices = choices_of(workload, SCHEDULES, "sm_90a", 12)
    assert [c.seconds for c in choices] == sorted(c.seconds for c in choices)
    short = shortlist(choices, workload, 3)
    assert short[:3] == choices[:3] and {c.schedule for c in short} == {c.schedule for c in choices}
    only_checked = dataclasses.replace(workload, purpose=frozenset({"check"}))
    assert len(shortlist(choices, only_checked, 3)) == len({c.schedule for c in choices})


def test_a_bundle_holds_all_that_the_card_needs(tmp_path: Path) -> None:
    count = tune(
        "sm_90a", families=["rows"], op="quantise_rows", label="nano", build_only=tmp_path / "bundle",
        cache=tmp_path / "cache",
    )  # fmt: skip
    data = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    kernels = decode(dict[str, artifact.Kernel], data["kernels"])
    assert len(data["entries"]) == count > 0
    assert {e["kernel"] for e in data["entries"]} == set(kernels)
    for file, sha in artifact.kernel_files(kernels.values()).items():
        assert artifact.sha256_of(tmp_path / "bundle" / file) == sha


def test_measuring_without_a_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tune(
        "sm_90a", families=["rows"], op="quantise_rows", label="nano decode", build_only=tmp_path / "bundle",
        cache=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="no usable CUDA device"):
        tune("sm_90a", bundle=tmp_path / "bundle", rows=tmp_path / "rows.jsonl")


def test_what_is_no_bundle_and_what_cannot_be_tuned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no bundle"):
        measure(tmp_path, None)
    (tmp_path / "bundle.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no bundle") as error:
        measure(tmp_path, None)
    assert "--build-only" in error.value.hint
    with pytest.raises(ConfigError, match="`cpu` has no tuning space"):
        tune("cpu")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown family `rowz`") as error:
        tune("sm_90a", families=["rowz"])
    assert "rows" in error.value.hint


def test_newer_rows_replace_older_ones_of_the_same_candidate(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    merge_rows(path, [ROW, dataclasses.replace(ROW, config={"x": 2}, microseconds=3.0)])
    merge_rows(path, [dataclasses.replace(ROW, microseconds=1.5)])
    assert sorted(r.microseconds for r in read_rows(path)) == [1.5, 3.0]
