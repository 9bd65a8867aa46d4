"""Errors that end a command with one line, and text that is safe to print."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do about it."""


class NonFiniteError(UserError):
    """Losses, gradients or weights of a run that are not finite: training on is of no use."""


class StoppedError(Exception):
    """The command was asked to stop and has saved its state: the message says how to continue."""

    def __init__(self, message: str, code: int = 143) -> None:
        """``code`` is the exit code: 128 and the number of the signal that asked."""
        super().__init__(message)
        self.code = code


def plain_text(text: str) -> str:
    """``text`` on one line, with escapes for characters that are not printable."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """``text`` with escapes for characters that are not printable; spaces are unchanged."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
