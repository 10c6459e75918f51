"""Many clients on one server for minutes: valid, invalid, aborting, slow-reading. Hangs, memory, pages at the end.

usage: python benchmarks/soak_server.py [--minutes 10] [--clients 64] [--rows FILE] -- ARTIFACT [options of `dsv4c run`]

The server is started as a user does. Each client does one thing after another, at random. At the end every client
leaves, the server must become idle with every page free, and it must end by SIGTERM with status 0. Memory is the
server's resident set, sampled every second; of its workers, if it has any, what is not shared. The cache of grammars is
filled before the time begins; the first fifth of the time (2 minutes of 10) is warm-up: the allocator's arenas and the
other caches grow to what this load needs. The medians of the tenths after it must lie within 2 % of each other, the
largest over the smallest. Exits with 1 if they do not, for a hang, a 5xx that is no 503, or a page that is not free.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import datetime
import itertools
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

PORT = 8124
NAME = "soaked"
URL = f"http://127.0.0.1:{PORT}"
TENTHS, WARM_UP = 10, 2
NUM_GRAMMARS = 300
HANG_S = 120.0  # no answer takes so long, at this load, on two cores
ENDS = (b"data: [DONE]\n\n", b"event: message_stop\n", b'"type":"response.completed"', b'"response.incomplete"')
WORDS = [
    "the",
    "package",
    "reads",
    "and",
    "writes",
    "files",
    "of",
    "many",
    "kinds,",
    "and",
    "the",
    "user",
    "is",
    "told",
    "what",
    "it",
    "did",
    "not",
    "understand",
]
INVALID: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"model": "other", "prompt": "a"}'),
    ("/v1/completions", b'{"model": "soaked", "prompt": "a", "temperature": -1}'),
    ("/v1/completions", b'{"model": "soaked", "prompt": []}'),
    ("/v1/completions", b'{"model": "soaked", "prompt": "a", "max_tokens": 99999999}'),
    ("/v1/chat/completions", b'{"model": "soaked", "messages": [{"role": "nobody", "content": "a"}]}'),
    ("/v1/chat/completions", b'{"model": "soaked", "messages": [{"role": "user", "content": "\xff"}]}'),
    ("/v1/chat/completions", b"[" * 100_000),
    ("/nothing", b"{}"),
)


class Counts(collections.Counter[str]):
    """What happened, by name."""

    faults: list[str]


def prompt(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 120)))


def generation(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A valid request of any kind."""
    body: dict[str, Any] = {"model": NAME, "max_tokens": draw.randint(1, 96), "stream": draw.random() < 0.6}
    body |= draw.choice([{}, {"temperature": 0}, {"seed": 7, "top_p": 0.9}, {"n": 2}, {"stop": ["the", "\n"]}])
    messages, text = [{"role": "user", "content": prompt(draw)}], prompt(draw)
    thinking = {"thinking": draw.random() < 0.5}
    kind = draw.choices(("chat", "structured", "tools", "messages", "responses", "text"), (5, 1, 1, 1, 1, 7))[0]
    if kind == "text":
        return "/v1/completions", {**body, "prompt": text, "ignore_eos": draw.random() < 0.5}
    if kind == "messages":
        return "/v1/messages", {**plain(body), "messages": messages}
    if kind == "responses":
        del body["max_tokens"]
        return "/v1/responses", {**plain(body), "input": text, "max_output_tokens": draw.randint(16, 96)}
    chat = {**body, "messages": messages, "chat_template_kwargs": thinking}
    if kind == "structured":  # more schemas than the cache of grammars holds
        chat["response_format"] = response_format(draw.randint(0, 999))
    if kind == "tools":
        function = {"name": f"look_up_{draw.randint(0, 9)}", "parameters": {"type": "object", "properties": {}}}
        chat |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    return "/v1/chat/completions", chat


def response_format(number: int) -> dict[str, Any]:
    properties = {f"key{number}": {"type": ("integer", "string", "boolean")[number % 3]}}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


async def fill_grammars() -> None:
    """Has the server compile more grammars than it keeps: some 35 MB, else reached within the time that counts."""
    async with aiohttp.ClientSession() as session:
        for number in range(NUM_GRAMMARS):
            body = {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
            body["response_format"] = response_format(number)
            async with session.post(f"{URL}/v1/chat/completions", json=body) as response:
                response.raise_for_status()


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """Of a body what the other APIs know, too."""
    return {name: body[name] for name in ("model", "max_tokens", "stream", "temperature") if name in body}


async def valid(session: aiohttp.ClientSession, draw: random.Random, counts: Counts) -> None:
    path, body = generation(draw)
    async with session.post(URL + path, json=body) as response:
        data = await response.read()
        counts[f"{path} {response.status}"] += 1
        whole = not body["stream"] or any(end in data[-4000:] for end in ENDS)
        if response.status not in (200, 503) or (response.status == 200 and not whole):
            counts.faults.append(f"valid: {response.status} {data[-200:]!r}")


async def invalid(session: aiohttp.ClientSession, draw: random.Random, counts: Counts) -> None:
    path, data = draw.choice(INVALID)
    async with session.post(URL + path, data=data) as response:
        said = await response.read()
        counts[f"invalid {response.status}"] += 1
        if not 400 <= response.status < 500 or b"Traceback" in said:
            counts.faults.append(f"invalid: {response.status} {said[-200:]!r}")


async def aborting(session: aiohttp.ClientSession, draw: random.Random, counts: Counts) -> None:
    path, body = generation(draw)
    async with session.post(URL + path, json={**body, "stream": True, "max_tokens": 400}) as response:
        if response.status == 200:
            await response.content.readany()
        await asyncio.sleep(draw.random() * 0.2)
        response.close()
    counts["aborted"] += 1


async def early_leaving(_session: aiohttp.ClientSession, draw: random.Random, counts: Counts) -> None:
    """Half a request, and gone."""
    _, writer = await asyncio.open_connection("127.0.0.1", PORT)
    data = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n" + b"{" * 100
    writer.write(data[: draw.randint(1, len(data))])
    await writer.drain()
    await asyncio.sleep(draw.random() * 0.1)
    writer.close()
    counts["left early"] += 1


async def slow(_session: aiohttp.ClientSession, draw: random.Random, counts: Counts) -> None:
    """Reads a stream a few hundred bytes at a time, and rests between."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1024)
    body = {"model": NAME, "prompt": prompt(draw), "max_tokens": 200, "stream": True, "logprobs": 5, "ignore_eos": True}
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(data) + data)
    until = time.monotonic() + 3 + 5 * draw.random()
    while time.monotonic() < until and await reader.read(500):
        await asyncio.sleep(0.02)
    writer.close()
    counts["slow"] += 1


KINDS: tuple[tuple[Callable[[aiohttp.ClientSession, random.Random, Counts], Awaitable[None]], int], ...] = (
    (valid, 10), (invalid, 4), (aborting, 4), (early_leaving, 2), (slow, 1),
)  # fmt: skip


async def client(number: int, until: float, counts: Counts) -> None:
    draw = random.Random(number)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while time.monotonic() < until:
            (act,) = draw.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
            try:
                await asyncio.wait_for(act(session, draw, counts), HANG_S)
            except TimeoutError:
                counts.faults.append(f"{act.__name__}: no end in {HANG_S:.0f} s")
            except (aiohttp.ClientError, OSError) as error:
                counts.faults.append(f"{act.__name__}: {type(error).__name__}: {error}")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096


def workers_bytes(pid: int) -> list[int]:
    """Of each process that it has started, oldest first: memory of its own, without pools that others can read."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    texts = [Path(f"/proc/{child}/status").read_text(encoding="utf-8") for child in sorted(children, key=int)]
    return [1024 * int(found[1]) for text in texts if (found := re.search(r"RssAnon:\s+(\d+) kB", text))]


async def numbers() -> dict[str, float]:
    """The samples of /metrics that matter here; of those with labels the sum."""
    found: dict[str, float] = collections.defaultdict(float)
    async with aiohttp.ClientSession() as session, session.get(f"{URL}/metrics") as response:
        for line in (await response.text()).splitlines():
            if match := re.fullmatch(r"(dsv4c_\w+)(?:\{.*\})? (\S+)", line):
                found[match[1]] += float(match[2])
    return found


async def soak(minutes: float, clients: int, pid: int) -> dict[str, Any]:
    counts, memory, workers = Counts(), [], []
    counts.faults = []
    until = time.monotonic() + 60 * minutes
    tasks = [asyncio.create_task(client(number, until, counts)) for number in range(clients)]
    while time.monotonic() < until:
        await asyncio.sleep(min(1.0, minutes))
        memory.append(resident_bytes(pid))
        workers.append(workers_bytes(pid))
    await asyncio.gather(*tasks)
    for _ in range(300):
        now = await numbers()
        busy = now["dsv4c_requests_running"] + now["dsv4c_requests_waiting"]
        if not busy and not now["dsv4c_kv_pages_used"]:
            break
        await asyncio.sleep(0.1)
    bounds = [round(i * len(memory) / TENTHS) for i in range(TENTHS + 1)]
    tenths = [statistics.median(memory[a : max(b, a + 1)]) for a, b in itertools.pairwise(bounds)]
    each = [[statistics.median(x) for x in zip(*workers[a : max(b, a + 1)])] for a, b in itertools.pairwise(bounds)]
    warm = tenths[WARM_UP:]
    return {
        "minutes": minutes, "clients": clients, "counts": dict(sorted(counts.items())), "faults": counts.faults[:20],
        "num_faults": len(counts.faults), "tokens": int(now["dsv4c_engine_generated_tokens_total"]),
        "preemptions": int(now["dsv4c_preemptions_total"]), "busy": busy, "pages_used": now["dsv4c_kv_pages_used"],
        "memory_mb_tenths": [round(size / 1e6, 1) for size in tenths], "warm_up_tenths": WARM_UP,
        "workers_mb_tenths": [[round(size / 1e6, 1) for size in sizes] for sizes in each],
        "memory_spread": round(max(warm) / min(warm) - 1, 4),
    }  # fmt: skip


async def listening(server: subprocess.Popen[str]) -> None:
    async with aiohttp.ClientSession() as session:
        while server.poll() is None:
            try:
                async with session.get(f"{URL}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=Path, help="append the result to this JSONL file")
    parser.add_argument("run", nargs="+")
    args = parser.parse_args()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            parser.error(f"something listens on port {PORT}: it would be asked in the server's place")
    command = [sys.executable, "-m", "dsv4c.cli", "run", *args.run, "--port", str(PORT), "--model-name", NAME]
    server = subprocess.Popen([*command, "--log-level", "error"], stderr=subprocess.PIPE, text=True)
    try:
        asyncio.run(listening(server))
        asyncio.run(fill_grammars())
        row = asyncio.run(soak(args.minutes, args.clients, server.pid))
        server.send_signal(signal.SIGTERM)
        said = server.communicate()[1]
    except aiohttp.ClientError:
        server.kill()
        print(f"the server ended with {server.wait()}: {server.communicate()[1][-3000:]}", file=sys.stderr)
        raise
    finally:
        server.kill()
    row["options"] = " ".join(args.run[1:])
    row |= {"exit": server.returncode, "traces": said.count("Traceback"), "date": datetime.date.today().isoformat()}
    print(json.dumps(row, indent=1))
    if row["traces"]:
        print(said[-3000:], file=sys.stderr)
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    bad = row["num_faults"] or row["busy"] or row["pages_used"] or row["exit"] or row["traces"]
    return 1 if bad or row["memory_spread"] > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
