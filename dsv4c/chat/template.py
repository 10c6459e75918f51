"""The chat format as a Jinja template, for servers that render chats themselves and know none of their own.

`encoding.py` is what counts; this says the same, to the byte, of what such servers pass on: messages of the roles
system, developer, user, assistant and tool, `tools`, `thinking` (or `enable_thinking`), `reasoning_effort`,
`drop_thinking`, and `response_format` where it is given among the template's arguments.
"""

from __future__ import annotations

import json

from dsv4c.chat import prompts
from dsv4c.chat.dsml import CALLS_CLOSE, CALLS_OPEN, PARAMETER_CLOSE
from dsv4c.chat.tokens import ASSISTANT, BOS, DSML, EOS, THINK_END, THINK_START, USER

_TEMPLATE = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {{- '' if loop.first else '\n\n' -}}
      {%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}{{- '[Unsupported ' ~ part.type ~ ']' -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro calls_of(calls) -%}
  {{- @CALLS_OPEN@ -}}
  {%- for call in calls -%}
    {{- '\n<' ~ @DSML@ ~ 'invoke name="' ~ call.function.name ~ '">\n' -}}
    {%- set arguments = call.function.arguments -%}
    {%- if arguments is not mapping -%}{%- set arguments = {'arguments': arguments} -%}{%- endif -%}
    {%- for key, value in arguments | items -%}
      {{- '' if loop.first else '\n' -}}
      {{- '<' ~ @DSML@ ~ 'parameter name="' ~ key ~ '" string="' -}}
      {%- if value is string -%}{{- 'true">' ~ value -}}
      {%- else -%}{{- 'false">' -}}{{- value | tojson -}}{%- endif -%}
      {{- @PARAMETER_CLOSE@ -}}
    {%- endfor -%}
    {{- '\n</' ~ @DSML@ ~ 'invoke>' -}}
  {%- endfor -%}
  {{- '\n' ~ @CALLS_CLOSE@ -}}
{%- endmacro -%}
{%- macro extras() -%}
  {%- if tools -%}
    {{- '\n\n' ~ @TOOLS@ -}}
    {%- for tool in tools -%}{{- '' if loop.first else '\n' -}}{{- tool.function | tojson -}}{%- endfor -%}
    {{- @TOOLS_END@ -}}
  {%- endif -%}
  {%- if response_format -%}
    {%- set shown = response_format -%}
    {%- if shown.type == 'json_schema' -%}{%- set shown = shown.json_schema.schema -%}{%- endif -%}
    {%- if shown.type != 'text' -%}{{- '\n\n' ~ @RESPONSE_FORMAT@ -}}{{- shown | tojson -}}{%- endif -%}
  {%- endif -%}
{%- endmacro -%}
{%- set efforts = @EFFORTS@ -%}
{%- set aliases = @ALIASES@ -%}
{%- set thinks = thinking if thinking is defined else (enable_thinking if enable_thinking is defined else false) -%}
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else @DEFAULT@ -%}
{%- if effort == 'none' -%}{%- set thinks = false -%}{%- set effort = @DEFAULT@ -%}{%- endif -%}
{%- set effort = aliases[effort] if effort in aliases else effort -%}
{%- if effort not in efforts -%}{{- raise_exception('unknown effort `' ~ effort ~ '`') -}}{%- endif -%}
{%- set drops = not tools and not (drop_thinking is defined and drop_thinking == false) -%}
{%- set ns = namespace(last=-1, calls=[], open=false) -%}
{%- for message in messages -%}
  {%- if message.role in ['user', 'developer', 'tool'] -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if not messages or messages[-1].role not in ['user', 'developer', 'tool'] -%}
  {{- raise_exception('the last message must be a user or tool message') -}}
{%- endif -%}
{{- @BOS@ ~ (efforts[effort] if thinks else '') -}}
{%- if messages[0].role != 'system' -%}{{- extras() -}}{%- endif -%}
{%- for message in messages -%}
  {%- set index = loop.index0 -%}
  {%- set dropped = message.role == 'developer' and thinks and drops and index < ns.last -%}
  {%- if message.role == 'system' -%}
    {{- text_of(message.content) -}}
    {%- if index == 0 -%}{{- extras() -}}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set calls = message.tool_calls or [] -%}
    {%- if thinks and (not drops or index > ns.last) -%}
      {{- (message.reasoning_content or message.reasoning or '') ~ @THINK_END@ -}}
    {%- endif -%}
    {{- text_of(message.content) -}}
    {%- if calls -%}{{- '\n\n' ~ calls_of(calls) -}}{%- set ns.calls = calls -%}{%- endif -%}
    {{- @EOS@ -}}
  {%- elif message.role == 'developer' and not dropped -%}
    {{- @USER@ ~ text_of(message.content) -}}
  {%- elif message.role in ['user', 'tool'] -%}
    {#- successive user and tool messages are one turn, rendered where it begins, its results in the calls' order -#}
    {%- if index == 0 or messages[index - 1].role not in ['user', 'tool'] -%}
      {%- set run = namespace(on=true, blocks=[], results=[], sorted=[], next=0) -%}
      {%- for item in messages[index:] -%}
        {%- if run.on and item.role in ['user', 'tool'] -%}
          {%- set rank = namespace(value=0) -%}
          {%- for call in ns.calls -%}
            {%- if call.id and call.id == item.tool_call_id -%}{%- set rank.value = loop.index0 -%}{%- endif -%}
          {%- endfor -%}
          {%- set block = {'result': item.role == 'tool', 'text': text_of(item.content), 'rank': rank.value} -%}
          {%- set run.blocks = run.blocks + [block] -%}
          {%- if block.result -%}{%- set run.results = run.results + [block] -%}{%- endif -%}
        {%- else -%}{%- set run.on = false -%}{%- endif -%}
      {%- endfor -%}
      {%- if ns.calls -%}
        {%- for call in ns.calls -%}
          {%- set place = loop.index0 -%}
          {%- for block in run.results -%}
            {%- if block.rank == place -%}{%- set run.sorted = run.sorted + [block] -%}{%- endif -%}
          {%- endfor -%}
        {%- endfor -%}
      {%- else -%}{%- set run.sorted = run.results -%}{%- endif -%}
      {{- @USER@ -}}
      {%- for block in run.blocks -%}
        {{- '' if loop.first else '\n\n' -}}
        {%- if block.result -%}
          {{- '<tool_result>' ~ run.sorted[run.next].text ~ '</tool_result>' -}}
          {%- set run.next = run.next + 1 -%}
        {%- else -%}{{- block.text -}}{%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endif -%}
  {#- what leads to an answer: the next message that is shown is an assistant's, or there is none -#}
  {%- set after = namespace(role='assistant', found=false) -%}
  {%- for item in messages[index + 1:] -%}
    {%- set hidden = item.role == 'developer' and thinks and drops and index + 1 + loop.index0 < ns.last -%}
    {%- if not after.found and not hidden -%}
      {%- set after.role = item.role -%}{%- set after.found = true -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if after.role == 'assistant' and not dropped and message.role in ['user', 'developer', 'tool'] -%}
    {{- @ASSISTANT@ ~ (@THINK_START@ if thinks and (not drops or index >= ns.last) else @THINK_END@) -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(release: prompts.Release) -> str:
    """The template of this release of the model. It raises for efforts that the release does not know."""
    constants: dict[str, object] = {
        "BOS": BOS, "EOS": EOS, "USER": USER, "ASSISTANT": ASSISTANT, "THINK_START": THINK_START,
        "THINK_END": THINK_END, "DSML": DSML, "CALLS_OPEN": CALLS_OPEN, "CALLS_CLOSE": CALLS_CLOSE,
        "PARAMETER_CLOSE": PARAMETER_CLOSE, "TOOLS": prompts.TOOLS, "TOOLS_END": prompts.TOOLS_END,
        "RESPONSE_FORMAT": prompts.RESPONSE_FORMAT, "EFFORTS": dict(prompts.EFFORTS[release]),
        "ALIASES": dict(prompts.EFFORT_ALIASES[release]), "DEFAULT": next(iter(prompts.EFFORTS[release])),
    }  # fmt: skip
    text = _TEMPLATE.strip()
    for name, value in constants.items():
        text = text.replace(f"@{name}@", json.dumps(value, ensure_ascii=False))
    return text
