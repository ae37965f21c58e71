"""What every request passes before its route: an id, a line in the log, the host, the key, its client's rates."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.refusals import Refused
from pipeline.serve.web import failures, logs, security
from pipeline.serve.web.security import Budgets
from pipeline.serve.web.settings import Settings

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Observed:
    """Gives each request an id and its response the usual headers, and counts and logs what became of it.

    Args:
        count: is told the route, the status and the seconds of a request that is over.
        known: paths that may be named in logs and metrics although they are no route of the API.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int, float], None], known: Sequence[str]) -> None:
        self._app, self._count, self._known = app, count, frozenset(known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what is raised there becomes a response here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        facts: dict[str, Any] = {"id": request_id}
        scope.setdefault("state", {})["facts"] = facts
        begin, status = time.perf_counter(), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in security.HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception as error:
            logs.bug(error, id=request_id)
            if status:
                raise
            await failures.response(error)(scope, receive, told)
        finally:
            endpoint = self._endpoint(scope)
            seconds = time.perf_counter() - begin
            self._count(endpoint, status or failures.CLIENT_GONE, seconds)
            logs.log(
                "request",
                **facts,
                method=scope["method"] if scope["method"].isalpha() else "other",
                endpoint=endpoint,
                status=status or failures.CLIENT_GONE,
                seconds=round(seconds, 4),
            )

    def _endpoint(self, scope: Scope) -> str:
        """The route of a request; a path that is none may hold anything, and is not told."""
        route = getattr(scope.get("route"), "path", "")
        return str(route) or (scope["path"] if scope["path"] in self._known else "other")


class Guarded:
    """Lets in who may: asks for the right host, a known key, and what is left of its minute.

    Args:
        free: paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, budgets: Budgets, free: Sequence[str]) -> None:
        self._app, self._settings, self._budgets, self._free = app, settings, budgets, frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Refused as error:
                await failures.response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, state = Headers(scope=scope), scope["state"]
        security.check_host(self._settings.hosts, headers.get("host", ""))
        state["known"], state["client"] = not self._settings.keys, (scope.get("client") or ("", 0))[0]
        try:
            if self._settings.keys:
                state["client"] = security.admitted(self._settings.keys, headers)
                state["known"] = True
        except Refused:
            if scope["path"] not in self._free:
                raise
        if self._settings.keys and state["known"]:
            state["facts"]["client"] = state["client"]
        if scope["method"] == "POST":
            self._budgets.take(state["client"])
