"""Guided answers: always of their form, the same bits whatever is drafted or batched with them."""

import dataclasses
import json
import random
import re

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprium import LLM
from aprium.base.config import from_dict, to_dict
from aprium.base.errors import RequestError
from aprium.base.records import Guide, Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine.engine import Engine, EngineConfig
from aprium.engine.guide import Grammars
from aprium.engine.memory import page_bytes
from aprium.engine.speculative import SpeculativeConfig
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.parse import parse
from aprium.text.tokenizer import Tokenizer
from tests.engine.test_engine import run

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "note",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "maxLength": 20},
                    "mood": {"enum": ["good", "bad"]},
                    "place": {"$ref": "#/$defs/place"},
                },
                "required": ["text"],
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
]
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
LIST = Guide(kind="grammar", value='root ::= item ("," item)*\nitem ::= [a-z]{2,4}')


def tools(choice="auto", **more):
    return Guide(kind="tools", value={"tools": TOOLS, "choice": choice, **more})


GUIDES = [
    Guide(kind="json", value=SCHEMA),
    Guide(kind="regex", value="[A-Z][a-z]{3,9}( [0-9]+)?"),
    Guide(kind="choice", value=["yes", "no", "nobody knows"]),
    LIST,
    tools("required"),
    tools("add", parallel=False),
    tools("auto"),
]
SPECS = [
    None,
    SpeculativeConfig(num_speculative_tokens=3, adaptive=False),
    SpeculativeConfig(
        method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, adaptive=False
    ),
]


@pytest.fixture(scope="module")
def pico():
    return load_checkpoint(PICO_DIR)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(PICO_DIR)


@pytest.fixture(scope="module")
def grammars(pico, tokenizer):
    return Grammars(tokenizer, pico.config.vocab_size)


def engine_of(pico, grammars, spec=None, **options):
    options = {"max_num_seqs": 16, "max_model_len": 512, "block_size": 8} | options
    config = EngineConfig(model="pico", speculative=spec, **options)
    return Engine(config, pico, (2, 11), grammars)


def prompt_of(tokenizer, question, thinking, offered=()):
    messages = [read_message({"role": "user", "content": question})]
    template = ChatTemplate.load(PICO_DIR)
    return tuple(tokenizer.encode(template.render(messages, offered, enable_thinking=thinking)))


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Each guide greedy and sampled, with thinking (some with a budget) and without."""
    made = []
    for i, guide in enumerate(GUIDES):
        for temperature in (0.0, 1.0):
            thinking = bool((i + int(temperature)) % 2)
            params = SamplingParams(
                temperature=temperature,
                seed=i,
                max_tokens=120,
                logprobs=2,
                guide=guide,
                thinking_budget=(0, 6)[i % 2] if thinking else None,
                thinking_grace=5,
            )
            made.append(
                Request(
                    id=f"{guide.kind}-{i}-{temperature}",
                    tokens=prompt_of(tokenizer, "What is 12 + 31?", thinking, TOOLS),
                    params=params,
                    thinking=thinking,
                )
            )
    return made


@pytest.fixture(scope="module")
def alone(pico, grammars, requests):
    engine = engine_of(pico, grammars)
    return {r.id: run(engine, [r])[r.id] for r in requests}


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "mtp", "ngram"])
@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 7, "block_size": 5, "max_num_seqs": 3}], ids=str
)
def test_drafts_batches_and_chunks_change_no_bit(pico, grammars, requests, alone, spec, options):
    engine = engine_of(pico, grammars, spec, **options)
    assert run(engine, requests) == alone
    if spec is not None:
        assert sum(engine.stats().drafts_accepted) > 0


def test_preemption_changes_no_bit(pico, grammars, requests, alone):
    longest = max(len(r.tokens) for r in requests) + 120
    pages = -(-longest // 4) + 12
    engine = engine_of(
        pico, grammars, SPECS[1], block_size=4, max_model_len=longest,
        kv_cache_bytes=pages * page_bytes(pico.config, 4, torch.float32),
    )  # fmt: skip
    assert run(engine, requests) == alone
    assert engine.stats().num_preemptions > 0


def test_what_was_generated_can_be_gone_on_with(pico, grammars, requests, alone):
    """As after a crash: the guide is made again from the tokens."""
    generator = random.Random(0)
    engine = engine_of(pico, grammars, SPECS[1])
    resumed = []
    for request in requests:
        cut = generator.randrange(1, len(alone[request.id]["tokens"]))
        said = tuple(alone[request.id]["tokens"][:cut])
        resumed.append(dataclasses.replace(request, generated=said))
    found = run(engine, resumed)
    for request in resumed:
        rest = alone[request.id]["tokens"][len(request.generated) :]
        assert found[request.id]["tokens"] == rest


def check_form(guide, text, finish, thinking, stop="stop"):
    """Assert that an answer that has ended is of its form."""
    parsed = parse(text, thinking=thinking, tools=TOOLS if guide.kind == "tools" else ())
    if finish != stop:
        assert finish == "length"
        return
    said = parsed.content or ""
    if guide.kind == "json":
        jsonschema.validate(json.loads(said), json.loads(guide.value))
    elif guide.kind == "regex":
        assert re.fullmatch(guide.value, said)
    elif guide.kind == "choice":
        assert said in json.loads(guide.value)
    elif guide.kind == "grammar":
        assert re.fullmatch("[a-z]{2,4}(,[a-z]{2,4})*", said)
    else:
        value = json.loads(guide.value)
        if value["choice"] != "auto":
            assert parsed.tool_calls and not said
        if value["choice"] == "add":
            assert [c.name for c in parsed.tool_calls] == ["add"]
        for call in parsed.tool_calls:
            jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])


def test_answers_are_of_their_form(tokenizer, requests, alone):
    ended = 0
    for request in requests:
        entry = alone[request.id]
        ended += entry["finish"] == "stop"
        text = tokenizer.decode(entry["tokens"])
        check_form(request.params.guide, text, entry["finish"], request.thinking)
        if request.thinking:
            assert tokenizer.id_of("</think>") in entry["tokens"][:14]
    assert ended > len(requests) / 2


def test_logprobs_are_those_before_the_mask(pico, grammars, tokenizer):
    prompt = prompt_of(tokenizer, "What is 2 + 2?", False)
    params = SamplingParams(temperature=0, max_tokens=9, guide=Guide(kind="regex", value="zebra!"))
    guided = run(engine_of(pico, grammars), [Request(id="g", tokens=prompt, params=params)])["g"]
    assert tokenizer.decode(guided["tokens"]) == "zebra!" and guided["finish"] == "stop"
    free = Request(
        id="f", tokens=(*prompt, *guided["tokens"]),
        params=SamplingParams(max_tokens=0, prompt_logprobs=0),
    )  # fmt: skip
    scores = run(engine_of(pico, grammars), [free])["f"]["prompt"][0]
    assert guided["logprobs"] == list(scores[len(prompt) :])


@pytest.fixture(scope="module")
def byte_grammars(text_toy):
    return Grammars(Tokenizer.load(text_toy.path), text_toy.config.vocab_size)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("spec", SPECS[:2], ids=["plain", "mtp"])
def test_a_model_that_knows_nothing_keeps_to_the_form(text_toy, byte_grammars, spec, ignore_eos):
    """Random weights, high temperature: only the masks make sense of it."""
    config = EngineConfig(model="toy", max_num_seqs=32, max_model_len=512, speculative=spec)
    engine = Engine(config, text_toy, (2, 11), byte_grammars)
    tokenizer = Tokenizer.load(text_toy.path)
    requests = [
        Request(
            id=f"{number}-{seed}",
            tokens=(16 + 65, 16 + 66),
            params=SamplingParams(
                temperature=1.5, seed=seed, max_tokens=200, guide=guide, ignore_eos=ignore_eos,
                thinking_budget=9 if seed % 2 else 0, thinking_grace=4,
            ),
            thinking=seed > 1,
        )
        for number, guide in enumerate(GUIDES)
        for seed in range(4)
    ]  # fmt: skip
    found = run(engine, requests)
    ended = 0
    for request in requests:
        entry = found[request.id]
        check_form(
            request.params.guide, tokenizer.decode(entry["tokens"]), entry["finish"],
            request.thinking,
        )  # fmt: skip
        ended += entry["finish"] == "stop"
        if ignore_eos:
            assert not {2, 11} & set(entry["tokens"])
    assert ended >= (8 if ignore_eos else 12)


# Thinking.


def think(pico, grammars, tokenizer, spec=None, **options):
    prompt = prompt_of(tokenizer, "What is 345 + 678?", True)
    params = SamplingParams(temperature=0, max_tokens=100, **options)
    engine = engine_of(pico, grammars, spec)
    return run(engine, [Request(id="r", tokens=prompt, params=params, thinking=True)])["r"]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "mtp", "ngram"])
def test_budget(pico, grammars, tokenizer, spec):
    tag = tokenizer.id_of("</think>")
    free = think(pico, grammars, tokenizer, spec)["tokens"]
    natural = free.index(tag)
    assert natural > 12
    for budget in (0, 1, 5, natural - 1, natural, natural + 5):
        for grace in (0, 3, 500):
            found = think(
                pico, grammars, tokenizer, spec, thinking_budget=budget, thinking_grace=grace
            )["tokens"]
            expected = min(natural, budget + grace) if budget else 0
            assert found[: expected + 1] == [*free[:expected], tag]
            if expected == natural:
                assert found == free


def test_a_budget_ends_at_the_next_line_break(grammars, tokenizer):
    tag = tokenizer.id_of("</think>")

    def length(text, budget, grace):
        """How many tokens of a reasoning `text` are let through."""
        guide = grammars.start(
            SamplingParams(thinking_budget=budget, thinking_grace=grace), thinking=True
        )
        tokens = tokenizer.encode(text)
        for count, token in enumerate(tokens):
            if (mask := guide.masks()[0]) is not None:
                assert allowed(mask) == [tag]
                return count
            guide.push(token)
        return len(tokens)

    text = "one two\nthree four\n\nfive six seven"
    ids = tokenizer.encode(text)
    ends = [i + 1 for i, t in enumerate(ids) if b"\n" in tokenizer.token_bytes(t)]
    assert length(text, 0, 500) == 0
    assert length(text, ends[0], 500) == ends[0]
    assert length(text, ends[0] - 1, 500) == ends[0]
    assert length(text, ends[0] + 1, 500) == ends[1]
    assert length(text, ends[0] + 1, 1) == ends[0] + 2
    assert length(text, ends[-1] + 1, 500) == len(ids)


@pytest.mark.parametrize("spec", SPECS[:2], ids=["plain", "mtp"])
def test_a_message_before_the_end(pico, grammars, tokenizer, spec):
    words = "\nTime is up.\n"
    found = think(
        pico, grammars, tokenizer, spec,
        thinking_budget=4, thinking_grace=2, thinking_message=words,
        guide=Guide(kind="choice", value=["g a r", "no"]),
    )  # fmt: skip
    text = tokenizer.decode(found["tokens"])
    reasoning, answer = text.split("</think>")
    assert reasoning.endswith(words) and answer in ("g a r", "no")
    assert len(tokenizer.encode(reasoning[: -len(words)])) <= 6 and found["finish"] == "stop"
    with pytest.raises(RequestError, match="thinking_message"):
        SamplingParams(thinking_message="x</think>")


@pytest.mark.parametrize("spec", SPECS[:2], ids=["plain", "mtp"])
def test_finish_thinking_now(pico, grammars, tokenizer, spec):
    tag = tokenizer.id_of("</think>")
    prompt = prompt_of(tokenizer, "What is 345 + 678?", True)
    params = SamplingParams(temperature=0, max_tokens=100)
    free = think(pico, grammars, tokenizer)["tokens"]
    engine = engine_of(pico, grammars, spec)
    engine.add(Request(id="r", tokens=prompt, params=params, thinking=True))
    tokens = []
    while len(tokens) < 5:
        tokens += [t for delta in engine.step() for t in delta.tokens]
    assert engine.finish_thinking("gone") == 0 and engine.finish_thinking("r") == 1
    at = len(tokens)
    while engine.has_work:
        tokens += [t for delta in engine.step() for t in delta.tokens]
    assert tokens[: at + 1] == [*free[:at], tag]
    assert engine.finish_thinking() == 0


def test_python_faces(pico, tokenizer):
    question = [{"role": "user", "content": "What is 345 + 678?"}]
    params = SamplingParams(temperature=0, max_tokens=90, guide=Guide(kind="regex", value="[0-9]+"))
    with LLM(pico, max_model_len=256, speculative=SPECS[1]) as llm:
        (thought,) = llm.generate(question, params)
        (plain,) = llm.generate(question, params, chat_template_kwargs={"enable_thinking": False})
        (raw,) = llm.generate("What is", params)
        grown = []
        for completion in llm.stream(question, params, request_id="mine"):
            if not grown:
                assert llm.finish_thinking("other") == 0
                llm.finish_thinking("mine")
            grown.append(completion)
        bad = dataclasses.replace(params, guide=Guide(kind="regex", value="("))
        with pytest.raises(RequestError, match="regex guide"):
            llm.stream(question, bad)
    reasoning, answer = thought.text.split("</think>")
    assert reasoning and answer.isdecimal() and thought.stop_reason in (None, 2, 11)
    assert plain.text.isdecimal() and raw.text.isdecimal()
    assert grown[-1].finish == "stop" and grown[-1].text.split("</think>")[1].isdecimal()
    assert len(grown[-1].tokens) < len(thought.tokens)


def test_a_cut_character_does_not_stop_the_grammar(text_toy, byte_grammars):
    """A hard end within a character, which the grammar could not go on from."""
    guide = byte_grammars.start(
        SamplingParams(
            thinking_budget=1, thinking_grace=0, guide=Guide(kind="choice", value=["ok"])
        ),
        True,
    )
    guide.push(16 + 0xE2)
    assert allowed(guide.masks()[0]) == [13]
    guide.push(13)
    assert allowed(guide.masks()[0]) == [16 + ord("o")]


def allowed(mask):
    return [i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1]


# Masks.


def random_walk(grammars, tokenizer, guide, thinking, generator, length, budget=None):
    """Yield a guide at each token of a random walk, with the tokens so far."""
    params = SamplingParams(guide=guide, thinking_budget=budget, thinking_grace=3)
    walker = grammars.start(params, thinking)
    said = []
    while len(said) < length and not walker.complete:
        yield params, walker, said
        (mask,) = walker.masks()
        options = [t for t in allowed(mask) if t not in tokenizer.eos_token_ids]
        if not options:
            return
        said.append(generator.choice(options))
        walker.push(said[-1])
        assert walker.error is None


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(0, len(GUIDES) - 1),
    thinking=st.booleans(),
    budget=st.sampled_from([None, 0, 3]),
)
def test_masks_are_a_function_of_the_tokens(grammars, tokenizer, seed, number, thinking, budget):
    """After drafts, right and wrong, a mask is that of a new guide with the same tokens."""
    generator = random.Random(seed)
    for params, walker, said in random_walk(
        grammars, tokenizer, GUIDES[number], thinking, generator, 25, budget
    ):
        probe = grammars.start(params, thinking, said)
        drafts = []
        for _ in range(generator.randrange(5)):
            (mask,) = probe.masks()
            if mask is None or probe.complete:
                break
            options = allowed(mask) if generator.random() < 0.8 else range(512)
            drafts.append(generator.choice(list(options)))
            if drafts[-1] not in allowed(mask) or drafts[-1] in tokenizer.eos_token_ids:
                break
            probe.push(drafts[-1])
        masks = walker.masks(drafts)
        assert 1 <= len(masks) <= len(drafts) + 1
        again = grammars.start(params, thinking, said)
        for mask, draft in zip(masks, [*drafts, None], strict=False):
            if not again.complete:
                assert again.masks() == (mask,)
            if draft is None or draft in tokenizer.eos_token_ids or len(masks) == 1:
                break
            if mask is not None and draft in allowed(mask):
                again.push(draft)
        assert walker.masks() == grammars.start(params, thinking, said).masks()


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide(kind="json", value={"type": "strin"}), "strin"),
        (Guide(kind="json", value="{"), "not JSON"),
        (Guide(kind="json", value="[]"), "no schema object"),
        (Guide(kind="regex", value="(a"), "unclosed"),
        (Guide(kind="grammar", value="start: nothing"), "nothing"),
        (Guide(kind="choice", value=[]), "nothing to choose"),
        (Guide(kind="choice", value=["a", 1]), "no list of texts"),
        (Guide(kind="tools", value={"tools": []}), "there are none"),
        (tools("subtract"), "'subtract'"),
        (
            Guide(
                kind="tools",
                value={"tools": [{"function": {"name": "a>b", "parameters": {}}}]},
            ),
            "cannot stand in a call",
        ),
    ],
)
def test_what_is_no_guide_is_refused(grammars, guide, words):
    for thinking in (False, True):
        with pytest.raises(RequestError) as caught:
            grammars.check(SamplingParams(guide=guide), thinking)
        assert words in str(caught.value)


def test_parameters_survive_being_written_down():
    params = SamplingParams(guide=tools("required"), thinking_budget=3)
    assert from_dict(SamplingParams, json.loads(json.dumps(to_dict(params)))) == params


def test_bad_records_are_refused():
    with pytest.raises(RequestError, match="guide kind is 'xml'"):
        Guide(kind="xml", value="")
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        Guide(kind="json", value={"x": {1}})
    with pytest.raises(RequestError, match="must be a text"):
        Guide(kind="regex", value=["a"])
    with pytest.raises(RequestError, match="give Guide"):
        SamplingParams(guide="a+")
    with pytest.raises(RequestError, match="thinking_budget is -1"):
        SamplingParams(thinking_budget=-1)


def test_without_a_tokenizer_nothing_can_be_guided(toy):
    with LLM(toy, max_model_len=64) as llm, pytest.raises(RequestError, match="no tokenizer"):
        llm.generate([1, 2], SamplingParams(guide=GUIDES[0], max_tokens=2))


def test_a_grammar_that_grows_too_complex_ends_its_request_only(pico, grammars, requests, alone):
    engine = engine_of(pico, grammars)
    engine.add(dataclasses.replace(requests[0], id="lost"))
    engine.add(requests[2])
    engine.step()
    engine.scheduler.sequences["lost"].guide.error = "too complex"
    found = {}
    while engine.has_work:
        for delta in engine.step():
            found[delta.id] = delta
    assert found["lost"].finish == "abort" and found["lost"].stop_reason == "too complex"
    assert found[requests[2].id].finish == alone[requests[2].id]["finish"]
