"""`dsv4c verify` and `dsv4c bisect` on the nano artifact: its claims hold, faults of IR and kernels do not pass."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dsv4c.artifact import Call, Program
from dsv4c.bisecting import Side, bisect_lineage, bisect_pair
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.cli import main
from dsv4c.compiled import Compiled
from dsv4c.describe_numerics import bisection_text, verification_table
from dsv4c.errors import ArtifactError
from dsv4c.inputs import Inputs
from dsv4c.lineage import Lineage, of_artifact
from dsv4c.numerics import Runs
from dsv4c.opened import Artifact, load
from dsv4c.runtime.kernels import Kernels, Run
from dsv4c.verifying import Case, Verification, verify_lineage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artifact(nano_artifact: Path) -> Artifact:
    return load(nano_artifact)


@pytest.fixture(scope="module")
def lineage(artifact: Artifact) -> Lineage:
    return of_artifact(artifact)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("The compiler says which pass changed which bit.\n\nA second line, of its own.\n", encoding="utf-8")
    return file


def runs(nano_dir: Path, seed: int = 0) -> Runs:
    """Two short requests of random tokens, on nano's weights."""
    source = Checkpoint(nano_dir)
    draw = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(source.config.vocab_size, (n,), generator=draw) for n in (40, 9))
    return Runs(Inputs(ids, source))


class Spoilt:
    """The artifact's kernels; what those of one op give in one scope is 1 % too large."""

    def __init__(self, artifact: Artifact, op: str, scope: str) -> None:
        self.kernels = Kernels(artifact.manifest.kernels, artifact.directory)
        self.names = {name for name, kernel in artifact.manifest.kernels.items() if kernel.op == op}
        self.scope = scope

    def bind_calls(self, program: Program, calls: Sequence[Call], values: Mapping[str, Tensor]) -> list[Run]:
        runs: list[Run] = []
        for call in calls:
            runs += self.kernels.bind_calls(program, [call], values)
            if call.kernel in self.names and call.scope == self.scope:
                result = values[str(call.args[-1])]
                runs.append(lambda result=result: result.mul_(1.01))  # type: ignore[misc]
        return [lambda: [run() for run in runs]]


def test_every_claim_of_the_nano_artifact_holds(
    nano_artifact: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert main(["verify", str(nano_artifact), "--inputs", str(prompts), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "every claim holds" in shown and "fuse-linears" in shown and "compiled program" in shown
    found = Verification.from_json(file.read_text(encoding="utf-8"))
    assert found.ok and found.model == str(nano_artifact) and found.target == "cpu"
    names = [row.name for row in found.rows]
    assert names[0] == "capture" and names[-1] == "compiled program" and "quantise" in names
    assert all(row.bits_per_byte and 0.5 < row.bits_per_byte < 6 for row in found.rows)
    assert all(row.check.equal for row in found.rows if row.claim == "exact")
    assert {row.op for row in found.schedules} >= {"attend_csa", "experts", "hc_post_pre_norm", "linear"}
    assert all(row.error <= row.tolerance for row in found.schedules)


def test_the_quantise_pass_reports_what_it_costs(nano_artifact: Path, lineage: Lineage, nano_dir: Path) -> None:
    """Nothing, where weights are stored as the checkpoint stores them: each widens to the value that it stands for."""
    asked = runs(nano_dir)
    of_text = Inputs(asked.inputs.ids, asked.inputs.source, text_bytes=100)
    found = verify_lineage(lineage, [Case("text", Runs(of_text))])
    rows = {row.name: row for row in found.rows}
    before = rows["fuse-norm-rope-write"]
    assert rows["quantise"].check.equal and rows["quantise"].kl == before.kl < 1e-9
    assert rows["quantise"].bits_per_byte == before.bits_per_byte


def test_a_kernel_beyond_its_tolerance_is_caught_and_named(
    artifact: Artifact, lineage: Lineage, nano_dir: Path
) -> None:
    spoilt = Compiled(artifact.directory, artifact.manifest, Spoilt(artifact, "attend_hca", "L04.attn"))
    found = verify_lineage(lineage[-1:], [Case("random", runs(nano_dir))], compiled=spoilt)
    assert [row.op for row in found.broken if hasattr(row, "op")] == ["attend_hca"]
    asked = runs(nano_dir)
    named = bisect_lineage(lineage, asked, compiled=spoilt)
    assert (named.kind, named.op) == ("schedule", "`dsv4.attend_hca` in `L04.attn`"), named
    assert named.cause.startswith("attend_hca.") and set(named.kept) == {"fuse-linears"}
    assert named.runs == asked.count + 1 < 20


def test_two_artifacts_part_at_the_kernel_that_differs(artifact: Artifact, lineage: Lineage, nano_dir: Path) -> None:
    right = Side("right", lineage, runs(nano_dir), Compiled(artifact.directory, artifact.manifest))
    binder = Spoilt(artifact, "linear", "L02.ffn")
    wrong = Side("wrong", lineage, runs(nano_dir), Compiled(artifact.directory, artifact.manifest, binder))
    found = bisect_pair(right, wrong)
    assert (found.kind, found.op) == ("schedule", "`dsv4.linear` in `L02.ffn`"), found
    assert found.runs == 4
    assert bisect_pair(right, Side("same", lineage, runs(nano_dir), right.compiled)).ok


@pytest.fixture(scope="module")
def spoilt_artifact(nano_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano artifact, as if its pass `raise-moe` had written another routing scale."""
    folder = tmp_path_factory.mktemp("spoilt") / "artifact"
    shutil.copytree(nano_artifact, folder)
    stages = load(folder).stages.stages
    begin = [stage.name for stage in stages].index("raise-moe")
    for file in {stage.file for stage in stages[begin:]}:
        text = (folder / file).read_text(encoding="utf-8")
        assert "scaling=1.5" in text
        (folder / file).write_text(text.replace("scaling=1.5", "scaling=2.0"), encoding="utf-8")
    return folder


def test_a_broken_claim_is_exit_code_1(
    spoilt_artifact: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(spoilt_artifact), "--inputs", str(prompts)]) == 1
    assert "broken: pass `raise-moe` claims to be exact" in " ".join(capsys.readouterr().out.split())


def test_bisect_names_pass_op_and_schedule(
    spoilt_artifact: Path, nano_artifact: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--inputs", str(prompts), "--json", str(tmp_path / "found.json")]
    assert main(["bisect", str(spoilt_artifact), *asked]) == 1
    shown = capsys.readouterr().out
    assert "first pass: raise-moe" in shown and "first op: `dsv4.gate_hash` in `L00.ffn`" in shown
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["schedule"] == "gate_hash.cpp_scan" and found["runs"] < 12
    assert main(["bisect", str(nano_artifact), str(spoilt_artifact), *asked]) == 1
    shown = capsys.readouterr().out
    assert "first pass: raise-moe" in shown and "first op: `dsv4.gate_hash` in `L00.ffn`" in shown


def test_bisect_blames_nothing_in_the_nano_artifact(artifact: Artifact, lineage: Lineage, nano_dir: Path) -> None:
    found = bisect_lineage(lineage, runs(nano_dir), compiled=Compiled(artifact.directory, artifact.manifest))
    assert found.ok and found.kept == ("fuse-linears",) and 0 < found.observed.max_rel < 1e-4
    assert "nothing to blame" in bisection_text(found) and "differs as claimed: fuse-linears" in bisection_text(found)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "ir"), "has no `ir/passes.json`"),
        (lambda folder: next((folder / "ir").glob("*raise-moe.txt")).unlink(), "raise-moe.txt`"),
        (
            lambda folder: next((folder / "ir").glob("*quantise.txt")).write_text("nothing"),
            "holds no graph of a program",
        ),
        (lambda folder: (folder / "ir" / "passes.json").write_text("{"), "cannot read"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_an_artifact_without_its_ir_is_refused(
    nano_artifact: Path, prompts: Path, tmp_path: Path, command: str, damage: Damage, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "artifact"
    shutil.copytree(nano_artifact, folder)
    damage(folder)
    assert main([command, str(folder), "--inputs", str(prompts)]) == 2
    error = capsys.readouterr().err
    assert said in error and "compile the artifact again" in error


def test_stages_of_other_passes_than_the_manifests_are_refused(nano_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(nano_artifact, folder)
    file = folder / "ir" / "passes.json"
    file.write_text(file.read_text(encoding="utf-8").replace("fuse-linears", "fuse-lines"), encoding="utf-8")
    for old in (folder / "ir").glob("*fuse-linears.txt"):
        old.rename(old.with_name(old.name.replace("linears", "lines")))
    with pytest.raises(ArtifactError, match="holds other passes than the manifest lists"):
        of_artifact(load(folder))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere/at/all"], "does not exist"),
        (["nanno"], "nano"),
        (["{nano}", "--inputs", "nowhere.txt"], "cannot read `nowhere.txt`"),
        (["{nano}", "--inputs", "{empty}"], "holds no prompt"),
        (["{nano}", "--inputs", "{binary}"], "is not UTF-8 at byte 0"),
        (["nano", "--inputs", "{prompts}", "--passes-only"], "prompts need weights"),
        (["{artifact}", "--target", "cpu"], "`--target` is for models"),
        (["{artifact}", "--weights", "nowhere"], "nowhere"),
        (["{nano}", "--weights", "{nano}"], "`--weights` is for artifacts"),
        (["{nano}", "--target", "sm_9"], "sm_9"),
        (["flash"], "GB in float32"),
        (["{artifact}", "--max-tokens", "0"], "--max-tokens"),
        (["{artifact}", "--inputs", "{many}"], "the artifact was compiled for 64"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_bad_input_is_exit_code_2(
    nano_dir: Path, nano_artifact: Path, prompts: Path, tmp_path: Path, command: str, given: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"nano": nano_dir, "artifact": nano_artifact, "prompts": prompts}
    for name, content in (("empty", b"\n \n"), ("binary", b"\xff\xfe\x00"), ("many", b"A few words.\n" * 80)):
        places[name] = tmp_path / name
        places[name].write_bytes(content)
    assert main([command, *(part.format(**places) for part in given)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "hint: " in shown.err and not shown.out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_the_tables_fit_a_terminal(target: str, width: int) -> None:
    file = ROOT / "docs" / "measured" / f"nano-{target}.json"
    out = io.StringIO()
    Console(file=out, width=width).print(verification_table(Verification.from_json(file.read_text(encoding="utf-8"))))
    shown = out.getvalue()
    assert "\u2026" not in shown and all(name in shown for name in ("fuse-norm-rope-write", "bit-equal", "every claim"))
    assert shown.count("fuse-hc-norm") == (2 if width == 80 else 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}'])
def test_a_file_that_verify_did_not_write_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        Verification.from_json(text)


def test_a_report_that_cannot_be_written_is_exit_code_2(
    nano_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "missing" / "found.json", tmp_path):
        for command in ("verify", "bisect"):
            assert main([command, str(nano_artifact), "--json", str(file)]) == 2
            assert "cannot write" in capsys.readouterr().err
