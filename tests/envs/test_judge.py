"""A judge over a policy: verdicts read, ties broken, answers compared around the circle."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import EngineError, TaskError
from aprium.base.records import Completion
from aprium.envs.dialogue import ChatFormat
from aprium.envs.judge import Judge, Verdict, comparison_messages, read_verdict
from aprium.envs.task import say
from tests.scripted import ScriptedPolicy

QUESTION = [say("Say a number.", role="user")]


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ('{"score_1": 4, "score_2": 2, "ranking": 2}', (4, 2, 2)),
        ('So {"a": {}}\n```\n{"ranking": 5, "score_1": 1.5, "score_2": 4}\n```', (1.5, 4, 5)),
        ('{"score_1": 1, "score_2": 2, "ranking": 6} no: '
         '{"score_1": 5, "score_2": 2, "ranking": 1}', (5, 2, 1)),
        ('{"score_1": 6, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": 4, "score_2": 2, "ranking": 0}', None),
        ('{"score_1": "4", "score_2": 2, "ranking": 2}', None),
        ('{"score_1": true, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": 4, "score_2": 2}', None),
        ('{"score_1": 4, ', None),
        ("{" * 2000, None),
        ("", None),
    ],
)  # fmt: skip
def test_verdicts(text: str, figures: tuple | None) -> None:
    found = read_verdict(text)
    assert (found and (found.score_1, found.score_2, found.ranking)) == figures


@given(st.text(max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    assert read_verdict(text) is None or "score_1" in text


def test_ties_are_broken_by_the_ranking() -> None:
    assert Verdict(score_1=3, score_2=3, ranking=1).settled() == (5.5, 0.5)
    assert Verdict(score_1=3, score_2=3, ranking=4).settled() == (2.5, 3.5)
    assert Verdict(score_1=4, score_2=3, ranking=6).settled() == (4, 3)


class Comparing(ScriptedPolicy):
    """Prefers the larger number, and a little whatever stands first."""

    async def complete(self, tokens, params) -> Completion:
        text = self.chat.tokenizer.decode(tokens, skip_special_tokens=False)
        first, second = (
            float(text.split(f"[response {i}]\n")[1].split("\n")[0].split("<")[0]) for i in (1, 2)
        )
        high = min(5.0, max(1.0, 3 + (first - second) / 4 + 0.2))
        verdict = {"score_1": high, "score_2": 6 - high, "ranking": 1 if high > 3 else 6}
        self.replies = ["</think>" + json.dumps(verdict)]
        return await super().complete(tokens, params)


def rewards(judge: Judge, responses: list[str]):
    return asyncio.run(judge.rewards(QUESTION, responses))


def test_answers_around_the_circle(chat: ChatFormat) -> None:
    policy = Comparing(chat, [])
    found = rewards(Judge(policy=policy, chat=chat), ["1", "4", "2", "3"])
    assert len(policy.shown) == 4 and found.unread == 0
    assert found.rewards.index(max(found.rewards)) == 1
    # Everybody stands first once, so that a preference for the first place cancels.
    equal = rewards(Judge(policy=Comparing(chat, []), chat=chat), ["2", "2", "2"])
    assert equal.rewards == pytest.approx((3.0, 3.0, 3.0))
    pair = rewards(Judge(policy=Comparing(chat, []), chat=chat), ["2", "3"])
    assert pair.rewards[0] < pair.rewards[1]


def test_verdicts_that_cannot_be_had(chat: ChatFormat) -> None:
    good = '</think>{"score_1": 4, "score_2": 2, "ranking": 2}'
    policy = ScriptedPolicy(chat, [good, "</think>no idea", EngineError("gone")])
    found = rewards(Judge(policy=policy, chat=chat), ["a", "b", "c"])
    assert found.unread == 2 and found.rewards == (4.0, 2.0, 3.0)
    with pytest.raises(TaskError, match="1 answers cannot be compared"):
        rewards(Judge(policy=policy, chat=chat), ["a"])


def test_prompts_with_and_without_roles(chat: ChatFormat) -> None:
    plain = comparison_messages(QUESTION, "1", "2", principle="Be brief.")
    assert len(plain) == 1 and "[principle to judge by]\nBe brief." in (plain[0].content or "")
    roles = comparison_messages(QUESTION, "1", "2", principle="Be brief.", roles=True)
    assert [m.role for m in roles] == ["user", "response_1", "response_2", "principle"]
    text = chat.template.render(roles)
    assert "<|im_start|>response_2\n2<|im_end|>" in text
