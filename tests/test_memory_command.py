"""`dsv4c plan` answers, and `dsv4c run` refuses what does not fit before it loads anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dsv4c.launch
import dsv4c.room
from dsv4c.artifact import load_manifest
from dsv4c.cli import main
from dsv4c.errors import ConfigError
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.memory import CARD_SHARE, MemoryPlan, Room
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.units import parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("141GB", 141 * 10**9), ("131GiB", 131 << 30), ("1.5 gb", 1_500_000_000), ("64MB", 64 * 10**6), ("2TiB", 2 << 40)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "count"), [("8192", 8192), ("128K", 131072), ("1m", 1 << 20), ("1", 1)])
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "141", "GB", "-1GB", "1e9GB", "0GB", "141 G", "nan GB", "1.GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no size of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5K", "128KB", "1G"])
def test_numbers_of_tokens_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no number of tokens"):
        parse_tokens(text)


def test_plan_prints_tables_and_one_answer(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(nano_artifact), "--memory", "64MB", "--context", "2K"]) == 0
    out = capsys.readouterr().out
    for word in ("weights", "arena", "window", "c4", "c128", "index", "bytes a token", "available"):
        assert word in out
    assert "of 2,048 tokens fit. Memory binds: one more needs" in out.splitlines()[-1]


def test_the_json_says_what_fits_and_a_pool_of_that_size_holds_it(
    nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(nano_artifact), "--memory", "80MB", "--context", "1K", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    fit, pools = found["fit"], found["pools"]
    assert fit["binds"] == "memory" and 0 < fit["requests"] == pools["requests"] < 64
    assert sum(pools["bytes"].values()) == fit["pool_bytes"] <= fit["available_bytes"] < fit["next_bytes"]
    assert found["memory"]["limit_bytes"] == 80_000_000 and found["fixed_bytes"] == sum(found["fixed"].values())
    pool = KVPool(load_manifest(nano_artifact).kv_groups, PoolSizes(pools["pages"], pools["requests"] + 1, 1024))
    slots = [pool.admit() for _ in range(fit["requests"])]
    for slot in slots:
        for start in range(0, 1024, 512):
            assert slot and pool.grow(slot, start + 512)
            pool.evict(slot, start + 512)
    assert pool.admit() is None
    assert main([*command, "--requests", str(fit["requests"] + 1)]) == 0
    longest = json.loads(capsys.readouterr().out)["longest"]
    assert longest["requests"] == fit["requests"] + 1 and longest["context"] < 1024


@pytest.mark.parametrize(
    ("requests", "memory", "answer"),
    [
        ("2", "64MB", "2 requests of 2,048 tokens fit; so many fit up to"),
        ("60", "64MB", "60 requests of 2,048 tokens do not fit: they need"),
        ("1", "1MB", "Nothing fits: before any request it needs"),
        ("1", "59MB", "1 request of 2,048 tokens do"),
    ],
)
def test_plan_answers_for_a_number_of_requests(
    nano_artifact: Path, requests: str, memory: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(nano_artifact), "--memory", memory, "--context", "2K", "--requests", requests]) == 0
    assert answer in capsys.readouterr().out.splitlines()[-1]


def test_plan_without_a_size_takes_this_machines(nano_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(nano_artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["total_bytes"] > 10**8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "5K"], "5120 tokens of context are asked for, the artifact was compiled for 1 to 4096"),
        (["--requests", "65"], "65 requests are asked for, the artifact was compiled for 1 to 64"),
        (["--memory", "141"], "`141` is no size of memory"),
        (["--context", "many"], "`many` is no number of tokens"),
        (["--gpu-memory-utilization", "0.5"], "is for GPU targets"),
    ],
)
def test_plan_refuses_bad_input(
    nano_artifact: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(nano_artifact), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_artifact_needs_a_card_or_its_size() -> None:
    if dsv4c.room.torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        dsv4c.room.measured_room("sm_90a")
    assert "--gpu-memory" in caught.value.hint
    assert dsv4c.room.given_room("sm_90a", 10**9) == Room(10**9, CARD_SHARE)
    assert dsv4c.room.given_room("sm_90a", 10**9, 0.5).limit_bytes == 5 * 10**8


@pytest.mark.parametrize(
    ("arguments", "free", "message"),
    [
        (["--max-requests", "65"], 10**10, "65 requests are asked for, the artifact was compiled for 1 to 64"),
        (["--max-context", "8K"], 10**10, "8192 tokens of context are asked for"),
        (["--kv-memory", "20"], 10**10, "`--kv-memory` is 20.00 GB, 9.94 GB are available"),
        (["--kv-memory", "0.001"], 10**10, "64 requests, one of them of 4096 tokens, need"),
        (["--kv-memory", "nan"], 10**10, "`--kv-memory` must be positive"),
        ([], 9 * 10**7, "64 requests, one of them of 4096 tokens, need"),
        ([], 10**7, "before any request (weights 29.8 MB), 10.0 MB are available"),
        (["--gpu-memory-utilization", "0.5"], 10**10, "is for GPU targets"),
    ],
)
def test_run_refuses_before_anything_is_loaded(
    nano_artifact: Path, arguments: list[str], free: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(dsv4c.room, "_available_bytes", lambda: free)
    monkeypatch.setattr(dsv4c.launch, "load", lambda *_, **__: pytest.fail("it began to load"))
    assert main(["run", str(nano_artifact), "--prompt", "x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_run_prints_the_plan_first_and_serves_with_it(
    nano_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dsv4c.room, "_available_bytes", lambda: 10**10)
    command = ["run", str(nano_artifact), "--prompt", "The package", "--max-new-tokens", "4", "--temperature", "0"]
    assert main([*command, "--max-requests", "3", "--max-context", "1K", "--kv-memory", "0.006"]) == 0
    printed = capsys.readouterr()
    assert "weights" in printed.err and "3 requests at once" in printed.err and printed.out.strip()


def test_pools_of_a_launch_are_those_reserved(nano_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[MemoryPlan, Room, PoolSizes]] = []
    loaded = []
    load = dsv4c.launch.load
    monkeypatch.setattr(dsv4c.launch, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    options = dsv4c.launch.LaunchOptions(max_requests=2, max_context=600)
    launched = dsv4c.launch.launch(nano_artifact, options, planned=lambda *all_: seen.append(all_))
    ((plan, _, sizes),) = seen
    assert launched.engine.pool.sizes == sizes == plan.sizes(2, 600, dsv4c.launch.SNAPSHOTS)
    assert sum(t.nbytes for t in loaded[0].states.values()) == sum(plan.pools(sizes).values())
