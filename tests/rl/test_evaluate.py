"""Held-out accuracy: what is played, what it earns, and how sure that is."""

import asyncio
import math
from collections.abc import Sequence

import pytest

from aprium.base.errors import ConfigError, TaskError
from aprium.base.records import Completion, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat
from aprium.envs.family import distinct
from aprium.envs.places import Places
from aprium.rl.evaluate import (
    EvaluateConfig,
    Evaluation,
    as_figures,
    constant_baselines,
    evaluate_checkpoint,
)
from aprium.rl.rollout import DomainConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.rl.test_demonstrations import Slow

ADD = DomainConfig(name="add", family="exercises", options={"families": ["add"]}, thinking=False)
NEXT = DomainConfig(name="next", family="exercises", options={"families": ["next"]})
CONFIG = EvaluateConfig(items=6, max_tokens=24, episode_tokens=120)
CHAT = ChatFormat(tokenizer=Tokenizer.load(PICO_DIR), template=ChatTemplate.load(PICO_DIR))


class Answers:
    """Says the answer of every third task of ADD, fails at every third, and else says nothing."""

    def __init__(self) -> None:
        tasks = distinct(ADD.make(), 6, held_out=True)
        self.answers = {task.messages[-1].content: task.data["answer"] for task in tasks}
        self.running = self.most = 0

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        text = CHAT.tokenizer.decode(tokens)
        number, answer = next((i, a) for i, (q, a) in enumerate(self.answers.items()) if q in text)
        if number % 3 == 1:
            raise ValueError("out of order")
        said = answer if number % 3 == 0 else "nothing"
        ids = (*CHAT.tokenizer.encode(said), CHAT.tokenizer.id_of("<|im_end|>"))
        return Completion(text=said, tokens=ids, logprobs=(-1.0,) * len(ids), finish="stop")

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        raise NotImplementedError


def test_accuracy_counts_what_was_right_of_all() -> None:
    config = EvaluateConfig(items=6, concurrency=2)
    policy = Answers()
    found = asyncio.run(Evaluation([ADD], config)(policy, CHAT))["add"]
    assert (found.accuracy, found.items, found.errors) == (2 / 6, 6, 2)
    assert found.standard_error == pytest.approx(math.sqrt(2 / 6 * 4 / 6 / 5))
    assert policy.most == 2


def test_what_waits_for_its_place_is_not_booked_as_wrong() -> None:
    config = EvaluateConfig(items=60, deadline_s=1.0)
    for count, errors in ((2, False), (60, True)):
        found = asyncio.run(Evaluation([ADD], config)(Slow(), CHAT, Places(count)))["add"]
        assert bool(found.errors) == errors


def test_a_checkpoint_is_evaluated_on_every_domain_and_always_the_same() -> None:
    first = evaluate_checkpoint("pico", [ADD, NEXT], CONFIG)
    assert set(first) == {"add", "next"} and first["next"].accuracy > 0.5
    assert evaluate_checkpoint("pico", [ADD, NEXT], CONFIG, max_num_seqs=3) == first
    figures = as_figures(first)
    assert figures["accuracy"] == (first["add"].accuracy + first["next"].accuracy) / 2
    assert figures["domains"]["add"]["items"] == 6


def test_the_best_constant_is_found() -> None:
    even = DomainConfig(name="even", family="exercises", options={"families": ["even"]})
    found = constant_baselines([even], 30)["even"]
    assert found["answer"] in ("odd", "even") and 0.5 <= found["accuracy"] < 0.8


def test_what_cannot_be_done_is_refused() -> None:
    small = DomainConfig(name="first", family="exercises", options={"families": ["first"]})
    with pytest.raises(TaskError, match="ask for fewer than 6"):
        Evaluation([small], CONFIG)
    with pytest.raises(ConfigError, match=r"evaluate.items is 0"):
        EvaluateConfig(items=0)
    with pytest.raises(ConfigError, match="weight of domain"):
        DomainConfig(name="a", family="exercises", weight=-1.0)
