"""The memory plan: bytes are those of the tensors, what is said to fit does, and one more does not."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv4c.artifact import KVGroup, Manifest, Pool, Segment, StateGroup, load_manifest
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options
from dsv4c.errors import ConfigError
from dsv4c.runtime.buffers import Arena
from dsv4c.runtime.footprint import CONTEXT_BYTES, GRAPH_BYTES, GRAPH_NODE_BYTES, Item, code_files
from dsv4c.runtime.graphs import Piece, pieces_of
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import Bounds
from dsv4c.runtime.loader import device_rows
from dsv4c.runtime.memory import Fit, MemoryPlan, Room, requests_fit
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes, step_pages
from dsv4c.runtime.staging import Staging
from dsv4c.runtime.tables import PageTables
from dsv4c.runtime.weights import load_weights
from tests.runtime.manifests import flash_manifest

CONTEXT = 131072


@pytest.fixture(scope="module")
def flash() -> Manifest:
    """Layers of ratios 0, 0, 4 and 128 for Hopper, with a program for every bucket."""
    return flash_manifest(4, Options(max_context=CONTEXT, max_tokens=512, max_requests=16))


def items(plan: MemoryPlan) -> dict[str, int]:
    return {item.name: item.size_bytes for item in plan.fixed}


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def test_weights_and_arena_of_nano_are_those_of_its_tensors(nano_artifact: Path) -> None:
    manifest = load_manifest(nano_artifact)
    plan = MemoryPlan.of(manifest, kernel_bytes=123)
    weights, _ = load_weights(manifest.weights, Checkpoint(nano_artifact / "weights"))
    assert items(plan)["weights"] == tensor_bytes(weights)
    assert sum(plan.weights_by_dtype.values()) == sum(plan.weights_by_part.values()) == tensor_bytes(weights)
    assert plan.weights_by_part["layers.*.ffn.experts.w1"] == sum(
        t.nbytes for name, t in weights.items() if name.endswith("experts.w1")
    )
    arena = manifest.programs["step"].arena_bytes
    assert 0 <= items(plan)["arena"] - Arena.memory(arena).untyped_storage().nbytes() < 512
    assert items(plan)["kernels"] == 123 and all((nano_artifact / f).is_file() for f in code_files(manifest))
    assert set(items(plan)) == {"weights", "arena", "inputs", "kernels"}
    assert plan.bounds == Bounds(tokens=512, requests=64, rows=512)


@pytest.mark.parametrize(("requests", "context", "snapshots"), [(1, 1, 0), (3, 700, 0), (2, 1500, 5)])
def test_pools_are_those_of_the_tensors(
    nano_artifact: Path, flash: Manifest, requests: int, context: int, snapshots: int
) -> None:
    for manifest in (load_manifest(nano_artifact), flash):
        plan = MemoryPlan.of(manifest)
        sizes = plan.sizes(requests, context, snapshots)
        made = allocate(manifest, sizes)
        for group in (*manifest.kv_groups, *manifest.state_groups):
            assert plan.pools(sizes)[group.name] == sum(made[pool.name].nbytes for pool in group.pools)
        assert sum(plan.pools(sizes).values()) == tensor_bytes(made) == sizes.total_bytes(plan.groups, plan.states)
        more = plan.sizes(requests, context, snapshots + 1)
        assert tensor_bytes(allocate(manifest, more)) - tensor_bytes(made) == requests * plan.snapshot_bytes()


def test_inputs_of_flash_are_those_of_the_device(flash: Manifest) -> None:
    plan = MemoryPlan.of(flash)
    program = next(iter(flash.programs.values()))
    rows = device_rows(flash, plan.sizes(16, CONTEXT))
    device = torch.device("cpu")
    columns = {str(i.group): rows[str(i.shape[1])] for i in program.inputs if i.kind == "page_table"}
    staged = Staging(flash.programs, device, rows).device_bytes
    tables, slots = PageTables(rows["R"], columns, device).nbytes, -(-rows["R"] * 8 // 256) * 256
    assert items(plan)["inputs"] == staged + tables + slots


def test_flash_shares_one_arena_and_captures_every_program(flash: Manifest) -> None:
    plan, programs = MemoryPlan.of(flash), flash.programs.values()
    assert len(programs) > 1
    assert items(plan)["arena"] == max(p.arena_bytes for p in programs) + 512
    launches = {name: len(k.launches) or 3 for name, k in flash.kernels.items()}
    pieces = [piece for p in programs for piece in pieces_of(p) if not piece.why]
    pairs = [pair for p in programs for pair in pairwise(pieces_of(p)) if pair[1].masked]
    assert len(pairs) == len(programs)
    pieces += [Piece((*before.calls, *masked.calls)) for before, masked in pairs]  # whole, besides the two
    nodes = sum(launches[call.kernel] for piece in pieces for call in piece.calls)
    assert items(plan)["CUDA graphs"] == len(pieces) * GRAPH_BYTES + nodes * GRAPH_NODE_BYTES
    assert items(plan)["workspaces"] == 64 << 20 and items(plan)["CUDA context"] == CONTEXT_BYTES
    assert (plan.bounds.tokens, plan.bounds.requests) == (512, 16)


def test_a_break_makes_two_graphs_of_one(flash: Manifest) -> None:
    name, program = next(iter(flash.programs.items()))
    calls = program.segments[0].calls
    parts = (
        Segment("graph", calls[:2]), Segment("graph", calls[2:4]), Segment("eager", calls[4:5], "why not"),
        Segment("graph", calls[5:]),
    )  # fmt: skip
    of_one = dataclasses.replace(flash, programs={**flash.programs, name: dataclasses.replace(program, segments=parts)})
    launched = [len(flash.kernels[call.kernel].launches) or 3 for call in calls[:5]]
    fewer = sum(launched[:4]) + 2 * launched[4]  # what comes before the break is not captured a second time any more
    difference = items(MemoryPlan.of(of_one))["CUDA graphs"] - items(MemoryPlan.of(flash))["CUDA graphs"]
    assert difference == GRAPH_BYTES - fewer * GRAPH_NODE_BYTES


def test_what_a_token_costs(flash: Manifest) -> None:
    """One layer of each compressed kind: packed entries of 584 bytes, index keys of 132."""
    plan = MemoryPlan.of(flash)
    assert plan.token_bytes() == {"window": 0, "c4": 584 / 4, "index": 132 / 4, "c128": 584 / 128}


@given(st.integers(0, 10**11), st.integers(0, 10**9), st.integers(1, CONTEXT), st.integers(1, 16))
def test_what_fits_flash_does_and_no_more(flash: Manifest, total: int, more: int, context: int, requests: int) -> None:
    plan = MemoryPlan.of(flash)
    room = Room.of_card(total)
    fit, longest = plan.fit(room, context), plan.longest(room, requests)
    for found, next_one in ((fit, (fit.requests + 1, context)), (longest, (requests, longest.context + 1))):
        assert found.available_bytes == room.pool_bytes(plan.fixed_bytes)
        if found.requests and found.context:
            sizes = plan.sizes(found.requests, found.context)
            assert found.pool_bytes == sizes.total_bytes(plan.groups, plan.states) <= found.available_bytes
        assert found.next_bytes == plan.sizes(*next_one).total_bytes(plan.groups, plan.states)
        if found.binds == "memory":
            assert found.next_bytes > found.available_bytes
    assert (fit.requests == 16) == (fit.binds == "requests")
    assert (longest.context == CONTEXT) == (longest.binds == "context")
    assert (fit.requests >= requests) == (longest.context >= context)
    roomier = Room.of_card(total + more)
    assert plan.fit(roomier, context).requests >= fit.requests
    assert plan.longest(roomier, requests).context >= longest.context
    assert plan.fit(room, max(1, context - more % context)).requests >= fit.requests
    assert plan.fit(room, context, snapshots=3).requests <= fit.requests


GROUPS = st.builds(
    lambda page, horizon, blocks: (
        KVGroup("window", 1, page, horizon, (Pool("w", (3,), "float32"),)),
        KVGroup("all", 4, 4 * blocks, None, (Pool("a", (5,), "bfloat16"), Pool("b", (1,), "uint8"))),
    ),
    st.integers(1, 8), st.integers(1, 12), st.integers(1, 3),
)  # fmt: skip
STATES = (StateGroup("ring", (Pool("r", (7,), "float32"),)),)


def small_plan(groups: tuple[KVGroup, ...], step_tokens: int) -> MemoryPlan:
    bounds = Bounds(step_tokens, requests=6, rows=6)
    return MemoryPlan("sm_90a", (Item("weights", 1000),), {}, {}, groups, STATES, bounds, max_context=64)


@given(GROUPS, st.integers(1, 40), st.integers(0, 10**5), st.integers(1, 64), st.randoms(use_true_random=False))
def test_requests_that_fit_never_lack_a_page(groups: tuple, step: int, total: int, context: int, rng: object) -> None:
    plan = small_plan(groups, step)
    fit = plan.fit(Room(total, 1.0), context)
    assume(fit.requests)
    sizes = plan.sizes(fit.requests, context)
    assert requests_fit(groups, sizes, context, step)[0] == fit.requests
    pool = KVPool(groups, sizes)
    slots = {slot: 0 for slot in (pool.admit() for _ in range(fit.requests)) if slot}
    assert len(slots) == fit.requests and pool.admit() is None, "one request more has no slot"
    while any(done < context for done in slots.values()):
        left, ends = step, {}
        for slot in rng.sample(sorted(slots), len(slots)):  # type: ignore[attr-defined]
            ends[slot] = slots[slot] + min(rng.randint(0, left), context - slots[slot])  # type: ignore[attr-defined]
            left -= ends[slot] - slots[slot]
            assert pool.grow(slot, ends[slot])
        for slot, end in ends.items():
            pool.evict(slot, end)
        slots = ends
    pool.audit()


def worst_step(pool: KVPool, window: KVGroup, requests: int, step: int) -> bool:
    """Whether requests that stand where their windows span the most pages can take a step that begins the most."""
    size, horizon = window.page_tokens, window.horizon or 1
    slots = [pool.admit() for _ in range(requests)]
    if None in slots:
        return False
    start = horizon - 2 + 3 * size
    for slot in slots:
        for end in range(1, start + 1):
            if not pool.grow(slot or 0, end):
                return False
            pool.evict(slot or 0, end)
    first, left = size - (horizon - 3) % size, step
    for i, slot in enumerate(slots):
        given_tokens = (left if i == len(slots) - 1 else min(first, left)) if left >= first else 0
        left -= given_tokens
        if not pool.grow(slot or 0, start + given_tokens):
            return False
    return True


@given(st.integers(1, 8), st.integers(2, 12), st.integers(1, 20), st.integers(1, 4), st.integers(0, 40))
def test_one_request_more_than_pools_hold_can_run_out(
    page: int, horizon: int, step: int, slots: int, spare: int
) -> None:
    window = KVGroup("window", 1, page, horizon, (Pool("w", (1,), "uint8"),))
    context = 200
    sizes = PoolSizes({"window": 2 + spare}, slots + 1, context)
    count, binds = requests_fit([window], sizes, context, step)
    assert binds == ("slots" if count == slots else "window")
    if count:
        assert step_pages(window, count, context, step) <= spare + 1
        assert worst_step(KVPool([window], sizes), window, count, step)
    assert not worst_step(KVPool([window], sizes), window, count + 1, step)


def test_snapshots_have_their_own_pages_and_rows() -> None:
    groups = (KVGroup("window", 1, 4, 8, (Pool("w", (1,), "uint8"),)), KVGroup("all", 1, 8, None, ()))
    sizes = PoolSizes.for_requests(groups, 3, 64, 8, snapshots=5)
    assert requests_fit(groups, sizes, 64, 8) == (3, "slots")
    assert requests_fit(groups, dataclasses.replace(sizes, slots=9), 64, 8) == (3, "window")


def reserve(plan: MemoryPlan, room: Room, requests: int, context: int, **options: int) -> tuple[PoolSizes | None, str]:
    try:
        return plan.reserve(room, requests, context, **options), ""
    except ConfigError as error:
        assert error.hint
        return None, error.message


@given(GROUPS, st.integers(1, 40), st.integers(0, 10**4), st.integers(1, 6), st.integers(1, 64), st.integers(0, 2))
def test_reserving_takes_what_there_is_and_refuses_the_rest(
    groups: tuple, step: int, total: int, requests: int, context: int, snapshots: int
) -> None:
    plan, room = small_plan(groups, step), Room(total, 1.0)
    sizes, refusal = reserve(plan, room, requests, context, snapshots=snapshots)
    needed = plan.least_bytes(requests, context, snapshots)
    assert (sizes is None) == (needed > total - 1000)
    if sizes is None:
        assert "available" in refusal
        return
    taken = sizes.total_bytes(groups, STATES)
    assert needed <= taken <= total - 1000
    assert (sizes.max_requests, sizes.max_context, sizes.snapshots) == (requests, context, snapshots * requests)
    assert requests_fit(groups, sizes, context, step)[0] >= 1
    pool = KVPool(groups, sizes)
    assert pool.holds(context)
    for _ in range(requests):  # all at once, a page each
        slot = pool.admit()
        assert slot and pool.grow(slot, 1)
        pool.evict(slot, 1)


def two_groups() -> MemoryPlan:
    groups = (
        KVGroup("window", 1, 4, 8, (Pool("w", (3,), "float32"),)),
        KVGroup("all", 4, 8, None, (Pool("a", (5,), "bfloat16"),)),
    )
    return small_plan(groups, 8)


@pytest.mark.parametrize(
    ("total", "requests", "context", "options", "message", "hint"),
    [
        (900, 1, 64, {}, "1.0 KB before any request (weights 1.0 KB), 900 bytes are available", "fewer layers"),
        (90000, 7, 64, {}, "7 requests are asked for, the artifact was compiled for 1 to 6", "`--max-requests`"),
        (90000, 6, 65, {}, "65 tokens of context are asked for, the artifact was compiled for 1 to 64", "-context`"),
        (90000, 1, 64, {"pool_bytes": 90000}, "`--kv-memory` is 90.0 KB, 89.0 KB are available", "lower it"),
        (90000, 6, 64, {"pool_bytes": 9}, "need 1.5 KB of pools, 9 bytes are available", "give more memory"),
    ],
)
def test_refusals_name_what_is_needed_and_what_there_is(
    total: int, requests: int, context: int, options: dict[str, int], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        two_groups().reserve(Room(total, 1.0), requests, context, **options)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_refusal_says_what_would_fit() -> None:
    plan = two_groups()
    room = Room(1000 + plan.least_bytes(3, 64), 1.0)
    with pytest.raises(ConfigError, match=r"6 requests, one of them of 64 tokens, need .* of pools") as caught:
        plan.reserve(room, 6, 64)
    assert "`--max-requests 3`" in caught.value.hint
    assert plan.reserve(room, 3, 64).max_requests == 3
    with pytest.raises(ConfigError):
        plan.reserve(room, 4, 64)
    shorter = int(caught.value.hint.split("--max-context ")[1].split("`")[0])
    assert plan.reserve(room, 6, shorter).max_context == shorter
    with pytest.raises(ConfigError):
        plan.reserve(room, 6, shorter + 1)


def test_all_layers_of_flash_do_not_fit_one_card(flash: Manifest) -> None:
    """43 layers at the size of these."""
    layer = [w for w in flash.weights if w.name.startswith("layers.3.")]
    deep = dataclasses.replace(flash, weights=flash.weights + tuple(layer) * 39)
    with pytest.raises(ConfigError) as caught:
        MemoryPlan.of(deep).reserve(Room.of_card(141 * 10**9), 1, 1024)
    assert "weights 15" in caught.value.message and "129.72 GB are available" in caught.value.message


def test_the_room_of_a_card_leaves_out_others_but_not_this_process() -> None:
    total = 150 * 10**9
    alone = Room.of_card(total, total - CONTEXT_BYTES)
    assert alone == Room.of_card(total) and alone.limit_bytes == int(0.92 * total)
    crowded = Room.of_card(total, total - CONTEXT_BYTES - 10**10, share=0.5)
    assert (crowded.others_bytes, crowded.limit_bytes) == (10**10, 65 * 10**9)
    assert Room.of_card(total, 0).limit_bytes == 0 or Room.of_card(total, 0).limit_bytes < total // 100
    for share in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="gpu-memory-utilization"):
            Room.of_card(total, share=share)


def test_the_room_of_a_host_keeps_half_from_pools() -> None:
    room = Room.of_host(10**9)
    assert room.limit_bytes == 10**9
    assert (room.pool_bytes(10**8), room.pool_bytes(8 * 10**8)) == (5 * 10**8, 2 * 10**8)


def test_a_fit_is_plain_data() -> None:
    plan = small_plan((KVGroup("all", 1, 8, None, (Pool("a", (1,), "uint8"),)),), 8)
    fit = plan.fit(Room(1000 + 7 * 28 + 8 * 49, 1.0), 64)
    assert fit == Fit(6, 64, 7 * 28 + 8 * 49, "requests", "all", 8 * 28 + 8 * 57, 7 * 28 + 8 * 49)
