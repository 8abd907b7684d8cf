"""Playing tasks of a NeMo-Gym server: tools, cookies, grades, and failures as trajectories."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aprium.base.errors import ConfigError, TaskError
from aprium.base.records import Message, ToolCall, Trajectory
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, replay, run_episode
from aprium.envs.family import distinct, take
from aprium.envs.gym import row_task, write_row
from aprium.envs.gym_client import GymEnv, run_rollout
from aprium.envs.gym_http import HttpSession
from aprium.envs.registry import make
from aprium.envs.task import say
from tests.envs.counter import Counter, row
from tests.scripted import ScriptedPolicy
from tests.served import served

CALL = "</think><tool_call>\n<function=increment>\n<parameter=by>\n{}\n</parameter>\n</function>\n"


def calling(by: int) -> str:
    return CALL.format(by) + "</tool_call>"


@pytest.fixture(scope="module")
def counter() -> Iterator[Counter]:
    server = Counter()
    with served(server.app) as url:
        server.url = url  # type: ignore[attr-defined]
        yield server


def turn(name: str, arguments: str, id: str = "c") -> Message:
    return Message(role="assistant", tool_calls=(ToolCall(name=name, arguments=arguments, id=id),))


def play(chat: ChatFormat, url: str, given: dict[str, Any], replies: list, **options) -> Trajectory:
    timeout_s = options.pop("timeout_s", 30.0)
    env = GymEnv(row_task(given, "x"), url, timeout_s=timeout_s)
    policy = ScriptedPolicy(chat, replies)
    return asyncio.run(run_episode(env, policy, chat, limits=Limits(**options)))


def test_an_episode_with_tools(chat: ChatFormat, counter: Counter) -> None:
    url: str = counter.url  # type: ignore[attr-defined]
    replies = ["hm" + calling(4), calling(-2), "</think>done"]
    found = play(chat, url, row(), replies)
    assert (found.stop, found.error, found.num_turns, found.reward) == ("done", None, 3, 1.0)
    assert found.domain == "counter_agent"
    assert found.parts == {"num_calls": 2.0, "step": 2.0, "right": 1.0}
    text = chat.tokenizer.decode(found.tokens, skip_special_tokens=False)
    assert "Use the tool." in text and '{"count":7}' in text and '{"count":5}' in text
    kinds = [kind for kind, _ in counter.seen[-4:]]
    assert kinds == ["seed", "increment", "increment", "verify"]
    output = counter.seen[-1][1]["response"]["output"]
    assert [item["type"] for item in output] == [
        *("reasoning", "function_call", "function_call_output"),
        *("function_call", "function_call_output", "message"),
    ]
    assert output[1]["call_id"] == output[2]["call_id"] != output[3]["call_id"]
    assert play(chat, url, row(), [calling(1), "</think>done"]).reward == 0.0


def test_what_a_tool_refuses_is_shown_to_the_model(counter: Counter) -> None:
    async def run() -> None:
        env = GymEnv(row_task(row(), "x"), counter.url)  # type: ignore[attr-defined]
        assert [m.role for m in await env.reset()] == ["system", "user"]
        before = len(counter.seen)
        turns = [turn("verify", "{}"), turn("increment", "[1]"), turn("increment", "{")]
        shown = [(await env.step(t)).messages[0].content or "" for t in turns]
        assert "no tool verify" in shown[0] and "no JSON object" in shown[1] == shown[2]
        assert len(counter.seen) == before  # a model cannot have itself graded
        (refused,) = (await env.step(turn("increment", '{"on": 2}'))).messages
        assert refused.content == '{"detail":"give by"}' and refused.tool_call_id == "c"
        with pytest.raises(TaskError, match="was used"):
            await env.reset()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"seed": "500"}, "/seed_session answers 500: broken"),
        ({"seed": "text"}, "answers with no JSON"),
        ({"tool": "502"}, "/increment answers 502"),
        ({"verify": "500"}, "/verify answers 500: broken"),
        ({"verify": "text"}, "answers with no JSON"),
        ({"verify": "list"}, "gives no reward"),
        ({"verify": "nan"}, "gives no reward"),
        ({"verify": "masked"}, "could not measure: the judge is gone"),
        ({"seed": "slow"}, "did not answer in 0.3 s"),
        ({"verify": "slow"}, "did not answer in 0.3 s"),
    ],
)
def test_failures_are_trajectories(
    chat: ChatFormat, counter: Counter, how: dict[str, str], words: str
) -> None:
    url: str = counter.url  # type: ignore[attr-defined]
    limit = 0.3 if "slow" in how.values() else 20.0
    found = play(chat, url, row(how=how), [calling(2), "</think>done"], timeout_s=limit)
    assert found.stop == "error" and found.error is not None and words in found.error
    assert found.reward == 0.0 and found.parts == {}


def test_a_tool_that_breaks_is_shown_as_agents_show_it(chat: ChatFormat, counter: Counter) -> None:
    url: str = counter.url  # type: ignore[attr-defined]
    found = play(chat, url, row(how={"tool": "500"}), [calling(2), "</think>done"])
    assert found.error is None and found.reward == 0.0
    assert "broken" in chat.tokenizer.decode(found.tokens)


def test_a_server_that_is_not_there(chat: ChatFormat) -> None:
    found = play(chat, "http://127.0.0.1:1", row(), ["</think>done"])
    assert found.stop == "error" and "does not answer" in (found.error or "")
    task = row_task(row(), "x")
    found = asyncio.run(run_rollout(task, "http://127.0.0.1:1"))
    assert found.stop == "error" and "does not answer" in (found.error or "") and not found.tokens
    found = asyncio.run(run_rollout(task, "localhost"))
    assert found.stop == "error" and "is no address" in (found.error or "")


def test_a_busy_server_is_asked_again_and_an_endless_one_is_left() -> None:
    calls: list[int] = []

    async def busy(request: Request) -> Response:
        calls.append(1)
        if len(calls) < 3:
            return JSONResponse({}, status_code=503, headers={"Retry-After": "0"})
        return JSONResponse({"asked": await request.json()})

    async def endless(request: Request) -> Response:
        return Response(b"x" * (65 << 20))

    app = Starlette(
        routes=[Route("/a", busy, methods=["POST"]), Route("/b", endless, methods=["POST"])]
    )

    async def run(url: str) -> None:
        assert await HttpSession(url).ask("/a", {"x": 1}) == {"asked": {"x": 1}}
        with pytest.raises(TaskError, match="larger than 64 MiB"):
            await HttpSession(url).ask("/b", {})
        with pytest.raises(TaskError, match="cannot be asked"):
            await HttpSession(url).ask("/a", {"x": "\ud800"})

    with served(app) as url:
        asyncio.run(run(url))
    assert len(calls) == 3


@pytest.fixture
def rows(tmp_path: Path, counter: Counter) -> Callable[..., dict[str, Any]]:
    def write(*texts: str) -> dict[str, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n\n".join(texts))
        return {"rows": str(path), "url": counter.url}  # type: ignore[attr-defined]

    return write


def test_rows_are_a_family(rows: Callable[..., dict[str, Any]], counter: Counter) -> None:
    texts = [json.dumps(row(i, i + 1)) for i in range(40)]
    bare = row(99, 100)
    del bare["agent_ref"]
    family = make("nemo-gym", rows(*texts, json.dumps(bare)))
    tasks = distinct(family, 30) + distinct(family, 1, held_out=True)
    assert {task.domain for task in tasks} <= {"counter_agent", "nemo-gym"}
    assert len({task.id for task in tasks}) == 31
    task = take(family, 3)
    assert task == take(family, 3) and task.tools[0]["function"]["name"] == "increment"
    begin = task.data["row"]["begin"]
    good = [turn("increment", '{"by": 1}'), say(f"done with {begin}")]
    assert asyncio.run(replay(family.start(task), good)).reward == 1.0
    (wrong,) = family.wrong(task)
    assert asyncio.run(replay(family.start(task), wrong)).reward == 0.0
    parameters = rows(*texts)
    elsewhere = parameters | {"url": "", "servers": [["counter_agent", parameters["url"]]]}
    assert asyncio.run(replay(make("nemo-gym", elsewhere).start(task), good)).reward == 1.0
    with pytest.raises(TaskError, match="no server for rows of 'counter_agent'"):
        make("nemo-gym", parameters | {"url": ""}).start(task)


def test_a_row_whose_tools_are_none_is_refused() -> None:
    for tools in (5, "increment", {"type": "function"}, [5]):
        broken = row()
        broken["responses_create_params"]["tools"] = tools
        with pytest.raises(TaskError, match="tools is no list of objects"):
            row_task(broken, "x")


def test_our_own_rows_keep_their_side_of_the_split() -> None:
    for name in ("choice", "tool-use", "abstention"):
        task = take(make(name), 5, held_out=True)
        again = row_task(json.loads(json.dumps(write_row(task))), "x")
        assert again.held_out and again.id == task.id
        assert (again.messages, again.tools) == (task.messages, task.tools)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("{", "row 1 is not JSON"),
        ("[1]", "must be an object"),
        ("{}", "no responses_create_params.input"),
        ('{"responses_create_params": {"input": [3]}}', "an item that is no object"),
        ('{"responses_create_params": {"input": [{"role": 3}]}}', "role is missing"),
        (
            '{"responses_create_params": {"input": "x", "tools": [{"type": "mcp"}]}}',
            "only its vendor can run",
        ),
    ],
)
def test_rows_that_cannot_be_asked(
    rows: Callable[..., dict[str, Any]], text: str, words: str
) -> None:
    with pytest.raises(TaskError, match=words):
        make("nemo-gym", rows(text)).draw(random.Random(0))


def test_parameters_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing key nemo-gym\.rows"):
        make("nemo-gym")
    with pytest.raises(TaskError, match="cannot read rows"):
        make("nemo-gym", {"rows": str(tmp_path / "none.jsonl")})
    with pytest.raises(TaskError, match="'here' is no address"):
        make("nemo-gym", {"rows": "x", "url": "here"})
    with pytest.raises(TaskError, match="timeout_s is 0"):
        make("nemo-gym", {"rows": "x", "timeout_s": 0})


def rolled(result: Any) -> Trajectory:
    """Return what is made of the answer of an agent server."""

    async def run(request: Request) -> Response:
        return JSONResponse(result)

    app = Starlette(routes=[Route("/run", run, methods=["POST"])])
    with served(app) as url:
        return asyncio.run(run_rollout(row_task(row(), "x"), url, weight_version=7))


def said(prompt: list[int], generated: list[int]) -> dict[str, Any]:
    return {
        "type": "message", "role": "assistant", "content": "x", "prompt_token_ids": prompt,
        "generation_token_ids": generated, "generation_log_probs": [-0.5] * len(generated),
    }  # fmt: skip


def test_a_whole_rollout_is_read_from_its_tokens() -> None:
    plain = {"type": "function_call_output", "call_id": "c", "output": "y"}
    output = [{"type": "reasoning"}, said([1, 2], [3, 4]), plain, said([1, 2, 3, 4, 5], [6])]
    result = row() | {"response": {"output": output}, "reward": 0.5, "score": 2, "begin": 9}
    found = rolled(result)
    assert found.error is None and (found.reward, found.parts) == (0.5, {"score": 2.0})
    assert found.tokens == (1, 2, 3, 4, 5, 6) and found.num_turns == 2
    assert found.sampled == (False, False, True, True, False, True)
    assert found.logprobs == (0.0, 0.0, -0.5, -0.5, 0.0, -0.5)
    assert (found.stop, found.domain, found.weight_spans) == ("done", "counter_agent", ((7, 3),))
    cut = {"output": output, "incomplete_details": {"reason": "max_output_tokens"}}
    result |= {"response": cut, "reward_components": {"a": 1}}
    assert (rolled(result).stop, rolled(result).parts) == ("tokens", {"a": 1.0})


@pytest.mark.parametrize(
    ("output", "more", "words", "kept"),
    [
        ([said([1, 2], [3]), said([1, 9, 3], [4])], {}, "history was rewritten", 3),
        ([{"type": "message"}], {}, "no token ids", 0),
        ([said([1], [2]) | {"generation_log_probs": [1, 2]}], {}, "2 log-probabilities", 0),
        ([said([1], [2]), "x"], {}, r"output[1] is no object", 2),
        ([said([1], [2])], {"reward": None}, "gives no reward", 2),
        ([said([1], [2])], {"mask_sample": True}, "could not measure: it says no more", 2),
        ("x", {}, "gives no response", 0),
    ],
)
def test_rollouts_that_are_not_sound(
    output: Any, more: dict[str, Any], words: str, kept: int
) -> None:
    found = rolled(row() | {"response": {"output": output}, "reward": 1.0} | more)
    assert found.stop == "error" and words in (found.error or "")
    assert len(found.tokens) == kept and found.reward == 0.0 and found.parts == {}
