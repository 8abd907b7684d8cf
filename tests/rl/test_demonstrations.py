"""Who plays for others to learn from: as many as there are places, and what became of failures."""

import asyncio
import logging
from collections.abc import Sequence

import pytest

from aprium.base.errors import TaskError
from aprium.base.records import Completion, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat
from aprium.envs.places import Places
from aprium.rl.demonstrations import play
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

ADD = DomainConfig(name="add", family="exercises", options={"families": ["add"]}, thinking=False)
CHAT = ChatFormat(tokenizer=Tokenizer.load(PICO_DIR), template=ChatTemplate.load(PICO_DIR))


class Slow:
    """Serves two at a time, for 50 ms each; what else comes waits in its queue. Some fail."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.calls = fails, 0
        self.slots = asyncio.Semaphore(2)

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        self.calls += 1
        if self.calls <= self.fails:
            raise ValueError("out of order")
        async with self.slots:
            await asyncio.sleep(0.05)
        end = CHAT.tokenizer.id_of("<|im_end|>")
        ids = (*CHAT.tokenizer.encode("7"), end)
        return Completion(text="7", tokens=ids, logprobs=(-1.0,) * len(ids), finish="stop")

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        raise NotImplementedError


def test_what_waits_for_its_place_is_not_late() -> None:
    """100 episodes in 50 turns of two: a clock from the start would give up on most."""
    rollout = RolloutConfig(deadline_s=1.0)
    found = asyncio.run(play(Slow(), CHAT, [ADD], rollout, 100, Places(2)))
    assert len(found) == 100 and all(one.stop == "done" for one in found)
    with pytest.raises(TaskError, match="of 100 episodes failed, the last with not done in 1 s"):
        asyncio.run(play(Slow(), CHAT, [ADD], rollout, 100, Places(100)))


def test_a_few_failures_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "aprium"):
        found = asyncio.run(play(Slow(fails=2), CHAT, [ADD], RolloutConfig(), 6))
    assert len(found) == 4
    assert "2 of 6 episodes failed, the last with ValueError: out of order" in caplog.text
