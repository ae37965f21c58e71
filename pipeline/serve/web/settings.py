"""How a server of packages is set up, besides the engines of its models."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.serve.web.security import Key


@dataclass(frozen=True)
class Settings:
    """What a server lets in, and how long it waits.

    Attributes:
        keys: whoever has one of them may ask; everybody when there are none.
        hosts: names of this server that requests may be for; any when empty.
        origins: web pages of these origins may ask (CORS).
        requests_per_minute, tokens_per_minute: of each key, or of each address without keys; 0 does not limit.
        max_prompt_tokens, max_tokens: of a prompt and of an answer; 0 leaves it to the context.
        max_body: bytes of a request.
        body_seconds: in which a request has to arrive once it has begun.
        write_seconds: in which a client has to take some of what it is sent.
        ping_seconds: of silence after which a stream tells that it is alive.
        drain_seconds: that answers have to come to their end when the server is stopped.
        page: whether there is a page at ``/``.
    """

    keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_prompt_tokens: int = 0
    max_tokens: int = 0
    max_body: int = 32 << 20
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0
    page: bool = True
