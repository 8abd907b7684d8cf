"""Environments by name: each a family of tasks with parameters that set its difficulty."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aprium.base.config import from_dict
from aprium.base.errors import TaskError
from aprium.envs.abstention import Abstention
from aprium.envs.choice import MultipleChoice
from aprium.envs.coding import Coding
from aprium.envs.drills import Drills
from aprium.envs.exercises import Exercises
from aprium.envs.family import Family
from aprium.envs.gym_client import GymRows
from aprium.envs.instructions import InstructionFollowing
from aprium.envs.judge import Judging
from aprium.envs.mathematics import Mathematics
from aprium.envs.reasoning import ReasoningGym
from aprium.envs.retrieval import Retrieval
from aprium.envs.structured import StructuredOutput
from aprium.envs.tool_use import ToolUse
from aprium.envs.verifiers import Verifiers


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A family, the parameters that this name gives it, and what it is for."""

    family: type[Any]
    words: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """The parameters that it does not go without."""
        fields = dataclasses.fields(self.family)
        return tuple(f.name for f in fields if f.default is dataclasses.MISSING)


ENVIRONMENTS: dict[str, Entry] = {
    "exercises": Entry(family=Exercises, words="what pico learns: letters, digits, a tool"),
    "drills": Entry(
        family=Drills, words="one small skill with digits or letters, answered in a few tokens"
    ),
    "spell-backward": Entry(
        family=ReasoningGym,
        parameters={"datasets": ["spell_backward"], "compact": True},
        words="words backwards, in short prompts; a small model learns it in minutes",
    ),
    "number-sorting": Entry(
        family=ReasoningGym,
        parameters={
            "datasets": ["number_sorting"],
            "compact": True,
            "options": [["max_numbers", 4], ["max_decimals", 0]],
        },
        words="three or four numbers in order, in short prompts",
    ),
    "chain-sum": Entry(
        family=ReasoningGym,
        parameters={
            "datasets": ["chain_sum"],
            "compact": True,
            "options": [["max_terms", 2], ["max_digits", 2]],
        },
        words="sums of two numbers of up to two digits, in short prompts",
    ),
    "reasoning-gym": Entry(family=ReasoningGym, words="all generators that are quick and sound"),
    "reasoning-gym-hard": Entry(
        family=ReasoningGym,
        parameters={
            "datasets": [
                *("basic_arithmetic", "chain_sum", "count_primes", "letter_counting", "maze"),
                *("mini_sudoku", "polynomial_equations", "shortest_path", "word_sorting"),
            ],
            "level": 2,
        },
        words="nine generators, two steps up their curricula",
    ),
    "math": Entry(family=Mathematics, words="nine kinds of problems, compared by meaning"),
    "math-hard": Entry(
        family=Mathematics, parameters={"size": 99}, words="the same with numbers up to 99"
    ),
    "instructions": Entry(
        family=InstructionFollowing, words="up to three checkable constraints on a text"
    ),
    "instructions-hard": Entry(
        family=InstructionFollowing, parameters={"most": 6}, words="up to six of them"
    ),
    "code": Entry(family=Coding, words="a Python function of two to four steps, hidden tests"),
    "code-hard": Entry(
        family=Coding, parameters={"least": 5, "most": 8}, words="five to eight steps"
    ),
    "tool-use": Entry(
        family=ToolUse, words="errands at a bank, a calendar and a file store that fail at times"
    ),
    "structured": Entry(family=StructuredOutput, words="facts as JSON, YAML, TOML or CSV"),
    "choice": Entry(family=MultipleChoice, words="one of four options under letters"),
    "long-context": Entry(
        family=Retrieval, words="needles, tracing and counting in a thousand words"
    ),
    "long-context-16k": Entry(
        family=Retrieval, parameters={"words": 16_000}, words="the same in 16 thousand words"
    ),
    "abstention": Entry(family=Abstention, words="half the questions have no answer: say so"),
    "judging": Entry(family=Judging, words="which of two answers is right, as a reward model says"),
    "nemo-gym": Entry(family=GymRows, words="rows of a file, graded by a NeMo-Gym server"),
    "verifiers": Entry(
        family=Verifiers, words="single-turn tasks of an installed verifiers taskset"
    ),
}


def make(name: str, parameters: Mapping[str, Any] | None = None) -> Family:
    """Return environment `name`, with `parameters` in place of its own.

    Raises TaskError for a name that is not there or a value that cannot be, ConfigError for
    parameters that the family does not have.
    """
    if name not in ENVIRONMENTS:
        raise TaskError(f"no environment {name!r}: choose of {', '.join(ENVIRONMENTS)}")
    entry = ENVIRONMENTS[name]
    values = {"domain": name, **entry.parameters, **(parameters or {})}
    return from_dict(entry.family, values, where=name)
