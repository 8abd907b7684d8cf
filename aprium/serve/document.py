"""The server's own OpenAPI document: what FastAPI derives, made to say what is sent.

FastAPI documents an error (422) that is never sent here, knows of no streams, and of no keys, which
are checked before it. Tests hold the server to this document.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from aprium.serve.guard import CONTROL_PATHS, OPEN_PATHS
from aprium.serve.transport import ANTHROPIC_PATH

_STREAMS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/sessions/{id}/resume",
)  # fmt: skip
_STATUSES = (400, 401, 403, 404, 405, 409, 413, 429, 500, 503)
_OBJECT = {"type": "object"}


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _CODE = {"type": "string"}, {"type": "integer"}
# One event of a stream; what its data is depends on the route.
_EVENT = {
    "type": "object",
    "properties": {"data": _TEXT, "event": _TEXT},
    "required": ["data"],
}
_ERROR = _schema(
    {
        "error": _schema(
            {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _CODE}
        )
    }
)
_ANTHROPIC_ERROR = _schema(
    {"type": {"const": "error"}, "error": _schema({"type": _TEXT, "message": _TEXT})}
)


def describe(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """Return the document of `app`; `keyed` says that clients need keys."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    document.setdefault("components", {})["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"}
    }
    for path, methods in document["paths"].items():
        error = _ANTHROPIC_ERROR if path.startswith(ANTHROPIC_PATH) else _ERROR
        for operation in methods.values():
            found = {"application/json": {"schema": _OBJECT}}
            if path in _STREAMS:
                found["text/event-stream"] = {"schema": _EVENT}
            if path == "/metrics":
                found = {"text/plain": {"schema": _TEXT}}
            operation["responses"] = {
                "200": {"description": "What was asked for", "content": found}
            }
            operation["responses"] |= {
                str(status): {
                    "description": "Why not",
                    "content": {"application/json": {"schema": error}},
                }
                for status in _STATUSES
            }
            if path in CONTROL_PATHS or (keyed and path not in OPEN_PATHS):
                operation["security"] = [{"key": []}]
    return document
