"""Who owns which KV page and which recurrent-state slot: bookkeeping of ids, without tensors.

The tensors behind the ids belong to `model.state`. A sequence owns one slot and as many pages as
its tokens need, from the moment it is admitted until it finishes or is preempted; full pages may
be shared, since nobody writes to them any more.
Invariants, verified by `check`: every id is either free or owned, a slot by one owner only; pages
and slot of an owner come and go together.
"""

from collections import Counter

from aprium.base.errors import ConfigError


class Pool:
    """Ids 0 .. size - 1, each free or owned, by several who share it."""

    def __init__(self, name: str, size: int) -> None:
        if size < 1:
            raise ConfigError(f"{name}: {size} is too few, at least 1 is needed")
        self.name = name
        self.size = size
        # A stack: what was freed last is used first, while it is warm in the processor's cache.
        self._free = list(range(size - 1, -1, -1))
        self._owned: dict[str, tuple[int, ...]] = {}
        self._owners = [0] * size  # of each id
        self.num_releases = 0

    @property
    def num_free(self) -> int:
        """Ids that nobody owns."""
        return len(self._free)

    @property
    def owners(self) -> set[str]:
        """Sequences that own at least one id."""
        return set(self._owned)

    def num_owners(self, id: int) -> int:
        """Return how many have `id`."""
        return self._owners[id]

    def owned(self, owner: str) -> tuple[int, ...]:
        """Return the ids of `owner`, in the order in which it took them."""
        return self._owned.get(owner, ())

    def take(self, owner: str, count: int) -> tuple[int, ...]:
        """Give `owner` `count` more ids and return all it owns; they must be free."""
        assert 0 < count <= len(self._free), f"{self.name}: {count} asked, {self.num_free} free"
        new = tuple(self._free.pop() for _ in range(count))
        for i in new:
            self._owners[i] = 1
        self._owned[owner] = held = self._owned.get(owner, ()) + new
        return held

    def share(self, owner: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Let `owner` have `ids` of others too; returns all it owns."""
        for i in ids:
            assert self._owners[i], f"{self.name}: {i} is free and cannot be shared"
            self._owners[i] += 1
        self._owned[owner] = held = self._owned.get(owner, ()) + ids
        return held

    def release(self, owner: str) -> None:
        """Let go of every id of `owner`; those that nobody else has are free."""
        self.num_releases += 1
        for i in reversed(self._owned.pop(owner, ())):
            self._owners[i] -= 1
            if not self._owners[i]:
                self._free.append(i)

    def check(self) -> None:
        """Assert that every id is free once or owned, and by as many as the books say."""
        held = Counter(i for ids in self._owned.values() for i in ids)
        assert sorted([*self._free, *held]) == list(range(self.size)), (
            f"{self.name}: an id is lost, or both free and owned"
        )
        assert all(self._owners[i] == held[i] for i in range(self.size)), (
            f"{self.name}: an id has more or fewer owners than counted"
        )
        assert all(self._owned.values()), f"{self.name}: an owner of nothing is on the books"


class Cache:
    """Pages and slots of all sequences."""

    def __init__(self, *, num_pages: int, page_size: int, num_slots: int) -> None:
        if page_size < 1:
            raise ConfigError(f"block_size is {page_size}: it must be at least 1")
        self.page_size = page_size
        self.pages = Pool("KV pages", num_pages)
        self.slots = Pool("state slots", num_slots)

    @property
    def num_releases(self) -> int:
        """How often something was given back; while it stays, nothing that failed can succeed."""
        return self.slots.num_releases

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def admit(
        self, owner: str, num_tokens: int, shared: tuple[int, ...] = ()
    ) -> tuple[int, tuple[int, ...]] | None:
        """Give a new sequence a slot and pages for `num_tokens`; None when there are too few.

        `shared` are the first of its pages, which others have too.
        """
        assert not self.slots.owned(owner), f"{owner} is admitted already"
        needed = self.pages_for(num_tokens) - len(shared)
        if not self.slots.num_free or needed > self.pages.num_free:
            return None
        (slot,) = self.slots.take(owner, 1)
        if shared:
            self.pages.share(owner, shared)
        return slot, self.pages.take(owner, needed)

    def grow(self, owner: str, num_tokens: int) -> tuple[int, ...] | None:
        """Return the pages of `owner`, enough for `num_tokens`; None when there are too few."""
        held = self.pages.owned(owner)
        missing = self.pages_for(num_tokens) - len(held)
        if missing <= 0:
            return held
        if missing > self.pages.num_free:
            return None
        return self.pages.take(owner, missing)

    def release(self, owner: str) -> None:
        """Take back the slot and the pages of `owner`."""
        self.slots.release(owner)
        self.pages.release(owner)

    def check(self) -> None:
        """Assert the invariants of the module; for tests and for suspicion."""
        self.pages.check()
        self.slots.check()
        assert self.pages.owners == self.slots.owners, "pages and slots have different owners"
        assert all(len(self.slots.owned(o)) == 1 for o in self.slots.owners), "two slots for one"
        assert all(count <= 1 for count in self.slots._owners), "a slot with two owners"
