"""The stream parser: known forms, damaged forms, and independence from where text is cut."""

import json
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aprium.base.records import Message, ToolCall
from aprium.text.chat import ChatTemplate
from aprium.text.parse import Event, Parsed, StreamParser, gather, parse
from tests import family


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS = [
    tool(
        "f",
        s={"type": "string"},
        i={"type": "integer"},
        x={"type": "number"},
        b={"type": "boolean"},
        o={"type": "object"},
        a={"type": "array"},
        n={"type": ["string", "null"]},
        m={"anyOf": [{"type": "integer"}, {"type": "string"}]},
        e={"enum": [1, 2]},
        z={"type": "null"},
    ),
    tool("g"),
]


def whole(text: str, thinking: bool = False, **kwargs: Any) -> Parsed:
    return parse(text, thinking=thinking, **{"tools": TOOLS, **kwargs})


def call(body: str) -> str:
    return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"


def arguments(parsed: Parsed) -> list[dict[str, Any]]:
    return [json.loads(c.arguments) for c in parsed.tool_calls]


# JSON with a string that is never closed, and what follows it.
BROKEN = call('<parameter=o>\n{"k": "a</parameter>\n<parameter=s>\nx\n</parameter>\n') + "\nso"


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("why</think>so", True, "why", "so"),
        ("why\n</think>\nso ", True, "why\n", "\nso "),
        ("<think>\nwhy</think>so", True, "why", "so"),
        (" <think>why</think>so", True, "why", "so"),
        ("never closed", True, "never closed", None),
        ("</think>so", True, None, "so"),
        ("a</think>b</think>c<think>d", True, "a", "b</think>c<think>d"),
        ("plain", False, None, "plain"),
        ("<think>\nwhy</think>so", False, "why", "so"),
        (" lead", False, None, " lead"),
        ("a </think> b", False, None, "a </think> b"),
        ("1 < 2 <t", False, None, "1 < 2 <t"),
        ("", True, None, None),
        ("use <tool_call> like so</think>ok", True, "use <tool_call> like so", "ok"),
        ("x <tool_call>\n<function=nope>", True, "x <tool_call>\n<function=nope>", None),
        ("the tag <tool_call> is", False, None, "the tag <tool_call> is"),
    ],
)
def test_reasoning_and_content(
    text: str, thinking: bool, reasoning: str | None, content: str | None
) -> None:
    assert whole(text, thinking) == Parsed(reasoning=reasoning, content=content, tool_calls=())


def test_without_tools_call_tags_are_text() -> None:
    text = call("<parameter=s>\nv\n</parameter>\n")
    assert whole(text, tools=()) == Parsed(reasoning=None, content=text, tool_calls=())
    assert whole(text + "</think>x", True, tools=()).reasoning == text


@pytest.mark.parametrize("opening", ["why</think>", "why\n</think>\n\n", "why\n", "why"])
def test_a_call_with_or_without_the_end_of_reasoning(opening: str) -> None:
    parsed = whole(opening + call("<parameter=s>\nv\n</parameter>\n"), thinking=True)
    assert parsed.reasoning is not None and parsed.reasoning.strip() == "why"
    assert parsed.content is None
    assert parsed.tool_calls == (ToolCall(name="f", arguments='{"s": "v"}'),)


def test_stray_end_of_reasoning_after_a_call_is_dropped() -> None:
    parsed = whole("r" + call("") + "\n</think>\ndone", thinking=True)
    assert (parsed.reasoning, parsed.content) == ("r", "\ndone")


def test_text_around_calls() -> None:
    parsed = whole("Let me see.\n" + call("") + "\n" + call("") + "\n")
    assert parsed.content == "Let me see."
    assert [c.name for c in parsed.tool_calls] == ["f", "f"]
    assert whole(call("") + "\nDone").content == "\nDone"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</parameter>\n</function>\n",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</parameter>\n",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</par",
        "<tool_call><function=f><parameter=s>v</parameter></function></tool_call>",
        "<tool_call><function=f><parameter=s>v</function></tool_call>",
        "<tool_call><function=f><parameter=s>v</tool_call>",
        "<tool_call>\n<function=f>\njunk <parameter=s>\nv\n</parameter> junk </function>",
    ],
)
def test_missing_closing_tags(text: str) -> None:
    assert arguments(whole(text)) == [{"s": "v"}]
    assert whole(text).content is None


def test_missing_end_between_parameters_and_calls() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=s>\nv\n<parameter=i>\n4\n</parameter>\n"
    assert arguments(whole(text)) == [{"s": "v", "i": 4}]
    assert arguments(whole(text + "</function>\n" + text)) == [{"s": "v", "i": 4}] * 2
    two = text + "</function>\n<function=g>\n</function>\n</tool_call>"
    assert [c.name for c in whole(two).tool_calls] == ["f", "g"]
    assert arguments(whole(two)) == [{"s": "v", "i": 4}, {}]


def test_a_call_cut_off_in_its_header_is_not_content() -> None:
    for cut in ("<tool_call>", "<tool_call>\n<func", "<tool_call>\n<function=f"):
        assert whole("ok\n" + cut).content == "ok"


def test_a_value_may_mention_tags() -> None:
    code = "print('</function>')\nx = '<parameter=y>' # <tool_call> </think>"
    parsed = whole(call(f"<parameter=s>\n{code}\n</parameter>\n"))
    assert arguments(parsed) == [{"s": code}]


def test_json_may_mention_tags_in_its_strings() -> None:
    text = json.dumps({"k": 'a</parameter> \\"</function> </tool_call>', "j": 1})
    parsed = whole(call(f"<parameter=o>\n{text}\n</parameter>\n"))
    assert arguments(parsed) == [{"o": json.loads(text)}]
    cut = whole(call('<parameter=o>\n{"k": "a</parameter>\n<parameter=s>\nx\n</parameter>\n'))
    assert arguments(cut) == [{"o": '{"k": "a', "s": "x"}]


def test_references_are_followed() -> None:
    tool = {
        "name": "f",
        "parameters": {
            "properties": {
                "o": {"$ref": "#/$defs/thing", "description": "x"},
                "m": {"anyOf": [{"$ref": "#/$defs/number"}, {"type": "null"}]},
                "a": {"allOf": [{"$ref": "#/$defs/number"}], "title": "A"},
                "loop": {"$ref": "#/$defs/loop"},
                "lost": {"$ref": "#/$defs/none"},
            },
            "$defs": {
                "thing": {"type": "object", "properties": {}},
                "number": {"type": "integer"},
                "loop": {"$ref": "#/$defs/loop"},
            },
        },
    }
    values = {"o": '{"k": 1}', "m": "5", "a": "6", "loop": "7", "lost": "8"}
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    parsed = parse(call(body), thinking=False, tools=[tool])
    assert arguments(parsed) == [{"o": {"k": 1}, "m": 5, "a": 6, "loop": "7", "lost": "8"}]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("s", "12", "12"),
        ("s", "null", "null"),
        ("s", " two\nlines ", " two\nlines "),
        ("s", "\n\n", "\n\n"),
        ("i", "12", 12),
        ("i", " -7 ", -7),
        ("i", "5.0", 5),
        ("i", "5.5", "5.5"),
        ("i", "None", None),
        ("i", "9" * 5000, "9" * 5000),
        ("x", "12", 12),
        ("x", "1.5", 1.5),
        ("x", "1e3", 1000.0),
        ("x", "nan", "nan"),
        ("x", "1e999", "1e999"),
        ("b", "True", True),
        ("b", "false", False),
        ("b", "yes", "yes"),
        ("o", '{"k": [1, null]}', {"k": [1, None]}),
        ("o", "{'k': True, 'j': None}", {"k": True, "j": None}),
        ("o", "{bad", "{bad"),
        ("o", "[1]", "[1]"),
        ("o", '{"k": NaN}', '{"k": NaN}'),
        ("o", '{"k": "\\ud800"}', {"k": "\ud800"}),
        ("a", "[1, 2]", [1, 2]),
        ("a", "(1, 2)", "(1, 2)"),
        ("a", "[" * 50000, "[" * 50000),
        ("n", "None", None),
        ("n", "text", "text"),
        ("m", "5", 5),
        ("m", "five", "five"),
        ("e", "2", 2),
        ("z", "null", None),
        ("undeclared", "5", "5"),
    ],
)
def test_values_take_their_declared_type(key: str, text: str, value: Any) -> None:
    parsed = whole(call(f"<parameter={key}>\n{text}\n</parameter>\n"))
    parsed.tool_calls[0].arguments.encode()
    assert arguments(parsed) == [{key: value}]


def test_a_parameter_given_twice_counts_once() -> None:
    body = "<parameter=i>\n1\n</parameter>\n<parameter=i>\n2\n</parameter>\n"
    assert whole(call(body)).tool_calls[0].arguments == '{"i": 1}'


def test_force_content() -> None:
    assert whole("only this", True, force_content=True).content == "only this"
    assert whole("why</think>so", True, force_content=True).content == "so"
    assert whole("why</think> ", True, force_content=True).content == " why"
    assert whole("why</think>" + call(""), True, force_content=True).content is None


def test_arguments_stream_by_parameter() -> None:
    parser = StreamParser(thinking=False, tools=TOOLS)
    events = parser.push("<tool_call>\n<function=f>")
    assert events == [Event(kind="call", text="f")]
    assert parser.push("\n<parameter=i>\n1") == []
    assert parser.push("2\n</parameter>\n") == [Event(kind="arguments", text='{"i": 12')]
    assert parser.push("</function>\n") == [Event(kind="arguments", text="}")]


def test_long_values_take_linear_time() -> None:
    parser = StreamParser(thinking=False, tools=TOOLS)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    for _ in range(20000):
        assert parser.push("word and\n") == []
    events = parser.push("</parameter>") + parser.finish()
    assert len("".join(e.text for e in events)) > 180000


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=g>",
    "</function>", "<function=other>", "<parameter=s>", "<parameter=i>", "</parameter>",
    "\n", " ", "word", "7", "<", ">", "=", "</", "<tool_", "call>", "<function=", "<parameter=",
    "é", "\n\n", " " * 70, "<tool_call>\n<function=f>\n<parameter=s>\n",
    "\n</parameter>\n</function>\n</tool_call>",
]  # fmt: skip


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=24)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.05, 0.3, 1.0]))
    parts, start = [], 0
    for end in range(1, len(text) + 1):
        if end == len(text) or rng.random() < density:
            parts.append(text[start:end])
            start = end
    return text, parts


@settings(max_examples=1500)
@given(split_texts(), st.booleans(), st.booleans(), st.booleans())
@example(("a</function>\n</tool_call>", ["a</function>", "\n", "</tool_call>"]), True, True, False)
@example((BROKEN, [BROKEN[:50], BROKEN[50:90], BROKEN[90:]]), False, True, False)
def test_stream_equals_whole(
    case: tuple[str, list[str]], thinking: bool, with_tools: bool, force: bool
) -> None:
    text, parts = case
    tools = TOOLS if with_tools else []
    parser = StreamParser(thinking=thinking, tools=tools, force_content=force)
    events = [event for part in parts for event in parser.push(part)]
    events += parser.finish()
    parsed = gather(events)
    assert parsed == parse(text, thinking=thinking, tools=tools, force_content=force)
    assert all(event.text for event in events)
    placed = [(event.at, event.text) for event in events if event.at is not None]
    assert all(text[at : at + len(piece)] == piece for at, piece in placed)
    ends = [0, *(at + len(piece) for at, piece in placed)]
    assert all(end <= at for end, (at, _) in zip(ends, placed, strict=False))
    if not force:
        assert len(placed) == sum(e.kind in ("reasoning", "content") for e in events)
    for item in parsed.tool_calls:
        assert isinstance(json.loads(item.arguments), dict)
    if not with_tools and not force:  # nothing but the reasoning tags may be lost
        said = (parsed.reasoning or "") + (parsed.content or "")
        strip = str.maketrans("", "", "<think>/ \n")
        assert said.translate(strip) == text.translate(strip)


VALUES = st.one_of(
    st.tuples(st.just("s"), st.text("ab\n <>é", max_size=8)),
    st.tuples(st.just("i"), st.integers()),
    st.tuples(st.just("b"), st.booleans()),
    st.tuples(st.just("x"), st.floats(allow_nan=False, allow_infinity=False)),
    st.tuples(st.just("a"), st.lists(st.one_of(st.integers(), st.text("ab\"'", max_size=3)))),
    st.tuples(st.just("o"), st.dictionaries(st.text("kl", min_size=1), st.none() | st.booleans())),
    st.tuples(st.just("n"), st.none()),
)


@given(
    st.text("ab \n<", max_size=12),
    st.text("cd \n", max_size=12).map(str.strip),
    st.lists(st.lists(VALUES, unique_by=lambda pair: pair[0]), max_size=3),
)
def test_reads_what_the_template_writes(
    reasoning: str, content: str, calls: list[list[tuple[str, Any]]]
) -> None:
    made = tuple(ToolCall(name="f", arguments=json.dumps(dict(pairs))) for pairs in calls)
    turn = Message(role="assistant", content=content, reasoning=reasoning, tool_calls=made)
    user = Message(role="user", content="q")
    template = ChatTemplate({"default": family.TEMPLATE})
    prompt = template.render([user], TOOLS)
    full = template.render([user, turn], TOOLS, add_generation_prompt=False)
    parsed = whole(full.removeprefix(prompt).removesuffix("<|im_end|>\n"), thinking=True)
    assert full.startswith(prompt)
    assert (parsed.content or "").strip() == content
    assert arguments(parsed) == [dict(pairs) for pairs in calls]
    if content:
        assert (parsed.reasoning or "") == reasoning
