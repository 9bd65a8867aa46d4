"""Ctrl-C in processes of their own: when it is answered, and how the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ANSWER = (
    "SIGINT: stopping; the same command goes on from files that are complete (a further Ctrl-C ends"
)
BEGIN = """
import os, sys, time
from pipeline.cli.command import run_command
def main(argv):
    BODY
    return 0
run_command(main)
"""
READY = """
    print("ready", file=sys.stderr, flush=True)"""
COMPILED = """
    import ctypes
    library, mutex = ctypes.CDLL(None), (ctypes.c_char * 64)()
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    print("ready", file=sys.stderr, flush=True)
    until = (ctypes.c_long * 2)(int(time.time()) + 5, 0)
    library.pthread_mutex_timedlock(mutex, until)"""
"""Five seconds in compiled code that no signal interrupts, so that no Python handler runs."""
SLOW_END = """
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        time.sleep(DELAY)
        print("cleaned up", file=sys.stderr)"""
STOPPED = """
    from pipeline.distributed.signals import StopSignals
    from schemas.errors import StoppedError
    with StopSignals() as signals:
        print("ready", file=sys.stderr, flush=True)
        while signals.received is None:
            time.sleep(0.01)
        time.sleep(DELAY)
    raise StoppedError("stopped after step 3", signals.exit_code)"""


@contextmanager
def command(body: str, delay: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A command that has begun with ``body``, in a session of its own."""
    code = BEGIN.replace("BODY", body.strip()).replace("DELAY", str(delay))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job of a shell, as the tests may be, hands down that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type]
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def rest_of(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=60)[1].splitlines()


def test_an_answer_comes_while_compiled_code_runs() -> None:
    with command(COMPILED) as process:
        time.sleep(0.2)  # from the line to the lock
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(ANSWER)
        answered = time.monotonic()
        assert rest_of(process) == ["interrupted"]
        assert time.monotonic() - answered > 1.0
        assert process.returncode == 130


@pytest.mark.parametrize(("body", "last"), [(SLOW_END, "cleaned up"), (STOPPED, None)])
def test_launchers_that_repeat_a_signal_do_not_break_off_the_end(
    body: str, last: str | None
) -> None:
    patient = """
    from pipeline.cli import interrupts
    interrupts.SAME_SECONDS = 20"""
    with command(patient + body, delay=0.5) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        lines = rest_of(process)
    assert process.returncode == 130
    if last is not None:
        assert lines[0].startswith(ANSWER)
        assert lines[1:] == [last, "interrupted"]
    else:
        assert lines[0].startswith("SIGINT: stopping after a checkpoint (a further Ctrl-C ends")
        assert lines[1:] == ["stopped after step 3"]


@pytest.mark.parametrize(
    ("body", "first"),
    [(SLOW_END, signal.SIGINT), (STOPPED, signal.SIGINT), (STOPPED, signal.SIGTERM)],
)
def test_a_second_one_ends_at_once(body: str, first: signal.Signals) -> None:
    with command(body, delay=30) as process:
        process.send_signal(first)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"{first.name}: stopping")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert rest_of(process) == ["ended at once"]
        assert time.monotonic() - sent < 20
        assert process.returncode == 130


def test_a_forked_process_does_not_answer_for_its_parent() -> None:
    body = """
    if os.fork() == 0:
        os.kill(os.getpid(), 2)
        time.sleep(60)
    _, status = os.wait()
    time.sleep(0.2)
    print("child", status, file=sys.stderr)"""
    with command(READY + body) as process:
        lines = rest_of(process)
    assert not any(line.startswith(ANSWER) for line in lines)
    assert process.returncode == 0
    assert lines[-1].startswith("child ")


def test_an_ignored_signal_stays_ignored() -> None:
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + BEGIN.replace(
        "BODY", "os.kill(os.getpid(), 2); print('on')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_signals_are_handed_on_once_to_a_command_that_is_run() -> None:
    inner = BEGIN.replace("BODY", STOPPED.strip()).replace("DELAY", "0.3")
    body = f"""
    import subprocess
    from pipeline.cli.interrupts import handing_on
    with (
        subprocess.Popen([sys.executable, "-c", {inner!r}], process_group=0) as process,
        handing_on(process.send_signal),
    ):
        print("ready", file=sys.stderr, flush=True)
        code = process.wait()
    print("code", code, file=sys.stderr)"""
    with command(body) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"  # the second of both
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        lines = rest_of(process)
    assert lines[0].startswith("SIGINT: stopping after a checkpoint")
    assert lines[1:] == ["stopped after step 3", "code 130"]
    assert process.returncode == 0


def test_while_a_command_imports_the_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(1)\n")
    (tmp_path / "own.py").write_text("import pipeline\nimport os\nos.kill(os.getpid(), 2)\n")
    for arguments, lines in ((["-m", "pipeline.inspect"], 1), ([str(tmp_path / "own.py")], 2)):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore
        )
        assert done.returncode == -signal.SIGINT
        assert (done.stderr == "interrupted\n") == (lines == 1)
        assert done.stderr.startswith("Traceback") == (lines == 2)
