"""Ray nodes as processes of this machine, each of one CPU, that can be lost, joined and slowed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from tests.cluster.network import Loopback
from tests.faults.processes import descendants, send
from tests.faults.timeouts import HarnessError, WaitTimeoutError, wait_for

ROOT = Path(__file__).parents[2]
NODE_SECONDS = 120.0
NODE_FAILURES = 8
"""Starts of nodes that may fail at each call: Ray gives one up that took more than 30 seconds."""
AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
"""Nodes that start at the same time: the daemons of one take 15 seconds of a core."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Node:
    """A Ray node: one process, whose descendants are its daemons and workers."""

    def __init__(
        self, number: int, address: str, process: subprocess.Popen[bytes], log: Path
    ) -> None:
        self.number = number
        self.address = address
        self.process = process
        self.log = log

    def starts(self) -> bool:
        """Wait until Ray runs on it; False: it ended before, or takes too long."""

        def ended_or_runs() -> bool:
            return self.process.poll() is not None or self.runs()

        with suppress(WaitTimeoutError):
            wait_for(ended_or_runs, NODE_SECONDS, "a node")
        return self.process.poll() is None and self.runs()

    def runs(self) -> bool:
        return b"Ray runtime started" in self.log.read_bytes()

    def kill(self) -> None:
        """End everything on it at once, as a machine that is switched off."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            send(pid, signal.SIGKILL)
        self.process.wait()


class EmulatedCluster:
    """A head without CPUs, and nodes that come and go. A context manager."""

    def __init__(self, folder: Path, variables: Mapping[str, str], network: Loopback) -> None:
        self.variables = dict(variables)
        """Environment variables of all processes."""
        self.network = network
        self.nodes: list[Node] = []
        self._folder = folder
        self._stack = ExitStack()
        self._numbers = iter(range(1, 200))

    def __enter__(self) -> EmulatedCluster:
        self._stack.enter_context(self.network)
        with socket.socket() as probe:
            probe.bind((self.network.head, 0))
            port = probe.getsockname()[1]
        self.address = f"{self.network.head}:{port}"
        words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        head = self._start(0, self.network.head, [], words, {})
        self._stack.callback(head.kill)
        if not head.starts():
            self._stack.close()
            raise HarnessError(f"the head did not start: {head.log.read_text()[-1500:]}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self.nodes:
            self.lose(self.nodes[0])
        self._stack.close()

    def join(self, count: int = 1) -> None:
        """Start ``count`` more nodes and wait until the cluster has them."""
        failures = 0
        while count:
            begun = [self._begin() for _ in range(min(count, AT_ONCE))]
            failed = [node for node in begun if not node.starts()]
            for node in failed:
                self.lose(node)
            count -= len(begun) - len(failed)
            failures += len(failed)
            if failures > NODE_FAILURES:
                raise HarnessError(f"a node did not start: {failed[0].log.read_text()[-1500:]}")

    def _begin(self) -> Node:
        number = next(self._numbers)
        address, prefix, variables = self.network.add(number)
        words = [f"--address={self.address}", "--num-cpus=1"]
        words += ["--resources", json.dumps({_resource(number): 1})]
        node = self._start(number, address, prefix, words, variables)
        self.nodes.append(node)
        return node

    def lose(self, node: Node) -> None:
        self.nodes.remove(node)
        node.kill()
        self.network.remove(node.number)

    def announce(self, node: Node, seconds: float) -> None:
        """Tell Ray that a node will be lost, as its integrations for spot machines do."""
        client = GcsClient(address=self.address)
        name = _resource(node.number)
        (node_id,) = [
            node_id
            for node_id, info in client.get_all_node_info().items()
            if name in info.resources_total
        ]
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline = int((time.time() + seconds) * 1000)
        accepted, refusal = client.drain_node(node_id.hex(), reason, "drill", deadline)
        if not accepted:
            raise HarnessError(f"no notice: {refusal}")

    def _start(
        self,
        number: int,
        address: str,
        prefix: list[str],
        words: list[str],
        variables: Mapping[str, str],
    ) -> Node:
        command = [*prefix, *RAY, "start", "--block", f"--node-ip-address={address}", *words]
        command += [f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
        log = self._folder / f"node-{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return Node(number, address, process, log)


def _resource(number: int) -> str:
    """Resource that only node ``number`` has, by which it is found."""
    return f"node-{number}"
