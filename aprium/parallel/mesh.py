"""The process mesh: who this process is among those that train one model, along each axis.

Processes are started by `torchrun`. Along "dp" they take different documents, along "cp" different
stretches of the same documents, along "tp" different heads and columns of the same matrices. "ep"
is a second view of the dp x cp processes: those that share out the experts among them. With one
process every axis has size 1 and no group, and no collective is ever called.
"""

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from aprium.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes each axis has; `dp` None takes what `tp` and `cp` leave over.

    `ep` processes of the dp x cp ones hold different experts.
    """

    dp: int | None = None
    ep: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("dp", "ep", "tp", "cp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"parallel.{name} is {value}: it must be at least 1")


@dataclass(frozen=True, eq=False)
class Axis:
    """Processes in a row: how many, which one this is, and their group (None for a single one)."""

    size: int = 1
    index: int = 0
    group: ProcessGroup | None = None


_ALONE = Axis()


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """The axes as this process sees them.

    `data` are the dp x cp processes together, `copies` those of them that hold the same experts,
    `world` all.
    """

    dp: Axis = _ALONE
    cp: Axis = _ALONE
    tp: Axis = _ALONE
    ep: Axis = _ALONE
    data: Axis = _ALONE
    copies: Axis = _ALONE
    world: Axis = _ALONE

    @staticmethod
    def from_environment(config: ParallelConfig | None = None) -> "Mesh":
        """Join the processes that `torchrun` started; without them, stand alone.

        Raises ConfigError when the number of processes does not fit `config`.
        """
        config = config or ParallelConfig()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        _check_sizes(config, world)
        if world == 1:
            return Mesh()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        rank, tp, cp, ep = dist.get_rank(), config.tp, config.cp, config.ep
        data = world // tp
        ranks = [[d * tp + t for d in range(data)] for t in range(tp)]  # [tp][dp x cp]
        return Mesh(
            world=Axis(world, rank, dist.group.WORLD),
            tp=_axis([[d * tp + t for t in range(tp)] for d in range(data)]),
            data=_axis(ranks),
            cp=_axis([line[i : i + cp] for line in ranks for i in range(0, data, cp)]),
            dp=_axis([line[i::cp] for line in ranks for i in range(cp)]),
            ep=_axis([line[i : i + ep] for line in ranks for i in range(0, data, ep)]),
            copies=_axis([line[i::ep] for line in ranks for i in range(ep)]),
        )

    @property
    def leads(self) -> bool:
        """Whether this process writes what one process writes for all."""
        return self.world.index == 0

    def row_counts(self, total: int) -> list[int]:
        """Return how many of `total` packed tokens each process of the cp axis works on."""
        size = self.cp.size
        return [total * (i + 1) // size - total * i // size for i in range(size)]

    def rows(self, total: int) -> slice:
        """Return which of `total` packed tokens this process works on."""
        first = total * self.cp.index // self.cp.size
        return slice(first, total * (self.cp.index + 1) // self.cp.size)

    def close(self) -> None:
        """Leave the other processes."""
        if self.world.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def require_one_process(what: str) -> None:
    """Raise ConfigError where `torchrun` started several processes for `what`, which takes one."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(f"{what} takes one process and torchrun started {world}: start it alone")


def _check_sizes(config: ParallelConfig, world: int) -> None:
    inner = config.tp * config.cp
    if world % inner:
        raise ConfigError(
            f"parallel.tp x parallel.cp is {config.tp} x {config.cp}, which does not divide the "
            f"{world} process(es) of this run: start it with torchrun --nproc-per-node N, N a "
            f"multiple of {inner}"
        )
    if config.dp is not None and config.dp * inner != world:
        raise ConfigError(
            f"parallel.dp x tp x cp is {config.dp * inner} and this run has {world} process(es): "
            "start that many with torchrun, or leave parallel.dp out"
        )
    if world // config.tp % config.ep:
        raise ConfigError(
            f"parallel.ep is {config.ep}, which does not divide the {world // config.tp} "
            "process(es) of dp x cp: start more with torchrun, or lower parallel.ep"
        )


def _axis(lines: list[list[int]]) -> Axis:
    """Make the groups of all `lines` of ranks and return this process's."""
    if len(lines[0]) == 1:
        return _ALONE
    group, _ = dist.new_subgroups_by_enumeration(lines)
    assert isinstance(group, ProcessGroup)
    return Axis(group.size(), dist.get_group_rank(group, dist.get_rank()), group)
