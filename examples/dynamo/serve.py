"""NVIDIA Dynamo's frontend and dsv4c workers on one host: file discovery, TCP, ZMQ, loopback; no etcd, no NATS.

usage: python examples/dynamo/serve.py ARTIFACT [--prefill P --decode D | --workers N] [--port 8100] [--demo]

Every process is Dynamo's or `dsv4c dynamo`; what this adds is their environment, and that they end together.
Run it with a Python in which Dynamo is installed: `make dynamo-demo` makes one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"


def environment(folder: Path) -> dict[str, str]:
    """What Dynamo reads from its environment. `folder`: fresh for every run, since entries outlive their owners."""
    planes = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(folder / "discovery")}
    planes |= {"DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq"}
    hosts = ("HTTP_HOST", "TCP_RPC_HOST", "TCP_RESPONSE_STREAM_HOST", "EVENT_PLANE_HOST", "SYSTEM_HOST")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **planes, **offline, **{f"DYN_{name}": LOOPBACK for name in hosts}, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port that nobody listens on, below 32,768: Dynamo 1.6 reads that of /health into 16 bits with a sign."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as sock:
            if sock.connect_ex((LOOPBACK, port)) != 0:
                return port


@dataclass
class Process:
    """One process of the deployment; its output is in `log`."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    port: int
    """Of its HTTP: the frontend's API, or a worker's health and metrics."""

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """A number of its /metrics, summed over its labels; 0 if it is not there."""
        lines = [line for line in self.get("/metrics").splitlines() if line.partition("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class Deployment:
    """A frontend and its workers; a context manager that ends them all."""

    artifact: Path
    model: str = "nano"
    frontend_options: Sequence[str] = ("--router-mode", "kv", "--migration-limit", "3")
    frontend_environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    entry: Sequence[str] = ("-m", "dsv4c.cli")
    processes: list[Process] = field(default_factory=list)

    def __enter__(self) -> Deployment:
        self._scratch = tempfile.TemporaryDirectory(prefix="dsv4c-dynamo-")
        self.folder = Path(self._scratch.name)
        (self.folder / "discovery").mkdir()
        self._environment = environment(self.folder)
        self.port = self.port or free_port()
        command = [sys.executable, "-m", "dynamo.frontend", "--http-port", str(self.port), *self.frontend_options]
        self.frontend = self._start("frontend", command, self.port, self.frontend_environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.kill()
        for process in self.processes:
            process.popen.wait()
        self._scratch.cleanup()

    def _start(self, name: str, command: Sequence[str], port: int, more: Mapping[str, str]) -> Process:
        log = self.folder / f"{name}-{len(self.processes)}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(command, env={**self._environment, **more}, stdout=out, stderr=out)
        process = Process(name, popen, log, port)
        self.processes.append(process)
        return process

    def worker(self, role: str = "both", *options: str, **environment: str) -> Process:
        """Starts a worker; it is not ready yet."""
        port = free_port()
        command = [sys.executable, *self.entry, "dynamo", str(self.artifact), "--model-name", self.model]
        command += ["--role", role, *options]
        return self._start(role, command, port, {"DYN_SYSTEM_PORT": str(port), **environment})

    def wait(self, *workers: Process, seconds: float = 120.0) -> None:
        """Until these workers are ready and the model is listed. Raises RuntimeError with a log's end if not."""
        end = time.monotonic() + seconds
        for process in (*workers, self.frontend):
            while not self._ready(process):
                if process.popen.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{process.name} did not become ready:\n{process.tail()}")
                time.sleep(0.1)

    def _ready(self, process: Process) -> bool:
        try:
            if process is not self.frontend:
                return '"status":"ready"' in process.get("/health").replace(" ", "")
            return self.model in process.get("/v1/models")
        except (urllib.error.URLError, OSError):
            return False

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request; `error` of a dict, with its status, if it was refused."""
        data = json.dumps({"model": self.model, **body}).encode()
        url = f"http://{LOOPBACK}:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return {"error": error.read().decode(), "status": error.code}


def demo(deployment: Deployment) -> None:
    """A chat, a stream, and who has served them."""
    messages = [{"role": "user", "content": "What does this package provide?"}]
    for _ in range(2):
        body = {"messages": messages, "max_tokens": 32, "temperature": 0, "nvext": {"extra_fields": ["worker_id"]}}
        answer = deployment.post("/v1/chat/completions", body)
        print(json.dumps(answer["choices"][0]["message"]["content"]))
        print(json.dumps({"usage": answer["usage"], "served by": answer.get("nvext", {}).get("worker_id")}))
    for process in deployment.processes[1:]:
        numbers = {n: process.metric(f"dsv4c_{n}_total") for n in ("generation_tokens", "transfer_pulled_bytes")}
        print(process.name, json.dumps(numbers))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prefill", type=int, default=1, help="prefill workers (default 1)")
    parser.add_argument("--decode", type=int, default=1, help="decode workers (default 1)")
    parser.add_argument("--workers", type=int, default=0, help="workers of both roles, instead of these")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--demo", action="store_true", help="ask a question and end")
    args, options = parser.parse_known_args(argv)
    roles = ["both"] * args.workers or ["prefill"] * args.prefill + ["decode"] * args.decode
    with Deployment(args.artifact, port=args.port) as deployment:
        deployment.wait(*[deployment.worker(role, *options) for role in roles])
        print(f"http://{LOOPBACK}:{deployment.port}/v1 serves `{deployment.model}` with {', '.join(roles)}", flush=True)
        if args.demo:
            demo(deployment)
            return 0
        signal.sigwait((signal.SIGINT, signal.SIGTERM))
    return 0


if __name__ == "__main__":
    sys.exit(main())
