"""The bundled model in NVFP4, from checkpoint to tokens, beside a model whose weights this test widens itself."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.cli import main
from dsv4c.compile import Options, compile_artifact, lower, plan_artifact
from dsv4c.config import NANO, StateLayout, Target
from dsv4c.errors import ArtifactError, CheckpointError, PassError, ScheduleError
from dsv4c.interpret import greedy_sampling, program_state, program_weights, read_weights, run
from dsv4c.launch import LaunchOptions, launch
from dsv4c.model import Transformer, init_state, make_step
from dsv4c.ops import Op
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.program import Program
from dsv4c.runtime.weights import load_weights
from tests.nvfp4 import GRID, convert, unpacked, value_of

from .test_compiled_nano import CHUNK, generate, make_engine

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = StateLayout()
LAYERS = NANO.num_hidden_layers


@pytest.fixture(scope="module")
def folder(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(nano_dir, tmp_path_factory.mktemp("nano") / "nvfp4")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def blackwell(folder: Path) -> Program:
    return lower(Checkpoint(folder).config, Options(), arch="sm_103a")


@pytest.fixture(scope="module")
def hopper(folder: Path) -> Program:
    """What the passes before quantise-activations leave: experts on BF16 activations."""
    return lower(Checkpoint(folder).config, Options(), arch="sm_90a")


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "nvfp4-cpu"
    cache = ROOT / "build" / "kernels"
    compile_artifact(Checkpoint(folder).config, Target("cpu"), out, Options(), checkpoint=folder, cache=cache)
    return out


def model_of(nano_dir: Path, tensors: dict[str, Tensor]) -> Transformer:
    """The plain model: experts from the NVFP4 tensors, all else from the checkpoint that was converted."""
    state = load_model_state(Checkpoint(nano_dir))
    for layer in range(LAYERS):
        for matrix in ("w1", "w2", "w3"):
            base = f"layers.{layer}.ffn.experts"
            rows = [value_of(tensors, f"{base}.{i}.{matrix}") for i in range(NANO.n_routed_experts)]
            state[f"{base}.{matrix}"] = torch.stack(rows)
    model = Transformer(NANO, LAYOUT).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_greedy_tokens_on_a_cpu_are_those_of_the_plain_model(
    nano_dir: Path, artifact: Path, tensors: dict[str, Tensor], nano_prompts: list[list[int]]
) -> None:
    prompts = [prompt[:200] for prompt in nano_prompts[:6]]
    found = generate(make_engine(artifact, 8), prompts)
    model = model_of(nano_dir, tensors)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor(prompt + completion[:-1])
        state, chosen = init_state(NANO, LAYOUT, 1, len(ids)), []
        for start in range(0, len(ids), CHUNK):
            step = make_step(NANO, LAYOUT, [(0, start, ids[start : start + CHUNK])], len(ids))
            logits, state = model(step, state)
            chosen += logits.argmax(-1).tolist()
        assert chosen[len(prompt) - 1 :] == completion


def rounded(x: Tensor, factor: Tensor) -> Tensor:
    """float64 rows as NVFP4 holds them: E4M3 scales for 16 channels, ties of values to the even code."""
    groups = x.float().unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1) / (6 * factor)).clamp(max=448).to(torch.float8_e4m3fn).float()
    step = scale * factor
    wanted = groups / torch.where(step > 0, step, 1.0).unsqueeze(-1)
    near = (wanted.abs().clamp(max=6).unsqueeze(-1) - GRID).abs()
    least = near == near.amin(-1, keepdim=True)
    even = torch.where(least, torch.arange(8) % 2, 2).argmin(-1)  # of two that are as near, the even code
    value = GRID[even] * wanted.sign() * step.unsqueeze(-1)
    return value.flatten(-2).double()


@torch.no_grad()
def test_experts_on_blackwell_are_what_the_format_says(
    folder: Path, blackwell: Program, tensors: dict[str, Tensor], nano_prompts: list[list[int]]
) -> None:
    """Every call of the lowered program beside float64 arithmetic on the file's own tensors."""
    ids = torch.tensor(nano_prompts[1][:48])
    step = make_step(NANO, LAYOUT, [(0, 0, ids)], len(ids))
    state = init_state(NANO, LAYOUT, 1, len(ids))
    asked, seats = greedy_sampling(blackwell, len(ids), 2)
    errors = []

    def watch(scope: str, node: Any, args: tuple[Any, ...], value: Any) -> Any:
        if getattr(node.target, "name", "") != "experts_nvfp4":
            return value
        x, chosen, weight, shared = args[0], args[1], args[2], args[-1].double()
        base = f"layers.{int(scope[1:3])}.ffn.experts"
        first = [tensors[f"{base}.{i}.{w}.input_scale"] for i in range(NANO.n_routed_experts) for w in ("w1", "w3")]
        wide = rounded(x, torch.stack(first).max())
        out = shared.clone()
        for i in chosen.unique().tolist():
            token, k = (chosen == i).nonzero(as_tuple=True)
            w1, w3, w2 = (value_of(tensors, f"{base}.{i}.{w}").double() for w in ("w1", "w3", "w2"))
            gate, up = wide[token] @ w1.T, wide[token] @ w3.T
            hidden = F.silu(gate.clamp(max=10.0)) * up.clamp(-10, 10) * weight[token, k].double().unsqueeze(1)
            out.index_add_(0, token, rounded(hidden, tensors[f"{base}.{i}.w2.input_scale"]) @ w2.T)
        errors.append(float((value.double() - out).norm() / out.norm()))
        return value

    weights = program_weights(blackwell, Checkpoint(folder))
    run(blackwell, "step", step | asked, program_state(blackwell, state) | seats, weights, watch)
    # results are BF16, which is 0.0017 of them; on BF16 activations they are 0.13 away
    assert len(errors) == LAYERS and max(errors) < 0.003


@torch.no_grad()
def test_weights_are_the_files_bytes_and_factors_those_of_every_expert(
    folder: Path, blackwell: Program, tensors: dict[str, Tensor]
) -> None:
    found = program_weights(blackwell, Checkpoint(folder))
    base = "layers.3.ffn.experts"
    for i in (0, 7, 15):
        for w in ("w1", "w3", "w2"):
            assert torch.equal(found[f"{base}.{w}.data"][i], tensors[f"{base}.{i}.{w}.weight"])
            scales = (found[f"{base}.{w}.weight_scale"][i], tensors[f"{base}.{i}.{w}.weight_scale"])
            assert torch.equal(*(scale.view(torch.uint8) for scale in scales))
            assert found[f"{base}.{w}.weight_scale_2"][i] == tensors[f"{base}.{i}.{w}.weight_scale_2"]
        assert found[f"{base}.w2.input_scale"][i] == tensors[f"{base}.{i}.w2.input_scale"]
    pairs = [tensors[f"{base}.{i}.{w}.input_scale"] for i in range(16) for w in ("w1", "w3")]
    assert found[f"{base}.w1+w3.input_scale"] == max(pairs)
    factors = found[f"{base}.w1.weight_scale_2"], found[f"{base}.w3.weight_scale_2"]
    assert not torch.equal(*factors)  # gate and up have factors of their own here
    assert unpacked(found[f"{base}.w1.data"][0]).shape == (NANO.moe_intermediate_size, NANO.hidden_size)


def experts(program: Program) -> Counter[tuple[str, str]]:
    found = [n for n in program.nodes() if isinstance(n.target, Op) and n.target.name.startswith("experts")]
    return Counter((str(n.meta["scope"])[0], f"{n.target.name} {n.kwargs['activations']}") for n in found)  # type: ignore[union-attr]


def test_the_drafters_experts_stay_mxfp4(hopper: Program) -> None:
    program = hopper.clone()
    assert QuantiseActivations("mxfp4").apply(program) == LAYERS + 1
    assert experts(program) == {("L", "experts_nvfp4 nvfp4"): LAYERS, ("M", "experts_mx mxfp4"): 1}
    assert QuantiseActivations().apply(program) == 0


def test_hopper_has_no_path_for_nvfp4(hopper: Program) -> None:
    with pytest.raises(ScheduleError, match=r"target `sm_90a` has no schedule for 1 ops .*`experts_nvfp4`") as error:
        plan_artifact(hopper, Target("sm_90a"), Options())
    assert "MXFP4 checkpoint" in error.value.hint


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (QuantiseActivations(keep=("L03*",)), "`L03.ffn` cannot be kept: its experts are NVFP4"),
        (QuantiseActivations(keep=("L77*",)), r"`L77\*` matches no routed experts"),
    ],
)
def test_what_to_keep_must_fit(hopper: Program, chosen: QuantiseActivations, message: str) -> None:
    with pytest.raises(PassError, match=message):
        chosen.apply(hopper.clone())


def test_options_that_fit_no_experts_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compile", str(folder), "--dry-run", "--target"]
    assert main([*command, "sm_103a", "--activations", "mxfp4"]) == 2
    assert "`--activations mxfp4` fits no experts: all of this checkpoint are NVFP4" in capsys.readouterr().err
    assert main([*command, "cpu", "--keep", "L00*"]) == 2
    assert "are for sm_100a and sm_103a" in capsys.readouterr().err


def test_an_artifact_takes_no_checkpoint_of_the_other_format(
    artifact: Path, nano_artifact: Path, nano_dir: Path
) -> None:
    for directory, weights, message in (
        (artifact, nano_dir, "compiled for experts in NVFP4 in layers.0 to layers.5, MXFP4 in mtp.0, .* have MXFP4"),
        (nano_artifact, artifact / "weights", "compiled for experts in MXFP4, the weights have NVFP4 in layers.0"),
    ):
        with pytest.raises(ArtifactError, match=message):
            launch(directory, LaunchOptions(weights=weights))


def test_inspect_says_which_layers_are_nvfp4(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    assert "NVFP4 in layers.0 to layers.5, MXFP4 in mtp.0" in capsys.readouterr().out


class Damaged(DummySource):
    """Dummy weights with one tensor changed."""

    name, change = "", staticmethod(lambda tensor: tensor)

    def raw(self, name: str) -> Tensor:
        found = super().raw(name)
        return self.change(found) if name == self.name else found


@pytest.mark.parametrize(
    ("end", "value"),
    [("weight_scale", float("nan")), ("weight_scale", -1.0), ("weight_scale_2", -1.0), ("input_scale", 0.0)],
)
def test_scales_that_cannot_be_right_are_refused_when_they_are_loaded(
    blackwell: Program, end: str, value: float
) -> None:
    base = "layers.2.ffn.experts"
    source = Damaged(dataclasses.replace(NANO, nvfp4_layers=tuple(range(LAYERS))), 0)
    source.name = f"{base}.5.w3.{end}"
    wanted = [w for w in read_weights(blackwell) if w.name.startswith(f"{base}.")]
    load_weights(wanted, source)

    def change(tensor: Tensor) -> Tensor:
        wide = tensor.float()
        wide.view(-1)[0] = value
        return wide.to(tensor.dtype)

    source.change = change  # type: ignore[method-assign]
    with pytest.raises(
        CheckpointError, match=rf"weight `{base}.\S*{end}` does not fit .* 1 stored values are NaN or not"
    ):
        load_weights(wanted, source)
