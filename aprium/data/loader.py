"""Packed batches from a mixture or of given samples: what the trainer draws from, resumable."""

import math
import random
from collections.abc import Sequence
from typing import Any

from aprium.base.errors import DataError
from aprium.base.records import Sample
from aprium.data.pack import NUM_OPEN, Packer
from aprium.data.sources import DataConfig, Mixture, Text


class Loader:
    """An endless stream of batches of at most `tokens_per_batch` tokens."""

    def __init__(self, config: DataConfig, text: Text, *, tokens_per_batch: int) -> None:
        self._mixture = Mixture(config, text)
        self._packer = Packer(
            tokens_per_batch, config.open_packs, config.shuffled_packs, config.seed
        )

    def next_batch(self) -> list[Sample]:
        """Return the samples of the next batch."""
        while True:
            address, sample = self._mixture.draw()
            batch = self._packer.add(sample, address)
            if batch is not None:
                return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return {"mixture": self._mixture.state_dict(), "packs": self._packer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        self._mixture.load_state_dict(state["mixture"])
        self._packer.load_state_dict(state["packs"], self._mixture.fetch)


class Repeated:
    """Given samples again and again, shuffled anew each time, in packed batches."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        tokens_per_batch: int,
        open_packs: int = NUM_OPEN,
        seed: int = 0,
    ) -> None:
        if not samples:
            raise DataError("there are no samples to train on")
        self._samples, self._seed, self._number = list(samples), seed, 0
        self._packer = Packer(tokens_per_batch, open_packs)
        self._epoch, self._order = -1, list[int]()

    def next_batch(self) -> list[Sample]:
        """Return the samples of the next batch."""
        while True:
            address = (self._number,)
            self._number += 1
            batch = self._packer.add(self._read(address), address)
            if batch is not None:
                return batch

    def _read(self, address: tuple[int, ...]) -> Sample:
        """Return sample `address[0]` of the endless sequence."""
        epoch, place = divmod(address[0], len(self._samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._samples)))
            random.Random(f"{self._seed} {epoch}").shuffle(self._order)
        return self._samples[self._order[place]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        packs = self._packer.state_dict()
        return {"samples": len(self._samples), "number": self._number, "packs": packs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned; raises DataError for other data."""
        if state["samples"] != len(self._samples):
            raise DataError(
                f"the run was started with {state['samples']} samples and these are "
                f"{len(self._samples)}: restore them, or begin anew in another output"
            )
        self._number = state["number"]
        self._packer.load_state_dict(state["packs"], self._read)


class Alternation:
    """Batches of one loader or another, never of both: `share` of them come from `rare`.

    They are spread evenly: after n batches, the floor of n times `share` were of `rare`.
    """

    def __init__(self, common: Loader, rare: Loader, share: float) -> None:
        if not 0 <= share <= 1:
            raise DataError(f"the share of batches is {share}: it must be in 0..1")
        self._common, self._rare, self._share, self._count = common, rare, share, 0

    def next_batch(self) -> list[Sample]:
        """Return the samples of the next batch."""
        self._count += 1
        # Rounded, since 0.08 times 25 is a little under 2.
        before, after = (
            math.floor(round(n * self._share, 6)) for n in (self._count - 1, self._count)
        )
        return (self._rare if after > before else self._common).next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        states = {"common": self._common.state_dict(), "rare": self._rare.state_dict()}
        return {"count": self._count, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        self._count = state["count"]
        self._common.load_state_dict(state["common"])
        self._rare.load_state_dict(state["rare"])
