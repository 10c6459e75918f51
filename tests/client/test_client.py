"""The load generator's sums, and both clients against a real server."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from pathlib import Path

import pytest

from dsv4c import cli
from dsv4c.client.figures import Figures, read_limits
from dsv4c.client.load import Load, Timed, run_load
from dsv4c.client.talk import DIM, Talk, command, converse, printable
from dsv4c.client.wire import Server
from dsv4c.errors import ConfigError
from dsv4c.runtime.operations import Operations
from tests.runtime.live import MODEL, Live, start_toy

KEY = "key-of-the-client"


def timed(ttft_s: float, gaps_s: list[float], error: str | None = None) -> Timed:
    return Timed(0.0, ttft_s, ttft_s + sum(gaps_s), 10, 1 + len(gaps_s), gaps_s, error)


def test_figures_add_up() -> None:
    runs = [timed(0.1, [0.01] * 9), timed(0.3, [0.03] * 9), timed(9.0, [], "no")]
    figures = Figures.of(runs, 2.0, [50, 100], {"ttft": 200.0, "tpot": 20.0})
    said = figures.to_dict()
    assert (figures.completed, figures.failed, figures.good) == (2, 1, 1)
    assert said["requests_per_s"] == 1.0 and said["output_tokens_per_s"] == 10.0 and said["goodput_per_s"] == 0.5
    assert said["mean_ttft_ms"] == 200.0 and said["p100_ttft_ms"] == 300.0 and said["p50_tpot_ms"] == 20.0
    assert said["mean_itl_ms"] == 20.0 and said["p100_e2el_ms"] == 570.0 and said["errors"] == {"no": 1}
    alone = Figures.of([timed(0.1, [])], 1.0, [50], {})
    assert "tpot" not in alone.latencies_ms and alone.good is None


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "itl:5", "ttft:-1", "ttft:nan"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no limit"):
        read_limits([text])


def test_arrivals_are_those_of_the_seed() -> None:
    live, _ = start_toy(max_requests=4)
    try:
        load = Load(num_prompts=6, rate=200.0, output_len=4)
        runs = [
            asyncio.run(run_load(Server(live.url), MODEL, load, ["abc"] * 6, lambda done: None, 60.0))[0]
            for _ in range(2)
        ]
        gaps = [[b.due_s - a.due_s for a, b in itertools.pairwise(run)] for run in runs]
        assert gaps[0] == pytest.approx(gaps[1]) and all(gap > 0 for gap in gaps[0])
        assert all(t.error is None and t.output_tokens == 4 and t.prompt_tokens == 3 for t in runs[0])
    finally:
        live.close()


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_bench_serve(nano_server: Live, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["bench", "serve", "--base-url", nano_server.api, "--endpoint", endpoint, "--num-prompts", "6"]
    command += ["--max-concurrency", "3", "--input-len", "20", "--output-len", "5", "--goodput", "e2el:600000"]
    assert cli.main([*command, "--json", str(file)]) == 0
    out, row = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert "6 answered, 0 failed" in out and "ttft" in out and "goodput" in out
    assert row["completed"] == row["good_requests"] == 6 and row["output_tokens"] == 30
    assert row["prompt_tokens"] == 120 or endpoint == "chat"


def test_failures_are_counted_not_hidden(nano_server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "serve", "--base-url", nano_server.url, "--num-prompts", "3", "--warmup", "0"]
    assert cli.main([*command, "--input-len", "8", "--extra-body", '{"temperature": -1}']) == 1
    out, err = capsys.readouterr()
    assert "0 answered, 3 failed" in out and "failed 3 times" in out and "no request was answered" in err


@pytest.mark.parametrize(
    "more", [["--percentiles", "a"], ["--percentiles", "101"], ["--extra-body", "[]"], ["--base-url", "localhost"]]
)
def test_options_that_are_wrong(more: list[str]) -> None:
    assert cli.main(["bench", "serve", *more]) == 2


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--base-url", "http://127.0.0.1:9", "--prompt", "x"]) == 2
    assert "does not answer: connection refused" in capsys.readouterr().err


def test_chat_keeps_the_conversation(toy_server: Live) -> None:
    out = io.StringIO()
    talk = Talk(Server(toy_server.url), MODEL, out, fields={"max_tokens": 6, "ignore_eos": True})
    lines = iter(["first", "/set temperature 0", "second", "/think", "third", "/quit", "never read"])
    converse(talk, lambda prompt: next(lines))
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 3 and talk.turns[4]["content"] == "third"
    assert "6 tokens" in out.getvalue() and DIM in out.getvalue() and talk.fields["temperature"] == 0
    command(talk, "/system be short")
    assert not talk.turns and talk.system == "be short"


def test_an_error_leaves_the_conversation_as_it_was(toy_server: Live) -> None:
    out = io.StringIO()
    talk = Talk(Server(toy_server.url), MODEL, out, fields={"max_tokens": 10**6})
    lines = iter(["first"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    converse(talk, read)
    assert not talk.turns and "error: " in out.getvalue() and "exceed the context" in out.getvalue()


def test_an_interrupt_at_the_prompt_keeps_the_conversation() -> None:
    out, said = io.StringIO(), iter([KeyboardInterrupt, "/think", EOFError])

    def read(prompt: str) -> str:
        line = next(said)
        if isinstance(line, str):
            return line
        raise line

    talk = Talk(Server("http://127.0.0.1:9"), MODEL, out)
    converse(talk, read)
    assert talk.thinking and "/quit" in out.getvalue()


def test_chat_once_with_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, _ = start_toy(operations=Operations(api_keys=(KEY,)))
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n", encoding="utf-8")
    try:
        command = ["chat", "--base-url", live.url, "--prompt", "abc", "--max-tokens", "4"]
        assert cli.main(command) == 2 and "API key" in capsys.readouterr().err
        assert cli.main([*command, "--api-key-file", str(file)]) == 0
        assert "tokens, first after" in capsys.readouterr().out
    finally:
        live.close()


def test_a_model_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\n\tc\x9bd\x07é日") == "a[2Jb\n\tcdé日"
