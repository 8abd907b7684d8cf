"""Weights from the trainer to an engine, in memory, under the names of published checkpoints.

The version that completions carry is the number of steps that the weights were trained for. The
engine holds plain float32 weights whatever the trainer has: matrices in other formats are decoded,
adapters merged.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aprium.checkpoint.load import Checkpoint
from aprium.checkpoint.names import parameter_of, tensor_table, tensors_of
from aprium.engine.client import AsyncEngine
from aprium.engine.engine import Engine
from aprium.model.config import ModelConfig, QuantConfig
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.train.lora import Adapter

# Tensors by published name: dtype, shape and bytes.
Packed = dict[str, tuple[str, tuple[int, ...], np.ndarray]]


class Weights:
    """The weights of `model`, with those of `adapter` merged into them, for engines to have."""

    def __init__(self, model: HybridModel, adapter: Adapter | None = None) -> None:
        self._model, self._adapter = model, adapter
        self._parameters = dict(model.named_parameters())

    @torch.no_grad()
    def checkpoint(self, path: Path) -> Checkpoint:
        """Return what an engine opens: a copy of its own, with the text files of `path`."""
        return assemble(path, self.config, self.tensors())

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self._model.config

    @property
    def num_tensors(self) -> int:
        """How many there are, by published name."""
        return len(tensor_table(self._model.config))

    @property
    def num_bytes(self) -> int:
        """What they take in float32."""
        return 4 * sum(math.prod(spec.shape) for spec in tensor_table(self._model.config).values())

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
        await replace_weights(engine, self.changed(), version, recompute=recompute)

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


@torch.no_grad()
def assemble(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Return a model of shape `config` with copies of all `tensors`, by published name.

    `path` has its text files.
    """
    model = HybridModel(config, dtype=torch.float32)
    targets = dict(model.named_parameters())
    for published, value in tensors.items():
        name, expert = parameter_of(published)
        (targets[name] if expert is None else targets[name][expert]).copy_(value)
    return Checkpoint(path=path, config=config, quant=QuantConfig(), model=model.eval())


async def replace_weights(
    engine: AsyncEngine, tensors: Mapping[str, Tensor], version: int, *, recompute: bool = False
) -> None:
    """Put `tensors` in place of those of `engine`; see `Weights.push`."""
    await engine.call(
        partial(Engine.update_weights, source=tensors, recompute=recompute, version=version)
    )


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Return tensors as Ray's object store takes them, which reads them without copying."""
    return {
        name: (
            str(value.dtype).removeprefix("torch."),
            tuple(value.shape),
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, value in tensors.items()
    }


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that `pack` packed, to be read only: they share its memory."""
    found = {}
    for name, (dtype, shape, data) in packed.items():
        with warnings.catch_warnings():  # torch knows no tensors that are only to be read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            flat = torch.from_numpy(data)
        found[name] = flat.view(getattr(torch, dtype)).reshape(shape)
    return found
