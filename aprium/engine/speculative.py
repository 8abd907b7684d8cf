"""Drafting: what to draft with, how many tokens, and what that is worth here.

A draft is verified by the model itself: the token at each position is chosen as it would be without
drafts (same logits, same random number), and drafts are kept as long as they are those tokens. So
the text is the same, greedy or sampled, and with a draft that is one token rather than a
distribution this is rejection sampling (arXiv 2211.17192). Drafts come from the model's prediction
head ("mtp"), applied to its own output again and again, or from the text itself ("ngram").

Whether that pays depends on the machine, the batch and the text, and is measured: windows of steps
with drafts against windows without, which are few where drafts pay; where they do not, windows with
drafts are tried as long as that costs little of all time. The head says how likely its own drafts
are, and stops where the next one would cost more than it promises. No torch.
"""

import statistics
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aprium.base.errors import ConfigError

METHODS = {"mtp": "mtp", "nemotron_h_mtp": "mtp", "ngram": "ngram"}
_FORGET = 0.98  # weight of what was known, for each step or draft that is noted
_FORGET_READING = 0.99  # for each token
_DETAIL_EVERY = 4  # steps of which one is noted in detail, since that takes time
_WORTH = 1.05  # drafting must promise so much more than not drafting
_WINDOW = 12  # steps that are timed together
_SETTLE = 2  # steps before a window, which do not find in the caches what they need
_RECENT = 7  # windows of a kind whose median counts, since machines have other work, too
_ENOUGH = 3  # windows of both kinds that are compared
_PLAIN_EVERY = 8, 24  # windows with drafts to one without: while little is gained, and much
_MUCH, _HOPELESS = 1.15, 0.75  # times as fast; the second needs no more windows
_REST = 100  # steps without drafts between windows, where drafts do not pay
_TRIAL_SHARE = 0.005  # of all time that drafting may have lost
_LONGER = 1.02  # times as many tokens a second a longer draft has to promise
_FIRST_LENGTH = 2  # drafts at a time, while nothing is known
_LEAST_CHANCE = 0.05, 0.9  # of a draft to be made


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
    codes = array("i", tokens)
    text, width = codes.tobytes(), codes.itemsize
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end, stop = text[-size * width :], len(text) - width
        while (at := text.rfind(end, 0, stop)) >= 0:
            begin, inside = divmod(at, width)
            if not inside:
                return tuple(tokens[begin + size : begin + size + count])
            stop = at + len(end) - 1
    return ()


def count_accepted(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many of `drafts` are the tokens `chosen` there, before the first that is not."""
    for i, draft in enumerate(drafts):
        if draft != chosen[i]:
            return i
    return len(drafts)


class Decision(NamedTuple):
    """How to draft after a step.

    Up to `length` tokens for every running sequence, 0 for none, each sequence's only as long as
    their probabilities multiply to `least`. It holds for `rest` steps more, of which nothing has to
    be noted.
    """

    length: int
    least: float = 0.0
    rest: int = 0


class _Line:
    """Seconds as a + b x, fitted by least squares with older points forgotten."""

    def __init__(self) -> None:
        self._sums = (0.0,) * 5  # weight, x, x x, y, x y

    def add(self, x: float, y: float) -> None:
        """Note a point; one far above the others was interrupted."""
        n, sx, sxx, sy, sxy = self._sums
        if n > 4:
            y = min(y, 3 * sy / n)
        keep = _FORGET
        self._sums = (
            n * keep + 1,
            sx * keep + x,
            sxx * keep + x * x,
            sy * keep + y,
            sxy * keep + x * y,
        )

    def fit(self) -> tuple[float, float]:
        """Return a and b; b is not negative, and 0 while x has not varied."""
        n, sx, sxx, sy, sxy = self._sums
        spread = n * sxx - sx * sx
        slope = max((n * sxy - sx * sy) / spread, 0.0) if spread > 1e-6 * n * n else 0.0
        return ((sy - slope * sx) / n if n else 0.0), slope


class _Share:
    """How often something was so, older times forgotten."""

    def __init__(self) -> None:
        self._times = self._so = 0.0

    def add(self, so: bool) -> None:
        self._times = self._times * _FORGET + 1
        self._so = self._so * _FORGET + so

    @property
    def value(self) -> float:
        """The share, drawn to one half while little is known."""
        return (self._so + 0.5) / (self._times + 1)


class _Rates:
    """Seconds a token in the last windows of one batch size, with drafts and without."""

    def __init__(self) -> None:
        self.windows = {on: deque[float](maxlen=_RECENT) for on in (False, True)}

    def gain(self, reading_s: float) -> float | None:
        """Return how many times as fast drafting is, if it spends so much a token on prompts."""
        fewest = min(map(len, self.windows.values()))
        if not fewest:
            return None
        off, on = (statistics.median_low(self.windows[on]) for on in (False, True))
        gain = off / (on + reading_s)
        return gain if fewest >= _ENOUGH or gain < _HOPELESS else None


@dataclass(slots=True)
class _Window:
    """Steps of one kind and batch size, timed together."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class DraftLength:
    """Chooses whether to draft, and how many tokens, from what it costs and what is accepted."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.most = config.num_speculative_tokens
        self._adaptive, self._free = config.adaptive, config.kind == "ngram"
        self._on, self._settling, self._resting = True, _SETTLE, False
        self._size = 0  # of the batch, in powers of two
        self._rates: dict[int, _Rates] = {}  # by size
        self._windows: dict[tuple[int, bool], _Window] = {}  # open ones, by size and kind
        self._since_plain = 0  # windows with drafts since one without
        self._lost_s = self._elapsed_s = 0.0
        self._turn, self._detail = 0, False
        self._reading_s = 0.0  # that the head spent on prompts, for each token
        self._step, self._draft = _Line(), _Line()  # of a sequence, by tokens more and by drafts
        self._made = [_Share() for _ in range(self.most)]  # by position, of those wanted
        self._right = [_Share() for _ in range(self.most)]  # it and all before, of those made
        self._best = Decision(min(self.most, _FIRST_LENGTH), _LEAST_CHANCE[0])
        self.tried = [0] * self.most  # by position
        self.kept = [0] * self.most

    def note_drafts(self, wanted: int, made: int) -> None:
        """Count that of up to `wanted` tokens `made` were drafted for one sequence."""
        if self._detail:
            for i in range(wanted):
                self._made[i].add(made > i)

    def note_accepted(self, drafted: int, accepted: int) -> None:
        """Count `accepted` of `drafted` tokens of one sequence, by position."""
        for i in range(min(accepted + 1, drafted)):  # later ones were never compared
            self.tried[i] += 1
            self.kept[i] += i < accepted
        if self._detail:
            for i in range(drafted):
                self._right[i].add(accepted > i)

    def note_reading(self, seconds: float) -> None:
        """Count that the head spent `seconds` on prompts."""
        self._reading_s += seconds * (1 - _FORGET_READING)
        self._lost_s += seconds

    def note_step(
        self,
        num_sequences: int,
        num_tokens: int,
        num_new: int,
        num_drafts: int,
        step_s: float,
        draft_s: float,
    ) -> None:
        """Count a step that only decoded.

        It computed `num_tokens` and gave `num_new` in `step_s`, without the `draft_s` in which
        `num_drafts` were drafted after it.
        """
        if not self._adaptive:
            return
        self._reading_s *= _FORGET_READING**num_new
        self._size = (num_sequences - 1).bit_length()
        if self._on:
            if not draft_s and not self._free:  # the head has to wait for a page's beginning
                return
            if self._detail:
                self._step.add(num_tokens / num_sequences - 1, step_s / num_sequences)
                self._draft.add(num_drafts / num_sequences, draft_s / num_sequences)
        if self._settling:
            self._settling -= 1
            return
        window = self._windows.setdefault((self._size, self._on), _Window())
        window.steps += 1
        window.tokens += num_new
        window.seconds += step_s + draft_s
        if window.steps == _WINDOW:
            del self._windows[self._size, self._on]
            on = self._on
            self._judge(window)
            self._settling = _SETTLE if self._on != on else 0

    def choose(self, elapsed_s: float) -> Decision:
        """Decide how to draft after the next step; all steps so far took `elapsed_s`."""
        if not self._adaptive:
            return Decision(self.most)
        self._elapsed_s = elapsed_s
        self._turn += 1
        self._detail = self._turn % _DETAIL_EVERY == 0
        if self._on:
            return self._best
        resting, self._resting = self._resting, False
        return Decision(0, rest=_REST if resting else 0)

    def _judge(self, window: _Window) -> None:
        """Book a window that ended, and choose the kind of the next."""
        rates = self._rates.setdefault(self._size, _Rates())
        rates.windows[self._on].append(window.seconds / window.tokens)
        if self._on:
            self._set_best()
            self._since_plain += 1
            if without := rates.windows[False]:
                self._lost_s += window.seconds - window.tokens * statistics.median_low(without)
        gain = rates.gain(self._reading_s)
        if gain is not None and gain > _WORTH:
            self._lost_s = max(self._lost_s, 0.0)  # what was gained buys no trials
        may_lose = self._lost_s <= _TRIAL_SHARE * self._elapsed_s
        if gain is None:
            some, plain = (len(rates.windows[on]) for on in (True, False))
            self._on = some <= plain and (may_lose or len(self._rates) == 1)
            self._resting = not self._on and plain >= _ENOUGH
        elif gain > _WORTH:
            self._on = self._since_plain < _PLAIN_EVERY[gain > _MUCH]
            self._since_plain *= self._on
        else:
            self._on = may_lose
            self._resting = not may_lose  # windows may be far apart now that this is settled

    def _set_best(self) -> None:
        """Set the length that promises most tokens a second, and how likely a draft has to be."""
        step, verify = self._step.fit()
        reading, draft = self._draft.fit()
        drafts = accepted = best = 0.0
        for i in range(self.most):
            made = self._made[i].value
            drafts += made
            accepted += made * self._right[i].value
            rate = (1 + accepted) / (step + reading + drafts * (verify + draft))
            if rate > best * _LONGER:
                best, low_high = rate, _LEAST_CHANCE
                least = min(max((verify + draft) * rate, low_high[0]), low_high[1])
                self._best = Decision(i + 1, least)
