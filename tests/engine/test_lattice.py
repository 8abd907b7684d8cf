"""Every pair of features at once gives the tokens and the bits of the plain path.

The plain path reads a prompt whole, alone, with nothing kept, and decodes it token by token. Some
features say what the answer is (a form, tools, a budget of reasoning, a least length): with these
the plain path has them, too. All others must change nothing. `python -m
tests.engine.test_lattice` writes the table of pairs into docs/serving.md, and a test checks that it
is the one of this file.
"""

import dataclasses
import itertools
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aprium.base.errors import ConfigError
from aprium.base.records import Guide, Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.engine.guide import Grammars
from aprium.engine.speculative import SpeculativeConfig
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- pairs: begin -->", "<!-- pairs: end -->"
LENGTH = 44  # tokens generated
FLOOR = 30  # at least, where a least number is asked for
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer",
                   "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"enum": ["x", "y"]}},
            "required": ["a", "b"],
        },
    },
}

# Feature -> what the table calls it. Those of one kind exclude each other.
FEATURES = {
    "chunks": "small chunks",
    "batch": "mixed batch",
    "prefix": "prefix hit",
    "disk": "disk-tier hit",
    **{f"mtp{k}": f"MTP k={k}" for k in range(1, 6)},
    "ngram": "n-gram drafts",
    "json": "guided (JSON schema)",
    "tools": "tools",
    "budget": "thinking budget",
    "floor": "min_tokens",
    "n": "n = 3",
    "preempt": "preempt and resume",
    "fork": "fork",
    "abort": "neighbour aborted",
    "dtype": "state dtype given",
    "reload": "weights reloaded",
}
DRAFTS = {name for name in FEATURES if name.startswith(("mtp", "ngram"))}
# In the table all numbers of drafts are one row; every one of them is tested.
SHOWN = [name for name in FEATURES if not name.startswith("mtp") or name == "mtp1"]
NAMES = {**FEATURES, "mtp1": "MTP k=1..5"}


def exclusive(*names: str) -> bool:
    """Say whether features cannot be had at once: there is one way to draft."""
    return len(DRAFTS & set(names)) > 1


class Result(NamedTuple):
    """What a request came to."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Any, ...]
    finish: str | None


class Setup(NamedTuple):
    """What all tests share."""

    checkpoint: Any
    tokenizer: Tokenizer
    grammars: Grammars
    prompts: dict[bool, tuple[int, ...]]  # by whether it opens the reasoning


@pytest.fixture(scope="module")
def setup():
    checkpoint = load_checkpoint(PICO_DIR)
    tokenizer, template = Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR)
    messages = [
        {"role": "system", "content": "Answer in a few words, and say nothing twice. " * 2},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "3 + 4 = 7"},
        {"role": "user", "content": "Spell the word plum, then count to ten."},
    ]
    records = [read_message(m) for m in messages]
    prompts = {
        thinking: tuple(tokenizer.encode(template.render(records, (), enable_thinking=thinking)))
        for thinking in (False, True)
    }
    grammars = Grammars(tokenizer, checkpoint.config.vocab_size)
    return Setup(checkpoint, tokenizer, grammars, prompts)


def request_of(setup: Setup, features: frozenset[str], id: str = "it") -> Request:
    """Return the request that the features which say what the answer is make."""
    form = {"kind": "json", "value": SCHEMA}
    guide = Guide(**form) if "json" in features else None
    if "tools" in features:
        answer = form if "json" in features else None
        choice = "auto" if answer else "required"
        guide = Guide(kind="tools", value={"tools": [TOOL], "choice": choice, "answer": answer})
    thinking, floor = "budget" in features, "floor" in features
    params = SamplingParams(
        temperature=0,
        max_tokens=LENGTH,
        min_tokens=FLOOR if floor else 0,
        logprobs=2,
        ignore_eos=guide is None and not floor,
        guide=guide,
        thinking_budget=6 if thinking else None,
        thinking_grace=5,
    )
    return Request(id=id, tokens=setup.prompts[thinking], params=params, thinking=thinking)


def engine_of(setup: Setup, features: frozenset[str], directory: Path | None) -> Engine:
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 6, "block_size": 16}
    if "chunks" in features:
        options |= {"max_num_batched_tokens": 7, "block_size": 5}
    if directory is not None:
        options |= {"prefix_cache_dir": directory, "prefix_cache_ram_bytes": 0}
    if "dtype" in features:
        options |= {"mamba_ssm_cache_dtype": "float32", "kv_cache_dtype": "float32"}
    if "preempt" in features:
        options |= {"max_num_seqs": 3 if "n" in features or "fork" in features else 1}
        if {"batch", "abort"} & features:
            options["max_num_seqs"] = 2
    for name in DRAFTS & features:
        options["speculative"] = SpeculativeConfig(
            method="ngram" if name == "ngram" else "mtp",
            num_speculative_tokens=int(name[3:]) if name != "ngram" else 4,
            prompt_lookup_min=1,
            adaptive=False,
        )
    config = EngineConfig(model="pico", **options)
    ends = setup.tokenizer.eos_token_ids
    return Engine(config, setup.checkpoint, ends, setup.grammars)


def noise(seed: int, count: int, length: int, **options: Any) -> Request:
    numbers = random.Random(seed)
    params = SamplingParams(temperature=0.8, seed=seed, max_tokens=length, ignore_eos=True)
    tokens = tuple(numbers.randrange(20, 500) for _ in range(count))
    return Request(id=f"noise{seed}", tokens=tokens, params=params, **options)


def finish(engine: Engine, found: dict[str, list[Any]]) -> None:
    """Run to the end, gathering deltas by request."""
    while engine.has_work:
        step(engine, found)


def step(engine: Engine, found: dict[str, list[Any]]) -> None:
    for delta in engine.step():
        found.setdefault(delta.id, []).append(delta)
    engine.scheduler.check()


def result(deltas: list[Any]) -> Result:
    return Result(
        tuple(t for d in deltas for t in d.tokens),
        tuple(p for d in deltas for p in d.logprobs),
        tuple(tuple(t.items()) for d in deltas for t in d.top_logprobs),
        deltas[-1].finish,
    )


def warm(engine: Engine, request: Request) -> None:
    """Serve a request that begins alike, so that the one to come finds a snapshot."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine.add(Request(id="warm", tokens=request.tokens, params=params))
    finish(engine, {})


def run(setup: Setup, features: frozenset[str], directory: Path) -> list[Result]:
    """Return what the request comes to with `features`, of each of its continuations."""
    request = request_of(setup, features)
    if "disk" in features:
        before = engine_of(setup, features, directory)
        warm(before, request)
        before.close()
    engine = engine_of(setup, features, directory if "disk" in features else None)
    if features & {"prefix", "fork"} and "disk" not in features:
        warm(engine, request)
    found: dict[str, list[Any]] = {}
    ids = [request.id]
    if "fork" in features:  # two that go on from the state that a session holds
        assert engine.hold(request.tokens, "") is not None
        ids.append("twin")
    if {"batch", "abort"} & features:
        for seed in (1, 2):
            engine.add(noise(seed, 30 + 20 * seed, 30))
    names = [*ids]
    for id in names:
        group = [f"{id}/{i}" for i in range(3)] if "n" in features else [id]
        for i, name in enumerate(group):
            engine.add(
                dataclasses.replace(
                    request,
                    id=name,
                    leads=len(group) > 1 and i == 0,
                    follows=group[0] if i else None,
                )
            )
        ids = [*[i for i in ids if i != id], *group]
    disturb(engine, features, found, ids)
    finish(engine, found)
    last = [found[id][-1] for id in ids]
    if features & {"prefix", "disk", "fork"}:
        assert last[0].reused > 32, "the prefix was not hit"
    if "disk" in features:
        assert engine.stats().num_restored > 0
    if "preempt" in features:
        assert engine.stats().num_preemptions > 0
    # A form may forbid whatever is drafted, and n-grams may find nothing.
    if (DRAFTS - {"ngram"}) & features and not {"json", "tools"} & features:
        assert sum(d.drafted for d in last) > 0, "nothing was drafted"
    engine.close()
    return [result(found[id]) for id in ids]


def disturb(
    engine: Engine, features: frozenset[str], found: dict[str, list[Any]], ids: list[str]
) -> None:
    """Do to the engine what the features want done while the request runs."""

    def until(tokens: int) -> None:
        while engine.has_work and all(
            sum(len(d.tokens) for d in found.get(id, ())) < tokens for id in ids
        ):
            step(engine, found)

    until(4)
    if "abort" in features:
        engine.abort("noise1")
    if "preempt" in features:
        for seed in range(10, 10 + engine.config.max_num_seqs):
            engine.add(noise(seed, 40, 6, priority=-1))
    until(9)
    if "reload" in features:
        weights = {name: p.detach() for name, p in engine.checkpoint.model.named_parameters()
                   if "experts" not in name}  # fmt: skip
        engine.update_weights(weights, recompute="chunks" in features)


@pytest.fixture(scope="module")
def plain(setup):
    """What the plain path gives, by the features that say what the answer is."""
    known: dict[frozenset[str], Result] = {}

    def look_up(features: frozenset[str]) -> Result:
        saying = features & {"json", "tools", "budget", "floor"}
        if saying not in known:
            config = EngineConfig(
                model="pico", max_model_len=512, max_num_seqs=1, enable_prefix_caching=False
            )
            ends = setup.tokenizer.eos_token_ids
            engine = Engine(config, setup.checkpoint, ends, setup.grammars)
            engine.add(request_of(setup, saying))
            found: dict[str, list[Any]] = {}
            finish(engine, found)
            known[saying] = result(found["it"])
        return known[saying]

    return look_up


def combinations() -> list[tuple[str, ...]]:
    """Return every feature, every pair that can be had, and random larger sets."""
    sets = [(name,) for name in FEATURES]
    sets += [pair for pair in itertools.combinations(FEATURES, 2) if not exclusive(*pair)]
    numbers = random.Random(0)
    larger: set[tuple[str, ...]] = set()
    while len(larger) < 40:
        some = numbers.sample([*FEATURES], numbers.randrange(3, 9))
        drafts = [name for name in some if name in DRAFTS]
        kept = [name for name in some if name not in drafts[1:]]
        larger.add(tuple(name for name in FEATURES if name in kept))
    return sets + sorted(larger)


@pytest.mark.parametrize("features", combinations(), ids="+".join)
def test_the_bits_of_the_plain_path(setup, plain, tmp_path, features):
    chosen = frozenset(features)
    expected = plain(chosen)
    for found in run(setup, chosen, tmp_path):
        assert found == expected


def test_two_ways_to_draft_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="use one of"):
        SpeculativeConfig(method="mtp+ngram")
    assert exclusive("mtp1", "ngram") and exclusive("mtp1", "mtp2")


def test_what_does_not_go_together_is_refused_at_the_start(setup):
    for options, said in (
        ({"speculative": SpeculativeConfig(), "mamba_ssm_cache_dtype": "fp8"}, "float32 states"),
        ({"enable_prefix_caching": False, "prefix_cache_dir": Path("x")}, "leave one"),
        ({"enable_chunked_prefill": False, "max_model_len": 4096}, "without chunked"),
    ):
        with pytest.raises(ConfigError, match=said):
            Engine(EngineConfig(model="pico", **options), setup.checkpoint)


def table() -> str:
    """Return the table of pairs in Markdown."""
    rows = [
        "| | " + " | ".join(str(i + 1) for i in range(len(SHOWN))) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for i, first in enumerate(SHOWN):
        cells = ["one" if exclusive(first, other) else "=" for other in SHOWN[:i]]
        cells += ["="] + [""] * (len(SHOWN) - i - 1)
        rows.append(f"| {i + 1} {NAMES[first]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_table_in_the_documentation_is_that_of_this_file():
    text = DOCS.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table()


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    sys.exit(0)
