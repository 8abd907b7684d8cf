"""Teachers: any number of models that say how likely they find what the student wrote.

Each domain has one teacher: a checkpoint, a LoRA adapter over one, a model on a server, or the
student itself as it was. What waits for the same weights is scored together, so that engines (see
`rl/residents.py`) are opened, and switched from one adapter to another, as seldom as may be. A
server that fails or is slow costs scores, never the trajectory; one that fails all the time is an
error.
"""

import asyncio
import copy
import os
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2

from aprium.base.errors import ApriumError, ConfigError, EngineError, RequestError
from aprium.base.log import get_logger
from aprium.base.memory import available_bytes
from aprium.base.records import (
    Completion,
    SamplingParams,
    TeacherScores,
    TopLogprobs,
    Trajectory,
)
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import load_checkpoint
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.quantize.merge import Overlay
from aprium.rl.residents import Base, Residents, Scores, TeacherWeights
from aprium.serve.remote import RemotePolicy
from aprium.text.tokenizer import Tokenizer
from aprium.train import lora

log = get_logger("rl")
Answer = TypeVar("Answer")
SELF = "self"  # the student as it is at the start of a round, as its own teacher
_PROBED = 512  # tokens that a server is asked to encode, to see that it has the student's


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """Model `model` on the server at `url`, as Aprium and vLLM serve it.

    Its key is in the environment variable `key_variable`. What is not answered in `timeout_s` or
    fails is asked again up to `retries` times, after pauses that double; at most `concurrency`
    questions, to score or to play a turn, are under way.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout_s: float = 120.0
    retries: int = 4
    concurrency: int = 16

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("timeout_s", 1e-3), ("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"remote.{name} is {getattr(self, name)}: it must be at least {least}"
                )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher: a `checkpoint`, with an `adapter` over it or without, or a `remote` one."""

    name: str
    checkpoint: str | None = None
    adapter: Path | None = None
    remote: RemoteConfig | None = None

    def __post_init__(self) -> None:
        """Check that it is one of the kinds."""
        if not self.name or self.name == SELF:
            raise ConfigError(
                f"a teacher is named {self.name!r}: {SELF!r} is the student itself, give another"
            )
        if (self.checkpoint is None) == (self.remote is None):
            raise ConfigError(f"teacher {self.name!r}: give either checkpoint or remote")
        if self.adapter is not None and self.checkpoint is None:
            raise ConfigError(f"teacher {self.name!r}: adapter goes over a checkpoint, give both")


@dataclass(frozen=True, kw_only=True)
class TeachersConfig:
    """All teachers of a run.

    A domain that names no teacher has `default`, which may be "self"; with `strict` each must name
    one. `top` most probable tokens come with each score. Engines and their states take at most
    `memory_bytes` together (None: half of what is free), each runs `max_num_seqs` sequences of at
    most `max_model_len` tokens (None: the model's), and `max_batch` trajectories are scored before
    others get their turn. After `max_failures` in a row without scores a teacher has failed.
    """

    teachers: tuple[TeacherConfig, ...] = ()
    default: str | None = None
    strict: bool = False
    top: int = 0
    memory_bytes: int | None = None
    max_num_seqs: int = 8
    max_model_len: int | None = None
    max_batch: int = 64
    max_failures: int = 32

    def __post_init__(self) -> None:
        """Check names and ranges."""
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ConfigError(f"teachers are named {', '.join(names)}: give each its own name")
        if self.strict and self.default is not None:
            raise ConfigError(
                f"teachers.default is {self.default!r} and teachers.strict asks every domain to "
                "name its teacher: leave one of the two out"
            )
        for name in ("max_num_seqs", "max_batch", "max_failures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"teachers.{name} is {getattr(self, name)}: it must be positive")
        if self.top < 0:
            raise ConfigError(f"teachers.top is {self.top}: it must not be negative")


@dataclass
class _Tally:
    """What a teacher has done."""

    scored: int = 0
    tokens: int = 0
    lost: int = 0
    failures: int = 0  # in a row
    seconds: float = 0.0


class Teachers:
    """The teachers of `config` for the domains of `routes`, which maps them to names or None.

    `student` is the checkpoint that the round starts from: its tokenizer is the one that all must
    have, and "self" is it. Use it in one event loop, and close it. Raises ConfigError for a domain
    without a teacher where `strict`, for names that are not there, and for a teacher with another
    tokenizer.
    """

    def __init__(
        self,
        config: TeachersConfig,
        *,
        student: str | Path,
        routes: Mapping[str, str | None],
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._config, self._transport = config, transport
        known = {teacher.name: teacher for teacher in config.teachers}
        self._routes = {domain: self._route(domain, name, known) for domain, name in routes.items()}
        used = {name for name in self._routes.values() if name is not None}
        self._student = resolve(student)
        self._tokenizer = Tokenizer.load(self._student)
        self.local: dict[str, TeacherWeights] = {}  # those in this process
        self._remote: dict[str, RemoteTeacher] = {}
        for name in sorted(used):
            self._place(name, known)
        adapted = {weights.base for weights in self.local.values() if weights.adapter}
        self._residents = Residents(
            adapted,
            memory_bytes=config.memory_bytes,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
        )
        self._tallies = {name: _Tally() for name in used}
        self.errors: dict[str, ApriumError] = {}  # why a teacher gave no scores, the last time
        self._waiting: deque[_Job] = deque()
        self._worker: asyncio.Task[None] | None = None

    def _route(
        self, domain: str, name: str | None, known: Mapping[str, TeacherConfig]
    ) -> str | None:
        if name is None and self._config.strict:
            raise ConfigError(
                f"domain {domain!r} has no teacher and teachers.strict asks for one: name it in "
                "the domain, or leave strict out"
            )
        name = name if name is not None else self._config.default
        if name is not None and name != SELF and name not in known:
            raise ConfigError(
                f"domain {domain!r} has teacher {name!r}, which is not there: the teachers are "
                f"{', '.join((*known, SELF))}"
            )
        return name

    def _place(self, name: str, known: Mapping[str, TeacherConfig]) -> None:
        teacher = TeacherConfig(name="?", checkpoint=str(self._student))
        if name != SELF:
            teacher = known[name]
        if teacher.remote is not None:
            self._remote[name] = RemoteTeacher(
                name, teacher.remote, self._tokenizer, self._transport
            )
            return
        assert teacher.checkpoint is not None
        base = resolve(teacher.checkpoint)
        theirs = Tokenizer.load(base)
        different = self._tokenizer.first_difference(theirs)
        if different is not None:
            mine, other = (t.token_bytes(different) for t in (self._tokenizer, theirs))
            raise ConfigError(
                f"the tokenizer of teacher {name!r} ({base}) is not the student's "
                f"({self._student}): token {different} is {other!r} there and {mine!r} here; a "
                "teacher must share the student's vocabulary"
            )
        self.local[name] = TeacherWeights(base.resolve(), teacher.adapter)

    def teacher_of(self, domain: str) -> str | None:
        """Return the name of the teacher of `domain`; raises ConfigError for an unknown domain."""
        if domain not in self._routes:
            raise ConfigError(
                f"no domain {domain!r} was routed to a teacher: those are {', '.join(self._routes)}"
            )
        return self._routes[domain]

    async def score(self, trajectory: Trajectory) -> TeacherScores | None:
        """Return what the domain's teacher makes of the tokens.

        None where it has no teacher, and where the teacher could not say: a server that failed, or
        more tokens than its context. Raises ConfigError for a server with another tokenizer,
        EngineError for a teacher that keeps failing, CheckpointError for one that cannot be opened.
        """
        name, tokens = self.teacher_of(trajectory.domain), trajectory.tokens
        if name is None or len(tokens) < 2:
            return None
        tally, begun = self._tallies[name], time.monotonic()
        try:
            if name in self._remote:
                scores, top = await self._ask_remote(self._remote[name], tokens)
            else:
                scores, top = await self._enqueue(self.local[name], tokens)
        except (RequestError, EngineError) as error:
            if name in self.local and isinstance(error, EngineError):
                raise  # it is in this process: nothing will mend by itself
            self._lose(name, trajectory, error)
            return None
        tally.scored, tally.tokens, tally.failures = tally.scored + 1, tally.tokens + len(tokens), 0
        tally.seconds += time.monotonic() - begun
        return TeacherScores(
            teacher=name,
            logprobs=(0.0, *(0.0 if value is None else value for value in scores[1:])),
            top=({}, *(found or {} for found in top[1:])) if self._config.top else (),
        )

    async def _ask_remote(self, remote: "RemoteTeacher", tokens: Sequence[int]) -> Scores:
        if self._config.top:
            return await remote.score_top(tokens, self._config.top)
        return await remote.score(tokens), ()

    def _lose(self, name: str, trajectory: Trajectory, error: ApriumError) -> None:
        """Book that there are no scores; raises EngineError where there never are."""
        tally = self._tallies[name]
        tally.lost, tally.failures = tally.lost + 1, tally.failures + 1
        self.errors[name] = error
        log.warning("teacher %s gives no scores for %s: %s", name, trajectory.task, error)
        if tally.failures >= self._config.max_failures:
            raise EngineError(
                f"teacher {name!r} has failed {tally.failures} times in a row ({error}): mend "
                "that, then give the same command again"
            ) from error

    async def _enqueue(self, weights: "TeacherWeights", tokens: Sequence[int]) -> Scores:
        job = _Job(weights, tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.future

    async def _work(self) -> None:
        """Score what waits, batch by batch; who waits longest says for which weights."""
        while self._waiting:
            weights = self._waiting[0].weights
            mine = [job for job in self._waiting if job.weights == weights]
            mine = mine[: self._config.max_batch]
            taken = set(map(id, mine))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            mine = [job for job in mine if not job.future.done()]  # the others gave up waiting
            try:
                base = await self._residents.get(weights)
            except Exception as error:
                for job in mine:
                    job.fail(error)
                continue
            await asyncio.gather(*(self._score(base, job) for job in mine))

    async def _score(self, base: "Base", job: "_Job") -> None:
        try:
            found = await base.score(job.tokens, self._config.top)
        except Exception as error:
            job.fail(error)
        else:
            if not job.future.done():
                job.future.set_result(found)

    def figures(self) -> dict[str, dict[str, float]]:
        """Return what each teacher has done: trajectories scored and lost, tokens, seconds."""
        return {
            name: {
                "scored": tally.scored,
                "lost": tally.lost,
                "tokens": tally.tokens,
                "seconds": tally.seconds,
            }
            for name, tally in sorted(self._tallies.items())
        }

    @property
    def resident_bytes(self) -> int:
        """What the open engines take in memory, about: weights and states."""
        return self._residents.num_bytes

    async def close(self) -> None:
        """Stop scoring and give all memory and connections back."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for job in self._waiting:
            job.fail(EngineError("the teachers were closed"))
        self._waiting.clear()
        await self._residents.close()
        for remote in self._remote.values():
            await remote.close()


def load_models(
    config: TeachersConfig, student: str | Path, routes: Mapping[str, str | None]
) -> dict[str, HybridModel]:
    """Return the teacher of each domain as a model in this process, for their whole distributions.

    Each stays in the formats of its file, and adapters over one base share its tensors. Raises
    ConfigError for a domain without one, or one on a server, and for more than
    `teachers.memory_bytes` of weights together.
    """
    limit = config.memory_bytes if config.memory_bytes is not None else available_bytes() // 2
    bases: dict[Path, HybridModel] = {}
    found: dict[TeacherWeights, HybridModel] = {}
    models, taken = {}, 0
    known = Teachers(config, student=student, routes=routes)
    for domain in routes:
        name = known.teacher_of(domain)
        if name is None or name not in known.local:
            what = "none" if name is None else f"{name!r}, which is on a server"
            raise ConfigError(
                f"loss.policy.distillation is 'full' and the teacher of {domain!r} is {what}: give "
                "it a checkpoint, or use 'sampled' or 'top_k'"
            )
        weights = known.local[name]
        if weights.base not in bases:
            taken = _take(taken, Overlay(weights.base).num_bytes, limit, name)
            model = load_checkpoint(weights.base, load="memory").model
            bases[weights.base] = found[TeacherWeights(weights.base, None)] = model
            model.requires_grad_(False)
        if weights not in found:
            assert weights.adapter is not None
            model = _sharing(bases[weights.base])
            factors = lora.load(model, weights.adapter).parameters().values()
            taken = _take(taken, sum(value.nbytes for value in factors), limit, name)
            found[weights] = model.requires_grad_(False)
        models[domain] = found[weights]
    return models


def _take(taken: int, num_bytes: int, limit: int, name: str) -> int:
    """Return `taken` with `num_bytes` more, for teacher `name`; raises ConfigError over `limit`."""
    if taken + num_bytes > limit:
        raise ConfigError(
            f"with teacher {name!r} the teachers of distillation 'full' take {taken + num_bytes} "
            f"bytes and teachers.memory_bytes is {limit}: raise it, or use 'sampled' or 'top_k', "
            "whose teachers are opened in turn"
        )
    return taken + num_bytes


def _sharing(model: HybridModel) -> HybridModel:
    """Return a model of its own over the same tensors, to put factors beside them."""
    parts = (m.parts for m in model.modules() if isinstance(m, Matrix))
    stacks = [value for one in parts for values in one.values() for value in values]
    shared = (*model.parameters(), *model.buffers(), *stacks)
    return copy.deepcopy(model, {id(value): value for value in shared})


@dataclass(eq=False)
class _Job:
    """A sequence to score, and where the scores go."""

    weights: TeacherWeights
    tokens: Sequence[int]
    future: "asyncio.Future[Scores]"

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class RemoteTeacher:
    """A teacher on a server, as a `Policy`, for the tokens of `tokenizer`.

    It is asked again after failures as `config` says, and checked once for having the same tokens.
    Close it. Raises ConfigError where the environment lacks its key. Calls raise RequestError for
    what the server refuses, EngineError when all tries have failed, ConfigError for other tokens.
    """

    def __init__(
        self,
        name: str,
        config: RemoteConfig,
        tokenizer: Tokenizer,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        key = None
        if config.key_variable is not None:
            key = os.environ.get(config.key_variable)
            if not key:
                raise ConfigError(
                    f"teacher {name!r}: the environment has no {config.key_variable}: set it to "
                    "the server's key"
                )
        self._name, self._config, self._tokenizer = name, config, tokenizer
        self._policy = RemotePolicy(config.url, config.model, key=key, transport=transport)
        self._places = asyncio.Semaphore(config.concurrency)
        self._checking = asyncio.Lock()
        self._checked = False

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; see `Policy`."""
        return await self._ask(lambda: self._policy.complete(tokens, params))

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it; see `Policy`."""
        return await self._ask(lambda: self._policy.score(tokens))

    async def score_top(
        self, tokens: Sequence[int], count: int
    ) -> tuple[list[float | None], list[TopLogprobs]]:
        """Return what `score` does, and the `count` most probable tokens at each."""
        return await self._ask(lambda: self._policy.score_top(tokens, count))

    async def _ask(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        async with self._places:
            for attempt in range(self._config.retries + 1):
                try:
                    async with asyncio.timeout(self._config.timeout_s):
                        await self._check()
                        return await call()
                except (EngineError, TimeoutError) as error:
                    if attempt == self._config.retries:
                        cause = str(error) or f"no answer in {self._config.timeout_s:g} s"
                        raise EngineError(f"{self._config.url}: {cause}") from error
                    pause = min(0.25 * 2**attempt, 30.0)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    async def _check(self) -> None:
        """Let the server encode a text of many tokens, and compare with the student's ids."""
        async with self._checking:
            if self._checked:
                return
            step = max(1, self._tokenizer.vocab_size // _PROBED)
            ids = range(0, self._tokenizer.vocab_size, step)
            probe = self._tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "")
            expected, found = self._tokenizer.encode(probe), await self._policy.tokenize(probe)
            if found is None:
                log.warning(
                    "teacher %s has no /tokenize: its tokens are taken to be the student's",
                    self._name,
                )
            elif found != expected:
                raise ConfigError(
                    f"teacher {self._name!r} ({self._config.model} at {self._config.url}) has "
                    "other ids for a text than the student's tokenizer: a teacher must share the "
                    "student's vocabulary"
                )
            self._checked = True

    async def close(self) -> None:
        """Close the connections."""
        await self._policy.close()
