"""Configs of checkpoints with a DSpark drafter: told by their keys, checked as a whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4c.config import DSPARK_KEYS, FLASH, FLASH_0731, NANO, PRO, DSpark, ModelConfig, preset
from dsv4c.errors import ConfigError
from tests.dspark import TINY

PUBLISHED = {
    **FLASH.to_dict(), "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0], "num_nextn_predict_layers": 1,
    "dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}  # fmt: skip


def test_the_published_keys_are_the_preset() -> None:
    config = ModelConfig.from_dict(PUBLISHED)
    assert config == FLASH_0731 == preset("flash-0731")
    assert config.dspark == DSpark(5, 128799, (40, 41, 42), 256, num_stages=3)
    assert len(config.compress_ratios) == 46
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_keys_decide_what_drafts() -> None:
    assert [c.drafter for c in (FLASH, FLASH_0731, NANO, PRO, TINY)] == ["mtp", "dspark", "mtp", "mtp", "dspark"]
    assert dataclasses.replace(FLASH, compress_ratios=FLASH.compress_ratios[:43]).drafter is None
    assert FLASH_0731.num_nextn_predict_layers == FLASH.num_nextn_predict_layers == 1


def test_other_models_say_nothing_of_dspark() -> None:
    assert FLASH.dspark is None
    assert not set(DSPARK_KEYS) & set(FLASH.to_dict())
    assert json.loads(json.dumps(FLASH_0731.to_dict()))["dspark_target_layer_ids"] == [40, 41, 42]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dspark_block_size": 1}, "`dspark_block_size` must be at least 2, not 1"),
        ({"dspark_block_size": None}, "config.json lacks `dspark_block_size`"),
        ({"dspark_noise_token_id": None, "dspark_markov_rank": None},
         "config.json lacks `dspark_noise_token_id`, `dspark_markov_rank`"),
        ({"dspark_noise_token_id": 129280}, "`dspark_noise_token_id` 129280 is no token of a vocabulary of 129280"),
        ({"dspark_markov_rank": 0}, "`dspark_markov_rank` must be positive, not 0"),
        ({"dspark_target_layer_ids": [41, 42, 43]}, "[41, 42, 43] must lie within the 43 layers"),
        ({"dspark_target_layer_ids": [-1, 42]}, "[-1, 42] must lie within the 43 layers"),
        ({"dspark_target_layer_ids": [42, 41]}, "[42, 41] must be ascending"),
        ({"dspark_target_layer_ids": []}, "[] must be ascending"),
        ({"compress_ratios": [*PUBLISHED["compress_ratios"][:43], 0, 4, 0]}, "ends with [0, 4, 0] behind its 43"),
        ({"compress_ratios": PUBLISHED["compress_ratios"][:43]}, "ends with [] behind its 43 layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_file(tmp_path / "config.json")
    assert says in error.value.message


def test_three_stages_without_the_keys_are_no_mtp_layers() -> None:
    with pytest.raises(ConfigError, match="`compress_ratios` has 46 entries, expected 44"):
        ModelConfig.from_dict({k: v for k, v in PUBLISHED.items() if k not in DSPARK_KEYS})


def test_a_truncated_model_taps_its_own_last_layers() -> None:
    four = FLASH_0731.truncated(4)
    assert four.dspark is not None and four.dspark.target_layer_ids == (1, 2, 3)
    assert four.compress_ratios == (0, 0, 4, 128, 0, 0, 0)
    with pytest.raises(ConfigError, match="`--num-layers` is 2, DSpark reads layer 40 of 43") as error:
        FLASH_0731.truncated(2)
    assert error.value.hint == "keep at least 3"
