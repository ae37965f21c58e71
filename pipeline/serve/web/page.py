"""The page at ``/``: a chat with the models that are served, which loads nothing from elsewhere.

Its files are read once, when the routes are made. Browsers ask whether they have changed before they use them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"
_SCRIPT = "text/javascript; charset=utf-8"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
    "/page.js": ("page.js", _SCRIPT),
    "/page-client.js": ("page-client.js", _SCRIPT),
    "/page-element.js": ("page-element.js", _SCRIPT),
    "/page-markdown.js": ("page-markdown.js", _SCRIPT),
    "/page-turns.js": ("page-turns.js", _SCRIPT),
    "/page-view.js": ("page-view.js", _SCRIPT),
}
PATHS = frozenset(_FILES)
"""What is open without a key: the page asks for it, and its files hold nothing that is secret."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
}


def routes() -> list[Route]:
    """The routes of the page and its files, for GET and HEAD.

    Raises:
        OSError: a file is missing from the installation.
    """
    return [_route(path, (_FOLDER / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()]


def _route(path: str, body: bytes, kind: str) -> Route:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def send(request: Request) -> Response:
        if _is_known(request.headers, tag):
            return Response(status_code=304, headers=headers)
        return Response(body, headers={**headers, "Content-Type": kind})

    return Route(path, send, methods=["GET"], include_in_schema=False, name=f"page:{path}")


def _is_known(headers: Mapping[str, str], tag: str) -> bool:
    """Whether the browser has these very bytes (RFC 9110, 13.1.2: compared weakly)."""
    known = (item.strip().removeprefix("W/") for item in headers.get("if-none-match", "").split(","))
    return any(item in {tag, "*"} for item in known)
