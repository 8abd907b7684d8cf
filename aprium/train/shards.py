"""Training checkpoints of many processes, and those of one read by many.

One process writes `model.safetensors` and `optimiser.safetensors`. Many write `shards/` together,
each what it holds, through `torch.distributed.checkpoint`. Either is read by any number of
processes on any mesh: tensors are addressed as blocks of the whole, and every process reads the
blocks it needs. Keys are "model/NAME" and "optimiser/NAME/LEAF".
"""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from aprium.base.errors import CheckpointError
from aprium.base.files import sync
from aprium.model.model import HybridModel
from aprium.parallel.collectives import barrier, gather_objects
from aprium.parallel.mesh import Axis
from aprium.train.checkpoint import (
    complete,
    digest,
    explained,
    read_state,
    require_same,
    write_state,
)
from aprium.train.optim import Muon
from aprium.train.parallel import local, own_pieces

_SHARDS = "shards"
_FILES = ("model", "optimiser")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A whole tensor's shape, and the blocks of it that this process holds: offset and view."""

    shape: tuple[int, ...]
    blocks: list[tuple[tuple[int, ...], Tensor]]


Optimisers = list[torch.optim.Optimizer]


def write(
    output: Path, step: int, model: HybridModel, optimisers: Optimisers, state: dict[str, Any]
) -> Path:
    """Write checkpoint `step-N` under `output`, on all processes at once; return its directory.

    It is written beside its name and renamed into place, unless it is there.
    """
    final, world = output / f"step-{step:06d}", model.mesh.world
    if final.exists():
        return final
    partial = output / f"{final.name}.partial"
    if model.mesh.leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    barrier(world)
    writer = FileSystemWriter(partial / _SHARDS)  # it flushes its files
    entries, planner = dict(_entries(model, optimisers)), _SavePlanner()
    with explained(final, partial):
        try:
            checkpoint.save(entries, storage_writer=writer, planner=planner)
        except CheckpointException as error:
            raise OSError(_causes(error)) from error
        digests = _digests(partial, world)
        if model.mesh.leads:
            write_state(partial / "state.json", state, digests)
            for path in (partial / "state.json", partial / _SHARDS, partial):
                sync(path)
            partial.rename(final)
            sync(output)
    barrier(world)
    return final


def _digests(partial: Path, world: Axis) -> dict[str, str]:
    """Return the digests of the files of shards; each process reads some of them."""
    barrier(world)
    names = sorted(str(f.relative_to(partial)) for f in (partial / _SHARDS).iterdir())
    mine = {name: digest(partial / name) for name in names[world.index :: world.size]}
    return {name: value for found in gather_objects(mine, world) for name, value in found.items()}


def read(
    directory: Path, model: HybridModel, optimisers: Optimisers, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Read checkpoint `directory` into `model` and `optimisers`; return the state beside them.

    Raises CheckpointError for a damaged file, or where model, optimisers or `identity` are others.
    """
    try:
        state = read_state(directory, model.mesh.world)
        require_same(directory, state.get("identity"), identity)
        load(directory, model, optimisers)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        before = [path for path in complete(directory.parent) if path != directory][-1:]
        remedy = f"resume from {before[0]}" if before else "begin again: there is no earlier one"
        raise CheckpointError(
            f"checkpoint {directory} cannot be read ({error}): delete it to {remedy}"
        ) from error
    return state


def load(directory: Path, model: HybridModel, optimisers: Optimisers | None = None) -> None:
    """Read what one process or many wrote into `model` and the state of `optimisers`.

    Raises CheckpointError when the parameters are not those of `model`, and OSError, ValueError or
    SafetensorError when a file cannot be read.
    """
    shapes = _shapes(directory)
    wanted = {f"model/{name}" for name, _ in model.named_parameters()}
    if missing := wanted - shapes.keys():
        raise CheckpointError(
            f"{directory} has no {min(missing).removeprefix('model/')}: it is of another model"
        )
    if more := {key for key in shapes if key.startswith("model/")} - wanted:
        raise CheckpointError(
            f"{directory} has {min(more).removeprefix('model/')}, which this model does not have: "
            "it is of another model; begin in another output"
        )
    if optimisers is not None:
        _make_room(model, optimisers, shapes)
    entries = _entries(model, optimisers or [])
    for key, entry in entries.items():
        if shapes[key] != entry.shape:
            raise CheckpointError(
                f"{directory}: {key} has shape {shapes[key]} and not {entry.shape}: it is of "
                "another model"
            )
    if (directory / _SHARDS).exists():
        _read_shards(directory / _SHARDS, entries, alone=model.mesh.world.size == 1)
    else:
        _read_files(directory, entries)


def fill(model: HybridModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole `tensors`, by the names of parameters, into what this process holds of them."""
    with torch.no_grad():
        for key, entry in _entries(model, []).items():
            for offset, block in entry.blocks:
                ends = (begin + n for begin, n in zip(offset, block.shape, strict=True))
                block.copy_(tensors[key.removeprefix("model/")][tuple(map(slice, offset, ends))])


def _slots(
    model: HybridModel, optimisers: Optimisers
) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    names = {p: name for name, p in model.named_parameters()}
    return [
        (names[p], p, optimiser)
        for optimiser in optimisers
        for group in optimiser.param_groups
        for p in group["params"]
    ]


def optimiser_tensors(model: HybridModel, optimisers: Optimisers) -> dict[str, Tensor]:
    """Return the state of the optimisers of one process as "NAME/LEAF"."""
    return {
        f"{name}/{leaf}": value.contiguous()
        for name, p, optimiser in _slots(model, optimisers)
        for leaf, value in optimiser.state[p].items()
    }


def _entries(model: HybridModel, optimisers: Optimisers) -> dict[str, Entry]:
    found = {f"model/{name}": _entry(model, name, p, p) for name, p in model.named_parameters()}
    for name, p, optimiser in _slots(model, optimisers):
        for leaf, value in optimiser.state[p].items():
            found[f"optimiser/{name}/{leaf}"] = _entry(model, name, p, value)
    return found


def _entry(model: HybridModel, name: str, parameter: nn.Parameter, value: Tensor) -> Entry:
    """Return `value`, cut as `parameter` is; one of another shape is the same on all processes."""
    value = value.detach()
    if value.shape != parameter.shape:
        return Entry(tuple(value.shape), [((0,) * value.dim(), value)])
    shape, pieces = own_pieces(name, parameter, model.plan)
    held = local(value)
    return Entry(shape, [(tuple(s.start for s in p.whole), held[p.part]) for p in pieces])


def _make_room(
    model: HybridModel, optimisers: Optimisers, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Give every parameter the state tensors that the checkpoint has of it."""
    leaves: dict[str, list[str]] = {}
    for key in shapes:
        file, _, rest = key.partition("/")
        if file == "optimiser":
            name, _, leaf = rest.rpartition("/")
            leaves.setdefault(name, []).append(leaf)
    for name, p, optimiser in _slots(model, optimisers):
        whole = model.plan.whole_shape(name, p.shape)
        found = leaves.get(name, [])
        if found and isinstance(optimiser, Muon) != ("momentum_buffer" in found):
            raise CheckpointError(
                f"{name} was trained with another optimiser: continue with the one the run began "
                "with (optim.muon_lr, or optimizer of fine-tuning), or begin in another output"
            )
        optimiser.state[p] = {}
        for leaf in found:
            shape = shapes[f"optimiser/{name}/{leaf}"]
            value = torch.zeros_like(p) if shape == whole else torch.zeros(shape)
            optimiser.state[p][leaf] = value.detach()


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    if (directory / _SHARDS).exists():
        found = FileSystemReader(directory / _SHARDS).read_metadata().state_dict_metadata
        return {key: tuple(getattr(value, "size", ())) for key, value in found.items()}
    shapes = {}
    for file in _FILES:
        with safe_open(directory / f"{file}.safetensors", framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (the handle is no mapping)
                shapes[f"{file}/{key}"] = tuple(tensors.get_slice(key).get_shape())
    return shapes


def _read_files(directory: Path, entries: Mapping[str, Entry]) -> None:
    for file in _FILES:
        with safe_open(directory / f"{file}.safetensors", framework="pt") as tensors:
            for key, entry in entries.items():
                prefix, _, name = key.partition("/")
                if prefix != file:
                    continue
                for offset, block in entry.blocks:
                    ends = (begin + n for begin, n in zip(offset, block.shape, strict=True))
                    bounds = tuple(map(slice, offset, ends))
                    found = tensors.get_slice(name)[bounds] if bounds else tensors.get_tensor(name)
                    block.copy_(found)


def _read_shards(directory: Path, entries: Mapping[str, Entry], alone: bool) -> None:
    reader = FileSystemReader(directory)
    try:
        with warnings.catch_warnings():
            if alone:  # it warns that there is one process, which is what `no_dist` says
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            checkpoint.load(
                dict(entries), storage_reader=reader, planner=_LoadPlanner(), no_dist=alone
            )
    except CheckpointException as error:
        raise ValueError(f"{directory}: {_causes(error)}") from error


def _causes(error: CheckpointException) -> str:
    return "; ".join(str(cause[0]) for cause in error.failures.values())


def _find(entries: Mapping[str, Any], index: MetadataIndex) -> Tensor:
    blocks = entries[index.fqn].blocks
    return next(block for offset, block in blocks if torch.Size(offset) == index.offset)


def _chunks(entry: Entry) -> list[ChunkStorageMetadata]:
    return [
        ChunkStorageMetadata(offsets=torch.Size(offset), sizes=block.shape)
        for offset, block in entry.blocks
    ]


class _SavePlanner(DefaultSavePlanner):
    """Write every block of every entry; blocks that several processes hold are written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, entry in self.state_dict.items():
            for chunk, (_, block) in zip(_chunks(entry), entry.blocks, strict=True):
                data = TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(block),
                    size=torch.Size(entry.shape),
                )
                index = MetadataIndex(key, chunk.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _find(self.state_dict, index).contiguous()


class _LoadPlanner(DefaultLoadPlanner):
    """Read every block of every entry from the blocks that were written."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # The default looks into the values for tensors on the meta device; these have none.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for key, entry in self.state_dict.items():
            found = self.metadata.state_dict_metadata[key]
            assert isinstance(found, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, found, _chunks(entry))
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _find(self.state_dict, index)
