"""Grammars made of tool schemas: whatever they admit is parsed as a call that fits its schema."""

import json
import random

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprium.base.errors import RequestError
from aprium.base.records import Guide, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.engine.guide import Grammars
from aprium.text.parse import parse
from aprium.text.tokenizer import Tokenizer
from tests.engine.test_guide import SCHEMA, allowed, tools


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(PICO_DIR)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.vocab_size)


NAMES = st.sampled_from(["a", "b-c", "find_all", "x.y", 'q"uote', "key/e"])
STRINGS = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": st.integers(0, 3), "maxLength": st.integers(3, 8)},
)
SCALARS = st.one_of(
    STRINGS,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-5, 5), "maximum": st.integers(6, 50)},
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", "dark red", 3, None, True]},
            {"const": "</x> \n<y>"},
            {"type": "string", "pattern": "^[a-c]{2}[0-9]*$"},
            {"type": "string", "pattern": "b+"},
            {"type": ["string", "null"]},
            {"type": ["integer", "string", "boolean"]},
            {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "array", "maxItems": 1}]},
            {"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]},
            {"allOf": [{"$ref": "#/$defs/d"}], "description": "x"},
            {},
        ]
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, SCALARS),
    st.builds(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, SCALARS, max_size=2),
    ),
)
DEFS = {
    "d": {
        "type": "object",
        "properties": {"k": {"type": "string", "maxLength": 5}, "n": {"$ref": "#/$defs/e"}},
        "required": ["k"],
        "additionalProperties": False,
    },
    "e": {"type": "integer", "minimum": 0, "maximum": 9},
}


@st.composite
def tool(draw):
    fields = draw(st.dictionaries(NAMES, VALUES, max_size=6))
    required = draw(st.lists(st.sampled_from(sorted(fields)), unique=True)) if fields else []
    return {"properties": fields, "type": "object", "required": required, "$defs": DEFS}


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    schemas=st.dictionaries(NAMES, tool(), min_size=1, max_size=3),
    choice=st.sampled_from(["auto", "required", "first"]),
    parallel=st.booleans(),
    thinking=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_call_fits_its_schema(grammars, tokenizer, schemas, choice, parallel, thinking, seed):
    offered = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
        for name, schema in schemas.items()
    ]
    choice = offered[0]["function"]["name"] if choice == "first" else choice
    value = {"tools": offered, "choice": choice, "parallel": parallel}
    guide = Guide(kind="tools", value=value)
    said, ended = close_walk(grammars, tokenizer, guide, thinking, random.Random(seed))
    parsed = parse(tokenizer.decode(said), thinking=thinking, tools=offered)
    calls = parsed.tool_calls if ended else parsed.tool_calls[:-1]
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        assert choice in ("auto", "required", call.name)
    assert parallel or len(parsed.tool_calls) <= 1
    assert not ended or choice == "auto" or parsed.tool_calls


def close_walk(grammars, tokenizer, guide, thinking, generator):
    """Walk at random, with an inclination to close what is open."""
    walker = grammars.start(SamplingParams(guide=guide, thinking_budget=5), thinking)
    said = []
    opened = tokenizer.id_of("<tool_call>")
    while len(said) < 400:
        if walker.complete:
            return said, True
        options = allowed(walker.masks()[0])
        if {*options} & {*tokenizer.eos_token_ids}:
            if said and generator.random() < (0.3 if opened in said else 0.02):
                return said, True
            options = [t for t in options if t not in tokenizer.eos_token_ids]
        closing = [t for t in options if tokenizer.token_bytes(t)[:1] in (b"<", b"\n", b"}", b'"')]
        pick = closing if closing and generator.random() < 0.4 else options
        said.append(opened if opened in options and len(said) > 8 else generator.choice(pick))
        walker.push(said[-1])
        assert walker.error is None, walker.error
    return said, False


def test_an_answer_may_be_guided_beside_tools(grammars, tokenizer):
    answer = {"kind": "json", "value": json.dumps(SCHEMA)}
    guide = tools("auto", answer=answer)
    for thinking in (False, True):
        lead = "hm</think>\n" if thinking else ""
        for text in (
            '{"name": "Bo", "age": 3, "tags": []}',
            "<tool_call>\n<function=add>\n<parameter=b>\n1\n</parameter>\n<parameter=a>\n2\n"
            "</parameter>\n</function>\n</tool_call>\n",
        ):
            tokens = tokenizer.encode(lead + text)
            assert ends_with(grammars, tokenizer, guide, thinking, tokens)
        assert not ends_with(grammars, tokenizer, guide, thinking, tokenizer.encode(lead + "well"))


def test_a_call_may_come_straight_out_of_reasoning(grammars, tokenizer):
    call = "<tool_call>\n<function={}>\n<parameter=a>\n{}\n</parameter>\n<parameter=b>\n1\n"
    call += "</parameter>\n</function>\n</tool_call>"
    good = tokenizer.encode("as <tool_call>{}</tool_call> shows " + call.format("add", "2"))
    assert ends_with(grammars, tokenizer, tools("required"), True, good)
    assert not ends_with(
        grammars, tokenizer, tools("add"), True, tokenizer.encode(call.format("add", "x"))
    )
    guide = grammars.start(SamplingParams(guide=tools(), thinking_budget=500), True)
    for token in good:
        guide.push(token)
    assert not guide.finish_thinking()


def ends_with(grammars, tokenizer, guide, thinking, tokens):
    """Whether `tokens` are an answer that a guide admits, their letters maybe one by one.

    Where only one text can follow, a guide admits it only as it is written by itself, and pico's
    words are written by letters where they follow nothing.
    """
    walker = grammars.start(SamplingParams(guide=guide), thinking)
    for token in tokens:
        (mask,) = walker.masks()
        if mask is None:
            return False
        written = tokenizer.token_bytes(token)
        pieces = [token]
        if token not in allowed(mask) and written.isalpha():
            pieces = tokenizer.encode(written.decode())
        for piece in pieces:
            (mask,) = walker.masks()
            if mask is None or piece not in allowed(mask):
                return False
            walker.push(piece)
    return walker.complete or 2 in allowed(walker.masks()[0])


def test_reasoning_may_be_all_there_is_unless_more_is_asked_for(grammars, tokenizer):
    tokens = tokenizer.encode("hm, <tool_call> is")
    assert ends_with(grammars, tokenizer, tools("auto"), True, tokens)
    assert not ends_with(grammars, tokenizer, tools("required"), True, tokens)
    assert not ends_with(
        grammars, tokenizer, tools(answer={"kind": "regex", "value": "a"}), True, tokens
    )


def test_parameters_come_in_any_order_and_optional_ones_may_be_left_out(grammars, tokenizer):
    fields = {f"p{i}": {"type": "integer"} for i in range(9)}
    schema = {"type": "object", "properties": fields, "required": ["p3", "p7"]}
    guide = Guide(
        kind="tools",
        value={
            "tools": [{"function": {"name": "f", "parameters": schema}}],
            "choice": "required",
        },
    )
    for order, fine in (("73", True), ("83017", True), ("7", False), ("0", False)):
        body = "".join(f"<parameter=p{i}>\n{i}\n</parameter>\n" for i in order)
        text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
        assert ends_with(grammars, tokenizer, guide, False, tokenizer.encode(text)) == fine


def test_strict_tools_are_kept_to_or_refused(grammars, tokenizer):
    function = {"name": "f", "parameters": {"type": "object", "properties": {}, "required": []}}
    function["parameters"]["properties"]["x"] = {"type": "array", "contains": {"const": 1}}
    value = {"tools": [{"function": function}], "choice": "required"}
    text = "<tool_call>\n<function=f>\n<parameter=x>\n[2]\n</parameter>\n</function>\n</tool_call>"
    tokens = tokenizer.encode(text)
    assert ends_with(grammars, tokenizer, Guide(kind="tools", value=value), False, tokens)
    function["strict"] = True
    with pytest.raises(RequestError, match=r"'f'.*contains"):
        grammars.check(SamplingParams(guide=Guide(kind="tools", value=value)), False)
