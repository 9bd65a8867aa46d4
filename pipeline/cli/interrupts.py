"""Ctrl-C: an answer at once, also while the main thread is in compiled code or waits for Ray."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CONTINUES = "stopping; the same command goes on from files that are complete"
SAME_SECONDS = 0.2
"""Seconds in which a repeated Ctrl-C is the same one, because launchers hand on what a terminal has
sent to all processes."""
STOPS = (signal.SIGINT, signal.SIGTERM)
HANDED_ON = (*STOPS, signal.SIGHUP, signal.SIGQUIT)


class Answers:
    """The text that answers the first signal, and whether a thread of this process writes it."""

    text = CONTINUES
    by_thread = False


@contextmanager
def answered_interrupts() -> Iterator[None]:
    """Context of a command in which the first Ctrl-C is answered with a line on stderr and raises
    ``KeyboardInterrupt`` in the main thread, and a second one ends the process with exit code 130.

    A thread writes the line, because Python's own handlers wait until the main thread leaves
    compiled code. Does nothing where SIGINT is ignored (``nohup``, background jobs of a shell) or
    outside the main thread.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_answer, args=(reader,), name="interrupts", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a forked process would answer in the name of this one
    os.register_at_fork(after_in_child=_forget)
    signal.signal(signal.SIGINT, _raise_once)
    Answers.by_thread = True
    try:
        yield
    finally:
        interrupted = signal.getsignal(signal.SIGINT) is _ignore
        # after an interrupt, the rest of the process ends at a further one
        signal.signal(signal.SIGINT, signal.SIG_DFL if interrupted else signal.default_int_handler)
        signal.set_wakeup_fd(before)
        Answers.by_thread = False
        os.close(writer)
        thread.join(0.3)  # the answer comes before the last line


@contextmanager
def handing_on(send: Callable[[int], object]) -> Iterator[None]:
    """Context in which signals of ``HANDED_ON`` that are not ignored are passed to ``send``, for a
    command that this one runs and that answers them itself."""
    numbers = [number for number in HANDED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: send(number)) for number in numbers}
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_once(number: int, frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt`` at the first Ctrl-C only, because another one would break off the
    clean-up."""
    signal.signal(signal.SIGINT, _ignore)
    raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler in Python: with SIG_IGN, the thread would not learn of the signal."""


def _forget() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


def _answer(reader: int) -> None:
    """Write the answers to the signals whose numbers arrive from Python's handler in C."""
    first: float | None = None
    while numbers := os.read(reader, 64):
        stops = [number for number in numbers if number in STOPS]
        if first is None and stops:
            first = time.monotonic()
            name = signal.Signals(stops[0]).name
            write_stderr(f"{name}: {Answers.text} (a further Ctrl-C ends at once)")
        elif signal.SIGINT in stops and time.monotonic() - (first or 0) > SAME_SECONDS:
            write_stderr("ended at once")
            _end_children()
            os._exit(128 + signal.SIGINT)
    os.close(reader)


def _end_children() -> None:
    if "multiprocessing" in sys.modules:
        from multiprocessing import active_children

        for child in active_children():
            child.kill()


def write_stderr(line: str) -> None:
    """Write a line past Python's buffers, whose locks an interrupted ``print`` may hold."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
