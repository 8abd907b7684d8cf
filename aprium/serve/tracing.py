"""Traces for OpenTelemetry: one span a request, over OTLP, where an endpoint is given.

A span begins when its request is let in and ends when the last byte is sent; it goes on with the
trace that the client names (W3C `traceparent`). Attributes are those of the semantic conventions
for generative AI, with vLLM's for latencies (`gen_ai.latency...`). Counts, times and settings are
in them and nothing of what was said: no prompt, no answer, no stop string, no message of an error.
The packages are an extra, so they are imported when there is something to trace.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request

import aprium
from aprium.base.errors import ConfigError
from aprium.base.records import Completion, SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}  # else: chat
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed")


class Tracer:
    """Begins the spans of a server, which go to `processor`.

    What the variables `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_TRACES_SAMPLER` say
    is done.
    """

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "aprium"}
        resource = Resource.create({"service.version": aprium.__version__, **name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("aprium", aprium.__version__)
        self._context = TraceContextTextMapPropagator()

    def begin(self, request: Request) -> "RequestSpan":
        """Begin the span of a request."""
        from opentelemetry.trace import SpanKind

        path = request.url.path
        operation = _OPERATIONS.get(path, "chat")
        span = self._tracer.start_span(
            operation,
            context=self._context.extract(dict(request.headers)),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "aprium",
                "http.request.method": request.method,
                "url.path": path,
            },
        )
        return RequestSpan(span, operation)

    def close(self) -> None:
        """Send what there is."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request."""

    def __init__(self, span: "Span", operation: str) -> None:
        self._span, self._operation = span, operation

    def asked(self, id: str, model: str, params: SamplingParams, body: Any) -> None:
        """Note what is asked for, once it is known to be served; `id` is that of the reply."""
        self._span.update_name(f"{self._operation} {model}")
        found: dict[str, Any] = {
            "gen_ai.request.id": id,
            "gen_ai.response.id": id,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.stream": bool(getattr(body, "stream", False)),
            "gen_ai.conversation.id": getattr(body, "session", None),
        }
        if self._operation != "embeddings":
            found |= {f"gen_ai.request.{name}": getattr(params, name) for name in _SAMPLING}
        self._set(found)

    def answered(self, completions: Sequence[Completion], num_prompt: int) -> None:
        """Note what came of it: tokens, ends and times."""
        self._set({"gen_ai.usage.input_tokens": num_prompt})
        if not completions:
            return
        times = [completion.timings for completion in completions]
        queue_s = min(t.queue_s for t in times)
        first_s = min((t.first_token_s for t in times if t.first_token_s), default=None)
        total_s = max(t.total_s for t in times)
        reasons = [c.finish for c in completions if c.finish is not None]
        found: dict[str, Any] = {
            "gen_ai.usage.output_tokens": sum(len(c.tokens) for c in completions),
            "gen_ai.usage.cache_read.input_tokens": completions[0].reused,
            "gen_ai.response.finish_reasons": reasons or None,
            "gen_ai.latency.time_in_queue": queue_s,
            "gen_ai.latency.e2e": total_s,
            "gen_ai.latency.time_in_model_inference": max(total_s - queue_s, 0.0),
        }
        if first_s is not None:
            found |= {
                "gen_ai.latency.time_to_first_token": first_s,
                "gen_ai.latency.time_in_model_prefill": max(first_s - queue_s, 0.0),
                "gen_ai.latency.time_in_model_decode": max(total_s - first_s, 0.0),
            }
        self._set(found)

    def failed(self, error: BaseException) -> None:
        """Note the kind of an error; what it says may quote the request."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR))
        self._set({"error.type": type(error).__name__})

    def end(self) -> None:
        """End it."""
        self._span.end()

    def _set(self, attributes: dict[str, Any]) -> None:
        self._span.set_attributes({k: v for k, v in attributes.items() if v is not None})


def open_tracer(endpoint: str) -> Tracer:
    """Return a tracer that sends to the collector at `endpoint`, an OTLP address over HTTP.

    An address without a path gets that of traces, `/v1/traces`. Raises ConfigError.
    """
    found = urlsplit(endpoint)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ConfigError(
            f"--otlp-endpoint {endpoint}: give the address of a collector, such as "
            "http://localhost:4318"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint {endpoint}: OpenTelemetry is not installed, run "
            "pip install 'aprium[otel]'"
        ) from error
    whole = found._replace(path="/v1/traces").geturl() if found.path in ("", "/") else endpoint
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=whole)))
