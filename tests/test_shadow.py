"""Shadows: sound kernels pass, a faulty one is named where it first errs, and tokens stay the kernels' own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.agreement import Apart, Seen, largest_error, measure
from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.launch import LaunchOptions, answer, launch
from dsv4c.model.rope import rope_frequencies, rope_table
from dsv4c.ops import OPS
from dsv4c.ops.formats import kv_sizes, pack_kv, write_entries
from dsv4c.reference import plain_weights
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.kernels import Kernels
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.weights import load_weights
from dsv4c.shadow import Difference, HostShadowExecutor, Shadow, ShadowExecutor, Tally
from tests.runtime.devices import Planned, device_engine, drain, gathered
from tests.runtime.test_contracts import Faulty


@pytest.fixture(scope="module")
def nano_planned(nano_dir: Path) -> Planned:
    return Planned.of(nano_dir)


def requests(nano_prompts: list[list[int]], new: int = 5) -> list[Request]:
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, logprobs=1)
    return [Request(str(i), nano_prompts[1][:n], params) for i, n in enumerate((3, 70, 140))]


def test_references_are_their_own_shadow(nano_planned: Planned, nano_prompts: list[list[int]]) -> None:
    shadow = Shadow(nano_planned.manifest, nano_planned.plain)
    engine = device_engine(nano_planned, make=ShadowExecutor, shadow=shadow)
    found = gathered(drain(engine, requests(nano_prompts)))
    assert found == gathered(drain(device_engine(nano_planned), requests(nano_prompts)))
    assert not shadow.differences and shadow.steps == 5
    ran = {nano_planned.manifest.kernels[name].op for _, name, _ in shadow.tallies}
    assert {"experts_fp4", "index_topk_packed", "compress_pack", "sample_penalised", "keep_tokens"} <= ran
    assert all(error <= tolerance for _, _, error, tolerance in shadow.summary())


def test_a_faulty_kernel_is_named_and_its_results_are_used(
    nano_planned: Planned, nano_prompts: list[list[int]]
) -> None:
    """5 % too much in one linear map: that call alone is off, what follows is right for what it got."""
    manifest = nano_planned.manifest

    def fault(values: Any, call: Any) -> None:
        values[call.args[-1]].mul_(1.05)

    binder = Faulty(nano_planned.references(), manifest, "grouped_linear_fp8", "L03.attn", fault)
    seen: list[Difference] = []
    shadow = Shadow(manifest, nano_planned.plain, seen.append)
    engine = device_engine(nano_planned, make=ShadowExecutor, binder=binder, shadow=shadow)
    found = gathered(drain(engine, requests(nano_prompts)))
    eager = gathered(drain(device_engine(nano_planned, binder=binder), requests(nano_prompts)))
    assert found == eager != gathered(drain(device_engine(nano_planned), requests(nano_prompts)))
    first = shadow.differences[0]
    assert (first.scope, first.op, first.step) == ("L03.attn", "grouped_linear_fp8", 1)
    assert first.schedule.startswith("grouped_linear_fp8.") and first.error == pytest.approx(0.05, rel=0.1)
    assert {d.op for d in shadow.differences} == {"grouped_linear_fp8"} and seen == shadow.differences
    assert f"`{first.buffer}` of `grouped_linear_fp8` in `L03.attn`" in str(first)


@pytest.mark.parametrize(
    ("op", "scope"),
    [("index_topk_packed", "L01.attn"), ("gate_linear_bias", "L04.ffn"), ("sample_penalised", "sampling")],
)
def test_a_wrong_choice_is_named(op: str, scope: str, nano_planned: Planned, nano_prompts: list[list[int]]) -> None:
    def fault(values: Any, call: Any) -> None:
        ids = values[call.args[len(call.args) - call.outputs]]
        ids.copy_(torch.where(ids > 0, ids - 1, ids))

    binder = Faulty(nano_planned.references(), nano_planned.manifest, op, scope, fault)
    shadow = Shadow(nano_planned.manifest, nano_planned.plain)
    engine = device_engine(nano_planned, make=ShadowExecutor, binder=binder, shadow=shadow)
    drain(engine, requests(nano_prompts, new=2))
    assert (shadow.differences[0].op, shadow.differences[0].scope) == (op, scope)


def test_the_compiled_artifact_of_this_machine_agrees_with_its_references(
    nano_artifact: Path, nano_prompts: list[list[int]]
) -> None:
    """Real kernels, within the tolerances of their schedules; and one of them over a weight that is not its own."""
    manifest = load_manifest(nano_artifact)
    weights, _ = load_weights(manifest.weights, Checkpoint(nano_artifact / "weights"))
    plain = plain_weights(manifest, weights)
    shadow = host_shadow(nano_artifact, manifest, weights, plain, nano_prompts)
    assert not shadow.differences, shadow.differences[0]
    assert 0 < shadow.summary()[0][2] <= shadow.summary()[0][3]
    name = "layers.3.attn.wo_b.weight"
    spoiled = host_shadow(nano_artifact, manifest, weights, {**plain, name: plain[name] * 1.01}, nano_prompts)
    assert {(d.scope, d.op) for d in spoiled.differences} == {("L03.attn", "linear")}


def host_shadow(artifact: Path, manifest: Manifest, weights: Any, plain: Any, prompts: list[list[int]]) -> Shadow:
    sizes = PoolSizes.for_requests(manifest.kv_groups, 4, 512, step_tokens=256)
    shadow = Shadow(manifest, plain)
    kernels, states = Kernels(manifest.kernels, artifact), allocate(manifest, sizes)
    executor = HostShadowExecutor(manifest.programs["step"], kernels, weights, states, shadow=shadow)
    engine = Engine.for_manifest(executor, manifest, sizes, limits=Limits(4, 256))
    drain(engine, requests(prompts))
    return shadow


def test_a_cpu_artifact_is_served_beside_its_references(nano_artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same answer, and nothing to report; contracts and graphs are for GPUs."""
    answers = []
    for executor in ("graph", "shadow"):
        options = LaunchOptions(executor=executor, kv_memory_bytes=100_000_000, max_requests=2, max_context=512)
        answers.append("".join(answer(launch(nano_artifact, options), "The package", 8, 0.0, 0)))
    assert answers[0] == answers[1] and not [r for r in caplog.records if r.name == "dsv4c"]
    for refused in (
        LaunchOptions(executor="contracts"),
        LaunchOptions(executor="eager"),
        LaunchOptions(breaks=("L*",)),
    ):
        with pytest.raises(ConfigError, match="are for GPU artifacts"):
            launch(nano_artifact, refused)


def test_a_tally_allows_a_share_and_what_chance_adds() -> None:
    one_row = Tally()
    one_row.add(Apart(0, 3 / 128, 128, 128))
    assert not one_row.beyond(2e-3)  # a scale that moved takes its 128 bytes along
    many = Tally()
    for _ in range(2000):
        many.add(Apart(0, 3 / 128, 128, 128))
    assert many.beyond(2e-3) and many.error == pytest.approx(3 / 128)
    far = Tally()
    far.add(Apart(0, math.inf, 128, 128))
    assert far.beyond(1.0) and far.error == math.inf
    exact = Tally()
    exact.add(Apart(0, 1 / 128, 128, 128))
    assert exact.beyond(0.0)


def seen(op: str, args: list[Any], outputs: list[torch.Tensor], expected: list[torch.Tensor], **attrs: Any) -> Seen:
    return Seen(OPS[op], attrs, args, outputs, expected, [0] * len(outputs))


def test_numbers_are_compared_with_the_largest() -> None:
    a = torch.tensor([[100.0, 1.0]])
    assert largest_error([a], [a + torch.tensor([[0.0, 0.5]])]) == pytest.approx(0.005, rel=0.01)
    assert largest_error([a], [a[:, :1]]) == largest_error([a * torch.nan], [a]) == math.inf
    masked = torch.tensor([[1.0, -torch.inf]])
    assert measure(seen("linear", [], [masked], [masked]))[0].error == 0.0
    assert measure(seen("linear", [], [masked + 1e-3], [masked]))[0].error == pytest.approx(1e-3, rel=0.01)
    assert measure(seen("linear", [], [masked], [masked[:, [1, 0]]]))[0].error == math.inf


def test_packed_entries_may_fall_to_a_neighbour_and_no_further() -> None:
    torch.manual_seed(0)
    x, rope_dim, per_page = torch.randn(6, 64), 32, 4
    size = sum(kv_sizes(64, rope_dim))
    pool = torch.randint(256, (12, size), dtype=torch.uint8)
    slots = torch.arange(4, 10)
    pack = {"entries_per_page": per_page}
    expected = write_entries(pool, slots, *pack_kv(x, rope_dim), **pack)
    args = [pool, slots, x, torch.ones(64), torch.zeros(6, rope_dim)]

    def error(out: torch.Tensor) -> Apart:
        (found,) = measure(seen("norm_rope_pack", args, [out], [expected], eps=1e-6, **pack))
        return found

    assert error(expected) == Apart(0, 0.0, 6 * size, size)
    near = expected.clone()
    page, byte = 1, 7  # a plain channel of the first entry
    near.view(-1, per_page * size)[page, byte] += 1
    assert 0 < error(near).error <= 1 / (6 * size)
    far = expected.clone()
    far.view(-1, per_page * size)[page, byte] += 40
    assert error(far).error == math.inf
    elsewhere = expected.clone()
    elsewhere[11] += 1  # a row that the call must not touch
    assert error(elsewhere).error == math.inf
    null = expected.clone()
    null[:4] = 255
    assert error(null).error == 0.0


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_queries_are_judged_by_their_bytes_and_their_weights(form: str) -> None:
    """A byte that fell to its neighbour counts one, whatever the weight of its head; what is wrong is refused."""
    torch.manual_seed(2)
    table = rope_table(torch.arange(3), rope_frequencies(8, 1e4, None))
    q, weight = torch.randn(3, 4 * 32).bfloat16(), torch.randn(3, 4)
    weight[1, 2] = 500.0
    args, attrs = [q, table, weight], {"num_heads": 4, "format": form}
    data, scaled = OPS["index_query"].reference(*args, **attrs)

    def errors(data_out: torch.Tensor, weight_out: torch.Tensor) -> list[float]:
        found = measure(seen("index_query", args, [data_out, weight_out], [data, scaled], **attrs))
        return [one.error for one in found]

    assert errors(data, scaled) == [0.0, 0.0]
    near = data.clone()
    byte = int(data[1, 2].view(torch.float8_e4m3fn).float().abs().argmax())
    near[1, 2, byte] -= 1 if form == "fp8" else 8  # the next smaller magnitude
    assert errors(near, scaled) == [1 / data.numel(), 0.0]
    far = data.clone()
    far[1, 2, byte] ^= 0x80
    assert errors(far, scaled)[0] == math.inf
    assert errors(data, -scaled)[0] == math.inf
    assert errors(data, scaled * 1.01)[1] == pytest.approx(0.01, rel=0.01)
    assert errors(data[:2], scaled[:2])[0] == math.inf


def test_picks_are_judged_by_what_they_lose() -> None:
    torch.manual_seed(1)
    q, weight = torch.randn(1, 2, 8), torch.rand(1, 2)
    pool, pages = torch.randn(32, 8), torch.tensor([[1, 2, 3]])
    args = [q, weight, pool, pages, torch.tensor([0]), torch.tensor([19])]
    attrs: dict[str, Any] = {"ratio": 1, "entries_per_page": 8, "topk": 4}
    expected = OPS["index_topk"].reference(*args, **attrs)

    def error(out: torch.Tensor) -> float:
        return measure(seen("index_topk", args, [out], [expected], **attrs))[0].error

    assert error(expected) == error(expected[:, [2, 0, 3, 1]]) == 0.0
    left = next(e for e in range(20) if e not in expected[0].tolist())
    worse = expected.clone()
    worse[0, 0] = left
    assert 0 < error(worse) < math.inf
    for wrong in (20, int(expected[0, 1]), -1):
        broken = expected.clone()
        broken[0, 0] = wrong
        assert error(broken) == math.inf


def test_an_artifact_that_says_other_attributes_is_refused(nano_planned: Planned) -> None:
    name, kernel = next((n, k) for n, k in nano_planned.manifest.kernels.items() if k.op == "rope_quantise")
    kernels = {**nano_planned.manifest.kernels, name: dataclasses.replace(kernel, op_attrs={"group": 128})}
    spoiled = dataclasses.replace(nano_planned, manifest=dataclasses.replace(nano_planned.manifest, kernels=kernels))
    with pytest.raises(ArtifactError, match="which has no such reference here"):
        device_engine(spoiled)
