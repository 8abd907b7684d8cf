"""The scheduler against a fake runner: budgets, order, coverage, and everybody finishes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aprium.base.records import SamplingParams
from aprium.engine.cache import Cache
from aprium.engine.request import LiveSequence
from aprium.engine.scheduler import Outcome, Scheduler
from aprium.engine.speculative import count_accepted

STOP = 999


def make(name, num_prompt, max_tokens, **params):
    return LiveSequence(
        id=name,
        tokens=list(range(num_prompt)),
        num_prompt=num_prompt,
        params=SamplingParams(**params),
        max_tokens=max_tokens,
        stop_ids=frozenset({STOP}),
    )


def make_scheduler(*, pages=8, page_size=4, seqs=3, budget=7, chunked=True):
    cache = Cache(num_pages=pages, page_size=page_size, num_slots=seqs)
    return Scheduler(
        cache, max_num_seqs=seqs, max_num_batched_tokens=budget, chunked_prefill=chunked
    )


class FakeRunner:
    """A state machine a slot and a page: knows what was written where, and reads it back.

    The "token" sampled at a position is a function of the sequence's whole history, so a wrong
    recomputation shows. Drafts are right or wrong at random. Tokens under verification are in a
    ring and reach the slot when a later step replays them.
    """

    def __init__(self, page_size):
        self.page_size = page_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self.rings: dict[int, tuple[int, ...]] = {}
        self.pages: dict[tuple[int, int], int] = {}
        self.random = random.Random(0)

    def run(self, plan):
        outcomes = []
        owners: set[int] = set()
        for segment in plan.segments:
            assert segment.tokens, "a segment without tokens"
            assert not owners & set(segment.pages), "a page in two segments"
            owners |= set(segment.pages)
            history = self.slots.get(segment.slot, ()) if segment.start > segment.late else ()
            if segment.late:
                history += self.rings[segment.slot][: segment.late]
            assert len(history) == segment.start, "a state that is not where the plan thinks"
            for position, token in enumerate(history):
                assert self.pages[self._place(segment, position)] == token, "a page overwritten"
            for offset, token in enumerate(segment.tokens):
                self.pages[self._place(segment, segment.start + offset)] = token
            self.slots[segment.slot] = history
            if segment.num_drafts:
                self.rings[segment.slot] = segment.tokens
            else:
                self.slots[segment.slot] = history + segment.tokens
            outcomes.append(self._outcome(segment, history))
        return outcomes

    def _outcome(self, segment, history):
        if not segment.sample:
            return Outcome()
        first = len(segment.tokens) - segment.num_drafts
        chosen = [
            hash(history + segment.tokens[:end]) % 500
            for end in range(first, len(segment.tokens) + 1)
        ]
        kept = count_accepted(segment.tokens[first:], chosen)
        tokens = chosen[: kept + 1]
        drafts: tuple[int, ...] = ()
        history = history + segment.tokens[: first + kept] + (tokens[-1],)
        for _ in range(segment.draft):
            right = self.random.random() < 0.7
            drafts += (hash(history + drafts) % 500 if right else -1,)
        assert len(segment.pages) * self.page_size >= len(history) - 1 + len(drafts)
        return Outcome(tuple(tokens), drafts)

    def _place(self, segment, position):
        return segment.pages[position // self.page_size], position % self.page_size


def alone(num_prompt, max_tokens):
    """Return what a sequence generates with the whole machine to itself."""
    tokens = list(range(num_prompt))
    for _ in range(max_tokens):
        tokens.append(hash(tuple(tokens)) % 500)
    return tokens


def drain(scheduler, runner, limit=10_000, drafts=0):
    finished = []
    while scheduler.has_work:
        plan = scheduler.plan(drafts)
        assert plan.segments, "work, but nothing planned"
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        finished += [s for s in scheduler.update(plan, runner.run(plan)) if s.finish]
        scheduler.check()
        limit -= 1
        assert limit, "the scheduler does not come to an end"
    return finished


shapes = st.tuples(st.integers(1, 20), st.integers(0, 12))


@settings(deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=8),
    st.integers(8, 14),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_all_finish_with_their_own_tokens(requests, pages, seqs, budget, drafts):
    scheduler = make_scheduler(pages=pages, seqs=seqs, budget=budget)
    runner = FakeRunner(scheduler.cache.page_size)
    sequences = [make(f"s{i}", *shape) for i, shape in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    drain(scheduler, runner, drafts=drafts)
    for sequence, (num_prompt, max_tokens) in zip(sequences, requests, strict=True):
        assert sequence.tokens == alone(num_prompt, max_tokens)
        assert sequence.finish == "length"
    assert scheduler.cache.pages.num_free == pages
    assert scheduler.cache.slots.num_free == seqs


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=6), st.integers(1, 9))
def test_chunks_cover_every_token_once(requests, budget):
    scheduler = make_scheduler(pages=100, seqs=6, budget=budget)
    runner = FakeRunner(scheduler.cache.page_size)
    sequences = [make(f"s{i}", *shape) for i, shape in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    covered = {s.id: [] for s in sequences}
    while scheduler.has_work:
        plan = scheduler.plan()
        for segment in plan.segments:
            covered[segment.id] += range(segment.start, segment.start + len(segment.tokens))
        scheduler.update(plan, runner.run(plan))
    assert scheduler.num_preemptions == 0
    for sequence in sequences:
        # The last generated token is never fed back.
        needed = max(sequence.num_prompt, sequence.num_tokens - 1)
        assert covered[sequence.id] == list(range(needed))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2))
def test_prompt_positions_are_scored_once(num_prompt, budget, preempt_at):
    scheduler = make_scheduler(pages=100, seqs=1, budget=budget)
    runner = FakeRunner(scheduler.cache.page_size)
    sequence = make("s", num_prompt, 3, prompt_logprobs=0)
    scheduler.add(sequence)
    scored = []
    step = 0
    while scheduler.has_work:
        if step == preempt_at and scheduler.running:
            # Somebody takes every page, and the sequence asks for one more.
            scheduler.cache.pages.take("hog", scheduler.cache.pages.num_free)
            assert not scheduler._find_pages(sequence, 4 * (len(sequence.pages) + 1))
            scheduler.cache.pages.release("hog")
        plan = scheduler.plan()
        for segment in plan.segments:
            assert segment.score_from + len(segment.targets) <= len(segment.tokens)
            scored += segment.targets
        scheduler.update(plan, runner.run(plan))
        step += 1
    assert scored == list(range(1, num_prompt))


def test_admission_and_finish_are_first_come_first_served():
    scheduler = make_scheduler(pages=100, seqs=2, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    for i in range(7):
        scheduler.add(make(f"s{i}", 3, 4))
    assert [s.id for s in drain(scheduler, runner)] == [f"s{i}" for i in range(7)]


def test_prefill_chunks_ride_along_with_decoding():
    scheduler = make_scheduler(pages=100, seqs=3, budget=6)
    runner = FakeRunner(scheduler.cache.page_size)
    scheduler.add(make("short", 2, 8))
    scheduler.add(make("long", 20, 2))
    shapes = []
    for _ in range(5):
        plan = scheduler.plan()
        shapes.append([(s.id, len(s.tokens), s.sample) for s in plan.segments])
        scheduler.update(plan, runner.run(plan))
    assert shapes == [
        [("short", 2, True), ("long", 4, False)],
        [("short", 1, True), ("long", 5, False)],
        [("short", 1, True), ("long", 5, False)],
        [("short", 1, True), ("long", 5, False)],
        [("short", 1, True), ("long", 1, True)],
    ]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens():
    scheduler = make_scheduler(pages=4, page_size=4, seqs=3, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    old, young = make("old", 7, 9), make("young", 7, 9)
    scheduler.add(old)
    scheduler.add(young)
    drain(scheduler, runner)
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert old.tokens == alone(7, 9) and young.tokens == alone(7, 9)


def test_without_chunks_a_prompt_waits_for_room_in_one_step():
    scheduler = make_scheduler(pages=100, seqs=3, budget=10, chunked=False)
    runner = FakeRunner(scheduler.cache.page_size)
    assert not scheduler.fits(11)
    scheduler.add(make("a", 6, 3))
    scheduler.add(make("b", 6, 3))
    lengths = []
    while scheduler.has_work:
        plan = scheduler.plan()
        lengths.append([len(s.tokens) for s in plan.segments])
        scheduler.update(plan, runner.run(plan))
    assert lengths == [[6], [1, 6], [1, 1], [1]]


def test_stop_token_ends_a_sequence_and_is_kept():
    scheduler = make_scheduler()
    sequence = make("s", 2, 5)
    scheduler.add(sequence)
    plan = scheduler.plan()
    scheduler.update(plan, [Outcome((7,))])
    plan = scheduler.plan()
    scheduler.update(plan, [Outcome((STOP, 8))])
    assert sequence.finish == "stop" and sequence.tokens[2:] == [7, STOP]
    assert not scheduler.has_work


def test_abort_between_plan_and_update_is_ignored_by_update():
    scheduler = make_scheduler()
    scheduler.add(make("a", 2, 5))
    scheduler.add(make("b", 2, 5))
    plan = scheduler.plan()
    assert scheduler.abort("a").finish == "abort"
    assert [s.id for s in scheduler.update(plan, [Outcome((1,)), Outcome((2,))])] == ["b"]
    assert scheduler.abort("a") is None
    scheduler.check()


def test_drafts_are_verified_in_one_step_and_save_steps():
    steps = []
    for drafts in (0, 3):
        scheduler = make_scheduler(pages=100, seqs=1, budget=50)
        runner = FakeRunner(scheduler.cache.page_size)
        sequence = make("s", 5, 40)
        scheduler.add(sequence)
        count = 0
        while scheduler.has_work:
            plan = scheduler.plan(drafts)
            scheduler.update(plan, runner.run(plan))
            count += 1
        steps.append(count)
        assert sequence.tokens == alone(5, 40)
    assert steps[0] == 40 and steps[1] < 28
    assert 0 < sequence.num_accepted < sequence.num_drafted


def test_drafts_never_preempt_anybody():
    scheduler = make_scheduler(pages=4, page_size=4, seqs=2, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    for name in ("a", "b"):
        scheduler.add(make(name, 4, 4))
    drain(scheduler, runner, drafts=5)
    assert scheduler.num_preemptions == 0


def test_a_sequence_that_can_never_fit_is_refused():
    scheduler = make_scheduler(pages=4, page_size=4)
    assert scheduler.fits(16) and not scheduler.fits(17)
    with pytest.raises(AssertionError, match="cannot fit"):
        scheduler.add(make("s", 10, 7))


class SchedulerMachine(RuleBasedStateMachine):
    """Random adds, aborts and steps with few pages: sound at every moment, clean at the end."""

    def __init__(self):
        super().__init__()
        self.scheduler = make_scheduler(pages=7, page_size=4, seqs=4, budget=9)
        self.runner = FakeRunner(4)
        self.everyone: list[LiveSequence] = []
        self.shape: dict[str, tuple[int, int]] = {}

    @rule(num_prompt=st.integers(1, 16), max_tokens=st.integers(0, 12))
    def add(self, num_prompt, max_tokens):
        sequence = make(f"s{len(self.everyone)}", num_prompt, max_tokens)
        self.everyone.append(sequence)
        self.shape[sequence.id] = (num_prompt, max_tokens)
        self.scheduler.add(sequence)

    @rule(data=st.data())
    def abort(self, data):
        if self.everyone:
            sequence = data.draw(st.sampled_from(self.everyone))
            live = sequence.finish is None
            assert (self.scheduler.abort(sequence.id) is sequence) == live

    @rule(times=st.integers(1, 8), drafts=st.integers(0, 4))
    def step(self, times, drafts):
        for _ in range(times):
            plan = self.scheduler.plan(drafts)
            assert bool(plan.segments) == self.scheduler.has_work
            assert plan.num_tokens <= 9
            self.scheduler.update(plan, self.runner.run(plan))

    @invariant()
    def sound(self):
        self.scheduler.check()

    def teardown(self):
        drain(self.scheduler, self.runner)
        assert self.scheduler.cache.pages.num_free == 7
        assert self.scheduler.cache.slots.num_free == 4
        for sequence in self.everyone:
            if sequence.finish != "abort":
                assert sequence.tokens == alone(*self.shape[sequence.id])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
