"""GPU programs on this machine: planned for a card, run by the references of their ops."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.artifact import Call, Manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, lower, planned_manifest
from dsv4c.config import Target
from dsv4c.ops import Op
from dsv4c.program import Program
from dsv4c.reference import Reference, References, plain_weights
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Binder
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import bounds_of
from dsv4c.runtime.loader import device_rows
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import Speculation
from dsv4c.runtime.weights import load_weights

CPU = torch.device("cpu")
OPTIONS = Options(max_context=1024, max_tokens=256, max_requests=8)
Make = Callable[..., GraphExecutor]


@dataclass(frozen=True)
class Planned:
    """An artifact for a card with no kernel built, and the weights that its references take."""

    program: Program
    manifest: Manifest
    weights: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Path, options: Options = OPTIONS) -> Planned:
        source = Checkpoint(checkpoint)
        program = lower(source.config, options, arch="sm_90a")
        manifest = planned_manifest(program, Target("sm_90a"), options)
        weights, _ = load_weights(manifest.weights, source)
        return cls(program, manifest, weights, plain_weights(manifest, weights))

    def references(self, kind: type[References] = References) -> References:
        return kind(self.manifest.kernels, self.plain)


def row_by_row(op: Op) -> Op:
    """The op made for one row of its batch at a time: products of matrices whose sums depend on no other row."""
    rows = [name == "token_ids" or "_T" in name for name in op.parameters]

    @functools.wraps(op.reference)
    def run(*args: Tensor, **attrs: Any) -> Any:
        count = next(arg for arg, row in zip(args, rows, strict=True) if row).shape[0]
        one = [
            op.reference(*(a[i : i + 1] if row else a for a, row in zip(args, rows, strict=True)), **attrs)
            for i in range(count)
        ]
        if isinstance(one[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*one, strict=True))
        return torch.cat(one)

    return dataclasses.replace(op, reference=run) if op.name in _PRODUCTS else op


_PRODUCTS = frozenset(
    {
        "linear_fp8", "grouped_linear_fp8", "linear_mixed", "gate_linear_bias", "gate_linear_hash", "experts_fp4",
        "hc_pre_norm_quantise", "hc_post_pre_norm_quantise", "hc_head_norm",
    }
)  # fmt: skip


class RowByRow(References):
    """References that give a token the same bits in any batch. A rounding that falls the other way moves everything."""

    def reference(self, call: Call) -> Reference:
        found = super().reference(call)
        return dataclasses.replace(found, op=row_by_row(found.op))


class PatientRunner(DeviceRunner):
    """A DeviceRunner whose tokens are known before the next step: no token is fed from the device."""

    lag = 0


def device_engine(
    planned: Planned,
    *,
    requests: int = 8,
    context: int = 1024,
    limits: Limits | None = None,
    make: Make = GraphExecutor,
    binder: Binder | None = None,
    only: Iterable[str] | None = None,
    runner: type[DeviceRunner] = DeviceRunner,
    **options: Any,
) -> Engine:
    """An engine over references. `only`: the programs that it has; `options` go to `make`."""
    manifest = planned.manifest
    bounds = bounds_of(manifest)
    sizes = PoolSizes.for_requests(manifest.kv_groups, requests, context, step_tokens=bounds.tokens)
    programs = {name: manifest.programs[name] for name in only or manifest.programs}
    states, rows = allocate(manifest, sizes, CPU), device_rows(manifest, sizes)
    executor = make(programs, binder or planned.references(), planned.weights, states, CPU, rows=rows, **options)
    pool = KVPool(manifest.kv_groups, sizes, track=True)
    made = runner(executor, pool, vocab_size=manifest.vocab_size)
    limits = limits or Limits(
        max_requests=requests, max_step_tokens=bounds.tokens, max_logit_rows=bounds.rows, mixed_drafts=False,
        late_masks=True,
    )  # fmt: skip
    speculation = Speculation(limits.speculative_tokens, fixed=True)
    return Engine(made, pool=pool, vocab_size=manifest.vocab_size, limits=limits, speculation=speculation)


def drain(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Event]]:
    """Serves these requests; events by request id. No request may fail, and nothing may be held afterwards."""
    out: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.end is None or event.end.error is None, event.end
            out[event.request_id].append(event)
    engine.audit()
    assert not any(engine.pool.used_pages().values())
    return out


def tokens_of(events: Mapping[str, Sequence[Event]]) -> dict[str, list[int]]:
    return {name: [token for event in found for token in event.tokens] for name, found in events.items()}


def gathered(events: dict[str, list[Event]]) -> dict[str, Any]:
    """What a client sees of every request."""
    return {
        name: (
            [t for e in found for t in e.tokens],
            [x for e in found for x in e.logprobs],
            [x for e in found for x in e.prompt_logprobs],
            found[-1].end and (found[-1].end.reason, found[-1].end.stop_token),
        )
        for name, found in events.items()
    }
