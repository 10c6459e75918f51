"""Reports of artifacts, files that cannot be written, artifacts without IR, and the command line."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from dsv4c import cli
from dsv4c.artifact import PassRecord, load_manifest, save_manifest
from dsv4c.compile import Options, lower, manifest_of_plan, plan_artifact
from dsv4c.config import ModelConfig, Target
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.irfiles import StageWriter
from dsv4c.opened import Artifact, load
from dsv4c.pipeline import Pipeline
from dsv4c.report import Load, Report, render, report_file, report_of_artifact
from dsv4c.report.segmented import program_rows

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8,
    q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, compress_ratios=(0,), index_n_heads=16,
    index_head_dim=16, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    num_hash_layers=0, routed_scaling_factor=1.5, max_position_embeddings=512,
)  # fmt: skip
"""One window layer: quickly captured."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without kernels: the plan of a model, and its IR."""
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    return planned(folder, Pipeline.default("cpu"))


def planned(folder: Path, pipeline: Pipeline) -> Path:
    """Writes what the passes of `pipeline` and the planner make of the model."""
    target, options = Target("cpu"), Options(max_context=256, max_tokens=32, max_requests=4)
    stages = StageWriter(folder)
    program = lower(CONFIG, options, stages.watch, pipeline=pipeline)
    made = plan_artifact(program, target, options)
    stages.finish(made.sources)
    save_manifest(manifest_of_plan(program, made, target, options), folder)
    return folder


@pytest.fixture(scope="module")
def of_artifact(artifact: Path) -> Report:
    return report_of_artifact(artifact, Load(memory_bytes=8 * 10**9))


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """The artifact, to spoil."""
    return Path(shutil.copytree(artifact, tmp_path / "tiny"))


def test_an_artifact_is_reported_as_its_manifest_has_it(of_artifact: Report) -> None:
    assert of_artifact.target == "cpu" and [p.name for p in of_artifact.programs] == ["step"]
    assert of_artifact.name == "tiny" and of_artifact.max_context == 256
    page = render(of_artifact)
    assert "dsv4.attend_window" in page and "fuse-linears" in page


def test_segments_break_where_the_manifest_says(copied: Path) -> None:
    manifest = load_manifest(copied)
    program = manifest.programs["step"]
    (only,) = program.segments
    first, second = only.calls[:7], only.calls[7:]
    eager = dataclasses.replace(only, kind="eager", calls=second, why="`own` cannot be captured")
    cut = dataclasses.replace(program, segments=(dataclasses.replace(only, calls=first), eager))
    save_manifest(dataclasses.replace(manifest, programs={"step": cut}), copied)
    (row,) = report_of_artifact(copied, Load(memory_bytes=8 * 10**9)).programs
    assert [(s.kind, s.calls, s.why) for s in row.segments] == [
        ("graph", 7, ""),
        ("eager", len(second), "`own` cannot be captured"),
    ]
    assert row.segments[0].ends.endswith("is eager: `own` cannot be captured")
    assert [c.number for lane in row.rows for c in lane.cells if c.breaks] == [7]


def test_programs_are_in_the_order_of_their_tokens(copied: Path) -> None:
    """A manifest has them by name."""
    manifest = load_manifest(copied)
    one = manifest.programs["step"]
    sizes = {"step.128": 128, "step.32": 32, "step.64": 64}
    programs = {name: dataclasses.replace(one, symbols={**one.symbols, "T": size}) for name, size in sizes.items()}
    opened = Artifact(copied, dataclasses.replace(manifest, programs=programs))
    rows = program_rows(opened, dict.fromkeys(programs, load(copied).provenance["step"]))
    assert [row.name for row in rows] == ["step.32", "step.64", "step.128"]


def test_an_artifact_without_a_pass_is_reported_without_it(tmp_path: Path) -> None:
    planned(tmp_path, Pipeline.default("cpu").without("fuse-hc-norm").without("fuse-hc-post-pre"))
    names = [stage.name for stage in report_of_artifact(tmp_path, Load(memory_bytes=8 * 10**9)).stages]
    assert "fuse-hc-head-norm" in names and "fuse-hc-norm" not in names


def test_an_artifact_of_passes_that_are_not_ours(copied: Path) -> None:
    manifest = load_manifest(copied)
    own = PassRecord("my-pass", 1, 10, 9, True)
    save_manifest(dataclasses.replace(manifest, passes=(*manifest.passes, own)), copied)
    with pytest.raises(ArtifactError, match="passes that are none of dsv4c's: `my-pass`"):
        report_of_artifact(copied)


def test_an_artifact_without_ir(copied: Path) -> None:
    shutil.rmtree(copied / "ir")
    with pytest.raises(ArtifactError, match=r"has no IR: cannot read `ir/step.txt`") as caught:
        report_of_artifact(copied)
    assert caught.value.exit_code == 2 and "compile it again" in caught.value.hint


def test_an_artifact_with_another_ir(copied: Path) -> None:
    file = copied / "ir" / "step.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("dsv4.swiglu", "dsv4.swiglu_else"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="is not what this dsv4c makes of its model"):
        report_of_artifact(copied)


@pytest.mark.parametrize(("context", "requests"), [(1 << 30, None), (None, 1 << 20)])
def test_a_load_that_the_artifact_does_not_take(artifact: Path, context: int | None, requests: int | None) -> None:
    with pytest.raises(ConfigError, match="are asked for, the artifact was compiled for 1 to"):
        report_of_artifact(artifact, Load(8 * 10**9, context, requests))


def test_a_path_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the report") as caught, report_file(tmp_path / "no" / "x.html"):
        pytest.fail("the block must not begin")
    assert caught.value.exit_code == 2


def test_a_path_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder"), report_file(tmp_path):
        pytest.fail("the block must not begin")


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), report_file(path) as file:
        file.write("new")
        1 / 0  # noqa: B018
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]
    with report_file(path) as file:
        file.write("new")
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]


def test_the_command_line_writes_a_report(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    load = ["--memory", "8GB", "--context", "128", "--requests", "2"]
    assert cli.main(["inspect", str(artifact), "--report", str(out), *load]) == 0
    assert f"wrote {out}" in capsys.readouterr().err
    assert "<title>tiny on cpu" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report", "no/such/folder/x.html"], "cannot write the report"),
        (["--report", "x.html", "--diff"], "`--report` writes all of it"),
        (["--report", "x.html", "--memory", "lots"], "is no size of memory"),
        (["--report", "x.html", "--context", "9999"], "9999 tokens of context are asked for"),
        (["--context", "8K"], "`--context` is for a report"),
    ],
)
def test_the_command_line_refuses(
    artifact: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact.parent)
    assert cli.main(["inspect", str(artifact), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (artifact.parent / "x.html").exists()


def test_the_command_line_refuses_an_artifact_without_ir(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "ir")
    assert cli.main(["inspect", str(copied), "--report", str(copied / "x.html"), "--memory", "8GB"]) == 2
    assert "has no IR" in capsys.readouterr().err
