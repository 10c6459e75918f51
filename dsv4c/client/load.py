"""A load generator: requests that arrive by a Poisson process or in a closed loop, each token timed as it comes.

    prompts --arrivals (rate) and seats (concurrency)--> streams --> Timed, one a request --> figures.py

Latencies count from when a request was due, not from when it could be sent: who falls behind does not hide it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from dsv4c.client.wire import Server, call, events
from dsv4c.errors import InputError

Endpoint = Literal["completions", "chat"]
_SYLLABLES = (
    "ba", "ce", "di", "fo", "gu", "ha", "ki", "le", "mo", "nu", "pa", "re", "si", "to", "vu", "wa", "ze", "an", "el",
    "in", "or", "us", "tri", "sto", "qua", "ber", "lin",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What to send, and how fast. `rate`: requests a second on average, None: all at once or as seats come free."""

    endpoint: Endpoint = "completions"
    num_prompts: int = 100
    rate: float | None = None
    concurrency: int | None = None
    input_len: int = 256
    output_len: int = 128
    seed: int = 0
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body."""


@dataclass
class Timed:
    """One request; seconds. `gaps_s`: between the pieces of its text. `error`: why it has no answer."""

    due_s: float
    ttft_s: float | None = None
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


Prompt = str | list[int]


async def random_prompts(session: aiohttp.ClientSession, server: Server, model: str, load: Load) -> list[Prompt]:
    """Prompts of `input_len` tokens of made-up words, as token ids.

    A chat's are texts, about as long; the server says how many tokens they had.
    """
    draw = random.Random(load.seed)

    def text(tokens: int) -> str:
        words = ("".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(max(1, tokens // 3)))
        return " ".join(words)

    if load.endpoint == "chat":
        return [text(load.input_len) for _ in range(load.num_prompts)]
    sample = text(12 * load.input_len + 3000)
    found = await call(session, "POST", f"{server.url}/tokenize", {"model": model, "prompt": sample})
    ids = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(ids, list) or len(ids) <= load.input_len:
        raise InputError("the server's /tokenize gives no token ids", hint="use `--endpoint chat`")
    starts = [draw.randrange(len(ids) - load.input_len) for _ in range(load.num_prompts)]
    return [ids[start : start + load.input_len] for start in starts]


async def run_load(
    server: Server, model: str, load: Load, prompts: Sequence[Prompt], progress: Callable[[int], None], timeout_s: float
) -> tuple[list[Timed], float]:
    """Sends every prompt; returns what was measured of each, and the seconds from the first request to the last end."""
    draw = random.Random(load.seed + 1)
    seats = asyncio.Semaphore(load.concurrency or len(prompts))
    ended = 0

    async def one(session: aiohttp.ClientSession, prompt: Prompt, due_s: float) -> Timed:
        nonlocal ended
        timed = Timed(due_s)
        try:
            await _stream(session, server, _body(load, model, prompt), load.endpoint, timed)
        except InputError as error:
            timed.error = error.message
        ended += 1
        progress(ended)
        return timed

    async def seated(session: aiohttp.ClientSession, prompt: Prompt, due_s: float) -> Timed:
        async with seats:
            # in a closed loop a request is due when a seat is free
            return await one(session, prompt, due_s if load.rate is not None else time.perf_counter())

    async with server.session(timeout_s) as session:
        tasks = []
        began = due = time.perf_counter()
        for prompt in prompts:
            if load.rate is not None:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(seated(session, prompt, due)))
            due += draw.expovariate(load.rate) if load.rate is not None else 0.0
        timed = await asyncio.gather(*tasks)
        return timed, time.perf_counter() - began


def _body(load: Load, model: str, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"max_tokens": load.output_len, "ignore_eos": load.ignore_eos, **load.extra}
    if load.endpoint == "chat":
        return {**body, "messages": [{"role": "user", "content": prompt}]}
    return {**body, "prompt": prompt}


async def _stream(
    session: aiohttp.ClientSession, server: Server, body: dict[str, Any], endpoint: Endpoint, timed: Timed
) -> None:
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    last_s = timed.due_s
    async for event in events(session, server.url + path, body):
        now = time.perf_counter()
        if usage := event.get("usage"):
            timed.prompt_tokens = usage["prompt_tokens"]
            timed.output_tokens = usage["completion_tokens"]
        if not any(_says(choice) for choice in event["choices"]):
            continue
        if timed.ttft_s is None:
            timed.ttft_s = now - timed.due_s
        else:
            timed.gaps_s.append(now - last_s)
        last_s = now
    timed.e2e_s = last_s - timed.due_s


def _says(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
