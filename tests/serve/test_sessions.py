"""Sessions over HTTP, on the engine itself: what is remembered, forked, refused and resumed."""

import asyncio
import json

from aprium.base.records import SamplingParams
from aprium.engine.sessions import Running
from aprium.serve.sessions import Turn, new_turn
from aprium.serve.wire import ChatRequest

QUIET = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 0, "max_tokens": 24}


def chat(client, text, **options):
    body = {"messages": [{"role": "user", "content": text}], **QUIET, **options}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_session_remembers_and_its_fork_goes_its_own_way(serve):
    client = serve()
    made = client.post("/v1/sessions", json={"id": "s"}).json()
    assert made["object"] == "session" and made["num_messages"] == 0
    first = chat(client, "What is 3 + 4?", session="s")["choices"][0]["message"]["content"]
    second = chat(client, "And 2 + 2?", session="s")
    whole = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    plain = client.post("/v1/chat/completions", json={"messages": whole, **QUIET}).json()
    assert second["choices"] == plain["choices"]
    found = client.get("/v1/sessions/s").json()
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"] * 2
    fork = client.post("/v1/sessions/s/fork", json={"id": "t"}).json()
    assert fork["parent"] == "s" and fork["num_tokens"] == found["num_tokens"]
    chat(client, "Spell plum.", session="t")
    assert client.get("/v1/sessions/t").json()["num_messages"] == 6
    assert client.get("/v1/sessions/s").json()["num_messages"] == 4
    assert {s["id"] for s in client.get("/v1/sessions").json()["data"]} == {"s", "t"}
    assert client.delete("/v1/sessions/t").json()["deleted"]
    assert client.get("/v1/sessions/t").status_code == 404


def test_streams_are_remembered_too(serve):
    client = serve()
    client.post("/v1/sessions", json={"id": "s", "messages": [{"role": "system", "content": "Hi"}]})
    body = {"messages": [{"role": "user", "content": "Spell plum."}], **QUIET}
    text = ""
    with client.stream(
        "POST", "/v1/chat/completions", json={**body, "session": "s", "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    messages = client.get("/v1/sessions/s").json()["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[-1]["content"] == text


def test_what_cannot_be_is_refused_with_a_code(serve):
    client = serve()
    post = client.post
    assert post("/v1/sessions", json={"id": "../x"}).status_code == 400
    assert post("/v1/sessions", json={"id": "s"}).status_code == 200
    assert post("/v1/sessions", json={"id": "s"}).status_code == 409
    body = {"messages": [{"role": "user", "content": "x"}], **QUIET}
    assert post("/v1/chat/completions", json={**body, "session": "none"}).status_code == 404
    many = post("/v1/chat/completions", json={**body, "session": "s", "n": 2})
    assert many.status_code == 400 and "fork it" in many.json()["error"]["message"]
    assert post("/v1/sessions/s/resume").status_code == 409
    client.engine.sessions.get("s").busy = True
    busy = post("/v1/chat/completions", json={**body, "session": "s"})
    assert busy.status_code == 409 and busy.json()["error"]["param"] == "session"
    client.engine.sessions.get("s").busy = False
    long = post("/v1/chat/completions", json={**body, "max_tokens": 5000, "session": "s"})
    assert long.status_code == 400 and not client.get("/v1/sessions/s").json()["busy"]
    assert chat(client, "x", session="s")["choices"]


def test_there_are_at_most_so_many_sessions(serve):
    client = serve(max_sessions=2)
    for name in "abc":
        assert client.post("/v1/sessions", json={"id": name}).status_code == 200
    assert client.get("/v1/sessions/a").status_code == 404
    for name in "bc":
        client.engine.sessions.get(name).busy = True
    full = client.post("/v1/sessions", json={"id": "d"})
    assert full.status_code == 503 and "all 2 sessions" in full.json()["error"]["message"]
    response = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 1})
    assert response.status_code == 503
    for name in "bc":
        client.engine.sessions.get(name).busy = False
    quiet = {"reasoning": {"effort": "none"}, "max_output_tokens": 2}
    first = client.post("/v1/responses", json={"input": "x", **quiet}).json()
    for name in "ef":
        assert client.post("/v1/sessions", json={"id": name}).status_code == 200
    assert client.get(f"/v1/responses/{first['id']}").json() == first
    body = {"input": "y", "previous_response_id": first["id"], **quiet}
    gone = client.post("/v1/responses", json=body)
    assert gone.status_code == 404 and "--max-sessions" in gone.json()["error"]["message"]
    assert chat(client, "x", session="f")["choices"]


def test_a_turn_cut_off_is_resumed_by_the_next_server(serve):
    client = serve()
    client.post("/v1/sessions", json={"id": "s"})
    whole = chat(client, "What is 3 + 4?", seed=5, temperature=0.8, return_token_ids=True)
    tokens = tuple(whole["choices"][0]["token_ids"])
    sessions = client.engine.sessions
    record = sessions.get("s")
    body = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], **QUIET}
    request = ChatRequest.model_validate({**body, "seed": 5, "temperature": 0.8})
    params = request.sampling({})
    running = new_turn(request, whole["prompt_token_ids"], params, [])
    running.generated, running.logprobs = tokens[:3], (-1.0,) * 3
    sessions.begin("s", running)  # and the process ends here
    assert record.running is not None
    client = serve()
    cut = client.get("/v1/sessions/s").json()
    assert cut["interrupted"] and cut["messages"] == []
    assert cut["title"] == cut["running_messages"][0]["content"] == "What is 3 + 4?"
    resumed = client.post("/v1/sessions/s/resume").json()
    assert resumed["choices"][0]["message"] == whole["choices"][0]["message"]
    after = client.get("/v1/sessions/s").json()
    assert not after["interrupted"] and after["num_messages"] == 2
    assert after["running_messages"] == [] and after["title"] == "What is 3 + 4?"
    assert after["num_tokens"] == len(whole["prompt_token_ids"]) + len(tokens)


def test_a_client_that_goes_away_leaves_a_turn_to_resume(serve):
    client = serve()
    client.post("/v1/sessions", json={"id": "s"})
    engine = client.engine

    async def leave():
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        running = Running(prompt=(5, 6, 7), params=params)
        turn = Turn(engine, engine.sessions.get("s"), running, thinking=False)
        stream = turn.follow(engine.generate((5, 6, 7), running.params, **turn.options))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    record = engine.sessions.get("s")
    assert record.interrupted and not record.busy
    resumed = client.post("/v1/sessions/s/resume").json()
    assert resumed["usage"]["completion_tokens"] == 400


def test_sessions_belong_to_the_key_that_made_them(serve):
    client = serve()
    alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
    assert client.post("/v1/sessions", json={"id": "s"}, headers=alice).status_code == 200
    assert client.get("/v1/sessions", headers=bob).json()["data"] == []
    for method, path in (
        ("GET", "/v1/sessions/s"),
        ("DELETE", "/v1/sessions/s"),
        ("POST", "/v1/sessions/s/fork"),
        ("POST", "/v1/sessions/s/save"),
        ("POST", "/v1/sessions/s/resume"),
    ):
        assert client.request(method, path, headers=bob).status_code == 404, path
    body = {"messages": [{"role": "user", "content": "x"}], "session": "s", **QUIET}
    assert client.post("/v1/chat/completions", json=body, headers=bob).status_code == 404
    assert client.post("/v1/chat/completions", json=body, headers=alice).status_code == 200
    later = serve()  # the next process knows them, too
    assert later.get("/v1/sessions/s", headers=alice).json()["num_messages"] == 2
    assert later.get("/v1/sessions/s", headers=bob).status_code == 404
