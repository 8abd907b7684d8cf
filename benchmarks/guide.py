"""What keeping to a schema costs: compile and mask times of llguidance, beside xgrammar's if there.

python benchmarks/guide.py [--vocab 131072] [--runs 5]

Without --vocab the vocabulary is pico's; with it a byte-level one of that size, trained on the
Python sources of this installation. For each schema an instance of it is walked token by token, in
both libraries by turns; `refused` names instances that a library's grammar does not admit, or
schemas that it does not take, `admitted` invalid ones that it lets pass. Prints one JSON line a
schema: medians over runs in microseconds, and the median of the ratios of neighbouring runs, ours
over theirs.
"""

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llguidance
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aprium.checkpoint.hub import PICO_DIR
from aprium.engine.guide import Grammars
from aprium.text.tokenizer import Tokenizer

try:
    import xgrammar
except ImportError:
    xgrammar = None

# name: schema, an instance of it, something like it that is none
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "flat": (
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        {"name": "Ada Lovelace, countess", "age": 36},
        {"name": "Ada", "age": 3.5},
    ),
    "bounds": (
        {
            "type": "object",
            "properties": {
                "share": {"type": "number", "minimum": 0, "maximum": 1},
                "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            },
            "required": ["share", "code", "tags"],
            "additionalProperties": False,
        },
        {"share": 0.25, "code": "AB123", "tags": ["a", "b", "a"]},
        {"share": 0.25, "code": "AB123", "tags": ["a", "b", "a", "b"]},
    ),
    "text bounds": (
        {"type": "string", "minLength": 3, "maxLength": 400},
        "a sentence of some length, or two of them; whatever",
        "ab",
    ),
    "recursive": (
        {
            "$ref": "#/$defs/tree",
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "integer"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                    },
                    "required": ["value", "children"],
                    "additionalProperties": False,
                }
            },
        },
        {"value": 1, "children": [{"value": 2, "children": []}, {"value": 3, "children": []}]},
        {"value": 1, "children": [{"value": 2}]},
    ),
    "multiple": ({"type": "integer", "multipleOf": 7, "minimum": 0}, 49, 50),
    "all of": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            ],
        },
        {"a": 1, "b": True},
        {"a": 1},
    ),
    "dates": ({"type": "string", "format": "date-time"}, "2025-01-31T12:00:00Z", "yesterday"),
    "one of": (
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, kind: {"type": "string"}},
                    "required": ["kind", kind],
                    "additionalProperties": False,
                }
                for kind in ("cat", "dog")
            ]
        },
        {"kind": "dog", "dog": "barks"},
        {"kind": "dog", "cat": "meows"},
    ),
}

# Compiles a schema; returns what gives the next mask (as bytes) and what takes the next token.
Start = Callable[[dict[str, Any]], tuple[Callable[[], bytes], Callable[[int], object]]]


def train(size: int) -> Tokenizer:
    """Return a byte-level tokenizer of `size` tokens of the family's form."""
    special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 12))]
    special += ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    paths += sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    random.Random(0).shuffle(paths)
    texts, total = [], 0
    while paths and total < 500 * size:
        texts.append(paths.pop().read_text(encoding="utf-8", errors="ignore"))
        total += len(texts[-1])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, (2, 11))


def ours(tokenizer: Tokenizer) -> Start:
    """Return how this engine compiles."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size)

    def start(schema: dict[str, Any]) -> tuple[Callable[[], bytes], Callable[[int], object]]:
        text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(grammars.vocabulary, text)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher.compute_bitmask, matcher.consume_token

    return start


def theirs(tokenizer: Tokenizer) -> Start:
    """Return how xgrammar compiles."""
    assert xgrammar is not None
    words = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    ends = list(tokenizer.eos_token_ids)
    info = xgrammar.TokenizerInfo(words, vocab_size=len(words), stop_token_ids=ends)
    mask = xgrammar.allocate_token_bitmask(1, len(words))

    def start(schema: dict[str, Any]) -> tuple[Callable[[], bytes], Callable[[int], object]]:
        compiler = xgrammar.GrammarCompiler(info, cache_enabled=False, max_threads=1)
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))

        def next_mask() -> bytes:
            mask.fill_(-1)  # it is left as it is where everything may follow
            matcher.fill_next_token_bitmask(mask)
            return mask.numpy().tobytes()

        return next_mask, matcher.accept_token

    return start


def walk(start: Start, schema: dict[str, Any], ids: Sequence[int], end: int) -> dict[str, Any]:
    """Compile and walk `ids`; return times in microseconds, and whether it ends where they do."""
    begun = time.perf_counter()
    try:
        mask, take = start(schema)
    except Exception as error:  # whatever a library calls it
        return {"error": str(error).splitlines()[0][:120]}
    compile_us = 1e6 * (time.perf_counter() - begun)
    times = []
    for token in (*ids, end):
        begun = time.perf_counter()
        bits = mask()
        times.append(1e6 * (time.perf_counter() - begun))
        if not bits[token // 8] >> token % 8 & 1:
            return {"refused": True}
        if token != end:
            take(token)
    return {"compile": compile_us, "mask": statistics.median(times), "slowest": max(times)}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    tokenizer = train(options.vocab) if options.vocab else Tokenizer.load(PICO_DIR)
    begun = time.perf_counter()
    sides = {"llguidance": ours(tokenizer)}
    sides["llguidance"]({"type": "null"})  # makes the vocabulary
    print(
        json.dumps({"vocab": tokenizer.vocab_size, "setup_s": time.perf_counter() - begun}),
        flush=True,
    )
    if xgrammar is not None:
        sides["xgrammar"] = theirs(tokenizer)
    end = tokenizer.eos_token_ids[0]
    for name, (schema, good, bad) in CASES.items():
        ids, wrong = (tokenizer.encode(json.dumps(value)) for value in (good, bad))
        runs = [
            {k: walk(s, schema, ids, end) for k, s in sides.items()} for _ in range(options.runs)
        ]
        line: dict[str, Any] = {"case": name}
        for side, start in sides.items():
            found = [run[side] for run in runs]
            if "compile" not in found[0]:
                line[side] = found[0]
                continue
            line[side] = {k: round(statistics.median(f[k] for f in found), 1) for k in found[0]}
            if "compile" in walk(start, schema, wrong, end):
                line[side]["admitted"] = bad
        if all("compile" in run[side] for run in runs for side in sides) and len(sides) == 2:
            for k in ("compile", "mask", "slowest"):
                ratios = [run["llguidance"][k] / run["xgrammar"][k] for run in runs]
                line[f"{k}_ratio"] = round(statistics.median(ratios), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
