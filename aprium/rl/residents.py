"""Engines of teachers: opened when first asked, shared by who names the same base, within a bound.

One engine holds one base. Adapters over it have no weights of their own in memory: the matrices
that they change are replaced by those of the merged checkpoint, made from the base's file as they
go in, and by the base's own again for the next.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aprium.base.errors import ConfigError, EngineError
from aprium.base.log import get_logger
from aprium.base.memory import available_bytes
from aprium.base.records import SamplingParams, TopLogprobs
from aprium.checkpoint.load import update_weights
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.quantize.merge import Overlay

log = get_logger("rl")
_SWITCHED_BYTES = 64 << 20  # of an adapter's matrices in memory beside those they replace
Scores = tuple[Sequence[float | None], Sequence[TopLogprobs | None]]


class TeacherWeights(NamedTuple):
    """What an engine has to hold to score: a base, and the adapter over it if any."""

    base: Path
    adapter: Path | None


class Residents:
    """The open engines, least recently used first, within a bound of memory.

    That is `memory_bytes` (None: half of what is free when the first is opened). Bases in `adapted`
    bear adapters. Each engine runs `max_num_seqs` sequences of at most `max_model_len` tokens
    (None: the model's).
    """

    def __init__(
        self,
        adapted: Iterable[Path],
        *,
        memory_bytes: int | None,
        max_num_seqs: int,
        max_model_len: int | None,
    ) -> None:
        self._adapted, self._limit = frozenset(adapted), memory_bytes
        self._sizes = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
        self._open: dict[Path, Base] = {}

    @property
    def num_bytes(self) -> int:
        """What the open engines take, about."""
        return sum(base.num_bytes for base in self._open.values())

    async def get(self, weights: TeacherWeights) -> "Base":
        """Return the engine of `weights`, opened and switched; nothing else may be under way."""
        base = self._open.pop(weights.base, None)
        if base is None:
            if self._limit is None:
                self._limit = available_bytes() // 2
            overlay = Overlay(weights.base)
            await self._make_room(overlay.num_bytes)
            base = Base(weights.base, overlay, self._sizes, weights.base in self._adapted)
            await base.open()
            try:
                await self._make_room(base.num_bytes)
            except ConfigError:
                await base.close()
                raise
        self._open[weights.base] = base
        try:
            await base.switch(weights.adapter)
        except BaseException:  # half of the matrices may be the other adapter's
            await self._open.pop(weights.base).close()
            raise
        return base

    async def _make_room(self, num_bytes: int) -> None:
        assert self._limit is not None
        if num_bytes > self._limit:
            raise ConfigError(
                f"a teacher takes {num_bytes} bytes and teachers.memory_bytes is {self._limit}: "
                "raise it, or lower teachers.max_num_seqs or teachers.max_model_len"
            )
        while self._open and self.num_bytes + num_bytes > self._limit:
            oldest = next(iter(self._open))
            log.info("closing teacher %s to make room", oldest)
            await self._open.pop(oldest).close()

    async def close(self) -> None:
        """Close all."""
        for base in self._open.values():
            await base.close()
        self._open.clear()


class Base:
    """An engine over one base, with at most one adapter's changes in its weights."""

    def __init__(
        self, path: Path, overlay: Overlay, sizes: Mapping[str, Any], adapted: bool
    ) -> None:
        self._path, self._overlay, self._sizes = path, overlay, sizes
        self._adapted = adapted
        self._engine: AsyncEngine | None = None
        self._adapter: Path | None = None
        self._changed: tuple[str, ...] = ()  # tensors that are not the base's own

    async def open(self) -> None:
        """Load the weights."""
        config = EngineConfig(
            model=str(self._path),
            load="memory" if self._adapted else "auto",
            **self._sizes,
            enable_prefix_caching=False,  # scores need every position of a prompt computed
            prefix_cache_ram_bytes=0,
        )
        self._engine = await asyncio.to_thread(AsyncEngine, config)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and states."""
        assert self._engine is not None
        stats = self._engine.stats()
        return self._overlay.num_bytes + stats.kv_bytes + stats.state_bytes

    async def switch(self, adapter: Path | None) -> None:
        """Make the weights those of `adapter` over the base, or of the base alone."""
        if adapter == self._adapter:
            return
        assert self._engine is not None
        merged = self._overlay.changed(adapter) if adapter is not None else {}
        stale = (name for name in self._changed if name not in merged)
        values: dict[str, Callable[[], Tensor]] = {
            name: lambda name=name: self._overlay.original(name) for name in stale
        }
        await self._engine.call(lambda engine: _replace(engine, values | merged))
        self._adapter, self._changed = adapter, tuple(merged)

    async def score(self, tokens: Sequence[int], top: int) -> Scores:
        """Return the log-probabilities of `tokens`, and their `top` rivals; entry 0 is None.

        Raises RequestError for more than the context holds.
        """
        assert self._engine is not None
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=top)
        async for completion in self._engine.generate(tokens, params):
            if completion.finish is not None and completion.prompt_logprobs is not None:
                return completion.prompt_logprobs, completion.prompt_top_logprobs or ()
        raise EngineError(f"the engine of {self._path} ended without scores")

    async def close(self) -> None:
        """Stop the engine; its memory goes with it."""
        if self._engine is not None:
            await self._engine.close()
            self._engine = None


def _replace(engine: Engine, values: Mapping[str, Callable[[], Tensor]]) -> None:
    """Put tensors in the place of those loaded, a few at a time, in the engine's thread."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, make in values.items():
        part[name] = value = make()
        size += value.nbytes
        if size >= _SWITCHED_BYTES:
            update_weights(engine.checkpoint, part)
            part, size = {}, 0
    engine.update_weights(part)  # and forget what was computed with the weights before
