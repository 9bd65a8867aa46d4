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
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from tests.cluster.network import Loopback
from tests.faults.processes import descendants, send
from tests.faults.timeouts import HarnessError, wait_for

ROOT = Path(__file__).parents[2]
NODE_SECONDS = 120.0
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Node:
    """A Ray node: one process, whose descendants are its daemons and workers."""

    def __init__(self, number: int, address: str, process: subprocess.Popen[bytes]) -> None:
        self.number = number
        self.address = address
        self.process = process

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
        self._log = (folder / "nodes.log").open("wb")
        self._stack = ExitStack()
        self._numbers = iter(range(1, 200))

    def __enter__(self) -> EmulatedCluster:
        self._stack.enter_context(self._log)
        self._stack.enter_context(self.network)
        with socket.socket() as probe:
            probe.bind((self.network.head, 0))
            port = probe.getsockname()[1]
        self.address = f"{self.network.head}:{port}"
        words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        head = self._start([], self.network.head, words, {})
        self._stack.callback(Node(0, self.network.head, head).kill)
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

    def join(self) -> Node:
        """Start another node and wait until the cluster has it."""
        number = next(self._numbers)
        address, prefix, variables = self.network.add(number)
        words = [f"--address={self.address}", "--num-cpus=1"]
        words += ["--resources", json.dumps({_resource(number): 1})]
        node = Node(number, address, self._start(prefix, address, words, variables))
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
        self, prefix: list[str], address: str, words: list[str], variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        command = [*prefix, *RAY, "start", "--block", f"--node-ip-address={address}", *words]
        command += [f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
        offset = self._log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        log = Path(self._log.name)

        def started() -> bool:
            if process.poll() is not None:
                raise HarnessError(f"a node did not start: {log.read_text()[-1500:]}")
            return b"Ray runtime started" in log.read_bytes()[offset:]

        wait_for(started, NODE_SECONDS, "a node")
        self._log.seek(0, os.SEEK_END)
        return process


def _resource(number: int) -> str:
    """Resource that only node ``number`` has, by which it is found."""
    return f"node-{number}"
