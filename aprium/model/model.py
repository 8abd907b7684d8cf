"""The model: Mamba-2, attention, MLP and MoE blocks, prediction head, and `forward`.

One file for the whole family, in every use: training (no state), prefill, decode and verification
(a state). It knows nothing of files, requests or optimisers. Module names are the checkpoint's
names. Source: docs/architecture.md, which cites the papers.
Letters: T packed tokens, S sequences, D model, H heads, K KV heads, P head dim, N SSM state,
G groups, E experts, A active experts, L latent, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aprium.model.config import ModelConfig, QuantConfig
from aprium.model.layout import Drafting, Layout
from aprium.model.linear import Experts, Linear, row_parallel
from aprium.model.native import NativeModel
from aprium.model.sharding import HeadShare, head_shares, keep_own_parts, make_plan, own_kv_rows
from aprium.model.state import HybridState
from aprium.ops import attention, conv, moe, ssd
from aprium.ops.activation import relu_squared, sigmoid, silu
from aprium.ops.matmul import linear
from aprium.ops.norm import gated_group_norm, rms_norm
from aprium.parallel.collectives import broadcast, copy_to, exchange, gather_rows, reduce_from
from aprium.parallel.mesh import Mesh


class Routing(NamedTuple):
    """What one MoE layer decided: scores [T, E] with gradients, experts int64 [T, A]."""

    name: str
    scores: Tensor
    experts: Tensor


class Build(NamedTuple):
    """What every block needs to make its parameters."""

    config: ModelConfig
    quant: QuantConfig
    dtype: torch.dtype
    mesh: Mesh

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
        """Make the linear layer whose name on disk is `name`."""
        backbone = name.startswith("backbone.")
        scales = {"k_proj": "k_scale", "v_proj": "v_scale"} if self.quant.kv_scales else {}
        return Linear(
            inputs,
            outputs,
            name=name,
            quant=self.quant,
            dtype=self.dtype,
            bias=bias,
            kv_scale=scales.get(name.rsplit(".", 1)[-1]) if backbone else None,
        )

    def vector(self, *shape: int) -> nn.Parameter:
        """Make a parameter that is never quantised."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype))


class Context:
    """What a mixer needs of the step: the layout, the state, and this layer's place in it.

    A plain class, since what wraps blocks copies the lists and records among their arguments, and
    `routing` must be the caller's own list.
    """

    __slots__ = ("index", "layout", "routing", "state")

    def __init__(
        self, layout: Layout, state: HybridState | None, index: int, routing: list[Routing] | None
    ) -> None:
        self.layout, self.state, self.index, self.routing = layout, state, index, routing

    def on(self, layout: Layout) -> "Context":
        """Return the same with another layout."""
        return Context(layout, self.state, self.index, self.routing)


class Norm(nn.Module):
    """RMSNorm with a plain weight."""

    def __init__(self, build: Build, size: int) -> None:
        super().__init__()
        self.weight = build.vector(size)
        self.eps = build.config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [T, D]."""
        return rms_norm(x, self.weight, self.eps)


class Conv1d(nn.Module):
    """Parameters of the depthwise convolution, in the file's shape [channels, 1, kernel]."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self.weight = build.vector(config.conv_dim, 1, config.conv_kernel)
        self.bias = build.vector(config.conv_dim) if config.conv_bias else None


class Mamba(nn.Module):
    """Mamba-2 mixer: projection, convolution, state-space recurrence, gated group norm."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        config = self.config = build.config
        self.mesh = build.mesh
        bias = config.mamba_proj_bias
        self.in_proj = build.linear(f"{name}.in_proj", config.hidden_size, config.in_proj_dim, bias)
        self.conv1d = Conv1d(build)
        self.A_log = build.vector(config.mamba_num_heads)
        self.D = build.vector(config.mamba_num_heads)
        self.dt_bias = build.vector(config.mamba_num_heads)
        self.norm = Norm(build, config.mamba_inner)
        self.out_proj = build.linear(
            f"{name}.out_proj", config.mamba_inner, config.hidden_size, bias
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix `x` [T, D] along each sequence; updates the state where there is one."""
        layout = context.layout
        projected = self.in_proj(copy_to(x, self.mesh.tp))
        if context.state is not None and (any(layout.replay) or any(layout.hold)):
            return self._mix_held(projected, context)
        return self._mix(projected, context)

    def _mix_held(self, projected: Tensor, context: Context) -> Tensor:
        """Mix a step that replays or holds tokens, one sequence after another."""
        layout, state = context.layout, context.state
        assert state is not None and layout.slot_ids is not None
        outputs = []
        for i, slot in enumerate(layout.slot_ids):
            late, hold = layout.replay[i], layout.hold[i]
            start, done = layout.starts[i], layout.context[i]
            rows = projected[start : start + layout.lengths[i]]
            buffers = (state.conv[context.index], state.ssm[context.index])
            ring = state.ring[context.index][slot]
            if late:
                alone = layout.alone(i, late, done - late)
                self._mix(ring[:late], context.on(alone))
            kept = [buffer[slot].clone() for buffer in buffers] if hold else []
            alone = layout.alone(i, len(rows), done)
            outputs.append(self._mix(rows, context.on(alone)))
            for buffer, before in zip(buffers, kept, strict=False):
                buffer[slot] = before
            if hold:
                ring[: len(rows)] = rows
        return torch.cat(outputs)

    def _mix(self, projected: Tensor, context: Context) -> Tensor:
        """Mix what `in_proj` gave, [T, in_proj_dim], along each sequence."""
        config, tp = self.config, self.mesh.tp
        inner, groups = config.mamba_inner // tp.size, config.num_groups // tp.size
        widths = (inner, config.conv_dim // tp.size, config.mamba_num_heads // tp.size)
        gate, mixed, dt = projected.split(widths, -1)
        if self.mesh.cp.size == 1:
            y = self._recur(mixed, dt, context, None)
        else:
            y = self._recur_by_heads(mixed, dt, context)
        y = gated_group_norm(y, gate, self.norm.weight, groups, config.norm_eps)
        return row_parallel(self.out_proj, y, tp)

    def _recur_by_heads(self, mixed: Tensor, dt: Tensor, context: Context) -> Tensor:
        """Run the recurrence for a share of the heads over the tokens of all cp processes.

        Tokens are traded for heads before it and back after it; the gate stays where it is.
        """
        cp, mine = self.mesh.cp, mixed.shape[0]
        counts = self.mesh.row_counts(context.layout.num_tokens)
        shares = head_shares(self.config, self.mesh)
        leaving = [torch.cat((mixed[:, s.channels], dt[:, s.heads]), 1) for s in shares]
        arrived = exchange(torch.cat(leaving), [mine] * cp.size, counts, cp)
        share = shares[cp.index]
        mixed, dt = arrived.split((len(share.channels), len(share.heads)), 1)
        y = self._recur(mixed, dt, context, share)
        y = exchange(y, counts, [mine] * cp.size, cp)
        return y.unflatten(0, (cp.size, mine)).transpose(0, 1).flatten(1)

    def _recur(
        self, mixed: Tensor, dt: Tensor, context: Context, share: HeadShare | None
    ) -> Tensor:
        """Convolve `mixed` and run the recurrence; [T, inner], of the heads of `share`."""
        config, layout, size = self.config, context.layout, self.config.ssm_state_size
        vectors = (self.A_log, self.D, self.dt_bias)
        if share is not None:
            vectors = tuple(vector[share.heads] for vector in vectors)
        a_log, d, dt_bias = vectors
        heads = a_log.shape[0]
        inner = heads * config.mamba_head_dim
        mixed = self._convolve(mixed, context, share)
        groups = (mixed.shape[1] - inner) // (2 * size)
        u, b, c = mixed.split((inner, groups * size, groups * size), -1)
        u = u.unflatten(-1, (heads, config.mamba_head_dim))
        b, c = (t.unflatten(-1, (groups, size)) for t in (b, c))
        dt = ssd.step_size(dt, dt_bias, config.time_step_limit)
        a, d = -torch.exp(a_log.float()), d.float()
        if context.state is None:
            y = ssd.chunked(u, dt, a, b, c, d, layout.segment_ids, config.chunk_size)
        else:
            assert layout.slots is not None
            buffer = context.state.ssm[context.index]
            before = layout.read_slots(buffer)
            y, after = ssd.scan(u, dt, a, b, c, d, layout.starts, layout.lengths, before)
            buffer[layout.slots] = after
        return y.flatten(-2)

    def _convolve(self, mixed: Tensor, context: Context, share: HeadShare | None) -> Tensor:
        """Convolve `mixed` [T, channels] and take SiLU of it, in float32."""
        layout, weight, bias = context.layout, self.conv1d.weight.squeeze(1), self.conv1d.bias
        if share is not None:
            weight = weight[share.channels]
            bias = None if bias is None else bias[share.channels]
        if context.state is None:
            return conv.silu_conv(mixed, weight, bias, layout.positions)
        assert layout.slots is not None
        buffer = context.state.conv[context.index]
        tail = layout.read_slots(buffer)
        starts = torch.tensor(layout.starts, device=mixed.device)
        lengths = torch.tensor(layout.lengths, device=mixed.device)
        buffer[layout.slots] = conv.conv_tail(mixed, starts, lengths, tail)
        history = tail[layout.segment_ids].to(mixed.dtype)
        return silu(conv.causal_conv(mixed, weight, bias, layout.positions, history)).float()


class Attention(nn.Module):
    """Causal grouped-query attention with no positional encoding."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        config = self.config = build.config
        self.mesh = build.mesh
        dim = config.hidden_size
        wide, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = build.linear(f"{name}.q_proj", dim, wide)
        self.k_proj = build.linear(f"{name}.k_proj", dim, narrow)
        self.v_proj = build.linear(f"{name}.v_proj", dim, narrow)
        self.o_proj = build.linear(f"{name}.o_proj", wide, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix `x` [T, D] along each sequence; appends to the state's pages where there is one."""
        layout, head_dim, mesh = context.layout, self.config.head_dim, self.mesh
        x = copy_to(x, mesh.tp)
        q, k, v = (
            y.unflatten(-1, (-1, head_dim))
            for y in (self.q_proj(x), self._narrow(self.k_proj, x), self._narrow(self.v_proj, x))
        )
        if context.state is None and mesh.cp.size > 1:
            counts = mesh.row_counts(layout.num_tokens)
            k, v = (gather_rows(t, counts, mesh.cp) for t in (k, v))
            first = mesh.rows(layout.num_tokens).start
            out = attention.packed_part(q, k, v, layout.lengths, first)
        elif context.state is None:
            out = attention.packed(q, k, v, layout.lengths)
        else:
            assert layout.pages is not None
            keys, values = (t[context.index] for t in (context.state.keys, context.state.values))
            scales = self.cache_scales()
            for start, length, first, ids in zip(
                layout.starts, layout.lengths, layout.context, layout.pages, strict=True
            ):
                rows = slice(start, start + length)
                attention.write_pages(keys, k[rows], ids, first, scales[0])
                attention.write_pages(values, v[rows], ids, first, scales[1])
            out = attention.paged(
                q, keys, values, layout.starts, layout.lengths, layout.context, layout.pages, scales
            )
        return row_parallel(self.o_proj, out.flatten(-2), mesh.tp)

    def _narrow(self, proj: Linear, x: Tensor) -> Tensor:
        """Project to this process's keys or values.

        Where several tp processes read one KV head, each holds the whole matrix, takes the rows it
        needs, and the gradients of all are summed.
        """
        rows = own_kv_rows(self.config, self.mesh)
        if rows is None:
            return proj(x)
        return linear(x, copy_to(proj.dense(x.dtype), self.mesh.tp)[rows])

    def cache_scales(self) -> tuple[float, float]:
        """Return what keys and values are divided by in an FP8 cache: the file's scales, or 1."""
        k, v = getattr(self.k_proj, "k_scale", None), getattr(self.v_proj, "v_scale", None)
        return 1.0 if k is None else float(k), 1.0 if v is None else float(v)


class MLP(nn.Module):
    """Two matrices around a squared ReLU: a dense layer, or the shared expert."""

    def __init__(self, build: Build, name: str, hidden: int) -> None:
        super().__init__()
        dim, bias = build.config.hidden_size, build.config.mlp_bias
        self.mesh = build.mesh
        self.up_proj = build.linear(f"{name}.up_proj", dim, hidden, bias)
        self.down_proj = build.linear(f"{name}.down_proj", hidden, dim, bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map `x` [T, D] to [T, D], each token by itself."""
        tp = self.mesh.tp
        inner = relu_squared(self.up_proj(copy_to(x, tp)))
        return row_parallel(self.down_proj, inner, tp)


class Gate(nn.Module):
    """Parameters of the router: weight [E, D] and the bias that steers selection only."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self.weight = build.vector(config.num_experts, config.hidden_size)
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False
        )


class MoE(nn.Module):
    """Routed experts, in a latent space where the model has one, plus a shared expert."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        config = self.config = build.config
        self.name, self.mesh = name, build.mesh
        self.gate = Gate(build)
        self.experts = Experts(
            config.num_experts,
            config.expert_dim,
            config.expert_intermediate_size,
            name=f"{name}.experts",
            quant=build.quant,
            dtype=build.dtype,
            axis=build.mesh.ep,
        )
        self.shared_experts = MLP(
            build, f"{name}.shared_experts", config.shared_expert_intermediate_size
        )
        if config.latent_size is not None:
            dim, latent, bias = config.hidden_size, config.latent_size, config.mlp_bias
            self.fc1_latent_proj = build.linear(f"{name}.fc1_latent_proj", dim, latent, bias)
            self.fc2_latent_proj = build.linear(f"{name}.fc2_latent_proj", latent, dim, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map `x` [T, D] to [T, D]; appends to `context.routing` where a list is given."""
        config, tp = self.config, self.mesh.tp
        scores = sigmoid(linear(x.float(), self.gate.weight))
        experts = moe.choose(
            scores,
            self.gate.e_score_correction_bias,
            num_active=config.num_active_experts,
            num_groups=config.num_router_groups,
            num_active_groups=config.num_active_router_groups,
        )
        experts = broadcast(experts, tp)
        if context.routing is not None:
            context.routing.append(Routing(self.name, scores, experts))
        weights = moe.weigh(
            scores, experts, normalise=config.norm_topk_prob, scale=config.routed_scaling_factor
        )
        inputs = x if config.latent_size is None else self.fc1_latent_proj(x)
        routed = self.experts(copy_to(inputs, tp), copy_to(weights, tp), experts)
        routed = reduce_from(routed, tp)
        if config.latent_size is not None:
            routed = self.fc2_latent_proj(routed)
        return routed + self.shared_experts(x)


MIXERS = {"mamba": Mamba, "attention": Attention, "moe": MoE}


def _mixer(build: Build, kind: str, name: str) -> nn.Module:
    if kind == "mlp":
        return MLP(build, name, build.config.intermediate_size)
    return MIXERS[kind](build, name)


class Block(nn.Module):
    """x + mixer(norm(x)): every layer of the family has exactly one mixer."""

    def __init__(self, build: Build, kind: str, name: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = Norm(build, build.config.hidden_size)
        self.mixer = _mixer(build, kind, f"{name}.mixer")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map the residual stream `x` [T, D] to [T, D]."""
        return x + self.mixer(self.norm(x), context)


def _run(block: nn.Module, x: Tensor, context: Context, recompute: bool, *rest: Tensor) -> Tensor:
    if recompute:
        return checkpoint(block, x, context, *rest, use_reentrant=False)
    return block(x, context, *rest)


class Embeddings(nn.Module):
    """The token table [V, D]."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.weight = build.vector(build.config.vocab_size, build.config.hidden_size)


class Backbone(nn.Module):
    """Embedding, the layers, and the last norm."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self.embeddings = Embeddings(build)
        self.layers = nn.ModuleList(
            Block(build, kind, f"backbone.layers.{i}") for i, kind in enumerate(config.layers)
        )
        self.norm_f = Norm(build, config.hidden_size)


class PredictionLayer(Block):
    """One layer of the prediction head; its first also joins the inputs, its last normalises."""

    def __init__(self, build: Build, kind: str, name: str, *, first: bool, last: bool) -> None:
        super().__init__(build, kind, name)
        dim = build.config.hidden_size
        self.first, self.last = first, last
        if first:
            self.enorm, self.hnorm = Norm(build, dim), Norm(build, dim)
            self.eh_proj = build.linear(f"{name}.eh_proj", 2 * dim, dim)
        if last:
            self.final_layernorm = Norm(build, dim)

    def forward(self, x: Tensor, context: Context, embedded: Tensor | None = None) -> Tensor:
        """Map `x` [T, D] to [T, D]; the first layer joins `embedded` [T, D] to it."""
        if self.first:
            assert embedded is not None
            x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(x)), -1))
        x = super().forward(x, context)
        return self.final_layernorm(x) if self.last else x


class PredictionHead(nn.Module):
    """Multi-token prediction: all physical heads' layers in one flat list, as in the files."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        kinds = build.config.mtp_layers
        self.layers = nn.ModuleList(
            PredictionLayer(
                build,
                kind,
                f"mtp.layers.{head * len(kinds) + i}",
                first=i == 0,
                last=i == len(kinds) - 1,
            )
            for head in range(build.config.num_mtp_layers)
            for i, kind in enumerate(kinds)
        )


class HybridModel(nn.Module):
    """A model of the family.

    Build it under `torch.device("meta")` to know every parameter without memory. `dtype` is that
    of unquantised parameters until a file says otherwise; `compute_dtype` that of activations. On a
    `mesh` each process holds its part of the parameters (see `aprium.parallel.plan`), which is for
    training; hidden states are then those of this process's rows of the packed tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compute_dtype: torch.dtype = torch.float32,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.quant = quant or QuantConfig()
        self.mesh = mesh or Mesh()
        self.plan = make_plan(config, self.quant, self.mesh)
        self.compute_dtype = compute_dtype
        self.native: NativeModel | None = None  # see aprium.model.native.bind
        build = Build(config, self.quant, dtype, self.mesh)
        self.backbone = Backbone(build)
        if not config.tie_embeddings:
            self.lm_head = build.linear("lm_head", config.hidden_size, config.vocab_size)
        if config.num_mtp_layers:
            self.mtp = PredictionHead(build)
        keep_own_parts(self, self.plan)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        state: HybridState | None = None,
        routing: list[Routing] | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Return the hidden states after the last norm, [T, D], of `tokens` int64 [T].

        With a `state`, each segment continues its sequence and the state is advanced in place.
        `routing` collects one record per MoE layer. With `recompute`, only the inputs of layers
        are kept for the gradient, and each layer runs (and notes its routing) once more.
        """
        if state is not None and state.is_narrow:
            with state.widened(layout) as (wide, compact):
                return self.forward(tokens, compact, wide, routing)
        native = self._native(state, routing)
        if native is not None and state is not None:
            return native.forward(tokens, layout, state)
        x = self._embed(tokens)
        indices = {"mamba": 0, "attention": 0}
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            index = indices.get(block.kind, 0)
            x = _run(block, x, Context(layout, state, index, routing), recompute)
            if block.kind in indices:
                indices[block.kind] += 1
        return self.backbone.norm_f(x)

    def _native(
        self, state: HybridState | None, routing: list[Routing] | None
    ) -> NativeModel | None:
        """Return the native kernels where they run: in generation, but not in training."""
        trains = state is None or routing is not None or torch.is_grad_enabled()
        return None if trains else self.native

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection [V, D], in the compute dtype if it is stored quantised."""
        if self.config.tie_embeddings:
            return self.backbone.embeddings.weight
        dense = self.lm_head.format is None
        return self.lm_head.weight if dense else self.lm_head.dense(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states [R, D] to float32 logits [R, V]."""
        if self.native is not None and not torch.is_grad_enabled():
            return self.native.logits(hidden)
        return linear(hidden, self.head_weight).float()

    def predict(
        self,
        hidden: Tensor,
        next_tokens: Tensor,
        layout: Layout,
        state: HybridState | None = None,
        routing: list[Routing] | None = None,
        depth: int = 0,
        recompute: bool = False,
        detach: bool = False,
    ) -> Tensor:
        """Run the prediction head once: from position t and token t + 1 towards token t + 2.

        `hidden` [T, D] is what `forward` returned, or for the next depth what this returned;
        `next_tokens` int64 [T]. A model with one physical head uses it at every `depth`. Returns
        [T, D]; `logits` of it predict the token after `next_tokens`. With `detach` the embeddings
        get no gradient of it.
        """
        config = self.config
        size, head = len(config.mtp_layers), min(depth, config.num_mtp_layers - 1)
        layers = list(self.mtp.layers)[head * size : (head + 1) * size]
        native = self._native(state, routing)
        if native is not None and state is not None:
            return native.predict(hidden, next_tokens, layout, state, head)
        embedded = self._embed(next_tokens)
        embedded = embedded.detach() if detach else embedded
        x, index = hidden, config.layers.count("attention")
        for block in layers:
            x = _run(block, x, Context(layout, state, index, routing), recompute, embedded)
            index += isinstance(block, Block) and block.kind == "attention"
        return x

    def draft(self, hidden: Tensor, drafting: Drafting, state: HybridState) -> list[list[int]]:
        """Let the prediction head read hidden states [.., D] of a step, and draft after them.

        The head's KV pages in `state` are written. A draft is the head's most likely token,
        and it is applied to its own output for the next. Returns the drafts of each sequence.
        """
        if self._native(state, None) is not None and self.native is not None:
            return self.native.draft(hidden, drafting, state)
        return self.draft_by_parts(hidden, drafting, state)

    def draft_by_parts(
        self, hidden: Tensor, drafting: Drafting, state: HybridState
    ) -> list[list[int]]:
        """Specify `draft` by `predict` and `logits`."""
        rows, next_tokens, layout, counts, least = drafting
        tokens = torch.tensor(next_tokens, device=hidden.device)
        ahead = self.predict(hidden[list(rows)], tokens, layout, state)
        drafts: list[list[int]] = [[] for _ in counts]
        chances = [1.0] * len(counts)
        active = [i for i, count in enumerate(counts) if count > 0]
        ahead = ahead[[layout.starts[i] + layout.lengths[i] - 1 for i in active]]
        depth = 0
        while active:
            best = self.most_likely(self.logits(ahead))
            depth += 1
            kept = []
            for j, (i, (token, chance)) in enumerate(zip(active, best, strict=True)):
                chances[i] *= chance
                if chances[i] >= least:
                    drafts[i].append(token)
                    if counts[i] > depth:
                        kept.append(j)
            active = [active[j] for j in kept]
            if active:
                tokens = torch.tensor([best[j][0] for j in kept], device=hidden.device)
                places = layout.after(active, depth - 1)
                ahead = self.predict(ahead[kept], tokens, places, state, depth=depth)
        return drafts

    def most_likely(self, logits: Tensor) -> list[tuple[int, float]]:
        """Return the most likely token of each row of `logits` [R, V], and its probability."""
        if self.native is not None:
            return [(token, math.exp(-mass)) for token, _, mass in self.native.pick(logits)]
        chances, tokens = logits.softmax(-1).max(-1)
        return list(zip(tokens.tolist(), chances.tolist(), strict=True))

    def _embed(self, tokens: Tensor) -> Tensor:
        tokens = tokens[self.mesh.rows(tokens.shape[0])]
        return F.embedding(tokens, self.backbone.embeddings.weight).to(self.compute_dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all parameters as the family is initialised before training.

        Normal with the configured deviation, mixer outputs shrunk by the square root of the
        number of layers; A = 1..H, D = 1, step sizes log-uniform. Source: Mamba-2 section 9.
        """
        for name, parameter in self.named_parameters():
            shape = self.plan.whole_shape(name, parameter.shape)
            whole = self._initial(name, torch.empty(shape, dtype=torch.float32), generator)
            parameter.copy_(self.plan.take(name, whole))

    def _initial(self, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        """Fill `value`, the whole parameter `name`, whatever part of it this process holds."""
        config = self.config
        *_, module, leaf = ("", *name.split("."))
        if "norm" in module or leaf == "D":
            return value.fill_(1.0)
        if leaf == "A_log":
            return torch.arange(1, value.numel() + 1).float().log()
        if leaf == "dt_bias":
            return self._initial_dt_bias(value.numel(), generator)
        if leaf in ("bias", "e_score_correction_bias"):
            return value.zero_()
        if module == "conv1d":
            bound = 1 / math.sqrt(config.conv_kernel)
            return value.uniform_(-bound, bound, generator=generator)
        scale = config.initializer_range
        if module in ("out_proj", "o_proj", "down_proj", "fc2_latent_proj"):
            scale /= math.sqrt(len(config.layers)) if config.rescale_prenorm_residual else 1.0
        return value.normal_(0, scale, generator=generator)

    def _initial_dt_bias(self, count: int, generator: torch.Generator) -> Tensor:
        config = self.config
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        drawn = torch.rand(count, generator=generator) * (high - low) + low
        steps = drawn.exp().clamp(min=config.time_step_floor)
        return steps + torch.log(-torch.expm1(-steps))  # inverse of softplus
