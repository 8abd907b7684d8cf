"""A teacher on a server plays as its settings say: keys, tries, and how many at once."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from aprium.base.errors import ConfigError, TaskError
from aprium.base.records import Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.rl.demonstrations import play_remote
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.teachers import RemoteConfig
from aprium.text.tokenizer import Tokenizer

DOMAIN = DomainConfig(name="add", family="exercises", options={"families": ["add"]})


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


def play(server: Server, count: int = 6, **options: Any) -> list[Trajectory]:
    remote = RemoteConfig(url="http://there", model="m", **({"timeout_s": 0.3} | options))  # type: ignore[arg-type]
    transport = httpx2.MockTransport(server)
    return play_remote("t", remote, "pico", [DOMAIN], RolloutConfig(), count, transport=transport)


def test_a_teacher_that_is_busy_or_slow_is_asked_again() -> None:
    server = Server("429", "503", "slow")
    found = play(server)
    assert len(found) == 6 and server.asked == 9
    assert all(t.domain == "add" and any(t.sampled) for t in found)


def test_no_more_episodes_are_under_way_than_the_server_is_to_have() -> None:
    server = Server()
    assert len(play(server, 9, concurrency=2)) == 9
    assert server.most == 2


def test_keys_of_teachers_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="teacher 't': the environment has no NO_SUCH_KEY: set"):
        play(Server(), key_variable="NO_SUCH_KEY")
    monkeypatch.setenv("SUCH_A_KEY", "secret")
    server = Server()
    play(server, key_variable="SUCH_A_KEY")
    assert server.keys == {"Bearer secret"}


def test_a_server_that_is_down_is_said_to_be() -> None:
    server = Server(*("500",) * 8)
    words = r"all 4 episodes of 'add' failed, the last with .*http://there answers 500: not now"
    with pytest.raises(TaskError, match=words):
        play(server, 4, retries=1)
    # Refused at once, and for good.
    with pytest.raises(TaskError, match="answers 401"):
        play(Server(*("401",) * 4), 4, retries=1)
