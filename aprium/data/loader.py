"""Packed batches for the trainer: lists of samples under a token budget, resumable exactly.

Samples are drawn a window at a time, packed, and handed out bin by bin. The saved state is the
mixture's position before the window and how many bins of it were handed out, so that resuming
packs the same window again and goes on with the next bin.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from aprium.base.errors import ConfigError
from aprium.base.records import Sample
from aprium.data.pack import pack
from aprium.data.sources import Mixture


class Loader:
    """An endless iterator over batches of at most `token_budget` tokens.

    `window_bins` batches are packed at a time: more of them fill better and start later.
    """

    def __init__(self, mixture: Mixture, *, token_budget: int, window_bins: int = 16) -> None:
        if mixture.config.max_length > token_budget:
            raise ConfigError(
                f"max_length is {mixture.config.max_length}: it must be at most the token budget "
                f"of a batch, {token_budget}"
            )
        if window_bins < 1:
            raise ConfigError(f"window_bins is {window_bins}: it must be at least 1")
        self._mixture = mixture
        self._token_budget = token_budget
        self._window_tokens = window_bins * token_budget
        self._window_start = mixture.state_dict()
        self._bins: list[list[Sample]] = []
        self._given = 0

    def __iter__(self) -> Iterator[list[Sample]]:
        """Return itself."""
        return self

    def __next__(self) -> list[Sample]:
        """Return the next batch."""
        if self._given == len(self._bins):
            self._fill()
        self._given += 1
        return self._bins[self._given - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the exact next batch, as plain JSON values."""
        return {"window_start": self._window_start, "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; the mixture moves along."""
        self._mixture.load_state_dict(state["window_start"])
        self._bins, self._given = [], 0
        if state["given"]:
            self._fill()
        self._given = state["given"]

    def _fill(self) -> None:
        self._window_start = self._mixture.state_dict()
        samples: list[Sample] = []
        tokens = 0
        while tokens < self._window_tokens:
            samples.append(self._mixture.next())
            tokens += len(samples[-1].tokens)
        bins = pack([len(sample.tokens) for sample in samples], self._token_budget)
        self._bins = [[samples[index] for index in chosen] for chosen in bins]
        self._given = 0
