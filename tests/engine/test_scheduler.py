"""The scheduler against a fake runner: budgets, order, coverage, and everybody finishes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aprium.base.records import SamplingParams
from aprium.engine.cache import Cache
from aprium.engine.prefix import CopyPage, CopySlot, Load, Meta, PrefixCache, Save
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


def make_scheduler(
    *, pages=8, page_size=4, seqs=3, budget=7, chunked=True, snapshots=0, store=None
):
    cache = Cache(num_pages=pages, page_size=page_size, num_slots=seqs + snapshots)
    return Scheduler(
        cache,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        chunked_prefill=chunked,
        prefixes=PrefixCache(cache, snapshots, store) if snapshots else None,
    )


class FakeStore:
    """Keeps histories by key; `lose` makes some go, or turn out damaged when they are fetched."""

    def __init__(self):
        self.kept: dict[str, tuple[Meta, tuple[int, ...]]] = {}
        self.damaged: set[str] = set()

    def has(self, key):
        while key is not None and key in self.kept:
            key = self.kept[key][0].parent
        return key is None

    def fetch(self, key):
        path = []
        while key is not None:
            meta, history = self.kept[key]
            if key in self.damaged:
                del self.kept[key]
                return None
            path.append((meta.start, history))
            key = meta.parent
        return path[::-1]

    def put(self, meta, history):
        self.kept[meta.key] = meta, history
        self.damaged.discard(meta.key)

    def drop(self, key):
        self.kept.pop(key, None)

    def touch(self, key):
        assert key is not None

    def entries(self):
        return ()


class FakeRunner:
    """A state machine a slot and a page: knows what was written where, and reads it back.

    The "token" sampled at a position is a function of the sequence's whole history, so a wrong
    recomputation shows. Drafts are right or wrong at random. Tokens under verification are in a
    ring and reach the slot when a later step replays them.
    """

    def __init__(self, page_size, cache=None, store=None):
        self.page_size, self.cache, self.store = page_size, cache, store
        self.slots: dict[int, tuple[int, ...]] = {}
        self.rings: dict[int, tuple[int, ...]] = {}
        self.pages: dict[tuple[int, int], int] = {}
        self.random = random.Random(0)

    def run(self, plan):
        self.apply(plan.operations)
        outcomes = []
        written: set[int] = set()
        for segment in plan.segments:
            assert segment.tokens, "a segment without tokens"
            own = {*segment.pages[segment.start // self.page_size :]}
            assert not written & {*segment.pages}, "a page written for one and read by another"
            written |= own
            if self.cache is not None:
                assert all(self.cache.pages.num_owners(p) == 1 for p in own), "not its own page"
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

    def apply(self, operations):
        for order in operations:
            if isinstance(order, CopySlot):
                self.slots[order.target] = self.slots[order.source]
            elif isinstance(order, CopyPage):
                for i in range(self.page_size):
                    if (order.source, i) in self.pages:
                        self.pages[order.target, i] = self.pages[order.source, i]
            elif isinstance(order, Save):
                history = self.slots[order.slot]
                assert len(history) == order.meta.length
                assert history[order.meta.start :] == order.meta.edge
                places = [self._at(order.pages, i) for i in range(len(history))]
                assert [self.pages[p] for p in places] == [*history], "saved what was not there"
                self.store.put(order.meta, history)
            elif isinstance(order, Load):
                for start, history in order.parts:
                    for i in range(start, len(history)):
                        self.pages[self._at(order.pages, i)] = history[i]
                self.slots[order.slot] = order.parts[-1][1]
            else:
                self.store.drop(order.key)

    def _at(self, pages, position):
        return pages[position // self.page_size], position % self.page_size

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
        return self._at(segment.pages, position)


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


def prioritised(name, priority=0, share="", deadline_s=None, num_prompt=4, max_tokens=4):
    sequence = make(name, num_prompt, max_tokens)
    sequence.priority, sequence.share, sequence.deadline_s = priority, share, deadline_s
    return sequence


def test_a_higher_priority_takes_the_place_of_a_lower():
    scheduler = make_scheduler(pages=100, seqs=2, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    for name in ("low0", "low1"):
        scheduler.add(prioritised(name, 1, max_tokens=20))
    for _ in range(3):
        plan = scheduler.plan()
        scheduler.update(plan, runner.run(plan))
    scheduler.add(prioritised("high", 0))
    scheduler.add(prioritised("lowest", 2))
    plan = scheduler.plan()
    assert [s.id for s in plan.segments] == ["high", "low0"]
    scheduler.update(plan, runner.run(plan))
    order = [s.id for s in drain(scheduler, runner)]
    assert order == ["high", "low0", "low1", "lowest"]
    assert scheduler.num_preemptions == 1


def test_shares_take_turns_and_nobody_saves_up():
    scheduler = make_scheduler(pages=100, seqs=1, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    for i in range(4):
        scheduler.add(prioritised(f"a{i}", share="a"))
    scheduler.add(prioritised("b0", share="b"))
    scheduler.add(prioritised("b1", share="b"))
    assert [s.id for s in drain(scheduler, runner)] == ["a0", "b0", "a1", "b1", "a2", "a3"]
    # A share that comes later is served at once, but not for all the time that it was away.
    for i in range(3):
        scheduler.add(prioritised(f"a{i}", share="a"))
        scheduler.add(prioritised(f"c{i}", share="c"))
    order = [s.id for s in drain(scheduler, runner)]
    assert {order[i][0] + order[i + 1][0] for i in (0, 2, 4)} <= {"ac", "ca"}


def test_deadlines_order_a_share_and_end_what_is_late():
    scheduler = make_scheduler(pages=100, seqs=1, budget=50)
    runner = FakeRunner(scheduler.cache.page_size)
    for name, deadline in (("late", 9.0), ("soon", 5.0), ("free", None)):
        scheduler.add(prioritised(name, deadline_s=deadline))
    plan = scheduler.plan()
    assert [s.id for s in plan.segments] == ["soon"]
    scheduler.update(plan, runner.run(plan))
    assert [s.id for s in scheduler.expire(7.0)] == ["soon"]
    assert [s.id for s in scheduler.expire(7.0)] == []
    assert [s.id for s in drain(scheduler, runner)] == ["late", "free"]


def test_followers_wait_for_the_prompt_and_share_it():
    scheduler = make_scheduler(pages=100, seqs=4, budget=8, snapshots=2)
    runner = FakeRunner(scheduler.cache.page_size, scheduler.cache)
    group = [make(f"s{i}", 21, 3) for i in range(4)]
    for sequence in group:
        sequence.private, sequence.salt = True, "only s0"
        sequence.follows = None if sequence is group[0] else "s0"
        sequence.snapshot_points = frozenset({20}) if sequence is group[0] else frozenset()
        scheduler.add(sequence)
    computed = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        computed += sum(min(len(s.tokens), 21 - s.start) for s in plan.segments if s.start < 21)
        scheduler.update(plan, runner.run(plan))
        scheduler.check()
    assert computed == 21 + 3
    assert all(s.tokens == alone(21, 3) for s in group)
    assert scheduler.cache.slots.num_free == 6 and scheduler.cache.pages.num_free == 100


def test_followers_go_on_alone_when_their_leader_leaves():
    scheduler = make_scheduler(pages=100, seqs=4, budget=8, snapshots=2)
    runner = FakeRunner(scheduler.cache.page_size, scheduler.cache)
    leader, follower = make("a", 21, 3), make("b", 21, 3)
    follower.follows = "a"
    scheduler.add(leader)
    scheduler.add(follower)
    plan = scheduler.plan()
    assert [s.id for s in plan.segments] == ["a"] and scheduler.num_waiting == 1
    scheduler.abort("a")
    scheduler.check()
    assert [s.id for s in drain(scheduler, runner)] == ["b"]
    assert follower.tokens == alone(21, 3)


def test_a_preempted_state_comes_back_from_the_store():
    store = FakeStore()
    scheduler = make_scheduler(pages=4, seqs=3, budget=50, snapshots=1, store=store)
    runner = FakeRunner(4, scheduler.cache, store)
    old, young = make("old", 7, 9), make("young", 7, 9)
    for sequence in (old, young):
        sequence.private, sequence.salt = True, f"only {sequence.id}"
        scheduler.add(sequence)
    computed = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        computed += sum(len(s.tokens) for s in plan.segments if s.id == "young")
        scheduler.update(plan, runner.run(plan))
        scheduler.check()
    assert young.num_preemptions == 1 and computed == 15  # nothing was computed twice
    assert old.tokens == young.tokens == alone(7, 9)
    assert scheduler.prefixes.num_restored == 1


class SchedulerMachine(RuleBasedStateMachine):
    """Random everything with few pages: sound at every moment, clean at the end."""

    def __init__(self):
        super().__init__()
        self.store = FakeStore()
        self.scheduler = make_scheduler(
            pages=9, page_size=4, seqs=4, budget=9, snapshots=3, store=self.store
        )
        self.runner = FakeRunner(4, self.scheduler.cache, self.store)
        self.everyone: list[LiveSequence] = []
        self.shape: dict[str, tuple[int, int]] = {}
        self.held = []

    @rule(
        num_prompt=st.integers(1, 16),
        max_tokens=st.integers(0, 12),
        priority=st.integers(0, 2),
        share=st.sampled_from("ab"),
        points=st.sets(st.integers(1, 16), max_size=3),
        keep_every=st.sampled_from([0, 0, 2, 5]),
        private=st.booleans(),
        data=st.data(),
    )
    def add(self, num_prompt, max_tokens, priority, share, points, keep_every, private, data):
        sequence = make(f"s{len(self.everyone)}", num_prompt, max_tokens)
        sequence.priority, sequence.share = priority, share
        sequence.private, sequence.keep_every = private, keep_every
        sequence.salt = f"only {sequence.id}" if private else data.draw(st.sampled_from("xy"))
        sequence.snapshot_points = frozenset(p for p in points if p < num_prompt)
        if self.everyone and data.draw(st.booleans()):
            leader = data.draw(st.sampled_from(self.everyone))
            sequence.follows, sequence.salt, sequence.private = (
                leader.id, leader.salt, leader.private
            )  # fmt: skip
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
            self.runner.apply(self.scheduler.prefixes.drain())

    @rule(salt=st.sampled_from([None, "x", "y"]))
    def forget(self, salt):
        self.scheduler.prefixes.forget(salt)

    @rule()
    def restart(self):
        self.scheduler.restart()

    @rule(length=st.integers(1, 16), salt=st.sampled_from("xy"))
    def hold(self, length, salt):
        """A session takes hold of what there is."""
        match = self.scheduler.prefixes.find([*range(length), -1], salt)
        self.scheduler.prefixes.hold(match.node)
        self.held.append(match.node)

    @rule(data=st.data(), how=st.sampled_from(["lose", "damage"]))
    def harm(self, data, how):
        """The store loses something, or it turns out damaged."""
        if self.store.kept:
            key = data.draw(st.sampled_from(sorted(self.store.kept)))
            if how == "lose":
                self.store.drop(key)
            else:
                self.store.damaged.add(key)

    @invariant()
    def sound(self):
        self.scheduler.check()

    def teardown(self):
        drain(self.scheduler, self.runner)
        for node in self.held:
            self.scheduler.prefixes.hold(None, node)
        self.scheduler.prefixes.forget()
        assert self.scheduler.cache.pages.num_free == 9
        assert self.scheduler.cache.slots.num_free == 7
        for sequence in self.everyone:
            if sequence.finish != "abort":
                assert sequence.tokens == alone(*self.shape[sequence.id])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=50)
