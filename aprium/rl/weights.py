"""Weights from the trainer to an engine, in memory, under the names of published checkpoints.

The version that completions carry is the number of steps that the weights were trained for. The
engine holds plain float32 weights whatever the trainer has: matrices in other formats are decoded,
adapters merged.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aprium.checkpoint.load import Checkpoint
from aprium.checkpoint.names import parameter_of, tensor_table, tensors_of
from aprium.engine.client import AsyncEngine
from aprium.engine.engine import Engine
from aprium.model.config import QuantConfig
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.train.lora import Adapter


class Weights:
    """The weights of `model`, with those of `adapter` merged into them, for engines to have."""

    def __init__(self, model: HybridModel, adapter: Adapter | None = None) -> None:
        self._model, self._adapter = model, adapter
        self._parameters = dict(model.named_parameters())

    @torch.no_grad()
    def checkpoint(self, path: Path) -> Checkpoint:
        """Return what an engine opens: a copy of its own, with the text files of `path`."""
        copy = HybridModel(self._model.config, dtype=torch.float32)
        targets = dict(copy.named_parameters())
        for published, value in self.tensors().items():
            name, expert = parameter_of(published)
            (targets[name] if expert is None else targets[name][expert]).copy_(value)
        return Checkpoint(path=path, config=copy.config, quant=QuantConfig(), model=copy.eval())

    @torch.no_grad()
    def tensors(self) -> Mapping[str, Tensor]:
        """Return all weights by published name, as they are now; what needs no decoding is shared.

        Next to an adapter, these are the merged ones.
        """
        return self._read(tensor_table(self._model.config))

    @torch.no_grad()
    def changed(self) -> Mapping[str, Tensor]:
        """Return the weights that training changes, by published name, as they are now."""
        if self._adapter is None:
            return self.tensors()
        count = self._model.config.num_experts
        names = (f"{name}.weight" for name in self._adapter.names)
        return self._read(one for name in names for one in tensors_of(name, count))

    async def push(self, engine: AsyncEngine, version: int, *, recompute: bool = False) -> None:
        """Replace the weights of `engine` between two of its steps; they get that `version`.

        Sequences under way go on from their states, or with `recompute` from their tokens. Nothing
        may train the model meanwhile. Raises EngineError when the engine has stopped.
        """
        tensors = self.changed()
        await engine.call(
            partial(Engine.update_weights, source=tensors, recompute=recompute, version=version)
        )

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        factors = self._adapter.factors() if self._adapter is not None else {}
        found = {}
        for published in names:
            value = self._value(published)
            module = published.removesuffix(".weight")
            if module in factors:
                value = value + factors[module].delta()
            found[published] = value
        return found

    def _value(self, published: str) -> Tensor:
        """Return a weight by published name, without what an adapter adds."""
        name, expert = parameter_of(published)
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if isinstance(module, Matrix) and leaf == "weight":
            return module.dense(torch.float32, expert)
        value = self._parameters[name].detach()
        return value if expert is None else value[expert]
