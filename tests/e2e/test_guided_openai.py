"""Guided answers and ended reasoning of the bundled model, through the `openai` client."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.conftest import serving

QUESTION: list[Any] = [{"role": "user", "content": "What is 345 + 678?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"enum": ["celsius", "kelvin"]},
            },
            "required": ["city", "days"],
        },
    },
}


class Answer(pydantic.BaseModel):
    """What `parse` asks for."""

    total: int = pydantic.Field(ge=0, le=9999)
    sure: bool
    digits: list[Literal[1, 2, 3]] = pydantic.Field(max_length=4)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--max-model-len", "1K", "--reasoning-budget", "300", "--speculative-config")
    drafts = '{"method": "mtp", "num_speculative_tokens": 3, "adaptive": false}'
    with (
        serving(Path("pico"), log, *flags, drafts) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60) as found,
    ):
        yield found


@pytest.mark.parametrize("effort", ["none", "high"])
def test_parse(client: openai.OpenAI, effort: Any) -> None:
    reply = client.chat.completions.parse(
        model="pico", messages=QUESTION, response_format=Answer, reasoning_effort=effort,
        temperature=1, seed=3, max_tokens=600,
    )  # fmt: skip
    message = reply.choices[0].message
    assert isinstance(message.parsed, Answer)
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    thought = reply.usage.completion_tokens_details.reasoning_tokens
    assert (thought == 0) == (effort == "none")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_required_tools(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {
        "model": "pico", "messages": WEATHER, "tools": [TOOL], "tool_choice": choice,
        "temperature": 0, "parallel_tool_calls": False, "max_tokens": 300,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    (call,) = whole.message.tool_calls or ()
    assert whole.finish_reason == "tool_calls" and call.type == "function"
    name, arguments = call.function.name, call.function.arguments
    if stream:
        name = arguments = ""
        for chunk in client.chat.completions.create(stream=True, **options):
            for part in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
                name += part.function.name or ""
                arguments += part.function.arguments or ""
        assert arguments == call.function.arguments
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), TOOL["function"]["parameters"])


def test_a_budget_and_none(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> tuple[int, str | None]:
        reply = client.chat.completions.create(
            model="pico", messages=QUESTION, temperature=0, extra_body=fields
        )
        assert reply.usage is not None and reply.usage.completion_tokens_details is not None
        counted = reply.usage.completion_tokens_details.reasoning_tokens or 0
        return counted, reply.choices[0].message.content

    free, answer = ask()
    assert free > 8 and answer
    assert ask(thinking_token_budget=0)[0] == 1
    assert ask(reasoning_budget=-1) == ask(nvext={"max_thinking_tokens": 250}) == (free, answer)


def test_thinking_is_finished_while_it_runs(client: openai.OpenAI) -> None:
    """The stop string never comes; the reasoning would take its 300 tokens and more."""
    options: dict[str, Any] = {
        "model": "pico", "messages": QUESTION, "temperature": 0, "max_tokens": 800,
        "extra_body": {"structured_outputs": {"regex": "[0-9]{1,4}"}},
    }  # fmt: skip
    told = threading.Event()
    content = reasoning = ""
    for chunk in client.chat.completions.create(stream=True, **options):
        if not told.is_set():
            body = {"id": chunk.id, "action": "reasoning_end"}
            reply = client.post("/chat/completions/control", body=body, cast_to=dict[str, Any])
            assert reply["id"] == chunk.id
            told.set()
        delta: Any = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning", None) or ""
    assert content.isdecimal()
    whole = client.chat.completions.create(**options).choices[0].message
    assert (whole.content or "").isdecimal()
    assert (whole.model_extra or {})["reasoning"].startswith(reasoning)


def test_bad_forms_are_refused(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    for fields, param in (
        ({"response_format": schema}, "response_format"),
        ({"grammar": "root ::= missing"}, "grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="pico", messages=QUESTION, extra_body=fields)
        assert caught.value.param == param
