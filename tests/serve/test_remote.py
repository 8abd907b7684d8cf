"""A remote policy: over this package's own application, and against servers that lack something."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from aprium.base.errors import EngineError, RequestError
from aprium.base.records import Completion, Guide, SamplingParams
from aprium.serve.app import create_app
from aprium.serve.remote import RemotePolicy
from aprium.serve.service import ServeConfig
from tests.serve.conftest import END, FakeEngine


def answering(body: Any, status: int = 200, seen: list[Any] | None = None) -> httpx2.MockTransport:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        return httpx2.Response(status, json=body)

    return httpx2.MockTransport(answer)


def complete(transport: Any, params: SamplingParams | None = None) -> Completion:
    async def run() -> Completion:
        async with RemotePolicy("http://there", "m", transport=transport) as policy:
            return await policy.complete([1, 2], params or SamplingParams(max_tokens=4))

    return asyncio.run(run())


def test_over_our_own_server_it_is_what_the_engine_said(directory: Path) -> None:
    family_engine = FakeEngine(directory)
    app = create_app(family_engine, ServeConfig(names=("toy",)))  # type: ignore[arg-type]

    async def run() -> None:
        transport = httpx2.ASGITransport(app=app)
        async with RemotePolicy("http://127.0.0.1/v1/", "toy", transport=transport) as policy:
            policy.weight_version = 7
            params = SamplingParams(
                max_tokens=50, top_k=3, stop_token_ids=(9,), logit_bias=((4, 1.0),), seed=5
            )
            found = await policy.complete([20, 21], params)
            expected = (*family_engine.tokenizer.encode("hello there"), END)
            assert found.tokens == expected and found.text == "hello there"
            assert found.logprobs == (-0.5,) * len(expected)
            assert (found.finish, found.weight_spans) == ("stop", ((7, len(expected)),))
            prompt, asked = family_engine.calls[-1]
            assert prompt == (20, 21)
            for name in ("max_tokens", "top_k", "stop_token_ids", "logit_bias", "seed"):
                assert getattr(asked, name) == getattr(params, name)
            assert await policy.score([20, 21, 22]) == [None, -2.0, -2.0]
            guide = Guide(kind="choice", value=["yes", "no"])
            await policy.complete([20], SamplingParams(max_tokens=4, guide=guide))
            assert family_engine.calls[-1][1].guide == guide

    asyncio.run(run())


def test_scores_come_with_the_most_probable_tokens_and_texts_with_their_ids(
    directory: Path,
) -> None:
    engine = FakeEngine(directory)
    app = create_app(engine, ServeConfig(names=("toy",)))  # type: ignore[arg-type]

    async def run() -> None:
        transport = httpx2.ASGITransport(app=app)
        async with RemotePolicy("http://127.0.0.1/v1/", "toy", transport=transport) as policy:
            assert await policy.tokenize("hello there") == engine.tokenizer.encode("hello there")

    asyncio.run(run())

    def row(*pairs: tuple[int, float]) -> dict[str, Any]:
        return {str(id): {"logprob": value, "rank": 1} for id, value in pairs}

    # The second token is none of the two most probable ones, and comes beside them.
    rows = [None, row((7, -1.0), (8, -2.0), (2, -9.0)), row((3, -0.1), (4, -3.0))]
    found = ask_top({"choices": [{"text": "", "prompt_logprobs": rows}]})
    assert found == ([None, -9.0, -0.1], [{}, {7: -1.0, 8: -2.0}, {3: -0.1, 4: -3.0}])
    for bad in (None, rows[:2], [None, {}, row((3, -0.1))], [None, {"x": {}}, rows[2]]):
        with pytest.raises(EngineError, match="must honour prompt_logprobs"):
            ask_top({"choices": [{"text": "", "prompt_logprobs": bad}]})


def ask_top(body: Any) -> Any:
    async def run() -> Any:
        async with RemotePolicy("http://there", "m", transport=answering(body)) as policy:
            return await policy.score_top([1, 2, 3], 2)

    return asyncio.run(run())


def test_a_server_that_does_not_tokenize_says_nothing() -> None:
    async def run(status: int, body: Any) -> Any:
        transport = answering(body, status)
        async with RemotePolicy("http://there", "m", transport=transport) as policy:
            return await policy.tokenize("plum")

    assert asyncio.run(run(404, {"detail": "Not Found"})) is None
    assert asyncio.run(run(501, {})) is None
    assert asyncio.run(run(200, {"tokens": [3, 4]})) == [3, 4]
    with pytest.raises(EngineError, match="answers 503"):
        asyncio.run(run(503, {}))


def test_only_what_was_set_is_sent() -> None:
    seen: list[Any] = []
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "text": "a"}
    body = {"choices": [{**choice, "finish_reason": "length"}]}
    assert complete(answering(body, seen=seen)).tokens == (5,)
    assert seen[0] == {
        "model": "m", "prompt": [1, 2], "return_token_ids": True, "logprobs": 0,
        "max_tokens": 4, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "error", "words"),
    [
        ({"choices": [{"text": "a", "finish_reason": "stop"}]}, 200, EngineError, "no token ids"),
        ({"choices": []}, 200, EngineError, "no completion"),
        ({"error": {"message": "too long"}}, 400, RequestError, "400: too long"),
        ({"error": {"message": "busy"}}, 429, EngineError, "429: busy"),
        ({"error": {"message": "broken"}}, 500, EngineError, "500: broken"),
        (
            {
                "choices": [
                    {
                        "text": "a",
                        "finish_reason": "stop",
                        "token_ids": [1, 2],
                        "logprobs": {"token_logprobs": [-1.0]},
                    }
                ]
            },
            200,
            EngineError,
            "2 token ids and 1 log-prob",
        ),
    ],
)
def test_servers_that_cannot_serve(body: Any, status: int, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        complete(answering(body, status))


def test_a_server_that_does_not_echo() -> None:
    async def run() -> None:
        body = {"choices": [{"logprobs": {"token_logprobs": [-1.0]}}]}
        async with RemotePolicy("http://there", "m", transport=answering(body)) as policy:
            await policy.score([1, 2, 3])

    with pytest.raises(EngineError, match="1 log-probabilities for 3 tokens"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SamplingParams(max_tokens=None), "max_tokens is None"),
        (SamplingParams(n=2), "n cannot"),
        (SamplingParams(thinking_budget=5), "thinking_budget cannot"),
    ],
)
def test_what_cannot_be_asked_is_refused(params: SamplingParams, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        complete(answering({}), params)
    with pytest.raises(RequestError, match="no address"):
        RemotePolicy("there", "m")
