"""Actors: who is asked, what is asked again when one is lost, and that the losses stay the same."""

import asyncio
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError, EngineError, RequestError
from aprium.base.policy import GroupPolicy
from aprium.base.records import Completion, SamplingParams, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.engine.config import EngineConfig
from aprium.rl import cluster
from aprium.rl.cluster import (
    Cluster,
    ClusterConfig,
    GeneratorActor,
    Generators,
    RemoteTeachers,
    shares,
)
from aprium.rl.ledger import Ledger
from aprium.rl.loop import run_config
from aprium.rl.teachers import TeacherConfig, Teachers, TeachersConfig
from aprium.rl.weights import Weights, pack, unpack
from aprium.train.metrics import MetricsFile
from aprium.train.sft import open_model, read_text
from tests.rl.conftest import recipe

PARAMS = SamplingParams(max_tokens=8, seed=3)


class RayError(Exception):
    """As Ray's: the actor is gone."""


class RayTaskError(RayError):
    """As Ray's: the actor raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Method:
    """A method of an actor, which runs in this loop until the actor is killed."""

    def __init__(self, actor: "Actor", name: str) -> None:
        self._actor, self._name = actor, name

    def options(self, num_returns: str) -> "Method":
        assert num_returns == "streaming"
        return self

    def remote(self, *arguments: Any) -> Any:
        method = getattr(self._actor.inner, self._name)
        if inspect.isasyncgenfunction(method):
            return self._items(method(*arguments))
        return self._result(method, arguments)

    async def _result(self, method: Any, arguments: Any) -> Any:
        self._actor.check()
        try:
            value = await method(*arguments)
        except Exception as error:
            raise RayTaskError(error) from error
        self._actor.check()
        return value

    async def _items(self, found: Any) -> Any:
        try:
            async for value in found:
                self._actor.check()
                yield self._value(value)
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error

    async def _value(self, value: Any) -> Any:
        self._actor.check()
        return value


class Actor:
    """What Ray would have in another process."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.dead = inner, False

    def check(self) -> None:
        if self.dead:
            raise RayError("the actor died")

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


class FakeCluster:
    """A cluster in this process, in which `make` makes actors of a place."""

    def __init__(self, make: Callable[[int], Any], **options: Any) -> None:
        self.config = ClusterConfig(**options)
        self.started: list[Actor] = []
        self._pools: list[Any] = []
        self._make = make
        self.ray = SimpleNamespace(
            exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
            put=lambda value: value,
            cancel=lambda reference: None,
            kill=lambda actor: setattr(actor, "dead", True),
        )

    pool = Cluster.pool

    def actor(self, cls: type, bundle: int) -> Actor:
        self.started.append(Actor(self._make(bundle)))
        return self.started[-1]


class Scripted:
    """A generator that says which one it is, under which version."""

    def __init__(self, bundle: int) -> None:
        self.bundle, self.version, self.calls = bundle, -1, 0
        self.on_call: Callable[[int], Any] = lambda number: None

    async def open(
        self, config: Any, shape: Any, threads: int, version: int, *weights: Any
    ) -> None:
        await asyncio.sleep(0.01)
        self.version = version

    async def update(self, version: int, weights: Any, recompute: bool = False) -> int:
        self.version = version
        return version

    async def complete_all(
        self, tokens: Sequence[int], params: SamplingParams, priority: int
    ) -> Any:
        for index in range(params.n):
            self.calls += 1
            self.on_call(self.calls)
            await asyncio.sleep(0.001)
            yield Completion(
                text="",
                tokens=(self.bundle,),
                logprobs=(0.0,),
                finish="stop",
                index=index,
                weight_spans=((self.version, 1),),
            )


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(open_model(PICO_DIR, read_text(PICO_DIR)))


def make_generators(fake: Any, weights: Weights) -> Generators:
    return Generators(fake, EngineConfig(model="pico"), PICO_DIR, weights)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.integers(1, 9))
def test_every_teacher_has_an_actor_and_equal_weights_are_together(
    keys: list[str], size: int
) -> None:
    teachers = {str(at): key for at, key in enumerate(keys)}
    found = shares(teachers, size)
    assert len(found) == size and set().union(*found) == set(teachers)
    for name, key in teachers.items():
        alike = {other for other, its in teachers.items() if its == key}
        assert all(alike <= share for share in found if name in share)
    if size >= len(set(teachers.values())):
        assert all(found), "no actor is idle"


def test_packed_tensors_are_read_bit_for_bit(weights: Weights) -> None:
    tensors = {
        **weights.tensors(),
        "half": torch.randn(3, 5).bfloat16(),
        "slice": torch.randn(4, 6)[:, 1:3],
        "scalar": torch.tensor(2.5),
    }
    packed = pack(tensors)
    for _, _, data in packed.values():
        data.flags.writeable = False  # as the store has them
    found = unpack(packed)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_turns_of_an_episode_stay_and_new_ones_go_where_there_is_room(weights: Weights) -> None:
    async def go() -> None:
        generators = make_generators(FakeCluster(Scripted, generators=3), weights)
        await generators.pool.open()
        policy = generators.policy()
        assert isinstance(policy, GroupPolicy)
        groups = [SamplingParams(n=4, seed=10 * i) for i in range(6)]

        async def play(params: SamplingParams) -> set[int]:
            found = [c async for c in policy.complete_all((1, 2), params)]
            assert sorted(c.index for c in found) == [0, 1, 2, 3]
            later = [
                await policy.complete((1, 2, 3), SamplingParams(seed=params.seed + i))
                for i in range(4)
            ]
            return {c.tokens[0] for c in (*found, *later)}

        places = await asyncio.gather(*map(play, groups))
        assert all(len(place) == 1 for place in places)
        assert sorted(min(place) for place in places) == [0, 0, 1, 1, 2, 2]
        assert all(member.busy == 0 for member in generators.pool.members)
        await generators.close()

    asyncio.run(go())


def test_a_lost_generator_is_replaced_with_the_weights_of_the_moment(weights: Weights) -> None:
    async def go() -> None:
        fake = FakeCluster(Scripted, generators=2)
        generators = make_generators(fake, weights)
        await generators.pool.open()
        await generators.push(weights, 5)
        first = fake.started[0]
        first.inner.on_call = lambda number: setattr(first, "dead", number == 3)
        params = SamplingParams(n=4, seed=0)
        found = [c async for c in generators.policy().complete_all((1,), params)]
        assert sorted(c.index for c in found) == [0, 1, 2, 3]  # each once
        assert {c.tokens[0] for c in found} == {0, 1}  # the other one took what was left
        assert {c.weight_version for c in found} == {5}
        await generators.push(weights, 6)  # while the new one starts
        while not generators.pool.members[0].ready:
            await asyncio.sleep(0.001)
        assert len(fake.started) == 3 and fake.started[2].inner.version == 6
        assert generators.failed is None
        await generators.close()
        assert all(actor.dead for actor in fake.started)

    asyncio.run(go())


def test_an_idle_generator_that_is_lost_is_noticed_with_new_weights(weights: Weights) -> None:
    async def go() -> None:
        fake = FakeCluster(Scripted)
        generators = make_generators(fake, weights)
        await generators.pool.open()
        fake.started[0].dead = True
        await generators.push(weights, 2)
        completion = await generators.policy().complete((1,), PARAMS)
        assert completion.weight_version == 2 and len(fake.started) == 2
        await generators.close()

    asyncio.run(go())


def test_what_a_generator_refuses_is_refused_and_a_failed_engine_replaced(weights: Weights) -> None:
    def refuse(number: int) -> None:
        raise RequestError("too long")

    def fail(number: int) -> None:
        raise EngineError("the engine has failed: out of order")

    async def go() -> None:
        fake = FakeCluster(Scripted)
        generators = make_generators(fake, weights)
        await generators.pool.open()
        fake.started[0].inner.on_call = refuse
        with pytest.raises(RequestError, match="too long"):
            await generators.policy().complete((1,), PARAMS)
        assert len(fake.started) == 1
        fake.started[0].inner.on_call = fail
        await generators.policy().complete((1,), PARAMS)
        assert len(fake.started) == 2
        await generators.close()

    asyncio.run(go())


def test_generators_that_are_lost_again_and_again_end_the_run(weights: Weights) -> None:
    async def go() -> None:
        def make(bundle: int) -> Scripted:
            found = Scripted(bundle)
            found.on_call = lambda number: fake.ray.kill(fake.started[-1])
            return found

        fake = FakeCluster(make, max_losses=2)
        generators = make_generators(fake, weights)
        await generators.pool.open()
        with pytest.raises(EngineError, match="3 generators were lost over one prompt"):
            await generators.policy().complete((1,), PARAMS)
        with pytest.raises(EngineError, match="was lost 3 times without having done anything"):
            await generators.policy().complete((1,), PARAMS)
        assert generators.failed is not None
        await generators.close()

    asyncio.run(go())


def test_an_engine_behind_the_policy_says_what_it_says_here(weights: Weights) -> None:
    """The actor's own class, without Ray: the same bits as an engine of this process."""
    from aprium.rl.generation import Embedded

    async def go() -> None:
        config = EngineConfig(model="pico", max_model_len=256)
        fake: Any = FakeCluster(lambda bundle: GeneratorActor(), generators=2)
        threads = torch.get_num_threads()
        generators = Generators(fake, config, PICO_DIR, weights)
        await generators.pool.open()
        torch.set_num_threads(threads)
        embedded = Embedded(config, PICO_DIR, weights)
        prompt = embedded.chat.tokenizer.encode("What is 2 + 2?")
        params = SamplingParams(n=3, seed=7, max_tokens=8)
        for version in (0, 4):
            if version:
                await generators.push(weights, version)
                await embedded.push(weights, version)
            found, wanted = [], []
            for one, into in ((generators, found), (embedded, wanted)):
                async for c in one.policy().complete_all(prompt, params):
                    into.append((c.index, c.tokens, c.logprobs, c.weight_spans))
            assert len(found) == 3 and sorted(found) == sorted(wanted)
            scores = [await one.policy().score(prompt) for one in (generators, embedded)]
            assert scores[0] == scores[1]
        await generators.close()
        await embedded.close()
        for actor in fake.started:
            await actor.inner._engine.close()

    asyncio.run(go())


class ScriptedTeachers:
    """Teachers that are lost once."""

    lost = 0

    def __init__(self, bundle: int) -> None:
        self.bundle = bundle

    async def open(self, config: Any, student: str, routes: dict[str, str], threads: int) -> None:
        self.routes = routes

    async def score(self, trajectory: Trajectory) -> Any:
        if ScriptedTeachers.lost == 0:
            ScriptedTeachers.lost += 1
            raise RayError("the actor died")
        return self.bundle, self.routes[trajectory.domain]


def test_teachers_are_shared_out_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def result(self: Method, method: Any, arguments: Any) -> Any:
        try:
            return await method(*arguments)
        except RayError:
            self._actor.dead = True
            raise

    monkeypatch.setattr(Method, "_result", result)
    names = ("one", "two")
    config = TeachersConfig(
        teachers=tuple(TeacherConfig(name=name, checkpoint="pico") for name in names),
        default="self",
    )
    routes = {"a": "one", "b": "two", "c": None}
    local = Teachers(config, student="pico", routes=routes)
    routes = {domain: local.teacher_of(domain) for domain in routes}

    async def go() -> None:
        fake: Any = FakeCluster(ScriptedTeachers, teachers=1, generators=2)
        remote = RemoteTeachers(fake, local, config, "pico", routes)
        await remote.pool.open()
        for domain, name in (("a", "one"), ("b", "two"), ("c", "self")):
            trajectory = Trajectory(task="t", domain=domain, tokens=(), sampled=(), logprobs=())
            assert await remote.score(trajectory) == (2, name)  # the place after the generators'
        assert len(fake.started) == 2
        await remote.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": 0}, "cluster.generators is 0"),
        ({"teachers": -1}, "cluster.teachers is -1"),
        ({"start_timeout_s": 0.0}, "cluster.start_timeout_s is 0"),
        ({"generator_resources": {}}, "give amounts above 0"),
        ({"teacher_resources": {"CPU": 0}}, "give amounts above 0"),
        ({"strategy": "ANYWHERE"}, "it must be one of 'PACK'"),
        ({"object_store_bytes": 1 << 20}, "Ray takes no fewer"),
        ({"object_store_bytes": 1 << 30, "address": "auto"}, "leave one of the two out"),
        ({"gpus": 1}, "unknown key"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ClusterConfig, changes)


def test_actors_for_no_teachers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"add a \[teachers\] table"):
        recipe(tmp_path, cluster={"teachers": 1})


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'aprium\[cluster\]'"):
        run_config(recipe(tmp_path / "out", cluster={}, evaluate=None))


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="run `ray start --head`"):
        Cluster(ClusterConfig(address="auto"), weights_bytes=0)


# With Ray itself: its start takes 10 s and more.


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    """Ray on this machine, which runs of a module share."""
    pytest.importorskip("ray")
    ray = cluster._import_ray()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="warning",
    )
    yield ray
    ray.shutdown()


def ray_test(function: Any) -> Any:
    """Mark what runs on Ray, whose processes end when they like."""
    function = pytest.mark.filterwarnings("ignore:subprocess .* is still running")(function)
    function = pytest.mark.filterwarnings("ignore:Creating legend")(function)  # where cores are few
    function = pytest.mark.timeout(1800)(function)
    return pytest.mark.slow(function)


DISTILLED = {"teachers": {"default": "self"}, "credit": {"kl_weight": 0.5}}
ACTORS = {"generators": 2, "teachers": 1}


def rows(output: Path) -> list[dict[str, Any]]:
    """Return what a run says of its steps, but for times."""
    found = MetricsFile(output).read("train")
    return [{n: v for n, v in row.items() if not n.endswith("_s")} for row in found]


def last(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "step-000004" / "model.safetensors")


def check_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert [row["loss"] for row in rows(one)] and len(rows(one)) == 4
    mine, theirs = last(one), last(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def check_books(output: Path) -> None:
    """Every item that was issued is in one batch, or open; a finished one was finished once."""
    lines = [json.loads(line) for line in (output / "ledger.jsonl").open()]
    for event in ("issued", "finished", "scored"):
        items = [line["item"] for line in lines if line["event"] == event]
        assert len(items) == len(set(items)), event
    ledger = Ledger(output)
    used = [n for step in range(4) for n in ledger.batches[step]]
    left = [entry.item.number for entry in ledger.open_entries()]
    assert sorted(used + left) == list(range(ledger.num_issued))
    ledger.close()


def kill_while_it_works(monkeypatch: pytest.MonkeyPatch, ray: Any, at: Sequence[int]) -> list[int]:
    """Kill the process of the generator that gets each of these calls, and a teacher's at last."""
    calls, killed = [0], []
    choose, score = Generators.choose, RemoteTeachers.score

    def kill(one: Any) -> None:
        killed.append(ray.get(one.__ray_call__.remote(lambda self: os.getpid())))
        os.kill(killed[-1], signal.SIGKILL)

    async def choose_and_kill(self: Generators, params: SamplingParams) -> Any:
        member = await choose(self, params)
        calls[0] += 1
        if calls[0] in at:
            loop, victim = asyncio.get_running_loop(), member.actor
            loop.call_later(0.03, lambda: loop.run_in_executor(None, kill, victim))
        return member

    async def kill_and_score(self: RemoteTeachers, trajectory: Trajectory) -> Any:
        if len(killed) == len(at):
            await asyncio.to_thread(kill, self.pool.members[0].actor)
        return await score(self, trajectory)

    monkeypatch.setattr(Generators, "choose", choose_and_kill)
    monkeypatch.setattr(RemoteTeachers, "score", kill_and_score)
    return killed


@ray_test
def test_actors_give_the_losses_of_one_process(
    tmp_path: Path, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns, with teachers: bit for bit, also where actors are killed while they work."""
    inside, actors, killed = (recipe(tmp_path / n, **DISTILLED) for n in ("in", "on", "kill"))
    run_config(inside)
    run_config(recipe(actors.output, **DISTILLED, cluster=ACTORS))
    check_same(actors.output, inside.output)
    check_books(actors.output)
    with monkeypatch.context() as patch:
        gone = kill_while_it_works(patch, started, at=(4, 9))
        run_config(recipe(killed.output, **DISTILLED, cluster=ACTORS))
    assert len(set(gone)) == 3
    check_same(killed.output, inside.output)
    check_books(killed.output)


@ray_test
def test_a_killed_generator_costs_no_item_while_training_goes_on(
    tmp_path: Path, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead of the trainer too."""
    config = recipe(
        tmp_path / "out", pipeline={"max_age": 2}, cluster={"generators": 2}, evaluate=None
    )
    gone = kill_while_it_works(monkeypatch, started, at=(3, 8))
    assert run_config(config) is not None
    assert len(set(gone)) == 2
    check_books(config.output)


@ray_test
def test_giving_up_stops_the_generation_in_the_actor(started: Any, weights: Weights) -> None:
    there = Cluster(ClusterConfig(), weights.num_bytes)
    engine = EngineConfig(model="pico", max_model_len=4096)
    generators = there.generators(engine, PICO_DIR, weights)
    there.open()
    (member,) = generators.pool.members

    async def running() -> int:
        return await member.actor.__ray_call__.remote(lambda self: self._engine.stats().num_running)

    async def go() -> None:
        params = SamplingParams(n=2, seed=1, max_tokens=4000, ignore_eos=True, temperature=0)
        task = asyncio.create_task(anext(generators.policy().complete_all((5, 6), params)))
        while await running() != 2:
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while await running():
            await asyncio.sleep(0.05)
        await generators.close()

    asyncio.run(go())
    there.close()
    assert started.is_initialized()  # it was there before


@ray_test
def test_a_cluster_without_room_is_refused(started: Any) -> None:
    config = ClusterConfig(generator_resources={"CPU": 64}, start_timeout_s=3.0)
    with pytest.raises(ConfigError, match="no room for the actors in 3 s"):
        Cluster(config, weights_bytes=0)
