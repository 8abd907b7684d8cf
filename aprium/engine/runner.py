"""Run one step: plan in, tokens and log-probabilities out; the only tensors of the engine.

The plan's integers become one token tensor and one `Layout`; the model advances the state in
place; only rows that are sampled, or scored for a prompt, are projected to the vocabulary, and
scored rows a few at a time, so that a long prompt never makes a [T, V] tensor.
"""

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from aprium.base.errors import EngineError
from aprium.base.records import SamplingParams, TopLogprobs
from aprium.engine.prefix import CopyPage, CopySlot, Drop, Operation, Save
from aprium.engine.scheduler import Segment, StepPlan
from aprium.engine.speculative import count_accepted
from aprium.engine.store import SnapshotStore
from aprium.model.layout import Drafting, Layout
from aprium.model.model import HybridModel
from aprium.model.state import HybridState
from aprium.ops.sample import Choice, sample, score

# Scored rows projected at a time: at a vocabulary of 131072, 32 MiB of logits.
_SCORE_ROWS = 64


class SegmentResult(NamedTuple):
    """What one segment gave: the tokens it chose, scores of its targets, drafts that follow."""

    choices: tuple[Choice, ...]
    scores: list[float]
    alternatives: list[TopLogprobs]
    drafts: tuple[int, ...] = ()


class Runner:
    """A model and its state; `store` keeps snapshots that outlive their slots."""

    def __init__(
        self, model: HybridModel, state: HybridState, store: SnapshotStore | None = None
    ) -> None:
        self.model = model
        self.state = state
        self.store = store
        self.device = model.backbone.embeddings.weight.device
        self.pools: dict[str, Tensor] = {}  # last hidden state, or sum so far, by request
        self.rebind()
        # Where this thread does the work, what it does in spite of others: time of the processor.
        self.clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        self.draft_s = 0.0  # of the last step, by the clock

    def rebind(self) -> None:
        """Take the model's kernels anew, after they were bound."""
        self._pick = self.model.native.pick if self.model.native else None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SegmentResult]:
        """Compute `plan` and return one result a segment; advances the state.

        Raises EngineError when the model gives a number that is not one.
        """
        self.apply(plan.operations)
        segments = plan.segments
        lengths = [len(s.tokens) for s in segments]
        layout = Layout.build(
            lengths=lengths,
            context=[s.start for s in segments],
            slots=[s.slot for s in segments],
            pages=[s.pages for s in segments],
            page_size=self.state.page_size,
            replay=[s.late for s in segments],
            hold=[s.num_drafts > 0 for s in segments],
            device=self.device,
        )
        tokens = torch.tensor([t for s in segments for t in s.tokens], device=self.device)
        hidden = self.model(tokens, layout, self.state)
        choices = self._choose(segments, layout, hidden)
        scores = [
            self._score(s, start, hidden) if s.targets else ([], [])
            for s, start in zip(segments, layout.starts, strict=True)
        ]
        for segment, start in zip(segments, layout.starts, strict=True):
            if segment.pool is not None:
                self._pool(segment, hidden[start : start + len(segment.tokens)])
        drafts = self._draft(segments, layout, hidden, choices, plan.least)
        return [
            SegmentResult(chosen, *scored, drafted)
            for chosen, scored, drafted in zip(choices, scores, drafts, strict=True)
        ]

    @torch.inference_mode()
    def apply(self, operations: Iterable[Operation]) -> None:
        """Copy, save and load states, in order."""
        for order in operations:
            if isinstance(order, CopySlot):
                self.state.copy_slot(*order)
            elif isinstance(order, CopyPage):
                self.state.copy_page(*order)
            elif isinstance(order, Save):
                assert self.store is not None
                meta = order.meta
                tensors = self.state.export(order.slot, order.pages, meta.start, meta.length)
                self.store.put(meta, tensors)
            elif isinstance(order, Drop):
                assert self.store is not None
                self.store.drop(order.key)
            else:
                for part in order.parts:
                    self.state.restore_pages(order.pages, part.start, part.tensors)
                self.state.restore_slot(order.slot, order.parts[-1].tensors)

    def _choose(
        self, segments: tuple[Segment, ...], layout: Layout, hidden: Tensor
    ) -> list[tuple[Choice, ...]]:
        """Choose after each segment's last token and at each draft; return what is accepted."""
        rows: list[int] = []
        params: list[SamplingParams] = []
        seeds: list[int] = []
        positions: list[int] = []
        masks: list[bytes | None] = []
        for s, start in zip(segments, layout.starts, strict=True):
            if s.sample:
                first, count = len(s.tokens) - 1 - s.num_drafts, s.num_drafts + 1
                rows += range(start + first, start + first + count)
                positions += range(s.start + first + 1, s.start + first + 1 + count)
                params += [s.params] * count
                seeds += [s.seed] * count
                masks += s.masks or (None,) * count
        if not rows:
            return [()] * len(segments)
        logits = self.model.logits(hidden if len(rows) == hidden.shape[0] else hidden[rows])
        found = sample(logits, params, seeds, positions, self._pick, masks)
        results: list[tuple[Choice, ...]] = []
        begin = 0
        for s in segments:
            if not s.sample:
                results.append(())
                continue
            end = begin + s.num_drafts + 1
            kept = found[begin:end]
            if s.num_drafts:
                drafts = s.tokens[len(s.tokens) - s.num_drafts :]
                kept = kept[: count_accepted(drafts, [c.token for c in kept]) + 1]
            for choice in kept:
                _check_number(choice.logprob, s)
            results.append(tuple(kept))
            begin = end
        return results

    def _draft(
        self,
        segments: tuple[Segment, ...],
        layout: Layout,
        hidden: Tensor,
        choices: list[tuple[Choice, ...]],
        least: float,
    ) -> list[tuple[int, ...]]:
        """Let the prediction head read what the step accepted, and draft."""
        drafts: list[tuple[int, ...]] = [()] * len(segments)
        self.draft_s = 0.0
        if all(s.head_start is None for s in segments):
            return drafts
        begun = self.clock()
        reading: list[int] = []
        rows: list[int] = []
        tokens: list[int] = []
        lengths: list[int] = []
        for i, s in enumerate(segments):
            if s.head_start is None:
                continue
            known = s.tokens[1 : len(s.tokens) - s.num_drafts]
            last = [c.token for c in choices[i]]
            if not last and s.next_token is not None:
                last = [s.next_token]
            reading.append(i)
            tokens += known
            tokens += last
            lengths.append(len(known) + len(last))
            rows += range(layout.starts[i], layout.starts[i] + lengths[-1])
        some = [segments[i] for i in reading]
        counts = [s.draft for s in some]
        made = self.model.draft(
            hidden,
            Drafting(rows, tokens, self._head_layout(some, lengths), counts, least),
            self.state,
        )
        for i, drafted in zip(reading, made, strict=True):
            drafts[i] = tuple(drafted)
        self.draft_s = self.clock() - begun
        return drafts

    def _head_layout(self, segments: list[Segment], lengths: list[int]) -> Layout:
        """Lay out rows of the prediction head, whose own reading begins at a page of its own."""
        size = self.state.page_size
        first = [s.head_start or 0 for s in segments]
        return Layout.build(
            lengths=lengths,
            context=[s.start - begin for s, begin in zip(segments, first, strict=True)],
            slots=[s.slot for s in segments],
            pages=[s.pages[begin // size :] for s, begin in zip(segments, first, strict=True)],
            page_size=size,
            device=self.device,
        )

    def _pool(self, segment: Segment, rows: Tensor) -> None:
        """Take the last of `rows`, or add them all to a sum, in order, wherever they were cut."""
        rows = rows.double()
        if segment.pool == "mean" and segment.start:
            rows = torch.cat((self.pools[segment.id][None], rows))
        self.pools[segment.id] = rows[-1] if segment.pool == "last" else rows.cumsum(0)[-1]

    def _score(
        self, segment: Segment, start: int, hidden: Tensor
    ) -> tuple[list[float], list[TopLogprobs]]:
        values: list[float] = []
        alternatives: list[TopLogprobs] = []
        count = segment.params.prompt_logprobs or 0
        for begin in range(0, len(segment.targets), _SCORE_ROWS):
            targets = segment.targets[begin : begin + _SCORE_ROWS]
            first = start + segment.score_from + begin
            logits = self.model.logits(hidden[first : first + len(targets)])
            some, best = score(logits, targets, count, self._pick)
            values += some
            alternatives += best
        for value in values:
            _check_number(value, segment)
        return values, alternatives


def _check_number(logprob: float, segment: Segment) -> None:
    if math.isnan(logprob):
        where = f"positions {segment.start} to {segment.start + len(segment.tokens)}"
        raise EngineError(
            f"the model's logits are not numbers (request {segment.id}, {where}): "
            "the checkpoint is damaged, or overflows in this dtype (try dtype float32)"
        )
