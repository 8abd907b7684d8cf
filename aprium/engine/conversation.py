"""A session as Python has it: say something, fork, save, load, resume.

    session = Session(llm)
    session.chat("What is 3 + 4?").text
    other = session.fork()

What was said is kept as messages, and rendered anew by the checkpoint's template at each turn; or
with `generate` as plain tokens that each turn goes on from exactly.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aprium.base.errors import RequestError, SessionError
from aprium.base.records import Completion, Message, SamplingParams
from aprium.engine.client import LLM, default_params
from aprium.engine.sessions import Running, SessionRecord
from aprium.text.messages import read_message
from aprium.text.parse import parse


class Session:
    """A conversation with `llm`; `id` finds it again, also in a later process with `session_dir`.

    With an `id` that exists this is that session, else a new one which begins with `messages`.
    One turn runs at a time; another meanwhile raises SessionError.
    """

    def __init__(
        self,
        llm: LLM,
        id: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] = (),
        cache_salt: str = "",
    ) -> None:
        self._llm, self._book = llm, llm.sessions
        known = {record.id: record for record in self._book.all()}
        if id in known:
            self._record = known[id]
        else:
            begun = [read_message(m) for m in messages]
            self._record = self._book.create(id, begun, cache_salt)

    @classmethod
    def load(cls, llm: LLM, path: str | Path, id: str | None = None) -> "Session":
        """Take up a session saved to `path`, with its state where `llm` has the same weights."""
        return cls._of(llm, llm.sessions.load(Path(path), id))

    @classmethod
    def _of(cls, llm: LLM, record: SessionRecord) -> "Session":
        session = cls.__new__(cls)
        session._llm, session._book, session._record = llm, llm.sessions, record
        return session

    @property
    def id(self) -> str:
        """Its name."""
        return self._record.id

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said, as messages."""
        return tuple(self._record.messages)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer of the last turn."""
        return self._record.tokens

    @property
    def interrupted(self) -> bool:
        """Whether its last turn was cut off, by a crash, and can be resumed."""
        return self._record.interrupted

    def chat(
        self,
        message: str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Say something, or give tool results, and return the answer, which is remembered."""
        if isinstance(message, str):
            message = Message(role="user", content=message)
        many = [message] if isinstance(message, Message | Mapping) else message
        new, turn = [read_message(m) for m in many], self._record.turns
        options = {"tools": list(tools), "chat_template_kwargs": dict(chat_template_kwargs or {})}
        prompt = self._llm.encode([*self._record.messages, *new], **options)
        return self._turn(Running(prompt=prompt, params=self._params(params, prompt),
                                  messages=new, options=options, turn=turn))  # fmt: skip

    def generate(
        self, prompt: str | Sequence[int] = (), params: SamplingParams | None = None
    ) -> Completion:
        """Go on from the exact tokens of the last turn, `prompt` after them, without messages."""
        new, turn = self._llm.encode(prompt) if prompt else (), self._record.turns
        tokens = (*self._record.tokens, *new)
        params = self._params(params, tokens)
        return self._turn(Running(prompt=tokens, params=params, turn=turn))

    def resume(self) -> Completion:
        """Finish the turn that was cut off, from where it was; the tokens are those it would have.

        Raises SessionError where no turn was cut off.
        """
        running = self._record.running
        if running is None or not self.interrupted:
            raise SessionError(f"session {self.id!r} has no turn to resume", "file")
        return self._turn(running)

    def fork(self, id: str | None = None) -> "Session":
        """Return another session with the same past; pages and states are shared."""
        return self._of(self._llm, self._book.fork(self.id, id))

    def save(self, path: str | Path | None = None) -> Path:
        """Write it down, with its state to the file `path`, or to `session_dir`; returns where."""
        return self._book.save(self.id, None if path is None else Path(path))

    def delete(self) -> None:
        """Forget it."""
        self._book.delete(self.id)

    def _params(self, params: SamplingParams | None, prompt: Sequence[int]) -> SamplingParams:
        """Return `params` with everything settled that a resumed turn must have alike."""
        if params is None:
            room = max(self._llm.max_model_len - len(prompt), 1)
            params = default_params(self._llm.generation_config)
            params = dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
        if params.n > 1 or (params.best_of or 1) > 1:
            raise RequestError(f"n is {params.n}: a session has one answer, fork it", param="n")
        seed = random.getrandbits(62) if params.seed is None else params.seed
        return dataclasses.replace(params, seed=seed)

    def _turn(self, running: Running) -> Completion:
        record = self._book.begin(self.id, running)
        last: Completion | None = None
        try:
            for last in self._llm.stream_tokens(
                running.prompt,
                running.params,
                (running.generated, running.logprobs),
                cache_salt=record.cache_salt,
                keep_every=self._book.keep_every,
                thinking=bool(running.messages) and self._llm.opens_reasoning(running.prompt),
            ):
                self._book.note(record, last)
        finally:
            done = last if last is not None and last.finish is not None else None
            answer = self._answer(running, done) if running.messages and done else None
            self._book.end(record, done, answer)
        assert done is not None
        return done

    def _answer(self, running: Running, completion: Completion) -> Message:
        parsed = parse(
            completion.text,
            thinking=self._llm.opens_reasoning(running.prompt),
            tools=running.options.get("tools", ()),
        )
        return Message(
            role="assistant",
            content=parsed.content,
            reasoning=parsed.reasoning,
            tool_calls=parsed.tool_calls,
        )
