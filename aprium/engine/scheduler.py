"""Decide what the next step computes: continuous batching with chunked prefill, in pure Python.

A step spends a budget of tokens on the running sequences (one token each while decoding, a chunk of
the prompt before), those of the best rank first, then admits waiting ones, in the order of
`engine/waiting`. A rank is a priority and the order of first admission. A sequence is admitted with
the pages of all tokens it has, so that two half-read prompts never starve each other; only decoding
asks for more. When no page is left, or one of higher priority has no place, the running sequence of
the lowest rank is preempted: its state goes to the store, where there is one, and it is taken up
later from there, or else from what is known of its beginning.
No torch, and no knowledge of who runs the plan.
Invariants: `running` is in order of rank; the sequence of the best rank always advances, so all of
them finish.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aprium.base.records import SamplingParams
from aprium.engine.cache import Cache
from aprium.engine.prefix import SCORED, Match, Operation, PrefixCache
from aprium.engine.request import LiveSequence
from aprium.engine.waiting import Waiting

SPACING = 32  # fewer tokens are not worth a snapshot, nor the step that ends there


class Segment(NamedTuple):
    """What a step computes for one sequence.

    `tokens` follow the `start` that are in the state at `slot` and `pages`. With `sample`, the
    last row chooses the token at position `start + len(tokens)`. Rows `score_from`, `score_from`
    + 1, ... are scored against `targets` (the prompt's next tokens). The last `num_drafts` tokens
    are drafts: the rows before and at them choose what should stand there, each among the tokens
    that its one of `masks` (see `LiveSequence`) allows, if there are any. `late` tokens before
    `start` are in the ring. Of the drafting that follows the step, `draft` is the number of tokens
    wanted, `head_start` where the head's own reading begins (None: it does not read), and
    `next_token` the known token after the segment. `pool` says how its hidden states are pooled.
    """

    id: str
    start: int
    tokens: tuple[int, ...]
    slot: int
    pages: tuple[int, ...]
    sample: bool
    params: SamplingParams
    seed: int
    score_from: int = 0
    targets: tuple[int, ...] = ()
    num_drafts: int = 0
    masks: tuple[bytes | None, ...] = ()
    late: int = 0
    draft: int = 0
    head_start: int | None = None
    next_token: int | None = None
    pool: str | None = None


class Outcome(NamedTuple):
    """What a step gave one segment: the tokens chosen, and drafts of those to come."""

    tokens: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the engine: what the runner does is a function of this and the state.

    `operations` on states come first, in order. Drafts of a sequence end before their probabilities
    multiply to less than `least`.
    """

    segments: tuple[Segment, ...]
    operations: tuple[Operation, ...] = ()
    least: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return sum(len(s.tokens) for s in self.segments)


class Scheduler:
    """Waiting and running sequences, and the rule that picks among them."""

    def __init__(
        self,
        cache: Cache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked_prefill: bool = True,
        reads_ahead: bool = False,
        prefixes: PrefixCache | None = None,
    ) -> None:
        assert max_num_seqs >= 1 and max_num_batched_tokens >= 1
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.reads_ahead = reads_ahead  # a prediction head drafts
        self.prefixes = prefixes
        self.waiting = Waiting()
        self.running: list[LiveSequence] = []
        self.sequences: dict[str, LiveSequence] = {}
        self.num_preemptions = 0
        self._followers: dict[str, list[LiveSequence]] = {}  # by whom they follow
        self._deadlines: dict[str, LiveSequence] = {}
        self._private: Counter[str] = Counter()  # sequences, by a salt that only they have
        self._blocked: tuple[str, int] | None = None  # who found no room, and after what releases
        self._numbers, self._tickets = itertools.count(), itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.sequences)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence could ever grow to `num_tokens`, alone in the cache and in a step."""
        enough = self.cache.pages_for(num_tokens) <= self.cache.pages.size
        return enough and (self.chunked_prefill or num_tokens <= self.max_num_batched_tokens)

    def add(self, sequence: LiveSequence) -> None:
        """Queue `sequence`; it must fit (see `fits`) at its full length."""
        assert sequence.id not in self.sequences, f"{sequence.id} is queued twice"
        assert self.fits(sequence.num_prompt + sequence.max_tokens), f"{sequence.id} cannot fit"
        self.sequences[sequence.id] = sequence
        sequence.number = next(self._numbers)
        if sequence.private:
            self._private[sequence.salt] += 1
        if sequence.deadline_s is not None:
            self._deadlines[sequence.id] = sequence
        leader = self.sequences.get(sequence.follows) if sequence.follows else None
        if leader is not None and not _has_read(leader):
            self._followers.setdefault(leader.id, []).append(sequence)
        else:
            self.waiting.push(sequence)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, for a place or for the one they follow."""
        return len(self.waiting) + sum(map(len, self._followers.values()))

    def abort(self, sequence_id: str, finish: str = "abort") -> LiveSequence | None:
        """Drop a sequence wherever it stands; returns it, or None if it is not here (any more)."""
        sequence = self.sequences.get(sequence_id)
        if sequence is None:
            return None
        sequence.finish = finish
        if sequence.keep_every and sequence.node is not None:
            sequence.node.transient = False  # it can be resumed
        if sequence.status == "running":
            self.running.remove(sequence)
        elif sequence in (held := self._followers.get(sequence.follows or "", [])):
            held.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._drop(sequence)
        return sequence

    def restart(self) -> None:
        """Put every running sequence back, to be computed anew from its tokens."""
        for victim in reversed(self.running[:]):
            self._preempt(victim, keep=False)

    def expire(self, now_s: float) -> list[LiveSequence]:
        """Drop the sequences whose deadline has passed, and return them."""
        late = [s for s in self._deadlines.values() if (s.deadline_s or 0) < now_s]
        for sequence in late:
            self.abort(sequence.id)
        return late

    def plan(self, num_drafts: int = 0, least: float = 0.0) -> StepPlan:
        """Choose the next step, after which up to `num_drafts` tokens a sequence are drafted.

        They end before they are less likely than `least`. May preempt and admit.
        """
        segments: list[Segment] = []
        budget = self.max_num_batched_tokens
        self._let_pass()
        preempted = self.num_preemptions
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            count = sequence.next_count(budget)
            if not self._find_pages(sequence, sequence.num_computed + count):
                break
            drafts = self._usable_drafts(sequence, min(budget - count, sequence.room - 1))
            segments.append(self._segment(sequence, count, drafts, num_drafts))
            budget -= len(segments[-1].tokens)
            index += 1
        # Admitting right after a preemption would let the newcomer take what the elder lost.
        if self.num_preemptions == preempted:
            self._admit(segments, budget, num_drafts)
        if self.prefixes is None or not segments:  # operations wait for a step that is run
            return StepPlan(tuple(segments), least=least)
        return StepPlan(tuple(segments), self.prefixes.drain(), least)

    def update(self, plan: StepPlan, outcomes: Sequence[Outcome]) -> list[LiveSequence]:
        """Book a finished step, one outcome a segment.

        A segment whose sequence was aborted meanwhile is ignored. Returns the sequences that the
        step advanced, in order; those with `finish` set have left.
        """
        advanced = []
        left = False
        for segment, outcome in zip(plan.segments, outcomes, strict=True):
            sequence = self.sequences.get(segment.id)
            if sequence is None:
                continue
            assert sequence.num_computed == segment.start
            accepted = max(len(outcome.tokens) - 1, 0)
            read = len(segment.tokens) - segment.num_drafts + accepted
            sequence.num_computed += read
            sequence.num_late = read if segment.num_drafts else 0
            sequence.num_scored += len(segment.targets)
            sequence.head_start = segment.head_start
            sequence.drafts = outcome.drafts
            sequence.num_drafted += segment.num_drafts
            sequence.num_accepted += accepted
            self.waiting.serve(sequence, len(segment.tokens))
            if segment.sample:
                assert outcome.tokens
                for token in outcome.tokens:
                    if sequence.finish is None:
                        sequence.append(token)
            elif not sequence.num_pending:
                sequence.finish = "length"
            self._snapshot(sequence)
            if sequence.finish is not None:
                self._drop(sequence)
                left = True
            elif sequence.id in self._followers and _has_read(sequence):
                self._release_followers(sequence)
            advanced.append(sequence)
        if left:
            self.running = [s for s in self.running if s.status == "running"]
        return advanced

    def check(self) -> None:
        """Assert the invariants of the module and of the cache."""
        self.cache.check()
        kept = {owner for owner in self.cache.slots.owners if owner.startswith("prefix ")}
        assert self.cache.slots.owners - kept == {s.id for s in self.running}
        if self.prefixes is not None:
            self.prefixes.check()
        held = [s for followers in self._followers.values() for s in followers]
        assert {s.id for s in (*self.running, *self.waiting, *held)} == set(self.sequences)
        assert len(self.running) + self.num_waiting == len(self.sequences)
        assert [s.rank for s in self.running] == sorted(s.rank for s in self.running)
        assert all(leader in self.sequences for leader in self._followers)
        for sequence in self.running:
            assert sequence.status == "running" and sequence.slot is not None
            room = len(sequence.pages) * self.cache.page_size
            assert room >= sequence.num_computed and sequence.num_pending > 0
        for sequence in (*self.waiting, *held):
            assert sequence.status == "waiting" and not sequence.num_computed

    def _find_pages(self, sequence: LiveSequence, num_tokens: int) -> bool:
        """Make room for `num_tokens`, if need be by preempting; False if `sequence` itself fell."""
        while (pages := self.cache.grow(sequence.id, num_tokens)) is None:
            if self.prefixes is not None and self.prefixes.evict():
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages = pages
        return True

    def _preempt(self, victim: LiveSequence, keep: bool = True) -> None:
        """Put `victim` back, with `keep` its state to the store."""
        self.running.remove(victim)
        if keep and self.prefixes is not None and not victim.stale:
            done = victim.num_settled
            assert victim.slot is not None
            self.prefixes.swap_out(
                victim.tokens[:done], victim.salt, victim.slot, victim.pages, victim.head_start == 0
            )
        self._release(victim, "waiting")
        victim.num_computed = victim.num_late = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(victim)

    def _usable_drafts(self, sequence: LiveSequence, most: int) -> tuple[int, ...]:
        """Return the first `most` of the drafts of `sequence`, as many as find pages freely."""
        if sequence.num_pending != 1 or not sequence.drafts or most < 1:
            return ()
        drafts = sequence.drafts[:most]
        capacity = self._try_grow(sequence, sequence.num_tokens + len(drafts))
        return drafts[: max(capacity - sequence.num_tokens, 0)]

    def _try_grow(self, sequence: LiveSequence, num_tokens: int) -> int:
        """Grow to `num_tokens` where pages are free; return how many tokens there is room for."""
        pages = self.cache.grow(sequence.id, num_tokens)
        if pages is not None:
            sequence.pages = pages
        return len(sequence.pages) * self.cache.page_size

    def _segment(
        self, sequence: LiveSequence, count: int, drafts: tuple[int, ...], num_drafts: int
    ) -> Segment:
        """Describe the next `count` tokens of `sequence`, `drafts` after them, what to draft."""
        start = sequence.num_computed
        end = start + count
        assert sequence.slot is not None
        score_from, targets = sequence.targets(start, count)
        samples = end == sequence.num_tokens and sequence.max_tokens > 0
        masks: tuple[bytes | None, ...] = ()
        if samples and (masks := sequence.masks(drafts)):
            drafts = drafts[: len(masks) - 1]  # the rest could not be accepted
        # A draft is of use if a token is still to come after the one that this step chooses.
        wanted = min(num_drafts, sequence.room - 2) if samples else 0
        head_start = None
        if self.reads_ahead and num_drafts and sequence.room > 2:
            head_start = sequence.head_start
            if head_start is None and start % self.cache.page_size == 0:
                head_start = start
        if wanted > 0:
            farthest = min(end + len(drafts) + wanted, sequence.num_prompt + sequence.max_tokens)
            room = self._try_grow(sequence, farthest) - end - len(drafts)
            wanted = max(min(wanted, room), 0)
        return Segment(
            id=sequence.id,
            start=start,
            tokens=(*sequence.tokens[start:end], *drafts),
            slot=sequence.slot,
            pages=sequence.pages,
            sample=samples,
            params=sequence.params,
            seed=sequence.seed,
            score_from=score_from,
            targets=targets,
            num_drafts=len(drafts),
            masks=masks,
            late=sequence.num_late,
            draft=max(wanted, 0),
            head_start=head_start,
            next_token=sequence.tokens[end] if end < sequence.num_tokens else None,
            pool=_pool(sequence, start, end),
        )

    def _let_pass(self) -> None:
        """Admit waiting sequences of higher priority than a running one, which may lose its place.

        Before the step is planned, as a sequence in the plan cannot be preempted.
        """
        while (first := self.waiting.peek()) is not None and self.running:
            if first.priority >= self.running[-1].priority or not self.chunked_prefill:
                return
            if len(self.running) < self.max_num_seqs and self._enter(first):
                continue
            self._preempt(self.running[-1])

    def _admit(self, segments: list[Segment], budget: int, num_drafts: int) -> None:
        while budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.peek()
            if sequence is None or (not self.chunked_prefill and sequence.num_tokens > budget):
                return
            if not self._enter(sequence):
                return
            count = sequence.next_count(budget)
            segments.append(self._segment(sequence, count, (), num_drafts))
            budget -= count

    def _enter(self, sequence: LiveSequence) -> bool:
        """Let `sequence` run, from what is known of its beginning; False if there is no room."""
        if self._blocked == (sequence.id, self.cache.num_releases):
            return False
        match, granted = self._claim(sequence, *self._known(sequence))
        if granted is None:
            self._blocked = sequence.id, self.cache.num_releases
            return False
        prefixes = self.prefixes
        sequence.slot, sequence.pages = granted
        if match is not None and match.node is not None:
            assert prefixes is not None
            if not prefixes.use(match.node, sequence.slot, sequence.pages):
                self.cache.release(sequence.id)  # it is damaged: look again
                sequence.slot, sequence.pages = None, ()
                return self._enter(sequence)
            sequence.node = match.node
            sequence.num_computed = match.length
            sequence.head_start = 0 if match.node.reads_ahead else None
        self.waiting.start(sequence)
        if sequence.ticket is None:
            sequence.ticket = next(self._tickets)
            sequence.reused = match.length if match else 0
            if prefixes is not None and sequence.why_not_more is not None:
                prefixes.misses[sequence.why_not_more] += 1
        sequence.status, sequence.stale = "running", False
        bisect.insort(self.running, sequence, key=lambda s: s.rank)
        return True

    def _claim(
        self, sequence: LiveSequence, match: Match | None, shared: tuple[int, ...]
    ) -> tuple[Match | None, tuple[int, tuple[int, ...]] | None]:
        """Return slot and pages for `sequence`, and what of `match` it goes on from; else None.

        Snapshots are evicted where that is enough, that of `match` only if nothing else helps.
        """
        prefixes, keep = self.prefixes, match.node if match else None
        while (
            granted := self.cache.admit(sequence.id, sequence.num_tokens, shared)
        ) is None and prefixes is not None:
            if prefixes.can_free(self._missing(sequence, shared), keep):
                prefixes.evict(keep)
            elif match is not None and not self.running:
                match, shared, keep = None, (), None
            else:
                break
        return match, granted

    def _missing(self, sequence: LiveSequence, shared: tuple[int, ...]) -> int:
        """Return how many pages more than are free `sequence` needs beside those `shared`."""
        needed = self.cache.pages_for(sequence.num_tokens) - len(shared)
        return max(needed - self.cache.pages.num_free, 0)

    def _known(self, sequence: LiveSequence) -> tuple[Match | None, tuple[int, ...]]:
        """Return from what snapshot `sequence` can go on, and the pages that it shares then."""
        if self.prefixes is None:
            return None, ()
        if sequence.reads_all:
            sequence.why_not_more = SCORED
            return None, ()
        match = self.prefixes.find(sequence.tokens, sequence.salt)
        if sequence.ticket is None and not sequence.private:
            sequence.why_not_more = match.why
            self.prefixes.remember(sequence.tokens[: sequence.num_prompt], sequence.salt)
            if match.common >= match.length + SPACING and match.common < sequence.num_prompt:
                sequence.snapshot_points |= {match.common}  # others will part there, too
        node = match.node
        if node is None:
            return None, ()
        return match, node.pages[: node.length // self.cache.page_size]

    def _snapshot(self, sequence: LiveSequence) -> None:
        """Keep the state that the step just booked left in the slot, where that is wanted."""
        done = sequence.num_settled
        if self.prefixes is None or sequence.stale:
            return
        wanted = done in sequence.snapshot_points
        if not sequence.private and done > sequence.num_prompt:
            node, kept = sequence.node, sequence.keep_every
            last = max(node.length if node else 0, sequence.num_prompt)
            wanted = bool(kept) and done >= last + kept
            if sequence.finish is not None:
                lasting = node is not None and not node.transient
                wanted = done >= (last if lasting else sequence.num_prompt) + SPACING
        if not wanted or (sequence.node is not None and sequence.node.length > done):
            return
        assert sequence.slot is not None
        node = self.prefixes.take(
            sequence.tokens[:done],
            sequence.salt,
            sequence.slot,
            sequence.pages,
            sequence.head_start == 0,
            transient=done > sequence.num_prompt and sequence.finish is None,
            before=sequence.node,
        )
        if node is not None:
            self.prefixes.hold(node, sequence.node)
            sequence.node = node

    def _release_followers(self, leader: LiveSequence) -> None:
        for sequence in self._followers.pop(leader.id, ()):
            self.waiting.push(sequence)

    def _drop(self, sequence: LiveSequence) -> None:
        self._release(sequence, "finished")
        del self.sequences[sequence.id]
        self._deadlines.pop(sequence.id, None)
        self._release_followers(sequence)
        if sequence.private:
            self._private[sequence.salt] -= 1
            if not self._private[sequence.salt]:
                del self._private[sequence.salt]
                if self.prefixes is not None:
                    self.prefixes.forget(sequence.salt)

    def _release(self, sequence: LiveSequence, status: str) -> None:
        if self.prefixes is not None:
            self.prefixes.hold(None, sequence.node)
        sequence.node = None
        self.cache.release(sequence.id)
        sequence.slot, sequence.pages = None, ()
        sequence.drafts, sequence.head_start = (), None
        sequence.status = status


def _pool(sequence: LiveSequence, start: int, end: int) -> str | None:
    """Say how to pool the rows [start, end): "mean" each of the prompt's, "last" its last."""
    if sequence.pooling == "last":
        return "last" if end == sequence.num_prompt else None
    return sequence.pooling if start < sequence.num_prompt else None


def _has_read(leader: LiveSequence) -> bool:
    """Whether those that follow `leader` find a snapshot of the prompt by now."""
    return leader.num_computed >= leader.num_prompt - 1 or leader.reads_all
