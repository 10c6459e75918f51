"""Grammars on a device: the tokens, log-probabilities and ends that the host's sampler gives, in any company."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import EngineError
from dsv4c.ops.sampling import mask
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.grammar import Cursor, Grammar, Grammars, GrammarSource, fill_masks, fill_wide
from dsv4c.runtime.graphs import pieces_of
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import SamplerState, sample
from tests.runtime import toy
from tests.runtime.devices import PatientRunner, drain, gathered, tokens_of
from tests.runtime.live import TOKENS, ToyCodec
from tests.runtime.test_sampling_inside import PARAMS, device, host, sizes_of, token

PATTERNS = (r"[c-z]{4,9}", r"(en|d)( (f|[0-3]+))*\.?", r"x?", r"[^c-y]{0,12}z", r"([c0-3]{2} )+", r"(.|\n)*", r"cd?")
EOS = 5


class SmallCodec(ToyCodec):
    """As many tokens as the toy has, or fewer."""

    eos_token_ids = (EOS,)
    added_token_ids = frozenset(range(6))

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def vocabulary(self) -> list[bytes]:
        return TOKENS[: self.vocab_size]


SIZES = (toy.VOCAB, 40, 32)
MADE = {size: Grammars(SmallCodec(size)) for size in SIZES}


def regex(pattern: str, size: int = toy.VOCAB) -> Grammar:
    source = json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]})
    return MADE[size].build(GrammarSource(source, "regex"))


RULES = st.one_of(st.none(), st.tuples(st.sampled_from(PATTERNS), st.sampled_from(SIZES)))
ASKED = st.lists(
    st.tuples(st.lists(token, min_size=1, max_size=40), PARAMS, RULES, st.booleans()), min_size=1, max_size=10
)


def requests(asked: Sequence[tuple[list[int], dict[str, Any], tuple[str, int] | None, bool]]) -> list[Request]:
    """One size of vocabulary a batch, as an engine has."""
    size = next((rule[1] for _, _, rule, _ in asked if rule), toy.VOCAB)
    return [
        Request(
            str(i),
            prompt,
            SamplingParams(**params, ignore_eos=on, grammar=None if rule is None else regex(rule[0], size)),
        )
        for i, (prompt, params, rule, on) in enumerate(asked)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(asked=ASKED, seed=st.integers(0, 100), pages=st.sampled_from([None, 40]))
def test_the_device_gives_what_the_host_gives(asked: Any, seed: int, pages: int | None) -> None:
    """With neighbours that have no grammar, prompts in chunks, preemption, penalties, bias, stops and `min_tokens`."""
    sizes = sizes_of(pages)
    wanted = gathered(drain(host(seed, sizes), requests(asked)))
    engine = device(seed, sizes=sizes)
    assert gathered(drain(engine, requests(asked))) == wanted
    assert gathered(drain(engine, requests(asked))) == wanted, "masks of earlier steps must not matter"
    late = device(seed, PatientRunner, sizes)
    assert gathered(drain(late, requests(asked))) == wanted


@settings(max_examples=12, deadline=None, derandomize=True)
@given(asked=ASKED)
def test_contracts_hold_and_change_nothing(asked: Any) -> None:
    assert gathered(drain(device(checked=True), requests(asked))) == gathered(drain(device(), requests(asked)))


def test_preempted_requests_go_on_where_their_grammar_stands() -> None:
    params = {"max_tokens": 40, "temperature": 0.9, "logprobs": 2, "repetition_penalty": 1.2, "seed": 4}
    rule: list[str | None] = [r"([c-z]{3} )+", None, r"([0-5]{2} )+", r"[^c-y]{30,50}!", None]

    def asked() -> list[Request]:
        given = [None if r is None else regex(r) for r in rule]
        return [Request(str(i), [i + 1, i + 2], SamplingParams(**params, grammar=g)) for i, g in enumerate(given)]

    engine = device(sizes=sizes_of(9))
    found = gathered(drain(engine, asked()))
    assert engine.scheduler.num_preemptions > 0
    assert found == gathered(drain(host(), asked()))


def test_nobody_waits_for_a_token_in_flight() -> None:
    """Steps with a grammar are launched one ahead, all but their sampling."""
    asked = [
        Request("a", [7], SamplingParams(max_tokens=16, grammar=regex("[c-z]+"), ignore_eos=True, seed=2)),
        Request("b", [8], SamplingParams(max_tokens=16, ignore_eos=True, seed=3)),
    ]
    engine = device()
    found = tokens_of(drain(engine, asked))
    assert len(found["a"]) == len(found["b"]) == 16
    assert engine.stats().steps == 16


def test_steps_without_a_grammar_leave_nothing_for_later() -> None:
    class Watched(DeviceRunner):
        def launch(self, spans: Any, /) -> Any:
            ticket = super().launch(spans)
            ruled = [s.request for s in spans if s.request.params.grammar is not None]
            assert (ticket.results is None) == any(r.num_inflight for r in ruled)
            late.append(ticket.results is None)
            return ticket

    for grammar in (None, regex("[c-z]+")):
        late: list[bool] = []
        params = SamplingParams(max_tokens=9, ignore_eos=True, grammar=grammar)
        drain(device(runner=Watched), [Request("a", [7], params), Request("b", [8], SamplingParams(max_tokens=9))])
        assert late.count(True) == (8 if grammar is not None else 0)


def test_masks_are_sent_when_the_model_is_under_way() -> None:
    """And not at all in steps without a grammar."""
    engine, order = device(), []
    assert isinstance(engine.runner, DeviceRunner)
    executor = engine.runner.executor
    send = executor.staging.send_masks

    def sent(name: str, count: int) -> None:
        order.append(count)
        send(name, count)

    executor.staging.send_masks = sent  # type: ignore[method-assign]
    for bound in executor._bound.values():
        bound.replays = [
            (lambda run=run, i=i: (order.append(f"piece {i}"), run())) for i, run in enumerate(bound.replays)
        ]
        bound.whole = [lambda run=run: (order.append("whole"), run()) for run in bound.whole]
    drain(engine, [Request("a", [7], SamplingParams(max_tokens=1))])
    assert order == ["whole", "whole"]  # as on this machine, where nothing is captured
    order.clear()
    both = [Request(str(i), [7], SamplingParams(max_tokens=1, grammar=regex("[c-z]+"))) for i in range(2)]
    drain(engine, both)
    assert order == ["piece 0", 2, "piece 1"]
    order.clear()
    drain(engine, [Request("a", [7], SamplingParams(max_tokens=2, ignore_eos=True, grammar=regex("[c-z]+")))])
    assert order == ["piece 0", 1, "piece 1"] * 2
    for program in toy.manifest().programs.values():
        first, second = pieces_of(program)
        assert second.masked and second.calls[0].scope == "sampling" and not first.masked


# --- faults -----------------------------------------------------------------------------------------------------------


def ends_of(engine: Engine, asked: Sequence[Request]) -> dict[str, Any]:
    for request in asked:
        engine.submit(request)
    out = {}
    while engine.has_work:
        for event in engine.step():
            if event.end is not None:
                out[event.request_id] = event.end
    engine.audit()
    return out


def both() -> list[Request]:
    params = SamplingParams(max_tokens=6, temperature=0.0, grammar=regex("[c-z]+"))
    return [Request("a", [7], params), Request("b", [7], dataclasses.replace(params, grammar=None))]


def test_a_mask_that_lets_nothing_follow_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cursor, "fill", lambda self, row: row.fill(0))
    ends = ends_of(device(), both())
    assert ends["a"].reason == "failed" and "its grammar lets nothing follow" in ends["a"].error.message
    assert ends["b"].reason in ("length", "stop")


def test_a_grammar_that_cannot_be_followed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: Cursor, row: Any) -> None:
        row.fill(-1)
        self.fault = EngineError("it grew too complex")

    monkeypatch.setattr(Cursor, "fill", fill)
    ends = ends_of(device(), both())
    assert "it grew too complex" in ends["a"].error.message and ends["b"].error is None


def test_masks_that_cannot_be_filled_end_the_step_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fill, left = device(), fill_wide, [0]

    def fill_some(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no mask")
        fill(*args)

    for good in (0, 1, 3):  # in `launch`, or in `finish`
        with monkeypatch.context() as patch:
            left[0] = good
            patch.setattr("dsv4c.runtime.device.fill_wide", fill_some)
            ends = ends_of(engine, both())
            assert "no mask" in ends["a"].error.message
        assert engine.stats().failed_steps and not engine.has_work
    assert gathered(drain(engine, both())) == gathered(drain(host(), both()))


def test_logits_that_are_no_numbers_fail_their_request_alone() -> None:
    bank = toy.bank()
    bank[7] = torch.nan
    good = Request("b", [8], SamplingParams(max_tokens=4, temperature=0.0, logit_bias={7: -100.0}))
    ends = ends_of(device(bank=bank), [both()[0], good])
    assert "NaN" in ends["a"].error.message and ends["b"].error is None


def test_a_number_that_is_none_behind_a_mask_is_not_seen() -> None:
    """On the host and on the device."""
    bank = toy.bank()
    bank[:, 40] = torch.nan  # no letter
    ends = ends_of(device(bank=bank), both())
    assert ends["a"].error is None and "NaN" in ends["b"].error.message


def test_another_models_grammar_is_refused() -> None:
    runner = device().runner
    assert isinstance(runner, DeviceRunner)
    request = both()[0]
    assert request.params.grammar is not None
    runner._vocab_size = toy.VOCAB - 1
    with pytest.raises(EngineError, match="knows"):
        runner.check(request)


# --- one mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_is_what_the_hosts_sampler_masks(pattern: str, size: int) -> None:
    """Tokens beyond the grammar's vocabulary, stop tokens until `min_tokens`, and behind the end."""
    generator = torch.Generator().manual_seed(size)
    for stops, least in (((EOS,), 0), ((EOS,), 30), ((EOS, 7, 9), 30), ((), 0)):
        params = SamplingParams(temperature=0.0, min_tokens=least, max_tokens=30, grammar=regex(pattern, size))
        state = SamplerState(params, np.zeros(1, np.int64), stops)
        assert state.grammar is not None
        for _ in range(6):
            logits = torch.randn(1, toy.VOCAB, generator=generator)
            row = np.full((2, -(-toy.VOCAB // 32)), 77, np.int32)
            fill_wide(row[1:], [state.grammar], size, {0: stops} if state.masks else {})
            masked = mask(logits, torch.tensor([1]), torch.from_numpy(row))
            (chosen,), _ = sample(logits, [state])
            best = float(masked.max())
            assert chosen == (int(masked.argmax()) if best > -torch.inf else None)
            if chosen is None:
                break
            state.accept(chosen)


def test_rows_without_a_mask_read_none() -> None:
    logits = torch.randn(3, 70)
    masks = torch.zeros(2, 3, dtype=torch.int32)
    masks[1, 2] = 1 << 5
    masked = mask(logits, torch.tensor([0, 1, 0]), masks)
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    assert (masked[1] > -torch.inf).nonzero().flatten().tolist() == [69]


def test_a_full_mask_of_fewer_tokens_lets_all_others_follow() -> None:
    cursor = regex("cd").start([EOS]).ahead([8, 8])  # behind a token that cannot follow
    (wanted,) = fill_masks([cursor], 40)
    row = np.zeros((1, 2), np.int32)
    fill_wide(row, [cursor], 40, {})
    assert (row == -1).all() and (wanted == -1).all()


def test_a_grammar_that_runs_into_its_limits_is_at_fault_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = llguidance.LLParserLimits(verbose_errors=False, step_max_items=60)
    monkeypatch.setattr("dsv4c.runtime.grammar._LIMITS", limits)
    source = json.dumps({"grammars": [{"lark_grammar": 'start: s\ns: "c" s "d" | s s | "c"'}]})
    heavy = MADE[toy.VOCAB].build(GrammarSource(source, "grammar"))
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias={6: 50.0}, grammar=heavy)
    free = dataclasses.replace(params, grammar=None, ignore_eos=True)
    for engine in (host(), device()):
        ends = ends_of(engine, [Request("a", [7], params), Request("b", [7], free)])
        assert ends["a"].reason == "failed" and "Too many items" in ends["a"].error.message
        assert ends["b"].reason == "length"
