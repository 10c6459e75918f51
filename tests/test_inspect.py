"""`dsv4c inspect` and `dsv4c explain`, as a user types them: what they print, and what they refuse with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import dsv4c
from dsv4c.artifact import load_manifest, save_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.cli import main
from dsv4c.compare import differences
from dsv4c.compile import Options, lower, plan_artifact, planned_manifest
from dsv4c.config import Target
from dsv4c.describe_calls import segment_ends
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.irfiles import PASSES, PROVENANCE, StageWriter
from dsv4c.opened import Artifact, load
from dsv4c.places import locate

PASS = "fuse-hc-norm"


@pytest.fixture(scope="module")
def gpu_artifact(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for a GPU, planned for small steps, with no kernel behind it: nothing here runs one."""
    folder = tmp_path_factory.mktemp("nano") / "nano-gpu"
    config, target = Checkpoint(nano_dir).config, Target("sm_90a")
    options = Options(max_tokens=64, max_requests=4)
    stages = StageWriter(folder)
    program = lower(config, options, stages.watch, target.arch)
    stages.finish(plan_artifact(program, target, options).sources)
    save_manifest(planned_manifest(program, target, options), folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


# --- the passes of a model and of an artifact ------------------------------------------------------------------


def test_a_model_and_its_artifact_show_the_same_passes(
    nano_dir: Path, nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = said(capsys, "inspect", nano_dir, "--pass", PASS, "--diff")
    assert model == said(capsys, "inspect", nano_artifact, "--pass", PASS, "--diff")
    assert "fuse-hc-norm  mHC's mixing and the norm that follows it become one op" in model
    assert "needs stitched; gives hc-norm-fused" in model and "14 rewrites, 268 to 254 nodes" in model
    assert "dsv4.hc_pre_norm       0     14" in model
    assert "\n-  %9 = dsv4.hc_pre(%8, " in model and "\n+  %9 = dsv4.hc_pre_norm(%8, " in model
    assert not [line for line in model.splitlines() if line.startswith(("-", "+")) and "swiglu" in line]


def test_every_pass_has_a_row_with_its_work(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", nano_artifact, "--stop-after", "stitch", "--dump-ir", nano_artifact.parent / "dump")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["pass", "rewrites", "nodes", "kernels"]
    assert [row[0] for row in rows[1:4]] == ["capture", "canonicalize", "raise-attention"]
    assert rows[16][0] == "stitch" and rows[16][1:4] == ["20", "270", "229"]
    assert "64 tokens of 64 requests with 4,096 tokens each" in out
    dumped = sorted(file.name for file in (nano_artifact.parent / "dump").iterdir())
    assert dumped[:2] == ["00-capture.txt", "01-canonicalize.txt"] and dumped[-1] == "15-stitch.txt"
    assert "13-raise-quant.txt" not in dumped, "it changed nothing"


def test_stop_after_prints_the_program_there(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", nano_artifact, "--stop-after", PASS)
    text = (nano_artifact / "ir" / "17-fuse-hc-norm.txt").read_text(encoding="utf-8")
    assert out.endswith(text) and "fuse-linears" not in out


def test_a_small_model_of_any_target_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", "nano", "--num-layers", "1", "--target", "sm_90a")
    assert "no: KV entries are rounded to FP8" in out and "append-sampling" in out and "one H200" in out


def test_an_artifact_alone_is_its_manifest_in_words(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "longest context" in said(capsys, "inspect", nano_artifact)


def test_bad_input_is_exit_code_2_and_a_hint(
    nano_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for args, message in (
        (("nano", "--pass", "fuse-hc-nrom"), "unknown pass `fuse-hc-nrom`\nhint: did you mean `fuse-hc-norm`?"),
        ((nano_artifact, "--pass", "fuse-hc-nrom"), "no pass `fuse-hc-nrom` made"),
        ((nano_artifact, "--stop-after", "stich"), "did you mean `stitch`?"),
        ((nano_artifact, "--pass", "stitch", "--stop-after", "raise-rope"), "`stitch` runs behind `raise-rope`"),
        ((nano_artifact, "--dump-ir", file), f"cannot write to `{file}`: File exists"),
        (("nano", "--dump-ir", file), f"cannot write to `{file}`: File exists"),
        (("nano", "--report", file / "out.html"), f"cannot write the report to `{file / 'out.html'}`"),
        ((nano_artifact, "--target", "cpu"), "is an artifact: its target and layers are given"),
        ((nano_artifact, nano_artifact, "--diff"), "two artifacts are compared as they are"),
        ((nano_artifact, "nano"), "`nano` is not an artifact"),
        (("nanoo",), "did you mean `nano`?"),
        ((tmp_path,), "is not a checkpoint: it has no config.json"),
        (("nano", "--target", "sm_90"), "did you mean `sm_90a`?"),
    ):
        assert message in refused(capsys, "inspect", *args)


def test_an_artifact_without_ir_says_so(
    nano_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(nano_artifact, bare, ignore=shutil.ignore_patterns("ir", "weights"))
    for args in (("inspect", bare, "--diff"), ("explain", bare, "L00")):
        assert "it was compiled by an earlier dsv4c, or its IR was removed" in refused(capsys, *args)
    assert "longest context" in said(capsys, "inspect", bare)


# --- every kernel of a layer -----------------------------------------------------------------------------------


def test_explain_says_everything_of_a_kernel(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "explain", nano_artifact, "L02")
    assert out.startswith("L02: hca attention (ratio 128), bias gate, ")
    block = out[out.index("  hc_post_pre_norm  L02.attn") :].split("\n\n")[0]
    line = "x, post, comb = self.attn_hc_pre(x_TND, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)"
    assert f"Block.attention  {line}" in block and "Block.feed_forward  out: Tensor = self.ffn_hc_post(" in block
    assert "passes    raise-hyper, raise-norm, stitch, fuse-hc-norm, fuse-hc-post-pre" in block
    assert "schedule  hc_post_pre_norm.cpp_" in block and "segment   0 (graph)" in block
    assert "weights   layers.2.hc_attn_fn" in block
    assert "every call can be captured  the program ends" in out
    assert "results are read by call" in out and "(L03.attn)" in out
    only = said(capsys, "explain", nano_artifact, "L02.ffn")
    assert "L02.attn" not in only and "moe.py:" in only


def test_explain_of_a_gpu_names_lanes_and_passes(gpu_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "explain", gpu_artifact, "L01.attn", "--program", "decode.4")
    assert "of program `decode.4`, target sm_90a" in out
    assert "pack-state" in out and ", lane 1, waits for " in out
    sampling = said(capsys, "explain", gpu_artifact, "sampling")
    assert "model     pass append-sampling" in sampling


def test_explain_refuses_with_the_nearest(
    nano_artifact: Path, gpu_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean `L01`? there are prelude, embed, L00 to L05, head" in refused(
        capsys, "explain", nano_artifact, "L1"
    )
    assert "did you mean `L02.attn`?" in refused(capsys, "explain", nano_artifact, "l02.atn")
    assert "has no calls in `L43`" in refused(capsys, "explain", nano_artifact, "L43")
    wrong = refused(capsys, "explain", gpu_artifact, "L01", "--program", "decode.5")
    assert "has no program `decode.5`\nhint: did you mean `decode.4`?" in wrong
    assert "is not an artifact" in refused(capsys, "explain", nano_artifact / "nowhere", "L01")


# --- two artifacts ---------------------------------------------------------------------------------------------


def test_an_artifact_is_the_same_as_itself(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "are the same: model, passes, kernels" in said(capsys, "inspect", nano_artifact, nano_artifact)


def test_what_differs_is_named(nano_artifact: Path, gpu_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", nano_artifact, gpu_artifact)
    for text in ("fuse-stored-linears", "does not run", "first after `fuse-norm-rope-write`", "decode.1", "uint8[104]"):
        assert text in out
    found = differences(load(nano_artifact), load(gpu_artifact))
    kinds = list(dict.fromkeys(one.kind for one in found))
    assert kinds == ["target", "made with", "pass", "program", "plan", "state", "weights", "numerics"] or kinds == [
        "target", "pass", "program", "plan", "state", "weights", "numerics",
    ]  # fmt: skip


def test_another_schedule_and_another_plan_are_named(gpu_artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(gpu_artifact, other)
    manifest = load_manifest(other)
    name, kernel = next((k, v) for k, v in manifest.kernels.items() if v.op == "swiglu_quantise")
    kernels = {**manifest.kernels, name: dataclasses.replace(kernel, schedule="swiglu_quantise.mine", tolerance=0.5)}
    program = manifest.programs["decode.1"]
    programs = {**manifest.programs, "decode.1": dataclasses.replace(program, arena_bytes=1)}
    save_manifest(dataclasses.replace(manifest, kernels=kernels, programs=programs), other)
    found = {(one.kind, one.what): (one.a, one.b) for one in differences(load(gpu_artifact), load(other))}
    ((what, pair),) = ((what, pair) for (kind, what), pair in found.items() if kind == "kernel")
    assert what.startswith("swiglu_quantise: ") and "calls, first L00.ffn of `decode.1`" in what
    assert pair[1] == "swiglu_quantise.mine (tolerance 0.5)"
    assert found["plan", "arena of `decode.1`"] == (f"{program.arena_bytes:,} bytes", "1 bytes")
    assert len(found) == 2


# --- an artifact as a value ------------------------------------------------------------------------------------


def test_a_program_is_found_by_name_or_phase(nano_artifact: Path, gpu_artifact: Path) -> None:
    cpu, gpu = dsv4c.load(nano_artifact), dsv4c.load(str(gpu_artifact))
    assert cpu.programs == ("step",)
    assert cpu.program("decode").name == cpu.program("prefill").name == cpu.program("step").name == "step"
    assert gpu.program("decode").name == "decode.4" and gpu.program("decode.2").name == "decode.2"
    assert gpu.program("prefill").name.startswith("prefill.64.")
    with pytest.raises(ConfigError, match="no program `mtp`"):
        gpu.program("mtp")


def test_every_call_knows_its_place_kernel_and_source(nano_artifact: Path, gpu_artifact: Path) -> None:
    for folder in (nano_artifact, gpu_artifact):
        artifact = load(folder)
        records = [record.name for record in artifact.manifest.passes]
        for name in artifact.programs:
            program = artifact.program(name)
            assert [c.call for c in program.calls] == [c for s in program.segments for c in s.calls]
            for call in program.calls:
                assert call.index == program.calls.index(call) and call.kernel.name == call.call.kernel
                assert call.origin and call.passes and set(call.passes) <= set(records)
                assert all(locate(place).line for place in call.origin if not place.startswith("pass "))
                assert (*call.reads, *call.writes) == tuple(a for a in call.call.args if isinstance(a, str))
        layers = {call.scope for call in program.in_scope("L0?.ffn")}
        assert layers == {f"L0{i}.ffn" for i in range(6)}


def test_stages_are_what_the_passes_left(nano_artifact: Path) -> None:
    artifact = load(nano_artifact)
    stages = artifact.stages.stages
    assert [s.name for s in stages] == ["capture", *(r.name for r in artifact.manifest.passes)]
    assert [s.nodes for s in stages[1:]] == [r.nodes_after for r in artifact.manifest.passes]
    assert artifact.text(stages[-1]) == (nano_artifact / "ir" / "step.txt").read_text(encoding="utf-8").rstrip("\n")
    assert "stitched" in stages[-1].facts and not stages[0].facts
    assert stages[-1].kernels == len(artifact.program("step").calls)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PASSES, lambda data: data["stages"][0].pop("nodes"), "`stages.*nodes` is missing"),
        (PASSES, lambda data: data["stages"][3].update(file="ir/none.txt"), "has no `ir/none.txt`"),
        (PROVENANCE, lambda data: data["programs"]["step"].pop(), "does not fit the 131 calls of `step`"),
        (PROVENANCE, lambda data: data["sources"].clear(), "does not fit the 131 calls"),
        (PROVENANCE, lambda data: data.update(extra=1), "unknown key `extra`"),
    ],
)
def test_damaged_ir_is_an_error_that_names_the_file(
    nano_artifact: Path, tmp_path: Path, name: str, change: object, message: str
) -> None:
    shutil.copytree(nano_artifact, tmp_path / "copy", ignore=shutil.ignore_patterns("weights"))
    file = tmp_path / "copy" / name
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)  # type: ignore[operator]
    file.write_text(json.dumps(data), encoding="utf-8")
    artifact = load(tmp_path / "copy")
    with pytest.raises(ArtifactError, match=message):
        _ = artifact.stages if name == PASSES else artifact.provenance


def test_why_a_segment_ends(gpu_artifact: Path) -> None:
    artifact = load(gpu_artifact)
    program = artifact.program("decode.1")
    assert segment_ends(program) == ["the program ends"]
    (whole,) = program.segments
    cut = [
        dataclasses.replace(whole, calls=whole.calls[:5]),
        dataclasses.replace(whole, kind="eager", calls=whole.calls[5:6], why="`x` cannot be captured"),
        dataclasses.replace(whole, calls=whole.calls[6:]),
    ]
    broken = dataclasses.replace(artifact.manifest.programs["decode.1"], segments=tuple(cut))
    manifest = dataclasses.replace(artifact.manifest, programs={"decode.1": broken})
    ends = segment_ends(Artifact(gpu_artifact, manifest).program("decode.1"))
    fifth, sixth = (f"call {c.index}, `{c.op}` in `{c.scope}`" for c in program.calls[5:7])
    assert ends == [
        f"{fifth}, is eager: `x` cannot be captured", f"{sixth}, can be captured in a graph again", "the program ends",
    ]  # fmt: skip


def test_places_are_found_where_the_model_has_them(tmp_path: Path) -> None:
    found = locate("moe.py:MoE.forward `logits = self.gate(x_TD)`")
    assert found.file is not None and found.line is not None and found.where == f"moe.py:{found.line}"
    assert found.file.read_text(encoding="utf-8").splitlines()[found.line - 1].strip() == "logits = self.gate(x_TD)"
    gone = locate("moe.py:MoE.forward `logits = self.other(x_TD)`")
    assert (gone.line, gone.where, gone.text) == (None, "moe.py", "logits = self.other(x_TD)")
    assert locate("pass append-sampling").where == ""
    assert locate("own.py:f `x = 1`", tmp_path).where == "own.py"
    (tmp_path / "own.py").write_text("def f():\n    def g():\n        x = 1\n", encoding="utf-8")
    assert locate("own.py:f.<locals>.g `x = 1`", tmp_path).where == "own.py:3"
