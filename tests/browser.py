"""Headless Chromium, controlled over a pipe: messages, measurements and screenshots of a page."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_SECONDS = 60


def find_chromium() -> str | None:
    """Path of an installed browser, None without one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Page:
    """A tab; ``messages`` holds console output, exceptions and requests to the network."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._session: str | None = None
        self._buffer = b""
        self._count = 0
        self._events: list[str] = []
        self.messages: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, *, width: int, dark: bool = False, height: int = 844) -> None:
        """Load a file on a screen of ``width`` x ``height`` pixels, a phone's below 600."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 600 else 1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self._call("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive_message()

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write a PNG file of the complete page, including what is below the screen."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        call = self._count
        message: dict[str, Any] = {"id": call, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while True:
            answer = self._receive_message()
            if answer.get("id") == call:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive_message(self) -> dict[str, Any]:
        """Read the browser's next message; record its events."""
        while b"\0" not in self._buffer:
            data = os.read(self._receive, 1 << 16)
            if not data:
                raise RuntimeError("the browser has exited")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.messages.append(json.dumps(params)[:500])
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "file:")):
                self.messages.append(f"requested {url}")
        return message


@contextmanager
def browser_page(executable: str) -> Iterator[Page]:
    """A tab of a new browser process, which is stopped at the end."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()
    # bash and the browser share a process group: Debian's `chromium` is a script
    with tempfile.TemporaryDirectory(prefix="haste-browser-", ignore_cleanup_errors=True) as home:
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={home}"]
        process = subprocess.Popen(
            ["bash", "-c", script, executable, *options],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(send, receive)
        finally:
            os.close(send)  # the browser exits when the pipe is closed
            try:
                process.wait(TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            os.close(receive)
