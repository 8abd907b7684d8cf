"""Episodes of pico through its engine: tokens and log-probabilities are what the engine scores."""

import asyncio
import random

import pytest

from aprium.base.records import SamplingParams, Trajectory
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, Step, run_episode, run_group
from aprium.envs.family import take
from aprium.envs.registry import make
from aprium.envs.task import say

PARAMS = SamplingParams(max_tokens=60, temperature=1.0, seed=7)


class Thrice:
    """Asks another exercise after each answer, and ends after the third."""

    def __init__(self) -> None:
        family = make("exercises", {"families": ["weather", "add"]})
        tasks = [family.draw(random.Random(i)) for i in range(3)]
        self.task = tasks[0]
        self.questions = [task.messages[0] for task in tasks]

    async def reset(self):
        return (self.questions.pop(0),)

    async def step(self, reply) -> Step:
        if not self.questions:
            return Step(done=True, reward=1.0)
        return Step(messages=(say("Well.", role="user"), self.questions.pop(0)))


async def play() -> tuple[Trajectory, list[float | None], list[Trajectory]]:
    engine = AsyncEngine(EngineConfig(model="pico", max_model_len=1024))
    assert engine.tokenizer is not None and engine.template is not None
    chat = ChatFormat(tokenizer=engine.tokenizer, template=engine.template)
    policy = EnginePolicy(engine)
    try:
        long = await run_episode(Thrice(), policy, chat, PARAMS, Limits(deadline_s=60))
        scores = await policy.score(long.tokens)
        family = make("exercises", {"families": ["first", "upper", "weather"]})
        tasks = [take(family, index, held_out=True) for index in range(6)]
        greedy = SamplingParams(max_tokens=80, temperature=0)
        groups = [
            await run_group(lambda t=t: family.start(t), policy, chat, greedy, size=2)
            for t in tasks
        ]
        return long, scores, [t for group in groups for t in group.trajectories]
    finally:
        await engine.close()


def test_episodes_of_pico() -> None:
    long, scores, short = asyncio.run(play())
    assert (
        long.error is None
        and long.stop in ("done", "tokens")
        and long.num_turns >= 1
        and sum(long.sampled) > 10
    )
    for score, logprob, sampled in zip(scores, long.logprobs, long.sampled, strict=True):
        if sampled:
            assert score == pytest.approx(logprob, abs=1e-4)
        else:
            assert logprob == 0.0
    assert all(t.error is None for t in short)
    # Greedy twins are the same to the token, and pico knows its exercises.
    for one, other in zip(short[::2], short[1::2], strict=True):
        assert one.tokens == other.tokens and one.reward == other.reward
    assert sum(t.reward for t in short) >= 6
