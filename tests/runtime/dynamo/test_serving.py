"""Requests served by nodes over stand-ins, a test in the place of Dynamo's router: every role and both hand-overs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dsv4c.errors import PeerGone, RequestError
from dsv4c.runtime.dynamo.publish import Publishing
from dsv4c.runtime.dynamo.rendezvous import Rendezvous, Room, meet
from dsv4c.runtime.dynamo.serving import Role, Serving
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.transfer.node import Granted, Node, Prefilled
from tests.runtime.dynamo.test_asked import CHAT, request
from tests.runtime.transfer.nodes import Pair, text

HERE = "127.0.0.1"


class Codec:
    """Token 60 begins a chat's answer."""

    eos_token_ids = ()
    added_token_ids = frozenset[int]()

    def answer_start(self, prompt: Any) -> int | None:
        return prompt.index(60) + 1 if 60 in prompt else None

    def in_reasoning(self, prompt: Any) -> bool:
        return False

    def vocabulary(self) -> list[bytes]:
        return []

    def encode(self, text: str) -> list[int]:
        return []

    def answer_grammar(self, content: Any, **more: Any) -> str:
        return ""


class Caller:
    """Dynamo's context of one request."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()

    def is_stopped(self) -> bool:
        return self._gone.is_set()

    async def async_killed_or_stopped(self) -> bool:
        return await self._gone.wait()

    def leave(self) -> None:
        self._gone.set()


@contextmanager
def pair(**options: Any) -> Iterator[Pair]:
    made = Pair(**options)
    try:
        yield made
    finally:
        made.close()


def serving(node: Node, role: Role = "both", rendezvous: Rendezvous | None = None, **options: Any) -> Serving:
    publishing = Publishing(node.loop, 16)
    return Serving(node, Codec(), Metrics(node.loop.stats), publishing, role=role, rendezvous=rendezvous, **options)


async def all_of(
    served: Serving, asked: dict[str, Any], caller: Caller | None = None, **more: Any
) -> list[dict[str, Any]]:
    return [chunk async for chunk in served.answer(asked, caller or Caller(), **more)]


def tokens(chunks: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [token for chunk in chunks if chunk["index"] == index for token in chunk["token_ids"]]


def body(prompt: list[int], **sampling: Any) -> dict[str, Any]:
    stops = {"max_tokens": sampling.pop("max_tokens", 12), "ignore_eos": True, "stop_token_ids_hidden": None}
    return request(token_ids=prompt, stop_conditions=stops, sampling_options={"temperature": 0.0, **sampling})


async def alone(node: Node, asked: dict[str, Any]) -> list[int]:
    return tokens(await all_of(serving(node), asked))


@pytest.mark.parametrize("interval", [1, 5])
def test_both(interval: int) -> None:
    async def run() -> None:
        with pair() as nodes:
            chunks = await all_of(serving(nodes.decode, stream_interval=interval), body(text(20), max_tokens=11))
            assert len(tokens(chunks)) == 11 and chunks[-1]["finish_reason"] == "length"
            assert len(chunks[0]["token_ids"]) >= 1 and len(chunks) <= 11
            assert chunks[-1]["completion_usage"]["completion_tokens"] == 11
            if interval > 1:
                assert len(chunks) <= 4  # 1, 5, 5, or more at once
            nodes.assert_empty()

    asyncio.run(run())


def test_choices_end_together_and_differ() -> None:
    async def run() -> None:
        with pair() as nodes:
            chunks = await all_of(serving(nodes.decode), body(text(20), n=3, temperature=1.0, seed=5, max_tokens=9))
            assert all(len(tokens(chunks, i)) == 9 for i in range(3)) and tokens(chunks, 0) != tokens(chunks, 1)
            assert [c["index"] for c in chunks if "finish_reason" in c] == [c["index"] for c in chunks[-3:]]

    asyncio.run(run())


@pytest.mark.parametrize("hand_over", ["completed", "bootstrap"])
@pytest.mark.parametrize("n", [1, 3])
def test_hand_over(hand_over: str, n: int) -> None:
    async def run() -> None:
        with pair() as nodes:
            rendezvous = Rendezvous() if hand_over == "bootstrap" else None
            if rendezvous is not None:
                await rendezvous.start(HERE, 0)
            first, then = serving(nodes.prefill, "prefill", rendezvous), serving(nodes.decode, "decode")
            for length in (1, 15, 16, 17, 90):
                asked = body(text(length), n=n, temperature=1.0, seed=length)
                wanted = await all_of(serving(nodes.prefill), asked)
                if rendezvous is None:
                    (prefill,) = await all_of(first, asked)
                    assert len(prefill["token_ids"]) == 1
                    chunks = await all_of(then, {**asked, "prefill_result": prefill})
                else:
                    room = {"bootstrap_host": HERE, "bootstrap_port": rendezvous.port, "bootstrap_room": 2**62 + length}
                    _, chunks = await asyncio.gather(
                        all_of(first, {**asked, "bootstrap_info": room}),
                        all_of(then, {**asked, "bootstrap_info": room}),
                    )
                assert [tokens(chunks, i) for i in range(n)] == [tokens(wanted, i) for i in range(n)], length
            stats = nodes.decode.stats()
            assert (stats.moved, stats.recomputed) == (5, 0)
            if rendezvous is not None:
                await rendezvous.close()
            while not nodes.prefill.quiescent():
                await asyncio.sleep(0.01)
            nodes.assert_empty()

    asyncio.run(run())


def test_a_decode_worker_computes_what_nobody_has_handed_over() -> None:
    async def run() -> None:
        with pair(ttl_s=0.05) as nodes:
            asked, then = body(text(40)), serving(nodes.decode, "decode")
            wanted = await alone(nodes.prefill, asked)
            assert tokens(await all_of(then, asked)) == wanted
            assert tokens(await all_of(then, asked, probe=True)) == wanted
            (prefill,) = await all_of(serving(nodes.prefill, "prefill"), asked)
            while not nodes.prefill.quiescent():  # the lease expires
                await asyncio.sleep(0.01)
            assert tokens(await all_of(then, {**asked, "prefill_result": prefill})) == wanted
            for strange in (
                {"version": 99},
                {"version": 1, "handle": {}},
                {"version": 1, "handle": {"version": 1}, "first": 3},
            ):
                broken = {**asked, "prefill_result": {"disaggregated_params": strange}}
                assert tokens(await all_of(then, broken)) == wanted, strange
            nobody = {"bootstrap_host": HERE, "bootstrap_port": 1, "bootstrap_room": 5}
            assert tokens(await all_of(then, {**asked, "bootstrap_info": nobody})) == wanted
            assert tokens(await all_of(then, {**asked, "bootstrap_info": {"bootstrap_host": HERE}})) == wanted
            nodes.assert_empty()

    asyncio.run(run())


def test_a_prefill_that_fails_is_told_in_its_room() -> None:
    async def run() -> None:
        with pair() as nodes:
            rendezvous = Rendezvous()
            await rendezvous.start(HERE, 0)
            asked = body(text(40))
            wanted = await alone(nodes.decode, asked)
            room = {"bootstrap_host": HERE, "bootstrap_port": rendezvous.port, "bootstrap_room": 9}
            caller = Caller()
            prefill = asyncio.ensure_future(
                all_of(serving(nodes.decode, "prefill", rendezvous), {**asked, "bootstrap_info": room}, caller)
            )
            nodes.decode.close(drain=False)
            with pytest.raises(RequestError):
                await prefill
            then = serving(nodes.prefill, "decode")
            assert tokens(await all_of(then, {**asked, "bootstrap_info": room})) == wanted
            await rendezvous.close()

    asyncio.run(run())


@pytest.mark.parametrize("role", ["both", "prefill", "decode"])
def test_a_client_that_leaves(role: Role) -> None:
    async def run() -> None:
        with pair() as nodes:
            served, caller = serving(nodes.prefill, role), Caller()
            asked = body(text(200), max_tokens=50)
            chunks = served.answer(asked, caller)
            if role == "prefill":
                task = asyncio.ensure_future(anext(chunks))
                await asyncio.sleep(0)
                caller.leave()
                await asyncio.wait([task])
                _ = task.exception()  # it may have been quicker
            else:
                await anext(chunks)
                caller.leave()
                rest = [chunk async for chunk in chunks]
                assert rest[-1]["finish_reason"] in ("cancelled", "length")
            late = Caller()
            late.leave()
            (said,) = await all_of(served, asked, late)
            assert said["finish_reason"] == "cancelled" and said["token_ids"] == []
            await chunks.aclose()
            assert served.num_jobs == 0

    asyncio.run(run())


def test_what_another_worker_has_generated_goes_on_as_if_here() -> None:
    async def run() -> None:
        with pair() as nodes:
            served = serving(nodes.prefill)
            asked = {**body([*text(20), 60], temperature=1.0, seed=3, max_tokens=14), **CHAT}
            wanted = tokens(await all_of(served, asked))
            moved = {**body([*text(20), 60, *wanted[:5]], temperature=1.0, seed=3, max_tokens=9), **CHAT}
            chunks = await all_of(served, moved)
            assert tokens(chunks) == wanted[5:]
            assert chunks[-1]["completion_usage"]["completion_tokens"] == 14
            assert chunks[-1]["completion_usage"]["prompt_tokens"] == 21

    asyncio.run(run())


def test_refusals() -> None:
    async def run() -> None:
        with pair() as nodes:
            served = serving(nodes.decode)
            for asked in (body(text(256)), body(text(10), max_tokens=10_000), body([100_000]), body([])):
                with pytest.raises(RequestError):
                    await all_of(served, asked)
            assert served.num_jobs == 0

    asyncio.run(run())


def test_a_prefill_worker_leaves_refusals_to_the_decode_worker() -> None:
    """The frontend makes a 500 of whatever a prefill worker raises."""

    async def run() -> None:
        with pair() as nodes:
            first, then = serving(nodes.prefill, "prefill"), serving(nodes.decode, "decode")
            for asked in (body(text(256)), body([100_000])):
                (prefill,) = await all_of(first, asked)
                assert prefill["token_ids"] == []
                with pytest.raises(RequestError):
                    await all_of(then, {**asked, "prefill_result": prefill})
            nodes.assert_empty()

    asyncio.run(run())


def test_rooms() -> None:
    async def run() -> None:
        rendezvous = Rendezvous()
        await rendezvous.start(HERE, 0)
        first = Prefilled((7,), cached_tokens=3)

        async def visit(number: int) -> list[Any]:
            return [message async for message in meet(HERE, rendezvous.port, number)]

        early = asyncio.ensure_future(visit(1))  # the visitor is first
        await asyncio.sleep(0.05)
        room = rendezvous.room(1)
        room.granted(Granted({"a": 1}))
        room.prefilled(first)
        assert await early == [Granted({"a": 1}), first]
        room = rendezvous.room(2)  # the prefill is first
        room.granted(Granted({"b": 2}))
        room.failed("no")
        with pytest.raises(PeerGone, match="no"):
            await visit(2)
        waiting = asyncio.ensure_future(visit(3))
        await asyncio.sleep(0.05)
        await rendezvous.close()
        with pytest.raises(PeerGone):
            await waiting
        with pytest.raises(PeerGone, match="cannot be reached"):
            await visit(4)

    asyncio.run(run())


def test_a_silent_prefill_worker_is_lost() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(silent, HERE, 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerGone, match="said nothing"):
            async for _ in meet(HERE, port, 1, silence_s=0.1):
                pass
        server.close()

    asyncio.run(run())


def test_a_room_without_a_request_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4c.runtime.dynamo.rendezvous.UNCLAIMED_S", 0.0)
    monkeypatch.setattr("dsv4c.runtime.dynamo.rendezvous.ALIVE_S", 0.01)

    async def run() -> None:
        room = Room()
        lines = [line async for line in room.lines()]
        assert b"failed" in lines[-1]

    asyncio.run(run())
