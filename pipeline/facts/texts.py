"""The texts that models are measured on and calibrated with: shipped with the project, pinned by digest.

Evaluation and calibration share no text. All of it was written for this project.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StageError

_FOLDER = Path(__file__).parent.parent / "data"
DOMAINS = ("code", "english", "chinese", "math")


@dataclass(frozen=True)
class Corpus:
    """A text for each of `DOMAINS`, in ``data/<name>-<domain>.txt``; ``sha256`` is over all of them in order."""

    name: str
    sha256: str

    def read(self) -> dict[str, str]:
        """The text of each domain.

        Raises:
            StageError: a file is missing or is not the pinned one.
        """
        paths = {domain: _FOLDER / f"{self.name}-{domain}.txt" for domain in DOMAINS}
        try:
            texts = {domain: path.read_bytes() for domain, path in paths.items()}
        except OSError as error:
            raise StageError(
                f"the {self.name} text cannot be read", why=str(error), fix="install the project again"
            ) from None
        found = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
        if found != self.sha256:
            raise StageError(
                f"the {self.name} text is not the pinned one",
                where=str(_FOLDER),
                why=f"its sha256 is {found}, not {self.sha256}: figures would not compare with others",
                fix="install the project again, or pin the new digest in pipeline/facts/texts.py",
            )
        return {domain: text.decode("utf-8") for domain, text in texts.items()}


EVALUATION = Corpus("evaluation", "e39f16310257599358b9e01024aecc509815ac61da54d516aeecc8f8a7426954")
CALIBRATION = Corpus("calibration", "3855ca104b5f11656477f3fa1d917285e5b5a9b00e34278debf3547c46cdd50b")

# Strings on which tokenizers are known to part: spaces, digits, accents in both normal forms, scripts without spaces,
# emoji with joiners, control tokens, line ends, code.
TOKENIZER_PROBES: dict[str, str] = {
    "plain": "Hello, world!",
    "spaces": "  leading and   inner spaces\t\ttabs \n\n\n new lines\r\nand carriage returns  ",
    "numbers": "1234567890 3.14159 1e-10 0x1F 50% $9,999.00",
    "contractions": "I'm you've we'll they'd it's DON'T O'Brien's",
    "composed accents": "naïve café Ångström Zoë",
    "decomposed accents": "cafe\u0301",
    "chinese": "你好,世界!今天的天气怎么样?",
    "japanese and korean": "日本語のテキストと한국어 문장",
    "cyrillic": "Привет, мир! Как дела?",
    "arabic": "مرحبا بالعالم كيف حالك",
    "hindi and thai": "हिन्दी में एक वाक्य และ ไทยไม่มีช่องว่าง",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ☕️ 🤷🏽",
    "python": 'def f(x: int) -> str:\n\treturn f"{x!r:>10}"  # comment\n',
    "c": '#include <stdio.h>\nint main(void){for(int i=0;i<10;++i)printf("%d\\n",i);return 0;}',
    "sql": "SELECT * FROM \"t\" WHERE a<>'b''c' AND d>=1;--x",
    "control tokens": "<|im_start|>user\nplain text that looks like control<|im_end|>\n",
    "tool call": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|endoftext|>',
    "latex": "\\frac{1}{2}\\sum_{i=0}^{n} x_i^2 \\leq \\infty",
    "odd spaces": "\u00a0\u200b\ufeff\u2028 unusual white space",
}

_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "name of the city"}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of OpenAI's chat interface, and the tools that the model may call.

    ``variables`` are what else the chat template is given.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages, and all that a template is given besides; JSON values of their own."""
        tools = {"tools": [dict(tool) for tool in self.tools]} if self.tools else {}
        return [dict(message) for message in self.messages], {**tools, **self.variables}


def _ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CONVERSATIONS: tuple[Conversation, ...] = (
    Conversation("code", (_ask("Write a Python function that returns the n-th Fibonacci number."),)),
    Conversation(
        "system",
        (
            {"role": "system", "content": "You answer in one short sentence."},
            _ask("What is the capital of France?"),
        ),
    ),
    Conversation("chinese", (_ask("用一句话解释什么是递归。"),)),
    Conversation(
        "turns",
        (
            _ask("Pick a number between 1 and 10."),
            {"role": "assistant", "content": "7"},
            _ask("Add three to it. Answer with the number only."),
        ),
    ),
    Conversation("tools", (_ask("What is the weather in Oslo right now?"),), (_WEATHER,)),
    Conversation(
        "tool result",
        (
            _ask("What is the weather in Oslo right now?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
                ],
            },
            {"role": "tool", "content": '{"temperature": -3, "sky": "clear"}'},
        ),
        (_WEATHER,),
    ),
)

_SUM = _ask("What is 17 + 25? Answer with the number only.")
_AGAIN = (
    _SUM,
    {"role": "assistant", "content": "<think>\n17 + 25 is 17 + 20 + 5, which is 42.\n</think>\n\n42"},
    _ask("And 18 + 25?"),
)
_ON, _OFF = {"enable_thinking": True}, {"enable_thinking": False}

THINKING: tuple[Conversation, ...] = (
    Conversation("thinking", (_SUM,), variables=_ON),
    Conversation("no thinking", (_SUM,), variables=_OFF),
    Conversation("thinking, turns", _AGAIN, variables=_ON),
    Conversation("no thinking, turns", _AGAIN, variables=_OFF),
    Conversation("thinking, tools", (_ask("What is the weather in Oslo right now?"),), (_WEATHER,), _ON),
    Conversation("no thinking, tools", (_ask("What is the weather in Oslo right now?"),), (_WEATHER,), _OFF),
)


def conversations(thinking: bool) -> tuple[Conversation, ...]:
    """What a model is asked; of one that can think and leave it, both first, since some recipes ask only a few."""
    return (*THINKING, *CONVERSATIONS) if thinking else CONVERSATIONS


# What packages that embed or rank are measured with, in several languages; each query has its document, and none is
# in the calibration text.
QUERIES = (
    "How do bees tell one another where the flowers are?",
    "reverse a linked list without extra memory",
    "为什么天空是蓝色的?",
    "What is the derivative of x squared times the sine of x?",
    "Wann wurde die Berliner Mauer gebaut?",
    "recipe for bread without yeast",
)
DOCUMENTS = (
    "A honeybee that has found food dances on the comb: the angle of its dance is that of the flowers and the sun.",
    "def turn(node):\n    last = None\n    while node:\n        node.next, last, node = last, node, node.next",
    "阳光穿过大气时,波长较短的蓝光比红光更容易被空气分子散射,所以我们从各个方向看到的天空都是蓝色的。",
    "By the product rule, (x^2 sin x)' = 2x sin x + x^2 cos x.",
    "In der Nacht zum 13. August 1961 begann die DDR, die Grenze zu den Westsektoren Berlins zu schließen.",
    "Soda bread rises with baking soda and buttermilk: mix, shape a loaf, cut a cross into it, bake it.",
    "The tram leaves every ten minutes on weekdays and every twenty minutes on Sundays.",
    "A wasp builds its nest from wood that it chews to paper.",
)
