"""What Dynamo's frontend asks, read: recorded requests of version 1.6.1, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dsv4c.errors import RequestError
from dsv4c.runtime.dynamo.asked import Guide, read_request
from dsv4c.runtime.params import SamplingParams

EOS = (1,)
STOPS = dict.fromkeys(
    (
        "max_tokens",
        "stop",
        "stop_token_ids",
        "stop_token_ids_visible",
        "min_tokens",
        "ignore_eos",
        "max_thinking_tokens",
    )
)
SAMPLING = dict.fromkeys(
    ("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
     "min_p", "use_beam_search", "length_penalty", "seed", "include_stop_str_in_output", "guided_decoding")
)  # fmt: skip
OUTPUT = dict.fromkeys(
    ("logprobs", "prompt_logprobs", "skip_special_tokens", "formatted_prompt", "return_tokens_as_token_ids")
)


def request(**sections: Any) -> dict[str, Any]:
    """As the frontend sends it: every field is there."""
    return {
        "model": "nano",
        "token_ids": sections.pop("token_ids", [0, 7, 8]),
        "stop_conditions": {**STOPS, "stop_token_ids_hidden": [1], **sections.pop("stop_conditions", {})},
        "sampling_options": {**SAMPLING, **sections.pop("sampling_options", {})},
        "output_options": {**OUTPUT, **sections.pop("output_options", {})},
        "eos_token_ids": [1], "mdc_sum": "0", "annotations": [], "routing": {"dp_rank": 0},
        "router_config_override": None, **sections,
    }  # fmt: skip


def test_nothing_given_is_the_defaults() -> None:
    asked = read_request(request(), EOS)
    assert (
        asked.prompt == (0, 7, 8) and asked.params == SamplingParams() and asked.guide is None and not asked.generated
    )


def test_everything_given() -> None:
    sampling = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "repetition_penalty": 1.1,
    }  # fmt: skip
    stops = {"max_tokens": 4, "min_tokens": 2, "stop_token_ids": [9], "stop_token_ids_hidden": [1, 11], "stop": ["x"]}
    asked = read_request(
        request(sampling_options=sampling, stop_conditions=stops, output_options={"logprobs": 3, "prompt_logprobs": 0}),
        EOS,
    )
    assert asked.params == SamplingParams(
        **sampling, max_tokens=4, min_tokens=2, stop_token_ids=(9, 11), logprobs=3, prompt_logprobs=0
    )


def test_the_end_token_is_the_engines_own() -> None:
    hidden = {"ignore_eos": True, "stop_token_ids_hidden": [1]}
    params = read_request(request(stop_conditions=hidden), EOS).params
    assert params.ignore_eos and params.stop_token_ids == ()


@pytest.mark.parametrize(
    ("value", "guide"),
    [
        ({"json": {"type": "object"}}, Guide("json", {"type": "object"})),
        ({"regex": "a{4}", "backend": None}, Guide("regex", "a{4}")),
        ({"choice": ["a", "b"], "json": None}, Guide("choice", ["a", "b"])),
        ({"grammar": "root ::= x", "whitespace_pattern": None}, Guide("grammar", "root ::= x")),
        ({"backend": "xgrammar"}, None),
    ],
)
def test_guides(value: dict[str, Any], guide: Guide | None) -> None:
    assert read_request(request(sampling_options={"guided_decoding": value}), EOS).guide == guide


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"token_ids": []}, "prompt"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"token_ids": [True]}, "token_ids"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search"),
        ({"sampling_options": {"best_of": 3}}, "best_of"),
        ({"sampling_options": {"temperature": "hot"}}, "temperature"),
        ({"sampling_options": {"temperature": -1.0}}, "temperature"),
        ({"sampling_options": {"seed": 0.5}}, "seed"),
        ({"sampling_options": {"guided_decoding": {"json": {}, "regex": "a"}}}, "guided_decoding"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": {}}}}, "structural_tag"),
        ({"sampling_options": {"logit_bias": {"a": 1}}}, "logit_bias"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens"),
        ({"stop_conditions": {"max_thinking_tokens": 5}}, "max_thinking_tokens"),
        ({"stop_conditions": {"stop_token_ids": 5}}, "stop_token_ids"),
        ({"output_options": {"logprobs": 21}}, "logprobs"),
        ({"multi_modal_data": {"image": "x"}}, "multi_modal_data"),
        ({"sampling_options": {"n": 0}}, "n"),
    ],
)
def test_refusals_name_the_field(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as found:
        read_request(request(**sections), EOS)
    assert found.value.status == 400


def start(tokens: Sequence[int]) -> int | None:
    """An answer begins behind token 8."""
    return tokens.index(8) + 1 if 8 in tokens else None


CHAT = {"extra_args": {"reasoning_parser_kwargs": {"chat_template_kwargs": {"thinking": False}}}}


def test_what_another_worker_has_generated_is_told_from_the_prompt_of_a_chat() -> None:
    moved = request(token_ids=[0, 7, 8, 20, 21], stop_conditions={"max_tokens": 10, "min_tokens": 4}, **CHAT)
    asked = read_request(moved, EOS, start)
    assert (asked.prompt, asked.generated) == ((0, 7, 8), (20, 21))
    assert (asked.params.max_tokens, asked.params.min_tokens) == (12, 4)
    fresh = read_request(request(stop_conditions={"max_tokens": 10}, **CHAT), EOS, start)
    assert (fresh.prompt, fresh.generated, fresh.params.max_tokens) == ((0, 7, 8), (), 10)
    text = read_request(request(token_ids=[0, 7, 8, 20], stop_conditions={"max_tokens": 10}), EOS, start)
    assert (text.prompt, text.generated) == ((0, 7, 8, 20), ())


def test_fewer_tokens_are_wanted_than_at_least_where_dynamo_lowers_the_most() -> None:
    for stopping, least in (({"max_tokens": 1, "min_tokens": 400}, 1), ({"max_tokens": 9, "min_tokens": 4}, 4)):
        assert read_request(request(stop_conditions=stopping), EOS).params.min_tokens == least
    assert read_request(request(stop_conditions={"min_tokens": 4}), EOS).params.min_tokens == 4
