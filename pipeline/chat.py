"""Chat templates and token ids, without transformers.

Templates come with the package and are not trusted: they run in Jinja's sandbox. What a user types never becomes a
control token: the text around it is tokenized with special tokens, the text of a message without.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PackageError, RuntimeMissing, UsageError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """A package's tokenizer and chat template."""

    trusted: Any
    literal: Any
    template: str

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special`` off, control tokens in it are ordinary characters."""
        ids: list[int] = (self.trusted if special else self.literal).encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        text: str = self.trusted.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation with the prompt for an answer at its end.

        Each message's text is replaced by a mark, the template rendered, and the marks encoded as literal text.
        A template that looks into the text (rather than copying it) is rendered with the text itself instead,
        if that text contains no control token.

        Raises:
            UsageError: a message has a control token that cannot be made literal, or the template refuses it.
        """
        marks = {f"\ue000{secrets.token_hex(8)}\ue001": str(message["content"]) for message in messages}
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        plain = render(self.template, messages, **variables)
        controls = [token for token in self._controls() if any(token in text for text in marks.values())]
        if not controls:
            return self.encode(plain)
        rendered = render(self.template, marked, **variables)
        unmarked = rendered
        for mark, text in marks.items():
            if unmarked.count(mark) != 1:
                raise UsageError(f"the text of a message contains the control token {controls[0]}")
            unmarked = unmarked.replace(mark, text)
        ids: list[int] = []
        rest = rendered
        for mark, text in marks.items():
            before, rest = rest.split(mark, 1)
            ids += self.encode(before) + self.encode(text, special=False)
        return ids + self.encode(rest)

    def _controls(self) -> list[str]:
        return [token.content for token in self.trusted.get_added_tokens_decoder().values()]


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
        template = _template(package)
    except Exception as error:  # tokenizers raises bare exceptions
        raise PackageError(f"the tokenizer of {package} cannot be read", why=str(error)) from None
    return Tokenizer(trusted, literal, template)


def _template(package: Path) -> str:
    path = package / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else ""


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The prompt text of a conversation, ready for an answer.

    Raises:
        UsageError: there is no template, or it fails or reaches for what the sandbox forbids.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise RuntimeMissing("jinja2 is not installed", why=str(error), fix="pip install '.[serve]'") from None
    if not template:
        raise UsageError("the package has no chat template", fix="use --raw to continue the prompt as it stands")

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))

    # The settings are those of transformers' apply_chat_template, so that both render alike.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **variables
        )
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, OverflowError) as error:
        raise UsageError("the chat template cannot render these messages", why=str(error)) from None
