"""The HTTP surface: OpenAI's and Anthropic's routes over an `AsyncEngine`.

A body is checked by its route's wire types, becomes tokens, runs in the engine
(`serve/service`), and its completions become the route's kind of reply. This file puts the
application together: which function answers at which path, and what stands before all of them.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pydantic
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import aprium
from aprium.base.errors import ApriumError
from aprium.serve.completions import CompletionRoutes
from aprium.serve.document import describe
from aprium.serve.guard import Guard
from aprium.serve.messages import MessageRoutes
from aprium.serve.operations import OperationRoutes
from aprium.serve.pages import include_pages
from aprium.serve.responses import ResponseRoutes
from aprium.serve.service import ServeConfig, Service
from aprium.serve.sessions import SessionRoutes
from aprium.serve.tracing import Tracer, open_tracer
from aprium.serve.transport import Json, on_error, on_http, on_invalid

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine

Route = tuple[str, str, Callable[..., Any]]


def create_app(engine: "AsyncEngine", config: ServeConfig, tracer: Tracer | None = None) -> FastAPI:
    """Return the application; it closes `engine` when it shuts down.

    Traces go to `tracer`, or to one for the endpoint that `config` has.
    `app.state.service` is what its routes share.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="Aprium",
        version=aprium.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
    )
    app.add_middleware(Guard, config=config)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    for kind in (RequestValidationError, pydantic.ValidationError):
        app.add_exception_handler(kind, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ApriumError, on_error)
    app.add_exception_handler(Exception, on_error)
    if tracer is None and config.otlp_endpoint is not None:
        tracer = open_tracer(config.otlp_endpoint)
    app.state.service = service = Service(engine, config, tracer)
    for method, path, handler in _routes(service):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    if config.web:
        include_pages(app)
    document = describe(app, bool(config.api_keys))
    app.openapi = lambda: document
    return app


def _routes(service: Service) -> list[Route]:
    """Return method, path and handler of every route."""
    openai, sessions = CompletionRoutes(service), SessionRoutes(service.engine)
    operations, messages = OperationRoutes(service), MessageRoutes(service)
    responses = ResponseRoutes(service)
    return [
        ("POST", "/v1/chat/completions", openai.chat),
        ("POST", "/v1/chat/completions/control", openai.control),
        ("POST", "/v1/completions", openai.complete),
        ("POST", "/v1/embeddings", openai.embed),
        ("GET", "/v1/models", openai.models),
        ("GET", "/v1/models/{name:path}", openai.model),
        ("POST", "/v1/responses", responses.create),
        ("GET", "/v1/responses/{id}", responses.get),
        ("DELETE", "/v1/responses/{id}", responses.delete),
        ("POST", "/v1/responses/{id}/cancel", responses.cancel),
        ("GET", "/v1/responses/{id}/input_items", responses.input_items),
        ("POST", "/v1/messages", messages.create),
        ("POST", "/v1/messages/count_tokens", messages.count_tokens),
        ("POST", "/tokenize", openai.tokenize),
        ("POST", "/detokenize", openai.detokenize),
        ("POST", "/v1/sessions", sessions.create),
        ("GET", "/v1/sessions", sessions.all),
        ("GET", "/v1/sessions/{id}", sessions.get),
        ("DELETE", "/v1/sessions/{id}", sessions.delete),
        ("POST", "/v1/sessions/{id}/fork", sessions.fork),
        ("POST", "/v1/sessions/{id}/save", sessions.save),
        ("POST", "/v1/sessions/{id}/resume", openai.resume),
        ("GET", "/health", operations.health),
        ("GET", "/ping", operations.health),
        ("GET", "/ready", operations.ready),
        ("GET", "/version", operations.version),
        ("GET", "/metrics", operations.metrics),
        ("GET", "/load", operations.load),
        ("POST", "/pause", operations.pause),
        ("POST", "/resume", operations.resume),
        ("GET", "/is_paused", operations.is_paused),
        ("POST", "/update_weights", operations.update_weights),
        ("POST", "/reset_prefix_cache", operations.reset_prefix_cache),
        ("POST", "/finish_thinking", operations.finish_thinking),
    ]
