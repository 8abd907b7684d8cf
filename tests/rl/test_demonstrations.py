"""Who plays for others to learn from: as many as there are places, and what became of failures."""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from aprium.base.errors import ConfigError, TaskError
from aprium.base.records import Completion, SamplingParams, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat
from aprium.envs.places import Places
from aprium.rl.demonstrations import play, play_remote
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.teachers import RemoteConfig
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


# Teachers on servers: keys, tries, and how many at once.


class Server:
    """Answers every prompt with one text, after what `behaviours` say, and counts who waits."""

    def __init__(self, *behaviours: str) -> None:
        self.behaviours = list(behaviours)
        self.keys: set[str | None] = set()
        self.asked = self.waiting = self.most = 0
        tokenizer = Tokenizer.load(PICO_DIR)
        self.ids = [*tokenizer.encode("</think>5"), tokenizer.id_of("<|im_end|>")]

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/tokenize":
            return httpx2.Response(404, json={"detail": "Not Found"})
        self.asked += 1
        self.keys.add(request.headers.get("Authorization"))
        assert json.loads(request.content)["prompt"]
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        behaviour = self.behaviours.pop(0) if self.behaviours else "well"
        try:
            await asyncio.sleep(2 if behaviour == "slow" else 0.001)
        finally:
            self.waiting -= 1
        if behaviour not in ("well", "slow"):
            return httpx2.Response(int(behaviour), json={"error": {"message": "not now"}})
        logprobs = {"token_logprobs": [-0.5] * len(self.ids)}
        choice = {
            "text": "5", "token_ids": self.ids, "logprobs": logprobs, "finish_reason": "stop"
        }  # fmt: skip
        return httpx2.Response(200, json={"choices": [choice]})


def play_there(server: Server, count: int = 6, **options: Any) -> list[Trajectory]:
    remote = RemoteConfig(url="http://there", model="m", **({"timeout_s": 0.3} | options))  # type: ignore[arg-type]
    transport = httpx2.MockTransport(server)
    return play_remote("t", remote, "pico", [ADD], RolloutConfig(), count, transport=transport)


def test_a_teacher_that_is_busy_or_slow_is_asked_again() -> None:
    server = Server("429", "503", "slow")
    found = play_there(server)
    assert len(found) == 6 and server.asked == 9
    assert all(t.domain == "add" and any(t.sampled) for t in found)


def test_no_more_episodes_are_under_way_than_the_server_is_to_have() -> None:
    server = Server()
    assert len(play_there(server, 9, concurrency=2)) == 9
    assert server.most == 2


def test_keys_of_teachers_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="teacher 't': the environment has no NO_SUCH_KEY: set"):
        play_there(Server(), key_variable="NO_SUCH_KEY")
    monkeypatch.setenv("SUCH_A_KEY", "secret")
    server = Server()
    play_there(server, key_variable="SUCH_A_KEY")
    assert server.keys == {"Bearer secret"}


def test_a_server_that_is_down_is_said_to_be() -> None:
    server = Server(*("500",) * 8)
    words = r"all 4 episodes of 'add' failed, the last with .*http://there answers 500: not now"
    with pytest.raises(TaskError, match=words):
        play_there(server, 4, retries=1)
    # Refused at once, and for good.
    with pytest.raises(TaskError, match="answers 401"):
        play_there(Server(*("401",) * 4), 4, retries=1)
