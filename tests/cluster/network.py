"""Network namespaces of the nodes of an emulated cluster, joined by a bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

from tests.faults.timeouts import HarnessError


class Loopback:
    """All nodes share this machine's loopback: no link can be slowed by itself."""

    head = "127.0.0.1"

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, number: int) -> tuple[str, list[str], dict[str, str]]:
        """Address of a new node, words before its commands, its environment variables."""
        return "127.0.0.1", [], {}

    def remove(self, number: int) -> None:
        pass

    def slow(self, number: int, milliseconds: float) -> bool:
        """Delay what the node sends; 0: as before. False where that is not possible."""
        return False


class Namespaces(Loopback):
    """A network namespace for each node; the head is in that of this process. Needs root."""

    def __init__(self) -> None:
        number = os.getpid()
        self.name = f"hc{number % 100_000}"
        self.subnet = f"10.{200 + number % 50}.{number // 50 % 250}"
        self.head = f"{self.subnet}.254"
        self._made: set[int] = set()

    def __enter__(self) -> Namespaces:
        _call("ip", "link", "add", self.name, "type", "bridge")
        _call("ip", "address", "add", f"{self.head}/24", "dev", self.name)
        _call("ip", "link", "set", self.name, "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in list(self._made):
            self.remove(number)
        _call("ip", "link", "delete", self.name)

    def add(self, number: int) -> tuple[str, list[str], dict[str, str]]:
        inside, outside, address = self._names(number)
        self._made.add(number)
        _call("ip", "netns", "add", inside)
        peer = ["type", "veth", "peer", "name", "eth0", "netns", inside]
        _call("ip", "link", "add", outside, *peer)
        _call("ip", "link", "set", outside, "master", self.name, "up")
        for words in (
            ["link", "set", "lo", "up"],
            ["link", "set", "eth0", "up"],
            ["address", "add", f"{address}/24", "dev", "eth0"],
            ["route", "add", "default", "via", self.head],
        ):
            _call("ip", "-n", inside, *words)
        # gloo would take the address that the machine's name has, which is not in the namespace
        return address, ["ip", "netns", "exec", inside], {"GLOO_SOCKET_IFNAME": "eth0"}

    def remove(self, number: int) -> None:
        inside, outside, _ = self._names(number)
        self._made.discard(number)
        subprocess.run(["ip", "link", "delete", outside], capture_output=True, check=False)
        _call("ip", "netns", "delete", inside)

    def slow(self, number: int, milliseconds: float) -> bool:
        inside = self._names(number)[0]
        rule = ["netem", "delay", f"{milliseconds}ms"] if milliseconds else []
        action = "replace" if milliseconds else "delete"
        command = ["tc", "-n", inside, "qdisc", action, "dev", "eth0", "root", *rule]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _names(self, number: int) -> tuple[str, str, str]:
        """Namespace, its link on the bridge, and its address."""
        return f"{self.name}-{number}", f"{self.name}.{number}", f"{self.subnet}.{number}"


def unavailable() -> str | None:
    """Reason why this machine cannot have namespaces; None: it can."""
    if shutil.which("ip") is None:
        return "ip is not installed (apt-get install iproute2)"
    try:
        with Namespaces() as network:
            network.add(1)
    except HarnessError as error:
        return str(error)
    return None


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(f"{' '.join(command)}: {done.stderr.strip()}")
