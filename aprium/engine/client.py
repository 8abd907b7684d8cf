"""The Python faces of the engine: `LLM`, which blocks, and `AsyncEngine`, for servers.

Both give `Completion`s that grow: each one holds the whole text, tokens and log-probabilities so
far, and the last of a continuation has `finish` set. Checking of a request happens in the caller's
thread, before anything is queued; decoding and stop strings too, while the owner thread computes.
"""

import asyncio
import dataclasses
import functools
import itertools
import math
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from torch import Tensor

from aprium.base.config import from_dict
from aprium.base.errors import EngineError, RequestError
from aprium.base.records import RECOMMENDED_SAMPLING, Completion, Delta, Request, SamplingParams
from aprium.checkpoint.load import Checkpoint
from aprium.engine.assemble import Assembler
from aprium.engine.config import EngineConfig, EngineStats
from aprium.engine.engine import Engine, load
from aprium.engine.guide import Grammars
from aprium.engine.owner import Owner
from aprium.engine.prompts import Prompt, are_messages, encode_prompt, split_prompts
from aprium.engine.sessions import Sessions
from aprium.ops.sample import derive_seed
from aprium.text.chat import ChatTemplate, starts_in_reasoning
from aprium.text.tokenizer import Tokenizer

T = TypeVar("T")
_ids = itertools.count()
# Tokens that were generated earlier, and their log-probabilities.
Said = tuple[tuple[int, ...], tuple[float, ...]]


class LLM:
    """A model to call from Python.

    `model` is a directory, a hub id, the name of a preset, or a checkpoint loaded before; `options`
    are the other fields of `EngineConfig`. Close it, or use it in a `with` statement, to stop its
    thread; its memory goes with the object. `tokenizer` is None for a model that comes without
    tokenizer files: prompts are then token ids.
    """

    def __init__(self, model: str | Path | Checkpoint, **options: Any) -> None:
        loaded = model if isinstance(model, Checkpoint) else None
        name = str(model) if loaded is None else str(loaded.path or "random weights")
        self.config = from_dict(EngineConfig, {"model": name, **options})
        checkpoint = loaded or load(self.config)
        self.tokenizer, self._template = _text_side(checkpoint)
        self._engine = _make_engine(self.config, checkpoint, self.tokenizer)
        self._owner = Owner(self._engine)
        self.generation_config = checkpoint.generation_config
        self.max_model_len = self._engine.max_model_len
        self._close = weakref.finalize(self, self._owner.close)
        self.sessions = _open_sessions(self._owner, self.config)

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Return the token ids of a prompt, as `generate` takes it."""
        return encode_prompt(
            prompt,
            self.tokenizer,
            self._template,
            tools=tools or (),
            template_kwargs=chat_template_kwargs,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        request_id: str | None = None,
    ) -> list[Completion]:
        """Continue each prompt and return the completions in order.

        A prompt is a string (continued as it is), a list of token ids, or a list of messages
        (`Message`s or mappings, put through the chat template with `tools` and
        `chat_template_kwargs`); `prompts` is one of these or a list. `params` is one for all or
        one each; None takes the model's own defaults. The `n` continuations of a prompt follow
        each other; the prompt is read once for all. Lower `priority` goes first; what is not done
        `deadline_s` seconds from now is given up, with finish "abort". Only calls with the same
        `cache_salt` share what was computed of prompts. `request_id` is for `finish_thinking`; of
        reasoning, which a guide waits for and budgets end, only messages know. Raises RequestError
        for a request that cannot be served (nothing runs then), EngineError when the engine has
        failed or is closed.
        """
        split = split_prompts(prompts)
        if not isinstance(params, Sequence):
            _check_params(params)
            params = [params] * len(split)
        if len(params) != len(split):
            raise RequestError(
                f"{len(params)} params for {len(split)} prompts: give one, or one each",
                param="params",
            )
        jobs = _Jobs(self._owner, self.generation_config, self.tokenizer)
        for prompt, some in zip(split, params, strict=True):
            _check_params(some)
            tokens = self.encode(prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
            jobs.add(
                tokens,
                some,
                request_id,
                priority=priority,
                deadline_s=deadline_s,
                cache_salt=cache_salt,
                thinking=are_messages(prompt) and self.opens_reasoning(tokens),
            )
        for _ in self._run(jobs):
            pass
        return jobs.chosen()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Iterator[Completion]:
        """Continue one prompt and yield the completion as it grows.

        Each one is whole so far; the last of a continuation has `finish` set, and `index` tells
        the `n` continuations apart. Closing the iterator stops the generation. Errors as for
        `generate`, raised by the call itself.
        """
        _check_params(params)
        _check_streams(params)
        tokens = self.encode(prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
        thinking = are_messages(prompt) and self.opens_reasoning(tokens)
        return self.stream_tokens(tokens, params, request_id=request_id, thinking=thinking)

    def stream_tokens(
        self,
        tokens: tuple[int, ...],
        params: SamplingParams | None,
        said: Said = ((), ()),
        **options: Any,
    ) -> Iterator[Completion]:
        """Continue `tokens` and yield the completion as it grows, at least once.

        `said` is what an earlier run had come to, with which this one begins; its last token is
        chosen anew, so that an end is found again. `options` are other fields of a `Request`.
        """
        said = said[0][:-1], said[1][:-1]
        jobs = _Jobs(self._owner, self.generation_config, self.tokenizer)
        jobs.add(tokens, params, said=said, **options)
        return self._grow(jobs, bool(said[0]))

    def _grow(self, jobs: "_Jobs", begun: bool) -> Iterator[Completion]:
        """Yield what there is already, where an earlier run has `begun`, then what comes."""
        if begun:
            yield from (a.completion() for a in jobs.assemblers.values())
        for batch in self._run(jobs):
            yield from (a.completion() for a in batch)

    def opens_reasoning(self, tokens: Sequence[int]) -> bool:
        """Say whether a prompt that the chat template made ends inside the reasoning."""
        assert self.tokenizer is not None
        return starts_in_reasoning(self.tokenizer.decode(tokens[-8:], skip_special_tokens=False))

    def finish_thinking(self, request_id: str | None = None) -> int:
        """Close the reasoning of running continuations at their next token.

        Of those with `request_id`, or of all; callable from any thread. Returns how many had any.
        """
        finish = functools.partial(Engine.finish_thinking, request_id=request_id)
        return self._owner.call(finish).result()

    def score(self, tokens: Sequence[int] | str) -> list[float | None]:
        """Return the natural-log probability of each token given those before it.

        Entry 0 is None: nothing comes before the first token.
        """
        ids = self.encode(tokens)
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
        (completion,) = self.generate([ids], params)
        assert completion.prompt_logprobs is not None
        return list(completion.prompt_logprobs)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["last", "mean"] = "last",
        normalize: bool = True,
    ) -> list[list[float]]:
        """Return a vector of the model's width for each prompt, from its last hidden states.

        That of the last token, or the mean of all; with `normalize` of length 1. The models are
        trained to write, not to embed: how good the vectors are is the model's business.
        """
        jobs = _Jobs(self._owner, self.generation_config, self.tokenizer)
        for prompt in split_prompts(prompts):
            tokens = self.encode(prompt)
            jobs.add(tokens, SamplingParams(max_tokens=0, temperature=0), pooling=pooling)
        for _ in self._run(jobs):
            pass
        found = [list(c.embedding or ()) for c in jobs.chosen()]
        if not normalize:
            return found
        lengths = [math.hypot(*vector) or 1.0 for vector in found]
        return [[x / size for x in vector] for vector, size in zip(found, lengths, strict=True)]

    def update_weights(
        self, source: str | Path | Mapping[str, Tensor], *, recompute: bool = False
    ) -> int:
        """Replace weights between two steps; returns their version (see `Engine`)."""
        update = functools.partial(Engine.update_weights, source=source, recompute=recompute)
        return self._owner.call(update).result()

    def stats(self) -> EngineStats:
        """Return the engine's gauges and counters."""
        return self._engine.stats()

    def close(self) -> None:
        """Stop the engine; unfinished generations of other threads fail with EngineError."""
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, jobs: "_Jobs") -> "Iterator[list[Assembler]]":
        """Submit `jobs` and yield what each arrival of deltas changed, until all have ended."""
        inbox: queue.SimpleQueue[list[Delta] | EngineError] = queue.SimpleQueue()
        try:
            jobs.submit(inbox.put)
            while jobs.open:
                yield jobs.push(inbox.get())
        finally:
            jobs.abort()


class AsyncEngine:
    """An engine for an event loop; the server drives this one.

    `tokenizer` and `template` are None for a model without tokenizer files.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint | None = None) -> None:
        self.config = config
        checkpoint = checkpoint or load(config)
        self.tokenizer, self.template = _text_side(checkpoint)
        self._engine = _make_engine(config, checkpoint, self.tokenizer)
        self._owner = Owner(self._engine)
        self.generation_config = checkpoint.generation_config
        self.model_config = checkpoint.config
        self.max_model_len = self._engine.max_model_len
        self._close = weakref.finalize(self, self._owner.close)
        self.sessions = _open_sessions(self._owner, config)

    @property
    def failed(self) -> EngineError | None:
        """Why the engine has stopped, or None while it is well."""
        return self._owner.failed

    def generate(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
        *,
        whole: bool = False,
        **options: Any,
    ) -> AsyncIterator[Completion]:
        """Continue `tokens` and yield the completion as it grows, or only when it is `whole`.

        Each one is whole so far; `index` tells the `n` continuations apart and the last of each
        has `finish` set. Closing the iterator (or cancelling the task in it) stops the generation.
        The call itself raises RequestError when the request cannot be served, EngineError when the
        engine has failed or is closed. `request_id` serves to recognise it in messages, and for
        `finish_thinking`. What was computed of a prompt is shared with requests of the same
        `cache_salt`; `options` are other fields of a `Request`, such as `priority`, or `thinking`
        where the prompt opened the reasoning. With `best_of` the chosen ones come at the end.
        """
        jobs = _Jobs(self._owner, self.generation_config, self.tokenizer)
        jobs.add(tuple(tokens), params, request_id, cache_salt=cache_salt, **options)
        return self._run(jobs, whole)

    async def finish_thinking(self, request_id: str | None = None) -> int:
        """Close the reasoning of running continuations at their next token; see `LLM`."""
        return await self.call(functools.partial(Engine.finish_thinking, request_id=request_id))

    async def pause(self, paused: bool = True) -> None:
        """Compute no step from now on, or go on; requests stay where they are, and new ones wait.

        Deadlines are seen to when it goes on.
        """
        await self.call(lambda engine: setattr(engine, "paused", paused))

    @property
    def paused(self) -> bool:
        """Whether no steps are computed for now."""
        return self._engine.paused

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Let the engine's thread call `function` between two steps, and return what it returns."""
        return await asyncio.wrap_future(self._owner.call(function))

    def stats(self) -> EngineStats:
        """Return the engine's gauges and counters."""
        return self._engine.stats()

    async def close(self) -> None:
        """Stop the engine; unfinished generations fail with EngineError."""
        await asyncio.to_thread(self._close)

    async def _run(self, jobs: "_Jobs", whole: bool) -> AsyncIterator[Completion]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[list[Delta] | EngineError] = asyncio.Queue()

        def sink(batch: list[Delta] | EngineError) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, batch)
            except RuntimeError:  # the loop was closed without closing this iterator
                jobs.abort()

        try:
            jobs.submit(sink)
            while jobs.open:
                changed = jobs.push(await inbox.get())
                while not inbox.empty():  # a slow reader gets the latest, not every step
                    changed += jobs.push(inbox.get_nowait())
                for assembler in dict.fromkeys(changed) if not jobs.chooses else ():
                    if not whole or assembler.finish is not None:
                        yield assembler.completion()
            for completion in jobs.chosen() if jobs.chooses else ():
                yield completion
        finally:
            jobs.abort()


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling that a checkpoint's `generation_config.json` recommends."""
    names = RECOMMENDED_SAMPLING
    given = {n: generation_config[n] for n in names if generation_config.get(n) is not None}
    return SamplingParams(**given)


def _check_params(params: Any) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params is {params!r}: give SamplingParams(...)", param="params")


def _check_streams(params: SamplingParams | None) -> None:
    if params is not None and (params.best_of or 0) > params.n:
        raise RequestError(
            f"best_of is {params.best_of} and n is {params.n}: which are best is known only at the "
            "end, do not stream",
            param="best_of",
        )


def _mean_logprob(completion: Completion) -> float:
    return sum(completion.logprobs) / max(len(completion.logprobs), 1)


class _Jobs:
    """Continuations submitted together: their requests, and what has become of each."""

    def __init__(
        self, owner: Owner, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> None:
        self._owner = owner
        self._generation_config = generation_config
        self._tokenizer = tokenizer
        self._requests: list[Request] = []
        self._groups: list[tuple[int, list[str]]] = []  # n, and the ids of what is made for it
        self.assemblers: dict[str, Assembler] = {}
        self.open: set[str] = set()

    def add(
        self,
        tokens: tuple[int, ...],
        params: SamplingParams | None,
        request_id: str | None = None,
        said: Said = ((), ()),
        **options: Any,
    ) -> None:
        """Add the continuations of a prompt; `options` are fields of `Request`.

        The first reads the prompt and the others follow. `said` are tokens, and their
        log-probabilities, of an earlier run that is gone on with. Raises RequestError when they
        can never be served, EngineError when the engine has stopped.
        """
        if params is None:
            params = default_params(self._generation_config)
            # Nobody asked for this number, so it gives way to the context.
            room = max(1, self._owner.engine.max_model_len - len(tokens))
            params = dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "this model has no tokenizer files: use stop_token_ids instead of stop",
                param="stop",
            )
        name = f"{request_id or 'request'}-{next(_ids)}"
        count = params.best_of or params.n
        ids = [f"{name}-{index}" for index in range(count)]
        for index, id in enumerate(ids):
            seed = None if params.seed is None else derive_seed(params.seed, index)
            request = Request(
                id=id,
                tokens=tokens,
                params=dataclasses.replace(params, n=1, best_of=None, seed=seed),
                leads=count > 1 and index == 0,
                follows=ids[0] if index else None,
                generated=said[0],
                **options,
            )
            if index == 0:
                self._owner.check(request)
            self.assemblers[id] = assembler = Assembler(
                prompt_tokens=tokens,
                stop=params.stop,
                min_tokens=params.min_tokens,
                stream=None if self._tokenizer is None else self._tokenizer.stream(),
                index=index,
            )
            if said[0]:
                assembler.push(Delta(id=id, tokens=said[0], logprobs=said[1]))
            if assembler.finish is None:
                self._requests.append(request)
        self._groups.append((params.n, ids))

    @property
    def chooses(self) -> bool:
        """Whether more are made than given."""
        return any(n < len(ids) for n, ids in self._groups)

    def chosen(self) -> list[Completion]:
        """Return the completions of each prompt in turn, of too many the likeliest ones first."""
        found: list[Completion] = []
        for n, ids in self._groups:
            made = [self.assemblers[id].completion() for id in ids]
            if n < len(made):
                made.sort(key=_mean_logprob, reverse=True)
                made = [dataclasses.replace(c, index=i) for i, c in enumerate(made[:n])]
            found += made
        return found

    def submit(self, sink: Any) -> None:
        """Hand all requests to the engine."""
        self._owner.submit(self._requests, sink)
        self.open = {request.id for request in self._requests}

    def push(self, batch: list[Delta] | EngineError) -> list[Assembler]:
        """Book deltas and return the continuations they changed; raises an engine's failure."""
        if isinstance(batch, EngineError):
            self.open.clear()
            # A new one for each reader: an exception collects the traceback of who raises it.
            raise EngineError(str(batch)) from batch.__cause__
        changed = []
        for delta in batch:
            if delta.id not in self.open:
                continue
            assembler = self.assemblers[delta.id]
            assembler.push(delta)
            changed.append(assembler)
            if assembler.finish is not None:
                self.open.discard(delta.id)
                if assembler.cut:
                    self._owner.abort([delta.id])
        return changed

    def abort(self) -> None:
        """Stop what has not ended."""
        if self.open:
            self._owner.abort(sorted(self.open))
            self.open = set()


def _open_sessions(owner: Owner, config: EngineConfig) -> Sessions:
    try:
        return Sessions(owner, config.session_dir, config.max_sessions)
    except BaseException:
        owner.close()
        raise


def _text_side(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    directory = checkpoint.path
    if directory is None or not (Path(directory) / "tokenizer.json").is_file():
        return None, None
    return Tokenizer.load(directory), ChatTemplate.load(directory)


def _make_engine(
    config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> Engine:
    if tokenizer is None:
        return Engine(config, checkpoint)
    grammars = Grammars(tokenizer, checkpoint.config.vocab_size)
    return Engine(config, checkpoint, tokenizer.eos_token_ids, grammars)
