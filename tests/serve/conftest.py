"""A scripted engine with the interface of `AsyncEngine`, and the application over it."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from aprium.base.errors import EngineError, RequestError
from aprium.base.records import Completion, SamplingParams, Timings
from aprium.checkpoint.load import Checkpoint
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig, EngineStats
from aprium.engine.engine import load
from aprium.serve.app import create_app
from aprium.serve.service import ServeConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests import family

END = 11


class FakeEngine:
    """Says `script` (or `script[i]` for continuation `i`) token by token.

    Every token has log-probability -0.5 and the alternatives itself and token 3. `hang` stops
    after the first token until closed; `fail_after` raises after that many tokens.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.load(directory)
        self.template = ChatTemplate.load(directory)
        self.config = SimpleNamespace(model=str(directory), max_num_seqs=4, session_dir=None)
        self.model_config = SimpleNamespace(hidden_size=3)
        self.paused = False
        self.max_model_len = 500
        self.sessions = SimpleNamespace(get=None)
        self.generation_config = {"temperature": 0.5}
        self.failed: EngineError | None = None
        self.script: str | list[str] = "hello there"
        self.hang = False
        self.fail_after: int | None = None
        self.calls: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.thinking = False
        self.options: dict[str, Any] = {}
        self.told: list[str | None] = []
        self.inner: Any = None
        self.drafted = (0, 0)
        self.running = 0
        self.stopped = 0
        self.closed = False

    def generate(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        cache_salt: str = "",
        thinking: bool = False,
        **options: Any,
    ) -> AsyncIterator[Completion]:
        if len(tokens) >= self.max_model_len:
            raise RequestError("the prompt is too long", param="prompt")
        self.calls.append((tuple(tokens), params))
        self.thinking, self.options = thinking, options
        return self._run(tuple(tokens), params, embeds=bool(options.get("pooling")))

    async def _run(
        self, prompt: tuple[int, ...], params: SamplingParams, *, embeds: bool
    ) -> AsyncIterator[Completion]:
        self.running += 1
        try:
            scripts = [self.script] * params.n if isinstance(self.script, str) else self.script
            limit = 1000 if params.max_tokens is None else params.max_tokens
            full = [(*self.tokenizer.encode(text), END) for text in scripts]
            ids = [text[:limit] for text in full]
            for size in range(1, max(map(len, ids)) + 1):
                await asyncio.sleep(0)
                if self.fail_after is not None and size > self.fail_after:
                    raise EngineError("the engine has failed: on purpose")
                for index, text in enumerate(ids):
                    if size <= len(text):
                        yield self._completion(index, prompt, text[:size], text, params)
                if self.hang:
                    await asyncio.Event().wait()
            if limit == 0:
                for index in range(params.n):
                    done = self._completion(index, prompt, (), (), params)
                    vector = (3.0, 0.0, 4.0) if embeds else None
                    yield dataclasses.replace(done, embedding=vector)
        finally:
            self.running -= 1
            self.stopped += 1

    def _completion(
        self,
        index: int,
        prompt: tuple[int, ...],
        tokens: tuple[int, ...],
        text: tuple[int, ...],
        params: SamplingParams,
    ) -> Completion:
        ended = len(tokens) == len(text)
        finish = ("stop" if tokens and tokens[-1] == END else "length") if ended else None
        size, asked = len(prompt), params.prompt_logprobs is not None
        stream = self.tokenizer.stream()
        said = stream.push(tokens) + (stream.flush() if ended else "")
        return Completion(
            text=said,
            tokens=tokens,
            logprobs=(-0.5,) * len(tokens),
            top_logprobs=tuple({t: -0.5, 3: -1.0} for t in tokens) if params.logprobs else (),
            prompt_logprobs=(None, *(-2.0,) * (size - 1)) if asked else None,
            prompt_top_logprobs=(None, *({t: -2.0, 3: -1.0} for t in prompt[1:]))
            if params.prompt_logprobs
            else None,
            prompt_tokens=prompt,
            finish=finish,
            stop_reason=END if finish == "stop" else None,
            index=index,
            drafted=self.drafted[0],
            accepted=self.drafted[1],
            timings=Timings(queue_s=0.5, first_token_s=1.0, total_s=3.0),
        )

    def stats(self) -> EngineStats:
        counts = {field.name: 0 for field in dataclasses.fields(EngineStats)}
        lists = {"drafts_compared": (9, 5), "drafts_accepted": (6, 2), "prefix_misses": {"new": 3}}
        running = {"num_running": min(self.running, 4), "num_waiting": max(self.running - 4, 0)}
        return EngineStats(**counts | lists | running | {"pages_total": 8, "pages_free": 6})

    async def pause(self, paused: bool = True) -> None:
        self.paused = paused

    async def call(self, function: Callable[[Any], Any]) -> Any:
        return function(self.inner)

    async def finish_thinking(self, request_id: str | None = None) -> int:
        self.told.append(request_id)
        return self.running

    async def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family")
    family.write_tokenizer(path)
    family.write_generation_config(path)
    return path


@pytest.fixture
def engine(directory: Path) -> FakeEngine:
    return FakeEngine(directory)


@pytest.fixture
def make_client(engine: FakeEngine) -> Callable[..., TestClient]:
    def make(**options: Any) -> TestClient:
        config = ServeConfig(**{"names": ("toy", "alias"), **options})
        app = create_app(engine, config)  # type: ignore[arg-type]
        return TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client()


@pytest.fixture(scope="session")
def pico() -> Checkpoint:
    return load(EngineConfig(model="pico"))


@pytest.fixture
def serve(pico: Checkpoint, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """A function that starts a server over one directory; each start is a new process'."""
    with contextlib.ExitStack() as stack:

        def start(max_sessions: int = 1024, **options: Any) -> TestClient:
            config = EngineConfig(
                model="pico",
                session_dir=tmp_path,
                max_sessions=max_sessions,
                max_model_len=1024,
                max_num_seqs=4,
            )
            engine = AsyncEngine(config, pico)
            app = create_app(engine, ServeConfig(**{"names": ("pico",), **options}))
            client = stack.enter_context(TestClient(app))
            client.engine = engine  # type: ignore[attr-defined]
            return client

        yield start
