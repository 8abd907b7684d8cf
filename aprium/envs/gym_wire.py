"""Requests and replies of NeMo-Gym's servers as they come over HTTP, unknown fields kept."""

import dataclasses
from typing import Any

from pydantic import BaseModel, ConfigDict

from aprium.base.records import Message
from aprium.text.items import read_arguments, read_items


class CreateParams(BaseModel):
    """What a model is asked: the fields of a request to `/v1/responses`."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]


class RunRequest(BaseModel):
    """The body of `/seed_session` and `/run`: a row."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    responses_create_params: CreateParams


class ModelResponse(BaseModel):
    """What a model answered, over all its turns."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    output: list[dict[str, Any]]
    status: str | None = None
    incomplete_details: dict[str, Any] | None = None


class VerifyRequest(RunRequest):
    """The body of `/verify`: a row with the response to grade."""

    response: ModelResponse


class VerifyResponse(VerifyRequest):
    """A graded row; `mask_sample` says that the reward measures nothing, and why."""

    reward: float
    reward_components: dict[str, float]
    mask_sample: bool = False
    failure_kind: str | None = None
    failure_reason: str | None = None


class AggregateRequest(BaseModel):
    """The body of `/aggregate_metrics`: graded rows."""

    verify_responses: list[dict[str, Any]]


def answered_turns(response: ModelResponse) -> list[Message]:
    """Return the turns of the model that count: none that was cut, no call that cannot be made."""
    messages = list(read_items(response.output))
    if (response.incomplete_details or response.status == "incomplete") and messages:
        messages.pop()
    turns: list[Message] = []
    for message in messages:
        calls = tuple(c for c in message.tool_calls if read_arguments(c.arguments) is not None)
        if message.role == "assistant" and (calls or not message.tool_calls):
            turns.append(dataclasses.replace(message, tool_calls=calls))
    return turns
