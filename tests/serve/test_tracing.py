"""Spans as OpenTelemetry's own SDK exports them: one a request, and nothing of what was said."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.serve.admission import Limits
from aprium.serve.app import create_app
from aprium.serve.service import ServeConfig
from aprium.serve.tracing import Tracer, open_tracer
from tests.serve.conftest import FakeEngine
from tests.serve.test_app import failure

MESSAGES = [{"role": "user", "content": "secret question"}]
ROUTES = {
    "/v1/chat/completions": ("chat", {"messages": MESSAGES}),
    "/v1/completions": ("text_completion", {"prompt": "secret question"}),
    "/v1/responses": ("chat", {"input": "secret question", "store": False}),
    "/v1/messages": ("chat", {"messages": MESSAGES, "max_tokens": 90, "model": "toy"}),
}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(
    engine: FakeEngine, exporter: InMemorySpanExporter
) -> Iterator[Callable[..., TestClient]]:
    def make(**options: Any) -> TestClient:
        config = ServeConfig(**{"names": ("toy",), **options})
        tracer = Tracer(SimpleSpanProcessor(exporter))
        app = create_app(engine, config, tracer)  # type: ignore[arg-type]
        return TestClient(app, raise_server_exceptions=False)

    yield make


def only(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    (span,) = exporter.get_finished_spans()
    exporter.clear()
    return span, dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_one_span_a_request(
    traced: Callable[..., TestClient],
    exporter: InMemorySpanExporter,
    engine: FakeEngine,
    path: str,
    stream: bool,
) -> None:
    operation, body = ROUTES[path]
    engine.script = "secret answer"
    asked = {"temperature": 0.5, "top_p": 0.9, "stream": stream}
    response = traced().post(path, json={**body, **asked})
    assert response.status_code == 200
    span, found = only(exporter)
    assert (span.name, span.kind, span.parent) == (f"{operation} toy", SpanKind.SERVER, None)
    assert span.status.status_code == StatusCode.UNSET and not span.events
    tokens, params = engine.calls[-1]
    generated = len(engine.tokenizer.encode(engine.script)) + 1
    if params.max_tokens is not None:
        generated = min(generated, params.max_tokens)
    ended = "stop" if generated < (params.max_tokens or 100) else "length"
    expected = {
        "gen_ai.operation.name": operation, "gen_ai.provider.name": "aprium",
        "gen_ai.request.model": "toy", "gen_ai.response.model": "toy",
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9,
        "gen_ai.request.stream": stream, "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": len(tokens), "gen_ai.usage.output_tokens": generated,
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.response.finish_reasons": (ended,),
        "gen_ai.latency.time_in_queue": 0.5, "gen_ai.latency.time_to_first_token": 1.0,
        "gen_ai.latency.e2e": 3.0, "gen_ai.latency.time_in_model_prefill": 0.5,
        "gen_ai.latency.time_in_model_decode": 2.0, "gen_ai.latency.time_in_model_inference": 2.5,
        "url.path": path, "http.request.method": "POST",
    }  # fmt: skip
    assert found.items() >= expected.items()
    if not stream:
        assert found["gen_ai.response.id"] == response.json()["id"]
    assert "secret" not in span.to_json()


def test_the_trace_of_the_client_is_gone_on_with(
    traced: Callable[..., TestClient], exporter: InMemorySpanExporter
) -> None:
    client = traced()
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    for header, known in ((f"00-{trace}-{parent}-01", True), ("00-zz-1-01", False)):
        client.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": header})
        span, _ = only(exporter)
        assert span.context is not None
        assert (f"{span.context.trace_id:032x}" == trace) == known
        assert (span.parent is not None and f"{span.parent.span_id:016x}" == parent) == known
    unsampled = {"traceparent": f"00-{trace}-{parent}-00"}
    client.post("/v1/completions", json={"prompt": "x"}, headers=unsampled)
    assert not exporter.get_finished_spans()


def test_vectors_have_a_span_and_figures_have_none(
    traced: Callable[..., TestClient], exporter: InMemorySpanExporter
) -> None:
    client = traced()
    assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 200
    span, found = only(exporter)
    assert span.name == "embeddings toy" and "gen_ai.request.temperature" not in found
    for path in ("/load", "/metrics", "/health", "/v1/models"):
        assert client.get(path).status_code == 200
    assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert not exporter.get_finished_spans()


def test_what_goes_wrong_is_named_but_not_quoted(
    traced: Callable[..., TestClient], exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    client = traced(limits=Limits(queued_requests=0))
    failure(client.post("/v1/completions", json={"prompt": "x", "stop": ["secret", ""]}), 400)
    span, found = only(exporter)
    assert (span.status.status_code, found["error.type"]) == (StatusCode.ERROR, "RequestError")
    assert "secret" not in span.to_json() and not span.status.description
    engine.fail_after = 1
    for stream in (False, True):
        client.post("/v1/completions", json={"prompt": "x", "stream": stream})
        span, found = only(exporter)
        assert found["error.type"] == "EngineError"
        assert found["gen_ai.usage.output_tokens"] == 1
    many = {"prompt": ["x"] * 20, "max_tokens": 1}
    engine.fail_after = None
    client.app.state.service.admission.closing = True  # type: ignore[attr-defined]
    failure(client.post("/v1/completions", json=many), 503)
    span, found = only(exporter)
    assert found["error.type"] == "OverloadError" and span.end_time is not None


def test_spans_arrive_at_a_collector(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, with the protocol's own reader; what is left is sent at the end."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "plums")
    got: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, ExportTraceServiceRequest.FromString(data)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        config = ServeConfig(names=("toy",), otlp_endpoint=endpoint)
        with TestClient(create_app(engine, config)) as client:  # type: ignore[arg-type]
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        collector.shutdown()
        thread.join()
    ((path, found),) = got
    assert path == "/v1/traces"
    (resource,) = found.resource_spans
    facts = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert facts["service.name"] == "plums"
    (span,) = resource.scope_spans[0].spans
    assert span.name == "text_completion toy" and engine.closed


def test_without_the_extra_or_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for address in ("localhost:4318", "ftp://x", "http://"):
        with pytest.raises(ConfigError, match="give the address of a collector"):
            open_tracer(address)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    arguments = ["serve", "pico", "--port", "0", "--otlp-endpoint", "http://localhost:4318"]
    assert cli.main(arguments) == 1
    assert "run pip install 'aprium[otel]'" in capsys.readouterr().err


def test_the_packages_are_not_loaded_unless_asked_for() -> None:
    code = (
        "import sys, aprium.serve.launch\n"
        "named = 'opentelemetry.sdk', 'opentelemetry.exporter'\n"
        "print([m for m in sys.modules if m.startswith(named)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
