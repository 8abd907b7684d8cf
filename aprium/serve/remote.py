"""A server somewhere else that talks OpenAI's API: to chat with in a terminal, and as a `Policy`.

Reasoning is read by either of its names, `reasoning` and `reasoning_content`. Thinking is switched
as this family's servers understand it; others ignore the field.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import httpx2

from aprium.base.errors import EngineError, RequestError
from aprium.base.records import Completion, Message, SamplingParams, TopLogprobs
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
        base, headers = _address(url), _headers(key)
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


class RemotePolicy:
    """Model `model` on the server at `url`, as a `Policy` over token ids.

    The server must return token ids (`return_token_ids`) and log-probabilities from
    /v1/completions, as Aprium and vLLM do. `key` is the server's, `options` more fields of each
    request. `weight_version` is what the weights there are called; who changes them sets it. Use it
    in an `async with`, or close it. Raises RequestError for what is no address.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        options: Mapping[str, Any] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = httpx2.AsyncClient(
            base_url=_address(url), headers=_headers(key), timeout=_TIMEOUT, transport=transport
        )
        self._url, self._model, self._options = url, model, dict(options or {})
        self.weight_version = 0

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; see `Policy`. Raises RequestError, EngineError."""
        version = self.weight_version
        choice = await self._ask({"prompt": list(tokens), **_sampling(params)})
        try:
            ids = tuple(choice["token_ids"])
            logprobs = tuple(choice["logprobs"]["token_logprobs"])
            text, finish = choice["text"], choice["finish_reason"]
        except (LookupError, TypeError) as error:
            raise EngineError(
                f"{self._url} returns no token ids or log-probabilities: it must honour "
                "return_token_ids and logprobs"
            ) from error
        if len(ids) != len(logprobs):
            raise EngineError(
                f"{self._url} returns {len(ids)} token ids and {len(logprobs)} log-probabilities"
            )
        return Completion(
            text=text,
            tokens=ids,
            logprobs=logprobs,
            finish=finish if finish in ("stop", "length", "abort") else "stop",
            prompt_tokens=tuple(tokens),
            stop_reason=choice.get("stop_reason"),
            weight_spans=((version, len(ids)),),
        )

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it; see `Policy`."""
        body = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        choice = await self._ask({"prompt": list(tokens), **body})
        scores = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        if len(scores) < len(tokens):
            raise EngineError(
                f"{self._url} returns {len(scores)} log-probabilities for {len(tokens)} tokens: it "
                "must honour echo with logprobs"
            )
        return list(scores[: len(tokens)])

    async def score_top(
        self, tokens: Sequence[int], count: int
    ) -> tuple[list[float | None], list[TopLogprobs]]:
        """Return what `score` does, and at each token the `count` most probable ones.

        Before the first token there are none.
        """
        body = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": count}
        choice = await self._ask({"prompt": list(tokens), **body})
        rows = choice.get("prompt_logprobs") or ()
        try:
            if len(rows) != len(tokens):
                raise ValueError(f"{len(rows)} entries for {len(tokens)} tokens")
            found = [
                {int(id): float(entry["logprob"]) for id, entry in (row or {}).items()}
                for row in rows
            ]
            scores = [
                None if row is None else some[token]
                for row, some, token in zip(rows, found, tokens, strict=True)
            ]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self._url} returns no log-probabilities of the prompt by token id ({error}): it "
                "must honour prompt_logprobs"
            ) from error
        return scores, [_most_probable(some, count) for some in found]

    async def tokenize(self, text: str) -> list[int] | None:
        """Return the token ids of `text` there; None from a server that does not say."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            response = await self._client.post("/tokenize", json=body)
        except httpx2.HTTPError as error:
            raise EngineError(f"{self._url} does not answer: {error!r}") from error
        if response.status_code >= 500 and response.status_code != 501:
            raise EngineError(f"{self._url} answers {_complaint(response)}")
        try:
            return [int(id) for id in response.json()["tokens"]]
        except (ValueError, LookupError, TypeError):
            return None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> "RemotePolicy":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self._model, "return_token_ids": True, **body, **self._options}
        try:
            response = await self._client.post("/v1/completions", json=body)
        except httpx2.HTTPError as error:
            raise EngineError(f"{self._url} does not answer: {error!r}") from error
        if response.status_code != 200:
            kind = RequestError if 400 <= response.status_code < 429 else EngineError
            raise kind(f"{self._url} answers {_complaint(response)}")
        try:
            return response.json()["choices"][0]
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"{self._url} answers with no completion") from error


def _most_probable(found: Mapping[int, float], count: int) -> TopLogprobs:
    """Return the `count` most probable tokens, without the prompt's own where it is not of them."""
    return dict(sorted(found.items(), key=lambda item: -item[1])[:count])


# Fields of `SamplingParams` that servers spell the same.
_SPELLED = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "stop"),
    *("stop_token_ids", "ignore_eos", "seed"),
)


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Return the fields of a request; what is left at its default is left out but for three."""
    if params.max_tokens is None:
        raise RequestError("max_tokens is None: say how many tokens", param="max_tokens")
    default = SamplingParams()
    changed = {
        f.name for f in fields(params) if getattr(params, f.name) != getattr(default, f.name)
    }
    guide = params.guide
    lost = changed - {*_SPELLED, "logprobs", "logit_bias", "guide", "thinking_grace"}
    if lost or (guide is not None and guide.kind == "tools"):
        name = min(lost, default="guide")
        raise RequestError(
            f"{name} cannot be asked of a remote policy: leave it out, or use the embedded engine",
            param=name,
        )
    always = {"max_tokens", "temperature", "top_p"}
    body = {name: getattr(params, name) for name in _SPELLED if name in changed | always}
    body["logprobs"] = params.logprobs or 0
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if guide is not None:
        value = json.loads(guide.value) if guide.kind in ("json", "choice") else guide.value
        body["structured_outputs"] = {guide.kind: value}
    return body


def _address(url: str) -> str:
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise RequestError(f"{url} is no address: write it as http://HOST:PORT", param="url")
    return base


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


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
