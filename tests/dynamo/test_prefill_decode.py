"""Prefill and decode workers behind Dynamo's frontend: state really moves, and tokens are those of one engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dsv4c.runtime.params import SamplingParams
from tests.dynamo.conftest import SHOWN, ids, prompts

pytest.importorskip("dynamo._core", reason="NVIDIA Dynamo is not installed: `make test-dynamo` installs it")
pytest.importorskip("nixl_cu12", reason="NIXL is not installed: `make test-dynamo` installs it")

COUNT = 200
LONGEST = 1500


@pytest.mark.parametrize("hand_over", ["completed", "bootstrap"])
def test_two_hundred_requests_say_what_one_engine_says(
    deploy: Callable[..., Any], says: Callable[..., list[int]], hand_over: str
) -> None:
    """Half of them by either way of handing over."""
    asked = [(p, _body(i), 1 + i % 16) for i, p in enumerate(prompts(COUNT // 2, LONGEST, seed=len(hand_over)))]
    wanted = [says(p, SamplingParams(max_tokens=n, ignore_eos=True, **body)) for p, body, n in asked]
    with deploy(
        "prefill", "prefill", "decode", "decode", options=("--hand-over", hand_over, "--lease-ttl", "5")
    ) as deployment:

        def ask(item: tuple[list[int], dict[str, Any], int]) -> list[int]:
            prompt, body, n = item
            answer = deployment.post(
                "/v1/completions", {"prompt": prompt, "max_tokens": n, "ignore_eos": True, **body, **SHOWN}
            )
            assert "error" not in answer, answer
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            return ids(answer["choices"][0])

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, asked))
        assert [i for i in range(len(asked)) if found[i] != wanted[i]] == []
        moved = sum(p.metric("dsv4c_transfer_moved_total") for p in deployment.processes[1:])
        recomputed = sum(p.metric("dsv4c_transfer_recomputed_total") for p in deployment.processes[1:])
        assert (moved, recomputed) == (len(asked), 0)
        for wrong in ({"prompt": [5] * 2100}, {"prompt": [5] * 40, "max_tokens": 5000}, {"prompt": [5], "best_of": 3}):
            refused = deployment.post("/v1/completions", {"max_tokens": 4, **wrong})
            assert refused.get("status") == 400, refused
        while any(p.metric("dsv4c_transfer_leases") for p in deployment.processes[1:]):
            time.sleep(0.2)  # of what was refused behind its prefill, a lease is left, which expires


def _body(number: int) -> dict[str, Any]:
    return {"temperature": 0} if number % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": number}
