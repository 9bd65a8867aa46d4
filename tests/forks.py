"""Ray workers as forks of one process that has imported the heavy packages which they need.

A worker that encodes or trains imports for five seconds of CPU time; a training has ten workers. A
fork runs Ray's own program of workers, with arguments, environment, streams and process group of
its own. Ray itself is imported by every fork, because its library reads variables of the job when
it is loaded, and copies of its random numbers would be names of the same objects.

As a program:

    python forks.py --serve ADDRESS [--at-once]   # the server, until its standard input ends
    python forks.py --command WORDS   # as `python WORDS`, but its clusters fork their workers
    python forks.py WORDS             # what such a cluster starts in place of a worker
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

ADDRESS = "HASTE_TEST_FORKS"
"""Variable with the address of the server."""
WANTED = "HASTE_TEST_FORK_WORKERS"
"""Variable that is set where nodes may fork, although the mark of a fault's run finds no forks."""
COMMAND = (__file__, "--command")
"""Words that go before a command of Python's."""
PACKAGES = (
    *("torch.distributed.fsdp", "torch._dynamo", "timm", "s3fs"),
    *("diffusers.models.autoencoders.autoencoder_kl", "pandas", "pyarrow.dataset"),
    *("pyarrow.parquet", "aiohttp", "google.protobuf", "jsonschema", "requests", "yaml"),
)
"""Packages that no test of a cluster changes, and Ray's own dependencies."""
MAX_REQUEST = 1 << 18


def fork_workers() -> None:
    """Let clusters that this process starts from now on fork their workers, without the processes
    of Ray that watch logs, scale clusters and report usage, which no test needs."""
    from ray._private import services
    from ray._private.parameter import RayParams

    original, start_api_server = RayParams.__init__, services.start_api_server

    def changed(self: RayParams, *args: Any, **values: Any) -> None:
        original(self, *args, **values)
        self.setup_worker_path = self.setup_worker_path or __file__
        self.include_log_monitor, self.no_monitor = False, True

    def api_server(include_dashboard: bool | None, *args: Any, **values: Any) -> Any:
        if include_dashboard:
            return start_api_server(include_dashboard, *args, **values)
        return "", None

    RayParams.__init__, services.start_api_server = changed, api_server


def start_worker(words: list[str]) -> int:
    """Run a worker, whose program and arguments these are, as a fork of the server; returns when it
    has ended."""
    kept = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":  # as Ray's setup_worker.py does
            os.environ.update(json.loads(value or "{}").get("env_vars") or {})
        elif name != "--language":
            kept.append(word)
    values = {"words": kept, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[ADDRESS])
        socket.send_fds(connection, [json.dumps(values).encode()], [0, 1, 2])
        connection.recv(1)  # ends with the worker, which keeps the other end open
    return 0


def serve(address: str, at_once: bool) -> NoReturn:
    """Start workers until the standard input ends. The packages are imported for the first one,
    or, with ``at_once``, before."""
    import select
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for workers
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        print(flush=True)
        imported = at_once
        if at_once:
            _import(PACKAGES)
        while True:
            ready, _, _ = select.select([sys.stdin, listener], [], [])
            if listener not in ready:
                os._exit(0)
            connection, _ = listener.accept()
            data, files, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
            if not imported and data:
                _import(PACKAGES)
                imported = True
            if data and os.fork() == 0:
                listener.close()
                _run(json.loads(data), files)
            for file in files:
                os.close(file)
            connection.close()


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with suppress(Exception):  # missing or broken; without this server, clusters would hang
            __import__(name)
    assert "ray" not in sys.modules
    gc.freeze()  # a collection in a fork would write to, and so copy, all memory shared with this


def _run(values: dict[str, Any], files: list[int]) -> NoReturn:
    """End this process as ``python WORDS`` would."""
    import runpy
    import signal
    import traceback

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        for number in range(3):
            os.dup2(files[number], number)
            os.close(files[number])
        os.environ.clear()
        os.environ.update(values["environment"])
        os.chdir(values["folder"])
        sys.argv[:] = values["words"]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run_command(words: list[str]) -> None:
    import runpy

    fork_workers()
    sys.argv[:] = words[1:] if words[0] in ("-m", "-c") else words
    sys.path[0] = "" if words[0] in ("-m", "-c") else os.path.dirname(words[0])
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[0] = "-c"
        exec(words[1], sys.modules["__main__"].__dict__)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3:] == ["--at-once"])
    if sys.argv[1] == "--command":
        _run_command(sys.argv[2:])
    else:
        sys.exit(start_worker(sys.argv[1:]))
