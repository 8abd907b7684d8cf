"""Pages and slots: nothing leaks, nothing has two owners, whatever comes in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aprium.base.errors import ConfigError
from aprium.engine.cache import Cache, Pool

NUM_PAGES, PAGE_SIZE, NUM_SLOTS = 12, 4, 3


class CacheMachine(RuleBasedStateMachine):
    """The cache against a model of it: a dict of what everybody owns."""

    def __init__(self):
        super().__init__()
        self.cache = Cache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, num_slots=NUM_SLOTS)
        self.held: dict[str, tuple[int, ...]] = {}
        self.count = 0

    @property
    def num_free(self):
        return NUM_PAGES - sum(map(len, self.held.values()))

    @rule(tokens=st.integers(1, 60))
    def admit(self, tokens):
        owner = f"s{self.count}"
        self.count += 1
        needed = -(-tokens // PAGE_SIZE)
        granted = self.cache.admit(owner, tokens)
        possible = needed <= self.num_free and len(self.held) < NUM_SLOTS
        assert (granted is not None) == possible
        if granted is not None:
            _slot, pages = granted
            assert len(pages) == needed
            self.held[owner] = pages

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(1, 60))
    def grow(self, data, tokens):
        owner = data.draw(st.sampled_from(sorted(self.held)))
        before = self.held[owner]
        missing = max(0, -(-tokens // PAGE_SIZE) - len(before))
        pages = self.cache.grow(owner, tokens)
        assert (pages is not None) == (missing <= self.num_free)
        if pages is not None:
            assert pages[: len(before)] == before and len(pages) == len(before) + missing
            self.held[owner] = pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.release(owner)
        del self.held[owner]

    @invariant()
    def sound(self):
        self.cache.check()
        everything = [page for pages in self.held.values() for page in pages]
        assert len(everything) == len(set(everything))
        assert self.cache.pages.num_free == self.num_free
        assert self.cache.slots.num_free == NUM_SLOTS - len(self.held)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40)


def test_check_sees_a_leak_and_a_double_owner():
    pool = Pool("pages", 4)
    pool.take("a", 2)
    pool.check()
    pool._owned["b"] = pool.owned("a")
    with pytest.raises(AssertionError, match="more or fewer owners"):
        pool.check()
    del pool._owned["a"], pool._owned["b"]
    with pytest.raises(AssertionError, match="lost"):
        pool.check()


def test_check_sees_pages_without_a_slot():
    cache = Cache(num_pages=4, page_size=2, num_slots=2)
    cache.admit("a", 3)
    cache.slots.release("a")
    with pytest.raises(AssertionError, match="different owners"):
        cache.check()


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_must_be_positive(sizes):
    pages, page_size, slots = sizes
    with pytest.raises(ConfigError):
        Cache(num_pages=pages, page_size=page_size, num_slots=slots)
