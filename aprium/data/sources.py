"""Where samples come from: text, conversations, generated tasks, and their mixture.

Every source is an endless deterministic sequence of rows, addressed by number, each of which gives
one or more samples; so a position is a few integers, resuming is exact, and no more is in memory
than what is being read. Text documents longer than `max_length` are cut into consecutive samples,
each token predicted once, and a few of them are read side by side, so that a step is not all of one
document. The mixture takes from the source furthest behind its share of tokens. Task families are
handed in, because this package does not know where tasks are made.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from aprium.base.errors import ApriumError, DataError
from aprium.base.log import get_logger
from aprium.base.records import Message, Sample
from aprium.data.conversation import Learn, Style, conversation
from aprium.data.pack import NUM_OPEN
from aprium.data.rows import Order, Row, Rows
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer

log = get_logger("data")
# Some families ask about several different words at once.
_MIN_WORDS = 10
_SIDE_BY_SIDE = 8  # documents of several samples that are read in turns
_TASK_THINKING = 0.7
# How often a task comes after others: rarely where their answers, the reasoning left out as the
# template does, are only shown; and after how many.
_EARLIER_SHARE = {True: 0.1, False: 0.5}
_EARLIER_COUNTS = (1, 1, 1, 2, 3, 8)
_FIELDS = {"text": "text", "chat": "messages", "samples": "tokens"}
_COLUMNS = {"text": (), "chat": ("tools",), "samples": ("weights",)}  # beside the field
_STYLE = ("learn", "thinking", "cut")  # what samples are made of a row
_LARGEST = 3.4028235e38  # of float32


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source.

    kind "text": JSONL or Parquet with `text`; "chat": with `messages` in the OpenAI form and
    optionally `tools`; "samples": with `tokens` and their `weights` in the loss, as a model wrote
    them; "tasks": families of generated tasks (all when `families` is empty), words
    from the file `words`, one a line. `path` is a file, a glob pattern or a list of them, `field`
    another name of the column. `weight` is the share of tokens. `heldout` is what to evaluate on,
    files as `path`; tasks hold items out by themselves. Of conversations `learn` weighs the
    assistant's turns, "all" or the "last"; `thinking` is the share with the thinking switch on
    (None: where there is reasoning; tasks 0.7), and `cut` the share whose last reasoning is ended
    early, at a random place, as a budget does. A conversation or sample longer than `max_length` is
    an "error", or "skip" leaves it out.
    """

    kind: Literal["text", "chat", "samples", "tasks"]
    name: str
    weight: float = 1.0
    path: Path | tuple[Path, ...] | None = None
    heldout: Path | tuple[Path, ...] | None = None
    field: str | None = None
    words: Path | None = None
    families: tuple[str, ...] = ()
    learn: Learn = "all"
    thinking: float | None = None
    cut: float = 0.0
    too_long: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        """Check that the source has what its kind needs, and nothing it would not use."""
        needed = "words" if self.kind == "tasks" else "path"
        if not getattr(self, needed):
            raise DataError(f"source {self.name!r} of kind {self.kind!r} needs {needed}")
        for name in _UNUSED[self.kind]:
            if getattr(self, name) != getattr(type(self), name):
                raise DataError(
                    f"source {self.name!r}: {name} means nothing for kind {self.kind!r}: leave it "
                    "out"
                )
        for name in ("thinking", "cut"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise DataError(f"source {self.name!r}: {name} is {value}: it must be in 0..1")
        if self.weight < 0:
            raise DataError(f"source {self.name!r}: weight is {self.weight}: it is a share")


_UNUSED = {
    "text": ("words", "families", "learn", "thinking", "cut", "too_long"),
    "chat": ("words", "families"),
    "samples": ("field", "words", "families", "learn", "thinking", "cut"),
    "tasks": ("path", "heldout", "field", "learn", "cut", "too_long"),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture. `heldout_samples` are taken from each source for evaluation.

    `open_packs` are filled at a time, and `shuffled_packs` wait to be given out in random order.
    """

    sources: tuple[SourceConfig, ...]
    max_length: int = 512
    heldout_samples: int = 200
    seed: int = 0
    open_packs: int = NUM_OPEN
    shuffled_packs: int = 4

    def __post_init__(self) -> None:
        """Check names, shares and ranges."""
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise DataError(f"sources are named {', '.join(names)}: give each a name of its own")
        if not any(source.weight for source in self.sources):
            raise DataError("no source has a weight: give at least one a share of tokens")
        least_of = {"max_length": 2, "heldout_samples": 0, "open_packs": 1, "shuffled_packs": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise DataError(f"data.{name} is {value}: it must be at least {least}")


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
    """An endless sequence of rows by number; `size` rows are one time through, None without end.

    `digest` tells one with other contents apart.
    """

    size: int | None
    digest: str

    def read(self, number: int) -> Sequence[Sample]:
        """Return the samples of row `number`, always the same; none for a row left out."""
        ...


class TextSource:
    """Documents of files, shuffled anew each time through, cut where they are too long."""

    def __init__(self, config: SourceConfig, rows: Rows, text: Text, data: DataConfig) -> None:
        self._config, self._rows, self._text = config, rows, text
        self._max_length = data.max_length
        self._order = Order(rows.blocks, f"{data.seed} {config.name}")
        self._end = text.tokenizer.id_of("</s>")
        self.size: int | None = len(rows)
        self.digest = rows.digest
        self._warned = False

    def read(self, number: int) -> Sequence[Sample]:
        """Return the pieces of document `number`."""
        row = self._rows[self._order.row(number)]
        text = _field(row, self._config)
        if not isinstance(text, str):
            raise DataError(f"{row.where}: the text is {str(text)[:80]!r}, not a string")
        tokens = self._text.tokenizer.encode(text)
        tokens = [*tokens, self._end] if self._end is not None else tokens
        samples = []
        # Consecutive pieces share one token: it ends the first and only conditions the next.
        for begin in range(0, max(1, len(tokens) - 1), self._max_length - 1):
            piece = tuple(tokens[begin : begin + self._max_length])
            if len(piece) > 1:  # a single token predicts nothing
                weights = (0.0,) + (1.0,) * (len(piece) - 1)
                samples.append(Sample(tokens=piece, ce_weight=weights, domain=self._config.name))
        if len(samples) > 1 and not self._warned:
            self._warned = True
            log.warning(
                "%s: a document of %d tokens is over max_length %d: it is cut into %d samples, and "
                "so are others of source %r",
                row.where,
                len(tokens),
                self._max_length,
                len(samples),
                self._config.name,
            )
        return samples


class ChatSource:
    """Conversations of files, shuffled anew each time through."""

    def __init__(self, config: SourceConfig, rows: Rows, text: Text, data: DataConfig) -> None:
        self._config, self._rows, self._text, self._data = config, rows, text, data
        self._order = Order(rows.blocks, f"{data.seed} {config.name}")
        self.size: int | None = len(rows)
        self.digest = rows.digest
        self._warned = False

    def read(self, number: int) -> Sequence[Sample]:
        """Return the samples of conversation `number`, none if it is too long and skipped."""
        row, config = self._rows[self._order.row(number)], self._config
        rng = random.Random(f"{self._data.seed} {config.name} style {number}")
        thinking = None if config.thinking is None else rng.random() < config.thinking
        cut = rng.random() if rng.random() < config.cut else None
        style = Style(learn=config.learn, thinking=thinking, cut=cut)
        text = self._text
        try:
            messages, tools, skip = read_conversation(_field(row, config), row.data.get("tools"))
            samples = conversation(
                messages,
                text.tokenizer,
                text.template,
                config.name,
                tools=tools,
                style=style,
                skip=skip,
            )
        except ApriumError as error:
            raise DataError(f"{row.where}: {error}") from error
        longest = max((len(sample.tokens) for sample in samples), default=0)
        if longest <= self._data.max_length:
            return samples
        message = f"a conversation of {longest} tokens is over max_length {self._data.max_length}"
        if config.too_long == "error":
            raise DataError(f"{row.where}: {message}: raise it, or set too_long = 'skip'")
        if not self._warned:
            self._warned = True
            log.warning("%s: %s: it is left out, as are others", row.where, message)
        return ()


class SampleSource:
    """Token ids with their weights, of files, shuffled anew each time through."""

    def __init__(self, config: SourceConfig, rows: Rows, text: Text, data: DataConfig) -> None:
        self._config, self._rows, self._data = config, rows, data
        self._vocab_size = text.tokenizer.vocab_size
        self._order = Order(rows.blocks, f"{data.seed} {config.name}")
        self.size: int | None = len(rows)
        self.digest = rows.digest

    def read(self, number: int) -> Sequence[Sample]:
        """Return sample `number`, none if it is too long and skipped, or nothing of it is learnt.

        Raises DataError for what is no sample of this vocabulary.
        """
        row = self._rows[self._order.row(number)]
        tokens, weights = row.data.get("tokens"), row.data.get("weights")
        if not (isinstance(tokens, list) and isinstance(weights, list)) or len(tokens) != len(
            weights
        ):
            raise DataError(f"{row.where}: tokens and weights must be two lists of one length")
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise DataError(
                    f"{row.where}: token {token!r} is none of the {self._vocab_size} of the "
                    "tokenizer: were the samples written with another?"
                )
        for weight in weights:
            # Losses are means: negative weights would turn the sign of all, or divide by none.
            if type(weight) not in (int, float) or not 0 <= weight <= _LARGEST:
                raise DataError(
                    f"{row.where}: weight {repr(weight)[:80]} is not a number in 0..{_LARGEST:g}: "
                    "give 0 to what is not to be learnt"
                )
        if len(tokens) > self._data.max_length:
            if self._config.too_long == "skip":
                return ()
            raise DataError(
                f"{row.where}: a sample of {len(tokens)} tokens is over max_length "
                f"{self._data.max_length}: raise it, or set too_long = 'skip'"
            )
        if not any(weights[1:]):
            return ()
        kept = (0.0, *map(float, weights[1:]))  # nothing predicts the first token
        return [Sample(tokens=tuple(tokens), ce_weight=kept, domain=self._config.name)]


class TaskSource:
    """Conversations made from generated tasks: a question, now and then after other ones."""

    def __init__(
        self, config: SourceConfig, text: Text, data: DataConfig, *, held_out: bool
    ) -> None:
        assert config.words is not None
        if text.families is None:
            raise DataError(f"source {config.name!r} asks for tasks, and no families are at hand")
        self._config, self._text, self._seed = config, text, data.seed
        self._max_length, self._held_out = data.max_length, held_out
        self._draw = text.families.draw
        self._families = config.families or tuple(text.families.FAMILIES)
        for family in self._families:
            if family not in text.families.FAMILIES:
                known = ", ".join(text.families.FAMILIES)
                raise DataError(f"source {config.name!r}: no task family {family!r} in {known}")
        try:
            self._words = config.words.read_text(encoding="utf-8").split()
        except OSError as error:
            raise DataError(f"cannot read {config.words}: {error.strerror}") from error
        if len(self._words) < _MIN_WORDS:
            raise DataError(f"{config.words} has fewer than {_MIN_WORDS} words")
        self.size: int | None = None
        drawn_from = " ".join((*self._families, "of", *self._words))
        self.digest = hashlib.blake2b(drawn_from.encode()).hexdigest()[:16]

    def read(self, number: int) -> Sequence[Sample]:
        """Return the sample of task `number`, of which only the answers are learnt.

        With thinking it is the last answer alone: the template shows earlier ones without their
        reasoning, which is not how they are to be given.
        """
        rng = random.Random(f"{self._seed} {number}")
        share = self._config.thinking
        thinking = rng.random() < (_TASK_THINKING if share is None else share)
        family = rng.choice(self._families)
        task = self._draw(family, rng, self._words, held_out=self._held_out)
        messages = list(task.messages(thinking=thinking))
        if not self._held_out and not task.tools and rng.random() < _EARLIER_SHARE[thinking]:
            for _ in range(rng.choice(_EARLIER_COUNTS)):
                earlier = self._draw(rng.choice(self._families), rng, self._words, held_out=False)
                if not earlier.tools:
                    messages = [*earlier.messages(thinking=thinking), *messages]
        while True:
            samples = conversation(
                messages,
                self._text.tokenizer,
                self._text.template,
                f"{self._config.name}/{family}",
                tools=task.tools,
                style=Style(learn="last" if thinking else "all", thinking=thinking),
            )
            if len(messages) == 2 or len(samples[0].tokens) <= self._max_length:
                return samples
            messages = messages[2:]


def read_conversation(
    messages: Any, tools: Any = None
) -> tuple[list[Message], list[Mapping[str, Any]], set[int]]:
    """Read a conversation and its tools in the OpenAI form, tools also as JSON text.

    Returns also the assistant's turns that have `weight` 0, which are shown and not learnt. Raises
    DataError or RequestError for what is none.
    """
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError("messages must be a list of objects with role and content")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise DataError(f"tools are not JSON: {error}") from error
    if tools and (not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools)):
        raise DataError("tools must be a list of objects")
    skip = {i for i, message in enumerate(messages) if message.get("weight") == 0}
    return [read_message(message) for message in messages], list(tools or ()), skip


class Mixture:
    """All sources of a configuration as one resumable stream of samples with addresses.

    An address is (source, row, sample of the row).
    """

    def __init__(self, config: DataConfig, text: Text) -> None:
        self._weights = [source.weight for source in config.sources]
        self._fixed = {"seed": config.seed, "max_length": config.max_length}
        self._sources = [_open(source, config, text) for source in config.sources]
        self._names = [source.name for source in config.sources]
        self._styles = [{name: getattr(s, name) for name in _STYLE} for s in config.sources]
        self._next = [0] * len(self._sources)
        self._tokens = [0] * len(self._sources)
        self._since = [0] * len(self._sources)  # tokens drawn before the weights last changed
        # Of each source the rows of several samples that are begun: row, next sample.
        self._begun: list[list[tuple[int, int]]] = [[] for _ in self._sources]
        self._read = lru_cache(maxsize=_SIDE_BY_SIDE * (len(self._sources) + 1))(self._read_row)

    def _read_row(self, which: int, row: int) -> Sequence[Sample]:
        return self._sources[which].read(row)

    def draw(self) -> tuple[tuple[int, int, int], Sample]:
        """Return the next sample and its address, from the source furthest behind its share."""
        behind = [
            (tokens - since) / weight if weight > 0 else float("inf")
            for tokens, since, weight in zip(self._tokens, self._since, self._weights, strict=True)
        ]
        which = behind.index(min(behind))
        row, part = self._next_place(which)
        sample = self._read(which, row)[part]
        self._tokens[which] += len(sample.tokens)
        return (which, row, part), sample

    def _next_place(self, which: int) -> tuple[int, int]:
        """Return row and part of a source's next sample: of a new row while few are begun."""
        begun = self._begun[which]
        if len(begun) >= _SIDE_BY_SIDE:
            row, part = begun.pop(0)
        else:
            row, part, first = self._next[which], 0, self._next[which]
            while not self._read(which, row):
                row += 1
                if row - first == self._sources[which].size:
                    raise DataError(f"source {self._names[which]!r} has nothing to learn")
            self._next[which] = row + 1
        if part + 1 < len(self._read(which, row)):
            begun.append((row, part + 1))
        return row, part

    def fetch(self, address: Sequence[int]) -> Sample:
        """Return the sample that `draw` gave with `address`."""
        which, row, part = address
        return self._read(which, row)[part]

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return {
            **self._fixed,
            "sources": [
                [name, source.size, source.digest]
                for name, source in zip(self._names, self._sources, strict=True)
            ],
            "next": list(self._next),
            "styles": [dict(style) for style in self._styles],
            "weights": list(self._weights),
            "tokens": list(self._tokens),
            "since": list(self._since),
            "begun": [[list(place) for place in begun] for begun in self._begun],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned; raises DataError for other data.

        With other weights than the run had, shares are counted from here on.
        """
        for name, value in self._fixed.items():
            if state.get(name) != value:
                raise DataError(
                    f"the run was started with data.{name} {state.get(name)} and this is {value}: "
                    "its place in the data means another; set it back, or begin in another output"
                )
        mine = self.state_dict()["sources"]
        if state.get("sources") != mine:
            raise DataError(
                f"the run was started with the sources {state.get('sources')} (name, rows, "
                f"digest) and these are {mine}: restore its data, or begin anew in another output"
            )
        # States of before styles, weights and `since` were kept have none of them.
        styles = state.get("styles", self._styles)
        for source, began, mine in zip(self._names, styles, self._styles, strict=True):
            for name, value in mine.items():
                if began[name] != value:
                    raise DataError(
                        f"the run was started with {name} {began[name]!r} of source {source!r} and "
                        f"this is {value!r}: its samples would be others; set it back, or begin in "
                        "another output"
                    )
        self._next, self._tokens = list(state["next"]), list(state["tokens"])
        self._begun = [[(row, part) for row, part in begun] for begun in state["begun"]]
        since = state.get("since", [0] * len(self._sources))
        same = state.get("weights", self._weights) == self._weights
        self._since = list(since if same else self._tokens)


def heldout_samples(config: DataConfig, text: Text) -> list[Sample]:
    """Return the samples to evaluate on: the same number from each source that holds some out.

    Reasoning is not cut there.
    """
    found: list[Sample] = []
    for source in config.sources:
        opened: Source
        if source.kind == "tasks":
            opened = TaskSource(source, text, config, held_out=True)
        elif source.heldout:
            opened = _open(source, config, text, source.heldout)
        else:
            continue
        mine: list[Sample] = []
        row = 0
        while len(mine) < config.heldout_samples and row != opened.size:
            mine += opened.read(row)
            row += 1
        found += mine[: config.heldout_samples]
    return found


def _open(
    source: SourceConfig,
    config: DataConfig,
    text: Text,
    heldout: Path | tuple[Path, ...] | None = None,
) -> Source:
    if source.kind == "tasks":
        return TaskSource(source, text, config, held_out=False)
    paths = heldout or source.path
    assert paths
    columns = (source.field or _FIELDS[source.kind], *_COLUMNS[source.kind])
    rows = Rows(paths if isinstance(paths, tuple) else (paths,), columns)
    if source.kind == "text":
        return TextSource(source, rows, text, config)
    if source.kind == "samples":
        return SampleSource(source, rows, text, config)
    if heldout:
        source = SourceConfig(**{**vars(source), "cut": 0.0})
    return ChatSource(source, rows, text, config)


def _field(row: Row, config: SourceConfig) -> Any:
    name = config.field or _FIELDS[config.kind]
    if name not in row.data:
        others = ", ".join(map(repr, (*row.data, *row.unread)))
        raise DataError(f"{row.where}: it has no {name!r}, but {others}")
    return row.data[name]
