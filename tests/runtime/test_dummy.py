"""Dummy weights made on the device: right numbers in right bytes, routing that spreads, activations that last."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.artifact import Manifest, Weight, load_manifest
from dsv4c.checkpoint.dequantise import dequantise_fp4, dequantise_fp8_block
from dsv4c.compile import Options, lower
from dsv4c.config import FLASH, NANO, ModelConfig, StateLayout
from dsv4c.errors import ArtifactError
from dsv4c.interpret import greedy_sampling, program_state, read_weights, run
from dsv4c.model import init_state, make_step
from dsv4c.model.moe import gate_bias
from dsv4c.runtime.dummy import make_weights
from dsv4c.runtime.weights import LoadProgress

LAYOUT = StateLayout()


def manifest_of(hopper: Manifest, config: ModelConfig, *weights: Weight) -> Manifest:
    return dataclasses.replace(hopper, model=config.to_dict(), weights=weights)


def linear(name: str, dtype: str, shape: tuple[int, ...], *transforms: tuple[str, ...]) -> Weight:
    return Weight(name, shape, dtype, (name.removesuffix(".data"),), transforms)


def stored(name: str, fp4: bool, shape: tuple[int, ...]) -> tuple[Weight, Weight]:
    """A quantised weight's data and scales."""
    n, k = shape
    if fp4:
        kinds = ("uint8", (n, k // 2)), ("uint8", (n, k // 32))
    else:
        kinds = ("float8_e4m3fn", shape), ("float32", (-(-n // 128), -(-k // 128)))
    transforms = (("stored",),)
    return (
        Weight(f"{name}.data", kinds[0][1], kinds[0][0], (f"{name}.weight",), transforms),
        Weight(f"{name}.scale", kinds[1][1], kinds[1][0], (f"{name}.scale",), transforms),
    )


@pytest.fixture(scope="module")
def made(hopper_manifest: Manifest) -> dict[str, Tensor]:
    return make_weights(hopper_manifest, 0)[0]


def test_all_are_of_the_manifests_shape_and_dtype_and_are_numbers(
    hopper_manifest: Manifest, made: dict[str, Tensor]
) -> None:
    assert list(made) == [weight.name for weight in hopper_manifest.weights]
    for weight in hopper_manifest.weights:
        tensor = made[weight.name]
        assert (tuple(tensor.shape), str(tensor.dtype)) == (weight.shape, f"torch.{weight.dtype}"), weight.name
        assert tensor.is_contiguous()
        if tensor.dtype == torch.float8_e4m3fn:
            assert (tensor.view(torch.uint8) & 0x7F != 0x7F).all(), weight.name
        elif tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), weight.name
        elif tensor.dtype == torch.uint8 and weight.name.endswith(".scale"):
            assert tensor.min() > 100 and tensor.max() <= 128, weight.name


def test_a_weight_depends_on_its_name_and_the_seed(hopper_manifest: Manifest, made: dict[str, Tensor]) -> None:
    some = [w for w in hopper_manifest.weights if "layers.2." in w.name]
    again = make_weights(dataclasses.replace(hopper_manifest, weights=tuple(reversed(some))), 0)[0]
    other = make_weights(dataclasses.replace(hopper_manifest, weights=tuple(some)), 1)[0]
    for weight in some:
        assert torch.equal(again[weight.name].view(torch.uint8), made[weight.name].view(torch.uint8)), weight.name
        # the few scales of a small weight may agree by chance
        if weight.shape[0] > 8 and "scale" not in weight.name:
            assert not torch.equal(other[weight.name].view(torch.uint8), made[weight.name].view(torch.uint8))
    assert not torch.equal(made["layers.1.attn_norm.weight"], made["layers.2.attn_norm.weight"])


def test_constants_are_the_manifests(hopper_manifest: Manifest, made: dict[str, Tensor]) -> None:
    for weight in hopper_manifest.weights:
        if not weight.sources:
            assert made[weight.name].flatten().tolist() == pytest.approx(weight.transforms[0][1])


@pytest.mark.parametrize(("fp4", "shape"), [(True, (512, 4096)), (False, (1000, 1500)), (False, (512, 4096))])
def test_quantised_linears_have_variance_one_over_in_features(
    hopper_manifest: Manifest, fp4: bool, shape: tuple[int, int]
) -> None:
    got = make_weights(manifest_of(hopper_manifest, FLASH, *stored("a.w1", fp4, shape)), 4)[0]
    data, scale = got["a.w1.data"], got["a.w1.scale"]
    if fp4:
        wide = dequantise_fp4(data, scale.view(torch.float8_e8m0fnu))
    else:
        wide = dequantise_fp8_block(data, scale)
    # few scales of FP8, each one of two powers of two
    assert wide.std() * shape[1] ** 0.5 == pytest.approx(1, abs=0.02 if fp4 else 0.15)
    assert abs(wide.mean()) < 0.02 * wide.std()


def test_tables_name_distinct_experts_evenly(hopper_manifest: Manifest) -> None:
    table = linear("layers.0.ffn.gate.tid2eid", "int64", (20_000, 6))
    got = make_weights(manifest_of(hopper_manifest, FLASH, table), 0)[0][table.name]
    rows = got.sort(-1).values
    assert (rows[:, 1:] != rows[:, :-1]).all() and rows.min() >= 0
    counts = got.flatten().bincount(minlength=256)
    assert len(counts) == 256 and counts.min() > 0.75 * counts.float().mean()


@pytest.mark.parametrize("config", [NANO, FLASH], ids=["nano", "flash"])
def test_routers_spread_a_batch_over_all_experts(hopper_manifest: Manifest, config: ModelConfig) -> None:
    experts, hidden = config.n_routed_experts, config.hidden_size
    weight = linear("layers.3.ffn.gate.weight", "bfloat16", (experts, hidden), ("dequantise",))
    bias = linear("layers.3.ffn.gate.bias", "float32", (experts,), ("dequantise",))
    for seed in range(4):
        got = make_weights(manifest_of(hopper_manifest, config, weight, bias), seed)[0]
        x = torch.randn(1024, hidden, generator=torch.Generator().manual_seed(seed))
        logits = F.linear(F.rms_norm(x, (hidden,)), got[weight.name].float())
        chosen, _ = gate_bias(logits, got[bias.name], topk=config.num_experts_per_tok, scaling=1.5)
        counts = chosen.flatten().bincount(minlength=experts).float()
        assert counts.min() > 0 and counts.max() < 4 * counts.mean()


@torch.no_grad()
def test_activations_and_routing_last_for_twenty_layers(hopper_manifest: Manifest) -> None:
    """What a card would compute, on the references of its ops: streams mixed, FP8 activations, 256 experts."""
    layers, tokens = 20, 128
    config = dataclasses.replace(
        NANO, n_routed_experts=256, num_experts_per_tok=6, num_hidden_layers=layers, num_hash_layers=3,
        compress_ratios=(0, 0, *(4, 128) * (layers // 2 - 1), 0),
    )  # fmt: skip
    program = lower(config, Options(), arch="sm_90a")
    weights, _ = make_weights(manifest_of(hopper_manifest, config, *read_weights(program)), 0)
    graph = program.graphs["step"]
    gates = [node for node in graph.nodes if str(getattr(node.target, "name", "")).startswith("gate_linear")]
    chosen = [user for gate in gates for user in gate.users if user.target is operator.getitem and user.args[1] == 0]
    output = graph.output_node()
    output.args = ((*output.args[0], *chosen),)
    output.meta["outputs"] = (*output.meta["outputs"], *(f"chosen.{i}" for i in range(len(chosen))))

    ids = torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    asked, seats = greedy_sampling(program, tokens, 2)
    step = make_step(config, LAYOUT, [(0, 0, ids)], tokens)
    state = program_state(program, init_state(config, LAYOUT, 1, tokens))
    found = run(program, "step", step | asked, state | seats, weights)

    assert len(chosen) == layers
    for i in range(layers):
        counts = found[f"chosen.{i}"].flatten().bincount(minlength=256)
        # If 128 tokens chose at random, 244 of 256 experts would get 3 each on average. 1024 tokens, which take this
        # test minutes, hit all experts in all of 22 layers, none with more than 3.1 times the mean.
        assert (counts > 0).sum() > 205 and counts.max() <= 24, (i, counts)
    assert 0.5 < found["logits"].std() < 2
    assert len(set(found["tokens"].tolist())) > tokens // 2


def test_progress_and_report_count_bytes(hopper_manifest: Manifest) -> None:
    seen: list[LoadProgress] = []
    weights, report = make_weights(hopper_manifest, 0, seen.append)
    total = sum(tensor.nbytes for tensor in weights.values())
    assert (report.weights, report.bytes, report.made) == (len(weights), total, True)
    assert [now.weights for now in seen] == list(range(1, len(weights) + 1)) and seen[-1].bytes == total


def test_weights_for_a_cpu_are_refused(nano_artifact: object) -> None:
    with pytest.raises(ArtifactError, match="is laid out as for a CPU"):
        make_weights(load_manifest(str(nano_artifact)), 0)


def test_scales_of_nothing_are_refused(hopper_manifest: Manifest) -> None:
    _, scale = stored("a.w1", True, (64, 64))
    with pytest.raises(ArtifactError, match=r"weight `a\.w1\.scale` scales no weight"):
        make_weights(manifest_of(hopper_manifest, FLASH, scale), 0)
