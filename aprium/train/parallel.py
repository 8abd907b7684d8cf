"""Training on many processes: parameters cut over the data axis, gradients and matrices joined.

What the model's plan leaves of a parameter is cut by rows over the dp x cp processes by FSDP2, a
block at a time; experts that are shared out are cut over those that hold the same ones. Each
process's loss is its share of the whole, so gradients are summed, never averaged.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from aprium.model.linear import Experts
from aprium.model.model import HybridModel
from aprium.parallel.collectives import all_gather, total
from aprium.parallel.mesh import Axis
from aprium.parallel.plan import Piece, Plan


def shard(model: HybridModel) -> None:
    """Cut the parameters of `model` over its data processes, in place; before optimisers are made.

    Selection biases stay whole: every process moves them alike.
    """
    mesh = model.mesh
    if mesh.data.size == 1:
        return
    ignored = {p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        if isinstance(module, Experts) and mesh.ep.size > 1:
            if mesh.copies.size > 1:
                _fully_shard(module, mesh.copies, ignored)
            else:
                ignored.update(module.parameters())
    head = model.mtp.layers if model.config.num_mtp_layers else []
    for module in (*model.backbone.layers, *head, model):
        _fully_shard(module, mesh.data, ignored)


def _fully_shard(module: nn.Module, axis: Axis, ignored: set[nn.Parameter]) -> None:
    assert axis.group is not None
    mesh = DeviceMesh.from_group(axis.group, "cpu", mesh_dim_names=("data",))
    cut = fully_shard(module, mesh=mesh, ignored_params=ignored)
    assert isinstance(cut, FSDPModule)
    cut.set_gradient_divide_factor(1.0)
    cut.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered of the outermost module."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group `parameters` by the processes they are cut over: one fused update takes one group."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        key = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def clip_gradients(model: HybridModel, max_norm: float) -> Tensor:
    """Scale the gradients of all processes to a norm of at most `max_norm`; return the norm [].

    Where that is not finite nothing is scaled, so that what is wrong can still be found.
    """
    if model.mesh.world.size == 1:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    norm = torch.stack(list(sum_of_squares(model, lambda name: "").values())).sum().sqrt()
    if not torch.isfinite(norm):
        return norm
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)
    return norm


def sum_of_squares(model: HybridModel, kind: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the gradients' sum of squares [] over all processes, by `kind` of parameter name."""
    tp, found = model.mesh.tp.size, dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = local(parameter.grad).float().square().sum()
            if not any(cut.axis == "tp" for cut in model.plan.cuts(name)):
                square = square / tp  # the tp processes hold it alike
            found[kind(name)] = found.get(kind(name), torch.zeros(())) + square
    names = sorted(found)
    if not names:
        return {"": torch.zeros(())}
    sums = total(torch.stack([found[name] for name in names]), model.mesh.world)
    return dict(zip(names, sums, strict=True))


class Matrices(NamedTuple):
    """How to make the matrices of a parameter whole for an update, and to cut them again."""

    join: Callable[[Tensor], Tensor]
    cut: Callable[[Tensor], Tensor]


def matrices_of(name: str, parameter: nn.Parameter, plan: Plan) -> Matrices | None:
    """Return how to make whole matrices [..., rows, columns] of tensors cut as `parameter` is.

    A stack is cut between its matrices by FSDP and by expert, which leaves them whole. None where
    nothing is cut through.
    """
    through_rows = isinstance(parameter, DTensor) and parameter.dim() == 2
    over_tp = any(cut.axis == "tp" for cut in plan.cuts(name))
    if not through_rows and not over_tp:
        return None if not isinstance(parameter, DTensor) else Matrices(local, lambda whole: whole)
    tp = plan.mesh.tp
    first, last = _own_rows(parameter)

    def join(tensor: Tensor) -> Tensor:
        part = tensor.full_tensor() if through_rows and isinstance(tensor, DTensor) else tensor
        part = local(part)
        return plan.join(name, all_gather(part, tp)) if over_tp else part

    def cut(whole: Tensor) -> Tensor:
        part = plan.part_along_tp(name, whole) if over_tp else whole
        return part[first:last] if through_rows else part

    return Matrices(join, cut)


def _own_rows(parameter: Tensor) -> tuple[int, int]:
    """Return the range of rows that FSDP left this process of what the plan did."""
    rows = parameter.shape[0] if parameter.dim() else 1
    if not isinstance(parameter, DTensor):
        return 0, rows
    mesh = parameter.device_mesh
    size = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * size, rows)
    last = min(first + size, rows)
    assert last - first == parameter.to_local().shape[0]
    return first, last


def own_pieces(name: str, parameter: Tensor, plan: Plan) -> tuple[tuple[int, ...], list[Piece]]:
    """Return the whole shape of `parameter` and the pieces of it in what this process holds."""
    shape = plan.whole_shape(name, parameter.shape)
    first, last = _own_rows(parameter)
    kept = []
    for whole, part in plan.pieces(name, shape):
        if not part:
            return shape, [Piece(whole, part)]
        begin, end = max(part[0].start, first), min(part[0].stop, last)
        if begin < end:
            shift = whole[0].start - part[0].start
            kept.append(
                Piece(
                    (slice(begin + shift, end + shift), *whole[1:]),
                    (slice(begin - first, end - first), *part[1:]),
                )
            )
    return shape, kept
