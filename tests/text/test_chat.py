"""The chat template against transformers' own rendering, its errors, and its sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import CheckpointError, RequestError, TemplateError
from aprium.base.records import Message, ToolCall
from aprium.text.chat import ChatTemplate, starts_in_reasoning

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add <two> & more",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": ["number", "null"]}},
            "required": ["a"],
        },
    },
}
CALL = ToolCall(
    name="add", arguments='{"a": 1, "b": null, "c": [1, "é<"], "d": true, "e": "x"}', id="call_1"
)
CONVERSATIONS: dict[str, list[Message]] = {
    "user": [Message(role="user", content="hi")],
    "system": [Message(role="system", content="be brief"), Message(role="user", content=" hi ")],
    "history": [
        Message(role="user", content="a"),
        Message(role="assistant", content="b", reasoning="because\n"),
        Message(role="user", content="c <think>"),
    ],
    "tools": [
        Message(role="user", content="a"),
        Message(role="assistant", content="", reasoning="use it", tool_calls=(CALL, CALL)),
        Message(role="tool", content="3", tool_call_id="call_1"),
        Message(role="tool", content="4", tool_call_id="call_1"),
    ],
}


def plain(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        data["reasoning_content"] = message.reasoning
    if message.tool_calls:
        data["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return data


@pytest.fixture(scope="module")
def template(directory: Path) -> ChatTemplate:
    return ChatTemplate.load(directory)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [[], [TOOL]])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("tail", [True, False])
def test_equals_transformers(
    template: ChatTemplate, oracle: Any, name: str, tools: list, kwargs: dict, tail: bool
) -> None:
    messages = CONVERSATIONS[name]
    ours = template.render(messages, tools, add_generation_prompt=tail, **kwargs)
    theirs = oracle.apply_chat_template(
        [plain(m) for m in messages],
        tools=tools or None,
        add_generation_prompt=tail,
        tokenize=False,
        **kwargs,
    )
    assert ours == theirs


ODD_TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}{% generation %}{{ m.content }}{% set x = 1 %}"
    "{% endgeneration %}{{ x is defined }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}\n{{ {'b': '<&>é', 'a': 1} | tojson(sort_keys=true) }}",
    "  {% if tools %}\n  x\n  {% endif %}\n{{ 'a' * 3 }}{{ 2 ** 3 }}{{ documents is none }}",
    "{{ strftime_now('%Y') }}{{ messages[0]['content'].split('h')[-1] }}",
]


@pytest.mark.parametrize("source", ODD_TEMPLATES)
def test_environment_equals_transformers(oracle: Any, source: str) -> None:
    messages = CONVERSATIONS["user"] * 4
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"})
    theirs = oracle.apply_chat_template(
        [plain(m) for m in messages], chat_template=source, tokenize=False
    )
    assert template.render(messages, add_generation_prompt=False) == theirs


def test_reasoning_reaches_both_spellings() -> None:
    template = ChatTemplate(
        {"default": "{{ messages[0].reasoning }}|{{ messages[0].reasoning_content }}"}
    )
    assert template.render([Message(role="assistant", reasoning="r")]) == "r|r"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template.render([]) == "plain"
    assert template.render([], [TOOL]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).render([], [TOOL]) == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.load(tmp_path, tmp_path / "mine.jinja").render([]) == "mine"


def test_damaged_templates_are_named(tmp_path: Path) -> None:
    assert_render_fails(ChatTemplate.load(tmp_path), "has no chat template.*--chat-template FILE")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "x"}]}')
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json: chat_template must be"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("not json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("a\n{% if %}")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja, line 2"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(TemplateError, match=r"cannot read chat template .*gone"):
        ChatTemplate.load(tmp_path, tmp_path / "gone")


def assert_render_fails(template: ChatTemplate, match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        template.render([Message(role="user", content="x")])


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{{ 'a' * 999999999 }}", "too long"),
        ("{{ ([1] * 999999999) | length }}", "too long"),
        ("{{ 9 ** (9 ** 9) }}", "power"),
        ("{{ missing.field }}", "undefined"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more than"),
    ],
)
def test_sandbox_and_limits(source: str, match: str) -> None:
    assert_render_fails(ChatTemplate({"default": source}), match)


def test_the_template_refuses(template: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match="unknown role narrator"):
        template.render([Message(role="narrator", content="x")])


@pytest.mark.parametrize("arguments", ["{", "[1]", "[" * 100000])
def test_arguments_must_be_an_object(template: ChatTemplate, arguments: str) -> None:
    call = ToolCall(name="add", arguments=arguments)
    with pytest.raises(RequestError, match="tool call arguments"):
        template.render([Message(role="assistant", tool_calls=(call,))])


def test_reasoning_start_is_read_from_the_tail(template: ChatTemplate) -> None:
    quoted = [Message(role="user", content="what is <think>")]
    assert starts_in_reasoning(template.render(quoted))
    assert not starts_in_reasoning(template.render(quoted, enable_thinking=False))
    assert not starts_in_reasoning(template.render(quoted, add_generation_prompt=False))


def test_family_form(template: ChatTemplate) -> None:
    assert template.render([Message(role="user", content="hi")]) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
