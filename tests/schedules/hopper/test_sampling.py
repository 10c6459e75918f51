"""Sampling on the device: the references beside the host's sampler, and the kernels' arithmetic in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.ops.sampling import IN_PROMPT, edit_logits, exponentials, kept, sample, sample_penalised
from dsv4c.ops.speculation import sample_drafted
from dsv4c.runtime import sampler as host
from dsv4c.runtime.params import SamplingParams
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules.hopper.sampling import SCHEDULES
from dsv4c.schedules.select import choose
from dsv4c.schedules.workloads.sampling import DRAWS, KINDS, make, workload, workloads
from tests.chances import chance

REPOSITORY = Path(__file__).parents[3]
ROWS, VOCAB = 60, 512


def states() -> list[host.SamplerState]:
    random = np.random.default_rng(1)
    out = []
    for _ in range(ROWS):
        params = SamplingParams(
            temperature=float(random.choice([0, 0.5, 1.0, 1.7])),
            top_k=int(random.choice([0, 1, 5, 50])),
            top_p=float(random.choice([1.0, 0.9, 0.5, 0.05])),
            min_p=float(random.choice([0, 0.01, 0.3])),
            seed=int(random.integers(0, 2**63)),
            presence_penalty=float(random.choice([0, 0.5])),
            frequency_penalty=float(random.choice([0, 0.3])),
            repetition_penalty=float(random.choice([1.0, 1.3])),
        )
        state = host.SamplerState(params, random.integers(0, VOCAB, 100).astype(np.int64))
        for _ in range(random.integers(0, 60)):
            state.accept(int(random.integers(0, VOCAB)))
        out.append(state)
    return out


def of(states: list[host.SamplerState], name: str) -> torch.Tensor:
    return torch.tensor([getattr(s.params, name) for s in states], dtype=torch.float32)


def unmasked(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(1, -(-vocab // 32), dtype=torch.int32)


def test_the_device_draws_what_the_host_draws() -> None:
    rows = states()
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    counts = torch.zeros(ROWS + 1, VOCAB, dtype=torch.int16)
    for i, state in enumerate(rows):
        for token, count in zip(*state.seen(), strict=True):
            counts[i + 1, token] = int(count) if count else IN_PROMPT
    keys = torch.tensor([s.key - (1 << 64) if s.key >> 63 else s.key for s in rows])
    counters = torch.tensor([s.generated for s in rows])
    top_k = torch.tensor([s.params.top_k for s in rows], dtype=torch.int32)
    tokens, after = sample_penalised(
        logits, of(rows, "temperature"), top_k, of(rows, "top_p"), of(rows, "min_p"), keys, counters,
        torch.arange(1, ROWS + 1), counts, of(rows, "repetition_penalty"), of(rows, "frequency_penalty"),
        of(rows, "presence_penalty"), *unmasked(ROWS, VOCAB),
    )  # fmt: skip
    assert tokens.tolist() == host.sample(logits, rows)[0]
    assert int((after != counts).sum()) == ROWS


@pytest.mark.parametrize("vocab", [1, 2, 7, 512, 40_001])  # the last: more than the host hashes at a time
def test_noise_on_the_host_and_on_the_device_is_the_same(vocab: int) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (5,), generator=torch.Generator().manual_seed(vocab))
    counters = torch.tensor([0, 1, 2, 100_000, 2**40])
    on_host = host.log_uniforms(keys.numpy().view(np.uint64), counters.numpy().astype(np.uint64), vocab)
    on_device = -exponentials(keys, counters, vocab)
    assert on_host.shape == on_device.shape == (5, vocab)
    assert float((torch.from_numpy(on_host).double() / on_device - 1).abs().max()) < 1e-6


def one_row(x: torch.Tensor, temperature: float = 1.0, k: int = 0, p: float = 1.0, least: float = 0.0) -> torch.Tensor:
    f32 = [torch.tensor([v]) for v in (temperature, p, least)]
    weights, sound = kept(x[None], f32[0], torch.tensor([k], dtype=torch.int32), f32[1], f32[2])
    assert bool(sound[0])
    return weights[0]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("filters", [{}, {"k": 5}, {"p": 0.8}, {"least": 0.05}])
def test_draws_follow_the_distribution(temperature: float, filters: dict[str, Any]) -> None:
    logits, draws = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5, 100_000
    weights = one_row(logits, temperature, **filters)

    def each(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((draws,), value, dtype=dtype)

    tokens = sample(
        logits.expand(draws, -1), each(temperature), each(filters.get("k", 0), torch.int32),
        each(filters.get("p", 1.0)), each(filters.get("least", 0.0)), each(7, torch.int64), torch.arange(draws),
    )  # fmt: skip
    assert chance(torch.bincount(tokens, minlength=12), weights) > 0.001


def test_ties_stay_together_and_greedy_takes_the_first() -> None:
    x = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, -1.0])
    assert one_row(x, k=1).nonzero().flatten().tolist() == [1, 3]
    assert one_row(x, k=3).nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert one_row(x, temperature=0.0).nonzero().flatten().tolist() == [1]
    assert one_row(x, p=1e-6).nonzero().flatten().tolist() == [1, 3]


def test_a_row_without_a_finite_best_gives_no_token() -> None:
    x = torch.randn(4, 8)
    x[0, 3], x[1, 2], x[2] = torch.nan, torch.inf, -torch.inf
    one = torch.ones(4)
    tokens = sample(x, one, torch.zeros(4, dtype=torch.int32), one, 0 * one, torch.arange(4), torch.arange(4))
    assert (tokens >= 0).tolist() == [False, False, False, True]


def test_edits_reach_their_own_rows() -> None:
    x = torch.zeros(3, 5)
    x[0, 4] = 3
    starts, stops, tokens = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 3]), torch.tensor([4, 0, 2, 1])
    edited, replaced = edit_logits(x, starts, stops, tokens, torch.tensor([-2.0, -torch.inf, 2.0, 9.0]))
    assert replaced.tolist() == [3, 0, 0, 0]
    assert edited[0].tolist() == [0, 0, 0, 0, 1] and edited[1].tolist() == [0] * 5
    assert edited[2].tolist() == [-torch.inf, 0, 2, 0, 0]


def test_who_accepts() -> None:
    for work in workloads():
        taking = [s for s in SCHEDULES if s.op == work.op and s.accepts(work.node) is None]
        assert taking and all(len(s.space(work.node, work.symbols)) <= 6 for s in taking), work.label


def test_the_kernels_draw_as_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    run = subprocess.run(
        [sys.executable, "-m", "tests.schedules.hopper.interpret_sampling", "sampling", "sample nano mixed 1",
         "sample_drafted nano mixed 64", "nano edits"],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == 3 and "FAIL" not in run.stdout


def test_the_kernels_draw_from_vocabularies_of_any_size() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    script = [sys.executable, "-m", "tests.schedules.hopper.interpret_draws"]
    run = subprocess.run(script, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == 15 and "FAIL" not in run.stdout


@pytest.mark.parametrize("op", DRAWS)
def test_kernels_build_for_the_card(op: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    work = workload("flash", KINDS[-1], 64, op)
    (schedule,) = (s for s in SCHEDULES if s.op == op)
    for config in schedule.space(work.node, work.symbols):
        choice = choose(schedule, work.node, "sm_90a", work.symbols, "test", config)
        values = (*choice.inputs, *choice.workspace, *work.node.outputs)
        for launch in choice.build.launches:
            assert isinstance(launch, TritonLaunch)
            made = compile_launch(Request(op, launch, values, "sm_90a"), tmp_path)
            assert made.spills < 256, "registers of the rare row that is bisected over all its logits"


def chained(kind: str) -> list[torch.Tensor]:
    """Inputs of `sample_drafted`; `kind` of penalties."""
    args = make(KINDS[-1], 64, VOCAB, "sample_drafted", torch.Generator().manual_seed(9))
    out = [a for a in args if a is not None]
    out[8][:, 7] = IN_PROMPT + IN_PROMPT - 1  # the most a count can hold
    for name, at, none in (("repetition", 9, 1.0), ("frequency", 10, 0.0), ("presence", 11, 0.0)):
        if kind not in (name, "all"):
            out[at].fill_(none)
    return out


@pytest.mark.parametrize("kind", ["repetition", "frequency", "presence", "all"])
def test_a_row_behind_drafts_draws_as_if_they_had_been_generated(kind: str) -> None:
    args = chained(kind)
    chain, drafted = args[14:]
    masks = args[13]
    tokens = sample_drafted(*args)
    for s in range(len(tokens)):
        counts = args[8].clone()
        behind = drafted[s + 1 - int(chain[s]) : s + 1].tolist()
        for token in behind:
            counts[args[7][s], token] += int(counts[args[7][s], token]) & (IN_PROMPT - 1) < IN_PROMPT - 1
        one = [a[s : s + 1] for a in args[:8]]
        expected, _ = sample_penalised(*one, counts, *(a[s : s + 1] for a in args[9:13]), masks)
        assert tokens[s] == expected[0]
    for fewer in (torch.zeros_like(chain), (chain - 1).clamp(min=0)):
        assert not torch.equal(tokens, sample_drafted(*args[:14], fewer, drafted)), "each draft matters"
