"""Our families as a NeMo-Gym server: episodes under cookies, replayed answers, whole rollouts."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response as OpenAIResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from aprium.base.errors import EngineError, TaskError
from aprium.base.records import Message
from aprium.envs import gym_server
from aprium.envs.env import AskedOnce, Env, Limits, Step, replay
from aprium.envs.family import take
from aprium.envs.gym import row_task, write_row
from aprium.envs.gym_agent import ModelServer
from aprium.envs.gym_client import GymEnv, run_rollout
from aprium.envs.gym_metrics import aggregate
from aprium.envs.gym_server import create_app
from aprium.envs.registry import make
from aprium.envs.task import Task, say
from aprium.text.items import write_items
from tests.served import served

NAMES = ("tool-use", "choice", "structured", "abstention", "instructions")
FAMILIES = [make(name) for name in NAMES]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(create_app(FAMILIES)) as url:
        yield url


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(FAMILIES), raise_server_exceptions=False) as found:
        yield found


def response_to(turns: tuple[Message, ...], results: list[Message] | None = None) -> dict[str, Any]:
    items = []
    for number, turn in enumerate(turns):
        items += write_items(turn, str(number))
        for call in turn.tool_calls:
            answer = results.pop(0) if results else Message(role="tool", content="?")
            items += write_items(
                Message(role="tool", content=answer.content, tool_call_id=call.id), "x"
            )
    return {
        "id": "r", "created_at": 1.0, "model": "m", "object": "response", "output": items,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_worth_the_same_here_and_over_http(address: str, name: str) -> None:
    """Known answers play the same over the protocol as in the process, reward and parts."""
    family = FAMILIES[NAMES.index(name)]

    async def run() -> None:
        for index in range(3):
            task = take(family, index, seed=4)
            there = row_task(json.loads(json.dumps(write_row(task))), "x")
            for turns in (task.solution, *family.wrong(task)):
                here = await replay(family.start(task), turns)
                over = await replay(GymEnv(there, address), turns)
                assert (over.reward, over.done, over.parts) == (here.reward, here.done, here.parts)

    asyncio.run(run())


def test_an_answer_is_graded_again_without_its_episode(client: TestClient) -> None:
    family = FAMILIES[0]
    for index in range(5):
        task = take(family, index, seed=1)
        row = write_row(task) | {"_ng_task_index": index, "extra": [1]}
        for turns in (task.solution, *family.wrong(task)):
            here = asyncio.run(replay(family.start(task), turns))
            found = client.post("/verify", json=row | {"response": response_to(turns)}).json()
            assert found["reward"] == here.reward and found["reward_components"] == here.parts
            assert not found["mask_sample"] and found["state"] == here.parts["state"]
            assert {key: found[key] for key in row} == row
    assert client.get("/reverify_mode").json() == "stateless"


def test_an_episode_is_under_its_cookie_and_graded_once(client: TestClient) -> None:
    task = take(FAMILIES[0], 0, seed=1)
    row = write_row(task)
    call = task.solution[0].tool_calls[0]
    bare = client.post(f"/{call.name}", json=json.loads(call.arguments))
    assert bare.status_code == 400 and "ask /seed_session" in bare.json()["detail"]
    assert client.post("/seed_session", json=row).json() == {}
    env = FAMILIES[0].start(task)
    asyncio.run(env.reset())
    for turn in task.solution[:-1]:
        (made,) = turn.tool_calls
        result = client.post(f"/{made.name}", json=json.loads(made.arguments))
        assert result.status_code == 200 and "set-cookie" in result.headers
        (here,) = asyncio.run(env.step(turn)).messages
        assert result.text == here.content
    # What the episode saw counts: the response says nothing of the calls.
    answer = {"response": response_to(task.solution[-1:])}
    assert client.post("/verify", json=row | answer).json()["reward"] == 1.0
    assert client.post("/verify", json=row | answer).json()["reward"] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": None}, "no task with domain, key and data"),
        ({"task": {"domain": "math", "key": "x", "data": {}}}, "'math' are not served here"),
        ({"task": {"domain": 1, "key": "x", "data": {}}}, "malformed"),
        ({"task": {"domain": "tool-use", "key": "x", "data": {}}}, "does not fit tool-use"),
        ({"responses_create_params": {"input": []}}, "has no responses_create_params.input"),
        ({"responses_create_params": {"input": [{"type": "x"}]}}, "cannot be read here"),
    ],
)
@pytest.mark.parametrize("route", ["/seed_session", "/verify", "/run"])
def test_rows_that_are_not_ours(route: str, change: dict[str, Any], words: str) -> None:
    client = TestClient(create_app(FAMILIES, ModelServer(url="http://127.0.0.1:1")))
    row = write_row(take(FAMILIES[1], 0)) | {"response": response_to(())} | change
    response = client.post(route, json=row)
    assert response.status_code == 400 and words in response.json()["detail"]
    if route == "/run":
        bare = TestClient(create_app(FAMILIES)).post(route, json=row | {"x": 1})
        assert bare.status_code == 400 and "--model-url" in bare.json()["detail"]


def test_requests_that_are_malformed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    row = write_row(take(FAMILIES[0], 0))
    assert client.post("/seed_session", json={"x": 1}).status_code == 422
    assert client.post("/verify", json=row).status_code == 422
    assert client.post("/verify", json=row | {"response": {"output": [3]}}).status_code == 422
    assert client.post("/seed_session", content=b"[" * 100_000).status_code in (400, 422)
    row["task"]["data"]["failing"] = []
    client.post("/seed_session", json=row)
    for text in (b"[1]", b"{", b"\xff"):
        response = client.post("/list_events", content=text)
        assert response.status_code == 400 and "no JSON object" in response.json()["detail"]
    assert "there is no tool" in client.post("/nothing", json={}).text
    monkeypatch.setattr(gym_server, "MAX_BODY_BYTES", 2000)
    response = client.post("/seed_session", json={"x": "y" * 3000})
    assert response.status_code == 413 and "2000 bytes" in response.json()["detail"]


def test_calls_are_bounded_and_an_end_is_told(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gym_server, "_MAX_CALLS", 2)
    client.post("/seed_session", json=write_row(take(FAMILIES[0], 0)))
    answers = [client.post("/nothing", json={}).json() for _ in range(3)]
    assert answers[2] == {"error": "the episode has ended"} != answers[1]
    task = take(FAMILIES[1], 0)
    client.post("/seed_session", json=write_row(task))
    assert client.post("/look", json={}).json() == {"done": True}  # a call was the answer
    answer = {"response": response_to(task.solution)}
    assert client.post("/verify", json=write_row(task) | answer).json()["reward"] == 0.0


def test_what_cannot_be_measured_is_masked(client: TestClient) -> None:
    row = write_row(take(FAMILIES[1], 0))
    row["task"]["data"] = {}
    found = client.post("/verify", json=row | {"response": response_to((say("x"),))}).json()
    assert found["mask_sample"] and found["reward"] == 0.0
    assert found["failure_kind"] == "verifier_error" and "KeyError" in found["failure_reason"]


def test_an_answer_that_was_cut_is_not_graded(client: TestClient) -> None:
    task = take(FAMILIES[1], 0)
    whole = response_to(task.solution)
    assert client.post("/verify", json=write_row(task) | {"response": whole}).json()["reward"] == 1
    cut = whole | {"incomplete_details": {"reason": "max_output_tokens"}}
    found = client.post("/verify", json=write_row(task) | {"response": cut}).json()
    assert found["reward"] == 0.0 and not found["mask_sample"]


def test_sessions_are_bounded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_server, "MAX_SESSIONS", 2)
    row = write_row(take(FAMILIES[0], 0))
    cookies = [client.post("/seed_session", json=row).headers["set-cookie"] for _ in range(3)]
    client.cookies.clear()
    found = [
        client.post("/nothing", json={}, headers={"cookie": c.split(";")[0]}).status_code
        for c in cookies
    ]
    assert found == [400, 200, 200]


class Model:
    """A model server that says `replies`, each a list of items or another answer."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.seen: list[dict[str, Any]] = []
        self.app = Starlette(routes=[Route("/v1/responses", self.respond, methods=["POST"])])

    async def respond(self, request: Request) -> Response:
        self.seen.append(await request.json())
        reply = self.replies.pop(0)
        if isinstance(reply, float):
            await asyncio.sleep(reply)
            reply = []
        if isinstance(reply, Response):
            return reply
        body = response_to(()) | (reply if isinstance(reply, dict) else {"output": reply})
        usage = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
        return JSONResponse(body | {"usage": usage, "status": body.get("status", "completed")})


def turn_items(turn: Message, prompt: list[int], generated: list[int]) -> list[dict[str, Any]]:
    items = write_items(turn, "m")
    items[-1] |= {
        "prompt_token_ids": prompt, "generation_token_ids": generated,
        "generation_log_probs": [-1.0] * len(generated), "of_the_vendor": "kept",
    }  # fmt: skip
    return items


def test_a_whole_rollout() -> None:
    """All that the model server says goes back to it as it was, and comes out as a trajectory."""
    task = take(FAMILIES[0], 3, seed=2)
    prompt: list[int] = [1, 2]
    replies = []
    for number, turn in enumerate(task.solution):
        replies.append(turn_items(turn, list(prompt), [10 + number]))
        prompt += [10 + number, 5]
    model = Model(*replies)
    row = write_row(task)
    row["responses_create_params"] |= {"temperature": 0.5}
    with served(model.app) as there:
        server = ModelServer(url=there + "/v1", model="m", key="secret")
        with served(create_app(FAMILIES, server)) as url:
            found = asyncio.run(run_rollout(row_task(row, "x"), url))
            again = TestClient(create_app(FAMILIES, server))
            model.replies = list(replies)
            whole = again.post("/run", json=row).json()
    assert (found.error, found.stop, found.reward) == (None, "done", 1.0)
    assert found.parts["state"] == 1.0 and found.domain == "tool-use"
    assert found.tokens == tuple(prompt[:-1]) and found.num_turns == len(task.solution)
    assert [t for t, s in zip(found.tokens, found.sampled, strict=True) if s] == [
        10 + i for i in range(len(task.solution))
    ]
    first, second = model.seen[:2]
    assert first["temperature"] == 0.5 and first["model"] == "m" and first["return_token_ids"]
    assert first["input"] == row["responses_create_params"]["input"]
    assert second["input"][len(first["input"]) :][: len(replies[0])] == replies[0]
    assert second["input"][-1]["type"] == "function_call_output"
    OpenAIResponse.model_validate(whole["response"])
    assert whole["response"]["usage"]["total_tokens"] == 7 * len(task.solution)
    assert {key: whole[key] for key in row} == row and whole["reward"] == 1.0


def test_a_model_server_that_knows_no_such_field() -> None:
    task = take(FAMILIES[1], 0)
    model = Model(write_items(task.solution[0], "x"))
    with served(model.app) as there:
        server = ModelServer(url=there, return_token_ids=False)
        found = TestClient(create_app(FAMILIES, server)).post("/run", json=write_row(task)).json()
    assert found["reward"] == 1.0 and set(model.seen[0]) == {"input"}


def test_limits_of_a_rollout() -> None:
    task = take(FAMILIES[0], 3, seed=2)
    call = write_items(task.solution[0], "x")

    def run(*replies: Any, **limits: Any) -> dict[str, Any]:
        with served(Model(*replies).app) as there:
            app = create_app(FAMILIES, ModelServer(url=there), Limits(**limits))
            return TestClient(app).post("/run", json=write_row(task)).json()

    found = run(call, call, max_turns=2)
    assert found["reward"] == 0.0 and not found["mask_sample"]
    assert len(found["response"]["output"]) == 4 and "incomplete_details" not in found["response"]
    cut = {"output": call, "incomplete_details": {"reason": "max_output_tokens"}}
    for found in (run(cut), run(call, max_tokens=7)):
        assert found["response"]["incomplete_details"] and not found["mask_sample"]
    found = run(1.0, deadline_s=0.2)
    assert found["mask_sample"] and found["failure_kind"] == "agent_timeout"
    assert found["failure_reason"] == "not done in 0.2 s" and found["response"]["output"] == []


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (PlainTextResponse("down", status_code=500), "answers 500: down"),
        (PlainTextResponse("hello"), "no JSON"),
        (JSONResponse({"output": 3}), "answers with no response"),
        ({"status": "failed", "error": {"message": "gone"}}, "has failed"),
        ([{"type": "web_search_call"}], "cannot be read"),
        ([{"role": "user", "content": "x"}, *write_items(say("y"), "z")], "2 turns at once"),
    ],
)
def test_a_model_server_that_fails(reply: Any, words: str) -> None:
    task = take(FAMILIES[0], 3, seed=2)
    model = Model(turn_items(task.solution[0], [1], [2]), reply)
    with (
        served(model.app) as there,
        served(create_app(FAMILIES, ModelServer(url=there))) as url,
    ):
        found = asyncio.run(run_rollout(row_task(write_row(task), "x"), url))
    assert found.stop == "error" and words in (found.error or "") and found.reward == 0.0
    assert found.tokens == (1, 2)  # what was played before


def test_a_model_server_that_is_not_there() -> None:
    task = take(FAMILIES[1], 0)
    for url, words in (("http://127.0.0.1:1", "does not answer"), ("x", "is no address")):
        app = create_app(FAMILIES, ModelServer(url=url))
        found = TestClient(app).post("/run", json=write_row(task)).json()
        assert found["mask_sample"] and words in found["failure_reason"]
        OpenAIResponse.model_validate(found["response"])
    with pytest.raises(EngineError, match="is no address"):
        ModelServer(url="x").session(1.0)


COVERAGE = ("measured_rollouts", "masked_rollouts", "measured_tasks", "fully_masked_tasks")


class Asks(AskedOnce):
    """Answers the first reply with a question, and pays for the second."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.turns = 0

    async def step(self, reply: Message) -> Step:
        self.turns += 1
        if self.turns == 1:
            return Step(messages=(say("Sure?", role="user"),), parts={"asked": 1.0}, reward=0.25)
        return Step(done=True, reward=0.5, parts={"sure": float(reply.content == "yes")})


class Asking:
    """A family whose episodes have two turns, and tools that its tasks name."""

    domain = "asking"

    def start(self, task: Task) -> Env:
        return Asks(task)


def test_environments_that_ask_back() -> None:
    row = write_row(Task(domain="asking", key="k", messages=(say("Go?", role="user"),)))
    turns = (say("maybe"), say("yes"))
    asking: Any = Asking()
    with served(Model(*(write_items(turn, "x") for turn in turns)).app) as there:
        client = TestClient(create_app([asking], ModelServer(url=there)))
        found = client.post("/run", json=row).json()
        again = client.post("/verify", json=row | {"response": found["response"]}).json()
    assert found["reward"] == again["reward"] == 0.75
    assert found["reward_components"] == again["reward_components"] == {"asked": 1.0, "sure": 1.0}


def test_what_cannot_be_served() -> None:
    with pytest.raises(TaskError, match="each once"):
        create_app([FAMILIES[0], FAMILIES[0]])
    with pytest.raises(TaskError, match="name one or more"):
        create_app([])
    with pytest.raises(TaskError, match="max_rollouts is 0"):
        create_app(FAMILIES, max_rollouts=0)
    tool = {"type": "function", "function": {"name": "verify"}}
    task = Task(domain="asking", key="k", messages=(say("Go?", role="user"),), tools=(tool,))
    asking: Any = Asking()
    found = TestClient(create_app([asking])).post("/seed_session", json=write_row(task))
    assert found.status_code == 400 and "a tool is named verify" in found.json()["detail"]


def test_figures_of_many() -> None:
    rows = [
        {"_ng_task_index": t, "_ng_rollout_index": r, "reward": float(t * r), "right": t == r,
         "response": {"usage": {"total_tokens": 10 * (r + 1)}}, "word": "x"}
        for t in (1, 0) for r in range(3)
    ]  # fmt: skip
    masked = {"_ng_task_index": 0, "_ng_rollout_index": 3, "reward": 9.0, "mask_sample": True}
    client = TestClient(create_app(FAMILIES))
    found = client.post("/aggregate_metrics", json={"verify_responses": [*rows, masked]}).json()
    assert found == aggregate([*rows, masked])
    assert [g["_ng_task_index"] for g in found["group_level_metrics"]] == [0, 1]
    one = found["group_level_metrics"][1]
    assert (one["mean/reward"], one["max/reward"], one["std/reward"]) == (1.0, 2.0, 1.0)
    assert one["median/total_tokens"] == 20.0 and one["min/right"] == 0.0
    assert found["key_metrics"]["mean/reward"] == 0.5
    masked_only = {"_ng_task_index": 7, "reward": 1.0, "mask_sample": True}
    coverage = aggregate([*rows, masked, masked_only])["key_metrics"]
    assert [coverage[f"coverage/{name}"] for name in COVERAGE] == [6, 2, 2, 1]
    assert aggregate([masked_only])["group_level_metrics"] == []
    assert found["agent_metrics"]["num_repeats"] == 4
    assert not any("word" in key or "_ng" in key for key in found["agent_metrics"])
    assert aggregate([]) == {"group_level_metrics": [], "agent_metrics": {}, "key_metrics": {}}
