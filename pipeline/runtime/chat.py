"""Chat templates and token ids, without transformers.

Templates come with the package and are not trusted: they run in a limited sandbox (`pipeline.runtime.template`). What a
user types never becomes a control token: what the template writes is tokenized with control tokens, what it is given is
not.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PackageError, RuntimeMissing, UsageError
from pipeline.runtime import template as sandbox
from pipeline.runtime.thinking import CLOSE, OPEN

Message = Mapping[str, Any]
_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def content(text: str, pictures: int = 0, sounds: int = 0) -> str | list[dict[str, str]]:
    """A user's words as a message has them, after so many pictures and sounds."""
    if not pictures and not sounds:
        return text
    heard = [{"type": "audio", "audio_url": f"clip {index + 1}"} for index in range(sounds)]
    return [*({"type": "image"} for _ in range(pictures)), *heard, {"type": "text", "text": text}]


@dataclass(frozen=True)
class Tokenizer:
    """A package's tokenizer and chat template.

    Attributes:
        trusted: encodes control tokens as such.
        literal: encodes them as the characters they are written with.
        template: Jinja source; empty when there is none.
        specials: the tokens that a template may name, such as ``eos_token``.
        renderer: the process that renders the template; without one each conversation has its own.
    """

    trusted: Any
    literal: Any
    template: str
    specials: Mapping[str, str] = field(default_factory=dict)
    renderer: sandbox.Renderer | None = None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special`` off, control tokens in it are ordinary characters.

        Raises:
            UsageError: the text has surrogates, which are no characters.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the text is not valid Unicode", why=str(error)) from None
        ids: list[int] = (self.trusted if special else self.literal).encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        text: str = self.trusted.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation with the prompt for an answer at its end.

        ``variables`` are what else the template takes, such as ``tools`` or ``enable_thinking``.

        A control token in any text that is given (of a message, a tool, an argument) is hidden from the template behind
        a mark, and comes back as literal text: only the template writes control tokens. Tokens that a model writes
        itself, such as ``<think>``, are none (their ``special`` is false), and are read as transformers reads them.

        Raises:
            UsageError: the template fails on these messages, or cuts a mark in two.
        """
        controls = self._controls()
        nonce = secrets.token_hex(8)
        marks = {control: f"\ue000{nonce}-{index}\ue001" for index, control in enumerate(controls)}
        given = {**self.specials, **_replaced(variables, marks)}
        text = render(self.template, _replaced(messages, marks), self.renderer, **given)
        if nonce not in text:
            return self.encode(text)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, controls)) + ")", text):
            if part in marks:
                ids.append(self.trusted.token_to_id(part))
            elif part:
                for control, mark in marks.items():
                    part = part.replace(mark, control)  # noqa: PLW2901
                ids += self.encode(part, special=False)
                if nonce in part:
                    raise UsageError("the chat template cuts a message with a control token in pieces")
        return ids

    @property
    def thinks(self) -> bool:
        """Whether the model's answers may begin with thoughts: its template then knows how they begin or end."""
        return OPEN in self.template or CLOSE in self.template

    def takes(self, variable: str) -> bool:
        """Whether the chat template reads a variable of that name, such as ``enable_thinking``.

        Raises:
            UsageError: the template cannot be read.
            RuntimeMissing: jinja2 is not installed.
        """
        if variable not in self.template:  # which spares most templates the process that reads them
            return False
        with _told("the chat template cannot be read"):
            return variable in sandbox.names(self.template)

    def _controls(self) -> list[str]:
        """The texts of all control tokens, longer ones first."""
        added = self.trusted.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special), key=len, reverse=True)


def _replaced(value: Any, marks: Mapping[str, str]) -> Any:
    """``value`` with the keys of ``marks`` replaced in all of its strings."""
    if isinstance(value, str):
        for text, mark in marks.items():
            value = value.replace(text, mark)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, marks): _replaced(item, marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, marks) for item in value]
    return value


def load(package: Path) -> Tokenizer:
    """The tokenizer and chat template of a package.

    Raises:
        PackageError: a file is missing or damaged.
        RuntimeMissing: the tokenizers library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeMissing("tokenizers is not installed", why=str(error), fix="pip install '.[serve]'") from None
    try:
        trusted = tokenizers.Tokenizer.from_file(str(package / "tokenizer.json"))
        literal = tokenizers.Tokenizer.from_file(str(package / "tokenizer.json"))
        literal.encode_special_tokens = True
        config = _config(package)
        template = _template(package, config)
    except Exception as error:  # tokenizers raises bare exceptions
        raise PackageError(f"the tokenizer of {package} cannot be read", why=str(error)) from None
    specials = {name: value for name in _SPECIALS if (value := _text_of(config.get(name)))}
    return Tokenizer(trusted, literal, template, specials)


def template_of(package: Path) -> str:
    """The chat template of a package, empty where it has none; needs no library.

    Raises:
        PackageError: it cannot be read.
    """
    try:
        return _template(package, _config(package))
    except (OSError, ValueError) as error:
        raise PackageError(f"the chat template of {package} cannot be read", why=str(error)) from None


def _config(package: Path) -> dict[str, Any]:
    path = package / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is no object")
    return config


def _template(package: Path, config: Mapping[str, Any]) -> str:
    path = package / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else ""


def _text_of(token: Any) -> str:
    """A special token of tokenizer_config.json: a string, or an object with its ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def render(
    template: str, messages: Sequence[Message], renderer: sandbox.Renderer | None = None, **variables: Any
) -> str:
    """The prompt text of a conversation, ready for an answer; see `pipeline.runtime.template` for its limits.

    Raises:
        UsageError: there is no template; or it fails, reaches for what the sandbox forbids, or takes too long.
        RuntimeMissing: jinja2 is not installed.
    """
    if not template:
        raise UsageError("the package has no chat template", fix="use --raw to continue the prompt as it stands")
    # As transformers' apply_chat_template: what is not given is none, rather than undefined.
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **variables, "messages": list(messages)}
    with _told("the chat template cannot render these messages"):
        return (renderer.render if renderer else sandbox.render)(template, given)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell in the project's own errors what `pipeline.runtime.template` raises."""
    try:
        yield
    except ImportError as error:
        raise RuntimeMissing("jinja2 is not installed", why=str(error), fix="pip install '.[serve]'") from None
    except ValueError as error:
        raise UsageError(what, why=str(error)) from None
