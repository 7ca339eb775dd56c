"""Text from tokens, as they come.

A token is not a piece of text: a character may take several, and many tokenizers write a word's space by looking at the
token before. So the last tokens are decoded again with each new one, always the same few, however long the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CONTEXT = 8
"""Tokens to decode a new one with: more than the four bytes of a character."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token for one byte of a character that a SentencePiece vocabulary does not have."""


class Pieces:
    """The text of one sequence of tokens, in pieces, none of which ends in the middle of a character.

    Together with the last ``rest`` they are ``tokenizer.decode`` of all tokens, with ``skip_special_tokens`` and
    without ``clean_up_tokenization_spaces``, which changes text that was already given.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._tokens: list[int] = []
        self._given = 0
        """Characters of the decoded ``_tokens`` that were given."""
        self._rest: str | None = ""
        """Those that were not; None: not decoded yet."""

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` is known, and was not before."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self._special:
            return ""  # no text: beyond the vocabulary, which the model's may exceed, or skipped
        self._tokens.append(token)
        if BYTE.fullmatch(name):  # a byte after it may make it invalid, so all in a row wait for the last one
            self._rest = None
            return ""
        text = self._text()
        end = len(text) - text.endswith(INCOMPLETE)
        piece, self._given, self._rest = text[self._given : end], end, text[end:]
        if len(self._tokens) >= 2 * CONTEXT:
            del self._tokens[:-CONTEXT]
            self._given = len(self._text()) - len(self._rest)
        return piece

    def rest(self) -> str:
        """The text after the last piece, as it is if no token follows."""
        if self._rest is None:
            self._rest = self._text()[self._given :]
        return self._rest

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """The text of one answer, in pieces, up to the first of ``stop`` in it.

    Attributes:
        found: whether the text has one of ``stop``.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._pieces = Pieces(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        """Text that was not given, because a stop string may start in it."""
        self.found = False

    def push(self, token: int) -> str:
        """The text that is certainly part of the answer now that ``token`` is known, and was not before."""
        text = self._held + self._pieces.push(token)
        so_far = text + self._pieces.rest() if self._stop else text
        answer = cut(so_far, self._stop)
        self.found = answer != so_far
        if self.found:
            self._held = ""
            return answer
        start = next((at for at in range(len(text)) if self._may_start(text[at:])), len(text))
        self._held = text[start:]
        return text[:start]

    def rest(self) -> str:
        """The text after the last piece, as it is if no token follows."""
        return "" if self.found else self._held + self._pieces.rest()

    def _may_start(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of ``stop`` in it."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
