"""Observations of one node. They run in an actor on the node, and in tests without Ray."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipeline
from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.storage.conditional import write_new
from pipeline.storage.files import TEMPORARY, exists, open_url, read_bytes, remove
from pipeline.storage.retry import RETRY_VARIABLE
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import TeacherConfig

COMPARED = ("torch", "ray", "numpy", "timm", "diffusers", "numcodecs", "zarr", "pydantic", "s3fs")
"""Packages whose versions must be equal on all nodes, besides Python and this project's source."""
RETRY_SECONDS = 20.0
"""Seconds for which an examination retries storage: a node that cannot reach it is found soon."""
SHM = Path("/dev/shm")


class Probe:
    """Looks at the node that it runs on. Methods raise ``UserError`` or any other error."""

    def __init__(self) -> None:
        os.environ.setdefault(RETRY_VARIABLE, str(RETRY_SECONDS))

    def now(self) -> float:
        return time.time()

    def versions(self) -> dict[str, str]:
        """Versions of Python and packages, and a digest of the project's source."""
        found = {"python": platform.python_version(), "pipeline": source_digest()}
        for name in COMPARED:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "missing"
        return found

    def free_bytes(self, folder: str) -> int:
        """Free bytes of the disk that would hold ``folder``, which need not exist yet; a folder
        that does is writable."""
        path = Path(folder).absolute()
        while not path.exists():
            path = path.parent
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"'{path}' is not writable")
        return shutil.disk_usage(path).free

    def temporary_folder(self) -> str:
        return tempfile.gettempdir()

    def shared_memory(self) -> int:
        """Free bytes of /dev/shm."""
        return shutil.disk_usage(SHM).free

    def gpus(self) -> list[str]:
        """Names of the GPUs, each of which has computed a product."""
        names = []
        for index in range(torch.cuda.device_count()):
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones)[0, 0]) != 64:
                raise UserError(f"GPU {index} computes wrong numbers")
            names.append(torch.cuda.get_device_name(index))
        return names

    def read(self, url: str, paths: Sequence[str], threads: int, seconds: float) -> float:
        """Bytes per second of reading whole files one after the other for ``seconds``, by
        ``threads`` threads."""
        filesystem, _ = open_url(url, what="--store")
        source = cycle(paths)
        start = time.perf_counter()

        def work() -> int:
            count = 0
            while not count or time.perf_counter() - start < seconds:
                count += len(read_bytes(filesystem, next(source)))
            return count

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work) for _ in range(threads)]
            total = sum(future.result() for future in futures)
        return total / (time.perf_counter() - start)

    def write(self, url: str, what: str) -> None:
        """Make a file, fail to make it again, read it and remove it."""
        filesystem, root = open_url(url, what=what)
        path = f"{root}/{TEMPORARY}doctor-{socket.gethostname()}-{os.getpid()}"
        data = os.urandom(4096)
        created = False
        try:
            created = write_new(filesystem, path, data)
            if not created:
                raise UserError(f"'{path}' exists")
            if write_new(filesystem, path, b"another"):
                raise UserError("a file that exists was written again: no conditional writes")
            if read_bytes(filesystem, path) != data:
                raise UserError("other bytes were read than written")
        finally:
            if created:
                remove(filesystem, path)

    def claim(self, url: str, what: str, name: str) -> bool:
        """Try to be the only node that makes the file ``name``."""
        filesystem, root = open_url(url, what=what)
        return write_new(filesystem, f"{root}/{name}", socket.gethostname().encode())

    def sees(self, url: str, what: str, name: str) -> bool:
        filesystem, root = open_url(url, what=what)
        return exists(filesystem, f"{root}/{name}")

    def remove(self, url: str, what: str, name: str) -> None:
        filesystem, root = open_url(url, what=what)
        remove(filesystem, f"{root}/{name}")

    def load_teacher(self, config: dict[str, Any], resolution: int, layers: list[int]) -> str:
        """Digest of the loaded weights."""
        teacher = Teacher(
            TeacherConfig.model_validate(config), resolution=resolution, layers=layers
        )
        return teacher.weights_sha256[:12]

    def load_autoencoder(self, name: str, resolution: int) -> str:
        """Shape of the latents that the loaded autoencoder makes."""
        info = Autoencoder(name).info(resolution)
        return "x".join(map(str, info.latent_shape))

    def open_port(self) -> str:
        """Address for ``all_reduce``, of this node as others reach it."""
        with socket.socket() as one:
            one.bind(("", 0))
            return str(one.getsockname()[1])

    def all_reduce(
        self, address: str, rank: int, world_size: int, backend: str, megabytes: float, limit: float
    ) -> float:
        """Bytes per second that each node sends (and receives) in a ring that sums tensors of
        ``megabytes`` over all nodes: 2 (n - 1) / n of the tensor, as NCCL's tests count them."""
        device = torch.device("cuda:0" if backend == "nccl" else "cpu")
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=limit),
        )
        try:
            values = torch.ones(int(megabytes * 1e6) // 4, device=device)
            dist.all_reduce(values)  # connects
            if float(values[-1]) != world_size:
                raise UserError(f"the sum of {world_size} ones was {float(values[-1]):g}")
            start, rounds = time.perf_counter(), 3
            for _ in range(rounds):
                dist.all_reduce(values)
            float(values[0])  # waits for the device
            seconds = (time.perf_counter() - start) / rounds
        finally:
            dist.destroy_process_group()
        return 2 * (world_size - 1) / world_size * values.nbytes / seconds


def source_digest() -> str:
    """SHA-256, shortened, of the names and contents of the project's Python files."""
    root = Path(next(iter(pipeline.__path__))).parent
    digest = hashlib.sha256()
    for folder in ("pipeline", "schemas"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
