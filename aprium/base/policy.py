"""What environments and evaluations see of a model: tokens in, a completion or scores out.

The embedded engine, a server somewhere else and a script in a test all look like this, so that
whoever plays an episode or grades an answer never knows which one it talks to.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, runtime_checkable

from aprium.base.records import Completion, SamplingParams


class Policy(Protocol):
    """A model that continues and scores token ids."""

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; the completion has a log-probability for each of its tokens.

        `params.n` is 1. Raises RequestError for what can never be served, EngineError when the
        model has failed or gone away. Cancelling the call stops the generation.
        """
        ...

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the natural-log probability of each token given those before it; entry 0 is None.

        Raises as `complete` does.
        """
        ...


@runtime_checkable
class GroupPolicy(Policy, Protocol):
    """A model that reads a prompt once for all of its continuations.

    Calls with the seeds `seed` to `seed + n - 1` are taken for later turns of those that began with
    `seed` and `n`.
    """

    def complete_all(
        self, tokens: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Completion, None]:
        """Yield the `params.n` continuations of `tokens` as they end.

        Raises as `complete` does. Closing the iterator stops those that have not ended.
        """
        ...
