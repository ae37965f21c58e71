"""What a model thinks before it answers: told apart from the answer as text streams, and ended after a budget.

Qwen's thinking models write ``<think>``, their thoughts, ``</think>`` and the answer; some templates write the opening
tag themselves, at the end of the prompt. This module knows text and nothing of models or tokenizers, so that a command
and a server can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"
VARIABLE = "enable_thinking"
"""What templates of models that can do both are told with."""

# What the authors of Qwen3 end thinking with (technical report of Qwen3, 2025, section 4.3, "thinking budget").
CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{CLOSE}\n\n"
)


@dataclass(frozen=True)
class Parts:
    """Text that became final: of the thoughts, and of the answer."""

    reasoning: str = ""
    content: str = ""


def is_open(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a block of thoughts, which the answer then begins in."""
    return prompt.rstrip().endswith(OPEN)


class Splitter:
    """Tells thoughts from the answer in text that comes in pieces; where it is cut makes no difference.

    A block counts at the beginning of an answer only, where models write it: the same tags later on are text. White
    space around the thoughts, and line ends before the answer, belong to neither.

    Args:
        inside: whether the prompt has opened the block.
    """

    def __init__(self, inside: bool = False) -> None:
        self._state = self._inside if inside else self._before
        self._held = ""
        self._thought = False

    @property
    def inside(self) -> bool:
        """Whether what comes next belongs to the thoughts."""
        return self._state == self._inside

    def push(self, text: str) -> Parts:
        """What became final with ``text``; white space and the beginning of a tag are held back."""
        self._held += text
        reasoning, content = "", ""
        state = None
        while state != self._state:  # a state that is left has more to say of the rest
            state = self._state
            parts = state()
            reasoning, content = reasoning + parts.reasoning, content + parts.content
        return Parts(reasoning, content)

    def rest(self) -> Parts:
        """What was held back when no more text came."""
        held, self._held = self._held, ""
        if self.inside:
            return Parts(reasoning=self._stripped(held))
        return Parts(content=held)

    def _before(self) -> Parts:
        """Nothing but white space has come."""
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = self._inside, begun.removeprefix(OPEN)
        elif not OPEN.startswith(begun):
            self._state = self._answer
        return Parts()

    def _inside(self) -> Parts:
        thought, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = self._after, rest
            return Parts(reasoning=self._stripped(thought))
        size = next((size for size in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:size])), 0)
        final = thought[: len(thought) - size].rstrip()
        self._held = thought[len(final) :]
        return Parts(reasoning=self._stripped(final))

    def _stripped(self, thought: str) -> str:
        """A piece of the thoughts without the white space that comes before or after all of them."""
        found = thought.rstrip() if self._thought else thought.strip()
        self._thought = self._thought or bool(found)
        return found

    def _after(self) -> Parts:
        """The block is closed, and nothing but line ends has come since."""
        self._held = self._held.lstrip("\n")
        if self._held:
            self._state = self._answer
        return Parts()

    def _answer(self) -> Parts:
        content, self._held = self._held, ""
        return Parts(content=content)


class Budget:
    """Ends a block of thoughts: called with each token, it returns what has to follow it.

    Args:
        tokens: most tokens of the block, what ends it not counted.
        closing: ids of `CLOSING`.
        text: gives the text that became final with a token.
        inside: whether the prompt has opened the block.
    """

    def __init__(self, tokens: int, closing: Sequence[int], text: Callable[[int], str], inside: bool = False) -> None:
        self._left = tokens
        self._closing = tuple(closing)
        self._text = text
        self._splitter = Splitter(inside)

    def __call__(self, token: int) -> Sequence[int]:
        """The ids to feed after ``token``: none, or once those that end the block."""
        before = self._splitter.inside
        self._splitter.push(self._text(token))
        if not (before and self._splitter.inside):
            return ()
        self._left -= 1
        return self._closing if self._left == 0 else ()
