"""Drafts made and verified inside a GPU program, by references: no token changes, and every promise is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.chat.codec import ChatCodec
from dsv4c.compile import Options
from dsv4c.errors import ContractError
from dsv4c.runtime.contracts import ContractExecutor
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.grammar import Grammars, GrammarSource
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import linear_cost, predicted_cost
from dsv4c.runtime.step_check import StepBounds, check_step
from tests.runtime.devices import PatientRunner, Planned, RowByRow, device_engine, drain, gathered, tokens_of

DRAFTS = 2
SIZES = {"max_context": 256, "max_tokens": 64, "max_requests": 2}


@pytest.fixture(scope="module")
def planned(nano_dir: Path) -> Planned:
    return Planned.of(nano_dir, Options(speculative_tokens=DRAFTS, **SIZES))


def engine_of(planned: Planned, drafts: int, **options: Any) -> Engine:
    limits = Limits(
        max_requests=2,
        max_step_tokens=64,
        max_logit_rows=64,
        speculative_tokens=drafts,
        mixed_drafts=False,
        late_masks=True,
    )
    return device_engine(planned, requests=2, context=256, limits=limits, **options)


def requests(prompts: list[list[int]], **params: Any) -> list[Request]:
    params = {"max_tokens": 14, "temperature": 0.0, "ignore_eos": True, "logprobs": 2, "seed": 3, **params}
    return [Request(str(i), prompts[i][:n], SamplingParams(**params)) for i, n in enumerate((5, 77, 30))]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "masked": {"temperature": 0.6, "min_tokens": 5, "stop_token_ids": (260, 300), "logit_bias": {260: 3.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logprobs_are_those_without_speculation(
    planned: Planned, nano_prompts: list[list[int]], kind: str
) -> None:
    def run(drafts: int, **options: Any) -> tuple[Any, Engine]:
        engine = engine_of(planned, drafts, binder=planned.references(RowByRow), **options)
        return drain(engine, requests(nano_prompts, **KINDS[kind])), engine

    expected, plain = run(0)
    found, engine = run(DRAFTS)
    assert gathered(found) == gathered(expected)
    stats = engine.stats().speculation
    assert stats.accepted > 0 and engine.stats().steps < plain.stats().steps
    if kind == "greedy":
        late, _ = run(DRAFTS, runner=PatientRunner)
        assert gathered(late) == gathered(expected)


def changing(engine: Engine) -> Engine:
    """Another number of drafts in every step."""
    numbers = itertools.cycle((2, 0, 1, 1, 0, 2, 2))
    engine.scheduler._lengths = lambda requests: next(numbers)
    return engine


def test_contracts_hold_and_change_nothing(planned: Planned, nano_prompts: list[list[int]]) -> None:
    def asked() -> list[Request]:
        return requests(nano_prompts, temperature=0.7, frequency_penalty=0.3)

    checked = changing(engine_of(planned, DRAFTS, make=ContractExecutor, manifest=planned.manifest))
    found = drain(checked, asked())
    assert tokens_of(found) == tokens_of(drain(changing(engine_of(planned, DRAFTS)), asked()))
    bound = {"binder": planned.references(RowByRow)}
    assert tokens_of(drain(changing(engine_of(planned, DRAFTS, **bound)), asked())) == tokens_of(
        drain(engine_of(planned, 0, **bound), asked())
    )
    contracts = [s.contract for p in planned.manifest.programs.values() for s in p.segments]
    assert all({"D", "T"} <= set(contract.padded) for contract in contracts)


def test_only_requests_without_a_grammar_verify_drafts(
    planned: Planned, nano_dir: Path, nano_prompts: list[list[int]]
) -> None:
    """One that has one, with nobody and with a neighbour that drafts: the same tokens as without speculation."""
    source = json.dumps({"grammars": [{"lark_grammar": "start: /([a-z]{2,6} )+/"}]})
    codec = ChatCodec.from_folder(nano_dir)
    grammar = Grammars(codec).build(GrammarSource(source, "regex"))

    def asked() -> list[Request]:
        first, *others = requests(nano_prompts, temperature=0.8, logit_bias={260: 2.0})
        ruled = dataclasses.replace(first.params, grammar=grammar, max_tokens=20, min_tokens=4)
        return [Request(first.id, first.tokens(), ruled), *others]

    binder = {"binder": planned.references(RowByRow)}
    expected = gathered(drain(engine_of(planned, 0, **binder), asked()))
    engine = engine_of(planned, DRAFTS, **binder)
    assert gathered(drain(engine, asked())) == expected
    assert re.fullmatch("([a-z]{2,6} )+[a-z]{0,6}", codec.decode(expected["0"][0]))
    assert engine.stats().speculation.drafted > 0
    alone = engine_of(planned, DRAFTS, **binder)
    assert gathered(drain(alone, asked()[:1]))["0"] == expected["0"]
    assert alone.stats().speculation.drafted == 0


def test_the_compiler_predicts_what_drafts_cost(planned: Planned) -> None:
    cost = predicted_cost(planned.manifest.programs.values())
    assert 0 < cost(1, 0) < cost(1, 1) < cost(1, 2) and cost(1, 0) <= cost(2, 0)
    assert cost(2, 1) < 3 * cost(2, 0), "a draft is not a step of its own"
    assert predicted_cost(()) is linear_cost


def test_inputs_that_are_completed_in_place_order_their_readers(planned: Planned) -> None:
    """`place_tokens` writes `next_ids`; whoever reads them comes behind it, in its lane or by waiting."""
    kernels = planned.manifest.kernels
    for program in (p for p in planned.manifest.programs.values() if "next_ids" in {i.name for i in p.inputs}):
        calls = [call for segment in program.segments for call in segment.calls]
        (writer,) = (i for i, call in enumerate(calls) if kernels[call.kernel].op == "place_tokens")
        behind: list[set[int]] = []  # of each call: those that are over when it begins
        for i, call in enumerate(calls):
            near = [j for j in range(i) if calls[j].lane == call.lane][-1:] + [wait.call for wait in call.waits]
            behind.append(set(near).union(*(behind[j] for j in near)))
        readers = [i for i, call in enumerate(calls) if i != writer and "next_ids" in call.args]
        assert readers and all(writer in behind[i] for i in readers)


def test_a_step_of_nobody_changes_nothing_that_is_somebodys(planned: Planned) -> None:
    engine = engine_of(planned, DRAFTS)
    executor: Any = engine.runner.executor  # type: ignore[attr-defined]
    for state in executor.states.values():
        state.random_(0, 2) if not state.dtype.is_floating_point else state.fill_(1)
    before = {name: state.clone() for name, state in executor.states.items()}
    for name in executor.programs:
        executor.staging.begin(name)
        executor.staging.send(name)
        executor.launch(name)
    for name in ("sampling.pending", "sampling.length", "sampling.counts"):
        assert torch.equal(executor.states[name][1:], before[name][1:]), name


# --- inputs that break the contract of a step ---------------------------------------------------------------------

Change = Callable[[dict[str, np.ndarray]], object]


def _set(name: str, row: int, value: float) -> Change:
    return lambda views: views[name].__setitem__(row, value)


FAULTS: Mapping[str, tuple[Change, str]] = {
    "a draft too many": (_set("token_ids", 1, -4), "`token_ids` row 1 is -4"),
    "a place left out": (_set("positions", 1, -3), "one behind the other"),
    "a place behind the context": (_set("positions", 1, -9), "wanted: at least 1 and below 4"),
    "no end where one may be": (_set("ends_4", 0, -1), "`ends_4` row 0 is -1"),
    "a start that is known": (_set("seq_starts", 1, 30), "`seq_starts` row 1 is 30"),
    "rows of nobody": (_set("draft_seats", 0, 0), "padding comes last"),
    "a row that is none": (_set("draft_starts", 0, 99), "`draft_starts` row 0 is 99"),
    "more drafts than there are": (_set("draft_limits", 0, 3), "`draft_limits` row 0 is 3"),
    "a chain that skips": (_set("chain", 1, 2), "drafts before the row"),
    "another's seat": (_set("draft_seats", 1, 1), "the seat of its first row"),
    "a temperature below 0": (_set("draft_temperature", 1, -1.0), "`draft_temperature` row 1 is -1.0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_inputs_that_break_their_contract_are_named(planned: Planned, name: str) -> None:
    change, message = FAULTS[name]
    engine = engine_of(planned, DRAFTS)
    for i in range(2):
        engine.submit(Request(str(i), [5, 6, 7 + i], SamplingParams(max_tokens=20, ignore_eos=True)))
    executor: Any = engine.runner.executor  # type: ignore[attr-defined]
    for _ in range(4):
        engine.step()
    program = next(n for n, p in executor.programs.items() if p.phase == "decode" and p.symbols["T"] == 2 * 3)
    manifest = planned.manifest
    pools = {g.name: executor.states[g.pools[0].name].shape[0] // g.entries_per_page for g in manifest.kv_groups}
    bounds = StepBounds(manifest.kv_groups, pools, executor.rows["R"], 256, manifest.vocab_size)
    views = {i.name: executor._bound[program].values[i.name].numpy().copy() for i in executor.programs[program].inputs}
    lengths = executor.states["sampling.length"].numpy() - 1  # as they were before the step, or less
    check_step(executor.programs[program], views, bounds, lengths)
    change(views)
    with pytest.raises(ContractError) as error:
        check_step(executor.programs[program], views, bounds, lengths)
    assert message in str(error.value)
