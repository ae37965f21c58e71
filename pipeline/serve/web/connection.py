"""A connection of the server: whoever sends or reads too slowly is cut off, so that nobody holds one for nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_SENDING = 128 << 10
"""Bytes that the kernel holds for a client. By default these are megabytes, and a client that reads nothing goes
unnoticed until they are full."""

_LEAST = 8 << 10  # bytes that a client has to take in the time it has


class Connection(H11Protocol):
    """HTTP/1.1 with clocks for both directions."""

    read_seconds = 30.0
    """In which a request's headers, or the rest of a body that was refused, have to arrive."""

    write_seconds = 30.0
    """In which a client has to take some of what waits for it."""

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        made: socket.socket = transport.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENDING)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        """More of a request, or of the next one."""
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        """The client has not read it yet; what it sends now is another request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()  # closing waits until all is taken
        else:
            self._watch_reading()

    def _watch_reading(self) -> None:
        """Run the clock while there are bytes of a request that nobody waits for yet."""
        answering = self.cycle is not None and not self.cycle.response_complete
        resting = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if answering or resting:  # an idle connection has the library's own clock
            self._stop("_reading")
        elif self._reading is None:
            self._reading = self.loop.call_later(self.read_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        """More waits to be sent than a client in good health leaves."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop("_writing")

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more was asked."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def shutdown(self) -> None:
        """The server is being stopped."""
        super().shutdown()
        if self.transport.is_closing():
            self._watch_writing()

    def _watch_writing(self) -> None:
        if self._writing is None:
            self._check_writing(self.transport.get_write_buffer_size() + 2 * _LEAST)

    def _check_writing(self, before: int) -> None:
        self._writing = None
        left = self.transport.get_write_buffer_size()
        if left > before - _LEAST:
            self.transport.abort()
        elif left:
            self._writing = self.loop.call_later(self.write_seconds, self._check_writing, left)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was cut off."""
        self._stop("_reading")
        self._stop("_writing")
        super().connection_lost(exc)

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the form that all others have."""
        details: dict[str, Any] = {
            "message": msg,
            "type": "invalid_request_error",
            "param": None,
            "code": "bad_request",
        }
        body = json.dumps({"error": details}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
