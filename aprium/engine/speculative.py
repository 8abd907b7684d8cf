"""Drafting: what to draft with, how many tokens, and what that is worth here.

A draft is verified by the model itself: the token at each position is chosen as it would be without
drafts (same logits, same random number), and drafts are kept as long as they are those tokens. So
the text is the same, greedy or sampled, and with a draft that is one token rather than a
distribution this is rejection sampling (arXiv 2211.17192). Drafts come from the model's prediction
head ("mtp"), applied to its own output again and again, or from the text itself ("ngram").
No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aprium.base.errors import ConfigError

METHODS = {"mtp": "mtp", "nemotron_h_mtp": "mtp", "ngram": "ngram"}
_FORGET = 0.97  # a step's weight after each step that follows
_WORTH = 1.02  # drafting must promise so much more than not drafting
_LEARN_EVERY = 4  # steps of which one is plain while costs are unknown
_PROBE_EVERY = 100  # steps between trials
_PROBE_DRAFTS = 16  # drafts compared in a trial
_PRIOR = 4.0  # drafts that the engine's own acceptance counts for in a new request


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How to draft.

    `method` is "mtp" (also "nemotron_h_mtp") or "ngram"; `num_speculative_tokens` the most tokens
    drafted at a time. N-gram drafts are what followed the last `prompt_lookup_max` tokens, or down
    to `prompt_lookup_min` of them, where they occurred last. `adaptive` lets measured acceptance
    and cost choose the number, down to none. Raises ConfigError naming the field.
    """

    method: str = "mtp"
    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"speculative method is {self.method!r}: use one of {known}")
        if not 1 <= self.num_speculative_tokens <= 16:
            raise ConfigError(
                f"num_speculative_tokens is {self.num_speculative_tokens}: it must be in 1..16"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}: it must be in 1.."
                f"{self.prompt_lookup_max} (prompt_lookup_max)"
            )

    @property
    def kind(self) -> Literal["mtp", "ngram"]:
        """The method, aliases resolved."""
        return "ngram" if METHODS[self.method] == "ngram" else "mtp"


def look_up(tokens: Sequence[int], count: int, longest: int, shortest: int) -> tuple[int, ...]:
    """Return up to `count` tokens that followed the last occurrence of how `tokens` end."""
    if count < 1:
        return ()
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end = list(tokens[-size:])
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin] == end[0] and list(tokens[begin : begin + size]) == end:
                return tuple(tokens[begin + size : begin + size + count])
    return ()


def count_accepted(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many of `drafts` are the tokens `chosen` there, before the first that is not."""
    for i, draft in enumerate(drafts):
        if draft != chosen[i]:
            return i
    return len(drafts)


class _Line:
    """Seconds as a + b x, fitted by least squares with older points forgotten."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # weight, x, x x, y, x y

    def add(self, x: float, y: float) -> None:
        for i, value in enumerate((1.0, x, x * x, y, x * y)):
            self._sums[i] = self._sums[i] * _FORGET + value

    def at(self, x: float) -> float | None:
        """Return the value at `x`; None where nothing is known of it."""
        n, sx, sxx, sy, sxy = self._sums
        spread = n * sxx - sx * sx
        if n < 1:
            return None
        if spread <= 1e-9 * n * n:  # one point only, again and again
            return sy / n if abs(sx / n - x) < 0.5 else None
        slope = max((n * sxy - sx * sy) / spread, 0.0)
        return max((sy - slope * sx) / n + slope * x, 1e-9)


class DraftLength:
    """Chooses how many tokens to draft, from what steps cost and how many drafts are accepted."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.most = config.num_speculative_tokens
        self._adaptive, self._free = config.adaptive, config.kind == "ngram"
        self._step, self._draft = _Line(), _Line()
        self._since = 0  # decisions since a trial
        self._tried_before = 0  # drafts compared before the trial
        self.tried = [0] * self.most  # by position
        self.kept = [0] * self.most

    def note_accepted(self, drafted: int, accepted: int) -> None:
        """Count `accepted` of `drafted` tokens of one sequence, by position."""
        for i in range(drafted):
            self.tried[i] += i <= accepted  # later ones were never compared
            self.kept[i] += i < accepted

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Count a step that only decoded: its packed tokens and its time without drafting."""
        self._step.add(num_tokens, seconds)

    def note_drafting(self, num_rows: int, seconds: float) -> None:
        """Count one drafting pass over `num_rows` sequences."""
        self._draft.add(num_rows, seconds)

    def choose(self, acceptance: Sequence[tuple[int, int]]) -> tuple[int, bool]:
        """Return how many tokens to draft for every running sequence, 0 for none; and a trial.

        `acceptance` has (drafts compared, drafts accepted) of each. The second is True where this
        step should leave drafts unused, so that the cost of a plain one stays known. While
        drafting does not pay, it is tried again now and then for a few steps.
        """
        if not self._adaptive or not acceptance:
            return self.most, False
        best = self._best(acceptance)
        self._since += 1
        if best is None:  # see both kinds of steps first
            return self.most, self._since % _LEARN_EVERY == 0
        if best:
            plain = self._since >= _PROBE_EVERY
            self._since = 0 if plain else self._since
            return best, plain
        if self._since < _PROBE_EVERY:
            return 0, False
        if sum(self.tried) - self._tried_before > _PROBE_DRAFTS:
            self._since, self._tried_before = 0, sum(self.tried)
            return 0, False
        return self.most, False

    def _best(self, acceptance: Sequence[tuple[int, int]]) -> int | None:
        """Return the length that promises most tokens a second; None while costs are unknown."""
        count = len(acceptance)
        base = self._step.at(count)
        if base is None or sum(self.tried) < 4 * self.most:
            return None
        overall = sum(self.kept) / max(sum(self.tried), 1)
        rates = [(kept + _PRIOR * overall) / (tried + _PRIOR) for tried, kept in acceptance]
        best, most = 0, count / base * _WORTH
        for length in range(1, self.most + 1):
            tokens = sum(sum(rate**i for i in range(length + 1)) for rate in rates)
            step = self._step.at(count * (1 + length))
            draft = 0.0 if self._free else self._draft.at(count)
            if step is None or draft is None:
                return None
            seconds = step + length * draft
            if tokens / seconds > most:
                best, most = length, tokens / seconds
        return best
