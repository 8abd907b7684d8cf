"""A generative reward model: answers compared in pairs, around a circle, by any policy.

The judge reads a conversation and two answers and writes JSON with `score_1` and `score_2` (1 to 5)
and `ranking` (1: the first is much better, to 6: the second is). Of N answers each is compared with
the next, N calls in all: every answer stands once first and once second, which cancels a preference
for a place. Source: the README of NeMo Gym's genrm_compare, at revision 07d6b0d0.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aprium.base.errors import ApriumError, TaskError
from aprium.base.log import get_logger
from aprium.base.policy import Policy
from aprium.base.records import Message, SamplingParams
from aprium.envs.dialogue import ChatFormat, Dialogue
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

log = get_logger("envs")
_NEUTRAL_SCORE, _NEUTRAL_RANKING = 3.0, 3.5
_INSTRUCTION = (
    "Compare the two responses to the conversation above. Answer with a JSON object of score_1 and "
    "score_2, how good each is from 1 to 5, and ranking, from 1 (response 1 is much better) to 6 "
    "(response 2 is much better)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said of a pair: scores in 1..5, and a ranking in 1..6."""

    score_1: float
    score_2: float
    ranking: float

    def settled(self) -> tuple[float, float]:
        """Return both scores; where they are equal the ranking pulls them apart.

        By as much as it is away from its middle, to either side.
        """
        if self.score_1 != self.score_2:
            return self.score_1, self.score_2
        lead = _NEUTRAL_RANKING - self.ranking
        return self.score_1 + lead, self.score_2 - lead


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The rewards of N answers, and how many of the N verdicts could not be had."""

    rewards: tuple[float, ...]
    unread: int


def comparison_messages(
    conversation: Sequence[Message],
    response_1: str,
    response_2: str,
    *,
    principle: str | None = None,
    roles: bool = False,
) -> tuple[Message, ...]:
    """Return what a judge is shown.

    With `roles` the answers are turns of the roles response_1, response_2 and principle, for models
    that were trained so; without, one message of a user to any model.
    """
    if roles:
        judged = [Message(role="response_1", content=response_1)]
        judged.append(Message(role="response_2", content=response_2))
        if principle:
            judged.append(Message(role="principle", content=principle))
        return (*conversation, *judged)
    said = "\n\n".join(f"[{m.role}]\n{m.content or ''}" for m in conversation)
    parts = [f"[conversation]\n{said}"]
    parts += [f"[response 1]\n{response_1}", f"[response 2]\n{response_2}"]
    if principle:
        parts.append(f"[principle to judge by]\n{principle}")
    return (say("\n\n".join([*parts, _INSTRUCTION]), role="user"),)


def read_verdict(text: str) -> Verdict | None:
    """Return the verdict in the last JSON object of `text` that has the three figures, or None.

    Figures out of range are no verdict.
    """
    decoder, found = json.JSONDecoder(), None
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found = _verdict(value) or found
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _verdict(value: object) -> Verdict | None:
    if not isinstance(value, dict):
        return None
    figures = [value.get(name) for name in ("score_1", "score_2", "ranking")]
    if not all(isinstance(f, int | float) and not isinstance(f, bool) for f in figures):
        return None
    score_1, score_2, ranking = map(float, figures)  # type: ignore[arg-type]
    if not (1 <= score_1 <= 5 and 1 <= score_2 <= 5 and 1 <= ranking <= 6):
        return None
    return Verdict(score_1=score_1, score_2=score_2, ranking=ranking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A policy that compares answers; `params` are those of each verdict."""

    policy: Policy
    chat: ChatFormat
    params: SamplingParams = SamplingParams(max_tokens=1024, temperature=0)  # noqa: RUF009
    principle: str | None = None
    roles: bool = False

    async def compare(
        self, conversation: Sequence[Message], response_1: str, response_2: str
    ) -> Verdict | None:
        """Return the verdict on a pair, None where there is none to read or the call failed."""
        dialogue = Dialogue(self.chat)
        try:
            dialogue.show(
                comparison_messages(
                    conversation,
                    response_1,
                    response_2,
                    principle=self.principle,
                    roles=self.roles,
                )
            )
            completion = await self.policy.complete(dialogue.tokens, self.params)
        except ApriumError as error:
            log.warning("a comparison failed: %s", error)
            return None
        return read_verdict(dialogue.hear(completion).content or "")

    async def rewards(
        self, conversation: Sequence[Message], responses: Sequence[str]
    ) -> Comparison:
        """Compare answers around the circle and return the mean score of each.

        A verdict that cannot be read counts for neither; an answer with none at all gets the middle
        of the scale. Raises TaskError for fewer than two answers.
        """
        count = len(responses)
        if count < 2:
            raise TaskError(f"{count} answers cannot be compared: give at least two")
        pairs = [(i, (i + 1) % count) for i in range(count)]
        verdicts = await asyncio.gather(
            *(self.compare(conversation, responses[i], responses[j]) for i, j in pairs)
        )
        scores: list[list[float]] = [[] for _ in responses]
        for (i, j), verdict in zip(pairs, verdicts, strict=True):
            if verdict is not None:
                first, second = verdict.settled()
                scores[i].append(first)
                scores[j].append(second)
        rewards = tuple(sum(s) / len(s) if s else _NEUTRAL_SCORE for s in scores)
        return Comparison(rewards=rewards, unread=sum(v is None for v in verdicts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Tasks for a judge: two answers to a sum of numbers up to `digits` long, one of them wrong."""

    digits: int = 3
    roles: bool = False
    domain: str = "judging"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.digits <= 18:
            raise TaskError(f"digits is {self.digits}: it must be 1 to 18")

    def draw(self, rng: random.Random) -> Task:
        """Make a pair to judge."""
        a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        slip = rng.choice([d for d in (-100, -10, -1, 1, 10, 100) if a + b + d >= 0])
        answers = [f"{a} + {b} = {a + b}", f"{a} + {b} = {a + b + slip}"]
        better = rng.randint(1, 2)
        first, second = answers if better == 1 else answers[::-1]
        question = say(f"What is {a} + {b}?", role="user")
        verdict = {"score_1": 5, "score_2": 1, "ranking": 1}
        if better == 2:
            verdict = {"score_1": 1, "score_2": 5, "ranking": 6}
        return Task(
            domain=self.domain,
            key=f"{first} {second}",
            messages=comparison_messages([question], first, second, roles=self.roles),
            data={"better": better},
            solution=(say(json.dumps(verdict)),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one verdict."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return no verdict, one for the other, an undecided one, and one that is torn."""
        gold = read_verdict(task.solution[0].content or "")
        assert gold is not None
        swapped = replace(
            gold, score_1=gold.score_2, score_2=gold.score_1, ranking=7 - gold.ranking
        )
        torn = replace(gold, ranking=7 - gold.ranking)
        undecided = replace(gold, score_1=3.0, score_2=3.0, ranking=3.0)
        texts = ["", "Response 1 is better.", '{"score_1": 9, "score_2": 1, "ranking": 1}']
        if task.data["better"] == 1:
            undecided = replace(undecided, ranking=4.0)
        for verdict in (swapped, torn, undecided):
            figures = {n: getattr(verdict, n) for n in ("score_1", "score_2", "ranking")}
            texts.append(json.dumps(figures))
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> float:
    """Pay for the right preference, stated by scores (or by ranking, at equal ones) and ranking."""
    verdict = read_verdict(reply.content or "")
    if verdict is None:
        return 0.0
    first, second = verdict.settled()
    ranked = 1 if verdict.ranking < _NEUTRAL_RANKING else 2
    preferred = 1 if first > second else 2
    return float(preferred == ranked == task.data["better"])
