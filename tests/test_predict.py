"""`dsv4c predict` answers for whole steps, in tables and as JSON, and says what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dsv4c.cli import main
from dsv4c.config import ModelConfig, preset
from dsv4c.errors import ConfigError
from dsv4c.predict import Predictor, kinds, of_layers
from dsv4c.schedules.predict import card_of


@pytest.fixture(scope="module")
def hopper() -> Predictor:
    return Predictor(preset("nano"), "sm_90a")


def test_layers_that_do_the_same_are_counted_once() -> None:
    for name in ("flash", "pro", "flash-nvfp4", "pro-nvfp4"):
        config = preset(name)
        like = kinds(config)
        few = of_layers(config, sorted(set(like)))
        assert (len(like), few.num_hidden_layers) == (config.num_hidden_layers, 6)
        assert like.count(0) == like.count(config.num_hidden_layers - 1) == 1
        for layer, first in enumerate(like):
            place = sorted(set(like)).index(first)
            assert few.compress_ratios[place] == config.compress_ratios[layer]
            assert few.gate_kind(place) == config.gate_kind(layer)
            assert (place in few.nvfp4_layers) == (layer in config.nvfp4_layers)


def test_experts_of_both_formats_are_kinds_of_their_own() -> None:
    mixed = replace(preset("nano"), nvfp4_layers=(1, 3))
    step = Predictor(mixed, "sm_103a").decode(8, 1024)
    assert {op.op: op.calls for op in step.ops if op.op.startswith("experts_")} == {
        "experts_nvfp4": 2, "experts_mx": mixed.num_hidden_layers - 2,
    }  # fmt: skip


def test_a_step_is_the_sum_of_its_ops(hopper: Predictor) -> None:
    step = hopper.prefill(1024)
    assert step.seconds == pytest.approx(sum(op.seconds for op in step.ops))  # no lanes in prefill
    assert step.low <= step.seconds <= step.high
    assert step.bytes > 0 and step.flops > 0
    layers = preset("nano").num_hidden_layers
    assert sum(op.calls for op in step.ops if op.op == "experts_fp4") == layers
    decode = hopper.decode(8, 1024)
    assert decode.seconds == decode.high  # every kernel was measured
    assert decode.seconds <= sum(op.seconds for op in decode.ops) * 1.01  # lanes


def test_layers_count_as_often_as_the_model_has_them(hopper: Predictor) -> None:
    """All layers lowered give the time that one of each kind gives."""
    whole = Predictor(preset("nano"), "sm_90a", every_layer=True)
    for one, other in ((hopper.decode(16, 1024), whole.decode(16, 1024)), (hopper.prefill(512), whole.prefill(512))):
        assert one.seconds == pytest.approx(other.seconds, rel=0.02)
        assert {(op.op, op.schedule): op.calls for op in one.ops} == {
            (op.op, op.schedule): op.calls for op in other.ops
        }
        assert one.weights == pytest.approx(other.weights)


def test_more_work_takes_longer(hopper: Predictor) -> None:
    times = [hopper.decode(batch, 1024).seconds for batch in (1, 8, 64, 256)]
    assert times == sorted(times)
    assert hopper.decode(64, 1024).seconds <= hopper.decode(64, 4096).seconds
    assert hopper.prefill(512).seconds < hopper.prefill(4096).seconds
    assert hopper.prefill(512).seconds <= hopper.prefill(512, 2048).seconds


def test_a_batch_runs_in_its_bucket(hopper: Predictor) -> None:
    step = hopper.decode(50, 1024)
    assert (step.program, step.tokens) == ("decode.64", 64)
    assert hopper.prefill(700).program.startswith("prefill.1024")


def test_refusals(hopper: Predictor) -> None:
    most = preset("nano").max_position_embeddings
    with pytest.raises(ConfigError, match="nothing predicts target `cpu`"):
        Predictor(preset("nano"), "cpu")
    with pytest.raises(ConfigError, match="nothing predicts target `sm_80`"):
        Predictor(preset("nano"), "sm_80")
    with pytest.raises(ConfigError, match="more than the model's"):
        hopper.decode(1, most + 1)
    with pytest.raises(ConfigError, match="activations"):
        Predictor(preset("nano"), "sm_90a", activations="mxfp4")
    with pytest.raises(ConfigError, match="fits no experts"):
        Predictor(preset("flash-nvfp4"), "sm_103a", activations="mxfp4")


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["predict", "nano", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_of_a_target_that_nobody_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "--target", "sm_103a", "--batch", "1,64", "--context", "2K", "--prefill", "512",
                  "--num-layers", "1")  # fmt: skip
    assert (found["model"], found["target"], found["measured"]) == ("nano", "sm_103a", False)
    assert [(s["phase"], s["tokens"]) for s in found["steps"]] == [("decode", 1), ("decode", 64), ("prefill", 512)]
    for step in found["steps"]:
        assert step["low"] <= step["seconds"] <= step["high"]
        assert {op["rates"] for op in step["ops"]} == {"itself", "its like"}
        assert step["bytes"] == pytest.approx(sum(op["bytes"] for op in step["ops"]), abs=len(step["ops"]))


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["predict", "nano", "--target", "sm_90a", "--batch", "8", "--context", "1K", "--ops", "--num-layers", "1"])
        == 0
    )
    out = capsys.readouterr().out
    for word in ("decode 8", "tokens/s", "experts_fp4", "gluon_fragments", "bound by", "docs/predicted.md"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "x"], "`--batch`: `x` is no number of tokens"),
        (["--batch", "0"], "there is no step to predict"),
        (["--before", "1K"], "`--before` is of a prefill step"),
        (["--batch", "1", "--context", "9M"], "more than the model's"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "nano", "--target", "sm_90a", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_cards() -> None:
    assert card_of("sm_90a").sms == 132
    assert isinstance(preset("flash"), ModelConfig)
