"""The examination: one actor on each node, and the checks that compare them."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cost_estimate.command import estimate_training
from pipeline.distributed.ray_cluster import ray_cluster
from pipeline.doctor.findings import (
    MIN_SHM,
    Answers,
    Failure,
    Finding,
    judge_clocks,
    judge_done,
    judge_free,
    judge_gpus,
    judge_read,
    judge_same,
    judge_versions,
)
from pipeline.doctor.probe import Probe
from pipeline.models.factory import make_student
from pipeline.storage.files import TEMPORARY, is_local, list_tree, open_url
from pipeline.storage.filesystem import with_absolute_paths
from pipeline.store import Store
from pipeline.store.layout import INDEX, MANIFEST
from pipeline.text import counted, describe_bytes
from schemas.doctor import DoctorConfig
from schemas.errors import UserError, plain_text
from schemas.fields import COMMITS

logger = logging.getLogger(__name__)

CLOCK_ROUNDS = 5
BYTES_PER_WEIGHT = 16
"""Bytes of a checkpoint per weight of the student: float32 weights, average and two moments."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster."""

    name: str
    ip: str
    cpus: float
    gpus: int
    probe: Any


def examine(config: DoctorConfig, *, run_known: bool) -> list[Finding]:
    """Examine the connected, or a private local, Ray cluster. ``run_known``: the options of the run
    are given, so that its needs are computed. Raises ``UserError`` for unusable options."""
    if config.store is None:
        raise UserError("--store is missing: the folder or URL of the store")
    config = with_absolute_paths(
        config, ["store", "output", "data.cache_dir"], folders=["extract.autoencoder"],
        weights=["extract.teacher.weights"],
    )  # fmt: skip
    store_url = str(config.store)
    store = Store.open(store_url) if Store.exists(store_url) else None
    with ray_cluster(config.ray_address), _probes() as nodes:
        logger.info(
            "examining %s: %g s at most for a check, ten times as long for loading models",
            counted(len(nodes), "node"),
            config.timeout,
        )
        return list(Examination(config, store, nodes, run_known).findings())


@contextmanager
def _probes() -> Iterator[list[Node]]:
    """An actor without resources on every node, so that busy nodes answer too."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = [node["NodeManagerAddress"] for node in alive]
    nodes = []
    for node, ip in zip(alive, names, strict=True):
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=here).remote()
        name = ip if names.count(ip) == 1 else f"{ip} {node['NodeID'][:6]}"
        resources = node["Resources"]
        gpus = int(resources.get("GPU", 0))
        nodes.append(Node(name, ip, resources.get("CPU", 0), gpus, probe))
    try:
        yield nodes
    finally:
        for one in nodes:
            with suppress(RayError):
                ray.kill(one.probe, no_restart=True)


class Examination:
    """All checks of one cluster."""

    def __init__(
        self, config: DoctorConfig, store: Store | None, nodes: list[Node], run_known: bool
    ) -> None:
        self.config = config
        self.store = store
        self.nodes = nodes
        self.run_known = run_known
        any_gpu = any(node.gpus for node in nodes)
        able = [node for node in nodes if (node.gpus if any_gpu else node.cpus)]
        self.workers = able or nodes
        """Nodes that training workers can run on; a head often has no resources."""
        self.here = Probe()

    def findings(self) -> Iterator[Finding]:
        yield from judge_versions(self._ask(lambda p: p.versions.remote()), self.here.versions())
        yield from judge_clocks({node.name: self._clock(node) for node in self.nodes})
        yield from self._room()
        yield from self._storage()
        yield from self._disks()
        yield from judge_gpus(
            self._ask(lambda p: p.gpus.remote()), {node.name: node.gpus for node in self.nodes}
        )
        yield from self._network()
        if self.config.models:
            yield from self._models()

    def _ask(
        self,
        call: Callable[[Any], Any],
        nodes: list[Node] | None = None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Answers of ``call(probe)``, made on all ``nodes`` at the same time."""
        asked = {node.name: call(node.probe) for node in nodes or self.nodes}
        deadline = time.monotonic() + (seconds or self.config.timeout)
        return {name: _answer(ref, deadline - time.monotonic()) for name, ref in asked.items()}

    def _clock(self, node: Node) -> tuple[float, float] | Failure:
        """Offset by the quickest of several answers, uncertain by half its time."""
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            answer = _answer(node.probe.now.remote(), self.config.timeout)
            if isinstance(answer, Failure):
                return answer
            uncertain = (time.time() - before) / 2
            if best is None or uncertain < best[1]:
                best = answer - before - uncertain, uncertain
        assert best is not None
        return best

    def _room(self) -> Iterator[Finding]:
        """Resources of all nodes for the workers of the run."""
        workers = self.config.workers
        any_gpu = any(node.gpus for node in self.nodes)
        gpus = workers.gpus_per_worker
        gpus = float(any_gpu) if gpus is None else gpus
        each = {"CPU": workers.cpus_per_worker, "GPU": gpus}
        have = {"CPU": sum(n.cpus for n in self.nodes), "GPU": sum(n.gpus for n in self.nodes)}
        fits = min(
            (int(have[name] // size) for name, size in each.items() if size), default=workers.count
        )
        found = f"room for {fits} workers of {workers.count}"
        least = workers.min_count or workers.count
        yield Finding("ok" if fits >= least else "fail", "workers", "cluster", found)

    def _storage(self) -> Iterator[Finding]:
        config, url = self.config, str(self.config.store)
        if self.store is None:
            yield Finding("note", "store read", "cluster", "no store yet: nothing to read")
        else:
            yield from judge_read(self._read_rates(self.store), self._need())
        reads_only = self.store is not None
        yield from judge_done(
            "store write",
            self._ask(lambda p: p.write.remote(url, "--store")),
            "conditional writes work",
            failure="note" if reads_only else "fail",
            advice=" (training only reads the store)" if reads_only else "",
        )
        output, what = config.output, "--output"
        writes = self._ask(lambda p: p.write.remote(output, what))
        yield from judge_done("output write", writes, "conditional writes work")
        if not any(isinstance(answer, Failure) for answer in writes.values()):
            yield from self._shared_output(output, what)

    def _shared_output(self, url: str, what: str) -> Iterator[Finding]:
        """All nodes see one folder, and exactly one of them wins a race for a name."""
        name = f"{TEMPORARY}doctor-{uuid.uuid4().hex}"
        claims = self._ask(lambda p: p.claim.remote(url, what, name))
        winners = [node for node, answer in claims.items() if answer is True]
        sees = self._ask(lambda p: p.sees.remote(url, what, name))
        self._ask(lambda p: p.remove.remote(url, what, name))
        blind = [node for node, answer in sees.items() if answer is not True]
        if len(winners) == 1 and not blind:
            yield Finding("ok", "output shared", "cluster", "one folder for all nodes")
            return
        found = f"{len(winners)} of {len(claims)} nodes made the same new file"
        advice = "use a folder that all nodes share, or a URL"
        yield Finding("fail", "output shared", "cluster", f"{found}: {advice}")

    def _read_rates(self, store: Store) -> Answers[float]:
        """Rates of all nodes that read at the same time, each beginning at another file."""
        files = _data_files(store, self.config)
        if not files:
            return {"cluster": Failure("the store holds no data yet")}
        seconds, threads = self.config.read_seconds, self.config.data.threads
        parts = {}
        for number, node in enumerate(self.workers):
            first = number * len(files) // len(self.workers)
            parts[node.name] = node.probe.read.remote(
                str(self.config.store), [*files[first:], *files[:first]], threads, seconds
            )
        limit = time.monotonic() + seconds + self.config.timeout
        return {name: _answer(ref, limit - time.monotonic()) for name, ref in parts.items()}

    def _need(self) -> float | None:
        """Bytes per second that a node's workers must read in Phase I, from ``--plan``: on this
        machine's GPU, or where the cluster has others, on the one that --plan assumes. None where
        the run or its size is not known."""
        if not (self.run_known and self.store is not None and self.config.alignment.active):
            return None
        config = self.config
        if not any(node.gpus for node in self.nodes) and config.plan.tflops is None:
            plan = config.plan.model_copy(update={"device": "cpu"})
            config = config.model_copy(update={"plan": plan})
        estimate = estimate_training(config)
        (cost,) = [cost for cost in estimate.costs if cost.exists]
        on_a_node = math.ceil(self.config.workers.count / len(self.workers))
        return float(cost.read_bytes_per_second_per_worker * on_a_node)

    def _disks(self) -> Iterator[Finding]:
        config = self.config
        if config.data.cache_dir is not None:
            folder = config.data.cache_dir
            answers = self._ask(lambda p: p.free_bytes.remote(folder), self.workers)
            need = config.data.cache_gb * 1e9
            yield from judge_free("cache disk", answers, need, "--data.cache-gb")
        checkpoint = float(_checkpoint_bytes(config))
        filesystem, _ = open_url(config.output, what="--output")
        if is_local(filesystem):
            output, count = config.output, config.checkpoint.keep + 1
            answers = self._ask(lambda p: p.free_bytes.remote(output), self.workers)
            what = f"{count} checkpoints of {describe_bytes(checkpoint)}"
            yield from judge_free("checkpoint disk", answers, count * checkpoint, what)
        else:
            folder = self.here.temporary_folder()
            answers = self._ask(lambda p: p.free_bytes.remote(folder), self.workers)
            yield from judge_free("checkpoint disk", answers, checkpoint, "a checkpoint on its way")
        shm = self._ask(lambda p: p.shared_memory.remote())
        yield from judge_free("shm", shm, MIN_SHM, "/dev/shm (--shm-size, or an emptyDir)")

    def _network(self) -> Iterator[Finding]:
        nodes = self.workers
        if len(nodes) < 2:
            yield Finding("note", "all-reduce", "cluster", "one node: nothing to measure")
            return
        backend = "nccl" if all(node.gpus for node in nodes) else "gloo"
        port = _answer(nodes[0].probe.open_port.remote(), self.config.timeout)
        if isinstance(port, Failure):
            yield Finding("fail", "all-reduce", nodes[0].name, port.message)
            return
        size, limit = self.config.all_reduce_mb, self.config.timeout
        refs = {
            node.name: node.probe.all_reduce.remote(
                f"{nodes[0].ip}:{port}", rank, len(nodes), backend, size, limit
            )
            for rank, node in enumerate(nodes)
        }
        deadline = time.monotonic() + limit
        for name, ref in refs.items():
            answer = _answer(ref, deadline - time.monotonic())
            if isinstance(answer, Failure):
                yield Finding("fail", "all-reduce", name, f"{backend}: {answer.message}")
            else:
                found = f"{backend}, {len(nodes)} nodes: {describe_bytes(answer)}/s"
                yield Finding("ok", "all-reduce", name, found)

    def _models(self) -> Iterator[Finding]:
        if self.store is None:
            extract = self.config.extract
            teacher, layers = extract.teacher.model_dump(mode="json"), list(extract.layers)
            autoencoder, resolution = extract.autoencoder, extract.resolution
        else:
            manifest = self.store.manifest
            _, stream = manifest.teacher_stream()
            info = stream.teacher
            fields = {"model", "weights", "seed", "image_size", "model_args"}
            teacher = {k: v for k, v in info.model_dump(mode="json").items() if k in fields}
            layers = list(info.layers)
            autoencoder, resolution = manifest.autoencoder.name, manifest.resolution
        seconds = 10 * self.config.timeout
        loaded = self._ask(
            lambda p: p.load_teacher.remote(teacher, resolution, layers), self.workers, seconds
        )
        yield from judge_same("teacher", loaded, "loaded, weights")
        loaded = self._ask(
            lambda p: p.load_autoencoder.remote(autoencoder, resolution), self.workers, seconds
        )
        yield from judge_same("autoencoder", loaded, "loaded, latents of")


def _answer(ref: Any, seconds: float) -> Any:
    """The result of a call, or its failure in one line."""
    try:
        return ray.get(ref, timeout=max(0.1, seconds))
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        name = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
        return Failure(f"{name}{plain_text(str(cause))[:300]}")
    except ray.exceptions.GetTimeoutError:
        return Failure(f"no answer within {max(0.1, seconds):.0f} s")
    except RayError as error:
        return Failure(f"{type(error).__name__}: {plain_text(str(error))[:300]}")


def _data_files(store: Store, config: DoctorConfig) -> list[str]:
    """Paths of the store's data that the run reads, all of one stream after the other's in turn."""
    streams = {"latents"}
    if config.alignment.active:
        named = str(config.alignment.stream)
        known = named in store.manifest.streams
        streams.add(named if known else store.manifest.teacher_stream()[0])
    if config.student.family == "MMDiT":
        streams.add(store.manifest.text_stream(config.diffusion.text_stream)[0])
    left_out = (MANIFEST, INDEX, "zarr.json")
    root = store.root.rstrip("/")
    return [
        path
        for path, size in sorted(list_tree(store.filesystem, store.root).items())
        if size
        and path[len(root) :].strip("/").split("/")[0] in streams - {COMMITS}
        and not path.endswith(left_out)
    ]


def _checkpoint_bytes(config: DoctorConfig) -> int:
    """Size of a checkpoint of the student. Its projector is small and left out."""
    with torch.device("meta"):
        student = make_student(config.student)
    return BYTES_PER_WEIGHT * sum(one.numel() for one in student.parameters())
