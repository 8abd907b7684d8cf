"""Following instructions: constraints on the form of an answer that a program can check.

Each constraint is a checker with a way to phrase it and to draw its parameters. A task joins a few
that go together; all must hold, and one text that keeps to them is known.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

_TOPICS = (
    "a rainy day in the mountains", "how bread is baked", "the life of a lighthouse keeper",
    "why the sea is salty", "a train that never stops", "planting an orchard", "learning chess",
    "the first telephone", "a market at dawn", "bees and flowers", "repairing an old clock",
    "a letter to a neighbour", "the history of glass", "walking through an empty museum",
    "a recipe for vegetable soup", "how bridges carry weight", "an owl in the city",
)  # fmt: skip
_WORDS = (
    "river", "lantern", "copper", "window", "harbour", "thunder", "velvet", "compass", "orchard",
    "whisper", "granite", "meadow", "anchor", "candle", "feather", "marble",
)  # fmt: skip
_ENDINGS = ("That is all.", "The end.", "Thank you for reading.", "So it goes.")
_ALL_AT_ONCE = " Zq, xjk thE AND is of it very river [a] *b*\n\n- q"
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One checkable demand on a text.

    `draw` makes its parameters, `phrase` writes it, `holds` checks a text. `group` names what it
    is about: a task has one of a group.
    """

    group: str
    draw: Callable[[random.Random], Values]
    phrase: Callable[[Values], str]
    holds: Callable[[str, Values], bool]


def words_of(text: str) -> list[str]:
    """Return the words of a text: letters and digits, with apostrophes and hyphens inside."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text: what ends in a full stop, question or exclamation mark."""
    return [part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if words_of(part)]


def paragraphs_of(text: str) -> list[str]:
    """Return what blank lines separate."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _count(text: str, word: str) -> int:
    return sum(found.casefold() == word.casefold() for found in words_of(text))


def _is_json(text: str, keys: Sequence[str]) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and list(value) == list(keys)


def _bullets(text: str) -> int:
    return sum(bool(re.match(r"\s*[-*] \S", line)) for line in text.splitlines())


def _highlighted(text: str) -> int:
    return len(re.findall(r"(?<!\*)\*[^\s*][^*\n]*\*(?!\*)", text))


CONSTRAINTS: dict[str, Constraint] = {
    "words_at_least": Constraint(
        group="length",
        draw=lambda r: {"n": r.randrange(20, 121, 10)},
        phrase=lambda v: f"Use at least {v['n']} words.",
        holds=lambda t, v: len(words_of(t)) >= v["n"],
    ),
    "words_at_most": Constraint(
        group="length",
        draw=lambda r: {"n": r.randrange(15, 101, 5)},
        phrase=lambda v: f"Use at most {v['n']} words.",
        holds=lambda t, v: 5 <= len(words_of(t)) <= v["n"],
    ),
    "sentences": Constraint(
        group="length",
        draw=lambda r: {"n": r.randint(2, 8)},
        phrase=lambda v: f"Write exactly {v['n']} sentences.",
        holds=lambda t, v: len(sentences_of(t)) == v["n"],
    ),
    "paragraphs": Constraint(
        group="shape",
        draw=lambda r: {"n": r.randint(2, 5)},
        phrase=lambda v: f"Write exactly {v['n']} paragraphs, separated by blank lines.",
        holds=lambda t, v: len(paragraphs_of(t)) == v["n"],
    ),
    "bullets": Constraint(
        group="shape",
        draw=lambda r: {"n": r.randint(2, 7)},
        phrase=lambda v: f"Answer with exactly {v['n']} bullet points, each begun with '- '.",
        holds=lambda t, v: _bullets(t) == v["n"] == len(_lines(t)),
    ),
    "numbered": Constraint(
        group="shape",
        draw=lambda r: {"n": r.randint(2, 7)},
        phrase=lambda v: f"Answer with a list of {v['n']} lines numbered '1.', '2.' and so on.",
        holds=lambda t, v: (
            [line.split(" ")[0] for line in _lines(t)] == [f"{i + 1}." for i in range(v["n"])]
        ),
    ),
    "json": Constraint(
        group="shape",
        draw=lambda r: {"keys": r.sample(_WORDS, r.randint(2, 4))},
        phrase=lambda v: (
            "Answer with nothing but a JSON object that has exactly the keys "
            f"{', '.join(v['keys'])}, in this order."
        ),
        holds=lambda t, v: _is_json(t, v["keys"]),
    ),
    "title": Constraint(
        group="frame",
        draw=lambda r: {},
        phrase=lambda v: "Begin with a title in double angle brackets, such as <<A Title>>.",
        holds=lambda t, v: bool(re.match(r"<<[^<>\n]*\w[^<>\n]*>>", t)),
    ),
    "quoted": Constraint(
        group="frame",
        draw=lambda r: {},
        phrase=lambda v: "Put the whole answer in double quotation marks.",
        holds=lambda t, v: len(t) > 2 and t[0] == '"' and t[-1] == '"',
    ),
    "first_word": Constraint(
        group="frame",
        draw=lambda r: {"word": r.choice(_WORDS)},
        phrase=lambda v: f"The first word must be '{v['word']}'.",
        holds=lambda t, v: [w.casefold() for w in words_of(t)[:1]] == [v["word"]],
    ),
    "ending": Constraint(
        group="end",
        draw=lambda r: {"text": r.choice(_ENDINGS)},
        phrase=lambda v: f"End with the exact words '{v['text']}'",
        holds=lambda t, v: t.endswith(v["text"]),
    ),
    "postscript": Constraint(
        group="end",
        draw=lambda r: {},
        phrase=lambda v: "Add a postscript at the end, on a line of its own begun with 'P.S.'",
        holds=lambda t, v: bool(re.match(r"P\.S\. ?\S", (_lines(t) or [""])[-1])),
    ),
    "keyword": Constraint(
        group="keyword",
        draw=lambda r: {"word": r.choice(_WORDS), "n": r.randint(1, 4)},
        phrase=lambda v: (
            f"Use the word '{v['word']}' exactly {v['n']} {'time' if v['n'] == 1 else 'times'}."
        ),
        holds=lambda t, v: _count(t, v["word"]) == v["n"],
    ),
    "all_keywords": Constraint(
        group="keyword",
        draw=lambda r: {"words": r.sample(_WORDS, r.randint(2, 4))},
        phrase=lambda v: f"Use each of these words: {', '.join(v['words'])}.",
        holds=lambda t, v: all(_count(t, word) for word in v["words"]),
    ),
    "forbidden": Constraint(
        group="forbidden",
        draw=lambda r: {"words": r.sample(("the", "and", "is", "of", "it", "very"), 2)},
        phrase=lambda v: f"Do not use the words {' or '.join(v['words'])}.",
        holds=lambda t, v: not any(_count(t, word) for word in v["words"]),
    ),
    "no_commas": Constraint(
        group="punctuation",
        draw=lambda r: {},
        phrase=lambda v: "Do not use any commas.",
        holds=lambda t, v: "," not in t,
    ),
    "no_letter": Constraint(
        group="letters",
        draw=lambda r: {"letter": r.choice("zqxjk")},
        phrase=lambda v: f"Do not use the letter '{v['letter']}' anywhere.",
        holds=lambda t, v: v["letter"] not in t.casefold(),
    ),
    "lowercase": Constraint(
        group="case",
        draw=lambda r: {},
        phrase=lambda v: "Write in lower-case letters only.",
        holds=lambda t, v: t == t.lower(),
    ),
    "uppercase": Constraint(
        group="case",
        draw=lambda r: {},
        phrase=lambda v: "Write in capital letters only.",
        holds=lambda t, v: t == t.upper(),
    ),
    "highlights": Constraint(
        group="highlights",
        draw=lambda r: {"n": r.randint(1, 3)},
        phrase=lambda v: f"Highlight exactly {v['n']} passages with single asterisks, *like this*.",
        holds=lambda t, v: _highlighted(t) == v["n"],
    ),
    "placeholders": Constraint(
        group="placeholders",
        draw=lambda r: {"n": r.randint(1, 4)},
        phrase=lambda v: f"Leave exactly {v['n']} places to fill in, such as [name].",
        holds=lambda t, v: len(re.findall(r"\[[^\[\]\n]+\]", t)) == v["n"],
    ),
}
# Pairs that could not both hold, or only by a trick, whatever their parameters.
_CLASHES = (
    {"uppercase", "ending"}, {"lowercase", "ending"}, {"lowercase", "postscript"},
    {"json", "title"}, {"json", "quoted"}, {"json", "first_word"}, {"json", "ending"},
    {"json", "postscript"}, {"json", "no_commas"}, {"json", "sentences"}, {"json", "placeholders"},
    {"json", "no_letter"}, {"json", "uppercase"}, {"json", "keyword"}, {"json", "forbidden"},
    {"bullets", "title"}, {"bullets", "quoted"}, {"bullets", "first_word"},
    {"bullets", "postscript"}, {"bullets", "highlights"},
    {"numbered", "title"}, {"numbered", "quoted"}, {"numbered", "first_word"},
    {"numbered", "postscript"}, {"numbered", "sentences"}, {"bullets", "sentences"},
    {"quoted", "ending"}, {"quoted", "postscript"}, {"paragraphs", "sentences"},
    {"postscript", "paragraphs"}, {"postscript", "sentences"}, {"title", "sentences"},
    {"uppercase", "postscript"}, {"ending", "forbidden"},
    {"bullets", "ending"}, {"numbered", "ending"}, {"no_letter", "keyword"},
    {"no_letter", "all_keywords"}, {"no_letter", "first_word"}, {"first_word", "keyword"},
    {"ending", "sentences"}, {"words_at_most", "all_keywords"}, {"words_at_most", "keyword"},
    {"words_at_most", "numbered"}, {"words_at_most", "bullets"}, {"words_at_most", "paragraphs"},
    {"words_at_most", "placeholders"}, {"words_at_most", "highlights"}, {"words_at_most", "title"},
    {"words_at_most", "json"}, {"words_at_most", "postscript"}, {"words_at_most", "ending"},
    {"sentences", "keyword"}, {"sentences", "all_keywords"}, {"no_letter", "ending"},
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionFollowing:
    """Tasks of up to `most` constraints of `kinds` (empty for all), at least one."""

    kinds: tuple[str, ...] = ()
    most: int = 3
    domain: str = "instructions"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind in self.kinds:
            if kind not in CONSTRAINTS:
                raise TaskError(f"no constraint {kind!r}: choose of {', '.join(CONSTRAINTS)}")
        if self.most < 1:
            raise TaskError(f"most is {self.most}: a task has at least one constraint")

    def draw(self, rng: random.Random) -> Task:
        """Make a request with constraints that go together."""
        wanted, chosen = rng.randint(1, self.most), []
        for name in rng.sample(self.kinds or tuple(CONSTRAINTS), len(self.kinds or CONSTRAINTS)):
            groups = {CONSTRAINTS[other].group for other in chosen}
            clash = any({name, other} in _CLASHES for other in chosen)
            if len(chosen) < wanted and CONSTRAINTS[name].group not in groups and not clash:
                chosen.append(name)
        topic = rng.choice(_TOPICS)
        demands = [(name, CONSTRAINTS[name].draw(rng)) for name in chosen]
        lines = [f"Write about {topic}."]
        lines += [CONSTRAINTS[name].phrase(values) for name, values in demands]
        text = " ".join(lines)
        answer = _comply(dict(demands))
        return Task(
            domain=self.domain,
            key=text,
            messages=(say(text, role="user"),),
            data={"constraints": [[name, values] for name, values in demands]},
            solution=(say(answer),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one request."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, and for each constraint a text that breaks it."""
        gold = task.solution[0].content or ""
        texts = [""]
        for name, values in task.data["constraints"]:
            for broken in (gold + _ALL_AT_ONCE, "x", "Q.", "a"):
                if not CONSTRAINTS[name].holds(broken, values):
                    texts.append(broken)
                    break
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> Mapping[str, float]:
    text = (reply.content or "").strip()
    held = {
        name: float(bool(text) and CONSTRAINTS[name].holds(text, values))
        for name, values in task.data["constraints"]
    }
    return {"reward": float(all(held.values())), **held}


def _comply(demands: Mapping[str, Values]) -> str:
    """Return a dull text that meets all demands."""
    count = demands.get("sentences", {}).get("n", 0)
    sentences = ["A small bird sang on my roof" for _ in range(count or 3)]
    extra = list(demands.get("all_keywords", {}).get("words", ()))
    keyword = demands.get("keyword")
    extra += [keyword["word"]] * keyword["n"] if keyword else []
    extra += [f"[gap {chr(97 + i)}]" for i in range(demands.get("placeholders", {}).get("n", 0))]
    extra += ["*bright song*"] * demands.get("highlights", {}).get("n", 0)
    sentences[-1] = " ".join([sentences[-1], *extra])
    least = demands.get("words_at_least", {}).get("n", 0)
    sentences[0] += " for long" * (least // 2)
    if "words_at_most" in demands:
        sentences = ["My bird sang for us"]
    if "first_word" in demands:
        sentences[0] = f"{demands['first_word']['word'].capitalize()} {sentences[0]}"
    body = _shape(demands, sentences)
    if "title" in demands:
        body = f"<<Song>>\n{body}"
    if "quoted" in demands:
        body = f'"{body}"'
    if "ending" in demands:
        body += f" {demands['ending']['text']}"
    if "postscript" in demands:
        body += "\n\nP.S. Goodbye"
    if "lowercase" in demands:
        body = body.lower()
    return body.upper() if "uppercase" in demands else body


def _shape(demands: Mapping[str, Values], sentences: list[str]) -> str:
    """Put sentences into paragraphs, a list or an object, as demanded."""
    text = ". ".join(sentences) + "."
    if "paragraphs" in demands:
        return "\n\n".join([text, *["My bird."] * (demands["paragraphs"]["n"] - 1)])
    if "bullets" in demands:
        return "\n".join([f"- {text}", *["- My bird."] * (demands["bullets"]["n"] - 1)])
    if "numbered" in demands:
        rows = [text, *["My bird."] * (demands["numbered"]["n"] - 1)]
        return "\n".join(f"{i + 1}. {row}" for i, row in enumerate(rows))
    if "json" in demands:
        keys = demands["json"]["keys"]
        return json.dumps({key: text if key == keys[0] else "My bird" for key in keys})
    return text
