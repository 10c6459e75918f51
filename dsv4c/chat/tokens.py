"""The names of DeepSeek-V4's added tokens: the one place where they are spelled.

Ids differ between vocabularies (129,280 entries in the released models, 4,096 in nano), names do not. The bars are
U+FF5C and the low blocks U+2581. Source: `tokenizer.json` of DeepSeek-V4.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
"""Opens and closes tool-call tags; the `<` and `tool_calls>` around it are ordinary text tokens."""
LATEST_REMINDER = "<｜latest_reminder｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
NOISE = "<｜place▁holder▁no▁799｜>"
"""A placeholder that the DSpark drafter uses as its noise token."""
END_OF_QUERY = "<｜end_of_query｜>"

TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
"""Quick-instruction tasks, by the value of a message's `task`."""

EXTRACTED_URL = "<｜extracted_url｜>"

LEADING = (BOS, EOS, PAD)
"""Ids 0, 1 and 2 of every vocabulary; `special`, so `skip_special_tokens` drops them."""

TEXTUAL = (
    FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER,
    TASKS["action"], TASKS["query"], TASKS["authority"], TASKS["domain"], TASKS["title"], EXTRACTED_URL,
    TASKS["read_url"],
)  # fmt: skip
"""Added tokens that are not `special`: `skip_special_tokens` keeps them. In the released order of ids."""

HIDDEN = (NOISE, END_OF_QUERY)
"""Added tokens after the vocabulary that are `special`."""

REQUIRED = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML)
"""What a tokenizer must have before chat can be served."""
