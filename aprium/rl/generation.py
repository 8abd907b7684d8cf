"""Who plays with the policy's weights: an engine in this process, or what looks the same."""

import asyncio
from pathlib import Path
from typing import Protocol

from aprium.base.errors import EngineError
from aprium.base.policy import GroupPolicy
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.rl.evaluate import chat_format
from aprium.rl.weights import Weights


class Generation(Protocol):
    """One or more engines that hold the weights of a step and play with them."""

    @property
    def chat(self) -> ChatFormat:
        """How conversations with the model are written."""
        ...

    @property
    def failed(self) -> EngineError | None:
        """Why nothing can be played any more, or None."""
        ...

    def policy(self, *, priority: int = 0) -> GroupPolicy:
        """Return the model to play with; lower `priority` goes first."""
        ...

    async def push(self, weights: Weights, version: int, *, recompute: bool = False) -> None:
        """Replace the weights; when this returns every engine that plays has them.

        Sequences under way go on from their states, or with `recompute` from their tokens. Nothing
        may train the model meanwhile. Raises EngineError when no engine is left.
        """
        ...

    async def close(self) -> None:
        """Stop all engines; what they have under way fails."""
        ...


class Embedded:
    """One engine in this process."""

    def __init__(self, config: EngineConfig, path: Path, weights: Weights) -> None:
        self._engine = AsyncEngine(config, weights.checkpoint(path))
        try:
            self.chat = chat_format(self._engine)
        except BaseException:
            asyncio.run(self._engine.close())
            raise

    @property
    def failed(self) -> EngineError | None:
        """Why nothing can be played any more, or None."""
        return self._engine.failed

    def policy(self, *, priority: int = 0) -> GroupPolicy:
        """Return the model to play with; see `Generation`."""
        return EnginePolicy(self._engine, priority=priority)

    async def push(self, weights: Weights, version: int, *, recompute: bool = False) -> None:
        """Replace the weights; see `Generation`."""
        await weights.push(self._engine, version, recompute=recompute)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()
