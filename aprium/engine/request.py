"""One sequence while the engine works on it: its tokens so far, and what it owns.

A `Request` is what a caller asks for and never changes; a `LiveSequence` is the mutable twin that
scheduler and engine share. No torch: everything here is numbers.
Invariants: `tokens` is the prompt followed by what was generated; the first `num_computed` of them
are in the sequence's state, the last `num_late` of those in its ring; a sequence that is not
running owns no slot and no pages, and has no drafts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from aprium.base.records import SamplingParams, TopLogprobs
from aprium.engine.guide import SequenceGuide
from aprium.engine.prefix import Node


@dataclass(slots=True, eq=False, kw_only=True)
class LiveSequence:
    """The engine's record of one request.

    `stop_ids` end the text, of which `floor`, a mask, has none; it holds for the first `min_tokens`
    of `params`. `max_tokens` bounds the text, `seed` drives sampling. `status` is "waiting",
    "running" or "finished"; `pages` and `slot` are set while running. `num_scored` counts the
    prompt positions whose log-probabilities are in `prompt_logprobs`. `drafts` may follow `tokens`;
    `num_drafted` and `num_accepted` count drafts verified. The prediction head has read positions
    from `head_start` on, if that is set.
    At `snapshot_points` (numbers of tokens) a step ends and the state is kept for others with the
    same `salt`, while generating every `keep_every` tokens (0: never); `private` is a salt of its
    own, for nobody else. It came from `node`; `reused` tokens were taken from such a state, and
    `why_not_more` says why no more. It goes before others by `priority` (lowest first), and shares
    the engine fairly with other `share`s; `number` is its place in the order of arrival, `ticket`
    in that of first admission. It waits until `follows` has read the prompt they have in common.
    Its state is `stale` where older weights made it, and not kept then. `pooling` makes a vector of
    the hidden states of the prompt. A `guide` says what may be generated next, and has taken what
    was; `reason` says why a sequence was given up.
    Times are in seconds of the engine's clock, None until the moment has come; `deadline_s` is when
    it is given up.
    """

    id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    max_tokens: int
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    floor: bytes | None = None
    num_computed: int = 0
    num_scored: int = 0
    status: str = "waiting"
    finish: str | None = None
    reason: str | None = None
    slot: int | None = None
    pages: tuple[int, ...] = ()
    num_preemptions: int = 0
    drafts: tuple[int, ...] = ()
    num_late: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    head_start: int | None = None
    salt: str = ""
    private: bool = False
    guide: SequenceGuide | None = None
    snapshot_points: frozenset[int] = frozenset()
    keep_every: int = 0
    stale: bool = False
    pooling: Literal["last", "mean"] | None = None
    node: Node | None = None
    priority: int = 0
    share: str = ""
    number: int = 0
    ticket: int | None = None
    follows: str | None = None
    deadline_s: float | None = None
    reused: int = 0
    why_not_more: str | None = None
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among those admitted: the highest is preempted first."""
        assert self.ticket is not None
        return self.priority, self.ticket

    @property
    def reads_all(self) -> bool:
        """Whether every position of the prompt has to be computed."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def num_settled(self) -> int:
        """Tokens that the recurrent state in the slot has taken in: all but those in the ring."""
        return self.num_computed - self.num_late

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens known that are not in the state yet: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    def next_count(self, budget: int) -> int:
        """Return how many pending tokens a step of `budget` takes: up to a snapshot point."""
        count = min(self.num_pending, budget)
        if not self.snapshot_points:
            return count
        ends = (p - self.num_computed for p in self.snapshot_points if p > self.num_computed)
        return min(count, min(ends, default=count))

    @property
    def room(self) -> int:
        """Most tokens that may yet be generated."""
        return self.num_prompt + self.max_tokens - len(self.tokens)

    def targets(self, start: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Say which rows of the segment [start, start + count) score the prompt.

        Returns the offset of the first such row in the segment, and the tokens that it and the
        rows after it predict; no tokens when there is nothing (left) to score.
        """
        if self.params.prompt_logprobs is None:
            return 0, ()
        first = max(start, self.num_scored)
        last = min(start + count, self.num_prompt - 1)
        if first >= last:
            return 0, ()
        return first - start, tuple(self.tokens[first + 1 : last + 1])

    def masks(self, drafts: Sequence[int]) -> tuple[bytes | None, ...]:
        """Return what may follow the tokens so far, and each of `drafts` after them.

        As `SequenceGuide.masks` does, of which a mask that the floor would leave empty stands; no
        masks where everything may follow.
        """
        early = max(self.params.min_tokens - self.num_generated, 0)
        floors = (self.floor,) * early if self.floor is not None else ()
        if self.guide is None and not floors:
            return ()
        count = len(drafts) + 1
        masks = self.guide.masks(drafts) if self.guide is not None else (None,) * count
        paired = itertools.zip_longest(masks, floors[: len(masks)])
        return tuple(_both(mask, floor) for mask, floor in paired)

    def append(self, token: int) -> None:
        """Add a generated token, and set `finish` where it is the last."""
        self.tokens.append(token)
        guide = self.guide
        # A stop token that comes too early was forced by the guide, which knows if it is the end.
        if token in self.stop_ids and self.num_generated > self.params.min_tokens:
            self.finish = "stop"
            return
        if guide is not None and guide.error is None:
            guide.push(token)
        if guide is not None and guide.error is not None:
            self.finish, self.reason = "abort", guide.error
        elif guide is not None and guide.complete:
            self.finish = "stop"
        elif self.num_generated >= self.max_tokens:
            self.finish = "length"

    def add_scores(self, logprobs: Sequence[float], alternatives: Sequence[TopLogprobs]) -> None:
        """Add log-probabilities of the next prompt tokens; entry 0 of the whole is None."""
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)
            self.prompt_top_logprobs.append(None)
        self.prompt_logprobs.extend(logprobs)
        self.prompt_top_logprobs.extend(alternatives)


def _both(mask: bytes | None, floor: bytes | None) -> bytes | None:
    """Return the tokens in both masks, or `mask` where there are none."""
    if mask is None or floor is None:
        return mask or floor
    both = int.from_bytes(mask, "little") & int.from_bytes(floor, "little")
    return both.to_bytes(len(mask), "little") if both else mask
