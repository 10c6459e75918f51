"""/v1/completions: raw prompts, as text or token ids; echo, scores of the prompt."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from dsv4c.errors import Dsv4cError
from dsv4c.runtime import shapes
from dsv4c.runtime.answer import DONE, Job, Part, TextEvents, error_dict, event, head
from dsv4c.runtime.completion import Choice, Delta, completion_logprobs, prompt_logprobs
from dsv4c.runtime.fields import MAX_SEQUENCES, GenerationBody
from dsv4c.runtime.openapi import route
from dsv4c.runtime.params import MAX_CHOICES, MAX_LOGPROBS
from dsv4c.runtime.protocol import Usage, parse_body, refuse, token_ids
from dsv4c.runtime.server import Server, offload

PATH = "/v1/completions"
_DEFAULT_MAX_TOKENS = 16  # as OpenAI documents it
Prompt = str | list[int]


def add(app: FastAPI, server: Server) -> None:
    """Adds the route."""
    told = shapes.completions(server.codec.vocab_size)

    @app.post(PATH, **route(CompletionBody, server.model_name, told, streams=True))
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await server.read_body(request))
        job = await completion_job(server, body)
        return server.answer(job, CompletionWriter(job, body))


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None

    def prompts(self, vocab_size: int) -> list[Prompt]:
        """One or more prompts, text or token ids. Raises RequestError for anything else."""
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            refuse("`prompt` must be a string, a list of strings, token ids, or a list of token id lists", "prompt")
        if all(type(item) in (int, float) for item in value):
            return [token_ids(value, "prompt", vocab_size)]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if not all(isinstance(item, list) for item in value):
            refuse("`prompt` mixes strings, token ids and lists", "prompt")
        return [token_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(value)]

    @property
    def num_sequences(self) -> int:
        """How many are generated for each prompt; the `n` likeliest are shown."""
        return self.best_of or self.num_choices

    def scored_prompt(self) -> int | None:
        """How many alternatives the prompt's tokens are scored with; None is no scores."""
        wanted = [k for k in (self.prompt_logprobs, self.logprobs if self.echo else None) if k is not None]
        return max(wanted, default=None)

    def new_tokens(self) -> int:
        """Most tokens to generate; 0 only together with `echo`, to score a prompt."""
        if self.max_tokens is None:
            return _DEFAULT_MAX_TOKENS
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.echo):
            hint = "0 is taken together with `echo` only" if self.max_tokens == 0 else ""
            refuse(f"`max_tokens` must be at least 1, not {self.max_tokens}", "max_tokens", hint=hint)
        return self.max_tokens

    def check(self) -> None:
        """Raises RequestError for options that contradict each other or are not offered."""
        self.check_scores()
        if self.num_sequences < self.num_choices:
            refuse(f"`best_of` must be at least `n`, which is {self.num_choices}", "best_of")
        if self.num_sequences > self.num_choices and (self.stream or self.new_tokens() == 0):
            what = "`stream: true`" if self.stream else "`max_tokens` 0"
            refuse(f"`best_of` above `n` does not go with {what}", "best_of")
        if self.suffix:
            refuse("`suffix` is not supported", "suffix", hint="put the model's fill-in tokens into `prompt`")


async def completion_job(server: Server, body: CompletionBody) -> Job:
    """Checks a /v1/completions body against model, context and limits."""
    codec, request_id = server.codec, f"cmpl-{uuid.uuid4().hex}"
    server.check_model(body.model)
    body.check()
    given, asked, n = body.prompts(codec.vocab_size), body.new_tokens(), body.num_sequences
    if len(given) * n > MAX_SEQUENCES:
        refuse(f"{len(given)} prompts times {n} is more than {MAX_SEQUENCES} sequences", "prompt")
    stops, include_usage = body.stops(), body.include_usage()
    headers = server.extra_headers(request_id, body.ignored_fields)
    prompts = [p if isinstance(p, list) else await offload(codec.encode, p, len(p)) for p in given]
    grammar = await server.grammar(body)
    parts: list[Part] = []
    for prompt in prompts:
        room = server.room(len(prompt), body.max_tokens, "prompt")
        for number in range(n):
            params = body.sampling(
                choice=number,
                max_tokens=max(1, min(asked, room)),
                vocab_size=codec.vocab_size,
                logprobs=0 if body.logprobs is None and n > body.num_choices else body.logprobs,
                prompt_logprobs=body.scored_prompt(),
                grammar=grammar,
            )
            choice = Choice(
                codec,
                index=len(parts),
                stops=stops,
                scored=body.logprobs is not None,
                min_tokens=params.min_tokens,
            )
            parts.append(Part(prompt, params, choice))
    return Job(
        request_id,
        server.model_name,
        codec,
        parts,
        sum(map(len, prompts)),
        stream=bool(body.stream),
        include_usage=include_usage,
        echo=bool(body.echo),
        scored=body.logprobs is not None,
        score_only=asked == 0,
        continuous_usage=body.continuous_usage(),
        fingerprint=server.fingerprint,
        headers=headers,
    )


class CompletionWriter:
    """The wire format: one text a choice, the echoed prompt in front."""

    path = PATH

    def __init__(self, job: Job, body: CompletionBody) -> None:
        self._job = job
        self._plain = TextEvents(self._text_event)
        self._best = body.num_choices, body.num_sequences
        self._alternatives = body.logprobs
        self._prompt_logprobs = body.prompt_logprobs
        self._offsets = [0] * len(job.parts)
        self._echoed: set[int] = set()

    def whole(self, usage: Usage) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index in self._chosen():
            part = self._job.parts[index]
            choice = self._choice(index, part.choice.take(), part.choice.finish_reason)
            if self._prompt_logprobs is not None:
                scores = part.prompt_scores or ()
                choice["prompt_logprobs"] = prompt_logprobs(self._job.codec, part.prompt, scores, self._prompt_logprobs)
            choices.append({**choice, "index": len(choices)})
        return {**head(self._job, "text_completion"), "choices": choices, "usage": usage.to_dict()}

    def _chosen(self) -> list[int]:
        """Of each prompt's sequences the `n` of the highest mean log-probability, best first; all if `n` are made."""
        parts, (n, made) = self._job.parts, self._best
        if n == made:
            return list(range(len(parts)))
        means = [part.logprob / max(1, part.choice.num_tokens) for part in parts]
        groups = [range(first, first + made) for first in range(0, len(parts), made)]
        return [i for group in groups for i in sorted(group, key=lambda i: -means[i])[:n]]

    def begin(self) -> bytes:
        return b""

    def chunks(self, index: int, delta: Delta, finish: str | None) -> bytes:
        job = self._job
        if finish is None and not (job.echo or job.scored or job.continuous_usage):
            return self._plain.of(index, "text", delta.content)
        return self._event([self._choice(index, delta, finish)])

    def end(self, usage: Usage) -> bytes:
        return (self._event([], usage) if self._job.include_usage else b"") + DONE

    def fail(self, error: Dsv4cError) -> bytes:
        return event(error_dict(error))

    def _choice(self, index: int, delta: Delta, finish: str | None) -> dict[str, Any]:
        job, text, tokens = self._job, delta.content, delta.tokens
        if job.echo and index not in self._echoed:
            self._echoed.add(index)
            echoed = job.parts[index].echoed
            text = "".join(token.text for token in echoed) + text
            tokens = echoed + tokens
        logprobs = None
        if job.scored:
            logprobs = completion_logprobs(job.codec, tokens, self._offsets[index], self._alternatives or 0)
            self._offsets[index] += sum(len(token.text) for token in tokens)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return choice if finish is None else {**choice, "stop_reason": job.parts[index].choice.stop_reason}

    def _text_event(self, index: int, kind: str, text: str) -> bytes:
        return self._event([{"index": index, kind: text, "logprobs": None, "finish_reason": None}])

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        body = head(self._job, "text_completion")
        body["choices"] = choices
        if self._job.include_usage:
            usage = self._job.usage() if self._job.continuous_usage else usage
            body["usage"] = None if usage is None else usage.to_dict()
        return event(body)
