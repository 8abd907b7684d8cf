"""A model's layers on the native kernels: one call a step, weights used where they lie in memory.

`bind` hands the addresses of a model's weights to the library in `native/`; from then on `forward`
with a state runs there, in inference on a CPU. What is computed is what `model.py` says, which
stays the specification; small vectors are copied at binding, so bind again after changing weights.

`activation_dtype` is what the inputs of matrix products are rounded to: "float32" not at all,
"bfloat16", or "int8" (with a power-of-two scale for every 16 values; only for NVFP4 weights, other
formats then take bfloat16). Sums are float32 or exact integers in an order of their own for each
row, so a token's result does not depend on what is computed beside it. Weights stored as float32 or
float16 and the router always take float32. Source: docs/native.md.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from aprium.base.errors import ConfigError
from aprium.base.log import get_logger
from aprium.model.config import NVFP4_TENSORS, QuantConfig
from aprium.model.layout import Drafting, Layout
from aprium.model.linear import Matrix
from aprium.model.state import HybridState
from aprium.ops import _native

_CACHE_FORMATS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8",
}
ACTIVATION_DTYPES = ("auto", "float32", "bfloat16", "int8")
_FLOAT_FORMATS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def choose_activation_dtype(quant: QuantConfig, wanted: str, compute_dtype: torch.dtype) -> str:
    """Return what "auto" means: int8 with NVFP4 weights, bfloat16 with FP8 ones, else the model's.

    Those formats' own rounding is several times coarser. Raises ConfigError for an unknown name.
    """
    if wanted not in ACTIVATION_DTYPES:
        raise ConfigError(
            f"activation_dtype is {wanted!r}: use one of {', '.join(ACTIVATION_DTYPES)}"
        )
    if wanted != "auto":
        return wanted
    formats = set(quant.formats.values())
    if any("nvfp4" in fmt for fmt in formats):
        return "int8"
    if "fp8" in formats or compute_dtype == torch.bfloat16:
        return "bfloat16"
    return "float32"


class NativeModel:
    """The bound layers of one model; belongs to one thread at a time, as the model's state does."""

    def __init__(self, model: Any, machine: Any, activation_dtype: str) -> None:
        self.machine, self.activation_dtype = machine, activation_dtype
        self._kept: list[Tensor] = []
        config, embedding = model.config, model.backbone.embeddings.weight
        if config.tie_embeddings:
            self._vocabulary = self._dense(embedding, self.activation_dtype)
        else:
            self._vocabulary = self.weight(model.lm_head)
        self._vocab_size, self._dim = config.vocab_size, config.hidden_size
        # Weakly, so that a state made for one step goes when the step ends.
        self._state: tuple[weakref.ref[HybridState] | None, Any] = None, None
        self._model = _library().Model(
            _FLOAT_FORMATS[embedding.dtype],
            self._keep(embedding).data_ptr(),
            *embedding.shape,
            model.compute_dtype == torch.bfloat16 and embedding.dtype != torch.bfloat16,
            self._program(model.backbone.layers, 0),
            self._vector(model.backbone.norm_f.weight),
            config.norm_eps,
            self._vocabulary,
        )
        head = list(model.mtp.layers) if config.num_mtp_layers else []
        size, first = len(config.mtp_layers), config.layers.count("attention")
        for i in range(0, len(head), size or 1):
            self._model.add_head(self._head_of(head[i : i + size], config.norm_eps, first))

    def _program(self, blocks: Iterable[Any], first_attention: int) -> Any:
        """Bind `blocks`; the first attention layer has that place in the state."""
        program = _library().Program()
        indices = {"mamba": 0, "attention": first_attention}
        for block in blocks:
            program.add(_BLOCKS[block.kind](self, block), indices.get(block.kind, 0))
            if block.kind in indices:
                indices[block.kind] += 1
        return program

    def _head_of(self, layers: list[Any], eps: float, first_attention: int) -> Any:
        """Bind the layers of one prediction head."""
        first, last = layers[0], layers[-1]
        return _library().Head(
            self._vector(first.enorm.weight),
            self._vector(first.hnorm.weight),
            self._vector(last.final_layernorm.weight),
            eps,
            self.weight(first.eh_proj),
            self._program(layers, first_attention),
        )

    def forward(self, tokens: Tensor, layout: Layout, state: HybridState) -> Tensor:
        """Return the hidden states after the last norm, float32 [T, D], of `tokens` int64 [T]."""
        assert tokens.dtype == torch.int64 and tokens.shape[0] == layout.num_tokens
        out = torch.empty(tokens.shape[0], self._dim, dtype=torch.float32)
        tokens = tokens.contiguous()
        self._model.forward(
            self.machine,
            tokens.data_ptr(),
            self._step(layout),
            self._addresses(state),
            out.data_ptr(),
        )
        return out

    def predict(
        self, hidden: Tensor, tokens: Tensor, layout: Layout, state: HybridState, depth: int
    ) -> Tensor:
        """Run the prediction head of `depth` on hidden states [T, D] and next tokens int64 [T]."""
        assert tokens.dtype == torch.int64 and tokens.shape[0] == layout.num_tokens
        hidden, tokens = hidden.float().contiguous(), tokens.contiguous()
        out = torch.empty_like(hidden)
        self._model.predict(
            self.machine,
            hidden.data_ptr(),
            tokens.data_ptr(),
            self._step(layout),
            self._addresses(state),
            depth,
            out.data_ptr(),
        )
        return out

    def draft(self, hidden: Tensor, drafting: Drafting, state: HybridState) -> list[list[int]]:
        """Do what `HybridModel.draft` says, in one call."""
        rows, next_tokens, layout, counts, least = drafting
        assert len(rows) == len(next_tokens) == layout.num_tokens
        hidden = hidden.float().contiguous()
        return self._model.draft(
            self.machine,
            hidden.data_ptr(),
            rows,
            next_tokens,
            self._step(layout),
            counts,
            least,
            self._addresses(state),
        )

    def _addresses(self, state: HybridState) -> Any:
        known, found = self._state
        if known is None or known() is not state:
            groups = (state.conv, state.ssm, state.ring, state.keys, state.values)
            addresses = ([t.data_ptr() for t in group] for group in groups)
            cache = _CACHE_FORMATS[state.kv_dtype]
            found = _library().State(*addresses, state.ring_size, cache)
            self._state = weakref.ref(state), found
        return found

    def _step(self, layout: Layout) -> Any:
        """Return `layout`'s integers as the library takes them."""
        assert layout.slot_ids is not None and layout.page_ids is not None
        return _library().Step(
            layout.lengths,
            layout.starts,
            layout.context,
            layout.slot_ids,
            layout.replay,
            layout.hold,
            layout.page_ids,
            layout.page_size,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Project `hidden` float32 [R, D] to float32 logits [R, V]."""
        return self.product(self._vocabulary, hidden, self._vocab_size)

    def pick(self, logits: Tensor) -> list[tuple[int, float, float]]:
        """Return for each row of float32 [R, V] the first largest token, its logit, the log mass.

        The mass is the sum of e^(logit - largest); a row with a NaN has NaN for both numbers.
        """
        return self.machine.log_softmax_at(logits.data_ptr(), *logits.shape)

    def product(self, weight: Any, x: Tensor, rows: int) -> Tensor:
        """Return x W^T + b of a bound weight, float32 [T, rows]."""
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], rows, dtype=torch.float32)
        if x.shape[0]:
            self.machine.linear(weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def weight(self, matrix: Matrix, expert: int | None = None) -> Any:
        """Bind a matrix in its stored format, or one of a stack."""

        def pick(name: str) -> Tensor:
            return self._keep(matrix.pick(name, expert))

        bias = getattr(matrix, "bias", None)
        if matrix.format is None:
            return self._dense(pick("weight"), self.activation_dtype, bias)
        if matrix.format == "fp8":
            data = pick("weight")
            scale = float(pick("weight_scale"))
            return self._weight("fp8", data, 0, scale, data.shape, bias)
        packed, scale_2, _ = NVFP4_TENSORS[matrix.layout]
        data, scales, scale = pick(packed), pick("weight_scale"), float(pick(scale_2))
        if matrix.layout == "compressed-tensors":
            scale = 1 / scale
        if matrix.transposed:
            shape = (data.shape[1] * 2, data.shape[0])
            return self._weight("nvfp4_transposed", data, scales.data_ptr(), scale, shape, bias)
        shape = (data.shape[0], data.shape[1] * 2)
        return self._weight("nvfp4", data, scales.data_ptr(), scale, shape, bias)

    def _dense(self, weight: Tensor, activation_dtype: str, bias: Tensor | None = None) -> Any:
        return self._weight(
            _FLOAT_FORMATS[weight.dtype], weight, 0, 1.0, weight.shape, bias, activation_dtype
        )

    def _weight(
        self,
        fmt: str,
        data: Tensor,
        scales: int,
        scale: float,
        shape: Any,
        bias: Tensor | None,
        activation_dtype: str | None = None,
    ) -> Any:
        rows, columns = shape
        wanted = activation_dtype or self.activation_dtype
        pointer = self._keep(data).data_ptr()
        vector = self._vector(bias)
        return _library().weight(fmt, wanted, pointer, scales, scale, rows, columns, vector)

    def router(self, weight: Tensor) -> Any:
        """Bind a router's weight, whose inputs are never rounded."""
        return self._dense(weight, "float32")

    def vector(self, tensor: Tensor | None) -> tuple[int, int]:
        """Return address and size of `tensor` as float32; (0, 0) for None."""
        return self._vector(tensor)

    def _vector(self, tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        values = self._keep(tensor.detach().float().contiguous())
        return values.data_ptr(), values.numel()

    def _keep(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        self._kept.append(tensor.detach())
        return tensor


def _library() -> Any:
    library = _native.library()
    assert library is not None
    return library


def bindable(model: Any) -> bool:
    """Whether `model` can run on the kernels: on a CPU, weights in float32, float16 or below.

    Products that something else stands in the place of, as with adapters, run in PyTorch.
    """
    if any(getattr(module, "substitute", None) is not None for module in model.modules()):
        return False
    return all(p.device.type == "cpu" and p.dtype != torch.float64 for p in model.parameters())


def bind(model: Any, activation_dtype: str = "auto", machine: Any = None) -> None:
    """Let `model` run on the native kernels from now on; without a library it stays as it is.

    Raises ConfigError when `activation_dtype` is unknown, or asks for rounding that only kernels do
    and there are none.
    """
    chosen = choose_activation_dtype(model.quant, activation_dtype, model.compute_dtype)
    machine = machine or _native.machine()
    if machine is None or not bindable(model):
        if activation_dtype not in ("auto", "float32"):
            why = _native.missing() or "this model or APRIUM_ISA keeps to PyTorch"
            raise ConfigError(
                f"activation_dtype is {activation_dtype!r}: that needs the native kernels ({why}); "
                "use auto"
            )
        if _native.missing():
            get_logger("model").warning(
                "the native kernels are not installed (%s): generation runs in PyTorch, many times "
                "slower; `aprium doctor` says what to do",
                _native.missing(),
            )
        return
    model.native = NativeModel(model, machine, chosen)


def _mamba(native: NativeModel, block: Any) -> Any:
    mixer, config = block.mixer, block.mixer.config
    conv = mixer.conv1d
    low, high = config.time_step_limit
    return _library().Mamba(
        native.vector(block.norm.weight),
        config.norm_eps,
        native.weight(mixer.in_proj),
        native.weight(mixer.out_proj),
        (
            config.num_groups,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            config.conv_kernel,
        ),
        native.vector(conv.weight.squeeze(1).T),
        native.vector(conv.bias),
        native.vector(-torch.exp(mixer.A_log.detach().float())),
        native.vector(mixer.D),
        native.vector(mixer.dt_bias),
        native.vector(mixer.norm.weight),
        low,
        high,
    )


def _attention(native: NativeModel, block: Any) -> Any:
    mixer, config = block.mixer, block.mixer.config
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
    return _library().Attention(
        native.vector(block.norm.weight),
        config.norm_eps,
        *(native.weight(p) for p in projections),
        (config.num_heads, config.num_kv_heads, config.head_dim),
        mixer.cache_scales(),
    )


def _mlp(native: NativeModel, block: Any) -> Any:
    mixer = block.mixer
    return _library().Mlp(
        native.vector(block.norm.weight),
        block.norm.eps,
        native.weight(mixer.up_proj),
        native.weight(mixer.down_proj),
    )


def _moe(native: NativeModel, block: Any) -> Any:
    mixer, config = block.mixer, block.mixer.config
    experts = range(config.num_experts)
    latent = [None, None]
    if config.latent_size is not None:
        latent = [native.weight(mixer.fc1_latent_proj), native.weight(mixer.fc2_latent_proj)]
    return _library().Moe(
        native.vector(block.norm.weight),
        config.norm_eps,
        native.router(mixer.gate.weight),
        native.vector(mixer.gate.e_score_correction_bias),
        (config.num_active_experts, config.num_router_groups, config.num_active_router_groups),
        config.norm_topk_prob,
        config.routed_scaling_factor,
        [native.weight(mixer.experts.up_proj, e) for e in experts],
        [native.weight(mixer.experts.down_proj, e) for e in experts],
        native.weight(mixer.shared_experts.up_proj),
        native.weight(mixer.shared_experts.down_proj),
        *latent,
    )


# Binds a block by its kind.
_BLOCKS: dict[str, Callable[[NativeModel, Any], Any]] = {
    "mamba": _mamba,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
}
