"""`dsv4c run` as several processes: answers, ends, and what makes no sense."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv4c.cli import main

SMALL = ("--max-requests", "8", "--max-context", "512", "--port", "0")
PATIENCE_S = 90.0  # a guard against hanging


class Run:
    """A running `dsv4c run`, and all that it says."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "dsv4c.cli", "run", *arguments]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def await_said(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.said)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.02)
        return found

    @property
    def workers(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"pid (\d+)\) has joined", self.said)]

    def ask(self, **body: Any) -> Any:
        url = self.await_said(r"listening on (http\S+)").group(1)
        answer = httpx.post(
            f"{url}/v1/completions", json={"model": "nano", "prompt": "The package", **body}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[Run]:
    run = Run(list(arguments), log)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_death(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(map(lives, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if lives(pid)]
        time.sleep(0.02)


def segments(pids: list[int]) -> list[str]:
    """Shared memory of these processes that is still there."""
    found = []
    for path in Path("/dev/shm").glob("dsv4c-*"):
        header = json.loads(path.read_bytes()[:4096].partition(b"\n")[0] or b"{}")
        if header.get("pid") in pids:
            found.append(path.name)
    return found


@pytest.mark.parametrize("transfer", ["shm", "local"])
def test_it_answers_and_ends_with_ctrl_c(transfer: str, nano_artifact: Path, tmp_path: Path) -> None:
    more = ("--prefill-workers", "1", "--decode-workers", "1", "--transfer", transfer, "--model-name", "nano")
    with running(tmp_path / "log", str(nano_artifact), *SMALL, *more) as run:
        greedy = run.ask(max_tokens=12, temperature=0)
        assert greedy[0]["finish_reason"] == "length"
        assert run.ask(max_tokens=12, temperature=0) == greedy
        many = run.ask(max_tokens=8, n=3, seed=5, logprobs=2)
        assert len(many) == 3 and all(len(choice["logprobs"]["tokens"]) == 8 for choice in many)
        shape = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
        format_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": shape}}
        found = run.ask(max_tokens=100, temperature=0, response_format=format_)
        assert json.loads(found[0]["text"])["a"] in ("x", "y")
        url = run.await_said(r"listening on (http\S+)").group(1)
        metrics = httpx.get(f"{url}/metrics").text
        assert 'dsv4c_router_worker_up{role="prefill",worker="prefill-0"} 1.0' in metrics
        assert httpx.get(f"{url}/ready").status_code == 200
        workers = run.workers
        assert len(workers) == 2
        if transfer == "shm":
            assert len(segments(workers)) == 2
            assert "prefill-0 | " in run.said
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(PATIENCE_S) == 0, run.said
        await_death([pid for pid in workers if pid != run.process.pid])
        assert not segments(workers)
        assert "Traceback" not in run.said and " is lost" not in run.said


def test_a_parent_that_is_killed_leaves_no_orphan(nano_artifact: Path, tmp_path: Path) -> None:
    more = ("--prefill-workers", "1", "--decode-workers", "1")
    with running(tmp_path / "log", str(nano_artifact), *SMALL, *more) as run:
        run.await_said(r"listening on (http\S+)")
        workers = run.workers
        run.process.kill()
        await_death(workers)
        assert not segments(workers)


def test_a_worker_that_cannot_start_ends_the_start(nano_artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for item in nano_artifact.iterdir():
        if item.name != "weights":
            (broken / item.name).symlink_to(item)
    with running(tmp_path / "log", str(broken), "--port", "0", "--decode-workers", "1") as run:
        assert run.process.wait(PATIENCE_S) == 2
        assert "decode-0 | error: " in run.said and "worker `decode-0` ended with code 2" in run.said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prefill-workers", "1"), "generate nothing"),
        (("--decode-workers", "1", "--prompt", "x"), "`--prompt`"),
        (("--decode-workers", "1", "--router", "127.0.0.1:1"), "for workers"),
        (("--router-address", "127.0.0.1:0"), "--secret-file"),
        (("--role", "decode"), "needs `--router`"),
        (("--role", "decode", "--router", "127.0.0.1:1"), "needs `--secret-file`"),
        (("--role", "both", "--decode-workers", "1"), "elsewhere"),
        (("--role", "decode", "--router", "nowhere", "--secret-file", os.devnull), "secret"),
        (("--decode-workers", "-1"), "not"),
    ],
)
def test_what_makes_no_sense(
    arguments: tuple[str, ...], says: str, nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(nano_artifact), "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error, error
