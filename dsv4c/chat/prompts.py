"""The fixed sentences that DeepSeek-V4 was trained to see, and nothing else: data, to be matched to the byte.

Source: the encoder published with the checkpoints (`encoding/encoding_dsv4.py`, MIT), of the V4 preview for the tools
and response-format text and of the 0731 release for the three-level efforts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dsv4c.chat.tokens import DSML, THINK_END, THINK_START

Release = Literal["preview", "0731"]
"""Which table of efforts a checkpoint was trained with: `high` of 0731 is the text that the preview calls `max`."""

_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose "
    "the problem into its most fundamental components, trace every causal chain to its root, and resolve the "
    "underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

EFFORTS: Mapping[Release, Mapping[str, str]] = {
    "preview": {"high": "", "max": _ABSOLUTE},
    "0731": {"low": "", "high": _ABSOLUTE, "max": _BEYOND},
}
"""The text right after BOS in thinking mode, by release and level. The first level of a release is its default."""

EFFORT_ALIASES: Mapping[Release, Mapping[str, str]] = {
    "preview": {"minimal": "high", "low": "high", "medium": "high", "xhigh": "max"},
    "0731": {"minimal": "low", "medium": "high", "xhigh": "max"},
}
"""Levels of the OpenAI API that the model does not have, and the nearest one it has."""

TOOLS = f"""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_END = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
"""`TOOLS`, one JSON function a line, `TOOLS_END`."""

RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
