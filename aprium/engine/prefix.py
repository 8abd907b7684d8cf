"""Prompts that begin alike share what was computed: a radix tree over tokens with state snapshots.

Attention needs the keys and values of a prefix, a recurrence its state at one exact token. So a
prefix can be gone on with only where a snapshot of the state was taken: at ends of messages and
just before the end of each prompt. A node of the tree with a snapshot owns a state slot, shares the
full KV pages before it with everybody who has the same tokens, and owns a copy of the page that is
partly filled. Snapshots live until slots or pages are needed; the least recently used goes first.
No torch: copies are asked for by id, and the runner makes them before the next step.
Invariants: a node without a snapshot has children or was evicted; the tree never holds what a
running sequence writes to.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aprium.engine.cache import Cache

FIRST_TIME = "no earlier prompt began like this"
NO_SNAPSHOT = "no snapshot was taken there"
EVICTED = "the snapshot there was evicted"
LAST_TOKEN = "the last token is always computed"
SCORED = "log-probabilities of the prompt were asked for"
SALT = "an earlier prompt with another salt began like this"


class Copies(NamedTuple):
    """What to copy before a step, in order: state slots and KV pages, (from, to)."""

    slots: list[tuple[int, int]]
    pages: list[tuple[int, int]]


class Match(NamedTuple):
    """How much of a prompt is known: tokens, the node, and why it is not more."""

    length: int
    node: "Node | None"
    why: str


@dataclass(eq=False, slots=True)
class Node:
    """A prefix of `length` tokens; `edge` are its last ones, after the parent's."""

    edge: tuple[int, ...]
    parent: "Node | None"
    length: int
    children: dict[int, "Node"] = field(default_factory=dict)
    owner: str = ""
    slot: int | None = None
    pages: tuple[int, ...] = ()
    evicted: bool = False
    reads_ahead: bool = False  # the prediction head has read the whole prefix
    used: int = 0


class PrefixCache:
    """The trees, one a salt, over the pages and slots of `cache`; at most `most` snapshots."""

    def __init__(self, cache: Cache, most: int) -> None:
        self._cache, self._most = cache, most
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._nodes: dict[str, Node] = {}  # with a snapshot, by owner
        self.copies = Copies([], [])
        self.num_reused = 0

    def find(self, tokens: Sequence[int], salt: str) -> Match:
        """Return the longest prefix of `tokens`, at least one shorter, that has a snapshot."""
        root = self._roots.get(salt)
        known, best, evicted = 0, None, False
        if root is not None:
            known, best, evicted = self._walk(root, tokens)
        length = best.length if best else 0
        if best is not None:
            best.used = next(self._clock)
        if length == len(tokens) - 1:
            why = LAST_TOKEN
        elif known > length:
            why = EVICTED if evicted else NO_SNAPSHOT
        elif not known and any(
            self._walk(other, tokens)[0] for key, other in self._roots.items() if key != salt
        ):
            why = SALT
        else:
            why = NO_SNAPSHOT if known else FIRST_TIME
        return Match(length, best, why)

    def _walk(self, root: Node, tokens: Sequence[int]) -> tuple[int, Node | None, bool]:
        """Return tokens in common, the deepest usable snapshot, and if one beyond was evicted."""
        node, known = root, 0
        best: Node | None = None
        evicted = False
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
                if node.slot is not None:
                    best, evicted = node, False
                elif node.evicted:
                    evicted = True
        return known, best, evicted

    def take(
        self, tokens: Sequence[int], salt: str, slot: int, pages: tuple[int, ...], ahead: bool
    ) -> None:
        """Keep the state in `slot` and the KV in `pages` after exactly `tokens`, if there is room.

        The copies are asked for; whoever owns `slot` and `pages` may go on once they are made.
        """
        node = self._insert(tokens, salt)
        node.used = next(self._clock)
        if node.slot is not None:
            return
        size = self._cache.page_size
        full, rest = divmod(len(tokens), size)
        while len(self._nodes) >= self._most:
            if not self.evict():
                return
        while not self._cache.slots.num_free or self._cache.pages.num_free < bool(rest):
            if not self.evict():
                return
        node.owner = f"prefix {next(self._clock)}"
        (node.slot,) = self._cache.slots.take(node.owner, 1)
        node.pages = self._cache.pages.share(node.owner, pages[:full]) if full else ()
        if rest:
            node.pages = self._cache.pages.take(node.owner, 1)
            self.copies.pages.append((pages[full], node.pages[-1]))
        node.evicted, node.reads_ahead = False, ahead
        self.copies.slots.append((slot, node.slot))
        self._nodes[node.owner] = node

    def use(self, node: Node, slot: int, pages: tuple[int, ...]) -> None:
        """Ask for the copies that put `node` into `slot`, and its part of a page into `pages`."""
        assert node.slot is not None
        self.copies.slots.append((node.slot, slot))
        full, rest = divmod(node.length, self._cache.page_size)
        if rest:
            self.copies.pages.append((node.pages[full], pages[full]))
        self.num_reused += node.length

    def evict(self, keep: Node | None = None) -> bool:
        """Give up the least recently used snapshot other than `keep`; False if there is none."""
        candidates = [node for node in self._nodes.values() if node is not keep]
        if not candidates:
            return False
        node = min(candidates, key=lambda n: n.used)
        self._cache.slots.release(node.owner)
        self._cache.pages.release(node.owner)
        del self._nodes[node.owner]
        node.slot, node.pages, node.owner, node.evicted = None, (), "", True
        self._prune()
        return True

    def drain_copies(self) -> Copies:
        """Return the copies asked for since last time, in order."""
        found, self.copies = self.copies, Copies([], [])
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

    def _insert(self, tokens: Sequence[int], salt: str) -> Node:
        """Return the node of exactly `tokens`, made if need be."""
        node = self._roots.setdefault(salt, Node((), None, 0))
        known = 0
        while known < len(tokens):
            child = node.children.get(tokens[known])
            if child is None:
                child = Node(tuple(tokens[known:]), node, len(tokens))
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
        """Forget evicted leaves beyond as many as there are snapshots; they only explain."""
        leaves = [
            node
            for root in self._roots.values()
            for node in _walk_all(root)
            if node.slot is None and not node.children and node.parent is not None
        ]
        for node in sorted(leaves, key=lambda n: n.used)[: -2 * self._most or None]:
            assert node.parent is not None
            del node.parent.children[node.edge[0]]


def _common(edge: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Return how many tokens of `edge` are those of `tokens` from `start` on."""
    count = min(len(edge), len(tokens) - start)
    if tuple(tokens[start : start + count]) == tuple(edge[:count]):
        return count
    return next(i for i in range(count) if edge[i] != tokens[start + i])


def _walk_all(root: Node) -> list[Node]:
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children.values())
    return found
