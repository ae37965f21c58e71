"""What single tokens are written as: a token may be half a character, so that its bytes say more than its text."""

from __future__ import annotations

from pipeline.runtime import byte_level
from pipeline.runtime.chat import Tokenizer


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.trusted
        # Added tokens stand for themselves; the others are written in the characters of byte-level BPE.
        self._added: dict[int, str] = {
            number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none of an id that the vocabulary leaves out."""
        if token in self._added:
            return self._added[token].encode()
        written: str | None = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        try:
            return byte_level.read(written)
        except KeyError:  # a tokenizer that is not byte-level writes its tokens as they are
            return written.encode()

    def text_of(self, token: int) -> str:
        """The text of a token, with a mark in place of bytes that are no character by themselves."""
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def name_of(self, token: int) -> str:
        """The text of a token, or its bytes written out where they are no characters: no two tokens share a name."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
