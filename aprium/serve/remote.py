"""A server somewhere else that talks OpenAI's chat, as somebody to talk to in a terminal.

Reasoning is read by either of its names, `reasoning` and `reasoning_content`. Thinking is switched
as this family's servers understand it; others ignore the field.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx2

from aprium.base.errors import EngineError, RequestError
from aprium.base.records import Message
from aprium.serve.terminal import Said
from aprium.text.parse import Event

_TIMEOUT = httpx2.Timeout(600.0, connect=10.0)


class RemoteSpeaker:
    """A model on the server at `url`, the first it names unless `model` is given.

    `key` is the server's, `options` fields of the request. Raises RequestError where there is no
    such server.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if not base.startswith(("http://", "https://")):
            raise RequestError(f"{url} is no address: write it as http://HOST:PORT", param="url")
        self._client = httpx2.Client(base_url=base, headers=headers, timeout=_TIMEOUT)
        self._url, self._options = url, dict(options or {})
        try:
            self._model = model or self._first_model()
        except BaseException:
            self._client.close()
            raise

    def _first_model(self) -> str:
        try:
            response = self._client.get("/v1/models")
            if response.status_code != 200:
                raise RequestError(f"{self._url} answers {_complaint(response)}", param="url")
            return response.json()["data"][0]["id"]
        except httpx2.HTTPError as error:
            raise RequestError(f"{self._url} does not answer: {error}", param="url") from error
        except (ValueError, LookupError, TypeError) as error:
            raise RequestError(
                f"{self._url} names no models: it is no OpenAI-compatible server", param="url"
            ) from error

    def answer(self, messages: Sequence[Message], thinking: bool) -> Iterator[Said]:
        """Yield the answer as it comes."""
        body = {
            "model": self._model,
            "messages": [_wire(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": thinking},
            **self._options,
        }
        begun, said = time.perf_counter(), Said(events=[])
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise RequestError(f"{self._url} answers {_complaint(response)}")
                for line in response.iter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    if self._read(json.loads(line.removeprefix("data:")), said, begun):
                        yield said
                        said.events = []
        except httpx2.HTTPError as error:
            raise EngineError(f"{self._url} has gone away: {error}") from error
        yield said

    def _read(self, chunk: dict[str, Any], said: Said, begun: float) -> bool:
        """Take a chunk of the stream; say whether there is something new to show."""
        if "error" in chunk:
            raise EngineError(f"{self._url}: {chunk['error'].get('message')}")
        if chunk.get("usage"):
            said.num_tokens = chunk["usage"].get("completion_tokens", said.num_tokens)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content")
            if reasoning:
                said.events.append(Event(kind="reasoning", text=reasoning))
            if delta.get("content"):
                said.events.append(Event(kind="content", text=delta["content"]))
            said.finish = choice.get("finish_reason") or said.finish
        if said.events and not said.first_token_s:
            said.first_token_s = time.perf_counter() - begun
        return bool(said.events)

    def __enter__(self) -> "RemoteSpeaker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()


def _wire(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.reasoning:
        found["reasoning_content"] = message.reasoning
    return found


def _complaint(response: httpx2.Response) -> str:
    """Return status and message of an error."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}"
