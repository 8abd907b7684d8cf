"""Packed batches from a mixture: what the trainer draws from, resumable to the sample."""

from typing import Any

from aprium.base.records import Sample
from aprium.data.pack import Packer
from aprium.data.sources import DataConfig, Mixture, Text


class Loader:
    """An endless stream of batches of at most `tokens_per_batch` tokens."""

    def __init__(self, config: DataConfig, text: Text, *, tokens_per_batch: int) -> None:
        self._mixture = Mixture(config, text)
        self._packer = Packer(tokens_per_batch)

    def next_batch(self) -> list[Sample]:
        """Return the samples of the next batch."""
        while True:
            batch = self._packer.add(self._mixture.next_sample())
            if batch is not None:
                return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return {"mixture": self._mixture.state_dict(), "open": self._packer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        self._mixture.load_state_dict(state["mixture"])
        self._packer.load_state_dict(state["open"])
