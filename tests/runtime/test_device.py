"""The GPU program of nano by references, served by a DeviceRunner: one meaning, whatever bucket or batch it runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.artifact import load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.config import StateLayout
from dsv4c.errors import ConfigError, EngineError
from dsv4c.interpret import greedy_sampling, program_state, program_weights
from dsv4c.interpret import run as interpret
from dsv4c.model import init_state, make_step
from dsv4c.ops import Op
from dsv4c.runtime import layouts
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.graphs import GraphExecutor, pieces_of
from dsv4c.runtime.limits import bounds_of
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.weights import load_weights
from tests.runtime.devices import PatientRunner, Planned, RowByRow, device_engine, drain, gathered, row_by_row

NEW = 12
LENGTHS = (5, 140, 263, 40)


@pytest.fixture(scope="module")
def prompts(nano_prompts: list[list[int]]) -> list[list[int]]:
    return [prompt[:n] for prompt, n in zip((p for p in nano_prompts if len(p) >= 300), LENGTHS, strict=False)]


def greedy(prompts: list[list[int]], **options: Any) -> list[Request]:
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, **options)
    return [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]


def prompt_logprobs(events: dict[str, list[Event]], name: str = "0") -> Tensor:
    """Of every prompt token but the first."""
    return torch.tensor([x.logprob for event in events[name] for x in event.prompt_logprobs if x is not None])


def executor_of(engine: Engine) -> GraphExecutor:
    assert isinstance(engine.runner, DeviceRunner)
    return engine.runner.executor


@torch.no_grad()
def test_it_is_the_program_that_the_interpreter_runs(nano_planned: Planned, nano_dir: Path, prompts: Any) -> None:
    """Teacher-forced: in chunks, through page tables by slot and padded programs, the same bits as all at once."""
    ids, program = torch.tensor(prompts[1]), nano_planned.program.clone()
    for node in program.nodes():
        if isinstance(node.target, Op):
            node.target = row_by_row(node.target)
    state = program_state(program, init_state(program.config, StateLayout(), 1, len(ids)))
    step = make_step(program.config, StateLayout(), [(0, 0, ids)], len(ids))
    asked, seats = greedy_sampling(program, len(ids), 2)
    weights = program_weights(program, Checkpoint(nano_dir))
    logits = interpret(program, "step", step | asked, state | seats, weights)["logits"]
    wanted = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    engine = device_engine(nano_planned, binder=nano_planned.references(RowByRow))
    found = prompt_logprobs(drain(engine, greedy(prompts[1:2], prompt_logprobs=0)))
    assert torch.equal(found, wanted)


def test_it_stays_as_close_to_the_compiled_float32_model_as_its_formats_allow(
    nano_planned: Planned, nano_artifact: Path, prompts: Any
) -> None:
    """Teacher-forced, by the loss on prose and by how often both like the same token best."""
    manifest = load_manifest(nano_artifact)
    sizes = PoolSizes.for_requests(manifest.kv_groups, 8, 1024, step_tokens=256)
    executor = load(nano_artifact, Checkpoint(nano_artifact / "weights"), sizes, manifest=manifest)
    limits = Limits(max_requests=8, max_step_tokens=256)
    plain = Engine.for_manifest(executor, manifest, sizes, limits=limits)
    results = [drain(engine, greedy(prompts, prompt_logprobs=1)) for engine in (plain, device_engine(nano_planned))]
    logp = [torch.cat([prompt_logprobs(events, name) for name in events]) for events in results]
    best = [
        [x.top[0][0] for found in events.values() for e in found for x in e.prompt_logprobs if x] for events in results
    ]
    assert len(logp[0]) == sum(LENGTHS) - len(LENGTHS)
    # as in test_stored: 0.010 nats of divergence measured, the loss moved by 0.008
    assert (logp[0].mean() - logp[1].mean()).abs() < 0.05
    assert F.l1_loss(*logp) < 0.15
    assert sum(a == b for a, b in zip(*best, strict=True)) / len(best[0]) > 0.85


def test_the_bucket_does_not_matter(nano_planned: Planned, prompts: Any) -> None:
    """Three requests in programs of 4, of 8 and of prefill's sizes: the same tokens and the same log-probabilities."""
    manifest = nano_planned.manifest
    prefill = [name for name, program in manifest.programs.items() if program.phase == "prefill"]
    widest = max(prefill, key=lambda n: (manifest.programs[n].symbols["T"], manifest.programs[n].symbols["S"]))
    results = []
    for only in ((*prefill, "decode.4", "decode.8"), (*prefill, "decode.8"), (widest,)):
        limits = Limits(max_requests=8, max_step_tokens=256, max_logit_rows=72)
        engine = device_engine(nano_planned, only=only, limits=limits)
        results.append(drain(engine, greedy(prompts[:3], logprobs=2)))
    assert results[0] == results[1] == results[2]


def test_alone_and_among_others_the_same_is_computed(nano_planned: Planned, prompts: Any) -> None:
    """Mixed steps, chunks of any size, tokens fed on the device or given by the host: the same bits for everyone."""
    one, binder = greedy(prompts, prompt_logprobs=0, logprobs=1), nano_planned.references(RowByRow)
    together = drain(device_engine(nano_planned, binder=binder), one)
    small = Limits(max_requests=3, max_step_tokens=37, max_logit_rows=40)
    asked = greedy(prompts, prompt_logprobs=0, logprobs=1)
    chunked = drain(device_engine(nano_planned, binder=binder, limits=small, runner=PatientRunner), asked)
    assert gathered(chunked) == gathered(together)
    alone = drain(device_engine(nano_planned, binder=binder), [Request("1", prompts[1], one[1].params)])
    assert gathered(alone)["1"] == gathered(together)["1"]


def test_a_step_of_nobody_changes_nothing_that_is_somebodys(nano_planned: Planned) -> None:
    engine = device_engine(nano_planned, only=["decode.2", "prefill.64.8"])
    executor, seen = executor_of(engine), []
    executor.warm_up(lambda done, of, name: seen.append((done, of, name)))
    assert seen == [(1, 2, "prefill.64.8"), (2, 2, "decode.2")]
    page = {p.name: g.entries_per_page for g in nano_planned.manifest.kv_groups for p in g.pools}
    for name, state in executor.states.items():
        assert not state[page.get(name, 1) :].any(), name


def test_scopes_are_broken_out_of_the_graphs(nano_planned: Planned) -> None:
    program = nano_planned.manifest.programs["decode.4"]
    model, drawn = pieces_of(program)
    assert not model.why and not drawn.why and drawn.masked and {call.scope for call in drawn.calls} == {"sampling"}
    whole = tuple(call for segment in program.segments for call in segment.calls)
    assert (*model.calls, *drawn.calls) == whole
    pieces = pieces_of(program, ["L02.*"])
    assert [piece.why for piece in pieces] == ["", "--break L02.*", "", ""]
    assert tuple(call for piece in pieces for call in piece.calls) == whole
    assert {call.scope for call in pieces[1].calls} == {"L02.attn", "L02.ffn"}
    with pytest.raises(ConfigError, match="no call is in `L77"):
        device_engine(nano_planned, breaks=["L77.*"])


def test_a_step_that_no_program_holds_is_refused(nano_planned: Planned, prompts: Any) -> None:
    engine = device_engine(nano_planned, only=["decode.1", "prefill.64.8"], limits=Limits(8, 256, max_logit_rows=72))
    engine.submit(greedy(prompts[1:2])[0])
    (event,) = engine.step()
    assert event.end is not None and isinstance(event.end.error, EngineError)
    assert f"holds {LENGTHS[1]} tokens of 1 requests and 1 rows" in event.end.error.message
    engine.audit()


def test_layouts_are_undone(nano_planned: Planned, nano_dir: Path) -> None:
    """References get what the checkpoint stores, from what the kernels get."""
    laid = [weight for weight in nano_planned.manifest.weights if weight.plain is not None]
    assert laid and {w.name for w in laid} == set(nano_planned.plain)
    for weight in laid:
        assert weight.plain is not None
        layout = weight.transforms[weight.plain.transforms :]
        again = layouts.apply(nano_planned.plain[weight.name], layout)
        assert torch.equal(again, nano_planned.weights[weight.name]), weight.name
    cut = [
        type(w)(w.name, w.plain.shape, w.plain.dtype, w.sources, w.transforms[: w.plain.transforms])
        for w in laid[:6]
        if w.plain is not None
    ]
    stored, _ = load_weights(cut, Checkpoint(nano_dir))
    assert all(torch.equal(stored[w.name], nano_planned.plain[w.name]) for w in cut)


def test_bounds_are_those_of_the_largest_programs(nano_planned: Planned) -> None:
    bounds = bounds_of(nano_planned.manifest)
    assert (bounds.tokens, bounds.requests, bounds.rows) == (256, 8, 72)
