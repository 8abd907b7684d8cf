"""The engine: requests in, steps, deltas out; one model, one thread, token ids only.

`step` is plan, run, book. Who calls it, and what becomes of the deltas, is `engine/client`'s
business; text is not known here. What outlives a request is `engine/sessions`'.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

import aprium
from aprium.base.errors import ConfigError, RequestError
from aprium.base.log import get_logger
from aprium.base.memory import available_bytes, total_bytes
from aprium.base.records import Delta, Request, SamplingParams, Timings
from aprium.checkpoint.load import Checkpoint, load_checkpoint, update_weights
from aprium.engine.cache import Cache
from aprium.engine.config import CACHE_DTYPES, DTYPES, SSM_DTYPES, EngineConfig, EngineStats
from aprium.engine.guide import Grammars, SequenceGuide
from aprium.engine.memory import Budget, CachePlan, plan_cache, step_bytes
from aprium.engine.prefix import Meta, Node, PrefixCache
from aprium.engine.request import LiveSequence
from aprium.engine.runner import Runner, SegmentResult
from aprium.engine.scheduler import SPACING, Outcome, Scheduler, StepPlan
from aprium.engine.speculative import Decision, DraftLength, SpeculativeConfig, look_up
from aprium.engine.store import SnapshotStore, fingerprint, join
from aprium.model.native import bind
from aprium.model.state import HybridState
from aprium.ops import _native

_MESSAGE_ENDS = 3  # of a prompt at which states are kept
_GRID_POINTS = 16  # most states kept of a long prompt for its length alone


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
        grammars: Grammars | None = None,
    ) -> None:
        self.config = config
        self._grammars = grammars
        self.checkpoint = checkpoint or load(config)
        model, shape = self.checkpoint.model, self.checkpoint.config
        self.vocab_size = shape.vocab_size
        if eos_token_ids is None:
            eos_token_ids = _eos_token_ids(self.checkpoint)
        self.eos_token_ids = frozenset(eos_token_ids)
        speculative = config.speculative
        if speculative is not None and speculative.kind == "mtp" and not shape.num_mtp_layers:
            raise ConfigError(
                "this checkpoint has no prediction head to draft with: use the speculative method "
                "ngram, or none"
            )
        self._length = DraftLength(speculative) if speculative else None
        self._drafting, self._learn_s = Decision(0), 0.0  # of the last step
        self._rest = 0  # steps for which what is decided on drafts holds
        self._ring_size = speculative.num_speculative_tokens + 1 if speculative else 0
        self._kv_dtype = CACHE_DTYPES.get(config.kv_cache_dtype, model.compute_dtype)
        self._ssm_dtype = SSM_DTYPES[config.mamba_ssm_cache_dtype]
        self.plan = self._plan_memory()
        get_logger("engine").info(self.plan.table(_weight_bytes(self.checkpoint)))
        self.max_model_len = self.plan.max_model_len
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens is {config.max_num_batched_tokens}: without chunked "
                f"prefill a step must take a whole sequence of {self.max_model_len} tokens "
                "(raise it, or lower max_model_len)"
            )
        state = self._make_state()
        bind(model, config.activation_dtype)
        self.weight_version = 0
        self._fingerprint: str | None = None
        self.store = self._make_store()
        self.runner = Runner(model, state, self.store)
        self.scheduler = self._make_scheduler()
        self._random = random.Random(config.seed)
        self._num_steps = self._prompt_tokens = self._generated_tokens = 0
        self._num_finished = self._num_aborted = self._num_expired = 0
        self._step_s = 0.0
        self.paused = False  # no step is computed; everything else goes on

    def _plan_memory(self) -> CachePlan:
        """Choose the sizes of the generation state on this machine."""
        config = self.config
        return plan_cache(
            self.checkpoint.config,
            dtype=self._kv_dtype,
            ssm_dtype=self._ssm_dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            caches=config.enable_prefix_caching,
            page_size=config.block_size,
            kv_cache_bytes=config.kv_cache_bytes,
            budget=_budget(config, self.checkpoint, self._ring_size),
        )

    def _make_state(self) -> HybridState:
        """Allocate the generation state that was planned."""
        return HybridState.allocate(
            self.checkpoint.config,
            num_slots=self.plan.num_slots,
            num_pages=self.plan.num_pages,
            page_size=self.plan.page_size,
            dtype=self._kv_dtype,
            ssm_dtype=self._ssm_dtype,
            ring_size=self._ring_size,
            stochastic=self.config.mamba_cache_stochastic_rounding,
            device=self.checkpoint.model.backbone.embeddings.weight.device,
        )

    def _make_scheduler(self) -> Scheduler:
        """Make the scheduler and the books of its pages and slots."""
        config, plan = self.config, self.plan
        cache = Cache(num_pages=plan.num_pages, page_size=plan.page_size, num_slots=plan.num_slots)
        speculative = config.speculative
        return Scheduler(
            cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunked_prefill=config.enable_chunked_prefill,
            reads_ahead=speculative is not None and speculative.kind == "mtp",
            prefixes=PrefixCache(cache, plan.num_snapshots, self.store),
        )

    def _make_store(self) -> SnapshotStore | None:
        """Make the place for what has no slot; None where it may take no memory."""
        directory = self._store_directory()
        if directory is None and not self.plan.store_bytes:
            return None
        return SnapshotStore(
            ram_bytes=self.plan.store_bytes,
            directory=directory,
            disk_bytes=self.config.prefix_cache_disk_bytes,
        )

    def _store_directory(self) -> Path | None:
        """Return where states of exactly these weights and settings are kept on disk."""
        base, sessions = self.config.prefix_cache_dir, self.config.session_dir
        if base is None and sessions is not None and self.config.enable_prefix_caching:
            base = sessions / "states"
        return None if base is None else base / self.fingerprint()

    def fingerprint(self) -> str:
        """Return a name for everything that a state depends on beside its tokens."""
        if self._fingerprint is not None:
            return self._fingerprint
        config, model = self.config, self.checkpoint.model
        native = model.native.activation_dtype if model.native else None
        self._fingerprint = fingerprint(
            model,
            *(aprium.__version__, _native.isa(), native, str(model.compute_dtype)),
            *(config.kv_cache_dtype, config.mamba_ssm_cache_dtype),
            config.mamba_cache_stochastic_rounding,
        )
        return self._fingerprint

    def close(self) -> None:
        """Write what is kept to disk, where it is to be there."""
        if self.store is not None:
            if self.scheduler.prefixes is not None:
                self.runner.apply(self.scheduler.prefixes.drain())
            self.store.close()

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return self.scheduler.has_work and not self.paused

    def check(self, request: Request) -> None:
        """Raise RequestError when `request` can never be served; callable from any thread."""
        tokens, params = request.tokens, request.params
        assert params.n == 1, "an engine request is one sequence"
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        self._check_ids((*tokens, *request.generated), "prompt")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        check_salt(request.cache_salt)
        self._check_ids(tuple(token for token, _ in params.logit_bias), "logit_bias")
        if request.deadline_s is not None and not 0 < request.deadline_s < math.inf:
            raise RequestError(
                f"deadline_s is {request.deadline_s}: it must be above 0", param="deadline_s"
            )
        limit = room_for(params, self.max_model_len - len(tokens))
        if request.generated and len(request.generated) >= limit:
            raise RequestError(
                f"{len(request.generated)} tokens were generated already: of at most {limit} there "
                "are none left",
                param="max_tokens",
            )
        if request.pooling is not None and params.max_tokens != 0:
            raise RequestError(
                f"max_tokens is {params.max_tokens}: a prompt that is pooled generates nothing, "
                "ask for 0",
                param="max_tokens",
            )
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
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens is {params.min_tokens} and the prompt has {len(tokens)} tokens: the "
                f"context of {self.max_model_len} (max_model_len) leaves {max(room, 0)}; ask for "
                "no more",
                param="min_tokens",
            )
        if self._grammars is not None:
            self._grammars.check(params, request.thinking)
        elif params.guide is not None or request.thinking:
            raise RequestError(
                "this model has no tokenizer files: without them answers cannot be guided",
                param="guide",
            )

    def add(self, request: Request) -> None:
        """Queue `request`; raises RequestError (see `check`) when it can never be served."""
        self.check(request)
        params, tokens = request.params, (*request.tokens, *request.generated)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        limit = params.max_tokens
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stops = eos.union(params.stop_token_ids)
        now = time.perf_counter()
        shares = self.config.enable_prefix_caching
        self.scheduler.add(
            LiveSequence(
                id=request.id,
                tokens=list(tokens),
                num_prompt=len(request.tokens),
                params=params,
                max_tokens=self.max_model_len - len(request.tokens) if limit is None else limit,
                seed=seed,
                stop_ids=stops,
                floor=_all_but(stops, self.vocab_size) if params.min_tokens and stops else None,
                salt=request.cache_salt if shares else f"only {request.follows or request.id}",
                private=not shares,
                guide=self._guide(request),
                snapshot_points=self._snapshot_points(request),
                keep_every=request.keep_every if shares else 0,
                pooling=request.pooling,
                priority=request.priority,
                share=request.share,
                follows=request.follows,
                deadline_s=None if request.deadline_s is None else now + request.deadline_s,
                arrived_s=now,
            )
        )
        self._prompt_tokens += len(request.tokens)

    def _guide(self, request: Request) -> SequenceGuide | None:
        if self._grammars is None:
            return None
        return self._grammars.start(request.params, request.thinking, request.generated)

    def _snapshot_points(self, request: Request) -> frozenset[int]:
        """Return where states of this prompt are worth keeping.

        The ends of its last messages; its own end where that is far from these, or others follow;
        and a grid over a long one. An end is one token before, so that the same prompt again finds
        a state to go on from.
        """
        tokens, count = request.tokens, len(request.tokens)
        points = {count - 1} if request.leads else set()
        if self.config.enable_prefix_caching:
            ends = [i + 1 for i, token in enumerate(tokens) if token in self.eos_token_ids]
            last = count
            for end in (count - 1, *reversed(ends[-_MESSAGE_ENDS:])):
                near = ends and end > ends[-1] and end - ends[-1] < SPACING
                if last - end >= (SPACING if last < count else 1) and not near:
                    points.add(end)
                    last = end
            interval = self.config.snapshot_interval
            interval *= max(1, -(-count // (interval * _GRID_POINTS)))
            points |= set(range(interval, count, interval))
            points = {p for p in points if p >= SPACING or (request.leads and p == count - 1)}
        return frozenset(p for p in points if 0 < p < count)

    def abort(self, request_id: str) -> Delta | None:
        """Drop a request; returns its last delta, or None when it is unknown or has finished."""
        sequence = self.scheduler.abort(request_id)
        if sequence is None:
            return None
        self._num_aborted += 1
        return self._end(sequence, None)

    def _end(self, sequence: LiveSequence, reason: str | None) -> Delta:
        self.runner.pools.pop(sequence.id, None)
        return Delta(id=sequence.id, finish="abort", stop_reason=reason, timings=_timings(sequence))

    def update_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        *,
        recompute: bool = False,
        version: int | None = None,
    ) -> int:
        """Replace weights, and return the version that completions carry from now on.

        It is `version` where one is given, else one more than before. `source` is a checkpoint of
        the same shape and formats, or tensors by published name, of which there may be fewer than
        all. Running sequences go on from their states, or with `recompute` from their tokens;
        nothing else that was computed is used again. Raises CheckpointError, with the old weights
        in place, where a tensor does not fit.
        """
        prefixes = self.scheduler.prefixes
        assert prefixes is not None
        self.runner.apply(prefixes.drain())
        update_weights(self.checkpoint, source)
        bind(self.checkpoint.model, self.config.activation_dtype)
        self.runner.rebind()
        if recompute:
            self.scheduler.restart()
        for sequence in self.scheduler.running:
            sequence.stale = True
        prefixes.forget()  # files too: whoever updates weights does so again and again
        self._fingerprint = None
        if self.store is not None:
            self.store.reset(self._store_directory())
            prefixes.adopt_stored()
        self.weight_version = self.weight_version + 1 if version is None else version
        return self.weight_version

    def hold(self, tokens: Sequence[int], salt: str, before: Node | None = None) -> Node | None:
        """Keep the longest snapshot of `tokens` as long as there is room, rather than `before`."""
        prefixes = self.scheduler.prefixes
        assert prefixes is not None
        node = prefixes.find((*tokens, -1), salt).node if tokens else None
        prefixes.hold_for_session(node, before)
        return node

    def export_state(
        self, tokens: Sequence[int], salt: str
    ) -> tuple[Meta, dict[str, Tensor]] | None:
        """Return the state after the longest beginning of `tokens` that has one, and what it is."""
        prefixes = self.scheduler.prefixes
        assert prefixes is not None
        self.runner.apply(prefixes.drain())
        node = prefixes.find((*tokens, -1), salt).node
        if node is None:
            return None
        if node.slot is not None:
            tensors = self.runner.state.export(node.slot, node.pages, 0, node.length)
        elif (parts := prefixes.load(node)) is not None:
            tensors = join(parts)
        else:
            return None
        known = tuple(tokens[: node.length])
        return Meta("", None, salt, node.length, known, node.reads_ahead), tensors

    def import_state(self, meta: Meta, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state that `export_state` gave, of the same weights and settings."""
        prefixes = self.scheduler.prefixes
        assert prefixes is not None
        if self.store is not None:
            named = prefixes.adopt(meta.edge, meta.salt, meta.reads_ahead)
            if named is not None:
                self.store.put(named, dict(tensors))

    def reset_prefix_cache(self) -> None:
        """Forget all snapshots, those on disk too; running sequences are not touched."""
        assert self.scheduler.prefixes is not None
        self.runner.apply(self.scheduler.prefixes.drain())
        self.scheduler.prefixes.forget()

    def finish_thinking(self, request_id: str | None = None) -> int:
        """Close the reasoning of requests at their next token; returns how many had any.

        Of `request_id` and the continuations that were named after it, or of all.
        """
        sequences = self.scheduler.sequences.values()
        if request_id is not None:
            # A caller's name is followed by two numbers, see `engine/client`.
            names = {request_id}
            sequences = [s for s in sequences if names & {s.id, s.id.rsplit("-", 2)[0]}]
        return sum(s.guide.finish_thinking() for s in sequences if s.guide is not None)

    def step(self) -> list[Delta]:
        """Compute one step and return what it added to each request that it advanced visibly."""
        begun = time.perf_counter()
        expired = [self._end(s, "deadline") for s in self.scheduler.expire(begun)]
        self._num_expired += len(expired)
        clock = self._decide_drafting()
        busy_since = clock() if clock else 0.0
        plan = self.scheduler.plan(self._drafting.length, self._drafting.least)
        if not plan.segments:
            return expired
        results = self.runner.run(plan)
        for segment in plan.segments:
            sequence = self.scheduler.sequences[segment.id]
            if sequence.started_s is None:
                sequence.started_s = begun
        before = {s.id: len(s.tokens) for s in self.scheduler.running}
        outcomes = [Outcome(tuple(c.token for c in r.choices), r.drafts) for r in results]
        advanced = self.scheduler.update(plan, outcomes)
        if self.scheduler.prefixes is not None:
            self.runner.apply(self.scheduler.prefixes.drain())
        if clock:
            learnt = clock()
            self._learn(plan, outcomes, learnt - busy_since + self._learn_s)
            self._learn_s = clock() - learnt
        deltas = [
            delta
            for sequence, result in zip(advanced, results, strict=True)
            if (delta := self._delta(sequence, result, before[sequence.id])) is not None
        ]
        self._num_steps += 1
        self._step_s += time.perf_counter() - begun
        return expired + deltas

    def stats(self) -> EngineStats:
        """Return the present gauges and counters."""
        scheduler, cache, store = self.scheduler, self.scheduler.cache, self.store
        prefixes = scheduler.prefixes
        assert prefixes is not None
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
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
            num_expired=self._num_expired,
            num_preemptions=scheduler.num_preemptions,
            prefix_tokens_reused=prefixes.num_reused,
            prefix_misses=dict(prefixes.misses),
            num_snapshots=prefixes.num_snapshots,
            store_bytes=store.ram_used if store else 0,
            disk_bytes=store.disk_used if store else 0,
            num_stored=store.num_saved if store else 0,
            num_restored=prefixes.num_restored,
            num_damaged=store.num_damaged if store else 0,
            weight_version=self.weight_version,
            ring_bytes=sum(t.numel() * t.element_size() for t in self.runner.state.ring),
            drafts_compared=tuple(self._length.tried) if self._length else (),
            drafts_accepted=tuple(self._length.kept) if self._length else (),
        )

    def _decide_drafting(self) -> Callable[[], float] | None:
        """Decide how to draft in and after the next step; return a clock if it is to be timed."""
        if self._length is None:
            return None
        if self._rest:
            self._rest -= 1
            return None
        self._drafting = self._length.choose(self._step_s)
        self._rest = self._drafting.rest
        return self.runner.clock

    def _learn(self, plan: StepPlan, outcomes: list[Outcome], seconds: float) -> None:
        """Note what a step cost and what became of its drafts; look up n-grams for the next."""
        length, runner, config = self._length, self.runner, self.config.speculative
        assert length is not None and config is not None
        if config.kind == "ngram":
            self._look_up(plan, config)
        count = len(plan.segments)
        if (
            not self._drafting.length and plan.num_tokens == count
        ):  # in haste: this is the usual step
            return length.note_step(count, count, count, 0, seconds, 0.0)
        num_new = num_drafts = prompt_rows = 0
        for segment, outcome in zip(plan.segments, outcomes, strict=True):
            num_new += len(outcome.tokens)
            if segment.num_drafts:
                length.note_accepted(segment.num_drafts, len(outcome.tokens) - 1)
            if segment.draft and segment.head_start is not None:
                num_drafts += len(outcome.drafts)
                length.note_drafts(segment.draft, len(outcome.drafts))
            known = len(segment.tokens) - segment.num_drafts
            prompt_rows += known if known > 1 or not segment.sample else 0
        if prompt_rows:
            length.note_reading(runner.draft_s * prompt_rows / plan.num_tokens)
        else:
            step_s = seconds - runner.draft_s
            length.note_step(count, plan.num_tokens, num_new, num_drafts, step_s, runner.draft_s)

    def _look_up(self, plan: StepPlan, config: SpeculativeConfig) -> None:
        """Draft what followed in the text itself."""
        assert self._length is not None
        for segment in plan.segments:
            sequence = self.scheduler.sequences.get(segment.id)
            if sequence is not None and segment.sample and sequence.status == "running":
                wanted = min(segment.draft, sequence.room - 1)
                sequence.drafts = look_up(
                    sequence.tokens, wanted, config.prompt_lookup_max, config.prompt_lookup_min
                )
                self._length.note_drafts(max(wanted, 0), len(sequence.drafts))

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

    def _embedding(self, sequence: LiveSequence) -> tuple[float, ...] | None:
        """Return the vector of a prompt that has been read to its end."""
        if sequence.finish is None or sequence.pooling is None:
            return None
        pooled = self.runner.pools.pop(sequence.id)
        count = sequence.num_prompt if sequence.pooling == "mean" else 1
        return tuple((pooled / count).float().tolist())

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
            stop_reason=_stop_reason(sequence),
            reused=sequence.reused,
            why_not_more=sequence.why_not_more,
            drafted=sequence.num_drafted,
            accepted=sequence.num_accepted,
            embedding=self._embedding(sequence),
            weight_version=self.weight_version,
            timings=_timings(sequence),
        )


def _budget(config: EngineConfig, checkpoint: Checkpoint, ring_size: int) -> Budget:
    """Return what the generation state may take on this machine."""
    shape, free = checkpoint.config, available_bytes()
    share = config.memory_utilization
    usable = free // 2 if share is None else int(share * total_bytes()) - (total_bytes() - free)
    rows = config.max_num_seqs * max(ring_size, 1)
    return Budget(
        free_bytes=free,
        state_bytes=max(usable, 0),
        fill=share is not None,
        snapshot_bytes=config.snapshot_bytes,
        store_bytes=config.prefix_cache_ram_bytes,
        step_bytes=step_bytes(shape, config.max_num_batched_tokens, rows),
        ring_bytes=4 * shape.layers.count("mamba") * ring_size * shape.in_proj_dim,
    )


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(p.numel() * p.element_size() for p in checkpoint.model.parameters())


def check_salt(salt: str) -> None:
    """Raise RequestError unless `salt` is a text of at most 256 bytes."""
    try:
        size = len(salt.encode())
    except (AttributeError, UnicodeEncodeError):
        size = 257
    if size > 256:
        raise RequestError(
            f"cache_salt is {str(salt)[:40]!r}: it must be text of at most 256 bytes",
            param="cache_salt",
        )


def _all_but(tokens: Iterable[int], vocab_size: int) -> bytes:
    """Return the mask (see `SequenceGuide`) of a vocabulary without `tokens`."""
    mask = bytearray(b"\xff" * -(-vocab_size // 8))
    for token in tokens:
        mask[token // 8] &= ~(1 << token % 8)
    return bytes(mask)


def room_for(params: SamplingParams, room: int) -> int:
    """Return the most tokens that may be generated where the context leaves `room`."""
    return room if params.max_tokens is None else min(params.max_tokens, room)


def load(config: EngineConfig) -> Checkpoint:
    """Load the checkpoint that `config` names."""
    return load_checkpoint(
        config.model,
        dtype=DTYPES.get(config.dtype),
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


def _stop_reason(sequence: LiveSequence) -> int | str | None:
    """Return the token that ended a sequence, or why it was given up."""
    if sequence.finish == "stop" and sequence.tokens[-1] in sequence.stop_ids:
        return sequence.tokens[-1]
    return sequence.reason


def _timings(sequence: LiveSequence) -> Timings:
    now, arrived = time.perf_counter(), sequence.arrived_s
    started, first = sequence.started_s, sequence.first_token_s
    return Timings(
        queue_s=(now if started is None else started) - arrived,
        first_token_s=0.0 if first is None else first - arrived,
        total_s=now - arrived,
    )
