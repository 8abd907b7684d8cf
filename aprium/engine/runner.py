"""Run one step: plan in, tokens and log-probabilities out; the only tensors of the engine.

The plan's integers become one token tensor and one `Layout`; the model advances the state in
place; only rows that are sampled, or scored for a prompt, are projected to the vocabulary, and
scored rows a few at a time, so that a long prompt never makes a [T, V] tensor.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aprium.base.errors import EngineError
from aprium.base.records import TopLogprobs
from aprium.engine.scheduler import Segment, StepPlan
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.state import HybridState
from aprium.ops.sample import Choice, sample, score

# Scored rows projected at a time: at a vocabulary of 131072, 32 MiB of logits.
_SCORE_ROWS = 64


class SegmentResult(NamedTuple):
    """What one segment gave: the chosen token, if it was to choose; scores of its targets."""

    choice: Choice | None
    scores: list[float]
    alternatives: list[TopLogprobs]


class Runner:
    """A model and its state."""

    def __init__(self, model: HybridModel, state: HybridState) -> None:
        self.model = model
        self.state = state
        self.device = model.backbone.embeddings.weight.device
        self._pick = model.native.pick if model.native else None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SegmentResult]:
        """Compute `plan` and return one result a segment; advances the state.

        Raises EngineError when the model gives a number that is not one.
        """
        segments = plan.segments
        lengths = [len(s.tokens) for s in segments]
        layout = Layout.build(
            lengths=lengths,
            context=[s.start for s in segments],
            slots=[s.slot for s in segments],
            pages=[s.pages for s in segments],
            page_size=self.state.page_size,
            device=self.device,
        )
        tokens = torch.tensor([t for s in segments for t in s.tokens], device=self.device)
        hidden = self.model(tokens, layout, self.state)
        choices = iter(self._choose(segments, layout, hidden))
        return [
            SegmentResult(next(choices) if s.sample else None, *self._score(s, start, hidden))
            for s, start in zip(segments, layout.starts, strict=True)
        ]

    def _choose(
        self, segments: tuple[Segment, ...], layout: Layout, hidden: Tensor
    ) -> list[Choice]:
        chosen = [i for i, s in enumerate(segments) if s.sample]
        if not chosen:
            return []
        last = [layout.starts[i] + layout.lengths[i] - 1 for i in chosen]
        rows = hidden if len(last) == hidden.shape[0] else hidden[last]
        sampled = [segments[i] for i in chosen]
        choices = sample(
            self.model.logits(rows),
            [s.params for s in sampled],
            [s.seed for s in sampled],
            [s.start + len(s.tokens) for s in sampled],
            self._pick,
        )
        for segment, choice in zip(sampled, choices, strict=True):
            _check_number(choice.logprob, segment)
        return choices

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
