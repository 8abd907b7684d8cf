"""The embedded engine as a `Policy`: what environments, evaluations and teachers talk to."""

import contextlib
from collections.abc import AsyncGenerator, Sequence

from aprium.base.errors import EngineError, RequestError
from aprium.base.records import Completion, SamplingParams
from aprium.engine.client import AsyncEngine
from aprium.text.chat import starts_in_reasoning


class EnginePolicy:
    """The model of `engine`, which stays the caller's to close.

    Prompts that begin alike share what was computed of them within one `cache_salt`, turns of one
    episode among them. Lower `priority` goes first.
    """

    def __init__(self, engine: AsyncEngine, *, cache_salt: str = "", priority: int = 0) -> None:
        self._engine = engine
        self._options = {"cache_salt": cache_salt, "priority": priority}

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; see `Policy`. Raises RequestError, EngineError."""
        if params.n != 1:
            raise RequestError(f"n is {params.n}: ask a policy once for each completion", param="n")
        async with contextlib.aclosing(self.complete_all(tokens, params)) as found:
            async for completion in found:
                return completion
        raise EngineError("the engine ended a completion without saying why")

    async def complete_all(
        self, tokens: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Completion, None]:
        """Yield the `params.n` continuations of `tokens` as they end; the prompt is read once.

        Raises as `complete` does. Closing the iterator stops those that have not ended.
        """
        thinking = self._opens_reasoning(tokens)
        stream = self._engine.generate(
            tokens, params, thinking=thinking, whole=True, **self._options
        )
        try:
            async for completion in stream:
                yield completion
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    def _opens_reasoning(self, tokens: Sequence[int]) -> bool:
        """Say whether a prompt ends inside the reasoning, which guides and budgets must know."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            return False
        return starts_in_reasoning(tokenizer.decode(tokens[-8:], skip_special_tokens=False))

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it; see `Policy`."""
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
        completion = await self.complete(tokens, params)
        assert completion.prompt_logprobs is not None
        return list(completion.prompt_logprobs)
