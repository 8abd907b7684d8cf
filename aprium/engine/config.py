"""How to run an engine, and what it says of itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from aprium.base.errors import ConfigError
from aprium.checkpoint.load import LOAD_MODES
from aprium.engine.speculative import SpeculativeConfig
from aprium.model.native import ACTIVATION_DTYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
SSM_DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model.

    `model` is a directory, a hub id, or with `load_format` "dummy" (random weights) a preset.
    `dtype` is that of activations and of keys and values: "auto" is float32 on a CPU, which is
    exact in any batch; weights stay as stored. `max_model_len` None is the model's own, or what
    memory holds. `block_size` is tokens a KV page; `kv_cache_bytes` None fits the machine. `seed`
    None draws one: requests without a seed of their own then differ from run to run.
    `activation_dtype` is what native kernels round the inputs of matrix products to: "auto" is
    int8 for a checkpoint with NVFP4 weights, bfloat16 for one with FP8 weights, else float32.
    `kv_cache_dtype` "auto" is that of activations; "fp8" (E4M3) takes the checkpoint's scales or 1.
    `mamba_ssm_cache_dtype` keeps recurrent states in fewer bits between steps, rounded to either
    neighbour by chance with `mamba_cache_stochastic_rounding`, else to the nearest; results then
    depend on how prompts are cut into steps.
    `enable_prefix_caching` keeps states of prompts in `snapshot_bytes` of memory (None fits the
    machine), at ends of messages, of prompts and of answers, every `snapshot_interval` tokens of
    long prompts and where prompts part; a new prompt goes on from the longest that it begins with,
    with the same bits. Copies of them, and states of preempted sequences, are kept in
    `prefix_cache_ram_bytes` (None fits the machine, 0: none) and in `prefix_cache_dir`, up to
    `prefix_cache_disk_bytes` (None: no limit), where another process finds them.
    `session_dir` keeps sessions, and what they need to be resumed after a crash; of more than
    `max_sessions` the least recently used goes.
    `memory_utilization` is the share of the machine's memory that may be in use, other programs
    and weights included; None takes half of what is free when the weights are loaded.
    `speculative` drafts tokens and verifies them, which changes speed and nothing else.
    `load` "memory" reads weights, "mmap" maps their files; "auto" reads what fits.
    """

    model: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8", "fp8_e4m3"] = "auto"
    mamba_ssm_cache_dtype: Literal["auto", "float32", "float16", "fp8"] = "auto"
    mamba_cache_stochastic_rounding: bool = True
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 64
    kv_cache_bytes: int | None = None
    speculative: SpeculativeConfig | None = None
    memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    snapshot_bytes: int | None = None
    snapshot_interval: int = 4096
    prefix_cache_ram_bytes: int | None = None
    prefix_cache_dir: Path | None = None
    prefix_cache_disk_bytes: int | None = None
    session_dir: Path | None = None
    max_sessions: int = 1024
    load_format: Literal["auto", "dummy"] = "auto"
    load: Literal["auto", "memory", "mmap"] = "auto"
    seed: int | None = None
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        """Check ranges; raise ConfigError naming the field."""
        for name in (
            *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
            *("kv_cache_bytes", "max_sessions"),
            *("snapshot_bytes", "snapshot_interval", "prefix_cache_disk_bytes"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if self.memory_utilization is not None and not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization is {self.memory_utilization}: it must be above 0, up to 1"
            )
        if self.prefix_cache_ram_bytes is not None and self.prefix_cache_ram_bytes < 0:
            raise ConfigError(
                f"prefix_cache_ram_bytes is {self.prefix_cache_ram_bytes}: it must be at least 0"
            )
        if self.prefix_cache_dir is not None and not self.enable_prefix_caching:
            raise ConfigError(
                f"prefix_cache_dir is {self.prefix_cache_dir} and enable_prefix_caching is off: "
                "leave one of the two out"
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}: use 'auto', 'float32' or 'bfloat16'")
        if self.activation_dtype not in ACTIVATION_DTYPES:
            known = ", ".join(ACTIVATION_DTYPES)
            raise ConfigError(f"activation_dtype is {self.activation_dtype!r}: use one of {known}")
        for name, known in (
            ("kv_cache_dtype", ("auto", *CACHE_DTYPES)),
            ("mamba_ssm_cache_dtype", tuple(SSM_DTYPES)),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ConfigError(f"{name} is {value!r}: use one of {', '.join(known)}")
        if self.speculative is not None and self.mamba_ssm_cache_dtype not in ("auto", "float32"):
            raise ConfigError(
                f"mamba_ssm_cache_dtype is {self.mamba_ssm_cache_dtype!r}: drafts are verified on "
                "float32 states only, leave one of the two out"
            )
        if self.load not in LOAD_MODES:
            raise ConfigError(f"load is {self.load!r}: use one of {', '.join(LOAD_MODES)}")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format is {self.load_format!r}: use 'auto' or 'dummy'")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges and counters of one engine; times in seconds.

    Of prefixes: tokens reused, requests by the reason why no more were, snapshots in slots, what
    copies of them take in memory and on disk, and how many were stored, restored and found damaged.
    `drafts_compared` and `drafts_accepted` count drafted tokens by their position in a draft;
    `ring_bytes` is the memory that drafts under verification take.
    """

    num_running: int
    num_waiting: int
    pages_total: int
    pages_free: int
    slots_total: int
    slots_free: int
    kv_bytes: int
    state_bytes: int
    num_steps: int
    step_s: float
    prompt_tokens: int
    generated_tokens: int
    num_finished: int
    num_aborted: int
    num_expired: int
    num_preemptions: int
    ring_bytes: int
    prefix_tokens_reused: int
    prefix_misses: dict[str, int]
    num_snapshots: int
    store_bytes: int
    disk_bytes: int
    num_stored: int
    num_restored: int
    num_damaged: int
    weight_version: int
    drafts_compared: tuple[int, ...]
    drafts_accepted: tuple[int, ...]
