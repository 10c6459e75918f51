"""Promises that are kept go unnoticed; each that is broken is named, with segment, call, value and row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4c.artifact import Call, Contract, Manifest, Program, manifest_from_json, manifest_to_json
from dsv4c.errors import ContractError
from dsv4c.reference import References
from dsv4c.runtime.contracts import ContractExecutor, null_rows
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Run
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from tests.runtime.devices import Planned, device_engine, drain, gathered
from tests.runtime.test_sampling_inside import device

Fault = Callable[[Mapping[str, Tensor], Call], object]


@dataclass
class Faulty:
    """References, but what `fault` does follows the first call of `op` in `scope`, or stands in its place."""

    inner: References
    manifest: Manifest
    op: str
    scope: str
    fault: Fault
    instead: bool = False

    def bind_calls(self, program: Program, calls: Sequence[Call], values: Mapping[str, Tensor]) -> list[Run]:
        out: list[Run] = []
        for call in calls:
            hit = self.manifest.kernels[call.kernel].op == self.op and call.scope == self.scope
            out += [] if hit and self.instead else self.inner.bind_calls(program, [call], values)
            if hit:
                out.append(lambda call=call: self.fault(values, call))  # type: ignore[misc]
        return out


def prompts(nano_prompts: list[list[int]]) -> list[Request]:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    return [Request(str(i), nano_prompts[1][:n], params) for i, n in enumerate((3, 70, 140))]


def error_of(engine: Engine, requests: list[Request]) -> str:
    """The message of the first request that fails."""
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                assert isinstance(event.end.error, ContractError), event.end.error
                return event.end.error.message
    raise AssertionError("nothing failed")


def test_a_sound_program_gives_what_it_gives_unchecked(nano_planned: Planned, nano_prompts: list[list[int]]) -> None:
    checked = device_engine(nano_planned, make=ContractExecutor, manifest=nano_planned.manifest)
    found = drain(checked, prompts(nano_prompts))
    assert gathered(found) == gathered(drain(device_engine(nano_planned), prompts(nano_prompts)))


def test_every_segment_of_a_plan_has_a_contract(nano_planned: Planned) -> None:
    manifest = manifest_from_json(manifest_to_json(nano_planned.manifest))
    for program in manifest.programs.values():
        strided = {b.name: b.strides for b in program.buffers if b.of is not None}
        for segment in program.segments:
            contract = segment.contract
            assert contract.padded == ("E_128", "E_4", "G", "M", "T") and contract.strides == strided
            named = {(r.value, r.low, r.below) for r in contract.ranges}
            assert {("request_rows", 0, ("R",)), ("ends_4", -1, ("T",)), ("logit_rows", 0, ("T",))} <= named
            below = {below for _, low, below in named if low == -1}
            assert ("P_c4", 64) in below and (4096,) in below  # picks, and tokens drawn
            assert {(16,), ("N_window",), ("N_c4",), ("N_c128",), ("N_index",)} <= {b for _, _, b in named}


def _output(values: Mapping[str, Tensor], call: Call) -> Tensor:
    return values[str(call.args[len(call.args) - call.outputs])]


def _leak(values: Mapping[str, Tensor], call: Call) -> None:
    """The first row takes from the last, which is padding."""
    out = _output(values, call)
    out[0] += out[-1]


def _nan(values: Mapping[str, Tensor], call: Call) -> None:
    _output(values, call)[2, 5] = torch.nan


def _far(values: Mapping[str, Tensor], call: Call) -> None:
    _output(values, call)[1, 0] = 10**6


FAULTS: Mapping[str, tuple[str, str, Fault, bool, str]] = {
    "a row that depends on padding": (
        "linear_fp8", "L02.attn", _leak, False,
        "row 0 depends on what nobody may read: element 0 is nan over bytes 0xff",
    ),
    "a call that writes nothing": (
        "hc_post_pre_norm_quantise", "L03.ffn", lambda values, call: None, True,
        "`hc_post_pre_norm_quantise` of `L03.ffn`: ",
    ),
    "NaN": ("head_norm_rope", "L04.attn", _nan, False, "row 2 holds NaN, at element 320"),
    "an expert that is none": ("gate_linear_bias", "L03.ffn", _far, False, "row 1 holds 1000000, outside [0, 16)"),
    "a pick behind the page table": (
        "index_topk_packed", "L01.attn", _far, False, "row 1 holds 1000000, outside [-1, 256)"
    ),
    "a pool row that is none": (
        "entry_slots", "prelude", lambda values, call: _output(values, call)[:1].fill_(-1), False,
        "row 0 holds -1, outside [0,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_breaks_its_promise_is_named(
    name: str, nano_planned: Planned, nano_prompts: list[list[int]]
) -> None:
    op, scope, fault, instead, message = FAULTS[name]
    binder = Faulty(nano_planned.references(), nano_planned.manifest, op, scope, fault, instead)
    options: Any = {"only": ["prefill.64.8"], "binder": binder, "manifest": nano_planned.manifest}
    engine = device_engine(nano_planned, make=ContractExecutor, **options)
    found = error_of(engine, [Request("a", nano_prompts[1][:21], SamplingParams(max_tokens=2))])
    assert found.startswith("segment 0 (graph), call ") and message in found
    assert not any(engine.pool.used_pages().values())


def test_state_that_is_somebodys_may_not_take_poison(nano_planned: Planned, nano_prompts: list[list[int]]) -> None:
    """A kernel that writes what it finds in padding into a live page."""
    page = 64

    def fault(values: Mapping[str, Tensor], call: Call) -> None:
        values["layers.0.window"][page : page + 1] = values["layers.0.window"][:1]

    binder = Faulty(nano_planned.references(), nano_planned.manifest, "qkv_norm_rope_pack", "L00.attn", fault)
    options: Any = {"only": ["prefill.64.8"], "binder": binder, "manifest": nano_planned.manifest}
    engine = device_engine(nano_planned, make=ContractExecutor, **options)
    found = error_of(engine, [Request("a", nano_prompts[1][:21], SamplingParams(max_tokens=2))])
    assert f"`layers.0.window` row {page} depends on what nobody may read" in found
    assert null_rows(nano_planned.manifest)["layers.0.window"] == page


Change = Callable[[dict[str, np.ndarray]], object]


def _set(name: str, row: int, value: float) -> Change:
    return lambda views: views[name].__setitem__(row, value)


INPUTS: Mapping[str, tuple[Change, str]] = {
    "a slot that is none": (_set("request_rows", 1, 99), "input `request_rows` row 1 is 99"),
    "padding before tokens": (_set("request_rows", 0, 0), "padding comes last"),
    "a request in two runs": (_set("request_rows", 2, 2), "the tokens of a request are in a row"),
    "a token outside the vocabulary": (_set("token_ids", 1, 47), "`token_ids` row 1 is 47"),
    "padding that is in flight": (_set("token_ids", 31, -1), "`token_ids` row 31 is -1"),
    "a position left out": (_set("positions", 1, 5), "one behind the other"),
    "a position behind the context": (_set("positions", 1, 4096), "`positions` row 1 is 4096"),
    "padding at a position": (_set("positions", 31, 3), "padding is at position 0"),
    "a start that is not its first token's": (
        lambda views: views["seq_starts"].fill(9), "`seq_starts` row 1 is 9; wanted: the position of its first token"
    ),
    "an end before its last token": (
        lambda views: views["seq_ends"].__setitem__(1, 1), "wanted: behind its last token"
    ),
    "the null slot's end within reach": (_set("seq_ends", 0, 7), "far away for the null slot"),
    "an end left out": (_set("ends_4", 0, -1), "input `ends_4` row 0 is -1"),
    "an end that completes nothing": (_set("ends_4", 5, 8), "`ends_4` row 5 is 8"),
    "logits of padding": (_set("logit_rows", 0, 30), "`logit_rows` row 0 is 30"),
    "somebody else's seat": (_set("token_seats", 0, 3), "the slot of the row's token"),
    "a seat for two rows": (_set("token_seats", 1, 1), "a seat has one row"),
    "a temperature below 0": (_set("temperature", 1, -1.0), "from 0.0 to inf"),
    "no temperature": (_set("temperature", 0, np.nan), "`temperature` row 0 is nan"),
    "edits that end before they begin": (_set("edit_starts", 0, 4), "at most its stop"),
    "an edit outside the vocabulary": (_set("edit_tokens", 1, 47), "`edit_tokens` row 1 is 47"),
    "a token edited twice": (_set("edit_tokens", 1, 2), "edits a token twice"),
    "a mask that is none": (_set("mask_rows", 1, 99), "`mask_rows` row 1 is 99"),
    "an edit that is no number": (_set("edit_values", 0, np.nan), "wanted: numbers"),
}  # fmt: skip


def run_with(change: Change) -> str:
    """What a step of two prompts fails with when its inputs are changed: 9 tokens of slot 1, then 3 of slot 2."""
    engine = device(checked=True)
    assert isinstance(engine.runner, DeviceRunner)
    staging = engine.runner.executor.staging
    begin, send = staging.begin, staging.send
    views: dict[str, Any] = {}

    def begun(name: str) -> dict[str, Any]:
        views.update(begin(name))
        return views

    def sent(name: str, edits: int = 0) -> None:
        change(views)
        send(name, edits)

    staging.begin, staging.send = begun, sent  # type: ignore[method-assign]
    bias = SamplingParams(max_tokens=2, temperature=0.0, logit_bias={2: 1.0, 3: -1.0})
    return error_of(engine, [Request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], bias), Request("b", [1, 2, 3])])


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_not_what_they_must_be_are_named(name: str) -> None:
    change, message = INPUTS[name]
    assert message in run_with(change)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (0, "is 0; wanted: pages of `c4` that a live token reads"),
        (10**6, "is 1000000; wanted: pages of `c4`"),
        (None, "both write"),
    ],
)
def test_page_tables_hold_pages_of_their_own_behind_live_tokens(page: int | None, message: str) -> None:
    engine = device(checked=True)
    assert isinstance(engine.runner, DeviceRunner)
    table = engine.runner.executor.tables.tensors["c4"]
    update = engine.runner.executor.tables.update

    def spoiled(changes: Any) -> None:
        update(changes)
        table[1, 0] = int(table[2, 0]) if page is None else page

    engine.runner.executor.tables.update = spoiled  # type: ignore[method-assign]
    found = error_of(engine, [Request("a", [1, 2, 3]), Request("b", [4, 5])])
    assert message.replace("both write", "write the same page") in found


def test_a_tensor_with_other_strides_than_planned_is_refused(nano_planned: Planned) -> None:
    name = "layers.0.attn.wq_b.weight.data"
    weights = {**nano_planned.weights, name: nano_planned.weights[name].t().contiguous().t()}
    spoiled = Planned(nano_planned.program, nano_planned.manifest, weights, nano_planned.plain)
    options: Any = {"only": ["decode.1", "prefill.64.8"], "manifest": nano_planned.manifest}
    with pytest.raises(ContractError, match=f"`{name}` of `decode.1` is not dense"):
        device_engine(spoiled, make=ContractExecutor, **options)
    assert Contract() == Contract((), {}, ())
    assert isinstance(device_engine(spoiled, make=GraphExecutor, only=options["only"]).runner, DeviceRunner)
