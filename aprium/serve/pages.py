"""The web page: its files, under a strict policy.

The page is a client like any other: it holds no secret and answers without a key, while every call
that it makes needs one. What a model writes is not trusted, so the policy allows scripts and styles
of these files only, no other host, and no text that is made into markup.
"""

import hashlib
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

# File -> its type. Nothing else in the directory is served.
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        (
            "theme.js", "app.js", "api.js", "dom.js", "chat.js", "message.js", "markdown.js",
            "sessions.js", "settings.js", "live.js", "charts.js",
        ),
        "text/javascript; charset=utf-8",
    ),
}  # fmt: skip
PATHS = {"/" if name == "index.html" else f"/web/{name}": name for name in FILES}

HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, and answered with 304
}


def include_pages(app: FastAPI) -> None:
    """Add the page and its files to `app`."""
    for path, name in PATHS.items():
        app.add_api_route(path, _page(name), methods=["GET", "HEAD"], include_in_schema=False)


def _page(name: str) -> Any:
    """Return the handler of one file, which is read once."""
    content = files("aprium.serve").joinpath("web", name).read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def page(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=FILES[name], headers=headers)

    return page
