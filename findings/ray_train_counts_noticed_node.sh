#!/usr/bin/env bash
# Ray 2.60.0: an elastic Ray Train run waits for a node whose loss was announced.
#
# Documented: a node that is drained with the reason "preemption" gets no new tasks or actors
# (https://docs.ray.io/en/latest/ray-core/fault_tolerance/nodes.html), and an elastic run, ScalingConfig
# (num_workers=(1, 2)), goes on with the workers that there are.
#
# Seen: two nodes of one CPU each, a worker on both; the second node gets a notice with a deadline and is
# gone at the deadline. The run does not go on with one worker at once: a group of two workers is
# asked for again, one of which has no place, and only when the wait for its placement has ended, after
# a minute or more, does the run go on with one:
#
#     ray 2.60.0: 1 worker(s) again 79 s after the node was gone
#
# Exit code 0: as described (more than 30 s without a worker); 1: it has changed.
set -euo pipefail

work=$(mktemp -d /tmp/finding.XXXXXX)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ray[train]==2.60.0"
export HOME=$work/home PATH=$work/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=$work
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
mkdir "$HOME"

cat >"$work/notice.py" <<'PYTHON'
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

GRACE = 10  # seconds between notice and loss
NODE = {"object_store_memory": 80 << 20}
folder = Path(sys.argv[1])
starts = folder / "starts"


def train():
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        with starts.open("a") as file:
            file.write(f"{time.time()} {context.get_world_size()}\n")
    while not (folder / "end").exists():
        time.sleep(0.2)


def started():
    return [line.split() for line in starts.read_text().splitlines()] if starts.exists() else []


def wait(number):
    until = time.time() + 300
    while len(started()) < number:
        if time.time() > until:
            print(f"the worker group was started {len(started())} times in 300 s")
            os._exit(1)
        time.sleep(0.1)


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
cluster.add_node(num_cpus=1, **NODE)
second = cluster.add_node(num_cpus=1, resources={"second": 1}, **NODE)
ray.init(address=cluster.address, log_to_driver=False)
trainer = DataParallelTrainer(
    train,
    scaling_config=ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
    run_config=RunConfig(name="run", storage_path=str(folder)),
)
threading.Thread(target=trainer.fit, daemon=True).start()
wait(1)
time.sleep(3)

(node,) = [one["NodeID"] for one in ray.nodes() if "second" in one["Resources"]]
deadline = time.time() + GRACE
accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
    node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int(deadline * 1000)
)
assert accepted, why
time.sleep(max(0.0, deadline - time.time()))
cluster.remove_node(second, allow_graceful=False)
gone = time.time()
wait(2)
at, workers = started()[-1]
seconds = float(at) - gone
print(f"ray {ray.__version__}: {workers} worker(s) again {seconds:.0f} s after the node was gone")
(folder / "end").touch()
time.sleep(1)
sys.stdout.flush()
os._exit(0 if seconds > 30 else 1)
PYTHON

if python "$work/notice.py" "$work" >"$work/out" 2>"$work/log"; then
    grep "^ray " "$work/out"
    echo "as described: the run waits for a node whose loss was announced"
else
    tail -n 20 "$work/out" "$work/log"
    echo "changed: the run goes on at once, or in another way"
    exit 1
fi
