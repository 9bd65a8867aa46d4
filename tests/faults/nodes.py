"""`python -m tests.faults.nodes`: two Ray nodes of one CPU each on this machine, until stdin ends.

Prints a line of JSON for each node that is up; a line on stdin requests another one. It is a
separate process, so that its children inherit the mark and the environment of one run.
"""

from __future__ import annotations

import json
import os
import sys

from ray.cluster_utils import Cluster

from tests.forks import WANTED, fork_workers

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main() -> None:
    if WANTED in os.environ:
        fork_workers()
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    _add(cluster)
    for _ in sys.stdin:
        _add(cluster)
    cluster.shutdown()


def _add(cluster: Cluster) -> None:
    node = cluster.add_node(**NODE)
    (raylet,) = node.all_processes["raylet"]
    print(json.dumps({"address": cluster.address, "raylet": raylet.process.pid}), flush=True)


if __name__ == "__main__":
    main()
