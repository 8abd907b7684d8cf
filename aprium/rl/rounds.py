"""A whole run of rounds from a recipe: specialists, warm-ups, distillation, again; and its page.

Nodes run in the order of the graph, with several at a time where none needs another, each of those
in a process of its own. What is done stays done: the same command goes on after a stop, a failure
or a kill, and a node whose settings have changed since is an error, never silently mixed with what
came of the old ones. Source: docs/training.md.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from aprium.base import errors
from aprium.base.config import load_toml
from aprium.base.errors import ApriumError, ConfigError, EngineError
from aprium.base.log import configure_logging, get_logger
from aprium.rl import page
from aprium.rl.lineage import NodeState, RoundsConfig, locked, read_state, write_state
from aprium.rl.recovery import evaluate, is_scored, outside, table
from aprium.rl.stages import Stage, digest_of, resolved, run_stage
from aprium.train.pretrain import write_json, write_recipe

log = get_logger("rl")
_WATCHED_S = 0.5  # how often a process looks whether the one that started it is there


class Job(NamedTuple):
    """A node for a seed."""

    name: str
    seed: int


def run(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    until: str | None = None,
    jobs: int = 1,
) -> dict[str, Any] | None:
    """Run the TOML file `recipe`, or what is left of it, `jobs` nodes at a time.

    `overrides` maps dotted keys ("evaluate.items") to values. With `until` only that node and what
    it needs are run. Returns the table of scores and recovery, or None when asked to stop before
    the end. Raises ConfigError, and what a node raises, naming it.
    """
    return run_config(load_toml(RoundsConfig, recipe, overrides), until=until, jobs=jobs)


def run_config(
    recipe: RoundsConfig, *, until: str | None = None, jobs: int = 1
) -> dict[str, Any] | None:
    """Run `recipe`; see `run`."""
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: run one node at a time, or more")
    waiting = jobs_of(recipe, until)
    check(recipe, waiting)
    write_recipe(recipe, recipe.output)
    if any(node.evaluate for node in recipe.nodes.values()):
        for checkpoint, file in outside(recipe).values():
            evaluate(recipe, checkpoint, file)
    whole = _Run(recipe, waiting, jobs).finish()
    found = report(recipe)
    return found if whole else None


def jobs_of(recipe: RoundsConfig, until: str | None = None) -> list[Job]:
    """Return the nodes to run for each seed, in an order in which they can be."""
    found = {}
    for seed in recipe.seeds:
        for name in recipe.order(until):
            once = recipe.nodes[name].once
            found[Job(name, recipe.seeds[0] if once else seed)] = None
    return list(found)


def check(recipe: RoundsConfig, waiting: list[Job]) -> None:
    """Raise ConfigError for settings that cannot be, or that were others when a node began."""
    for name in recipe.nodes:
        resolved(recipe, name, recipe.seeds[0])
    digests: dict[tuple[str, int], str] = {}
    for name, seed in waiting:
        place = recipe.place(name, seed)
        state = read_state(place)
        if state is not None and state.digest != digest_of(recipe, name, seed, digests):
            what = _changed(state.config, resolved(recipe, name, seed))
            raise ConfigError(
                f"node {name!r} was run with other settings ({what}): set them back, use another "
                f"output, or remove {place} to run it again, and those of what came of it"
            )
        if state is not None and state.status == "done":
            _check_parents(recipe, Job(name, seed), state)


def _check_parents(recipe: RoundsConfig, job: Job, state: NodeState) -> None:
    """Raise ConfigError where a node that is done came from a run that is not there any more."""
    for parent, run in state.parents.items():
        found = read_state(recipe.place(parent, job.seed))
        if found is None or found.run != run:
            raise ConfigError(
                f"node {job.name!r} came from a run of {parent!r} that is gone: remove "
                f"{recipe.place(*job)} too, to run it again"
            )


def _changed(before: Any, now: Any, where: str = "") -> str:
    """Say which value differs first, by its dotted name."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (*now, *(key for key in before if key not in now)):
            one, other = before.get(key), now.get(key)
            if one != other:
                return _changed(one, other, f"{where}.{key}" if where else key)
        return "a node that it came from has changed"
    return f"{where}: {before!r} then, {now!r} now"


def report(recipe: RoundsConfig) -> dict[str, Any]:
    """Write `rounds.json` and `report.html` of what there is, and return the table."""
    found = table(recipe)
    write_json(recipe.output / "rounds.json", found)
    page.write(recipe, found, recipe.output / "report.html")
    return found


def run_job(recipe: RoundsConfig, job: Job) -> bool:
    """Run one node to its end and evaluate it; False when asked to stop before. Raises its errors.

    A node that is done is only evaluated, where that is missing.
    """
    name, seed = job
    place, begun = recipe.place(name, seed), time.monotonic()
    with locked(place):
        state = read_state(place)
        if state is None or state.status != "done":
            spent = state.seconds if state is not None else 0.0
            state = NodeState(
                name=name,
                kind=recipe.nodes[name].kind,
                seed=seed,
                digest=digest_of(recipe, name, seed),
                run=state.run if state is not None else uuid.uuid4().hex,
                parents={p: _run_of(recipe, p, seed) for p in recipe.parents(name)},
                # Written and read again as JSON, to be compared with later ones.
                config=resolved(recipe, name, seed),
                seconds=spent,
            )
            write_state(place, state)
            try:
                made = run_stage(Stage(recipe=recipe, name=name, seed=seed))
            except ApriumError as error:
                text = f"{type(error).__name__}: {error}"
                took = spent + time.monotonic() - begun
                write_state(
                    place, dataclasses.replace(state, status="failed", error=text, seconds=took)
                )
                raise _error(
                    type(error).__name__, f"node {name!r} of seed {seed}: {error}"
                ) from error
            state = dataclasses.replace(state, seconds=spent + time.monotonic() - begun)
            if made is None:
                write_state(place, state)
                return False
            state = dataclasses.replace(
                state,
                status="done",
                checkpoint=str(made.checkpoint),
                base=made.base,
                adapter=None if made.adapter is None else str(made.adapter),
                note=made.note,
            )
            write_state(place, state)
        if recipe.nodes[name].evaluate:
            assert state.checkpoint is not None
            evaluate(recipe, state.checkpoint, place / "scores.json", name)
    return True


def _run_of(recipe: RoundsConfig, name: str, seed: int) -> str:
    state = read_state(recipe.place(name, seed))
    return "" if state is None else state.run


class _Run:
    """Nodes under way: those that need nothing unfinished are started, `jobs` at a time."""

    def __init__(self, recipe: RoundsConfig, waiting: list[Job], jobs: int) -> None:
        self._recipe, self._jobs = recipe, jobs
        self._done = {job for job in waiting if self._is_done(job)}
        self._waiting = [job for job in waiting if job not in self._done]
        self._total = len(waiting)
        self._running: dict[Job, SpawnProcess] = {}
        self._stopped = False

    def _is_done(self, job: Job) -> bool:
        place = self._recipe.place(*job)
        state = read_state(place)
        if state is None or state.status != "done":
            return False
        asked = self._recipe.nodes[job.name].evaluate
        return not asked or is_scored(self._recipe, place / "scores.json", job.name)

    def finish(self) -> bool:
        """Run all of them; False when asked to stop before the end."""
        if self._jobs == 1:
            while self._waiting:
                job = self._waiting.pop(0)
                self._say("begins", job)
                if not run_job(self._recipe, job):
                    return False
                self._book(job)
            return True
        with _signals(self._stop):
            try:
                self._run_processes()
            finally:
                for process in self._running.values():
                    process.terminate()
                for process in self._running.values():
                    process.join()
        return not self._stopped

    def _run_processes(self) -> None:
        while self._waiting or self._running:
            for job in list(self._waiting):
                if len(self._running) < self._jobs and not self._stopped and self._is_ready(job):
                    self._start(job)
            if not self._running:
                return
            wait([process.sentinel for process in self._running.values()], timeout=_WATCHED_S)
            for job, process in list(self._running.items()):
                if not process.is_alive():
                    del self._running[job]
                    self._end(job, process)

    def _is_ready(self, job: Job) -> bool:
        parents = self._recipe.parents(job.name)
        seeds = {
            p: self._recipe.seeds[0] if self._recipe.nodes[p].once else job.seed for p in parents
        }
        return all(Job(parent, seed) in self._done for parent, seed in seeds.items())

    def _start(self, job: Job) -> None:
        self._waiting.remove(job)
        self._say("begins", job)
        arguments = (self._recipe, job, self._jobs, os.getpid())
        process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments)
        process.start()
        self._running[job] = process

    def _end(self, job: Job, process: SpawnProcess) -> None:
        state = read_state(self._recipe.place(*job))
        if process.exitcode == 0:
            if self._is_done(job):
                self._book(job)
            else:
                self._stopped = True  # it was asked to, and so are the others
            return
        if state is not None and state.error is not None:
            kind, _, text = state.error.partition(": ")
            raise _error(kind, f"node {job.name!r} of seed {job.seed}: {text}")
        raise EngineError(
            f"node {job.name!r} of seed {job.seed} ended with status {process.exitcode}: what it "
            f"wrote to standard error says why; the same command goes on"
        )

    def _book(self, job: Job) -> None:
        self._done.add(job)
        self._say("is done", job)
        report(self._recipe)

    def _say(self, what: str, job: Job) -> None:
        log.info("[%d/%d] %s of seed %d %s", len(self._done), self._total, job.name, job.seed, what)

    def _stop(self) -> None:
        self._stopped = True
        for process in self._running.values():
            process.terminate()  # training ends with the step under way, and a checkpoint


def _work(recipe: RoundsConfig, job: Job, jobs: int, starter: int) -> None:
    """Run a node in a process of its own, which ends when the one that started it does."""
    import torch

    threading.Thread(target=_watch, args=(starter,), daemon=True).start()
    configure_logging()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    try:
        run_job(recipe, job)
    except ApriumError as error:
        log.error("%s", error)
        raise SystemExit(1) from error


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_WATCHED_S)
    os._exit(1)  # what is half done is gone on with by the next run


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGINT and SIGTERM; in a thread that may not catch them, do nothing."""
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    old = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _error(kind: str, text: str) -> ApriumError:
    """Return an error of the kind with that name."""
    found = getattr(errors, kind, EngineError)
    try:
        return found(text)
    except TypeError:  # one that has more to say than a text
        return EngineError(text)
