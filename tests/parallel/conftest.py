"""Processes that train one small model together, started once for many checks."""

import datetime
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def spawn(job: Callable[..., Any], size: int, directory: Path, *arguments: Any) -> list[Any]:
    """Run `job(*arguments)` in `size` processes that know each other; return what each returned."""
    directory.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_enter, (size, str(directory), job, arguments), nprocs=size)  # type: ignore[attr-defined]
    return [pickle.loads((directory / f"result-{rank}").read_bytes()) for rank in range(size)]


def _enter(
    rank: int, size: int, directory: str, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        timeout=datetime.timedelta(seconds=60),
        rank=rank,
        world_size=size,
    )
    result = job(*arguments)
    (Path(directory) / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
