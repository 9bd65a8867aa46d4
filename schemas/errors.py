"""The error that is meant for the person at the terminal, and how a command ends with it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do about it."""


class StoppedError(Exception):
    """The command was asked to stop and did so in good order: the message says how to go on."""

    def __init__(self, message: str, code: int = 143) -> None:
        """``code`` is the exit code: 128 and the number of the signal that asked."""
        super().__init__(message)
        self.code = code


def plain_text(text: str) -> str:
    """``text`` in one line; what a terminal would obey, or not know, shown as its escape."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The same with spaces as they are."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
