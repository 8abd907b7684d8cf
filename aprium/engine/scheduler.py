"""Decide what the next step computes: continuous batching with chunked prefill, in pure Python.

First come, first served. A step spends a budget of tokens on the running sequences, oldest first
(one token each while decoding, a chunk of the prompt before), then admits waiting ones. A sequence
is admitted with the pages of all tokens it has, so that two half-read prompts never starve each
other; only decoding asks for more. When no page is left the youngest running sequence is preempted:
it gives back slot and pages and is recomputed later, generated tokens included.
No torch, and no knowledge of who runs the plan.
Invariants: `running` and `waiting` are each in order of arrival and everything in the first is
older than everything in the second; the oldest sequence always advances, so all of them finish.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aprium.base.records import SamplingParams
from aprium.engine.cache import Cache
from aprium.engine.prefix import SCORED, PrefixCache
from aprium.engine.request import LiveSequence


class Segment(NamedTuple):
    """What a step computes for one sequence.

    `tokens` follow the `start` that are in the state at `slot` and `pages`. With `sample`, the
    last row chooses the token at position `start + len(tokens)`. Rows `score_from`, `score_from`
    + 1, ... are scored against `targets` (the prompt's next tokens). The last `num_drafts` tokens
    are drafts: the rows before and at them choose what should stand there. `late` tokens before
    `start` are in the ring. Of the drafting that follows the step, `draft` is the number of tokens
    wanted, `head_start` where the head's own reading begins (None: it does not read), and
    `next_token` the known token after the segment.
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
    late: int = 0
    draft: int = 0
    head_start: int | None = None
    next_token: int | None = None


class Outcome(NamedTuple):
    """What a step gave one segment: the tokens chosen, and drafts of those to come."""

    tokens: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the engine: what the runner does is a function of this and the state.

    `slot_copies` and `page_copies` (from, to) are made first, in order.
    """

    segments: tuple[Segment, ...]
    slot_copies: tuple[tuple[int, int], ...] = ()
    page_copies: tuple[tuple[int, int], ...] = ()

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
        self.waiting: deque[LiveSequence] = deque()
        self.running: list[LiveSequence] = []
        self.sequences: dict[str, LiveSequence] = {}
        self.num_preemptions = 0

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
        self.waiting.append(sequence)

    def abort(self, sequence_id: str) -> LiveSequence | None:
        """Drop a sequence wherever it stands; returns it, or None if it is not here (any more)."""
        sequence = self.sequences.get(sequence_id)
        if sequence is None:
            return None
        sequence.finish = "abort"
        if sequence.status == "waiting":
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._drop(sequence)
        return sequence

    def plan(self, num_drafts: int = 0) -> StepPlan:
        """Choose the next step, after which up to `num_drafts` tokens a sequence are drafted.

        May preempt and admit.
        """
        segments: list[Segment] = []
        budget = self.max_num_batched_tokens
        preempted = self.num_preemptions
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            count = sequence.next_count(budget)
            if not self._find_pages(sequence, sequence.num_computed + count):
                break
            drafts = self._usable_drafts(sequence, min(budget - count, sequence.room - 1))
            segments.append(self._segment(sequence, count, drafts, num_drafts))
            budget -= count + len(drafts)
            index += 1
        # Admitting right after a preemption would let the newcomer take what the elder lost.
        if self.num_preemptions == preempted:
            self._admit(segments, budget, num_drafts)
        if self.prefixes is None or not segments:  # copies wait for a step that is run
            return StepPlan(tuple(segments))
        copies = self.prefixes.drain_copies()
        return StepPlan(tuple(segments), tuple(copies.slots), tuple(copies.pages))

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
            self._snapshot(sequence, segment)
            sequence.num_compared += min(accepted + 1, segment.num_drafts)
            if segment.sample:
                assert outcome.tokens
                for token in outcome.tokens:
                    if sequence.finish is None:
                        sequence.append(token)
            elif not sequence.num_pending:
                sequence.finish = "length"
            if sequence.finish is not None:
                self._drop(sequence)
                left = True
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
        queued = [*self.running, *self.waiting]
        order = {key: n for n, key in enumerate(self.sequences)}
        assert [order[s.id] for s in queued] == sorted(order[s.id] for s in queued)
        assert len(queued) == len(self.sequences)
        for sequence in self.running:
            assert sequence.status == "running" and sequence.slot is not None
            held = len(sequence.pages) * self.cache.page_size
            assert held >= sequence.num_computed and sequence.num_pending > 0
        for sequence in self.waiting:
            assert sequence.status == "waiting" and not sequence.num_computed

    def _find_pages(self, sequence: LiveSequence, num_tokens: int) -> bool:
        """Make room for `num_tokens`, if need be by preempting; False if `sequence` itself fell."""
        while (pages := self.cache.grow(sequence.id, num_tokens)) is None:
            if self.prefixes is not None and self.prefixes.evict():
                continue
            victim = self.running.pop()
            self._release(victim, "waiting")
            victim.num_computed = victim.num_late = 0
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        sequence.pages = pages
        return True

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
            late=sequence.num_late,
            draft=max(wanted, 0),
            head_start=head_start,
            next_token=sequence.tokens[end] if end < sequence.num_tokens else None,
        )

    def _admit(self, segments: list[Segment], budget: int, num_drafts: int) -> None:
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self.chunked_prefill and sequence.num_tokens > budget:
                return
            if not self._enter(sequence):
                return
            sequence.status = "running"
            self.running.append(self.waiting.popleft())
            count = sequence.next_count(budget)
            segments.append(self._segment(sequence, count, (), num_drafts))
            budget -= count

    def _enter(self, sequence: LiveSequence) -> bool:
        """Give `sequence` slot, pages and what is known of its beginning; False if too few."""
        prefixes = self.prefixes
        if prefixes is None:
            granted = self.cache.admit(sequence.id, sequence.num_tokens)
            if granted is not None:
                sequence.slot, sequence.pages = granted
            return granted is not None
        scored = sequence.params.prompt_logprobs is not None
        match = prefixes.find(sequence.tokens, sequence.salt)
        node = None if scored else match.node
        while True:
            shared = node.pages[: node.length // self.cache.page_size] if node else ()
            granted = self.cache.admit(sequence.id, sequence.num_tokens, shared)
            if granted is not None:
                break
            if not prefixes.evict(keep=node):
                if node is None or self.running:
                    return False
                node = None  # alone and still too big: its own prefix has to go
        sequence.slot, sequence.pages = granted
        if sequence.why_not_more is None:  # not after a preemption
            sequence.reused = node.length if node else 0
            sequence.why_not_more = SCORED if scored else match.why
        if node is not None:
            prefixes.use(node, sequence.slot, sequence.pages)
            sequence.num_computed = node.length
            sequence.head_start = 0 if node.reads_ahead else None
        return True

    def _snapshot(self, sequence: LiveSequence, segment: Segment) -> None:
        """Keep the state that the step just booked ended with, where that is wanted."""
        done = sequence.num_computed
        if self.prefixes is None or sequence.num_late or done not in sequence.snapshot_points:
            return
        assert sequence.slot is not None
        ahead = segment.head_start == 0
        tokens = sequence.tokens[:done]
        self.prefixes.take(tokens, sequence.salt, sequence.slot, sequence.pages, ahead)

    def _drop(self, sequence: LiveSequence) -> None:
        self._release(sequence, "finished")
        del self.sequences[sequence.id]

    def _release(self, sequence: LiveSequence, status: str) -> None:
        self.cache.release(sequence.id)
        sequence.slot, sequence.pages = None, ()
        sequence.drafts, sequence.head_start = (), None
        sequence.status = status
