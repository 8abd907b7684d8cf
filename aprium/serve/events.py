"""JSON, server-sent events and the forms of errors, as bytes and plain values.

No web framework here, so that replies can be made and tested without one.
"""

import json
from http import HTTPStatus
from typing import Any

# What Anthropic's clients know errors by; their own numbers for the rest.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def dump(content: Any) -> bytes:
    """Return `content` as JSON."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(content: Any, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + dump(content) + b"\n\n"


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    name = "".join(HTTPStatus(status).phrase.title().split()).replace("-", "")
    kind = name if name.endswith("Error") else f"{name}Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def anthropic_error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in Anthropic's form, which has no place for `param` but the message."""
    known = "invalid_request_error" if status < 500 else "api_error"
    said = message if param is None or param in message else f"{param}: {message}"
    return {
        "type": "error",
        "error": {"type": _ANTHROPIC_TYPES.get(status, known), "message": said},
    }
