"""Sources of samples: JSONL documents and conversations, generated tasks, and their mixture.

Everything is a function of the configuration, its seed and a position, so a position is all there
is to save: a small JSON dict restores the exact next sample. A file keeps only the offset of each
line in memory and is read in a new random order every pass. Documents longer than `max_length`
become consecutive samples; see `encode.split_sample` for why nothing is lost.

Generated tasks come from a function that the caller hands in, because this package does not know
where tasks are made. The mixture is by tokens, not by samples: the next sample comes from the
source that is furthest behind its share.
"""

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

from aprium.base.errors import ConfigError, DataError
from aprium.base.records import Conversation, Sample
from aprium.data.encode import (
    Renderer,
    TextEncoder,
    encode_conversation,
    encode_text,
    read_conversation,
    split_sample,
)

# Draws one conversation: (random state, task families, share with reasoning) -> conversation.
Generate: TypeAlias = Callable[[Random, Sequence[str], float], Conversation]
Items: TypeAlias = Callable[[int], list[Sample]]

# A source that yields nothing to learn so many times in a row is broken, not unlucky.
_MAX_EMPTY = 10_000


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of samples.

    `kind` "text" and "chat" read JSONL at `path` (`{"text": ...}` or `{"messages": [...]}`);
    "tasks" generates conversations of `families` (empty: all), of which the share `thinking`
    shows worked reasoning. `weight` is the share of tokens relative to the other sources; it
    moves linearly to `final_weight`, where given, over `DataConfig.schedule_tokens`.
    """

    name: str
    kind: Literal["text", "chat", "tasks"]
    path: Path | None = None
    weight: float = 1.0
    final_weight: float | None = None
    families: tuple[str, ...] = ()
    thinking: float = 0.5

    def __post_init__(self) -> None:
        """Check what the type cannot."""
        if (self.path is None) != (self.kind == "tasks"):
            need = "takes no path" if self.kind == "tasks" else "needs a path"
            raise ConfigError(f"source {self.name!r}: kind {self.kind!r} {need}")
        if self.families and self.kind != "tasks":
            raise ConfigError(f'source {self.name!r}: families are for kind "tasks" only')
        final = self.weight if self.final_weight is None else self.final_weight
        if self.weight < 0 or final < 0 or self.weight + final == 0:
            raise ConfigError(
                f"source {self.name!r}: weights {self.weight} and {final} must not be negative, "
                "and one must be above 0"
            )
        if not 0 <= self.thinking <= 1:
            raise ConfigError(f"source {self.name!r}: thinking is {self.thinking}, not in 0..1")

    def weight_at(self, progress: float) -> float:
        """Return the weight at `progress` in [0, 1] of the schedule."""
        final = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (final - self.weight) * progress


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of sources.

    `max_length` is the longest sample in tokens. `schedule_tokens` is how many tokens it takes
    for weights to reach their final values; 0 keeps the first ones throughout.
    """

    sources: tuple[SourceConfig, ...]
    max_length: int = 512
    seed: int = 0
    schedule_tokens: int = 0

    def __post_init__(self) -> None:
        """Check what the type cannot."""
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"sources must be some with distinct names, not {names}")
        moving = [s.name for s in self.sources if s.final_weight is not None]
        if moving and self.schedule_tokens <= 0:
            raise ConfigError(f"source {moving[0]!r} has a final_weight: set schedule_tokens too")
        for weights in ([s.weight_at(0.0) for s in self.sources], [s.weight_at(1.0) for s in self.sources]):
            if not sum(weights):
                raise ConfigError(f"the weights of {names} must not all be 0 at the same time")


class Source:
    """A stream of the samples of items 0, 1, 2, ... of which each has one or more."""

    def __init__(self, name: str, items: Items) -> None:
        self.name = name
        self._items = items
        self._item = 0
        self._piece = 0
        self._pieces: list[Sample] | None = None

    def next(self) -> Sample:
        """Return the next sample. Raises DataError when a long run of items yields none."""
        for _ in range(_MAX_EMPTY):
            if self._pieces is None:
                self._pieces = self._items(self._item)
            if self._piece < len(self._pieces):
                self._piece += 1
                return self._pieces[self._piece - 1]
            self._item, self._piece, self._pieces = self._item + 1, 0, None
        raise DataError(f"source {self.name!r} has nothing to learn in {_MAX_EMPTY} items")

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next sample."""
        return {"name": self.name, "item": self._item, "piece": self._piece}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError when it is of another source."""
        if state.get("name") != self.name:
            raise DataError(f"saved state is of source {state.get('name')!r}, not {self.name!r}")
        self._item, self._piece, self._pieces = state["item"], state["piece"], None


class Mixture:
    """An endless stream of samples in which each source has its share of the tokens.

    Every source has a clock that advances by tokens over weight; the one furthest behind goes
    next. At any time, with fixed weights, shares are right to within one sample.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source]) -> None:
        self.config = config
        self._sources = list(sources)
        self._clocks = [0.0] * len(self._sources)
        self._tokens = 0

    @classmethod
    def build(
        cls,
        config: DataConfig,
        tokenizer: TextEncoder,
        template: Renderer,
        *,
        generate: Generate | None = None,
        end_token: int = 2,
    ) -> "Mixture":
        """Open all sources of `config`.

        `generate` draws the conversations of "tasks" sources; `end_token` closes documents.
        Raises ConfigError when tasks are asked for without it, DataError for a bad file.
        """
        sources = []
        for source in config.sources:
            if source.kind == "tasks":
                items = _generated(config, source, tokenizer, template, generate)
            else:
                items = _from_file(config, source, tokenizer, template, end_token)
            sources.append(Source(source.name, items))
        return cls(config, sources)

    def next(self) -> Sample:
        """Return the next sample."""
        total = self.config.schedule_tokens
        progress = min(1.0, self._tokens / total) if total else 0.0
        weights = [source.weight_at(progress) for source in self.config.sources]
        active = [i for i, weight in enumerate(weights) if weight > 0]
        now = min(self._clocks[i] for i in active)
        chosen = next(i for i in active if self._clocks[i] == now)
        # A source that was switched off must not catch up on what it missed meanwhile.
        self._clocks = [max(clock, now) for clock in self._clocks]
        sample = self._sources[chosen].next()
        self._clocks[chosen] += len(sample.tokens) / weights[chosen]
        self._tokens += len(sample.tokens)
        return sample

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the exact next sample, as plain JSON values."""
        return {
            "tokens": self._tokens,
            "clocks": list(self._clocks),
            "sources": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError when the sources differ."""
        if len(state["sources"]) != len(self._sources):
            found = [entry["name"] for entry in state["sources"]]
            known = [source.name for source in self._sources]
            raise DataError(f"saved state is of sources {found}: the recipe now has {known}")
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self._tokens, self._clocks = state["tokens"], list(state["clocks"])


def _generated(
    config: DataConfig,
    source: SourceConfig,
    tokenizer: TextEncoder,
    template: Renderer,
    generate: Generate | None,
) -> Items:
    if generate is None:
        raise ConfigError(f"source {source.name!r} needs a task generator and none was given")

    def items(index: int) -> list[Sample]:
        rng = Random(f"{config.seed}/{source.name}/{index}")
        conversation = generate(rng, source.families, source.thinking)
        sample = encode_conversation(conversation, tokenizer, template)
        return split_sample(sample, config.max_length)

    return items


def _from_file(
    config: DataConfig,
    source: SourceConfig,
    tokenizer: TextEncoder,
    template: Renderer,
    end_token: int,
) -> Items:
    path = source.path
    assert path is not None, "checked by SourceConfig"
    offsets = _line_offsets(path)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        lines = list(range(len(offsets)))
        Random(f"{config.seed}/{source.name}/{epoch}").shuffle(lines)
        return lines

    def items(index: int) -> list[Sample]:
        epoch, position = divmod(index, len(offsets))
        line = order(epoch)[position]
        record, where = _read_line(path, offsets[line]), f"{path}, line {line + 1}"
        if source.kind == "text":
            if not isinstance(record.get("text"), str):
                raise DataError(f'{where}: expected {{"text": "..."}}')
            sample = encode_text(
                record["text"], tokenizer, end_token=end_token, domain=source.name
            )
        else:
            conversation = read_conversation(record, where=where, domain=source.name)
            sample = encode_conversation(conversation, tokenizer, template)
        return split_sample(sample, config.max_length)

    return items


def _line_offsets(path: Path) -> "array[int]":
    """Return the byte offset of every line of `path` that is not blank."""
    offsets, at = array("q"), 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(at)
                at += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not offsets:
        raise DataError(f"{path} holds no records: it must have one JSON object a line")
    return offsets


def _read_line(path: Path, offset: int) -> Mapping[str, Any]:
    with path.open("rb") as file:
        file.seek(offset)
        line = file.readline()
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, byte {offset}: not a line of JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, byte {offset}: expected a JSON object, not {line[:80]!r}")
    return record
