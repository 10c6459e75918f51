"""The router against scripted workers: placement, back-pressure, attempts, lost workers, cancellation."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.journeys import MOST_LOSSES
from dsv4c.runtime.params import SamplingParams
from tests.runtime.cluster.scripted import BLOCK, Client, Stage, Worker, hashes_of
from tests.runtime.standin import VOCAB


def test_a_request_goes_through_prefill_and_decode() -> None:
    stage = Stage()
    (prefill,), (decode,) = stage.prefill, stage.decode
    client = stage.ask()
    assert stage.router.states()["prefilling"] == 1
    job = stage.hand_over(prefill, decode)
    assert stage.router.states()["transferring"] == 1
    decode.tell(job, 9)
    assert stage.router.states()["decoding"] == 1
    assert prefill.one(wire.Cancel).id == job.id  # the lease is let go
    decode.tell(job, 10, 11, end="length")
    assert client.tokens == [9, 10, 11]
    assert client.end is not None and client.end.finish_reason == "length"
    assert stage.router.states()["finished"] == 1
    stage.check_nothing_is_booked()


def test_every_attempt_has_the_same_seed() -> None:
    stage = Stage(prefill=0)
    stage.ask(temperature=1.0)
    first = stage.decode[0].one(wire.Decode).job
    stage.decode[0].tell(first, 4)
    other = stage.join("decode", "decode-1")
    stage.decode[0].lose()
    again = other.one(wire.Decode).job
    assert again.sampling.seed == first.sampling.seed is not None
    assert wire.tokens_of(again.generated).tolist() == [4]
    assert again.id != first.id


def test_without_a_prefill_worker_the_decode_worker_computes() -> None:
    stage = Stage(prefill=0)
    client = stage.ask()
    asked = stage.decode[0].one(wire.Decode)
    assert asked.handle is None
    stage.decode[0].tell(asked.job, 3, end="length")
    assert client.tokens == [3]
    stage.check_nothing_is_booked()


def test_workers_that_cannot_reach_each_other_are_no_pair() -> None:
    stage = Stage(prefill=0, decode=1)
    stage.join("prefill", "elsewhere", transfer="nixl")
    stage.ask()
    assert stage.decode[0].one(wire.Decode).handle is None


def test_roles_both_compute_alone() -> None:
    stage = Stage(prefill=0, decode=0, both=2)
    clients = [stage.ask([i] * 4) for i in (4, 5)]
    for worker, client in zip(stage.both, clients, strict=True):
        worker.tell(worker.one(wire.Decode).job, 1, end="stop")
        assert client.end is not None


def test_prompts_go_where_their_blocks_are() -> None:
    stage = Stage(prefill=2, decode=1)
    prompt = [7] * (2 * BLOCK + 40)
    stage.prefill[1].say(wire.Blocks(stored=hashes_of(prompt)))
    stage.ask(prompt)
    job = stage.prefill[1].one(wire.Prefill).job
    assert stage.router.journeys.placed_cached_tokens == 2 * BLOCK
    stage.prefill[1].say(wire.Granted(job.id, {}))
    stage.prefill[1].say(wire.Handover(job.id, (1,)))
    stage.prefill[1].say(wire.Blocks(removed=hashes_of(prompt)[:1]))  # without its first block the rest is no use
    stage.ask(prompt)
    stage.prefill[0].one(wire.Prefill)


def test_a_prefix_does_not_outweigh_a_long_queue() -> None:
    stage = Stage(prefill=2)
    prompt = [7] * (BLOCK + 10)
    stage.prefill[0].say(wire.Blocks(stored=hashes_of(prompt)))
    stage.ask([9] * 1500)
    stage.prefill[0].one(wire.Prefill)
    stage.ask(prompt)
    stage.prefill[1].one(wire.Prefill)


def test_prompts_are_spread_over_equals() -> None:
    stage = Stage(prefill=2, decode=2)
    for i in range(4):
        stage.ask([i + 2] * 100)
    assert [len(w.take(wire.Prefill)) for w in stage.prefill] == [2, 2]
    assert stage.router.members[2].given.keys() != stage.router.members[3].given.keys()
    assert [len(m.given) for m in stage.router.members] == [2, 2, 2, 2]


def test_what_does_not_fit_waits_and_a_full_queue_refuses() -> None:
    stage = Stage(max_waiting=3)
    first = [stage.ask([4] * 10) for _ in range(8)]  # as many as a worker has slots
    waiting = [stage.ask([5] * 10) for _ in range(3)]
    assert stage.router.stats().waiting == 3
    with pytest.raises(RequestError) as refused:
        stage.ask()
    assert (refused.value.status, refused.value.code) == (503, "queue_full")
    assert len(stage.prefill[0].take(wire.Prefill)) == 8
    stage.router.cancel(first[0].number)
    assert stage.prefill[0].one(wire.Prefill) is not None  # the first in the queue has its place
    assert stage.router.stats().waiting == 2
    for client in (*first, *waiting):
        stage.router.cancel(client.number)
    stage.check_nothing_is_booked()


def test_pages_of_decode_workers_are_never_overcommitted() -> None:
    stage = Stage(prefill=0, decode=1)
    for _ in range(8):
        stage.ask([4] * 1000, max_tokens=1000)  # 8 blocks of 256 tokens each; a worker has 32
    given = stage.decode[0].take(wire.Decode)
    assert len(given) == 4
    assert stage.router.members[0].claimed["c4"] == 32
    stage.decode[0].tell(given[0].job, 1, end="stop")
    assert len(stage.decode[0].take(wire.Decode)) == 1


def test_a_budget_admits_more_and_moves_along() -> None:
    stage = Stage(prefill=0, decode=1, budget_tokens=64)
    for _ in range(8):
        stage.ask([4] * 200, max_tokens=1000)
    given = stage.decode[0].take(wire.Decode)
    assert len(given) == 8
    assert stage.router.members[0].claimed["c4"] == 16
    stage.decode[0].tell(given[0].job, *[3] * 256)
    assert stage.router.members[0].claimed["c4"] == 17


def test_priorities_go_first_and_nobody_overtakes() -> None:
    stage = Stage(prefill=0)
    running = [stage.ask([4] * 1000, max_tokens=1000) for _ in range(4)]
    big, small, urgent = stage.ask([5] * 1500), stage.ask([6] * 4), stage.ask([7] * 1200, priority=-1)
    stage.decode[0].take(wire.Decode)
    stage.router.cancel(running[0].number)
    (asked,) = stage.decode[0].take(wire.Decode)
    assert wire.tokens_of(asked.job.prompt)[0] == 7
    assert not any(c.outputs for c in (big, small, urgent))


def test_a_lost_decode_worker_costs_no_token() -> None:
    stage = Stage(prefill=1, decode=2)
    client = stage.ask([5] * 40)
    decode = next(w for w in stage.decode if w.member is not None and w.member.given)
    other = next(w for w in stage.decode if w is not decode)
    job = stage.hand_over(stage.prefill[0], decode)
    decode.tell(job, 9)
    decode.tell(job, 10)
    stage.prefill[0].take(wire.Cancel)
    decode.lose()
    again = stage.hand_over(stage.prefill[0], other, first=11)
    assert wire.tokens_of(again.generated).tolist() == [9, 10]
    decode.tell(job, 77)  # it is not known to be lost by itself
    other.tell(again, 11, end="length")
    assert client.tokens == [9, 10, 11]
    assert stage.router.journeys.retried == 1 and stage.router.losses == {"decode": 1}
    stage.check_nothing_is_booked()


def test_a_lost_prefill_worker_before_its_grant_is_replaced() -> None:
    stage = Stage(prefill=2)
    client = stage.ask()
    first = next(w for w in stage.prefill if w.take(wire.Prefill))
    other = next(w for w in stage.prefill if w is not first)
    first.lose()
    assert stage.decode[0].one(wire.PeerGone).peer == first.member.facts.peer  # type: ignore[union-attr]
    stage.decode[0].tell(stage.hand_over(other, stage.decode[0]), 9, end="length")
    assert client.tokens == [9]
    stage.check_nothing_is_booked()


@pytest.mark.parametrize("computed", [False, True])
def test_after_the_grant_the_decode_worker_computes_what_it_lacks(computed: bool) -> None:
    stage = Stage()
    (prefill,), (decode,) = stage.prefill, stage.decode
    client = stage.ask()
    job = prefill.one(wire.Prefill).job
    prefill.say(wire.Granted(job.id, {}))
    if computed:
        prefill.say(wire.Handover(job.id, (9,)))
    prefill.lose()
    assert decode.one(wire.Alone).id == job.id
    decode.tell(job, 9, end="length")
    assert client.tokens == [9]
    stage.check_nothing_is_booked()


def test_a_lost_prefill_worker_is_nothing_to_a_request_that_decodes() -> None:
    stage = Stage()
    client = stage.ask()
    job = stage.hand_over(stage.prefill[0], stage.decode[0])
    stage.decode[0].tell(job, 9)
    stage.prefill[0].lose()
    assert not stage.decode[0].take(wire.Alone)
    stage.decode[0].tell(job, 10, end="length")
    assert client.tokens == [9, 10]


def test_requests_wait_for_a_worker_and_not_for_ever() -> None:
    stage = Stage(prefill=0, patience_s=10)
    client = stage.ask()
    stage.decode[0].lose()
    stage.clock.now_s += 9
    stage.router.tick()
    assert client.end is None
    stage.clock.now_s += 2
    stage.router.tick()
    assert client.end is not None and isinstance(client.end.error, RequestError)
    assert client.end.error.status == 503
    with pytest.raises(RequestError, match="no worker"):
        stage.ask()
    later = stage.join("decode", "later")
    assert not later.take(wire.Decode)
    stage.ask()
    later.one(wire.Decode)


def test_a_request_that_loses_every_worker_is_given_up() -> None:
    stage = Stage(prefill=0)
    client = stage.ask()
    worker = stage.decode[0]
    for i in range(MOST_LOSSES + 1):
        assert client.end is None
        worker.lose()
        worker = stage.join("decode", f"another-{i}")
    assert client.end is not None and isinstance(client.end.error, EngineError)
    assert not worker.take(wire.Decode)
    stage.check_nothing_is_booked()


def test_a_silent_worker_is_lost_and_not_listened_to() -> None:
    stage = Stage(prefill=0, decode=2, silence_s=5.0)
    client = stage.ask()
    silent = next(w for w in stage.decode if w.member is not None and w.member.given)
    other = next(w for w in stage.decode if w is not silent)
    job = silent.one(wire.Decode).job
    stage.clock.now_s += 4
    other.say(wire.Beat())
    stage.router.tick()
    assert not silent.closed
    stage.clock.now_s += 2
    stage.router.tick()
    assert silent.closed and not other.closed
    silent.tell(job, 55)
    assert client.tokens == []
    other.tell(other.one(wire.Decode).job, 9, end="stop")
    assert client.tokens == [9]


def test_a_worker_that_leaves_gets_nothing_new_and_is_no_loss() -> None:
    stage = Stage(prefill=0, decode=2)
    first = stage.ask()
    leaving = next(w for w in stage.decode if w.take(wire.Decode))
    other = next(w for w in stage.decode if w is not leaving)
    leaving.say(wire.Leaving())
    for _ in range(3):
        stage.ask()
    assert not leaving.take(wire.Decode) and len(other.take(wire.Decode)) == 3
    job_id = next(iter(leaving.member.given))  # type: ignore[union-attr]
    leaving.say(wire.Said([wire.Spoken(job_id, (9,), wire.Ended("length", 1, 1))]))
    assert first.end is not None
    leaving.lose()
    assert not stage.router.losses


def test_cancelling_reaches_both_workers_in_every_state() -> None:
    for steps in range(4):
        stage = Stage()
        (prefill,), (decode,) = stage.prefill, stage.decode
        client = stage.ask()
        job = prefill.one(wire.Prefill).job
        if steps > 0:
            prefill.say(wire.Granted(job.id, {}))
        if steps > 1:
            prefill.say(wire.Handover(job.id, (9,)))
        if steps > 2:
            decode.tell(job, 9)
        stage.router.cancel(client.number)
        stage.router.cancel(client.number)
        assert prefill.one(wire.Cancel).id == decode.one(wire.Cancel).id == job.id
        decode.tell(job, 10, end="length")  # was on its way
        assert client.end is None and stage.router.states()["cancelled"] == 1
        stage.check_nothing_is_booked()


def test_a_reader_that_fails_ends_its_request_alone() -> None:
    stage = Stage(prefill=0)

    def broken(_output: Any) -> None:
        raise ValueError

    stage.router.submit([3], SamplingParams(max_tokens=4), broken)
    other = stage.ask()
    first, second = stage.decode[0].take(wire.Decode)
    stage.decode[0].tell(first.job, 5)
    assert stage.decode[0].one(wire.Cancel).id == first.job.id
    stage.decode[0].tell(second.job, 6, end="stop")
    assert other.tokens == [6]
    stage.check_nothing_is_booked()


def test_errors_of_a_request_reach_its_client_and_passing_ones_do_not() -> None:
    stage = Stage(decode=2)
    client = stage.ask()
    fault = wire.Fault("RequestError", "no", "", 400, "prompt", "invalid_value")
    stage.prefill[0].tell(stage.prefill[0].one(wire.Prefill).job, end="failed", fault=fault)
    assert client.end is not None and isinstance(client.end.error, RequestError)
    assert (client.end.error.status, client.end.error.param) == (400, "prompt")

    client = stage.ask()
    busy = wire.Fault("RequestError", "later", "", 503, None, "queue_full")
    stage.prefill[0].tell(stage.prefill[0].one(wire.Prefill).job, end="failed", fault=busy)
    assert client.end is None and stage.router.stats().waiting == 1
    stage.clock.now_s += 1
    stage.router.tick()
    job = stage.prefill[0].one(wire.Prefill).job
    stage.prefill[0].say(wire.Granted(job.id, {}))
    decode = next(w for w in stage.decode if w.take(wire.Decode))
    decode.tell(job, 1, end="cancelled")  # it ends, and takes its requests along
    assert client.tokens == [1] and client.end is None


def test_bad_requests_are_refused_at_once() -> None:
    stage = Stage()
    for prompt, kwargs, status, code in (
        ([], {}, 400, "invalid_value"),
        ([VOCAB], {}, 400, "invalid_value"),
        ([-1], {}, 400, "invalid_value"),
        ([2**40], {}, 400, "invalid_value"),
        ([1] * 2048, {}, 400, "context_length_exceeded"),
        ([1] * 2000, {"max_tokens": 49}, 400, "context_length_exceeded"),
        ([1], {"stop_token_ids": (VOCAB,)}, 400, "invalid_value"),
        ([1], {"n": 2}, 400, None),
    ):
        with pytest.raises(RequestError) as refused:
            stage.ask(prompt, **kwargs)
        assert (refused.value.status, refused.value.code) == (status, code)
    stage.check_nothing_is_booked()


def test_closing_ends_everything() -> None:
    stage = Stage()
    clients = [stage.ask() for _ in range(3)]
    stage.router.close()
    assert all(c.end is not None and c.end.finish_reason == "error" for c in clients)
    assert all(w.closed for w in (*stage.prefill, *stage.decode))
    with pytest.raises(RequestError):
        stage.ask()


class _Crowd:
    """Random workers and clients. Workers give the tokens that follow from the prompt and those before."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.stage = Stage(prefill=2, decode=2, budget_tokens=self.draw.choice([None, 32]))
        self.workers = [*self.stage.prefill, *self.stage.decode]
        self.clients: list[tuple[Client, list[int], int]] = []
        self.jobs: dict[tuple[Worker, str], tuple[wire.Job, list[int]]] = {}
        self.cancelled: set[int] = set()

    @staticmethod
    def next_token(tokens: list[int]) -> int:
        return (sum(tokens) * 31 + len(tokens)) % VOCAB

    def step(self) -> None:
        getattr(self, self.draw.choice(["ask", "work", "work", "work", "work", "work", "cancel", "lose", "join"]))()

    def ask(self) -> None:
        prompt = [self.draw.randrange(VOCAB) for _ in range(self.draw.choice([1, 30, 300, 900]))]
        count = self.draw.randint(1, 6)
        self.clients.append((self.stage.ask(prompt, count), prompt, count))

    def cancel(self) -> None:
        if self.clients and self.draw.random() < 0.2:
            client, *_ = self.draw.choice(self.clients)
            if client.end is None:
                self.cancelled.add(client.number)
                self.stage.router.cancel(client.number)

    def lose(self) -> None:
        if self.workers and self.draw.random() < 0.1:
            worker = self.draw.choice(self.workers)
            self.workers.remove(worker)
            worker.lose()

    def join(self) -> None:
        if len(self.workers) < 4:
            roles = {w.member.role for w in self.workers if w.member is not None}
            role = next(iter({"decode", "prefill"} - roles), self.draw.choice(["prefill", "decode", "both"]))
            self.workers.append(self.stage.join(role, f"w{self.draw.random()}"))  # type: ignore[arg-type]

    def work(self) -> None:
        if not self.workers:
            return
        worker = self.draw.choice(self.workers)
        for message in worker.take(wire.Prefill):
            worker.say(wire.Granted(message.job.id, {"lease": 1}))
            tokens = [*wire.tokens_of(message.job.prompt).tolist(), *wire.tokens_of(message.job.generated).tolist()]
            if self.draw.random() < 0.9:
                worker.say(wire.Handover(message.job.id, (self.next_token(tokens),)))
            else:
                worker.tell(message.job, end="failed", fault=wire.Fault("RequestError", "later", "", 503))
        for message in worker.take(wire.Decode):
            job = message.job
            known = [*wire.tokens_of(job.prompt).tolist(), *wire.tokens_of(job.generated).tolist()]
            self.jobs[worker, job.id] = (job, known)
        for message in worker.take(wire.Cancel):
            self.jobs.pop((worker, message.id), None)
        for (at, name), (job, known) in list(self.jobs.items()):
            if at is worker and self.draw.random() < 0.7:
                known.append(self.next_token(known))
                given = len(known) - len(wire.tokens_of(job.prompt))
                end = "length" if given == job.sampling.max_tokens else None
                worker.tell(job, known[-1], end=end)
                if end is not None:
                    self.jobs.pop((worker, name), None)

    def settle(self) -> None:
        self.draw.random = lambda: 0.5  # type: ignore[method-assign]
        while not any(w.member is not None and w.member.generates for w in self.workers):
            self.join()
        for _ in range(600):
            if not self.stage.router.stats().running + self.stage.router.stats().waiting:
                return
            self.stage.clock.now_s += 0.3
            for worker in self.workers:
                worker.say(wire.Beat())
                worker.take(wire.Beat)
            self.stage.router.tick()
            self.work()
        raise AssertionError("requests are left that nobody ends")


@settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # a seed does not shrink
@given(st.integers(0, 2**32))
def test_whatever_happens_clients_get_their_tokens_once(seed: int) -> None:
    crowd = _Crowd(seed)
    for _ in range(120):
        crowd.step()
    crowd.settle()
    for client, prompt, count in crowd.clients:
        expected = list(prompt)
        for _ in range(count):
            expected.append(crowd.next_token(expected))
        if client.number in crowd.cancelled:
            assert client.tokens == expected[len(prompt) :][: len(client.tokens)]
        elif client.end is not None and client.end.error is not None:
            assert "attempts" in client.end.error.message
        else:
            assert client.tokens == expected[len(prompt) :] and client.end is not None
    crowd.stage.check_nothing_is_booked()
