"""The executor runs a small program of native and vendor calls, and refuses what does not fit it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4c.artifact import Buffer, Call, Input, Kernel, KVGroup, Manifest, Pool, Program, Segment, StateGroup
from dsv4c.errors import ArtifactError, ConfigError, EngineError
from dsv4c.runtime import executor as executor_module
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.kernels import Kernels
from dsv4c.runtime.loader import check_host
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.schedules._schedule import Choice, OpNode, Value
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import select

V, D, LARGEST = 21, 32, 8


def choices() -> dict[str, Choice]:
    """embed -> h [T, D]; its rows into a pool; the wanted rows of h's second half times the head -> logits [S, V]."""
    ids, rows = Value(("T",), "int64", "input"), Value(("S",), "int64", "input")
    h, s = Value(("T", D), "float32"), Value(("S", D), "float32")
    pool = Value(("N", D), "float32", "pool")
    nodes = {
        "embed": OpNode("embed", {}, (ids, Value((V, D), "float32", "weight")), (h,)),
        "write": OpNode("page_write", {}, (pool, ids, h), (), (0,)),
        "take": OpNode("take_rows", {}, (h, rows), (s,)),
        "head": OpNode("linear", {"float32": True}, (s, Value((V, D), "float32", "weight")),
                       (Value(("S", V), "float32"),)),
    }  # fmt: skip
    return {name: select(node, "cpu", {"T": 8, "S": 8, "N": 8}) for name, node in nodes.items()}


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    chosen = choices()
    out = tmp_path_factory.mktemp("kernels")
    built = emit({c.kernel: c for c in chosen.values()}, out, Path(request.config.cache.mkdir("kernels")))
    return {
        "names": {k: c.kernel for k, c in chosen.items()},
        "loaded": Kernels(built, out),
        "built": built,
        "out": out,
    }


def program(names: dict[str, str]) -> Program:
    return Program(
        phase="mixed",
        symbols={"T": LARGEST, "S": LARGEST},
        inputs=(
            Input("token_ids", "token_ids", ("T",)),
            Input("positions", "positions", ("T",)),
            Input("logit_rows", "logit_rows", ("S",)),
        ),
        buffers=(
            Buffer("h", ("T", D), "float32", (D, 1), 0),
            Buffer("s", ("S", D), "float32", (D, 1), LARGEST * D * 4),
            Buffer("half", ("S", D // 2), "float32", (D, 1), None, "s", D // 2),
            Buffer("logits", ("S", V), "float32", (V, 1), 2 * LARGEST * D * 4),
        ),
        segments=(
            Segment("graph", (Call(names["embed"], ("token_ids", "embed", "h"), 1),
                              Call(names["write"], ("pool", "positions", "h"), 0))),
            Segment("graph", (Call(names["take"], ("h", "logit_rows", "s"), 1),
                              Call(names["head"], ("s", "head", "logits"), 1))),
        ),
        outputs={"logits": "logits"},
        arena_bytes=2 * LARGEST * D * 4 + LARGEST * V * 4,
    )  # fmt: skip


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"embed": torch.randn(V, D), "head": torch.randn(V, D)}


@pytest.fixture
def executor(kernels: dict[str, Any], weights: dict[str, Tensor]) -> ArtifactExecutor:
    return ArtifactExecutor(program(kernels["names"]), kernels["loaded"], weights, {"pool": torch.zeros(16, D)})


def inputs(tokens: int, rows: list[int]) -> dict[str, Tensor]:
    return {
        "token_ids": torch.arange(tokens) % V,
        "positions": torch.arange(tokens) + 2,
        "logit_rows": torch.tensor(rows, dtype=torch.int64),
    }


@pytest.mark.parametrize(("tokens", "rows"), [(1, [0]), (5, [4, 0]), (8, list(range(8))), (3, []), (0, [])])
def test_step_gives_logits_and_updates_state(
    tokens: int, rows: list[int], executor: ArtifactExecutor, weights: dict[str, Tensor]
) -> None:
    step = inputs(tokens, rows)
    logits = executor.step(step)
    h = weights["embed"][step["token_ids"]]
    torch.testing.assert_close(logits, h[step["logit_rows"]] @ weights["head"].T)
    assert torch.equal(executor.states["pool"][2 : 2 + tokens], h)
    assert bool((executor.states["pool"][2 + tokens :] == 0).all())


def test_a_known_combination_of_sizes_is_bound_once(
    executor: ArtifactExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = []
    bind = executor._kernels.bind
    monkeypatch.setattr(executor._kernels, "bind", lambda calls: bound.append(len(calls)) or bind(calls))
    for tokens in (4, 4, 3, 4):
        executor.step(inputs(tokens, [0]))
    assert bound == [4, 4]
    monkeypatch.setattr(executor_module, "MAX_BINDINGS", 2)
    for tokens in (5, 4, 3):  # 5 replaces 3, which was used before 4; then 3 replaces 5
        executor.step(inputs(tokens, [0]))
    assert len(bound) == 4 and len(executor._bindings) == 2


def test_inputs_are_copied_so_the_caller_may_reuse_them(executor: ArtifactExecutor) -> None:
    step = inputs(4, [3])
    before = executor.step(step).clone()
    other = {name: tensor.clone() for name, tensor in step.items()}
    step["token_ids"].fill_(7)
    assert torch.equal(executor.step(other), before)


def test_run_reads_values_inside_the_program(executor: ArtifactExecutor, weights: dict[str, Tensor]) -> None:
    step = inputs(5, [4, 1])
    got = executor.run(step, ["h", "half", "logits"])
    h = weights["embed"][step["token_ids"]]
    assert torch.equal(got["h"], h)
    assert torch.equal(got["half"], h[step["logit_rows"], D // 2 :])
    torch.testing.assert_close(got["logits"], executor.step(step))
    with pytest.raises(EngineError, match="`nothing`"):
        executor.run(step, ["nothing"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": None}, "lacks input `positions`"),
        ({"positions": torch.zeros(4)}, r"is torch.float32 \[4\], expected int64"),
        ({"positions": torch.zeros(4, 1, dtype=torch.int64)}, r"int64 \[4, 1\], expected int64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "has 3 for `T`, others have 4"),
        ({"token_ids": torch.zeros(9, dtype=torch.int64), "positions": torch.zeros(9, dtype=torch.int64)},
         "has 9 for `T`, the artifact was compiled for 8"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(
    change: dict[str, Tensor | None], message: str, executor: ArtifactExecutor
) -> None:
    step = {k: v for k, v in {**inputs(4, [0]), **change}.items() if v is not None}
    with pytest.raises(EngineError, match=message):
        executor.step(step)
    executor.step(inputs(4, [0]))  # it goes on


def test_an_index_out_of_range_is_an_error_and_the_executor_goes_on(executor: ArtifactExecutor) -> None:
    step = inputs(4, [0])
    step["token_ids"][1] = V
    with pytest.raises(RuntimeError, match="a row lies outside its tensor"):
        executor.step(step)
    executor.step(inputs(4, [0]))


def changed(names: dict[str, str], **fields: Any) -> Program:
    return dataclasses.replace(program(names), **fields)


def test_a_program_that_contradicts_itself_is_refused(kernels: dict[str, Any], weights: dict[str, Tensor]) -> None:
    names, good = kernels["names"], program(kernels["names"])
    call = Call(names["take"], ("h", "rows", "s"), 1)
    cases = {
        "which nothing provides": changed(names, segments=(Segment("graph", (call,)),)),
        "the unknown kernel `k`": changed(names, segments=(Segment("graph", (Call("k", ("h",), 1),)),)),
        "has no `logits`": changed(names, outputs={}),
        "has no largest value": changed(names, symbols={"T": 8}),
        "which no input gives": changed(names, buffers=(Buffer("b", ("Q",), "float32", (1,), 0),)),
        "outside the arena": changed(names, arena_bytes=64),
        "unknown dtype": changed(names, buffers=(dataclasses.replace(good.buffers[0], dtype="float33"),)),
        "no owning buffer": changed(names, buffers=(Buffer("b", ("T",), "float32", (1,), None, "c"),)),
    }
    for message, wrong in cases.items():
        with pytest.raises(ArtifactError, match=message):
            made = ArtifactExecutor(wrong, kernels["loaded"], weights, {"pool": torch.zeros(16, D)})
            made.step(inputs(2, [0]))


def test_kernels_refuse_what_they_cannot_run(kernels: dict[str, Any], tmp_path: Path) -> None:
    kernel = next(k for k in kernels["built"].values() if k.kind == "cpp")
    vendor = Kernel("v", "aten", "linear", "linear.aten", "", 0.0, "aten.nothing")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "bad.so").write_bytes(b"no library")
    for message, wrong in {
        "cannot load `kernels/bad.so`": dataclasses.replace(kernel, file="kernels/bad.so"),
        "names no file": dataclasses.replace(kernel, file=None),
        "the aten call `aten.nothing`": vendor,
    }.items():
        with pytest.raises(ArtifactError, match=message):
            Kernels({"k": wrong}, tmp_path)
    with pytest.raises(ArtifactError, match="has no function `missing`"):
        Kernels({"k": dataclasses.replace(kernel, symbol="missing")}, kernels["out"])


def manifest(**fields: Any) -> Manifest:
    pool, ring, whole = Pool("p", (4,), "float32"), Pool("r", (3, 4), "float32"), Pool("e", (2,), "float32")
    made = Manifest(
        format_version=1, model={}, model_sha256="", target="cpu", isa="default", compute_dtype="float32",
        max_context=8, vocab_size=V, tools={}, passes=(), numerics=(), kernels={}, programs={},
        kv_groups=(KVGroup("window", 1, 64, 128, (pool,)),), weights=(), embedded_weights=False,
        state_groups=(StateGroup("rings", (ring,)), StateGroup("whole", (whole,), empty_every=32)),
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def test_pools_have_the_rows_asked_for() -> None:
    def rows(window: int, slots: int, snapshots: int = 0) -> PoolSizes:
        return PoolSizes({"window": window}, slots, 512, snapshots)

    made = allocate(manifest(), rows(3, 5))
    assert {name: tuple(t.shape) for name, t in made.items()} == {"p": (192, 4), "r": (5, 3, 4), "e": (5, 2)}
    assert all(bool((t == 0).all()) for t in made.values())
    made = allocate(manifest(), rows(3, 5, 4))
    assert (len(made["r"]), len(made["e"])) == (9, 5), "a snapshot at a block's end needs no rows that are empty there"
    with pytest.raises(ConfigError, match="`window` has 1 pages"):
        allocate(manifest(), rows(1, 5))
    with pytest.raises(ConfigError, match="1 state slots"):
        allocate(manifest(), rows(2, 1))


@pytest.mark.parametrize(
    ("fields", "host", "message"),
    [
        ({"isa": "avx512"}, "AVX2", "needs the instruction set `avx512`, this machine has `avx2`"),
        ({"isa": "sve256"}, "AVX512", "needs the instruction set `sve256`, this machine has `avx512`"),
        ({"isa": "avx2"}, "DEFAULT", "needs the instruction set `avx2`, this machine has `default`"),
        ({"target": "sm_90a"}, "AVX512", "made for `sm_90a`, this machine has no usable CUDA device"),
    ],
)
def test_another_machine_is_refused(
    fields: dict[str, str], host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: host)
    with pytest.raises(ArtifactError, match=message) as error:
        check_host(manifest(**fields))
    assert "compile" in error.value.hint


@pytest.mark.parametrize(("isa", "host"), [("default", "AVX2"), ("avx2", "AVX512"), ("sve256", "SVE256")])
def test_a_wider_machine_runs_it(isa: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: host)
    check_host(manifest(isa=isa))
