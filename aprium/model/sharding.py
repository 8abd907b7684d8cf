"""How a model is cut over processes: what must divide, and which heads and rows a process has.

The placements themselves are the table in `aprium.parallel.plan`; this says what its sections are
for a configuration, and refuses meshes that do not fit.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aprium.base.errors import ConfigError, UnsupportedError
from aprium.model.config import ModelConfig, QuantConfig
from aprium.parallel.mesh import Mesh
from aprium.parallel.plan import Plan, part_shape


class HeadShare(NamedTuple):
    """A cp process's share of a mixer: channels of its convolution and heads, int64."""

    channels: Tensor
    heads: Tensor


def make_plan(config: ModelConfig, quant: QuantConfig, mesh: Mesh) -> Plan:
    """Return what each process holds; raise ConfigError naming a size that does not divide."""
    if mesh.world.size > 1:
        if quant.formats:
            raise UnsupportedError(
                "a quantised model cannot be cut over processes: load it with one process, or "
                "train the unquantised checkpoint"
            )
        _check(config, mesh)
    inner, states = config.mamba_inner, config.num_groups * config.ssm_state_size
    whole = () if own_kv_rows(config, mesh) is None else ("*.k_proj.weight", "*.v_proj.weight")
    sections = {
        "in_proj": (inner, inner, states, states, config.mamba_num_heads),
        "conv1d": (inner, states, states),
    }
    return Plan(mesh=mesh, sections=sections, whole=whole)


def _check(config: ModelConfig, mesh: Mesh) -> None:
    kinds = {*config.layers, *(config.mtp_layers if config.num_mtp_layers else ())}
    tp, cp = mesh.tp.size, mesh.cp.size
    sizes: list[tuple[str, int, str, int]] = []
    if "mamba" in kinds:
        sizes.append(("num_groups", config.num_groups, "parallel.tp", tp))
    if "attention" in kinds:
        sizes.append(("num_heads", config.num_heads, "parallel.tp", tp))
    if "mlp" in kinds:
        sizes.append(("intermediate_size", config.intermediate_size, "parallel.tp", tp))
    if "moe" in kinds:
        width, shared = config.expert_intermediate_size, config.shared_expert_intermediate_size
        sizes.append(("expert_intermediate_size", width, "parallel.tp", tp))
        sizes.append(("shared_expert_intermediate_size", shared, "parallel.tp", tp))
        sizes.append(("num_experts", config.num_experts, "parallel.ep", mesh.ep.size))
    for name, size, option, processes in sizes:
        if size % processes:
            raise ConfigError(
                f"{option} is {processes}, which does not divide {name} {size}: choose a divisor"
            )
    kv = config.num_kv_heads
    if "attention" in kinds and kv % tp and tp % kv:
        raise ConfigError(
            f"parallel.tp is {tp}: it must divide num_kv_heads {kv} or be a multiple of it"
        )
    if "mamba" in kinds:
        heads, groups = config.mamba_num_heads // tp, config.num_groups // tp
        if heads % cp or (groups % cp and cp % groups):
            raise ConfigError(
                f"parallel.cp is {cp}: it must divide the {heads} Mamba heads of a process, and "
                f"divide its {groups} groups or be a multiple of them"
            )


def keep_own_parts(model: nn.Module, plan: Plan) -> None:
    """Replace the parameters of `model`, just built, by room for this process's parts of them."""
    for name, parameter in list(model.named_parameters()):
        if not plan.cuts(name):
            continue
        pieces = plan.pieces(name, parameter.shape)
        owner, _, leaf = name.rpartition(".")
        part = parameter.new_empty(part_shape(pieces))
        setattr(model.get_submodule(owner), leaf, nn.Parameter(part, parameter.requires_grad))


def own_kv_rows(config: ModelConfig, mesh: Mesh) -> slice | None:
    """Return the rows of k_proj and v_proj that this process reads where it holds all of them.

    None where the KV heads are cut over the tp processes.
    """
    tp, kv = mesh.tp, config.num_kv_heads
    if kv % tp.size == 0:
        return None
    first = tp.index * kv // tp.size * config.head_dim
    return slice(first, first + config.head_dim)


def head_shares(config: ModelConfig, mesh: Mesh) -> list[HeadShare]:
    """Return each cp process's share of the Mamba heads that this tp process has.

    Where there are more cp processes than groups, those whose heads read one group all take it.
    """
    tp, cp = mesh.tp.size, mesh.cp.size
    heads, groups = config.mamba_num_heads // tp, config.num_groups // tp
    width, size = config.mamba_head_dim, config.ssm_state_size
    inner = heads * width
    shares = []
    for index in range(cp):
        mine = torch.arange(heads // cp) + index * (heads // cp)
        group = torch.arange(max(1, groups // cp)) + index * groups // cp
        u, b = (mine[:, None] * width + torch.arange(width)).flatten(), group[:, None] * size
        b = (b + torch.arange(size)).flatten() + inner
        shares.append(HeadShare(torch.cat((u, b, b + groups * size)), mine))
    return shares
