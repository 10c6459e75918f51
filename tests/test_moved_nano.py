"""The compiled nano model, with and without its MTP block: what one engine has computed, another goes on from.

State is read as a stream would: whole pages as they become final, and in the last step each pool behind its mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dsv4c.artifact import KVGroup, Manifest, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import Target
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.loader import load
from dsv4c.runtime.marks import marks_of
from dsv4c.runtime.moving import Arrival
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.pools import pool_layout
from dsv4c.runtime.poolsizes import PoolSizes, first_page
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import Speculation

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 129, 256, 300, 600)


@pytest.fixture(scope="module")
def drafting(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano compiled to draft up to 2 tokens."""
    folder, options = tmp_path_factory.mktemp("moving") / "nano", Options(speculative_tokens=2)
    config = Checkpoint(nano_dir).config
    compile_artifact(config, Target("cpu"), folder, options, checkpoint=nano_dir, cache=ROOT / "build" / "kernels")
    return folder


def make_engine(artifact: Path, *, step_tokens: int = 96, drafts: int = 0) -> tuple[Engine, ArtifactExecutor]:
    """An engine whose pools lie in one piece of memory."""
    manifest = load_manifest(artifact)
    sizes = PoolSizes.for_requests(manifest.kv_groups, 4, 1024, step_tokens, snapshots=4)
    memory = bytearray(pool_layout(manifest, sizes).total_bytes)
    executor = load(artifact, Checkpoint(artifact / "weights"), sizes, manifest=manifest, memory=memory)
    limits = Limits(max_requests=4, max_step_tokens=step_tokens, speculative_tokens=drafts)
    policy = Speculation(drafts, fixed=True)
    return Engine.for_manifest(executor, manifest, sizes, limits=limits, speculation=policy), executor


class Stream:
    """Progress on one side, Transfers on the other: copies everything once, when it is first said to be final."""

    def __init__(self, manifest: Manifest, source: tuple[Engine, ArtifactExecutor], target: ArtifactExecutor) -> None:
        self.manifest, (self.engine, executor), self.target = manifest, source, target
        self.source = executor
        groups = [*manifest.kv_groups, *manifest.state_groups]
        self.marks = marks_of(manifest.programs["step"], [pool.name for g in groups for pool in g.pools])
        self.arrival: Arrival | None = None
        self.request: Request | None = None
        self.last = False
        self.copied = 0
        self.done: set[str] = set()
        self.by_mark = 0

    def begin(self, arrival: Arrival, /) -> None:
        self.arrival, self.done, self.by_mark = arrival, set(), 0
        self.copied = arrival.start

    def admitted(self, request: Request, /) -> None:
        self.request = request

    def launching(self, request: Request, end: int, /) -> None:
        assert self.arrival is not None
        self.last = end == self.arrival.target

    def mark(self, number: int, /) -> None:
        if self.last:
            for name in self.marks[number]:
                self.finish(name)
                self.by_mark += 1

    def computed(self, request: Request, tokens: int, /) -> None:
        assert self.arrival is not None
        for group in (g for g in self.manifest.kv_groups if g.horizon is None):
            for pool in group.pools if tokens < self.arrival.target else ():
                self.copy(group, pool.name, self.copied // group.page_tokens, tokens // group.page_tokens)
        if tokens < self.arrival.target:
            self.copied = max(self.copied, tokens // 256 * 256)
        else:
            for g in (*self.manifest.kv_groups, *self.manifest.state_groups):
                for pool in g.pools:
                    self.finish(pool.name)

    def finish(self, name: str) -> None:
        """What is left of a pool."""
        assert self.arrival is not None and self.request is not None
        if name in self.done:
            return
        self.done.add(name)
        target = self.arrival.target
        for group in self.manifest.kv_groups:
            if name in {pool.name for pool in group.pools}:
                first = self.copied // group.page_tokens if group.horizon is None else first_page(group, target)
                self.copy(group, name, first, -(-target // group.page_tokens))
        for state in self.manifest.state_groups:
            if name in {pool.name for pool in state.pools} and not state.empty_at(target):
                self.target.states[name][self.arrival.slot] = self.source.states[name][self.request.slot]

    def copy(self, group: KVGroup, name: str, first: int, end: int) -> None:
        assert self.arrival is not None and self.request is not None
        n, (column, pages) = group.entries_per_page, self.arrival.tables[group.name]
        for at in range(first, end):
            a, b = int(self.engine.pool.tables[group.name][self.request.slot, at]), pages[at - column]
            self.target.states[name][b * n : (b + 1) * n] = self.source.states[name][a * n : (a + 1) * n]

    def preempted(self, request: Request, /) -> None:
        raise AssertionError

    def ended(self, request: Request | str, complete: bool = False, /) -> None:
        assert complete


def drain(engine: Engine) -> list[Event]:
    out = []
    while not engine.idle:
        out += engine.step()
    return out


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


def params(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.7, seed=3, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("drafts", [0, 2])
def test_another_engine_goes_on_with_the_same_tokens(
    drafts: int, request: pytest.FixtureRequest, nano_prompts: list[list[int]]
) -> None:
    artifact: Path = request.getfixturevalue("drafting" if drafts else "nano_artifact")
    manifest = load_manifest(artifact)
    one, prefill, decode = (make_engine(artifact, drafts=drafts) for _ in range(3))
    stream = Stream(manifest, prefill, decode[1])
    prefill[0].connect(progress=stream)
    decode[0].connect(transfers=stream)
    prompt = next(p for p in nano_prompts if len(p) >= 600)
    generated: list[int] = []
    for length in LENGTHS:
        one[0].submit(Request("a", prompt[:length], params(12)))
        whole = drain(one[0])
        given = tokens_of(whole)[:3] if length == 129 else []
        decode[0].submit(Request("a", prompt[:length], params(12), generated=given, moving=True))
        assert drain(decode[0]) == []
        prefill[0].submit(Request("a", prompt[:length], params(len(given) + 1), generated=given, keep=True))
        first = drain(prefill[0])
        assert stream.by_mark == sum(map(len, stream.marks)) and stream.arrival is not None
        prefill[0].let_go("a")
        events = [*decode[0].arrived("a", first[-1]), *drain(decode[0])]
        assert given + tokens_of(events) == tokens_of(whole)
        assert [x.token_id for e in events for x in e.logprobs] == tokens_of(events)
        generated += tokens_of(events)
        for engine, _ in (prefill, decode):
            engine.audit()
            assert not any(engine.pool.used_pages().values())
    assert stream.arrival is not None and stream.arrival.start == 512 - 256, "600 tokens begin with 300 of before"
    if drafts:
        kept = [e[0].stats().speculation.accepted for e in (one, decode)]
        assert kept[1] >= 0.8 * kept[0] > 0, "the block's own window has come along"


def test_marks_follow_the_layers(nano_artifact: Path) -> None:
    manifest = load_manifest(nano_artifact)
    names = [pool.name for g in (*manifest.kv_groups, *manifest.state_groups) for pool in g.pools]
    marks = marks_of(manifest.programs["step"], names)
    assert sorted(name for mark in marks for name in mark) == sorted(names)
    assert [{name.split(".")[1] for name in mark} for mark in marks] == [{str(layer)} for layer in range(6)]
    assert marks_of(manifest.programs["step"], ["elsewhere"]) == ()


def test_a_step_with_marks_computes_the_same(nano_artifact: Path, nano_prompts: list[list[int]]) -> None:
    answers = []
    for keep in (False, True):
        engine, executor = make_engine(nano_artifact, step_tokens=64)
        marks: list[int] = []
        assert isinstance(engine.runner, HostRunner)
        engine.runner.on_mark = marks.append
        engine.submit(Request("a", nano_prompts[0][:16], params(5), keep=keep))
        answers.append(tokens_of(drain(engine)))
        assert marks == [*range(6)] * 5 * keep
        assert torch.isfinite(executor.states["layers.0.window"]).all()
    assert answers[0] == answers[1]
