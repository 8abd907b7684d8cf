"""All of reasoning-gym as one family: its generators, graded with care, split by what is asked.

Its scorers are not used as they are. Some raise on malformed text, some pay a little for junk, and
several `eval` the answer: they run in a sandbox, code is turned away first, and only a full score
counts. Two generators are left out: the one pays for any text, the other for a constant. Item i of
seed s is item i + 1 of seed s - 1 there, so seeds split nothing; the split here is by question.
Source of the measurements: docs/environments.md.
"""

import ast
import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.answer import final_answer
from aprium.envs.env import Env, SingleTurn
from aprium.envs.family import optional
from aprium.envs.task import Task, say
from aprium.envs.worker import Worker

# Pays for any text that is not empty; pays a constant 0.975; draws from the others.
EXCLUDED = {"game_of_life_halting", "coin_flip", "composite"}
# Half a second or more an item: left out unless asked for by name.
SLOW = {
    *("knight_swap", "futoshiki", "sokoban", "zebra_puzzles", "puzzle24"),
    *("intermediate_integration", "arc_agi", "rearc"),
}
# These make all items when they are created, so they are created small.
_EAGER = {"acre", "gsm_symbolic", "list_functions", "word_ladder"}
_SIZE = 1 << 30
_FULL = 0.999
_MAX_ANSWER = 20_000
_LIMIT_S = 5.0
_MAKE_S = 60.0
# Scorers that evaluate what they are given: as Python, or as an expression of sympy's.
_LITERAL = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting"}
_EXPRESSION = {
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
    *("puzzle24", "countdown"),
}
_FUNCTIONS = set("sin cos tan sec csc cot asin acos atan sinh cosh tanh exp log ln sqrt pi".split())
_INSTRUCTION = "\nGive your final answer between <answer> and </answer>."

_worker = Worker(__name__)

# Prompts of a few characters for small models; the answer goes through the same scorer.
_COMPACT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "spell_backward": lambda m: f"B:{m['word']}=",
    "word_sequence_reversal": lambda m: f"R:{', '.join(m['words'])}=",
    "chain_sum": lambda m: f"C:{m['expression'].replace(' ', '')}=",
    "products": lambda m: f"P:{m['expression'].replace(' ', '')}=",
    "number_sorting": lambda m: f"S{m['direction'][0]}:{','.join(m['original_numbers'])}=",
    "word_sorting": lambda m: f"W{m['direction'][0]}:{','.join(m['original_words'])}=",
    "caesar_cipher": lambda m: f"K{m['rotation']}:{m['cipher_text']}=",
    "gcd": lambda m: f"G:{','.join(map(str, m['numbers']))}=",
    "base_conversion": lambda m: f"N{m['source_base']}>{m['target_base']}:{m['source_repr']}=",
    "letter_counting": lambda m: f"L{m['target_letter']}:{' '.join(m['span'])}=",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGym:
    """Items of `datasets`, drawn evenly; empty for all that are quick to make.

    `options` are of reasoning-gym's own configuration, for a single dataset; `level` raises every
    attribute of its curriculum so many times. `compact` writes the question in a few characters.
    """

    datasets: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    level: int = 0
    compact: bool = False
    domain: str = "reasoning-gym"

    def __post_init__(self) -> None:
        """Check names and what goes together."""
        known = _known()
        for name in self.datasets:
            if name in EXCLUDED:
                raise TaskError(f"{name} cannot be graded soundly: choose another dataset")
            if name not in known:
                raise TaskError(f"reasoning-gym has no dataset {name!r}: choose of {sorted(known)}")
        if self.options and len(self.datasets) != 1:
            raise TaskError(f"options {dict(self.options)} are of one dataset: name it")
        if self.level < 0:
            raise TaskError(f"level is {self.level}: it must be 0 or more")
        lacking = set(self.datasets or sorted(known - EXCLUDED)) - set(_COMPACT)
        if self.compact and lacking:
            raise TaskError(
                f"{min(lacking)} has no compact prompt: choose datasets of {sorted(_COMPACT)}"
            )

    def draw(self, rng: random.Random) -> Task:
        """Make an item of one of the datasets."""
        name = rng.choice(self.datasets or _quick())
        number = rng.randrange(_SIZE)
        seed, index = (number, 0) if name in _EAGER else (0, number)
        address = [name, seed, index, self.level, [list(pair) for pair in self.options]]
        try:
            question, compact, answer = _worker.call("make", address, limit_s=_MAKE_S, forked=False)
        except ValueError as error:
            raise TaskError(f"reasoning-gym cannot make an item of {name}: {error}") from error
        text = compact if self.compact else question + _INSTRUCTION
        solution = answer if self.compact else f"<answer>{answer}</answer>"
        return Task(
            domain=self.domain,
            key=f"{name} {question}",
            messages=(say(text, role="user"),),
            data={"address": address},
            solution=() if answer is None else (say(solution),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one question."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return no answer, junk, and code that would be evaluated."""
        texts = ("", "zzz", "<answer></answer>", "<answer>__import__('os').getpid()</answer>")
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> dict[str, float]:
    address, answer = task.data["address"], final_answer(reply)
    score = 0.0
    if answer and is_plain(address[0], answer):
        try:
            _worker.call("load", address, limit_s=_MAKE_S, forked=False)
            score = _worker.call("score", address, answer, limit_s=_LIMIT_S)
        except (ValueError, TimeoutError):  # malformed, or too much to compute
            score = 0.0
    correct = float(score >= _FULL)
    return {"reward": correct, "correct": correct, "score": score}


def is_plain(dataset: str, answer: str) -> bool:
    """Tell whether `answer` is text that its scorer may evaluate: a literal, or an expression."""
    if len(answer) > _MAX_ANSWER:
        return False
    if dataset in _LITERAL and re.search(r"[(\[{'\"]", answer):
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    if dataset in _EXPRESSION:
        names = set(re.findall(r"[^\W\d]\w*", answer))
        few = all(len(name) == 1 or name in _FUNCTIONS for name in names)
        return few and not re.search(r"['\"\[\]{}]|[^\d\s]\.|\.\s*[^\W\d]", answer)
    return True


# What follows runs in the worker alone, where the order of sets, and so every item, is the same in
# any process.


def prepare() -> None:
    """Import the package, once."""
    _known()


def load(address: Sequence[Any]) -> None:
    """Create the dataset, so that what is forked for an answer has it."""
    _dataset(*_plain(address))


def make(address: Sequence[Any]) -> tuple[str, str, str | None]:
    """Return question, compact question ("" where there is none) and answer of an item."""
    entry = _dataset(*_plain(address))[address[2]]
    shorten = _COMPACT.get(address[0], lambda metadata: "")
    answer = entry["answer"]
    compact = shorten(entry["metadata"])
    return str(entry["question"]), compact, None if answer is None else str(answer)


def score(address: Sequence[Any], answer: str) -> float:
    """Return what the dataset's own scorer gives."""
    dataset = _dataset(*_plain(address))
    return float(dataset.score_answer(answer, dataset[address[2]]))


def _plain(address: Sequence[Any]) -> tuple[str, int, int, tuple[tuple[str, Any], ...]]:
    """Return what names the dataset of an address."""
    name, seed, _, level, pairs = address
    return name, seed, level, tuple((key, _frozen(value)) for key, value in pairs)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@functools.cache
def _known() -> set[str]:
    optional("reasoning_gym")
    return set(optional("reasoning_gym.factory").DATASETS)


def _quick() -> list[str]:
    return sorted(_known() - EXCLUDED - SLOW)


@functools.lru_cache(maxsize=256)
def _dataset(name: str, seed: int, level: int, options: tuple[tuple[str, Any], ...]) -> Any:
    gym = optional("reasoning_gym")
    values = {**_at_level(name, level), **dict(options)}
    size = 1 if name in _EAGER else _SIZE
    try:
        return gym.create_dataset(name, **{**values, "size": size, "seed": seed})
    except (AssertionError, TypeError, ValueError) as error:
        raise TaskError(f"reasoning-gym's {name} does not take {values}: {error}") from error


@functools.cache
def _at_level(name: str, level: int) -> dict[str, Any]:
    """Return the dataset's own configuration after `level` steps of its curriculum."""
    if level == 0:
        return {}
    factory = optional("reasoning_gym.factory")
    if not factory.has_curriculum(name):
        raise TaskError(f"{name} has no curriculum: leave level at 0")
    curriculum = factory.create_curriculum(name)
    for attribute in curriculum.attributes:
        for _ in range(level):
            curriculum.increment_attr_level(attribute)
    made = curriculum.generate_configuration()
    left_out = {"seed", "size"}
    return {key: value for key, value in vars(made).items() if key not in left_out}
