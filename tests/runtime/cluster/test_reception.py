"""Who is taken in by a router, and who is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from dsv4c.errors import LinkError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.link import Link, pair
from dsv4c.runtime.cluster.reception import Reception
from tests.runtime.cluster.scripted import Stage, hello
from tests.runtime.live import wait_for

LAYOUT = {"model_sha256": "aa", "kv_groups": "bb"}


@pytest.fixture
def call() -> Callable[[Any], tuple[Stage, Link]]:
    """Calls a router with a first message."""

    def calling(first: Any) -> tuple[Stage, Link]:
        stage = Stage(0, 0)
        ours, theirs = pair()
        reception = Reception(stage.router, LAYOUT)
        threading.Thread(target=reception.serve, args=(theirs,), daemon=True).start()
        ours.send(first if isinstance(first, bytes) else wire.encode(first))
        return stage, ours

    return calling


def test_a_worker_of_the_same_artifact_is_welcome(call: Callable[[Any], tuple[Stage, Link]]) -> None:
    stage, link = call(hello("both", "one", layout=LAYOUT))
    assert isinstance(wire.decode_for_worker(link.receive()), wire.Welcome)
    assert [m.name for m in stage.router.members] == ["one"] and stage.router.knows("one")
    client = stage.ask()
    job = wire.decode_for_worker(link.receive())
    assert isinstance(job, wire.Decode)
    link.send(wire.encode(wire.Said([wire.Spoken(job.job.id, (4,), wire.Ended("stop", 1, 1))])))
    wait_for(lambda: client.end is not None)
    link.close()
    wait_for(lambda: not stage.router.members)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layout": {**LAYOUT, "model_sha256": "cc"}}, "`model_sha256`"),
        ({"layout": {"model_sha256": "aa"}}, "`kv_groups`"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_worker_of_another_artifact_is_told_why_not(
    changed: dict[str, Any], says: str, call: Callable[[Any], tuple[Stage, Link]]
) -> None:
    stage, link = call(hello("both", "one", **{"layout": LAYOUT, **changed}))
    refused = wire.decode_for_worker(link.receive())
    assert isinstance(refused, wire.Refused) and says in refused.message and refused.hint
    with pytest.raises(LinkError):
        link.receive()
    assert not stage.router.members


def test_workers_agree_on_weights_among_themselves() -> None:
    stage = Stage(0, 0)
    reception = Reception(stage.router, LAYOUT)
    first, same, other, none = (
        hello("both", name, layout={**LAYOUT, **weights})
        for name, weights in (("a", {"weights": "1"}), ("b", {"weights": "1"}), ("c", {"weights": "2"}), ("d", {}))
    )
    assert reception.refusal(first) is None
    stage.join("both", "a")
    assert reception.refusal(same) is None
    for wrong in (other, none):
        refused = reception.refusal(wrong)
        assert refused is not None and "`weights`" in refused.message and "other workers'" in refused.message
    member = stage.router.members[0]
    stage.router.lose(member, "it leaves")
    assert reception.refusal(other) is None


@pytest.mark.parametrize("first", [b"garbage", wire.Beat()])
def test_who_does_not_introduce_himself_is_turned_away(first: Any, call: Callable[[Any], tuple[Stage, Link]]) -> None:
    stage, link = call(first)
    with pytest.raises(LinkError):
        link.receive()
    assert not stage.router.members and stage.router.failure is None


def test_a_worker_that_talks_nonsense_is_lost_and_the_router_goes_on(call: Callable[[Any], tuple[Stage, Link]]) -> None:
    stage, link = call(hello("both", "one", layout=LAYOUT))
    link.receive()
    client = stage.ask()
    link.send(b"\x00nonsense")
    wait_for(lambda: not stage.router.members)
    other = stage.join("both", "two")
    other.tell(other.one(wire.Decode).job, 3, end="stop")
    assert client.tokens == [3] and stage.router.failure is None
