"""DSpark serving on the CPU: whatever is drafted and kept, the tokens are those of no speculation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.capturing import capture
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.compile import Options, artifact_inputs, kv_groups, largest_symbols
from dsv4c.config import StateLayout
from dsv4c.drafting import block_drafter, block_plans
from dsv4c.errors import ConfigError
from dsv4c.model import Transformer, init_state, make_draft, make_step
from dsv4c.passes import default_pipeline
from dsv4c.plan import Plan, plan
from dsv4c.program import Program
from dsv4c.runtime.blocks import BlockDrafter
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes, snapshot_states
from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.sampler import SamplerState
from dsv4c.runtime.scheduler import Limits, Span
from dsv4c.runtime.speculation import Speculation
from dsv4c.weights import stored_formats
from tests.compiled import Compiled
from tests.dspark import TINY, tiny_model

LAYOUT = StateLayout(window_page=8, block_tokens=16, extra_ring=16)
REQUESTS, CONTEXT, STEP_TOKENS = 6, 96, 48
OPTIONS = Options(max_context=CONTEXT, max_tokens=STEP_TOKENS, max_requests=REQUESTS)
PROMPTS = [[(7 * i + 3 * n) % 95 for i in range(n)] for n in (1, 2, 9, 23, 40, 60, 5, 17)]
NEW_TOKENS = 30
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def program() -> Program:
    return default_pipeline(stored_formats(TINY)).run(capture(TINY, LAYOUT))


@pytest.fixture(scope="module")
def made(program: Program) -> Plan:
    inputs, symbols = artifact_inputs(TINY, LAYOUT), largest_symbols(TINY, LAYOUT, OPTIONS)
    step = plan(program, "step", "step", "mixed", "cpu", symbols, inputs, hidden=True)
    return Plan.joined((step, *block_plans(program, "cpu", symbols, inputs)))


class Main:
    """The step as a HostRunner and a drafter see it."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.states = compiled, compiled.state
        self.hidden = torch.empty(0)

    def step(self, inputs: Mapping[str, Tensor]) -> Tensor:
        said = self.compiled.run("step", inputs)
        self.hidden = said["hidden"]
        return said["logits"]


@dataclass
class Watched:
    """A drafter whose drafts are written down: (tokens before, drafts before they are cut) of every block."""

    inner: BlockDrafter
    seen: list[tuple[list[int], tuple[int, ...]]] = field(default_factory=list)

    def draft(
        self, spans: Sequence[Span], inputs: Mapping[str, Tensor], tokens: Sequence[Sequence[int | None]],
        states: Sequence[SamplerState],
    ) -> list[tuple[int, ...]]:  # fmt: skip
        out = self.inner.draft(spans, inputs, tokens, states)
        sampling = [span for span in spans if span.samples]
        for span, found, drafts in zip(sampling, tokens, out, strict=True):
            if drafts:
                known = span.request.tokens(0, span.end - span.drafts).tolist()
                self.seen.append(([*known, *(int(t or 0) for t in found)], drafts))
        return out


Make = Callable[..., tuple[Engine, Watched | None]]


@pytest.fixture
def engine_of(made: Plan, program: Program, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    cache = Path(request.config.cache.mkdir("kernels"))

    def make(
        checkpoint: Path, drafts: int, *, price: float = 0.05, prefix_cache: bool = True
    ) -> tuple[Engine, Watched | None]:
        groups, states = kv_groups(program, made.states)
        sizes = PoolSizes.for_requests(groups, REQUESTS, CONTEXT, STEP_TOKENS, snapshots=24 if prefix_cache else 0)
        pool, rows = KVPool(groups, sizes), {g.name: sizes.pages[g.name] * g.entries_per_page for g in groups}
        state = {p.name: torch.zeros(rows[g.name], *p.entry_shape) for g in groups for p in g.pools}
        copied = snapshot_states(states, groups)
        for one in states:
            count = sizes.slots + (sizes.snapshots if one in copied else 0)
            state.update({p.name: torch.zeros(count, *p.entry_shape) for p in one.pools})
        compiled = Compiled(made, Checkpoint(checkpoint), state, tmp_path, cache)
        main, watched = Main(compiled), None
        if drafts:
            inputs = {i.name: i for name in ("dspark.absorb", "dspark.draft") for i in made.programs[name].inputs}
            absorb, draft = (partial(compiled.run, name) for name in ("dspark.absorb", "dspark.draft"))
            described = block_drafter(TINY, drafts)
            watched = Watched(
                BlockDrafter(main, absorb, draft, inputs.values(), described, lambda requests, k: 1 + price * k)
            )
        step = made.programs["step"]
        runner = HostRunner(
            main, step.inputs, pool, step.symbols, vocab_size=TINY.vocab_size,
            states=[p.name for one in copied for p in one.pools], drafter=watched,
        )  # fmt: skip
        limits = Limits(REQUESTS, STEP_TOKENS, speculative_tokens=drafts, prefix_cache=prefix_cache)
        speculation = Speculation(drafts, fixed=True)
        return Engine(
            runner, pool=pool, vocab_size=TINY.vocab_size, limits=limits, speculation=speculation
        ), watched  # fmt: skip

    return make


def generate(
    engine: Engine, params: SamplingParams, prompts: list[list[int]] = PROMPTS, preempt_every: int = 0
) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, params))
    out: list[list[int]] = [[] for _ in prompts]
    for n in itertools.count(1):
        if not engine.has_work:
            break
        if preempt_every and n % preempt_every == 0 and len(engine.scheduler.running) > 1:
            engine.scheduler.preempt_newest()
        for event in engine.step():
            assert event.end is None or event.end.error is None, event.end
            out[int(event.request_id)].extend(event.tokens)
    engine.audit()
    return out


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    write_checkpoint(folder, TINY, tiny_model(6).state_dict())
    return folder


@pytest.fixture(scope="module")
def tokens_without(made: Plan) -> dict[str, list[list[int]]]:
    """What no speculation gives, by the name of the parameters; filled by the first test that needs it."""
    return {}


def without(engine_of: Make, checkpoint: Path, known: dict[str, list[list[int]]], name: str) -> list[list[int]]:
    if name not in known:
        known[name] = generate(engine_of(checkpoint, 0)[0], {"greedy": GREEDY, "seeded": SEEDED}[name])
    return known[name]


def taught(checkpoint: Path, answers: list[list[int]], out: Path) -> Path:
    """The same main model with a Markov head that says what followed each token in these answers, and is sure of it."""
    state = load_model_state(Checkpoint(checkpoint))
    follows: dict[int, int] = {}
    for answer in answers:
        follows.update(itertools.pairwise(answer))
    w1 = torch.nn.functional.normalize(torch.randn(96, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    w2 = torch.zeros(96, 16)
    for token, after in follows.items():
        w2[after] += 30 * w1[token]
    state["mtp.2.markov_head.markov_w1.weight"], state["mtp.2.markov_head.markov_w2.weight"] = w1, w2
    state["mtp.2.confidence_head.proj.weight"] = torch.zeros(1, 80)
    write_checkpoint(out, TINY, state)
    return out


@pytest.mark.parametrize("name", ["greedy", "seeded"])
@pytest.mark.parametrize("drafts", [1, 3, 5])
def test_output_is_that_of_no_speculation(
    engine_of: Make, untrained: Path, tokens_without: dict[str, list[list[int]]], tmp_path: Path, name: str, drafts: int
) -> None:
    """More requests than fit at once, prompts in chunks, drafts kept and rejected; probabilities of 0.5 each."""
    expected = without(engine_of, untrained, tokens_without, name)
    checkpoint = taught(untrained, expected, tmp_path / "taught")
    engine, _ = engine_of(checkpoint, drafts)
    assert generate(engine, GREEDY if name == "greedy" else SEEDED) == expected
    stats = engine.speculation.stats()
    assert 0 < stats.accepted < stats.drafted
    if drafts > 1:
        assert stats.kept[1] > 0
    if drafts == 5:
        assert stats.tried[2] > stats.tried[3] == 0  # 0.5 a draft at 0.05 a token: three are worth it


def test_an_untrained_drafter_is_as_right(
    engine_of: Make, untrained: Path, tokens_without: dict[str, list[list[int]]]
) -> None:
    engine, watched = engine_of(untrained, 5)
    assert generate(engine, GREEDY) == without(engine_of, untrained, tokens_without, "greedy")
    assert watched is not None and watched.seen


def test_preempted_requests_and_reused_prefixes_give_the_same(
    engine_of: Make, untrained: Path, tokens_without: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    expected = without(engine_of, untrained, tokens_without, "greedy")
    checkpoint = taught(untrained, expected, tmp_path / "taught")
    engine, _ = engine_of(checkpoint, 4, prefix_cache=False)
    assert generate(engine, GREEDY, preempt_every=5) == expected
    assert engine.stats().preemptions > 5
    again, _ = engine_of(checkpoint, 4)
    assert generate(again, GREEDY) == expected
    assert generate(again, GREEDY) == expected
    assert again.stats().prefix_hit_tokens > 0


@torch.no_grad()
def test_drafts_are_the_plain_models(engine_of: Make, untrained: Path) -> None:
    """The rows absorbed are those that stay, the block stands behind them: every draft is what the plain model says.

    Where a prompt resumes in the prefix cache too, as the windows' pages are cached with the others.
    """
    engine, watched = engine_of(untrained, 5, price=0.0)
    for _ in range(2):
        generate(engine, GREEDY, PROMPTS[:5])
    assert engine.stats().prefix_hit_tokens > 0
    model = Transformer(TINY, LAYOUT).eval()
    model.load_state_dict(load_model_state(Checkpoint(untrained)))
    assert watched is not None and sum(len(drafts) == 5 for _, drafts in watched.seen) > 50
    at_a_pages_end = [one for one in watched.seen if len(one[0]) % LAYOUT.window_page == 0]
    for tokens, drafts in [*watched.seen[::9], *at_a_pages_end]:
        step = make_step(TINY, LAYOUT, [(0, 0, torch.tensor(tokens[:-1]))], CONTEXT)
        streams, state = model.run(step, init_state(TINY, LAYOUT, 1, CONTEXT))
        state = model.absorb(model.tap(streams), step, state)
        block = make_draft(TINY, LAYOUT, [(0, len(tokens) - 1, tokens[-1])], CONTEXT)
        expected, _ = model.draft(block, state)
        assert list(drafts) == expected[0].tolist()[: len(drafts)]  # fewer where the request ends


def test_more_drafts_than_a_block_are_refused() -> None:
    with pytest.raises(ConfigError, match="`--speculative-tokens` is 6, DSpark drafts 5 at once"):
        block_drafter(TINY, 6)
