"""The compiled nano model resumes from the prefix cache with the tokens of a run without it, at every boundary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv4c.artifact import load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.cli import main
from dsv4c.launch import LaunchOptions, launch
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes, block_tokens, snapshot_states
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits

BLOCK = 256
REQUESTS, NEW_TOKENS = 4, 12


def make_engine(artifact: Path, snapshots: int) -> Engine:
    manifest = load_manifest(artifact)
    tokens = manifest.programs["step"].symbols["T"]
    sizes = PoolSizes.for_requests(manifest.kv_groups, REQUESTS, 1024, step_tokens=tokens, snapshots=snapshots)
    executor = load(artifact, Checkpoint(artifact / "weights"), sizes, manifest=manifest)
    limits = Limits(max_requests=REQUESTS, max_step_tokens=tokens)
    return Engine.for_manifest(executor, manifest, sizes, limits=limits)


@pytest.fixture(scope="module")
def plain(nano_artifact: Path) -> Engine:
    return make_engine(nano_artifact, 0)


@pytest.fixture
def engine(nano_artifact: Path) -> Engine:
    return make_engine(nano_artifact, 12)


def generate(engine: Engine, prompts: Sequence[Sequence[int]], count: int = NEW_TOKENS) -> list[tuple[list[int], int]]:
    """Tokens and cached prompt tokens of each prompt, all submitted at once."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, params))
    tokens: list[list[int]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    while engine.has_work:
        for event in engine.step():
            assert event.end is None or event.end.error is None
            tokens[int(event.request_id)].extend(event.tokens)
            cached[int(event.request_id)] += event.cached_tokens
    engine.audit()
    return list(zip(tokens, cached, strict=True))


def both(plain: Engine, engine: Engine, prompt: Sequence[int], count: int = NEW_TOKENS) -> tuple[list[int], int]:
    """A prompt's tokens, which are the same on both, and how many of it were cached."""
    ((expected, none),) = generate(plain, [prompt], count)
    ((tokens, cached),) = generate(engine, [prompt], count)
    assert tokens == expected and none == 0
    return tokens, cached


def test_states_that_snapshots_copy_are_those_of_overlapping_windows(nano_artifact: Path) -> None:
    manifest = load_manifest(nano_artifact)
    assert block_tokens(manifest.kv_groups) == BLOCK
    assert [(s.name, s.empty_every) for s in manifest.state_groups] == [("compressor_4", None), ("compressor_128", 128)]
    assert [s.name for s in snapshot_states(manifest.state_groups, manifest.kv_groups)] == ["compressor_4"]


@pytest.mark.parametrize("length", [20, 255, 256, 257, 511, 512, 513, 600])
def test_an_equal_prompt(plain: Engine, engine: Engine, nano_prompts: list[list[int]], length: int) -> None:
    prompt = nano_prompts[1][:length]
    assert both(plain, engine, prompt)[1] == 0
    for _ in range(2):
        assert both(plain, engine, prompt)[1] == (length - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("shared", [256, 257, 300, 512, 520])
def test_prompts_that_part(plain: Engine, engine: Engine, nano_prompts: list[list[int]], shared: int) -> None:
    """The first resumes nowhere, the second where the first was cut by chance, the third where both have parted."""
    first = nano_prompts[1]
    tails = [nano_prompts[i][:70] for i in (2, 3)]
    assert both(plain, engine, first)[1] == 0
    both(plain, engine, first[:shared] + tails[0])
    assert both(plain, engine, first[:shared] + tails[1])[1] == shared // BLOCK * BLOCK


def test_a_conversation(plain: Engine, engine: Engine, nano_prompts: list[list[int]]) -> None:
    turn, known = list(nano_prompts[1][:200]), 0
    for i in range(4):
        tokens, cached = both(plain, engine, turn, 70)
        assert cached == known // BLOCK * BLOCK
        known = len(turn) + 70 - 1  # the last token is never computed
        turn += tokens + nano_prompts[4 + i][:40]
    assert known > 2 * BLOCK


def test_many_at_once_with_preemption(plain: Engine, engine: Engine, nano_prompts: list[list[int]]) -> None:
    system = nano_prompts[1][:530]
    prompts = [system + nano_prompts[i][: 10 + 9 * i] for i in range(2, 14)]
    expected = [tokens for tokens, _ in generate(plain, prompts)]
    step, steps = engine.step, 0

    def disturbed() -> list:  # type: ignore[type-arg]
        nonlocal steps
        steps += 1
        if steps % 9 == 0 and engine.scheduler.running:
            engine.scheduler.preempt_newest()
        return step()

    engine.step = disturbed  # type: ignore[method-assign]
    found = generate(engine, prompts)
    assert [tokens for tokens, _ in found] == expected
    assert sum(cached == 512 for _, cached in found) >= 6
    assert engine.stats().preemptions > 2


def test_it_is_on_unless_turned_off(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for on in (True, False):
        options = LaunchOptions(kv_memory_bytes=200_000_000, max_requests=2, prefix_cache=on)
        launched = launch(nano_artifact, options)
        assert (launched.engine.scheduler.prefix is not None) == on
        assert launched.engine.pool.sizes.snapshots == (4 if on else 0)
    said = ["run", str(nano_artifact), "--prompt", "The package", "--max-new-tokens", "3", "--temperature", "0"]
    memory = ["--kv-memory", "0.2", "--max-requests", "2"]
    answers = []
    for switch in ([], ["--no-prefix-cache"]):
        assert main([*said, *memory, *switch]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
