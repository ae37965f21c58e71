"""The messages of a request as chat templates take them, and the pictures in them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UsageError
from pipeline.runtime import images
from pipeline.serve.api import protocol
from pipeline.serve.api.protocol import AssistantMessage, ImagePart, TextPart, ToolMessage
from pipeline.serve.refusals import Refused, TooLarge, Unsupported

MAX_PICTURES = 16
MAX_PICTURE_BYTES = images.MAX_BYTES
"""Of all pictures of a request together."""

_DATA = re.compile(r"data:image/(png|jpeg|jpg);base64,", re.IGNORECASE)


def templated(messages: Sequence[protocol.Message], sees: bool) -> tuple[list[dict[str, Any]], tuple[bytes, ...]]:
    """Messages for a template, and the encoded pictures in the order of their places.

    Texts in several parts are put together line by line, for most templates take nothing but text. What tools answered
    is put in the order in which they were called: a prompt does not name calls, and a model goes by their order.

    Args:
        sees: whether the model takes images.

    Raises:
        Refused: a message has nothing in it, arguments that are no JSON object, or the answer to no call; or there
            are too many pictures, or one that cannot be read. Its ``parameter`` is the message.
        Unsupported: there is a picture and the model takes none, or its address would have to be fetched.
        TooLarge: the pictures have too many bytes.
    """
    pictures: list[bytes] = []
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if isinstance(message, AssistantMessage):
            found.append(_assistant(message, where))
        elif isinstance(message, ToolMessage):
            tool = {"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id}
            found.append(tool | ({"name": message.name} if message.name else {}))
        else:
            # Templates know the role by its older name.
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": _content(message.content, where, sees, pictures)})
    return _in_order(found), tuple(pictures)


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _content(
    content: str | list[TextPart] | list[TextPart | ImagePart], where: str, sees: bool, pictures: list[bytes]
) -> str | list[dict[str, str]]:
    if isinstance(content, str) or all(isinstance(part, TextPart) for part in content):
        return _text(content)
    found: list[dict[str, str]] = []
    for index, part in enumerate(content):
        if isinstance(part, TextPart):
            found.append({"type": "text", "text": part.text})
            continue
        place = f"{where}.content[{index}].image_url"
        if not sees:
            raise Unsupported(
                "the model takes no images", why="it was trained on text alone", fix="send text", parameter=place
            )
        if len(pictures) == MAX_PICTURES:
            raise Refused(f"there are more than {MAX_PICTURES} images", fix="send fewer", parameter=place)
        pictures.append(_picture(part.image_url, place, MAX_PICTURE_BYTES - sum(map(len, pictures))))
        found.append({"type": "image"})
    return found


def _picture(image: protocol.ImageAddress, place: str, room: int) -> bytes:
    if image.detail == "low":
        raise Unsupported(
            "`detail: low` is not honoured",
            why="how far pictures are scaled down is fixed in the package",
            fix="leave it out, or send a smaller picture",
            parameter=f"{place}.detail",
        )
    place = f"{place}.url"
    head = _DATA.match(image.url)
    if head is None:
        shown = image.url[:40] + "..." * (len(image.url) > 40)
        raise Unsupported(
            "the image cannot be taken",
            where=shown,
            why="this server fetches nothing, and reads PNG and JPEG",
            fix="send it along: data:image/png;base64,...",
            parameter=place,
        )
    if (len(image.url) - head.end()) * 3 // 4 - 2 > room:
        raise TooLarge(f"the images have more than {MAX_PICTURE_BYTES} bytes", fix="scale them down", parameter=place)
    try:
        data = base64.b64decode(image.url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("the image is no base64", why=str(error), parameter=place) from None
    try:
        return images.check(data).data
    except UsageError as error:
        raise Refused(error.what, why=error.why, fix=error.fix, parameter=place) from None


def _assistant(message: AssistantMessage, where: str) -> dict[str, Any]:
    text = _text(message.content or "") or message.refusal or ""
    calls = message.tool_calls or []
    if message.content is None and message.refusal is None and not calls:
        raise Refused(f"`{where}` has neither content nor tool calls", parameter=f"{where}.content")
    found: dict[str, Any] = {"role": "assistant", "content": text}
    if message.reasoning_content:
        found["reasoning_content"] = message.reasoning_content
    if calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{where}.tool_calls[{index}].function.arguments"),
                },
            }
            for index, call in enumerate(calls)
        ]
    return found


def _arguments(text: str, place: str) -> dict[str, Any]:
    """Arguments as the object that templates take; some clients write none as an empty text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise Refused(f"`{place}` is no JSON", why=str(error), parameter=place) from None
    if not isinstance(value, dict):
        raise Refused(f"`{place}` is no JSON object", parameter=place)
    return value


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which answers of tools have the order of their calls."""
    calls: list[str] = []
    found: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            name = message["tool_call_id"]
            if name not in calls:
                raise Refused(
                    f"`messages[{index}]` answers the call {name!r}, which the assistant's message before has not",
                    fix="send the assistant's message with its tool_calls before what the tools answered",
                    parameter=f"messages[{index}].tool_call_id",
                )
            answers.append(message)
            continue
        found += sorted(answers, key=lambda answer: calls.index(answer["tool_call_id"]))
        found.append(message)
        answers = []
        calls = [call["id"] for call in message.get("tool_calls", ())]
    return found + sorted(answers, key=lambda answer: calls.index(answer["tool_call_id"]))
