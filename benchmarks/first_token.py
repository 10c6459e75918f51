"""From `dsv4c run` to the first token served, and whether the first request is as fast as the hundredth.

usage: python benchmarks/first_token.py [--rows FILE] -- ARTIFACT [options of `dsv4c run`]

Starts the server as a user does, waits until its port answers, and sends the same greedy request one after another.
Seconds: `ready` until /health answers, `first token` until the first byte of text of the first request.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PORT = 8123
REQUESTS = 100
PROMPT = "The package provides a way to read and to write files of many kinds, and it is documented. " * 4
TOKENS = 16
NAME = "measured"


def request() -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"the server answered {answer.status}: {answer.read().decode()}")
    first = 0.0
    for line in answer:
        if line.startswith(b"data: ") and not first:
            first = time.perf_counter() - began
    return first, time.perf_counter() - began


def healthy() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("run", nargs="+")
    args = parser.parse_args()
    began = time.perf_counter()
    command = [sys.executable, "-m", "dsv4c.cli", "run", *args.run, "--port", str(PORT), "--model-name", NAME]
    server = subprocess.Popen(command)
    try:
        while not healthy():
            if server.poll() is not None:
                return 1
            time.sleep(0.02)
        ready = time.perf_counter() - began
        found = [request() for _ in range(REQUESTS)]
    finally:
        server.terminate()
        server.wait()
    firsts, lasts = [first for first, _ in found], [last for _, last in found]
    row: dict[str, Any] = {
        "phase": "first token", "date": datetime.date.today().isoformat(), "run": args.run, "ready_s": round(ready, 2),
        "first_token_s": round(ready + firsts[0], 2), "ttft_1st_ms": round(firsts[0] * 1e3, 2),
        "ttft_2nd_ms": round(firsts[1] * 1e3, 2), "ttft_100th_ms": round(firsts[-1] * 1e3, 2),
        "ttft_median_ms": round(statistics.median(firsts) * 1e3, 2), "whole_1st_ms": round(lasts[0] * 1e3, 2),
        "whole_100th_ms": round(lasts[-1] * 1e3, 2), "whole_median_ms": round(statistics.median(lasts) * 1e3, 2),
    }  # fmt: skip
    print(row)
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
