"""Prompts that begin alike share what was computed: a radix tree over tokens with state snapshots.

Attention needs the keys and values of a prefix, a recurrence its state at one exact token. So a
prefix can be gone on with only where a snapshot of the state was taken. A node of the tree with a
snapshot owns a state slot, shares the full KV pages before it with everybody who has the same
tokens, and owns a copy of the page that is partly filled. Snapshots live until slots or pages are
needed: the least recently used goes first, one that a live sequence came from goes last. With a
`Store` every snapshot is also saved there, and a prefix whose snapshot is gone is loaded from it.
No torch: what is to be copied is asked for by id, in order, and the runner does it.
Invariants: a node without a snapshot has children, is saved, or was evicted; the tree never holds
what a running sequence writes to.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from aprium.engine.cache import Cache

FIRST_TIME = "no earlier prompt began like this"
DIVERGED = "earlier prompts go on differently from there (other text, or another template)"
NO_SNAPSHOT = "no snapshot was taken there"
EVICTED = "the snapshot there was evicted"
DAMAGED = "the snapshot stored there was damaged"
LAST_TOKEN = "the last token is always computed"
SCORED = "every position of the prompt was asked for"
SALT = "an earlier prompt with another salt began like this"


_ALIKE, _MOST_ROOTS = 8, 64  # tokens in common that are no chance; trees that are looked at


class CopySlot(NamedTuple):
    """Copy a recurrent state from one slot to another."""

    source: int
    target: int


class CopyPage(NamedTuple):
    """Copy a KV page to another."""

    source: int
    target: int


class Meta(NamedTuple):
    """What a stored snapshot is of: `length` tokens, the last of which, `edge`, follow `parent`.

    `key` names it, and `parent` (a key, None at the root) the stored snapshot that has the keys and
    values before. Only the same `salt` may use it. `reads_ahead`: the prediction head has read it.
    """

    key: str
    parent: str | None
    salt: str
    length: int
    edge: tuple[int, ...]
    reads_ahead: bool

    @property
    def start(self) -> int:
        """Tokens before `edge`."""
        return self.length - len(self.edge)


class Save(NamedTuple):
    """Hand the state in `slot`, and the keys and values of `meta.edge` in `pages`, to the store."""

    meta: Meta
    slot: int
    pages: tuple[int, ...]


class Load(NamedTuple):
    """Put what `Store.fetch` gave into `slot` and `pages`."""

    parts: Any
    slot: int
    pages: tuple[int, ...]


class Drop(NamedTuple):
    """Let the store give up `key`."""

    key: str


Operation = CopySlot | CopyPage | Save | Load | Drop


class Store(Protocol):
    """Where snapshots outlive their slots; `engine/store` has the one there is."""

    def has(self, key: str) -> bool:
        """Whether `key` was saved and not given up since."""
        ...

    def fetch(self, key: str) -> Any:
        """Return what a `Load` takes, checked; None, once and for all, where it is damaged."""
        ...

    def drop(self, key: str) -> None:
        """Give up `key` and what builds on it."""
        ...

    def touch(self, key: str) -> None:
        """Count `key`, and what it needs, as used now."""
        ...

    def entries(self) -> Iterable[Meta]:
        """Return what was found at the start, parents first."""
        ...


class Match(NamedTuple):
    """How much of a prompt is known: tokens, the node, and why it is not more.

    `common` tokens are those of an earlier prompt, snapshot or not.
    """

    length: int
    node: "Node | None"
    why: str
    common: int = 0


@dataclass(eq=False, slots=True)
class Node:
    """A prefix of `length` tokens; `edge` are its last ones, after the parent's.

    `live` counts the sequences that came from it, `held` the sessions. `key` names it in the store.
    It is `transient` where it only serves to resume one answer, until the next of that is taken.
    """

    edge: tuple[int, ...]
    parent: "Node | None"
    length: int
    children: dict[int, "Node"] = field(default_factory=dict)
    owner: str = ""
    slot: int | None = None
    pages: tuple[int, ...] = ()
    evicted: bool = False
    damaged: bool = False
    reads_ahead: bool = False  # the prediction head has read the whole prefix
    used: int = 0
    live: int = 0
    held: int = 0
    key: str = ""
    transient: bool = False


class PrefixCache:
    """The trees, one a salt, over the pages and slots of `cache`; at most `most` snapshots."""

    def __init__(self, cache: Cache, most: int, store: Store | None = None) -> None:
        self._cache, self._most, self._store = cache, most, store
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._nodes: dict[str, Node] = {}  # with a snapshot, by owner
        self._operations: list[Operation] = []
        self.num_reused = 0  # tokens
        self.num_restored = 0  # snapshots loaded from the store
        self.misses: Counter[str] = Counter()  # of admissions, by why no more was reused
        self._changes = 0
        self.adopt_stored()

    def adopt_stored(self) -> None:
        """Make nodes of what the store found when it was opened."""
        adopted: dict[str, Node] = {}
        for meta in self._store.entries() if self._store else ():
            self._adopt(meta, adopted)

    @property
    def num_snapshots(self) -> int:
        """Snapshots in slots."""
        return len(self._nodes)

    def find(self, tokens: Sequence[int], salt: str) -> Match:
        """Return the longest prefix of `tokens`, at least one shorter, that has a snapshot."""
        root = self._roots.get(salt)
        path = _walk(root, tokens) if root is not None else _Path(0, [])
        best = next((node for node in reversed(path.nodes) if self._is_usable(node)), None)
        length = best.length if best else 0
        if best is not None:
            best.used = next(self._clock)
            if self._store is not None and best.key:
                self._store.touch(best.key)
        why = self._reason(tokens, salt, path, length)
        return Match(length, best, why, path.known)

    def _is_usable(self, node: Node) -> bool:
        """Whether the state after `node` is in a slot or in the store."""
        if node.slot is not None:
            return True
        return self._store is not None and bool(node.key) and self._store.has(node.key)

    def load(self, node: Node) -> Any:
        """Return what a `Load` of `node` takes; None where it turns out damaged."""
        assert self._store is not None
        parts = self._store.fetch(node.key)
        node.damaged = parts is None
        return parts

    def _reason(self, tokens: Sequence[int], salt: str, path: "_Path", length: int) -> str:
        """Say why no more than `length` tokens of those on `path` can be had."""
        if length == len(tokens) - 1:
            return LAST_TOKEN
        beyond = [node for node in path.nodes if node.length > length]
        if any(node.damaged for node in beyond):
            return DAMAGED
        if any(node.evicted for node in beyond):
            return EVICTED
        if path.known > length:
            return NO_SNAPSHOT
        if path.known:
            return DIVERGED
        others = itertools.islice(self._roots.items(), _MOST_ROOTS)
        enough = min(len(tokens) - 1, _ALIKE)
        alike = any(_walk(root, tokens).known >= enough for key, root in others if key != salt)
        return SALT if alike and enough else FIRST_TIME

    def take(
        self,
        tokens: Sequence[int],
        salt: str,
        slot: int,
        pages: tuple[int, ...],
        ahead: bool,
        transient: bool = False,
        before: Node | None = None,
    ) -> Node | None:
        """Keep the state in `slot` and the KV in `pages` after exactly `tokens`, if there is room.

        The copies are asked for; whoever owns `slot` and `pages` may go on once they are made.
        `before`, which the same sequence came from, may give way. Returns the node, None where
        there was no room for a snapshot.
        """
        node = self._insert(tokens, salt)
        node.used = next(self._clock)
        node.transient = transient and (node.transient or not self._is_usable(node))
        if node.slot is not None:
            return node
        full, rest = divmod(len(tokens), self._cache.page_size)
        while (
            len(self._nodes) >= self._most
            or not self._cache.slots.num_free
            or self._cache.pages.num_free < bool(rest)
        ):
            if not self.evict(live=False, before=before):
                return None
        node.owner = f"prefix {next(self._clock)}"
        (node.slot,) = self._cache.slots.take(node.owner, 1)
        node.pages = self._cache.pages.share(node.owner, pages[:full]) if full else ()
        if rest:
            node.pages = self._cache.pages.take(node.owner, 1)
            self._operations.append(CopyPage(pages[full], node.pages[-1]))
        node.evicted, node.damaged, node.reads_ahead = False, False, ahead
        self._operations.append(CopySlot(slot, node.slot))
        self._nodes[node.owner] = node
        self._save(node, tokens, salt, slot, pages)
        return node

    def remember(self, tokens: Sequence[int], salt: str) -> None:
        """Note that a prompt is `tokens`, so that those which begin alike are recognised."""
        node = self._insert(tokens, salt)
        node.used = next(self._clock)
        self._changed()

    def _changed(self) -> None:
        """Prune now and then, when nodes come or lose their snapshots."""
        self._changes += 1
        if self._changes % max(self._most, 1) == 0:
            self._prune()

    def swap_out(
        self, tokens: Sequence[int], salt: str, slot: int, pages: tuple[int, ...], ahead: bool
    ) -> None:
        """Save the state in `slot` and `pages`, which are about to be taken away."""
        if self._store is None or not tokens:
            return
        node = self._insert(tokens, salt)
        if node.slot is None:
            node.used, node.reads_ahead = next(self._clock), ahead
            self._save(node, tokens, salt, slot, pages)

    def _save(
        self,
        node: Node,
        tokens: Sequence[int],
        salt: str,
        slot: int,
        pages: tuple[int, ...],
    ) -> None:
        """Ask for a copy of `node` in the store, unless it is there."""
        if self._store is None or (node.key and self._is_saved(node.key)):
            return
        node.key = node.key or _key(tokens, salt)
        above = node.parent
        while above is not None and not (
            above.key and not above.transient and self._is_saved(above.key)
        ):
            above = above.parent
        start = above.length if above is not None else 0
        parent = above.key if above is not None else None
        edge = tuple(tokens[start:])
        meta = Meta(node.key, parent, salt, node.length, edge, node.reads_ahead)
        self._operations.append(Save(meta, slot, pages))

    def _is_saved(self, key: str) -> bool:
        """Whether `key` is in the store, or will be by the time that a later save is made."""
        assert self._store is not None
        waiting = (op.meta.key for op in self._operations if isinstance(op, Save))
        return self._store.has(key) or key in waiting

    def use(self, node: Node, slot: int, pages: tuple[int, ...]) -> bool:
        """Ask for what puts `node` into `slot`, and its KV into `pages`; False if it is damaged.

        Of a node in a slot, full pages are shared already and only the partly filled one is copied.
        """
        if node.slot is None:
            parts = self.load(node)
            if parts is None:
                return False
            self.num_restored += 1
            self._operations.append(Load(parts, slot, pages))
        else:
            self._operations.append(CopySlot(node.slot, slot))
            full, rest = divmod(node.length, self._cache.page_size)
            if rest:
                self._operations.append(CopyPage(node.pages[full], pages[full]))
        self.hold(node)
        self.num_reused += node.length
        return True

    def hold_for_session(self, node: Node | None, before: Node | None) -> None:
        """Count a session as come from `node`, rather than from `before`."""
        if node is not None:
            node.held += 1
        if before is not None:
            before.held -= 1

    def hold(self, node: Node | None, before: Node | None = None) -> None:
        """Count a sequence as come from `node`, rather than from `before`."""
        if node is not None:
            node.live += 1
        if before is not None:
            before.live -= 1
            if before.transient and not before.live and not before.held:
                if before.slot is not None:
                    self._free(before)
                if before.key:  # after its successor is saved
                    self._operations.append(Drop(before.key))

    def adopt(self, tokens: Sequence[int], salt: str, ahead: bool) -> Meta | None:
        """Make the node of a state that comes from elsewhere; None where it is known.

        Returns what to give the state to the store as.
        """
        node = self._insert(tokens, salt)
        if node.slot is not None or self._store is None:
            return None
        node.used, node.reads_ahead = next(self._clock), ahead
        node.key = _key(tokens, salt)
        if self._store.has(node.key):
            return None
        return Meta(node.key, None, salt, node.length, tuple(tokens), ahead)

    def can_free(self, num_pages: int, keep: Node | None = None) -> bool:
        """Whether evicting all but `keep` gives a slot and `num_pages` pages to others."""
        held = Counter(page for node in self._nodes.values() for page in node.pages)
        if keep is not None:
            for page in keep.pages:
                held.pop(page, None)
        alone = sum(self._cache.pages.num_owners(page) == count for page, count in held.items())
        others = len(self._nodes) - (keep is not None and keep.slot is not None)
        return alone >= num_pages and bool(others or self._cache.slots.num_free)

    def evict(
        self, keep: Node | None = None, live: bool = True, before: Node | None = None
    ) -> bool:
        """Give up the least recently used snapshot other than `keep`; False if there is none.

        Those that sessions hold go after others; one that a live sequence came from goes last, and
        with `live` False not at all, unless it is `before` and no other came from it.
        """
        candidates = [
            node
            for node in self._nodes.values()
            if node is not keep and (live or node.live <= (node is before))
        ]
        if not candidates:
            return False
        node = min(candidates, key=lambda n: (n.live > 0, n.held > 0, n.used))
        self._free(node)
        self._changed()
        return True

    def forget(self, salt: str | None = None, stored: bool = True) -> None:
        """Drop everything that was kept under `salt`, or under any; with `stored` in the store."""
        for key in [salt] if salt is not None else list(self._roots):
            root = self._roots.pop(key, None)
            for node in _all(root) if root is not None else ():
                if stored and self._store is not None and node.key:
                    self._store.drop(node.key)
                node.key = ""
                if node.slot is not None:
                    self._free(node)

    def _free(self, node: Node) -> None:
        self._cache.slots.release(node.owner)
        self._cache.pages.release(node.owner)
        del self._nodes[node.owner]
        node.slot, node.pages, node.owner, node.evicted = None, (), "", True

    def drain(self) -> tuple[Operation, ...]:
        """Return what was asked for since last time, in order."""
        found, self._operations = tuple(self._operations), []
        return found

    def check(self) -> None:
        """Assert the invariants; for tests and for suspicion."""
        for node in self._nodes.values():
            assert node.slot is not None
            assert len(node.pages) == self._cache.pages_for(node.length)
            path = node
            while path.parent is not None:
                assert path.parent.children[path.edge[0]] is path
                assert path.length == path.parent.length + len(path.edge)
                path = path.parent

    def _adopt(self, meta: Meta, adopted: dict[str, Node]) -> None:
        """Make the node of a snapshot that an earlier process stored, after that of its parent."""
        above = adopted.get(meta.parent) if meta.parent is not None else None
        if meta.parent is None:
            node = self._insert(meta.edge, meta.salt)
        elif above is not None:
            node = self._insert(meta.edge, meta.salt, above)
        else:
            return
        node.key, node.reads_ahead = meta.key, meta.reads_ahead
        adopted[meta.key] = node

    def _insert(self, tokens: Sequence[int], salt: str, above: Node | None = None) -> Node:
        """Return the node of exactly `tokens`, after those of `above`, made if need be."""
        node = above or self._roots.setdefault(salt, Node((), None, 0))
        known, end = 0, node.length + len(tokens)
        while known < len(tokens):
            child = node.children.get(tokens[known])
            if child is None:
                child = Node(tuple(tokens[known:]), node, end)
                node.children[tokens[known]] = child
                return child
            same = _common(child.edge, tokens, known)
            if same < len(child.edge):
                child = self._split(child, same)
            node, known = child, known + same
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Put a node into the edge before `node`, after `at` of its tokens."""
        parent = node.parent
        assert parent is not None
        middle = Node(node.edge[:at], parent, parent.length + at)
        parent.children[node.edge[0]] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[node.edge[0]] = node
        return middle

    def _prune(self) -> None:
        """Forget leaves that only explain, beyond twice as many as there may be snapshots."""
        leaves = [
            node
            for root in self._roots.values()
            for node in _all(root)
            if node.slot is None and not node.children and node.parent is not None
            and not (self._store and node.key and self._store.has(node.key))
        ]  # fmt: skip
        for node in sorted(leaves, key=lambda n: n.used)[: -2 * self._most]:
            assert node.parent is not None
            del node.parent.children[node.edge[0]]
        for salt in [salt for salt, root in self._roots.items() if not root.children]:
            del self._roots[salt]


class _Path(NamedTuple):
    """Tokens in common with a tree, and the nodes passed, each a proper prefix of the prompt."""

    known: int
    nodes: list[Node]


def _walk(root: Node, tokens: Sequence[int]) -> _Path:
    node, known = root, 0
    nodes: list[Node] = []
    while known < len(tokens):
        child = node.children.get(tokens[known])
        if child is None:
            break
        same = _common(child.edge, tokens, known)
        known += same
        if same < len(child.edge):
            break
        node = child
        if node.length < len(tokens):
            nodes.append(node)
    return _Path(known, nodes)


def _key(tokens: Sequence[int], salt: str) -> str:
    """Name the prefix `tokens` of prompts with `salt`."""
    name = salt.encode()
    digest = blake2b(len(name).to_bytes(8, "little") + name, digest_size=16)
    digest.update(array("I", tokens).tobytes())
    return digest.hexdigest()


def _common(edge: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Return how many tokens of `edge` are those of `tokens` from `start` on."""
    low, high = 0, min(len(edge), len(tokens) - start)
    if tuple(tokens[start : start + high]) == tuple(edge[:high]):  # most often
        return high
    # The first `low` are alike, and the first `high` + 1 are not if there are so many.
    while low < high:
        middle = (low + high + 1) // 2
        if tuple(tokens[start + low : start + middle]) == tuple(edge[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _all(root: Node) -> list[Node]:
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children.values())
    return found
