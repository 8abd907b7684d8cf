"""OpenAI's agents: loops with a function tool over both kinds of model."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.clients.conftest import KEY, QUESTION, need

pytestmark = [pytest.mark.clients, pytest.mark.anyio]


class Report(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def agents() -> Any:
    module = need("agents")
    module.set_tracing_disabled(True)
    return module


@pytest.fixture
def called() -> list[str]:
    """The cities that the tool was asked for."""
    return []


@pytest.fixture
def tool(agents: Any, called: list[str]) -> Any:
    # pico learnt to call and not to sum up: once it has been called the tool is taken away.
    @agents.function_tool(is_enabled=lambda context, agent: not called)
    def get_weather(city: str) -> str:
        """Get the weather of a city.

        Args:
            city: The city.
        """
        called.append(city)
        return f"19 degrees in {city}"

    return get_weather


@pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
async def agent(
    request: pytest.FixtureRequest, agents: Any, pico: str
) -> AsyncIterator[Callable[..., Any]]:
    async with openai.AsyncOpenAI(base_url=f"{pico}/v1", api_key=KEY, max_retries=0) as client:
        model = getattr(agents, request.param)(model="pico", openai_client=client)

        def make(name: str = "pico", **fields: Any) -> Any:
            settings = {"temperature": 0, "max_tokens": 300, **fields.pop("settings", {})}
            settings = agents.ModelSettings(**settings)
            return agents.Agent(name=name, model=model, model_settings=settings, **fields)

        yield make


def kinds(result: Any) -> list[str]:
    return [item.type for item in result.new_items if item.type != "reasoning_item"]


LOOP = ["tool_call_item", "tool_call_output_item", "message_output_item"]


@pytest.mark.parametrize("choice", [None, "required", "get_weather"])
async def test_loop_with_a_tool_and_a_form(
    agent: Callable[..., Any], agents: Any, tool: Any, called: list[str], choice: str | None
) -> None:
    asked = agent(tools=[tool], output_type=Report, settings={"tool_choice": choice})
    result = await agents.Runner.run(asked, QUESTION)
    assert called == ["Paris"]
    assert kinds(result) == LOOP
    assert result.new_items[1].output == "19 degrees in Paris"
    assert isinstance(result.final_output, Report)
    assert result.context_wrapper.usage.requests == 2


async def test_stream(agent: Callable[..., Any], agents: Any, tool: Any, called: list[str]) -> None:
    result = agents.Runner.run_streamed(agent(tools=[tool]), QUESTION)
    events = [event async for event in result.stream_events()]
    names = [e.name for e in events if e.type == "run_item_stream_event"]
    assert [n for n in names if n != "reasoning_item_created"] == [
        "tool_called", "tool_output", "message_output_created"
    ]  # fmt: skip
    raw = [event.data for event in events if event.type == "raw_response_event"]
    text = "".join(e.delta for e in raw if e.type == "response.output_text.delta")
    arguments = "".join(e.delta for e in raw if e.type == "response.function_call_arguments.delta")
    assert called == ["Paris"] and json.loads(arguments) == {"city": "Paris"}
    assert result.final_output == text != ""


async def test_the_tools_result_can_be_the_answer(
    agent: Callable[..., Any], agents: Any, tool: Any
) -> None:
    asked = agent(tools=[tool], tool_use_behavior="stop_on_first_tool")
    assert (await agents.Runner.run(asked, QUESTION)).final_output == "19 degrees in Paris"


async def test_memory_and_reasoning(agent: Callable[..., Any], agents: Any, tool: Any) -> None:
    session = agents.SQLiteSession("weather")
    await agents.Runner.run(agent(tools=[tool]), QUESTION, session=session)
    result = await agents.Runner.run(agent(), "What is 3 + 4?", session=session)
    assert result.final_output == "7"
    (thought,) = [item for item in result.new_items if item.type == "reasoning_item"]
    assert "3+4=7" in str(thought.raw_item)
    assert len(await session.get_items()) > 5


async def test_handoff(agent: Callable[..., Any], agents: Any) -> None:
    other = agent("adder")
    first = agent(handoffs=[other], settings={"tool_choice": "transfer_to_adder"})
    result = await agents.Runner.run(first, "What is 3 + 4?")
    assert result.last_agent is other
    assert kinds(result) == ["handoff_call_item", "handoff_output_item", "message_output_item"]


async def test_the_server_remembers(agents: Any, pico: str, tool: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{pico}/v1", api_key=KEY, max_retries=0) as client:
        model = agents.OpenAIResponsesModel(model="pico", openai_client=client)
        settings = agents.ModelSettings(temperature=0)
        asked = agents.Agent(name="a", model=model, model_settings=settings, tools=[tool])
        first = await agents.Runner.run(asked, QUESTION, auto_previous_response_id=True)
        plain = agents.Agent(name="b", model=model, model_settings=settings)
        second = await agents.Runner.run(
            plain, "What is 3 + 4?", previous_response_id=first.last_response_id
        )
    assert second.final_output == "7"
    usage, before = (r.context_wrapper.usage for r in (second, first))
    assert usage.input_tokens_details.cached_tokens > 0
    assert usage.input_tokens > before.request_usage_entries[-1].total_tokens
