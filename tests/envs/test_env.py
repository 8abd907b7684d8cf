"""Episodes: tokens are the model's own, limits end them, and a failure is a trajectory."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from aprium.base.errors import EngineError, RequestError, TaskError
from aprium.base.records import Message, SamplingParams, Trajectory
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, SingleTurn, Step, replay, run_episode, run_group
from aprium.envs.task import Task, say
from tests.scripted import ScriptedPolicy

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
TASK = Task(
    domain="test", key="2+2", messages=(say("What is 2 + 2?", role="user"),), data={"answer": "4"}
)


class Guess:
    """Answers each turn with another message until told `four`; tools get a result."""

    def __init__(self, delay_s: float = 0.0, fails: bool = False) -> None:
        self.task = replace(TASK, tools=(TOOL,))
        self.heard: list[Message] = []
        self.delay_s, self.fails = delay_s, fails

    async def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    async def step(self, reply: Message) -> Step:
        await asyncio.sleep(self.delay_s)
        if self.fails:
            raise KeyError("broken")
        self.heard.append(reply)
        if reply.content == "four":
            return Step(done=True, reward=1.0, parts={"right": 1.0, "tries": 1.0})
        if reply.tool_calls:
            answers = tuple(
                Message(role="tool", content="nothing", tool_call_id=c.id) for c in reply.tool_calls
            )
            return Step(messages=answers, parts={"tries": 1.0})
        return Step(messages=(say("No, again.", role="user"),), reward=-0.25, parts={"tries": 1.0})


def play(policy: ScriptedPolicy, env=None, params=None, **limits) -> Trajectory:
    env = env or Guess()
    return asyncio.run(run_episode(env, policy, policy.chat, params, Limits(**limits)))


def test_tokens_are_spliced_and_never_encoded_again(chat: ChatFormat) -> None:
    """A reply spelled in single bytes stays so, though the tokenizer would spell it otherwise."""
    tokenizer = chat.tokenizer
    end = tokenizer.id_of("<|im_end|>")
    odd = tuple(t for c in "hm</think>thirteen" for t in tokenizer.encode(c))
    assert odd != tuple(tokenizer.encode("hm</think>thirteen"))
    call = "</think><tool_call>\n<function=look>\n<parameter=at>\nhere\n</parameter>\n</function>\n"
    policy = ScriptedPolicy(chat, [(*odd, end), call + "</tool_call>", "so</think>four"])
    env = Guess()
    found = play(policy, env)
    assert (found.stop, found.error, found.num_turns) == ("done", None, 3)
    assert found.reward == 0.75 and found.parts == {"tries": 3.0, "right": 1.0}
    runs = _runs(found)
    assert runs[0] == (*odd, end) and len(runs) == 3
    assert found.weight_spans == tuple((i + 1, len(run)) for i, run in enumerate(runs))
    assert all((p == -0.25) == s for p, s in zip(found.logprobs, found.sampled, strict=True))
    for shown, next_shown in zip(policy.shown, policy.shown[1:], strict=False):
        assert next_shown[: len(shown)] == shown
    assert found.tokens[: len(policy.shown[2])] == policy.shown[2]
    assert env.heard[0].reasoning == "hm" and env.heard[0].content == "thirteen"
    (made,) = env.heard[1].tool_calls
    assert (made.name, made.arguments, made.id) == ("look", '{"at": "here"}', "call-0")
    # With the reasoning of earlier turns kept, it is what the template writes of the whole.
    messages = [*env.task.messages, env.heard[0], say("No, again.", role="user"), env.heard[1]]
    messages += [Message(role="tool", content="nothing", tool_call_id="call-0")]
    whole = chat.template.render(messages, (TOOL,), truncate_history_thinking=False)
    text = tokenizer.decode(policy.shown[2], skip_special_tokens=False)
    assert "".join(text.split()) == "".join(whole.split())


def _runs(found: Trajectory) -> list[tuple[int, ...]]:
    runs: list[list[int]] = []
    before = False
    for token, sampled in zip(found.tokens, found.sampled, strict=True):
        if sampled and not before:
            runs.append([])
        if sampled:
            runs[-1].append(token)
        before = sampled
    return [tuple(run) for run in runs]


def test_limits(chat: ChatFormat) -> None:
    found = play(ScriptedPolicy(chat, ["</think>no"] * 3), max_turns=2)
    assert (found.stop, found.num_turns, found.reward) == ("turns", 2, -0.5)
    policy = ScriptedPolicy(chat, ["</think>no"] * 9)
    found = play(policy, max_tokens=120)
    assert found.stop == "tokens" and len(found.tokens) <= 140
    assert all(
        a.max_tokens == 120 - len(s) for a, s in zip(policy.asked, policy.shown, strict=True)
    )
    policy = ScriptedPolicy(chat, ["</think>four"])
    found = play(policy, params=SamplingParams(max_tokens=2))
    assert (found.stop, sum(found.sampled), found.reward) == ("tokens", 2, 0.0)
    found = play(ScriptedPolicy(chat, ["</think>no"]), Guess(delay_s=5), deadline_s=0.05)
    assert found.stop == "deadline" and found.error == "not done in 0.05 s" and found.reward == 0
    assert sum(found.sampled) > 0
    with pytest.raises(TaskError, match="max_turns is 0"):
        Limits(max_turns=0)


@pytest.mark.parametrize(
    ("replies", "fails", "words"),
    [
        ([EngineError("gone away")], False, "EngineError: gone away"),
        ([RequestError("too long")], False, "turn 1: too long"),
        ([TimeoutError("mine")], False, "TimeoutError: mine"),
        (["</think>no"], True, "KeyError: 'broken'"),
        (["</think>no"], False, "IndexError"),
    ],
)
def test_failures_are_trajectories(
    chat: ChatFormat, replies: Sequence, fails: bool, words: str
) -> None:
    found = play(ScriptedPolicy(chat, replies), Guess(fails=fails))
    assert found.stop == "error" and found.error is not None and words in found.error
    assert found.reward == 0.0 and len(found.tokens) > 0


def test_cancelling_an_episode_is_no_failure(chat: ChatFormat) -> None:
    async def run() -> None:
        policy = ScriptedPolicy(chat, ["</think>no"])
        task = asyncio.create_task(run_episode(Guess(delay_s=9), policy, chat))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_group_has_seeds_of_its_own(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(chat, ["</think>4", "</think>5", "</think>4"])

    def make() -> SingleTurn:
        return SingleTurn(TASK, lambda task, reply: float(reply.content == task.data["answer"]))

    params = SamplingParams(seed=10, max_tokens=9)
    group = asyncio.run(run_group(make, policy, chat, params, size=3))
    assert [t.reward for t in group.trajectories] == [1.0, 0.0, 1.0]
    assert group.task == TASK.id and [a.seed for a in policy.asked] == [10, 11, 12]


def test_single_turn_environments_are_used_once() -> None:
    env = SingleTurn(TASK, lambda task, reply: {"reward": 1.0, "style": 0.5})
    step = asyncio.run(replay(env, [say("4")]))
    assert (step.reward, step.parts, step.done) == (1.0, {"style": 0.5}, True)
    with pytest.raises(TaskError, match="was used"):
        asyncio.run(replay(env, [say("4")]))


def test_identity_and_split_follow_from_what_is_asked() -> None:
    rng = random.Random(0)
    tasks = [replace(TASK, key=str(rng.random())) for _ in range(600)]
    held = sum(task.held_out for task in tasks)
    assert 15 < held < 65 and len({task.id for task in tasks}) == 600
    other = replace(tasks[0], messages=(say("In other words", role="user"),))
    assert other.id == tasks[0].id and other.held_out == tasks[0].held_out
