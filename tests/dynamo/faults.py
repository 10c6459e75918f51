"""Faults at random moments of a request through prefill and decode workers of Dynamo, and what the client hears.

usage: python -m tests.dynamo.faults ARTIFACT [--moments 20] [--hand-over bootstrap]     prints a table
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.dynamo.conftest import load_example, stream

LONGEST_S = 45.0
"""No request takes longer, whatever happens."""
PAUSE_S = 10.0
Fault = Callable[["Scene", Any], None]


@dataclass
class Outcome:
    """What became of the requests that a fault met."""

    same: int = 0
    """Answered as without the fault."""
    refused: int = 0
    """Ended with one clear error."""
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


class Scene:
    """Two prefill and two decode workers, and what they say undisturbed."""

    def __init__(self, artifact: Path, hand_over: str) -> None:
        self.options = ("--hand-over", hand_over, "--drain-timeout", "10")
        self.made = load_example().Deployment(
            artifact, frontend_environment={"DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS": "3"}
        )
        self.draw = random.Random(1)
        self.known: dict[int, str] = {}

    @contextmanager
    def open(self) -> Iterator[Scene]:
        with self.made as self.deployment:
            self.workers = {role: [self._start(role), self._start(role)] for role in ("prefill", "decode")}
            self.deployment.wait(*self.workers["prefill"], *self.workers["decode"])
            yield self

    def _start(self, role: str) -> Any:
        return self.deployment.worker(role, *self.options)

    def body(self, number: int) -> dict[str, Any]:
        """A chat with a prompt of hundreds of tokens; every other one sampled, with a seed.

        No answer may hold what ends one (`min_tokens`, not `ignore_eos`): a worker that goes on with a chat takes what
        is behind the last beginning of an answer as generated.
        """
        words = random.Random(number)
        text = " ".join(words.choice(("count", "module", "package", "value", "list")) for _ in range(400 + 30 * number))
        how = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 400, "min_tokens": 400, **how}

    def ask(self, number: int) -> str:
        """The whole answer. Raises RuntimeError for an error that the client is told."""
        text, finish = "", None
        try:
            for chunk in stream(self.deployment, "/v1/chat/completions", self.body(number)):
                if "error" in chunk:
                    raise RuntimeError(json.dumps(chunk["error"]))
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish = choice.get("finish_reason") or finish
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code} {error.read().decode()}") from error
        return text if finish == "length" else f"cut: {finish}"

    def _undisturbed(self, number: int) -> str:
        try:
            return self.ask(number)
        except RuntimeError as error:
            logs = "\n".join(f"{p.name}:\n{p.tail(40)}" for p in self.deployment.processes)
            raise RuntimeError(f"undisturbed, {error}\n{logs}") from error

    def meet(self, fault: Fault, role: str, moments: int) -> Outcome:
        """Injects a fault into a worker of this role, at a random moment of a request, again and again."""
        outcome = Outcome()
        for moment in range(moments):
            number = moment % 10
            if number not in self.known:
                self.known[number] = self._undisturbed(number)
            answers: list[tuple[str, float]] = []
            client = threading.Thread(target=self._client, args=(number, answers))
            client.start()
            time.sleep(self.draw.uniform(0.0, 0.8))
            victim = self._serving(role)
            fault(self, victim)
            client.join(LONGEST_S)
            said, took_s = answers[0] if answers else ("nothing: it hangs", LONGEST_S)
            outcome.slowest_s = max(outcome.slowest_s, took_s)
            if said == self.known[number]:
                outcome.same += 1
            elif said.startswith("error: "):
                outcome.refused += 1
                outcome.errors.append(said[:300])
            else:
                known = self.known[number]
                same = next((i for i, (a, b) in enumerate(zip(said, known, strict=False)) if a != b), -1)
                where = f"{number}: {len(said)} characters, not {len(known)}; differs from character {same} on: "
                outcome.wrong.append(where + repr(said[max(0, same - 40) : same + 80]))
            self.mend()
            self.audit()
        return outcome

    def _client(self, number: int, answers: list[tuple[str, float]]) -> None:
        began = time.monotonic()
        try:
            said = self.ask(number)
        except (RuntimeError, OSError) as error:
            said = f"error: {error}"
        answers.append((said, time.monotonic() - began))

    def _serving(self, role: str) -> Any:
        """The worker of this role that has something to do, or any."""
        busy = [
            w for w in self.workers[role] if w.metric("dsv4c_requests_running") or w.metric("dsv4c_transfer_leases")
        ]
        return self.draw.choice(busy or self.workers[role])

    def mend(self) -> None:
        """Workers that have ended are replaced, those that are about to are awaited."""
        for role, workers in self.workers.items():
            for i, worker in enumerate(workers):
                if worker.popen.poll() is not None or getattr(worker, "leaving", False):
                    worker.popen.wait(60)
                    workers[i] = self._start(role)
                    self.deployment.wait(workers[i])
        listed = self.deployment.folder / "discovery" / "v1" / "mdc"
        end = time.monotonic() + 60
        while time.monotonic() < end:  # the router knows of all of them, and no more of the dead
            if len(list(listed.iterdir())) == 4 and "error" not in self.deployment.post(
                "/v1/completions", {"prompt": [5, 6], "max_tokens": 2}
            ):
                return
            time.sleep(0.2)
        raise RuntimeError("nothing is served after a fault")

    def audit(self) -> None:
        """Every survivor holds nothing, and proves that its pools are sound."""
        for worker in (w for workers in self.workers.values() for w in workers):
            end = time.monotonic() + 60
            while True:
                found = json.loads(self._control(worker, "audit"))
                if found["status"] == "ok" and not found["leases"] + found["moving"] and not found["pages_used"]:
                    break
                if found["status"] != "ok" or time.monotonic() > end:
                    raise RuntimeError(f"{worker.name} leaks: {found}\n{worker.tail()}")
                time.sleep(0.2)

    def _control(self, worker: Any, name: str) -> str:
        url = f"http://127.0.0.1:{worker.port}/engine/control/{name}"
        request = urllib.request.Request(url, b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())


def killed(scene: Scene, victim: Any) -> None:
    victim.popen.kill()
    victim.popen.wait()


def terminated(scene: Scene, victim: Any) -> None:
    victim.popen.send_signal(signal.SIGTERM)
    victim.leaving = True


def paused(scene: Scene, victim: Any) -> None:
    """For ten seconds: its registration may be lost, and it then ends by itself."""
    victim.popen.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    victim.popen.send_signal(signal.SIGCONT)
    end = time.monotonic() + 20
    while time.monotonic() < end and victim.popen.poll() is None:
        time.sleep(0.5)


def client_gone(scene: Scene, victim: Any) -> None:
    """Another client asks the same and leaves."""
    chunks = stream(scene.deployment, "/v1/chat/completions", scene.body(3))
    for _ in range(scene.draw.randrange(1, 20)):
        next(chunks, None)
    chunks.close()


FAULTS: dict[str, tuple[str, Fault]] = {
    "decode worker SIGKILL": ("decode", killed),
    "prefill worker SIGKILL": ("prefill", killed),
    "decode worker SIGTERM": ("decode", terminated),
    "prefill worker SIGTERM": ("prefill", terminated),
    "decode worker SIGSTOP, 10 s": ("decode", paused),
    "prefill worker SIGSTOP, 10 s": ("prefill", paused),
    "another client gone": ("decode", client_gone),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--hand-over", default="completed")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    wrong = 0
    print("| fault | moments | answered as without it | one clear error | wrong or hanging | slowest |")
    print("| --- | --- | --- | --- | --- | --- |")
    with Scene(args.artifact, args.hand_over).open() as scene:
        for name, (role, fault) in FAULTS.items():
            if args.only and args.only not in name:
                continue
            found = scene.meet(fault, role, args.moments)
            row = (name, args.moments, found.same, found.refused, len(found.wrong), f"{found.slowest_s:.1f} s")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            for said, count in Counter(found.wrong + found.errors).items():
                print(f"  {count} times: {said}", file=sys.stderr)
            wrong += len(found.wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
