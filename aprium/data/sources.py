"""Where samples come from: text, conversations, generated tasks, and their mixture.

Every source is an endless deterministic sequence of samples, addressed by number, so that a
position is one integer and resuming is exact. Text documents longer than `max_length` are cut
into consecutive samples, each token predicted once. In conversations the last turn, which is
the assistant's, is weighted. The mixture takes from the source furthest behind its share of tokens.
Task families are handed in, because this package does not know where tasks are made.
"""

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from aprium.base.errors import DataError
from aprium.base.records import Message, Sample
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer

# Some families ask about several different words at once.
_MIN_WORDS = 10


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source.

    kind "text": JSONL with `text`; "chat": JSONL with `messages` and optionally `tools`;
    "tasks": families of generated tasks (all when `families` is empty), words from the file
    `words`, one a line. `weight` is the share of tokens. `heldout` is the JSONL to evaluate on;
    tasks hold items out by themselves. `thinking` is the share of task conversations that show
    the worked solution.
    """

    kind: Literal["text", "chat", "tasks"]
    name: str
    weight: float = 1.0
    path: Path | None = None
    heldout: Path | None = None
    words: Path | None = None
    families: tuple[str, ...] = ()
    thinking: float = 0.7

    def __post_init__(self) -> None:
        """Check that the source has what its kind needs."""
        needed = "words" if self.kind == "tasks" else "path"
        if getattr(self, needed) is None:
            raise DataError(f"source {self.name!r} of kind {self.kind!r} needs {needed}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture. `heldout_samples` are taken from each source for evaluation."""

    sources: tuple[SourceConfig, ...]
    max_length: int = 512
    heldout_samples: int = 200
    seed: int = 0


class Drawn(Protocol):
    """A task that was drawn: tools it offers, and itself as a conversation."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON-schema descriptions of the tools."""
        ...

    def messages(self, *, thinking: bool) -> Sequence[Message]:
        """Return question and solution."""
        ...


class Families(Protocol):
    """Where tasks are made; the module `envs.families` is one."""

    @property
    def FAMILIES(self) -> Mapping[str, Any]:  # noqa: N802
        """The families by name."""
        ...

    def draw(
        self, family: str, rng: random.Random, words: Sequence[str], *, held_out: bool
    ) -> Drawn:
        """Draw a task of a family on one side of the split."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """What sources make samples with: tokenizer, chat template, and task families if any."""

    tokenizer: Tokenizer
    template: ChatTemplate
    families: Families | None = None


class Source(Protocol):
    """An endless sequence of samples by number."""

    def sample(self, number: int) -> Sample:
        """Return sample `number`, always the same one."""
        ...


class TextSource:
    """Documents of a JSONL file, shuffled anew each time through."""

    def __init__(self, name: str, path: Path, text: Text, max_length: int, seed: int) -> None:
        self._name, self._seed = name, seed
        end = text.tokenizer.id_of("</s>")
        self._pieces: list[array[int]] = []
        for row in read_jsonl(path):
            tokens = text.tokenizer.encode(_field(row, "text", path))
            tokens = [*tokens, end] if end is not None else tokens
            # Consecutive pieces share one token: it ends the first and only conditions the next.
            for begin in range(0, max(1, len(tokens) - 1), max_length - 1):
                self._pieces.append(array("I", tokens[begin : begin + max_length]))
        if not self._pieces:
            raise DataError(f"{path} has no documents")
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Samples in one time through."""
        return len(self._pieces)

    def sample(self, number: int) -> Sample:
        """Return sample `number`."""
        epoch, place = divmod(number, len(self._pieces))
        if self._order[0] != epoch:
            order = list(range(len(self._pieces)))
            random.Random(f"{self._seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        tokens = tuple(self._pieces[self._order[1][place]])
        weights = (0.0,) + (1.0,) * (len(tokens) - 1)
        return Sample(tokens=tokens, ce_weight=weights, domain=self._name)


class ChatSource:
    """Conversations of a JSONL file in order, again and again, thinking on and off in turn."""

    def __init__(self, name: str, path: Path, text: Text, max_length: int) -> None:
        self._samples = []
        for row in read_jsonl(path):
            messages = [read_message(m) for m in _field(row, "messages", path)]
            thinking = bool(messages[-1].reasoning) or len(self._samples) % 2 == 0
            sample = conversation(
                messages, text, name, tools=row.get("tools", ()), thinking=thinking
            )
            if len(sample.tokens) > max_length:
                raise DataError(
                    f"{path}: a conversation of {len(sample.tokens)} tokens is over max_length "
                    f"{max_length}"
                )
            self._samples.append(sample)
        if not self._samples:
            raise DataError(f"{path} has no conversations")

    def __len__(self) -> int:
        """Samples in one time through."""
        return len(self._samples)

    def sample(self, number: int) -> Sample:
        """Return sample `number`."""
        return self._samples[number % len(self._samples)]


class TaskSource:
    """Conversations made from generated tasks: a question, now and then after another one."""

    def __init__(self, config: SourceConfig, text: Text, seed: int, *, held_out: bool) -> None:
        assert config.words is not None
        if text.families is None:
            raise DataError(f"source {config.name!r} asks for tasks, and no families are at hand")
        self._config, self._text, self._seed = config, text, seed
        self._held_out = held_out
        self._draw = text.families.draw
        self._families = config.families or tuple(text.families.FAMILIES)
        for family in self._families:
            if family not in text.families.FAMILIES:
                known = ", ".join(text.families.FAMILIES)
                raise DataError(f"source {config.name!r}: no task family {family!r} in {known}")
        self._words = config.words.read_text(encoding="utf-8").split()
        if len(self._words) < _MIN_WORDS:
            raise DataError(f"{config.words} has fewer than {_MIN_WORDS} words")

    def sample(self, number: int) -> Sample:
        """Return sample `number`."""
        rng = random.Random(f"{self._seed} {number}")
        thinking = rng.random() < self._config.thinking
        family = rng.choice(self._families)
        task = self._draw(family, rng, self._words, held_out=self._held_out)
        messages = list(task.messages(thinking=thinking))
        if not self._held_out and not task.tools and rng.random() < 0.25:
            earlier = self._draw(rng.choice(self._families), rng, self._words, held_out=False)
            if not earlier.tools:
                messages = [*earlier.messages(thinking=thinking), *messages]
        domain = f"{self._config.name}/{family}"
        return conversation(messages, self._text, domain, tools=task.tools, thinking=thinking)


def conversation(
    messages: Sequence[Message],
    text: Text,
    domain: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = True,
) -> Sample:
    """Render and tokenise a conversation; weight its last turn, which must be the assistant's.

    The turns before it are context, in the form in which serving shows them (reasoning of answered
    turns left out). The prompt is what serving writes for the same switch, so a reply without
    reasoning closes an open thinking tag at once. Raises DataError when the last turn is not the
    assistant's or the template writes something else than prompt and reply.
    """
    if not messages or messages[-1].role != "assistant":
        raise DataError("a conversation must end with an assistant turn: there is nothing to learn")
    open_think = text.template.render(messages[:-1], tools, enable_thinking=thinking)
    closed = text.template.render(messages[:-1], tools, enable_thinking=False)
    whole = text.template.render(messages, tools, add_generation_prompt=False)
    if whole.startswith(open_think):
        prompt, reply = open_think, whole[len(open_think) :]
    elif whole.startswith(closed) and thinking:
        prompt, reply = open_think, "</think>" + whole[len(closed) :]
    else:
        raise DataError("the chat template writes a reply that does not continue its own prompt")
    before, after = text.tokenizer.encode(prompt), text.tokenizer.encode(reply)
    weights = (0.0,) * len(before) + (1.0,) * len(after)
    return Sample(tokens=(*before, *after), ce_weight=weights, domain=domain)


class Mixture:
    """All sources of a configuration as one resumable stream."""

    def __init__(self, config: DataConfig, text: Text) -> None:
        self._weights = [source.weight for source in config.sources]
        self._sources = [_open(source, config, text) for source in config.sources]
        self._taken = [0] * len(self._sources)
        self._tokens = [0] * len(self._sources)

    def next_sample(self) -> Sample:
        """Return the next sample, from the source furthest behind its share."""
        behind = [
            tokens / weight if weight > 0 else float("inf")
            for tokens, weight in zip(self._tokens, self._weights, strict=True)
        ]
        which = behind.index(min(behind))
        sample = self._sources[which].sample(self._taken[which])
        self._taken[which] += 1
        self._tokens[which] += len(sample.tokens)
        return sample

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return {"taken": list(self._taken), "tokens": list(self._tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        if len(state["taken"]) != len(self._sources):
            raise DataError("the run was started with another number of sources")
        self._taken, self._tokens = list(state["taken"]), list(state["tokens"])


def heldout_samples(config: DataConfig, text: Text) -> list[Sample]:
    """Return the samples to evaluate on: the same number from each source that holds some out."""
    found: list[Sample] = []
    for source in config.sources:
        if source.kind == "tasks":
            tasks = TaskSource(source, text, config.seed, held_out=True)
            found += [tasks.sample(i) for i in range(config.heldout_samples)]
        elif source.heldout is not None:
            opened = _open(source, config, text, source.heldout)
            assert isinstance(opened, TextSource | ChatSource)
            count = min(config.heldout_samples, len(opened))
            found += [opened.sample(i) for i in range(count)]
    return found


def _open(source: SourceConfig, config: DataConfig, text: Text, path: Path | None = None) -> Source:
    if source.kind == "tasks":
        return TaskSource(source, text, config.seed, held_out=False)
    path = path or source.path
    assert path is not None
    if source.kind == "text":
        return TextSource(source.name, path, text, config.max_length, config.seed)
    return ChatSource(source.name, path, text, config.max_length)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; raise DataError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def _field(row: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in row:
        raise DataError(f"{path}: a line has no {name!r}")
    return row[name]
