"""A real server for tests: uvicorn on a free loopback port, over the stand-in executor and a codec of 61 tokens."""

from __future__ import annotations

import codecs
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch

from dsv4c.chat.dsml import call_start
from dsv4c.chat.grammar import Marks, answer_grammar
from dsv4c.chat.parse import AnswerParser
from dsv4c.errors import RequestError
from dsv4c.runtime.app import create_app
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.outputs import ServedEngine
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.serve import IDLE_S, GracefulServer, bind
from tests.runtime.standin import VOCAB, make_engine

MODEL = "toy"
EOS = 1
_SPECIAL = (b"<bos>", b"<eos>")
_ADDED = (b"<think>", b"</think>")
_PIECES = (b"\xc3", b"\xa9", b"\xe6", b"\x97", b"\xa5", b"the", b"END", b" of", b" to", b"ing")
_SINGLE = "abcdefghijklmnopqrstuvwxyz \n.,?!-<>/0123456789:"
TOKENS = [*_SPECIAL, *_ADDED, *(c.encode() for c in _SINGLE), *_PIECES]
assert len(TOKENS) == VOCAB


class _Detokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return "" if token_id < len(_SPECIAL) else self._decoder.decode(TOKENS[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ToyCodec:
    """Characters, a few words, and bytes that are no characters alone."""

    vocab_size = VOCAB
    eos_token_ids = (EOS,)
    call_token = None
    added_token_ids = frozenset(range(len(_SPECIAL) + len(_ADDED)))

    def vocabulary(self) -> list[bytes]:
        return TOKENS

    def answer_grammar(self, content: Mapping[str, Any] | None, **options: Any) -> str:
        return answer_grammar(Marks(dsml=0, think_end=TOKENS.index(b"</think>")), content, **options)

    def encode(self, text: str) -> list[int]:
        ids = []
        for character in text.lower():
            raw = character.encode()
            pieces = [raw] if raw in TOKENS else [bytes([byte]) for byte in raw]
            ids += [TOKENS.index(p) for p in pieces] if all(p in TOKENS for p in pieces) else [TOKENS.index(b"?")]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        return TOKENS[token_id]

    def token_text(self, token_id: int) -> str:
        return TOKENS[token_id].decode(errors="replace")

    def detokenizer(self) -> _Detokenizer:
        return _Detokenizer()

    def in_reasoning(self, prompt: Sequence[int]) -> bool:
        return prompt[-1] == TOKENS.index(b"<think>")

    def call_start(self, name: str | None) -> str:
        return call_start(name)

    def parser(self, thinking: bool) -> AnswerParser:
        return AnswerParser(thinking)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        effort: str | None = None,
        drop_thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> list[int]:
        for i, message in enumerate(messages):
            if message.get("role") not in ("system", "user", "assistant", "tool"):
                raise RequestError(f"`messages[{i}].role` is unknown", param=f"messages[{i}].role")
            if not isinstance(message.get("content"), str | list):
                raise RequestError(f"`messages[{i}].content` is missing", param=f"messages[{i}].content")
        if effort not in (None, "high", "max"):
            raise RequestError(f"unknown effort `{effort}`", param="reasoning_effort")
        said = json.dumps([messages, tools, response_format, effort, drop_thinking], sort_keys=True)
        return [0, *self.encode(said), TOKENS.index(b"<think>" if thinking else b"</think>")]


class Paced:
    """An executor that waits `step_s` seconds in every step, or as long as `gate` is cleared."""

    def __init__(self, inner: Any, step_s: float = 0.0) -> None:
        self.inner = inner
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()

    @property
    def states(self) -> Mapping[str, torch.Tensor]:
        states: Mapping[str, torch.Tensor] = self.inner.states
        return states

    def step(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.gate.wait()
        time.sleep(self.step_s)
        return self.inner.step(inputs)


@dataclass
class Live:
    """A running server. `close` stops it as SIGTERM would."""

    url: str
    model: str
    codec: Any
    engine: Engine
    loop: EngineLoop
    server: GracefulServer
    thread: threading.Thread

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    @property
    def special(self) -> set[str]:
        """Texts of the tokens that are never shown."""
        shown = [self.codec.token_text(i) for i in range(self.codec.vocab_size) if not self.codec.decode([i])]
        return set(shown)

    def pages_used(self) -> int:
        return sum(self.engine.stats().pages_used.values())

    def narrow(self) -> None:
        """Leaves connections to come little room in the kernel: a client that does not read is felt soon."""
        self.server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.loop.close(drain=False)


def start(
    engine: Engine, codec: Any, model: str = MODEL, *, drain_s: float = 5.0, idle_s: int = IDLE_S, **options: Any
) -> Live:
    """Serves this engine on a free port of the loopback interface."""
    loop = EngineLoop(engine).start()
    app = create_app(ServedEngine(loop), codec, model, **options)
    server = GracefulServer(app, bind(port=0), drain_s=drain_s, idle_s=idle_s, log_level="error")
    thread = threading.Thread(target=server.run, name="test-server", daemon=True)
    url = server.url
    thread.start()
    live = Live(url, model, codec, engine, loop, server, thread)
    wait_for(lambda: server.started or not thread.is_alive())
    assert httpx.get(f"{url}/health").status_code == 200
    return live


def start_toy(
    *,
    max_requests: int = 32,
    max_waiting: int = 64,
    max_context: int = 1024,
    step_s: float = 0.0,
    eos: Sequence[int] = (EOS,),
    **options: Any,
) -> tuple[Live, Paced]:
    """The toy server and its executor, to slow it down or stop it. `eos=()`: answers end at their length only."""
    limits = Limits(max_requests=max_requests, max_step_tokens=256, max_waiting=max_waiting)
    groups_sizes = _sizes(max_requests, max_context, limits)
    engine, standin = make_engine(groups_sizes, limits, eos=eos)
    paced = Paced(standin, step_s)
    engine.runner.executor = paced
    return start(engine, ToyCodec(), **options), paced


def _sizes(max_requests: int, max_context: int, limits: Limits) -> PoolSizes:
    from tests.runtime.standin import kv_groups

    return PoolSizes.for_requests(kv_groups(), max_requests, max_context, limits.max_step_tokens, 2 * max_requests)


def wait_for(condition: Callable[[], bool], polls: int = 3000) -> None:
    """Waits until the condition holds; a hang guard far above any real wait, not a speed limit."""
    for _ in range(polls):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never held")
