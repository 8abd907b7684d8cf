"""The loop's engines and teachers as Ray actors, on one machine or on many.

Trainer, episodes, books and pipeline stay in the process that was started. A policy and a scorer
there look like those of one process and forward to actors, which hold the same objects: an
`AsyncEngine` and its `EnginePolicy`, or the `Teachers` of a share of the teachers. New weights are
put into Ray's object store once, and a step begins when every engine has them. An actor that is
lost, or whose engine has failed, is replaced by one with the weights of the moment. What it was
asked is asked again: a turn goes on from the tokens of its episode, with the same seed, so that
under the same weights not even a bit tells.

All that uses Ray is here, and Ray is imported when a recipe asks for it.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from aprium.base.errors import ConfigError, EngineError
from aprium.base.log import configure_logging, get_logger
from aprium.base.policy import GroupPolicy
from aprium.base.records import Completion, SamplingParams, TeacherScores, Trajectory
from aprium.checkpoint.hub import resolve
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.model.config import ModelConfig
from aprium.rl.pool import LostError, Member, Pool
from aprium.rl.teachers import TeacherConfig, Teachers, TeachersConfig
from aprium.rl.weights import Packed, Weights, assemble, pack, replace_weights, unpack
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

log = get_logger("rl")
_LEAST_STORE_BYTES = 256 << 20
_CALLS = 4096  # under way in an actor at a time
_REMEMBERED = 1 << 16  # seeds of which it is known where their episodes are played


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which actors a run has, and where they are.

    `address` is that of a running cluster ("auto": the one this machine is part of); with None one
    is started here and ends with the run. `generators` actors play, each with an engine of its own;
    `teachers` actors score (0: the teachers stay beside the trainer). Each of them takes
    `generator_resources` or `teacher_resources` of a node, in Ray's names: CPU, which is also how
    many threads it has, GPU, or what `ray start --resources` called it. `strategy` says how they
    are placed. An actor must be ready in `start_timeout_s`. One that is lost more than
    `max_losses` times without having done anything ends the run. `object_store_bytes` is the memory
    for weights on their way, of a cluster that is started here (None: as the model needs).
    """

    address: str | None = None
    generators: int = 1
    teachers: int = 0
    generator_resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    teacher_resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    start_timeout_s: float = 600.0
    max_losses: int = 3
    object_store_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("generators", 1), ("teachers", 0), ("max_losses", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"cluster.{name} is {getattr(self, name)}: it must be at least {least}"
                )
        if self.start_timeout_s <= 0:
            raise ConfigError(
                f"cluster.start_timeout_s is {self.start_timeout_s}: it must be above 0"
            )
        for name in ("generator_resources", "teacher_resources"):
            found = getattr(self, name)
            if not found or any(amount <= 0 for amount in found.values()):
                raise ConfigError(
                    f"cluster.{name} is {found}: give amounts above 0, such as {{CPU = 1}}"
                )
        if self.object_store_bytes is None:
            return
        if self.address is not None:
            raise ConfigError(
                f"cluster.object_store_bytes is {self.object_store_bytes} and cluster.address is "
                f"{self.address!r}: a running cluster has its store, see ray start "
                "--object-store-memory; leave one of the two out"
            )
        if self.object_store_bytes < 80 << 20:
            raise ConfigError(
                f"cluster.object_store_bytes is {self.object_store_bytes}: Ray takes no fewer than "
                f"{80 << 20}"
            )

    def bundles(self) -> list[dict[str, float]]:
        """Return what each actor takes: those of generators, then those of teachers."""
        return [self.generator_resources] * self.generators + [
            self.teacher_resources
        ] * self.teachers


class Cluster:
    """A connection to Ray, with places for all actors of a run; close it.

    `weights_bytes` is the size of the weights that travel. Raises ConfigError where Ray is not
    installed or not there, or has no room for the actors.
    """

    def __init__(self, config: ClusterConfig, weights_bytes: int) -> None:
        self.config = config
        self.ray = _import_ray()
        self._started = not self.ray.is_initialized()
        self._group: Any = None
        self._pools: list[Pool] = []
        try:
            if self._started:
                self._start(weights_bytes)
            self._place()
        except BaseException:
            self.close()
            raise

    def _start(self, weights_bytes: int) -> None:
        usual: dict[str, Any] = {"include_dashboard": False, "logging_level": "warning"}
        usual["address"] = self.config.address or "local"
        if self.config.address is None:
            # It is there for this run alone: what the actors take may be more than the cores.
            cpus = sum(bundle.get("CPU", 0.0) for bundle in self.config.bundles())
            store = self.config.object_store_bytes
            usual["num_cpus"] = max(os.cpu_count() or 1, int(-(-cpus // 1)))
            usual["object_store_memory"] = store or max(3 * weights_bytes, _LEAST_STORE_BYTES)
        try:
            with _own_signals():
                self.ray.init(**usual)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            cause = str(error).partition("\n")[0]
            if self.config.address is None:
                raise ConfigError(
                    f"Ray cannot be started here ({cause}): mend that, or leave the [cluster] "
                    "table out to run in one process"
                ) from error
            raise ConfigError(
                f"cluster.address is {self.config.address!r} and Ray cannot be reached there "
                f"({cause}): run `ray start --head` on one machine and `ray start "
                "--address=HOST:6379` on the others, or leave cluster.address out"
            ) from error

    def _place(self) -> None:
        """Wait until the actors have been granted their places."""
        config, ray = self.config, self.ray
        self._group = ray.util.placement_group(config.bundles(), strategy=config.strategy)
        timeout_s = config.start_timeout_s
        if self._started and config.address is None:
            timeout_s = min(timeout_s, 60.0)  # no other machine is going to join
        try:
            ray.get(self._group.ready(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            names = {name for bundle in config.bundles() for name in bundle}
            there = {name: ray.cluster_resources().get(name, 0.0) for name in sorted(names)}
            raise ConfigError(
                f"no room for the actors in {timeout_s:g} s: {config.bundles()} are to be placed "
                f"({config.strategy}) on {len(ray.nodes())} nodes that have {there} in all: ask "
                "for less in [cluster], or add nodes with `ray start`"
            ) from error

    def actor(self, cls: type, bundle: int) -> Any:
        """Start an actor in its place; see `bundles`."""
        resources = dict(self.config.bundles()[bundle])
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, bundle
        )
        options = self.ray.remote(cls).options(
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_concurrency=_CALLS,
            scheduling_strategy=strategy,
        )
        return options.remote()

    def pool(
        self, cls: type, size: int, first: int, prepare: Callable[[int, Any], Awaitable[None]]
    ) -> Pool:
        """Start a pool of actors in the places from `first` on; `open` waits for them."""
        found = Pool(
            self.ray,
            cls.__name__.removesuffix("Actor").lower(),
            size,
            start=lambda index: self.actor(cls, first + index),
            prepare=prepare,
            timeout_s=self.config.start_timeout_s,
            max_losses=self.config.max_losses,
        )
        self._pools.append(found)
        return found

    def generators(self, engine: EngineConfig, path: Path, weights: Weights) -> "Generators":
        """Start the actors that play, with `weights` as version 0; `open` waits for them.

        `path` has the text files here, and `engine.model` names a checkpoint with the same on every
        node.
        """
        engine = replace(engine, model=on_every_node(engine.model))
        return Generators(self, engine, path, weights)

    def teachers(
        self,
        local: Teachers,
        config: TeachersConfig,
        *,
        student: str,
        domains: Iterable[str],
    ) -> "RemoteTeachers":
        """Start the actors that score in place of `local`, which was made of `config`.

        `open` waits for them.
        """
        routes = {domain: local.teacher_of(domain) for domain in domains}
        return RemoteTeachers(self, local, config, on_every_node(student), routes)

    def open(self) -> None:
        """Wait until all actors can serve; not from a coroutine.

        Raises ConfigError and CheckpointError of theirs, EngineError where they do not start.
        """

        async def wait() -> None:
            await asyncio.gather(*(pool.open() for pool in self._pools))

        asyncio.run(wait())

    def close(self) -> None:
        """End all actors, and Ray where it was started here."""
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)
            self._group = None
        if self._started and self.ray.is_initialized():
            self.ray.shutdown()


def _import_ray() -> Any:
    """Return the package; raises ConfigError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # engines are no less than the trainer
    try:
        with _own_signals():
            import ray  # type: ignore[import-not-found]
            import ray.util.scheduling_strategies  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "the recipe has a [cluster] table and Ray is not installed: pip install "
            "'aprium[cluster]', or leave the table out to run in one process"
        ) from error
    return ray


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Undo what is done to signals inside, so that a run that is asked to stop ends its step."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in before.items():
                if handler is not None:
                    signal.signal(one, handler)


class Generators:
    """Actors that play; see `Generation`.

    Turns of one episode go to one actor, which has what was computed of the earlier ones.
    """

    def __init__(
        self, cluster: Cluster, engine: EngineConfig, path: Path, weights: Weights
    ) -> None:
        self.chat = ChatFormat(tokenizer=Tokenizer.load(path), template=ChatTemplate.load(path))
        self._cluster, self._engine, self._shape = cluster, engine, weights.config
        self._version = 0
        self._all = cluster.ray.put(pack(weights.tensors()))
        self._some: Any = None  # what has changed since, where that is not all of them
        self.pool = cluster.pool(GeneratorActor, cluster.config.generators, 0, self._prepare)
        self.places: OrderedDict[int, Member] = OrderedDict()  # by seed

    async def _prepare(self, index: int, actor: Any) -> None:
        threads = _threads(self._cluster.config.generator_resources)
        version = self._version
        opening = (self._engine, self._shape, threads, version, self._all, self._some)
        await self.pool.call(actor, "open", *opening)
        while version != self._version:  # while it started, others got new ones
            version = self._version
            new = self._all if self._some is None else self._some
            await self.pool.call(actor, "update", version, new)

    @property
    def failed(self) -> EngineError | None:
        """Why nothing can be played any more, or None."""
        return self.pool.failed

    def policy(self, *, priority: int = 0) -> GroupPolicy:
        """Return the model to play with; see `Generation`."""
        return _RemotePolicy(self, self._cluster.config.max_losses + 1, priority)

    async def push(self, weights: Weights, version: int, *, recompute: bool = False) -> None:
        """Replace the weights; see `Generation`."""
        changed, num_all = weights.changed(), weights.num_tensors
        new = await asyncio.to_thread(lambda: self._cluster.ray.put(pack(changed)))
        self._version = version
        self._all, self._some = (new, None) if len(changed) == num_all else (self._all, new)
        ready = [member for member in self.pool.members if member.ready]
        await asyncio.gather(*(self._update(member, version, new, recompute) for member in ready))

    async def _update(self, member: Member, version: int, weights: Any, recompute: bool) -> None:
        actor = member.actor
        try:
            found = await self.pool.call(actor, "update", version, weights, recompute)
        except (LostError, EngineError) as error:
            self.pool.lose(member, actor, error)  # who replaces it begins with these
        else:
            assert found == version, "an engine has the weights that it was given"

    async def choose(self, params: SamplingParams) -> Member:
        """Return who is to go on with the episodes of a seed, or to begin them."""
        seed = params.seed
        place = self.places.get(seed) if seed is not None else None
        members = [place] if place is not None and place.ready else self.pool.members
        member = await self.pool.choose(members)
        if seed is not None:
            for one in range(seed, seed + params.n):
                self.places[one] = member
                self.places.move_to_end(one)
            while len(self.places) > _REMEMBERED:
                self.places.popitem(last=False)
        return member

    async def close(self) -> None:
        """End all actors."""
        await self.pool.close()


class _RemotePolicy:
    """The model of generators, as an engine's own policy looks."""

    def __init__(self, generators: Generators, attempts: int, priority: int) -> None:
        self._generators, self._pool = generators, generators.pool
        self._attempts, self._priority = attempts, priority

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; see `Policy`."""
        last = None
        async with contextlib.aclosing(self.complete_all(tokens, params)) as found:
            async for completion in found:  # to the end of the stream, which is the end of the call
                last = completion
        if last is None:
            raise EngineError("a generator ended a completion without saying why")
        return last

    async def complete_all(
        self, tokens: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Completion, None]:
        """Yield the continuations of `tokens` as they end; see `GroupPolicy`."""
        seen: set[int] = set()
        arguments, last = (tuple(tokens), params, self._priority), None
        for _ in range(self._attempts):
            member = await self._generators.choose(params)
            actor, load = member.actor, params.n - len(seen)
            member.busy += load
            stream = self._pool.stream(actor, "complete_all", *arguments)
            try:
                async with contextlib.aclosing(stream):
                    async for completion in stream:
                        member.losses = 0
                        if completion.index not in seen:
                            seen.add(completion.index)
                            yield completion
                return
            except (LostError, EngineError) as error:
                self._pool.lose(member, actor, error)
                last = error
            finally:
                member.busy -= load
        raise EngineError(f"{self._attempts} generators were lost over one prompt: {last}")

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it; see `Policy`."""
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
        completion = await self.complete(tokens, params)
        assert completion.prompt_logprobs is not None
        return list(completion.prompt_logprobs)


class GeneratorActor:
    """An engine, in a process that Ray has started."""

    def __init__(self) -> None:
        self._engine: AsyncEngine | None = None

    async def open(
        self,
        config: EngineConfig,
        shape: ModelConfig,
        threads: int,
        version: int,
        weights: Packed,
        changed: Packed | None,
    ) -> None:
        """Begin with `weights`, of which some have `changed`; raises CheckpointError."""
        configure_logging()
        torch.set_num_threads(threads)
        path = resolve(config.model)
        self._engine = await asyncio.to_thread(
            lambda: AsyncEngine(config, assemble(path, shape, unpack(weights)))
        )
        await self.update(version, changed or {})

    async def update(self, version: int, weights: Packed, recompute: bool = False) -> int:
        """Replace weights, and return the version of those that play from now on."""
        assert self._engine is not None
        await replace_weights(self._engine, unpack(weights), version, recompute=recompute)
        return self._engine.stats().weight_version

    async def complete_all(
        self, tokens: Sequence[int], params: SamplingParams, priority: int
    ) -> AsyncGenerator[Completion, None]:
        """Yield the continuations of `tokens` as they end."""
        assert self._engine is not None
        policy = EnginePolicy(self._engine, priority=priority)
        async with contextlib.aclosing(policy.complete_all(tokens, params)) as found:
            async for completion in found:
                yield completion


class RemoteTeachers:
    """Actors that score, each for a share of the teachers; see `Teachers`, which `local` is."""

    def __init__(
        self,
        cluster: Cluster,
        local: Teachers,
        config: TeachersConfig,
        student: str,
        routes: Mapping[str, str | None],
    ) -> None:
        self._cluster, self._local, self._student = cluster, local, student
        teachers = tuple(map(_everywhere, config.teachers))
        self._config = replace(config, teachers=teachers, default=None, strict=False)
        self._routes = routes
        used = {name for name in routes.values() if name is not None}
        weights = {one.name: one.checkpoint or one.name for one in teachers}
        keys = {name: weights.get(name, student) for name in sorted(used)}
        self._shares = shares(keys, cluster.config.teachers)
        size, first = cluster.config.teachers, cluster.config.generators
        self.pool = cluster.pool(TeacherActor, size, first, self._prepare)

    async def _prepare(self, index: int, actor: Any) -> None:
        mine = self._shares[index]
        routes = {domain: name for domain, name in self._routes.items() if name in mine}
        threads = _threads(self._cluster.config.teacher_resources)
        await self.pool.call(actor, "open", self._config, self._student, routes, threads)

    async def score(self, trajectory: Trajectory) -> TeacherScores | None:
        """Return what the domain's teacher makes of the tokens; see `Teachers`."""
        name = self._local.teacher_of(trajectory.domain)
        if name is None:
            return None
        members = [one for one in self.pool.members if name in self._shares[one.index]]
        attempts, last = self._cluster.config.max_losses + 1, None
        for _ in range(attempts):
            member = await self.pool.choose(members)
            actor, member.busy = member.actor, member.busy + 1
            try:
                found = await self.pool.call(actor, "score", trajectory)
                member.losses = 0
                return found
            except LostError as error:
                self.pool.lose(member, actor, error)
                last = error
            finally:
                member.busy -= 1
        raise EngineError(f"teacher {name!r} was lost {attempts} times over one episode: {last}")

    async def close(self) -> None:
        """End all actors."""
        await self.pool.close()
        await self._local.close()


class TeacherActor:
    """Teachers, in a process that Ray has started."""

    def __init__(self) -> None:
        self._teachers: Teachers | None = None

    async def open(
        self, config: TeachersConfig, student: str, routes: Mapping[str, str | None], threads: int
    ) -> None:
        """Begin; raises ConfigError, CheckpointError."""
        configure_logging()
        torch.set_num_threads(threads)
        self._teachers = await asyncio.to_thread(Teachers, config, student=student, routes=routes)

    async def score(self, trajectory: Trajectory) -> TeacherScores | None:
        """Return what the domain's teacher makes of the tokens."""
        assert self._teachers is not None
        return await self._teachers.score(trajectory)


def shares(teachers: Mapping[str, str], size: int) -> list[frozenset[str]]:
    """Return the teachers that each of `size` actors serves; `teachers` maps names to weights.

    Those over the same weights stay together, since an actor opens these once. With more actors
    than weights several serve the same ones.
    """
    weights = {key: at for at, key in enumerate(dict.fromkeys(teachers.values()))}
    count = len(weights)

    def serves(actor: int, at: int) -> bool:
        return at % size == actor if count >= size else actor % count == at

    return [
        frozenset(name for name, key in teachers.items() if serves(actor, weights[key]))
        for actor in range(size)
    ]


def _threads(resources: Mapping[str, float]) -> int:
    return max(1, int(resources.get("CPU", 1)))


def on_every_node(checkpoint: str) -> str:
    """Return a checkpoint's name such that other processes find it: directories in full."""
    return str(Path(checkpoint).absolute()) if Path(checkpoint).is_dir() else checkpoint


def _everywhere(teacher: TeacherConfig) -> TeacherConfig:
    checkpoint, adapter = teacher.checkpoint, teacher.adapter
    return replace(
        teacher,
        checkpoint=checkpoint and on_every_node(checkpoint),
        adapter=adapter and adapter.absolute(),
    )
