"""CPU time of the server for a token: HTTP, detokenising, parsing, server-sent events; its engine computes nothing.

usage: python benchmarks/server.py [--streams 64] [--tokens 400] [--step-ms 20] [--rounds 5] [--rows FILE] [--pure]

The server is a process of its own, as `dsv4c run` starts it: real loop, tokenizer and app, over a null engine that
gives every stream a token a step. The clients are in this process and are not counted; what else runs on the machine
is not either, but slows it down: the rows say the load average of the minute before. Microseconds of CPU a token:
`engine thread` is what the loop does to hand tokens over, `event loop` all the rest; garbage collection and the
kernel's share of sending are in both. `--profile` says where the event loop's time goes, and slows it down; `--pure`
takes asyncio's own loop and h11 in place of uvloop and httptools.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import pstats
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from dsv4c.chat.codec import ChatCodec
from dsv4c.errors import Dsv4cError
from dsv4c.runtime.app import create_app
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.outputs import ServedEngine
from dsv4c.runtime.request import End, Event, Request
from dsv4c.runtime.serve import bind, serve

ROOT = Path(__file__).resolve().parents[1]
MODEL = "null"
TEXT = (
    "First I look at what is asked, then at what is known of it.</think>The package reads and writes files; 日本 too. "
)
KINDS = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say something."}]}),
    "thinking": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Say something."}], "chat_template_kwargs": {"thinking": True}},
    ),
    "completion": ("/v1/completions", {"prompt": "Say something.", "ignore_eos": True}),
    "stops": ("/v1/completions", {"prompt": "Say something.", "ignore_eos": True, "stop": ["\n\n\n", "###", "END"]}),
}


class NullEngine:
    """What `EngineLoop` asks of an engine: a token a step for everybody, out of a fixed text."""

    max_context = 1_000_000
    failure: Dsv4cError | None = None

    def __init__(self, tokens: list[int], step_s: float) -> None:
        self._tokens = tokens
        self._step_s = step_s
        self._live: dict[str, Request] = {}
        self._given: dict[str, int] = {}
        self._next_s = 0.0
        self._ended: deque[str] = deque()
        self.steps = self.generated = 0
        self.cpu: dict[str, float] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def idle(self) -> bool:
        return not self._live

    def check(self, request: Request, ahead: int = 0) -> None:
        """Takes everything."""

    def submit(self, request: Request) -> None:
        self._live[request.id] = request
        self._given[request.id] = 0

    def cancel(self, request_id: str) -> Event | None:
        request = self._live.pop(request_id, None)
        return None if request is None else Event(request_id, end=request.ended("cancelled"))

    def fail_all(self, error: Dsv4cError) -> list[Event]:
        ended = [Event(r.id, end=r.ended("failed", error=error)) for r in self._live.values()]
        self._live.clear()
        return ended

    def stats(self, ahead: int = 0) -> EngineStats:
        return EngineStats(running=len(self._live), waiting=ahead, steps=self.steps, generated_tokens=self.generated)

    def step(self) -> list[Event]:
        now = time.perf_counter()
        self._next_s = max(self._next_s + self._step_s, now)
        time.sleep(self._next_s - now)
        self.steps += 1
        events = []
        for request in list(self._live.values()):
            number = self._given[request.id]
            token = self._tokens[number % len(self._tokens)]
            self._given[request.id] = number + 1
            end = None
            if number + 1 == (request.params.max_tokens or 16):
                del self._live[request.id]
                end = End("length", request.num_prompt, number + 1)
            events.append(Event(request.id, (token,), end=end))
        self.generated += len(events)
        return events


def serve_null(step_s: float, profile: bool, pure: bool) -> int:
    """The child: serves until it is told to stop; answers every line of stdin with its CPU times so far."""
    if pure:
        sys.modules.update({"uvloop": None, "httptools": None})  # type: ignore[dict-item]  # as if not installed
    codec = ChatCodec.from_folder(ROOT / "examples" / "nano")
    engine = NullEngine(codec.encode(TEXT), step_s)
    loop = EngineLoop(engine).start()  # type: ignore[arg-type]  # all of an engine that the loop touches
    app = create_app(ServedEngine(loop), codec, MODEL)
    sock = bind(port=0)
    clock = time.pthread_getcpuclockid(loop._thread.ident or 0)
    print(sock.getsockname()[1], flush=True)

    def answer() -> None:
        for _ in sys.stdin:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            times = {
                "all": usage.ru_utime + usage.ru_stime,
                "system": usage.ru_stime,
                "engine thread": time.clock_gettime(clock),
                "tokens": engine.generated,
                "steps": engine.steps,
            }
            print(json.dumps(times), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    profiler = cProfile.Profile(time.thread_time)
    if profile:
        profiler.enable()
    serve(app, sock=sock, log_level="warning")
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(28)
    loop.close(drain=False)
    return 0


def drain_streams(port: int, path: str, body: dict[str, Any], streams: int) -> int:
    """Opens the streams, reads each to its end, and returns the bytes read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    poll, total, tails = selectors.DefaultSelector(), 0, {}
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(head.encode() + data)
        poll.register(sock, selectors.EVENT_READ)
        tails[sock] = b""
    while tails:
        for key, _ in poll.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            chunk = sock.recv(1 << 20)
            total += len(chunk)
            tail = tails[sock] = (tails[sock] + chunk)[-64:]
            if not chunk or b"[DONE]" in tail:
                poll.unregister(sock)
                sock.close()
                del tails[sock]
                if b"[DONE]" not in tail:
                    raise SystemExit(f"a stream broke off: {chunk!r}")
    return total


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every kind of request: medians over rounds, microseconds of CPU a token."""
    command = [sys.executable, __file__, "--serve", "--step-ms", str(args.step_ms)]
    command += ["--profile"] * args.profile + ["--pure"] * args.pure
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    port = int(child.stdout.readline())

    def times() -> dict[str, float]:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        return dict(json.loads(child.stdout.readline()))

    wait_for_port(port)
    rows = []
    for kind in args.kind or KINDS:
        path, body = KINDS[kind]
        asked = {"model": MODEL, "stream": True, "max_tokens": args.tokens, **body}
        drain_streams(port, path, {**asked, "max_tokens": 20}, args.streams)
        found: list[dict[str, float]] = []
        for _ in range(args.rounds):
            before, began = times(), time.perf_counter()
            size = drain_streams(port, path, asked, args.streams)
            wall, after = time.perf_counter() - began, times()
            tokens = after["tokens"] - before["tokens"]
            spent = {name: 1e6 * (after[name] - before[name]) / tokens for name in ("all", "system", "engine thread")}
            found.append({**spent, "bytes": size / tokens, "tokens/s": tokens / wall})
        row = {name: round(statistics.median(f[name] for f in found), 1) for name in found[0]}
        row["event loop"] = round(row["all"] - row["engine thread"], 1)
        load = round(os.getloadavg()[0], 1)
        rows.append({"kind": kind, "streams": args.streams, "step_ms": args.step_ms, "load average": load, **row})
        spread = f"{min(f['all'] for f in found):.1f} to {max(f['all'] for f in found):.1f}"
        print(
            f"{kind:<11} {args.streams} streams: {row['all']:6.1f} us of CPU a token ({spread}; event loop "
            f"{row['event loop']:.1f}, engine thread {row['engine thread']:.1f}; of all, in the kernel "
            f"{row['system']:.1f}), {row['bytes']:.0f} bytes a token, {row['tokens/s']:,.0f} tokens/s",
            flush=True,
        )
    child.terminate()
    if child.wait():
        raise SystemExit(f"the server ended with {child.returncode}")
    return rows


def wait_for_port(port: int) -> None:
    """Until the server listens."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", action="append", choices=tuple(KINDS))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="of a stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the null engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="append what was measured to this JSONL file")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--pure", action="store_true", help="without uvloop and httptools")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_null(args.step_ms / 1e3, args.profile, args.pure)
    rows = measure(args)
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"date": datetime.date.today().isoformat(), **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
