"""Simulate a service: the engine's own scheduler and cache on a virtual clock, a device a function.

Every replica runs `aprium.engine.scheduler` and `cache` as the engine does; only the time of a step
comes from a cost model, and the tokens chosen are placeholders. Where the next steps can decide
nothing (every running sequence decodes, nobody can be admitted, pages are free) they are booked
together: the same times, token for token, as one after the other, which a test holds against it.
Time never runs backwards, and every request finishes once. No torch.
"""

import heapq
import itertools
import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

from aprium.base.errors import ConfigError
from aprium.base.records import SamplingParams
from aprium.engine.cache import Cache
from aprium.engine.prefix import PrefixCache
from aprium.engine.request import LiveSequence
from aprium.engine.scheduler import SPACING, Outcome, Scheduler, StepPlan
from aprium.plan.traces import Job, Trace, prompt_tokens, session_tokens

_FARTHEST = 4096  # steps booked together at most
_INTERVAL, _GRID_POINTS = 4096, 16  # tokens between kept states, and most of them: the engine's
_PARAMS = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
_ONE = Outcome((0,))
_NONE = Outcome()


class StepCost(Protocol):
    """What a device takes for a step; `CostModel` is one."""

    def step(
        self,
        tokens: float,
        sequences: float,
        context: float,
        pairs: float,
        *,
        samples: float | None = None,
    ) -> float:
        """Return the seconds of a step (see `CostModel.step`)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A device measured rather than modelled: seconds a step, sequence, prompt token, pair."""

    step_s: float
    sequence_s: float
    token_s: float
    pair_s: float = 0.0

    def step(
        self,
        tokens: float,
        sequences: float,
        context: float,
        pairs: float,
        *,
        samples: float | None = None,
    ) -> float:
        """Return the seconds of a step; tokens beyond one a sequence are a prompt's."""
        more = tokens - sequences
        return self.step_s + self.sequence_s * sequences + self.token_s * more + self.pair_s * pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """Sizes of one replica's scheduler and cache, as the engine's own configuration has them.

    `accepted` are the chances that at least one, two, ... drafts of a step are accepted.
    """

    num_pages: int
    page_size: int = 64
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    num_snapshots: int = 0
    accepted: tuple[float, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens that the longest sequence may have."""
        return self.num_pages * self.page_size


class Record(NamedTuple):
    """A finished request: its job, and when it was begun, gave its first and its last token."""

    job: Job
    started_s: float
    first_s: float
    finished_s: float


class Replica:
    """One engine on the virtual clock.

    It is idle, in a step that ends at `ends_s`, or in a run of steps that decide nothing. `run`
    starts what comes next, `finish` books it; between them `submit` may cut a run short.
    """

    def __init__(self, cost: StepCost, config: ReplicaConfig, *, jump: bool = True) -> None:
        slots = config.max_num_seqs + config.num_snapshots
        self.cache = Cache(
            num_pages=config.num_pages, page_size=config.page_size, num_slots=slots
        )  # fmt: skip
        prefixes = PrefixCache(self.cache, config.num_snapshots) if config.num_snapshots else None
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            reads_ahead=bool(config.accepted),
            prefixes=prefixes,
        )
        self.cost, self.config, self.jump = cost, config, jump
        self.jobs: dict[str, Job] = {}
        self.num_steps = self.num_tokens = self.num_reused = 0
        self.busy_s = 0.0
        self.ends_s: float | None = None
        self.version = 0  # of what runs now
        self._plan: StepPlan | None = None
        self._outcomes: list[Outcome] = []
        self._firsts: list[LiveSequence] = []
        self._begun_s = 0.0
        self._run: list[float] = []  # ends of the steps of a run
        self._quiet = False  # the next steps decide nothing
        self._news = False  # someone came since the last plan
        self._reach = 8
        self._numbers = random.Random(0)

    def submit(self, job: Job, key: str, now_s: float) -> None:
        """Queue `job`; raises ConfigError when it can never fit."""
        if not self.scheduler.fits(job.prompt + job.output):
            raise ConfigError(
                f"a request of {job.prompt} and {job.output} tokens exceeds the "
                f"{self.config.longest} that a replica holds: lower the trace's lengths, or plan "
                "more memory"
            )
        points: frozenset[int] = frozenset()
        tokens = [0] * job.prompt
        if self.scheduler.prefixes is not None:
            tokens = prompt_tokens(job)
            points = _snapshot_points(job.prompt)
        self.jobs[key] = job
        self.scheduler.add(
            LiveSequence(
                id=key,
                tokens=tokens,
                num_prompt=job.prompt,
                params=_PARAMS,
                max_tokens=job.output,
                snapshot_points=points,
                arrived_s=now_s,
            )
        )
        self._quiet, self._news = False, True
        if self._run and self._run[-1] > now_s:  # the step that runs now is the last of the run
            del self._run[bisect_left(self._run, now_s) + 1 :]
            self.ends_s = self._run[-1]
            self.version += 1
            self._reach = max(len(self._run), 8)

    def run(self, now_s: float) -> bool:
        """Start the next step, or several that decide nothing; False if there is nothing to do."""
        assert self.ends_s is None
        self._begun_s = now_s
        if self.jump and self._quiet and self._start_run(now_s):
            return True
        self._news = False
        plan = self.scheduler.plan(len(self.config.accepted))
        if not plan.segments:
            return False
        self._plan = plan
        self.ends_s = now_s + self._measure(plan, now_s)
        self.version += 1
        return True

    def finish(self) -> list[Record]:
        """Book what ends at `ends_s`; returns the requests that it finished."""
        assert self.ends_s is not None
        now_s, self.ends_s = self.ends_s, None
        self.busy_s += now_s - self._begun_s
        if self._run:
            return self._finish_run(now_s)
        plan = self._plan
        assert plan is not None
        self.num_steps += 1
        self._plan = None
        advanced = self.scheduler.update(plan, self._outcomes)
        if self.scheduler.prefixes is not None:
            self.scheduler.prefixes.drain()
        for sequence in self._firsts:
            sequence.first_token_s = now_s
        samples = all(outcome is not _NONE for outcome in self._outcomes)
        running = len(self.scheduler.running)
        # What did not enter now cannot before someone leaves; then nothing is decided till then.
        room = plan.num_tokens < self.config.max_num_batched_tokens
        done = [s for s in advanced if s.finish is not None]
        full = running == self.config.max_num_seqs
        blocked = not self.scheduler.num_waiting or (not done and (room or full))
        self._quiet = bool(
            samples
            and running
            and not self._news
            and blocked
            and len(plan.segments) == running + len(done)
            and not self.config.accepted
        )
        return [self._record(sequence, now_s) for sequence in done]

    def _record(self, sequence: LiveSequence, now_s: float) -> Record:
        assert sequence.started_s is not None and sequence.first_token_s is not None
        self.num_reused += sequence.reused
        job = self.jobs.pop(sequence.id)
        return Record(job, sequence.started_s, sequence.first_token_s, now_s)

    def _measure(self, plan: StepPlan, now_s: float) -> float:
        """Return the seconds of a planned step, and prepare what comes of it."""
        tokens = context = pairs = samples = drafting = 0
        outcomes, firsts = [], []
        sequences = self.scheduler.sequences
        speculates = bool(self.config.accepted)
        for segment in plan.segments:
            count, start = len(segment.tokens), segment.start
            tokens += count
            context += start + count
            pairs += count * start + count * (count + 1) // 2
            if count > 1 or not segment.sample or start == 0:
                sequence = sequences[segment.id]
                if sequence.started_s is None:
                    sequence.started_s = now_s
            if not segment.sample:
                outcomes.append(_NONE)
                continue
            samples += 1 + segment.num_drafts
            drafting += bool(segment.draft)
            sequence = sequences[segment.id]
            outcomes.append(self._accept(segment) if speculates else self._chosen(sequence, 1))
            if sequence.first_token_s is None:
                if sequence.started_s is None:
                    sequence.started_s = now_s
                firsts.append(sequence)
        self._outcomes, self._firsts = outcomes, firsts
        self.num_tokens += tokens
        count = len(plan.segments)
        seconds = self.cost.step(tokens, count, context, pairs, samples=samples)
        if drafting and hasattr(self.cost, "drafting"):
            seconds += cast(Any, self.cost).drafting(drafting)
        return seconds

    def _accept(self, segment: Any) -> Outcome:
        """Draw how many of the drafts of a segment stand."""
        drawn = self._numbers.random()
        kept = sum(drawn < chance for chance in self.config.accepted[: segment.num_drafts])
        tokens = self._chosen(self.scheduler.sequences[segment.id], 1 + kept).tokens
        return Outcome(tokens, (0,) * segment.draft)

    def _chosen(self, sequence: LiveSequence, count: int) -> Outcome:
        """Return the next tokens of an answer: as later turns repeat them, where that matters."""
        if self.scheduler.prefixes is None:
            return _ONE if count == 1 else Outcome((0,) * count)
        job = self.jobs[sequence.id]
        return Outcome(tuple(session_tokens(job, len(sequence.tokens), count)))

    def _start_run(self, now_s: float) -> bool:
        """Start as many steps as decide nothing; False if that is none."""
        running = self.scheduler.running
        shared = self.scheduler.prefixes is not None
        most = min(s.num_prompt + s.max_tokens - len(s.tokens) for s in running) - shared
        most = min(most, self._reach, _FARTHEST)
        size, pool = self.cache.page_size, self.cache.pages
        while most > 0:
            # The last token chosen is not in the state yet: a step needs room for what it computes.
            needed = sum(-(-(s.num_computed + most) // size) - len(s.pages) for s in running)
            if needed <= pool.num_free:
                break
            most //= 2
        if most < 1:
            return False
        self._reach = min(2 * self._reach, _FARTHEST)
        count = len(running)
        context = sum(s.num_computed for s in running) + count
        step, ends, end = self.cost.step, [], now_s
        for _ in range(most):
            end = end + step(count, count, context, context, samples=count)
            ends.append(end)
            context += count
        self._run, self.ends_s = ends, end
        self.version += 1
        return True

    def _finish_run(self, now_s: float) -> list[Record]:
        steps, self._run = len(self._run), []
        running = self.scheduler.running
        self.num_steps += steps
        self.num_tokens += steps * len(running)
        size, grow, serve = self.cache.page_size, self.cache.grow, self.scheduler.waiting.serve
        done, more = [], [0] * steps
        shared = self.scheduler.prefixes is not None
        for sequence in running:
            tokens = sequence.tokens
            computed = sequence.num_computed + steps
            if computed > len(sequence.pages) * size:
                pages = grow(sequence.id, computed)
                assert pages is not None
                sequence.pages = pages
            sequence.num_computed = computed
            tokens += session_tokens(self.jobs[sequence.id], len(tokens), steps) if shared else more
            serve(sequence, steps)
            if len(tokens) >= sequence.num_prompt + sequence.max_tokens:
                done.append(sequence)
        for sequence in done:
            self.scheduler.abort(sequence.id, "length")
        if done:
            self._quiet = bool(running) and not self.scheduler.num_waiting
        return [self._record(sequence, now_s) for sequence in done]


def _snapshot_points(prompt: int) -> frozenset[int]:
    """Return where the engine keeps states of a prompt of one message: its end, and a grid."""
    interval = _INTERVAL * max(1, -(-prompt // (_INTERVAL * _GRID_POINTS)))
    points = {prompt - 1, *range(interval, prompt, interval)}
    return frozenset(p for p in points if p >= SPACING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of a simulation. Times in seconds; percentiles at 50, 90 and 99 %.

    `busy` is the share of the time that replicas worked, `steps` the engine steps simulated.
    """

    requests: int
    duration_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    ttft_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    queue_s: tuple[float, float, float]
    latency_s: tuple[float, float, float]
    busy: float
    steps: int
    preemptions: int
    reused_share: float


class Simulation:
    """A fleet of replicas that serves one trace."""

    def __init__(self, replicas: Sequence[Replica], trace: Trace) -> None:
        if not replicas:
            raise ConfigError("a simulation needs at least one replica")
        self.replicas, self.trace = list(replicas), trace
        self.now_s = 0.0
        self.waits = array("f"), array("f"), array("f"), array("f")  # TTFT, TPOT, queue, latency
        self.num_finished = self.prompt_tokens = self.output_tokens = 0
        self._keys, self._order = itertools.count(), itertools.count()
        self._arrivals: list[tuple[float, int, Job]] = []
        self._ends: list[tuple[float, int, int, int]] = []  # end, order, replica, version
        self._home: dict[int, int] = {}  # of sessions

    def run(self, on_finish: Callable[[Record], None] | None = None) -> Summary:
        """Serve the whole trace and return what came of it; `on_finish` sees every request."""
        source = self.trace.arrivals()
        upcoming = next(source, None)
        while upcoming is not None or self._arrivals or self._ends:
            arrival = self._arrivals[0][0] if self._arrivals else math.inf
            outside = upcoming.arrival_s if upcoming is not None else math.inf
            end = self._ends[0][0] if self._ends else math.inf
            now_s = min(arrival, outside, end)
            assert now_s >= self.now_s, "the clock ran backwards"
            self.now_s = now_s
            # What ends now makes room before what arrives now asks for it.
            if end <= now_s:
                _, _, index, version = heapq.heappop(self._ends)
                self._step_ended(index, version, on_finish)
            elif outside <= arrival:
                assert upcoming is not None
                self._dispatch(upcoming)
                upcoming = next(source, None)
            else:
                self._dispatch(heapq.heappop(self._arrivals)[2])
        return self._summary()

    def _dispatch(self, job: Job, busy: int | None = None) -> None:
        """Give `job` to a replica: that of its session, else the one with least to do.

        `busy` is one that is started right after.
        """
        index = self._home.get(job.session) if job.turn else None
        if index is None:
            every = self.replicas
            index = 0 if len(every) == 1 else _least_busy(every)
            if job.session >= 0:
                self._home[job.session] = index
        replica = self.replicas[index]
        version = replica.version
        replica.submit(job, str(next(self._keys)), self.now_s)
        if index == busy:
            return
        if replica.ends_s is None:
            self._start(index)
        elif replica.version != version:
            self._expect(index)

    def _start(self, index: int) -> None:
        if self.replicas[index].run(self.now_s):
            self._expect(index)

    def _expect(self, index: int) -> None:
        replica = self.replicas[index]
        assert replica.ends_s is not None
        item = (replica.ends_s, next(self._order), index, replica.version)
        heapq.heappush(self._ends, item)

    def _step_ended(
        self, index: int, version: int, on_finish: Callable[[Record], None] | None
    ) -> None:
        replica = self.replicas[index]
        if version != replica.version or replica.ends_s is None:
            return  # a run that was cut short
        for record in replica.finish():
            self._finished(record)
            if on_finish is not None:
                on_finish(record)
            following = self.trace.follow(record.job, record.finished_s)
            if following is not None:
                item = (following.arrival_s, next(self._order), following)
                heapq.heappush(self._arrivals, item)
        # Requests that follow at once are queued before the next step is planned.
        while self._arrivals and self._arrivals[0][0] <= self.now_s:
            self._dispatch(heapq.heappop(self._arrivals)[2], busy=index)
        self._start(index)

    def _finished(self, record: Record) -> None:
        job = record.job
        self.num_finished += 1
        self.prompt_tokens += job.prompt
        self.output_tokens += job.output
        ttft, tpot, queue, latency = self.waits
        ttft.append(record.first_s - job.arrival_s)
        queue.append(record.started_s - job.arrival_s)
        latency.append(record.finished_s - job.arrival_s)
        if job.output > 1:
            tpot.append((record.finished_s - record.first_s) / (job.output - 1))

    def _summary(self) -> Summary:
        left = sum(len(replica.jobs) for replica in self.replicas)
        assert not left, f"{left} requests never finished"
        ttft, tpot, queue, latency = (_percentiles(values) for values in self.waits)
        duration = self.now_s or math.inf
        reused = sum(replica.num_reused for replica in self.replicas)
        return Summary(
            requests=self.num_finished,
            duration_s=self.now_s,
            output_tokens_per_s=self.output_tokens / duration,
            prompt_tokens_per_s=self.prompt_tokens / duration,
            requests_per_s=self.num_finished / duration,
            ttft_s=ttft,
            tpot_s=tpot,
            queue_s=queue,
            latency_s=latency,
            busy=sum(r.busy_s for r in self.replicas) / duration / len(self.replicas),
            steps=sum(replica.num_steps for replica in self.replicas),
            preemptions=sum(r.scheduler.num_preemptions for r in self.replicas),
            reused_share=reused / max(self.prompt_tokens, 1),
        )


def _least_busy(replicas: Sequence[Replica]) -> int:
    loads = [len(replica.jobs) for replica in replicas]
    return loads.index(min(loads))


def _percentiles(values: Any) -> tuple[float, float, float]:
    import numpy

    if not len(values):
        return 0.0, 0.0, 0.0
    found = numpy.percentile(numpy.frombuffer(values, dtype=numpy.float32), (50, 90, 99))
    return float(found[0]), float(found[1]), float(found[2])
