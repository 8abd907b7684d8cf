"""The engine: requests in, steps, deltas out; one model, one thread, token ids only.

`step` is plan, run, book. Who calls it, and what becomes of the deltas, is `engine/client`'s
business; text is not known here. Sessions will have their place beside the scheduler.
"""

import random
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from aprium.base.errors import ConfigError, RequestError
from aprium.base.memory import available_bytes
from aprium.base.records import Delta, Request, Timings
from aprium.checkpoint.load import LOAD_MODES, Checkpoint, load_checkpoint
from aprium.engine.cache import Cache
from aprium.engine.memory import CachePlan, plan_cache
from aprium.engine.prefix import PrefixCache
from aprium.engine.request import LiveSequence
from aprium.engine.runner import Runner, SegmentResult
from aprium.engine.scheduler import Outcome, Scheduler, StepPlan
from aprium.engine.speculative import DraftLength, SpeculativeConfig, look_up
from aprium.model.native import ACTIVATION_DTYPES, bind
from aprium.model.state import HybridState
from aprium.ops import _native

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CACHE_DTYPES = _DTYPES | {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
_MESSAGE_ENDS = 3  # of a prompt at which states are kept
_SSM_DTYPES = {
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
    `enable_prefix_caching` keeps up to `num_snapshots` states of prompts, at ends of messages and
    of prompts, and goes on from the longest that a new prompt begins with, with the same bits.
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
    enable_prefix_caching: bool = False
    num_snapshots: int = 32
    load_format: Literal["auto", "dummy"] = "auto"
    load: Literal["auto", "memory", "mmap"] = "auto"
    seed: int | None = None
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        """Check ranges; raise ConfigError naming the field."""
        for name in (
            *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
            "num_snapshots",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ConfigError(f"kv_cache_bytes is {self.kv_cache_bytes}: it must be at least 1")
        if self.dtype not in ("auto", *_DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}: use 'auto', 'float32' or 'bfloat16'")
        if self.activation_dtype not in ACTIVATION_DTYPES:
            known = ", ".join(ACTIVATION_DTYPES)
            raise ConfigError(f"activation_dtype is {self.activation_dtype!r}: use one of {known}")
        for name, known in (
            ("kv_cache_dtype", ("auto", *_CACHE_DTYPES)),
            ("mamba_ssm_cache_dtype", tuple(_SSM_DTYPES)),
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
    num_preemptions: int
    ring_bytes: int
    prefix_tokens_reused: int
    drafts_compared: tuple[int, ...]
    drafts_accepted: tuple[int, ...]


class Engine:
    """Continuous batching over one model.

    Not thread-safe, but for `check`: one thread owns it. `max_model_len`, `plan` (sizes of the
    state) and `eos_token_ids` are what the engine settled on.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint | None = None,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint or load(config)
        model, shape = self.checkpoint.model, self.checkpoint.config
        self.vocab_size = shape.vocab_size
        if eos_token_ids is None:
            eos_token_ids = _eos_token_ids(self.checkpoint)
        self.eos_token_ids = frozenset(eos_token_ids)
        device = model.backbone.embeddings.weight.device
        speculative = config.speculative
        if speculative is not None and speculative.kind == "mtp" and not shape.num_mtp_layers:
            raise ConfigError(
                "this checkpoint has no prediction head to draft with: use the speculative method "
                "ngram, or none"
            )
        self._length = DraftLength(speculative) if speculative else None
        kv_dtype = _CACHE_DTYPES.get(config.kv_cache_dtype, model.compute_dtype)
        ssm_dtype = _SSM_DTYPES[config.mamba_ssm_cache_dtype]
        self.plan = plan_cache(
            shape,
            dtype=kv_dtype,
            ssm_dtype=ssm_dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_snapshots=config.num_snapshots if config.enable_prefix_caching else 0,
            page_size=config.block_size,
            kv_cache_bytes=config.kv_cache_bytes,
            free_bytes=available_bytes(),
        )
        self.max_model_len = self.plan.max_model_len
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens is {config.max_num_batched_tokens}: without chunked "
                f"prefill a step must take a whole sequence of {self.max_model_len} tokens "
                "(raise it, or lower max_model_len)"
            )
        state = HybridState.allocate(
            shape,
            num_slots=self.plan.num_slots,
            num_pages=self.plan.num_pages,
            page_size=self.plan.page_size,
            dtype=kv_dtype,
            ssm_dtype=ssm_dtype,
            ring_size=speculative.num_speculative_tokens + 1 if speculative else 0,
            stochastic=config.mamba_cache_stochastic_rounding,
            device=device,
        )
        bind(model, config.activation_dtype)
        self.runner = Runner(model, state)
        self.scheduler = _make_scheduler(config, self.plan)
        self._random = random.Random(config.seed)
        self._num_steps = self._prompt_tokens = self._generated_tokens = 0
        self._num_finished = self._num_aborted = 0
        self._step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raise RequestError when `request` can never be served; callable from any thread."""
        tokens, params = request.tokens, request.params
        assert params.n == 1, "an engine request is one sequence"
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        self._check_ids(tokens, "prompt")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        room = self.max_model_len - len(tokens)
        if room < (params.max_tokens != 0):
            raise RequestError(
                f"the prompt has {len(tokens)} tokens: with at least one more to generate the "
                f"context of {self.max_model_len} (max_model_len) is exceeded",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is {params.max_tokens} and the prompt has {len(tokens)} tokens: "
                f"together they exceed the context of {self.max_model_len} (max_model_len); ask "
                f"for at most {room}, or for max_tokens None",
                param="max_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue `request`; raises RequestError (see `check`) when it can never be served."""
        self.check(request)
        params = request.params
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        limit = params.max_tokens
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        self.scheduler.add(
            LiveSequence(
                id=request.id,
                tokens=list(request.tokens),
                num_prompt=len(request.tokens),
                params=params,
                max_tokens=self.max_model_len - len(request.tokens) if limit is None else limit,
                seed=seed,
                stop_ids=eos.union(params.stop_token_ids),
                salt=request.cache_salt,
                snapshot_points=self._snapshot_points(request.tokens),
                arrived_s=time.perf_counter(),
            )
        )
        self._prompt_tokens += len(request.tokens)

    def _snapshot_points(self, tokens: tuple[int, ...]) -> frozenset[int]:
        """Return where states of this prompt are worth keeping: the last messages' ends, its end.

        One token before its end, so that the same prompt again finds a state to go on from.
        """
        if not self.config.enable_prefix_caching:
            return frozenset()
        ends = [i + 1 for i, token in enumerate(tokens) if token in self.eos_token_ids]
        return frozenset(
            p for p in (*ends[-_MESSAGE_ENDS:], len(tokens) - 1) if 0 < p < len(tokens)
        )

    def abort(self, request_id: str) -> Delta | None:
        """Drop a request; returns its last delta, or None when it is unknown or has finished."""
        sequence = self.scheduler.abort(request_id)
        if sequence is None:
            return None
        self._num_aborted += 1
        return Delta(id=sequence.id, finish="abort", timings=_timings(sequence))

    def step(self) -> list[Delta]:
        """Compute one step and return what it added to each request that it advanced visibly."""
        begun = time.perf_counter()
        plan = self.scheduler.plan(self._num_drafts())
        if not plan.segments:
            return []
        results = self.runner.run(plan)
        for segment in plan.segments:
            sequence = self.scheduler.sequences[segment.id]
            if sequence.started_s is None:
                sequence.started_s = begun
        before = {s.id: len(s.tokens) for s in self.scheduler.running}
        outcomes = [Outcome(tuple(c.token for c in r.choices), r.drafts) for r in results]
        advanced = self.scheduler.update(plan, outcomes)
        self._learn(plan, outcomes, time.perf_counter() - begun)
        deltas = [
            delta
            for sequence, result in zip(advanced, results, strict=True)
            if (delta := self._delta(sequence, result, before[sequence.id])) is not None
        ]
        self._num_steps += 1
        self._step_s += time.perf_counter() - begun
        return deltas

    def stats(self) -> EngineStats:
        """Return the present gauges and counters."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            pages_total=cache.pages.size,
            pages_free=cache.pages.num_free,
            slots_total=cache.slots.size,
            slots_free=cache.slots.num_free,
            kv_bytes=self.plan.kv_bytes,
            state_bytes=self.plan.state_bytes,
            num_steps=self._num_steps,
            step_s=self._step_s,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            num_preemptions=scheduler.num_preemptions,
            prefix_tokens_reused=scheduler.prefixes.num_reused if scheduler.prefixes else 0,
            ring_bytes=sum(t.numel() * t.element_size() for t in self.runner.state.ring),
            drafts_compared=tuple(self._length.tried) if self._length else (),
            drafts_accepted=tuple(self._length.kept) if self._length else (),
        )

    def _num_drafts(self) -> int:
        """Return how many tokens to draft after the next step."""
        if self._length is None:
            return 0
        running = [s for s in self.scheduler.running if s.num_pending == 1]
        count, plain = self._length.choose([(s.num_compared, s.num_accepted) for s in running])
        if plain:
            for sequence in running:
                sequence.drafts = ()
        return count

    def _learn(self, plan: StepPlan, outcomes: list[Outcome], seconds: float) -> None:
        """Note what a step cost and what became of its drafts; look up n-grams for the next."""
        if self._length is None:
            return
        for segment, outcome in zip(plan.segments, outcomes, strict=True):
            if segment.num_drafts:
                self._length.note_accepted(segment.num_drafts, len(outcome.tokens) - 1)
        if all(len(s.tokens) == 1 + s.num_drafts and s.sample for s in plan.segments):
            self._length.note_step(plan.num_tokens, seconds - self.runner.draft_s)
            if self.runner.draft_passes:
                each = self.runner.draft_s / self.runner.draft_passes
                self._length.note_drafting(len(plan.segments), each)
        config = self.config.speculative
        assert config is not None
        if config.kind == "ngram":
            for segment in plan.segments:
                sequence = self.scheduler.sequences.get(segment.id)
                if sequence is not None and segment.sample and sequence.status == "running":
                    sequence.drafts = look_up(
                        sequence.tokens,
                        min(segment.draft, sequence.room - 1),
                        config.prompt_lookup_max,
                        config.prompt_lookup_min,
                    )

    def _check_ids(self, tokens: tuple[int, ...], param: str) -> None:
        # Whole passes in C first: a prompt may have a hundred thousand tokens.
        if set(map(type, tokens)) <= {int} and (
            not tokens or (min(tokens) >= 0 and max(tokens) < self.vocab_size)
        ):
            return
        for token in tokens:
            if type(token) is not int:
                raise RequestError(f"token id {token!r} is not an integer", param=param)
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {self.vocab_size}", param=param
                )

    def _delta(self, sequence: LiveSequence, result: SegmentResult, before: int) -> Delta | None:
        """Say what a step added to the `before` tokens of `sequence`; None while it reads."""
        choices = result.choices[: len(sequence.tokens) - before]  # not what follows a stop token
        if sequence.params.prompt_logprobs is not None:
            sequence.add_scores(result.scores, result.alternatives)
        if not choices and sequence.finish is None:
            return None
        first = sequence.first_token_s is None
        if first:
            sequence.first_token_s = time.perf_counter()
        scores = top = None
        if first and sequence.params.prompt_logprobs is not None:
            scores = tuple(sequence.prompt_logprobs)
            top = tuple(sequence.prompt_top_logprobs) if sequence.params.prompt_logprobs else None
        self._generated_tokens += len(choices)
        self._num_finished += sequence.finish is not None
        return Delta(
            id=sequence.id,
            tokens=tuple(choice.token for choice in choices),
            logprobs=tuple(choice.logprob for choice in choices),
            top_logprobs=tuple(c.alternatives for c in choices) if sequence.params.logprobs else (),
            prompt_logprobs=scores,
            prompt_top_logprobs=top,
            finish=sequence.finish,
            stop_reason=choices[-1].token if choices and sequence.finish == "stop" else None,
            reused=sequence.reused,
            why_not_more=sequence.why_not_more,
            drafted=sequence.num_drafted,
            accepted=sequence.num_accepted,
            timings=_timings(sequence),
        )


def _make_scheduler(config: EngineConfig, plan: CachePlan) -> Scheduler:
    """Make the scheduler and the books of its pages and slots."""
    cache = Cache(num_pages=plan.num_pages, page_size=plan.page_size, num_slots=plan.num_slots)
    speculative = config.speculative
    prefixes = PrefixCache(cache, config.num_snapshots) if config.enable_prefix_caching else None
    return Scheduler(
        cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=config.enable_chunked_prefill,
        reads_ahead=speculative is not None and speculative.kind == "mtp",
        prefixes=prefixes,
    )


def load(config: EngineConfig) -> Checkpoint:
    """Load the checkpoint that `config` names."""
    return load_checkpoint(
        config.model,
        dtype=_DTYPES.get(config.dtype),
        load_format=config.load_format,
        load=config.load,
        # By columns only AVX-512 is faster, and only int8 inputs are exact integers.
        transposed=_native.isa() == "avx512" and config.activation_dtype in ("auto", "int8"),
    )


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the ids that end a text according to the checkpoint's own configuration."""
    named: Iterable[int | list[int] | tuple[int, ...] | None] = (
        checkpoint.generation_config.get("eos_token_id"),
        checkpoint.config.eos_token_id,
    )
    lists = [v if isinstance(v, list | tuple) else [v] for v in named]
    return [token for some in lists for token in some if token is not None]


def _timings(sequence: LiveSequence) -> Timings:
    now, arrived = time.perf_counter(), sequence.arrived_s
    started, first = sequence.started_s, sequence.first_token_s
    return Timings(
        queue_s=(now if started is None else started) - arrived,
        first_token_s=0.0 if first is None else first - arrived,
        total_s=now - arrived,
    )
