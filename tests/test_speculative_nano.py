"""nano with its MTP block on the CPU: drafts change neither tokens nor state, and are kept as the plain model's are.

The figures over 200 prompts are in benchmarks/drafts.py; here are a few, small.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.artifact import Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.cli import main
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import ModelConfig, Target
from dsv4c.errors import ConfigError
from dsv4c.launch import LaunchOptions, launch_engine
from dsv4c.model.state import init_state, make_step
from dsv4c.model.transformer import Transformer
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request, expand
from dsv4c.runtime.speculation import Speculation

ROOT = Path(__file__).parents[1]
DRAFTS = 3


@pytest.fixture(scope="module")
def drafting(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano compiled to draft up to 3 tokens."""
    folder, options = tmp_path_factory.mktemp("drafting") / "nano", Options(speculative_tokens=DRAFTS)
    config = Checkpoint(nano_dir).config
    compile_artifact(config, Target("cpu"), folder, options, checkpoint=nano_dir, cache=ROOT / "build" / "kernels")
    return folder


@pytest.fixture(scope="module")
def made(drafting: Path) -> tuple[Engine, Engine]:
    """One that never drafts, and one that may."""
    common: dict[str, Any] = {"kv_memory_bytes": 60_000_000, "max_requests": 8, "max_context": 1024}
    manifest = load_manifest(drafting)
    return tuple(  # type: ignore[return-value]
        launch_engine(drafting, manifest, LaunchOptions(speculative_tokens=drafts, **common)) for drafts in (0, DRAFTS)
    )


@pytest.fixture
def engines(made: tuple[Engine, Engine]) -> Callable[[int], Engine]:
    """The engine that verifies so many drafts in every step."""

    def engine(drafts: int) -> Engine:
        found = made[drafts > 0]
        found.speculation = Speculation(found.speculation.max_tokens)
        found.scheduler._lengths = lambda requests: drafts
        return found

    return engine


def serve(engine: Engine, requests: Sequence[Request], preempt: random.Random | None = None) -> dict[str, Any]:
    """Tokens, log-probabilities and end of each request."""
    out: dict[str, Any] = {request.id: ([], [], []) for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        if preempt is not None and engine.scheduler.running and preempt.random() < 0.05:
            engine.scheduler.preempt_newest()
        for event in engine.step():
            tokens, logprobs, ends = out[event.request_id]
            tokens += event.tokens
            logprobs += event.logprobs
            ends += [event.end.reason] if event.end is not None else []
    engine.audit()
    return out


def requests(prompts: Sequence[Sequence[int]], count: int, **params: Any) -> list[Request]:
    params = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **params}
    lengths = (5, 70, 1, 130, 33)
    return [Request(str(i), prompts[i][: lengths[i]], SamplingParams(seed=i, **params)) for i in range(count)]


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 2}],
    ids=["greedy", "drawn"],
)
def test_tokens_are_those_without_speculation(
    engines: Callable[[int], Engine], nano_prompts: list[list[int]], drafts: int, params: Mapping[str, Any]
) -> None:
    engine = engines(drafts)
    for count in (1, 5):
        expected = serve(engines(0), requests(nano_prompts, count, **params))
        found = serve(engine, requests(nano_prompts, count, **params), random.Random(drafts))
        assert found == expected
    assert engine.stats().speculation.accepted > 0


def pools_of(engine: Engine, request: Request) -> dict[str, torch.Tensor]:
    """What later tokens of the request read: entries of the model's own pools, and rows of its rings."""
    states, end, out = engine.runner.executor.states, request.num_computed, {}  # type: ignore[attr-defined]
    for spec in engine.pool.groups:
        first = 0 if spec.horizon is None else max(0, end + 1 - spec.horizon)
        entries = np.arange(-(-first // spec.tokens_per_entry), end // spec.tokens_per_entry)
        pages = engine.pool.tables[spec.name][request.slot, entries // spec.entries_per_page]
        rows = torch.from_numpy(pages * spec.entries_per_page + entries % spec.entries_per_page)
        for pool in spec.pools:
            if not pool.name.startswith("mtp."):  # drafts stand on guesses there; they change no token
                out[pool.name] = states[pool.name][rows]
    return out


@pytest.mark.parametrize("drafts", [1, 3])
def test_entries_are_those_of_a_run_that_never_speculated(
    engines: Callable[[int], Engine], nano_prompts: list[list[int]], drafts: int
) -> None:
    """Bit for bit, after any number of accepted and rejected tokens: kernels round alike whatever rows a step has."""
    params = SamplingParams(max_tokens=90, temperature=1.0, seed=5, ignore_eos=True)
    one, two = (Request(name, nano_prompts[3][:37], params) for name in "ab")
    plain, engine = engines(0), engines(drafts)
    plain.submit(one)
    engine.submit(two)
    compared = 0
    while two.status != "ended":
        engine.step()
        while one.num_computed < two.num_computed and one.status != "ended":
            plain.step()
        if two.status != "ended" and one.status != "ended":
            assert one.num_computed == two.num_computed
            expected, found = pools_of(plain, one), pools_of(engine, two)
            for name, values in expected.items():
                assert torch.equal(found[name], values), name
            compared += 1
    while plain.has_work:
        plain.step()
    assert compared > 15 and engine.stats().speculation.drafted > engine.stats().speculation.accepted


def test_acceptance_is_that_of_the_plain_model(
    engines: Callable[[int], Engine], drafting: Path, nano_prompts: list[list[int]]
) -> None:
    """Of first drafts, greedily, draft by draft: the compiled block is the plain one."""
    manifest: Manifest = load_manifest(drafting)
    model = Transformer(ModelConfig.from_dict(manifest.model))
    model.load_state_dict(load_model_state(Checkpoint(drafting / "weights")))
    model.float().eval()
    engine, kept, tried = engines(1), 0, 0
    before = engine.stats().speculation
    given = [prompt[:60] for prompt in nano_prompts[:6]]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    found = serve(engine, [Request(str(i), prompt, params) for i, prompt in enumerate(given)])
    after = engine.stats().speculation
    with torch.no_grad():
        for i, prompt in enumerate(given):
            ids = torch.tensor([*prompt, *found[str(i)][0]])
            step = make_step(model.config, model.layout, [(0, 0, ids[:-1])], len(ids))
            streams, state = model.run(step, init_state(model.config, model.layout, 1, len(ids)))
            draft, _ = model.mtp_logits(streams[-1], ids[1:], step, state)
            agrees = (draft[:-1].argmax(-1) == ids[2:]).tolist()
            at = len(prompt) + 1
            while at < len(ids) - 1:
                tried, kept = tried + 1, kept + agrees[at - 2]
                at += 2 if agrees[at - 2] else 1
    assert (after.tried[0] - before.tried[0], after.kept[0] - before.kept[0]) == (tried, kept)
    assert kept / tried > 0.6


def test_choices_of_one_prompt_draft_apart(engines: Callable[[int], Engine], nano_prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=9, temperature=1.0)
    expected, found = (serve(engines(k), expand("x", nano_prompts[0][:1], params)) for k in (0, 2))
    assert found == expected and len({tuple(v[0]) for v in found.values()}) == 3


def test_metrics_say_what_drafts_bring(engines: Callable[[int], Engine], nano_prompts: list[list[int]]) -> None:
    engine = engines(3)
    serve(engine, requests(nano_prompts, 3))
    text = Metrics(engine.stats).text().decode()
    for line in (
        'dsv4c_spec_decode_draft_tokens_total{position="0"}', 'dsv4c_spec_decode_accepted_tokens_total{position="2"}',
        'dsv4c_spec_decode_acceptance{position="1"}', "dsv4c_spec_decode_steps_total",
        "dsv4c_spec_decode_tokens_per_step",
    ):  # fmt: skip
        assert line in text
    assert "spec_decode" not in Metrics(engines(0).stats).text().decode()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_options_that_cannot_be_are_refused(
    nano_dir: Path, drafting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Checkpoint(nano_dir).config
    bare = dataclasses.replace(config, num_nextn_predict_layers=0, compress_ratios=config.compress_ratios[:-1])
    for model, options, message in (
        (config, Options(speculative_tokens=4), "`--speculative-tokens` is 4, it can be 0 to 3"),
        (config, Options(speculative_tokens=3, max_requests=64, max_tokens=128), "64 requests with 3 drafts each"),
        (bare, Options(speculative_tokens=1), "needs an MTP block, the model has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            compile_artifact(model, Target("cpu"), tmp_path / "out", options)
    assert main(["run", str(drafting), "--speculative-tokens", "4", "--port", "0"]) == 2
    assert "the artifact drafts 3 at most" in capsys.readouterr().err
