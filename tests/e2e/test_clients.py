"""The official clients of both vendors against a real process that serves pico."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.e2e.conftest import serving

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GREEDY = {"temperature": 0}
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(Path("pico"), log, "--max-model-len", "2K", "--api-key", "secret") as found:
        yield found


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def gpt(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        yield client


class TestAnthropic:
    def test_message(self, claude: anthropic.Anthropic) -> None:
        ask: Any = {"model": "pico", "messages": [{"role": "user", "content": "Who are you?"}]}
        message = claude.messages.create(max_tokens=80, extra_body=GREEDY, **ask)
        (block,) = message.content
        assert block.type == "text" and "pico" in block.text
        assert message.stop_reason == "end_turn"
        count = claude.messages.count_tokens(**ask).input_tokens
        usage = message.usage
        assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)

    def test_thinking_streams(self, claude: anthropic.Anthropic) -> None:
        ask: Any = {
            "model": "pico", "max_tokens": 2000, "extra_body": GREEDY,
            "messages": [{"role": "user", "content": "What is 3 + 4?"}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }  # fmt: skip
        with claude.messages.stream(**ask) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_message()
        assert "thinking" in kinds and "text" in kinds
        whole = claude.messages.create(**ask)
        assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
        assert whole.content[0].type == "thinking" and whole.content[0].thinking

    def test_tools_there_and_back(self, claude: anthropic.Anthropic) -> None:
        tools: Any = [{"name": "get_weather", "description": "Weather", "input_schema": WEATHER}]
        ask: Any = {"model": "pico", "max_tokens": 200, "extra_body": GREEDY, "tools": tools}
        message = claude.messages.create(messages=ASK, tool_choice={"type": "any"}, **ask)
        call = next(block for block in message.content if block.type == "tool_use")
        assert message.stop_reason == "tool_use"
        assert call.name == "get_weather" and isinstance(call.input["city"], str)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "19 degrees, rain"}
        turns: Any = [
            *ASK,
            {"role": "assistant", "content": [block.to_dict() for block in message.content]},
            {"role": "user", "content": [result]},
        ]
        assert claude.messages.create(messages=turns, **ask).content

    def test_errors(self, claude: anthropic.Anthropic, address: str) -> None:
        ask: Any = {"model": "pico", "messages": ASK, "max_tokens": 5}
        with pytest.raises(anthropic.BadRequestError, match="temperature is -1"):
            claude.messages.create(extra_body={"temperature": -1}, **ask)
        with pytest.raises(anthropic.NotFoundError, match="not served here"):
            claude.messages.create(**{**ask, "model": "claude"})
        with (
            anthropic.Anthropic(base_url=address, api_key="no", max_retries=0) as stranger,
            pytest.raises(anthropic.AuthenticationError),
        ):
            stranger.messages.create(**ask)


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome"]
    large: bool


class TestOpenAI:
    def test_response_goes_on(self, gpt: openai.OpenAI) -> None:
        ask: Any = {"model": "pico", "temperature": 0, "reasoning": {"effort": "none"}}
        first = gpt.responses.create(input="Who are you?", **ask)
        assert "pico" in first.output_text and first.status == "completed"
        second = gpt.responses.create(input="Thanks.", previous_response_id=first.id, **ask)
        assert second.usage is not None and first.usage is not None
        assert second.usage.input_tokens > first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens > 0
        assert gpt.responses.retrieve(first.id).output_text == first.output_text
        gpt.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            gpt.responses.retrieve(first.id)

    def test_response_streams(self, gpt: openai.OpenAI) -> None:
        ask: Any = {"model": "pico", "temperature": 0, "input": "What is 3 + 4?"}
        with gpt.responses.stream(**ask) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert final.output_text == text == gpt.responses.create(**ask).output_text
        assert final.output[0].type == "reasoning"

    def test_response_has_logprobs(self, gpt: openai.OpenAI) -> None:
        ask: Any = {
            "model": "pico", "temperature": 0, "input": "What is 3 + 4?", "top_logprobs": 3,
            "include": ["message.output_text.logprobs"],
        }  # fmt: skip
        with gpt.responses.stream(**ask) as stream:
            deltas = [e for e in stream if e.type == "response.output_text.delta"]
            final = stream.get_final_response()
        streamed = [(s.token, s.logprob) for delta in deltas for s in delta.logprobs]
        for response in (final, gpt.responses.create(**ask)):
            message = response.output[-1]
            assert message.type == "message" and message.content[0].type == "output_text"
            scores = message.content[0].logprobs
            assert scores is not None
            assert [(score.token, score.logprob) for score in scores] == streamed
            assert "".join(score.token for score in scores).strip() == response.output_text.strip()
            assert all(score.top_logprobs[0].logprob == score.logprob for score in scores)
            assert {len(score.top_logprobs) for score in scores} == {3}

    def test_response_calls_tools(self, gpt: openai.OpenAI) -> None:
        tools: Any = [{"type": "function", "name": "get_weather", "parameters": WEATHER}]
        ask: Any = {"model": "pico", "temperature": 0, "tools": tools}
        first = gpt.responses.create(input=ASK, tool_choice="required", **ask)
        call = next(item for item in first.output if item.type == "function_call")
        assert isinstance(json.loads(call.arguments)["city"], str)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        second = gpt.responses.create(input=[result], previous_response_id=first.id, **ask)
        assert second.output

    def test_parsed(self, gpt: openai.OpenAI) -> None:
        ask: Any = {"model": "pico", "temperature": 0}
        off: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
        parsed = gpt.responses.parse(input="A city.", text_format=City, **ask, **off)
        assert isinstance(parsed.output_parsed, City)
        chat = gpt.chat.completions.parse(messages=ASK, response_format=City, **ask, **off)
        assert isinstance(chat.choices[0].message.parsed, City)

    def test_in_the_background(self, gpt: openai.OpenAI) -> None:
        made = gpt.responses.create(model="pico", input="Tell a story.", background=True)
        stopped = gpt.responses.cancel(made.id)
        assert stopped.status in ("cancelled", "completed")
