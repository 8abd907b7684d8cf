"""Finding things in long contexts: the needle kinds of RULER, tracing, and counting words.

Source: arXiv 2404.06654. Length is asked for in words, since tokens differ by tokenizer; the
haystack is made of words that nobody wrote.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.answer import final_answer
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

_NOUNS = (
    "river", "lantern", "copper", "window", "harbour", "thunder", "velvet", "compass", "orchard",
    "granite", "meadow", "anchor", "candle", "feather", "marble", "saddle", "timber", "violet",
)  # fmt: skip
_ADJECTIVES = (
    "quiet", "amber", "narrow", "frozen", "gentle", "hollow", "ivory", "jagged", "kindly", "lonely",
    "mellow", "noble", "odd", "pale", "rapid", "sober", "tidy", "vivid",
)  # fmt: skip
_VERBS = ("follows", "passes", "carries", "hides", "mirrors", "finds", "keeps", "warms")
# Text, question and the values to give.
Item = tuple[str, str, list[str]]


def _sentence(rng: random.Random) -> str:
    a, b = rng.choice(_ADJECTIVES), rng.choice(_ADJECTIVES)
    return f"The {a} {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {b} {rng.choice(_NOUNS)}."


def _haystack(rng: random.Random, words: int, needles: Sequence[str]) -> str:
    """Return sentences of about `words` words with `needles` among them, in their order."""
    rest = max(0, words - sum(len(n.split()) for n in needles))
    sentences = [_sentence(rng) for _ in range(rest // 7)]
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    for offset, (place, needle) in enumerate(zip(places, needles, strict=True)):
        sentences.insert(place + offset, needle)
    return " ".join(sentences)


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{a}-{n}" for a in _ADJECTIVES for n in _NOUNS]
    return rng.sample(pairs, count)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _needle(key: str, value: str) -> str:
    return f"The secret number of {key} is {value}."


def _single(rng: random.Random, words: int) -> Item:
    (key,), value = _keys(rng, 1), _number(rng)
    question = f"What is the secret number of {key}?"
    return _haystack(rng, words, [_needle(key, value)]), question, [value]


def _multikey(rng: random.Random, words: int) -> Item:
    keys = _keys(rng, max(4, min(200, words // 16)))
    pairs = [(key, _number(rng)) for key in keys]
    key, value = rng.choice(pairs)
    text = _haystack(rng, words, [_needle(k, v) for k, v in pairs])
    return text, f"What is the secret number of {key}?", [value]


def _multivalue(rng: random.Random, words: int) -> Item:
    (key,), values = _keys(rng, 1), [_number(rng) for _ in range(4)]
    text = _haystack(rng, words, [_needle(key, value) for value in values])
    return text, f"What are all the secret numbers of {key}?", values


def _multiquery(rng: random.Random, words: int) -> Item:
    pairs = [(key, _number(rng)) for key in _keys(rng, 8)]
    text = _haystack(rng, words, [_needle(k, v) for k, v in pairs])
    asked = rng.sample(pairs, 4)
    names = ", ".join(key for key, _ in asked)
    return text, f"What are the secret numbers of {names}?", [value for _, value in asked]


def _tracking(rng: random.Random, words: int) -> Item:
    """Chain variables, and ask for those that have the value of the first of their chain."""
    letters = [a + b for a in "ABCDEFGHJK" for b in "LMNPQRSTUV"]
    names = rng.sample(letters, 15)
    chains = [names[0:5], names[5:10], names[10:15]]
    values = [str(n) for n in rng.sample(range(10_000, 99_999), len(chains))]
    lines: list[list[str]] = []
    for chain, value in zip(chains, values, strict=True):
        links = [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain)]
        lines.append([f"VAR {chain[0]} = {value}.", *links])
    mixed = []
    while any(lines):
        line = rng.choice([rest for rest in lines if rest])
        mixed.append(line.pop(0))
    text = _haystack(rng, words, mixed)
    return text, f"Which variables have the value {values[0]}?", chains[0]


def _common(rng: random.Random, words: int) -> Item:
    """Count words: the five that occur most often, by far."""
    pool = _keys(rng, min(250, 5 + max(20, words // 5)))
    frequent, rare = pool[:5], pool[5:]
    often = max(4, words // 12)
    bag = frequent * often + [rng.choice(rare) for _ in range(max(0, words - 5 * often))]
    most = Counter(word for word in bag if word in set(rare)).most_common(1)
    assert not most or most[0][1] < often
    rng.shuffle(bag)
    return " ".join(bag), "Which five words occur most often in the list?", frequent


KINDS: dict[str, Callable[[random.Random, int], Item]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common-words": _common,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Items of `kinds` (empty for all) over a context of about `words` words."""

    kinds: tuple[str, ...] = ()
    words: int = 1000
    domain: str = "long-context"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise TaskError(f"no kind of retrieval {kind!r}: choose of {', '.join(KINDS)}")
        if self.words < 100:
            raise TaskError(f"words is {self.words}: a context has at least 100")

    def draw(self, rng: random.Random) -> Task:
        """Make a context and a question about it."""
        kind = rng.choice(self.kinds or tuple(KINDS))
        text, question, values = KINDS[kind](rng, self.words)
        prompt = (
            f"Remember what is in this text.\n\n{text}\n\n{question} End with 'Answer: ' and the "
            "values alone, separated by commas."
        )
        return Task(
            domain=self.domain,
            key=f"{question} {' '.join(values)}",
            messages=(say(prompt, role="user"),),
            data={"values": values, "kind": kind},
            solution=(say(f"Answer: {', '.join(values)}"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one question."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, another value, one too few, one too many, and the whole context."""
        values = task.data["values"]
        texts = ["", "Answer: 1234", f"Answer: {', '.join([*values, '77'])}"]
        texts += [f"Answer: {', '.join(values[:-1])}", task.messages[0].content or ""]
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> dict[str, Any]:
    """Compare as sets; `recall` is the share that was found, RULER's own figure."""
    found = {re.sub(r"^VAR\s+", "", part.strip(" .*`")) for part in _parts(final_answer(reply))}
    values = set(task.data["values"])
    return {"reward": float(found == values), "recall": len(found & values) / len(values)}


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r",|;|\n|\band\b", text) if part.strip(" .*`")]
