"""What Prometheus is told: vLLM's names where the meaning is the same, `aprium:` for the rest.

Gauges and counters are read from the engine when they are asked for; histograms of latencies are
filled as answers come. One registry an application, so that several may live in one process.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aprium.base.records import Completion
from aprium.engine.config import EngineStats
from aprium.serve.admission import Admission

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine

_LATENCY_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_BETWEEN_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Name -> (what it says, field of EngineStats).
_GAUGES = {
    "vllm:num_requests_running": ("Sequences being computed.", "num_running"),
    "aprium:pages": ("Pages of keys and values.", "pages_total"),
    "aprium:pages_free": ("Pages of keys and values that are free.", "pages_free"),
    "aprium:state_slots": ("Slots for recurrent states, snapshots included.", "slots_total"),
    "aprium:state_slots_free": ("Slots for recurrent states that are free.", "slots_free"),
    "aprium:snapshots": ("States kept in slots for prompts to come.", "num_snapshots"),
    "aprium:kv_bytes": ("Memory of keys and values.", "kv_bytes"),
    "aprium:state_bytes": ("Memory of recurrent states.", "state_bytes"),
    "aprium:ring_bytes": ("Memory of drafts under verification.", "ring_bytes"),
    "aprium:snapshot_ram_bytes": ("Copies of states in main memory.", "store_bytes"),
    "aprium:snapshot_disk_bytes": ("Copies of states on disk.", "disk_bytes"),
    "aprium:weight_version": ("Updates of the weights so far.", "weight_version"),
}
_COUNTERS = {
    "vllm:prompt_tokens": ("Tokens of prompts.", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens generated.", "generated_tokens"),
    "vllm:num_preemptions": ("Sequences that lost their place.", "num_preemptions"),
    "vllm:prefix_cache_queries": ("Tokens of prompts looked up.", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Tokens of prompts known already.", "prefix_tokens_reused"),
    "aprium:steps": ("Steps computed.", "num_steps"),
    "aprium:step_seconds": ("Time spent in steps.", "step_s"),
    "aprium:requests_aborted": ("Sequences given up by their client.", "num_aborted"),
    "aprium:requests_expired": ("Sequences given up at their deadline.", "num_expired"),
    "aprium:snapshots_stored": ("States copied out of their slots.", "num_stored"),
    "aprium:snapshots_restored": ("States taken up from copies.", "num_restored"),
    "aprium:snapshots_damaged": ("Files of states that were damaged.", "num_damaged"),
}


class Metrics:
    """The registry of one application; `model` labels every series as vLLM does."""

    def __init__(self, engine: "AsyncEngine", admission: Admission, model: str) -> None:
        self._model = model
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, admission, model))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(
                f"vllm:{name}", help, ("model_name",), buckets=buckets, registry=self.registry
            )
            return found.labels(model)

        self.first_token_s = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_S
        )
        self.inter_token_s = histogram(
            "inter_token_latency_seconds", "Between tokens of an answer.", _BETWEEN_S
        )
        self.whole_s = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _LATENCY_S
        )
        self.queue_s = histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _LATENCY_S
        )
        self.prefill_s = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _LATENCY_S
        )
        self.decode_s = histogram(
            "request_decode_time_seconds", "From the first token to the end.", _LATENCY_S
        )
        self.num_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.num_generated = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.success = Counter(
            "vllm:request_success",
            "Answers that ended, by how.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )

    def watch(self) -> "Watch":
        """Return what follows the answers of one request."""
        return Watch(self)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def ended(self, completion: Completion) -> None:
        """Note an answer that has ended."""
        timings = completion.timings
        self.success.labels(self._model, completion.finish).inc()
        self.whole_s.observe(timings.total_s)
        self.queue_s.observe(timings.queue_s)
        self.num_prompt.observe(len(completion.prompt_tokens))
        self.num_generated.observe(len(completion.tokens))
        if timings.first_token_s:
            self.first_token_s.observe(timings.first_token_s)
            self.prefill_s.observe(max(timings.first_token_s - timings.queue_s, 0.0))
            self.decode_s.observe(max(timings.total_s - timings.first_token_s, 0.0))


class Watch:
    """Follows the answers of one request as they grow."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._latest: dict[int, tuple[int, float]] = {}

    def see(self, completion: Completion) -> None:
        """Note what has come."""
        now, count = time.perf_counter(), len(completion.tokens)
        before, then = self._latest.get(completion.index, (0, now))
        if before and count > before:
            for _ in range(count - before):  # tokens of one step came at once
                self._metrics.inter_token_s.observe((now - then) / (count - before))
        self._latest[completion.index] = count, now
        if completion.finish is not None:
            self._metrics.ended(completion)


class _EngineCollector(Collector):
    """Reads the engine, and the queue in front of it, when it is asked."""

    def __init__(self, engine: "AsyncEngine", admission: Admission, model: str) -> None:
        self._engine, self._admission, self._model = engine, admission, model

    def collect(self) -> Iterator[Metric]:
        """Yield all series."""
        stats = self._engine.stats()
        for name, (help, field) in _GAUGES.items():
            yield self._gauge(name, help, getattr(stats, field))
        for name, (help, field) in _COUNTERS.items():
            yield self._counter(name, help, getattr(stats, field))
        used = 1 - stats.pages_free / max(stats.pages_total, 1)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of pages in use, 1 is all.", used)
        waiting = self._admission.num_queued
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait to run.", waiting)
        yield self._gauge(
            "aprium:queued_tokens",
            "Tokens of prompts that wait.",
            self._admission.num_queued_tokens,
        )
        yield self._gauge(
            "aprium:predicted_wait_seconds",
            "How long a newcomer is likely to wait.",
            self._admission.predict_wait_s(),
        )
        yield self._labelled(
            "vllm:admission_rejections",
            "Requests turned away, by reason.",
            "reason",
            dict(self._admission.refused),
        )
        yield self._labelled(
            "aprium:prefix_reuse",
            "Prompts by the reason why no more of them was known already.",
            "reason",
            stats.prefix_misses,
        )
        yield from self._drafts(stats)

    def _drafts(self, stats: EngineStats) -> Iterator[Metric]:
        compared, accepted = stats.drafts_compared, stats.drafts_accepted
        drafts = compared[0] if compared else 0
        yield self._counter("vllm:spec_decode_num_drafts", "Drafts verified.", drafts)
        yield self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.", sum(accepted)
        )
        for name, help, counts in (
            ("vllm:spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted", accepted),
            ("aprium:drafts_compared_per_pos", "Drafted tokens compared with a choice", compared),
        ):
            by_position = {str(i): count for i, count in enumerate(counts)}
            yield self._labelled(name, f"{help}, by position.", "position", by_position)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        found = GaugeMetricFamily(name, help, labels=("model_name",))
        found.add_metric([self._model], value)
        return found

    def _counter(self, name: str, help: str, value: float) -> Metric:
        return self._labelled(name, help, None, {"": value})

    def _labelled(
        self, name: str, help: str, label: str | None, values: dict[str, float] | dict[str, int]
    ) -> Metric:
        names = ("model_name",) if label is None else ("model_name", label)
        found = CounterMetricFamily(name, help, labels=names)
        for key, value in values.items():
            found.add_metric([self._model] if label is None else [self._model, key], value)
        return found
