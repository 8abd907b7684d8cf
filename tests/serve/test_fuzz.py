"""Whatever the body, the server answers with JSON and never with a failure of its own."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from aprium.serve.wire import _REFUSED, ChatRequest, CompletionRequest

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**40, 2**63, -(2**70), 0.5, 1e300, "", "auto", "\ud800", "x" * 50])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JUNK},
        optional={
            "content": st.text(max_size=9) | JUNK,
            "reasoning": st.text(max_size=9) | JUNK,
            "tool_calls": JUNK
            | st.lists(
                st.fixed_dictionaries(
                    {"function": st.fixed_dictionaries({"name": st.text(), "arguments": JUNK})}
                )
            ),
            "tool_call_id": JUNK,
        },
    ),
    max_size=3,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.text(min_size=1, max_size=3)},
                optional={"parameters": JUNK | st.fixed_dictionaries({"properties": JUNK})},
            ),
        }
    ),
    max_size=2,
)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "tools": TOOLS | JUNK,
    "prompt": st.text(max_size=9) | st.lists(st.integers(0, 500), max_size=5) | JUNK,
    "model": st.none() | JUNK,
}


def bodies(model: type[Any], required: str) -> st.SearchStrategy[dict[str, Any]]:
    names = [*model.model_fields, *_REFUSED]
    some = {name: SPECIAL.get(name, JUNK) for name in names if name != required}
    return st.fixed_dictionaries({required: SPECIAL[required]}).flatmap(
        lambda first: st.lists(st.sampled_from(sorted(some)), max_size=5, unique=True).flatmap(
            lambda chosen: st.fixed_dictionaries({name: some[name] for name in chosen}).map(
                lambda rest: {**first, **rest}
            )
        )
    )


@pytest.mark.parametrize(
    ("path", "model", "required"),
    [
        ("/v1/chat/completions", ChatRequest, "messages"),
        ("/v1/completions", CompletionRequest, "prompt"),
        ("/tokenize", ChatRequest, "messages"),
    ],
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_breaks_the_server(
    client: TestClient, path: str, model: type[Any], required: str, data: st.DataObject
) -> None:
    body = data.draw(bodies(model, required))
    headers = {"content-type": "application/json"}
    response = client.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"InternalServerError"' not in response.text
