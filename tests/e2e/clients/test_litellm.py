"""litellm over both of its ways here: as OpenAI's chat completions, and as Anthropic's messages."""

import asyncio
import gc
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.clients.conftest import KEY, QUESTION, WEATHER, need

# It imports lazily, with warnings on the way, and leaves its connections and an event loop open.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
SUM = [{"role": "user", "content": "What is 3 + 4?"}]
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "place",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
        module = need("litellm")
        patch.setattr(module, "suppress_debug_info", True)
        yield module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.in_memory_llm_clients_cache.flush_cache()
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def options(request: pytest.FixtureRequest, pico: str) -> dict[str, Any]:
    return {
        "model": f"{request.param}/pico",
        "api_base": pico if request.param == "anthropic" else f"{pico}/v1",
        "api_key": KEY,
        "temperature": 0,
        "max_tokens": 300,
    }


def think(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with which every route answers with its reasoning."""
    if not options["model"].startswith("anthropic"):
        return options
    return {
        **options, "max_tokens": 1800, "thinking": {"type": "enabled", "budget_tokens": 1024},
        # It does not know that this model can think.
        "allowed_openai_params": ["thinking"],
    }  # fmt: skip


def test_whole_and_streamed_say_the_same(litellm: Any, options: dict[str, Any]) -> None:
    options = think(options)
    whole = litellm.completion(messages=SUM, **options)
    said = whole.choices[0].message
    assert (said.content, whole.choices[0].finish_reason) == ("7", "stop")
    assert said.reasoning_content.strip() == "3+4=7"
    chunks = list(
        litellm.completion(
            messages=SUM, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert len(chunks) > 3
    built = litellm.stream_chunk_builder(chunks, messages=SUM)
    again = built.choices[0].message
    assert (again.content, again.reasoning_content) == (said.content, said.reasoning_content)
    assert built.choices[0].finish_reason == "stop"
    for field in ("prompt_tokens", "completion_tokens"):
        assert getattr(built.usage, field) == getattr(whole.usage, field) > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", TOOLS[0]])
def test_a_tool_is_called_and_its_result_read(
    litellm: Any, options: dict[str, Any], choice: Any, stream: bool
) -> None:
    ask: list[Any] = [{"role": "user", "content": QUESTION}]
    reply = litellm.completion(
        messages=ask, tools=TOOLS, tool_choice=choice, stream=stream, **options
    )
    if stream:
        reply = litellm.stream_chunk_builder(list(reply), messages=ask)
    message = reply.choices[0].message
    (call,) = message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    def read(result: str) -> int:
        said = {"role": "tool", "tool_call_id": call.id, "content": result}
        turns = [*ask, message.model_dump(exclude_none=True), said]
        after = litellm.completion(messages=turns, tools=TOOLS, tool_choice="none", **options)
        assert after.choices[0].message.content
        return after.usage.prompt_tokens

    assert read("19 degrees") < read("19 degrees and rain until tomorrow")


def test_form(litellm: Any, options: dict[str, Any]) -> None:
    reply = litellm.completion(messages=SUM, response_format=FORM, **options)
    assert json.loads(reply.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_errors_have_their_types(litellm: Any, options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature is -1"):
        litellm.completion(messages=SUM, **{**options, "temperature": -1})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=SUM, **{**options, "api_key": "no"})
    with pytest.raises(litellm.NotFoundError, match="not served here"):
        litellm.completion(messages=SUM, **{**options, "model": options["model"] + "lo"})


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_embeddings(litellm: Any, pico: str, provider: str) -> None:
    options = {"model": f"{provider}/pico", "api_base": f"{pico}/v1", "api_key": KEY}
    both = litellm.embedding(input=["a plum", "an apricot"], **options)
    first, second = (item["embedding"] for item in both.data)
    assert math.fsum(x * x for x in first) == pytest.approx(1, abs=1e-5)
    assert first != pytest.approx(second, abs=1e-3)
    alone = litellm.embedding(input=["a plum"], encoding_format="float", **options)
    assert first == pytest.approx(alone.data[0]["embedding"], abs=1e-6)
    assert both.usage.prompt_tokens > alone.usage.prompt_tokens > 0


def test_text_and_responses(litellm: Any, pico: str) -> None:
    options = {"api_base": f"{pico}/v1", "api_key": KEY, "temperature": 0}
    text = litellm.text_completion(
        model="text-completion-openai/pico", prompt="The snake is", max_tokens=5, **options
    )
    assert text.choices[0].text and text.usage.completion_tokens == 5
    ask = {"model": "openai/pico", "input": SUM[0]["content"], **options}
    whole = litellm.responses(**ask)
    assert whole.output[-1].content[0].text == "7"
    *_, last = litellm.responses(stream=True, **ask)
    assert last.type == "response.completed"
    assert last.response.output[-1].content[0].text == "7"
