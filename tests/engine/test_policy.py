"""The embedded engine as a policy: the same tokens, log-probabilities and scores as the engine."""

import asyncio

import pytest

from aprium.base.errors import RequestError
from aprium.base.records import SamplingParams
from aprium.engine.client import LLM, AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy

PROMPT = (20, 30, 40, 50)


def test_it_says_what_the_engine_says(text_toy) -> None:
    params = SamplingParams(max_tokens=6, seed=3, ignore_eos=True)
    with LLM(text_toy) as llm:
        (expected,) = llm.generate([PROMPT], params)
        scores = llm.score([*PROMPT, *expected.tokens])

    async def run() -> None:
        engine = AsyncEngine(EngineConfig(model="toy"), text_toy)
        policy = EnginePolicy(engine, cache_salt="mine")
        try:
            found = await policy.complete(PROMPT, params)
            assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
            assert found.finish == "length" and found.weight_spans == ((0, 6),)
            assert await policy.score([*PROMPT, *found.tokens]) == scores
            assert tuple(scores[len(PROMPT) :]) == pytest.approx(found.logprobs, abs=1e-5)
            with pytest.raises(RequestError, match="n is 2"):
                await policy.complete(PROMPT, SamplingParams(n=2))
            # A cancelled call stops the generation and leaves nothing behind.
            task = asyncio.create_task(
                policy.complete(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
            )
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(200):
                if not engine.stats().num_running:
                    break
                await asyncio.sleep(0.01)
            assert engine.stats().num_running == 0
        finally:
            await engine.close()

    asyncio.run(run())
