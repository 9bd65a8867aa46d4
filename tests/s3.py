"""A local S3 server that can be killed and restarted: SeaweedFS."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

WEED = Path(sys.executable).parent / "weed"
KEY = "haste-test-key"
SECRET = "hunter2/never+print=this"
"""Has the form of an AWS secret key. Tests search for it in all visible output."""

START_SECONDS = 60
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


def has_seaweedfs() -> bool:
    return WEED.is_file()


class SeaweedFS:
    """One ``weed server``: S3 on free ports of the loopback, with its data in a temporary folder.

    A context manager; inside it, ``s3://`` URLs work in this process and in later children. A Ray
    cluster that was started earlier needs ``runtime_env={"env_vars": environment}``.
    """

    def __init__(self) -> None:
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        self._buckets = 0
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> SeaweedFS:
        self._folder = Path(tempfile.mkdtemp(prefix="weed-"))
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._stack.callback(self._remove_sockets)
        self._stack.callback(self.kill)  # SIGTERM takes 17 seconds
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self._folder / "data").mkdir()
        self._stack.enter_context(_environment(self.environment))
        try:
            self.restart()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def bucket(self) -> str:
        """Create an empty bucket; returns its URL."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        self._client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def kill(self) -> None:
        """Send SIGKILL: transfers are interrupted, then connections are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start with the same ports and data; returns once it accepts writes (about 3 seconds)."""
        if self._process is not None:
            return
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(WEED), *self._arguments()],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                # the default is seven volumes per bucket
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            )
        self._wait()

    def _arguments(self) -> list[str]:
        return [
            "-logtostderr=true",  # otherwise its logs stay in /tmp
            "server",
            "-s3",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            f"-dir={self._folder}/data",
            f"-s3.config={self._folder}/s3.json",
            f"-s3.localSocket={self._folder}/s3.sock",
            f"-filer.localSocket={self._folder}/filer.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam=false",
            "-s3.autoCreateBucket=false",  # as on AWS
            "-master.electionTimeout=1s",  # otherwise a restarted master waits 17 s
            "-master.volumeSizeLimitMB=64",
            "-master.telemetry=false",
            "-volume.max=100",
            "-volume.preStopSeconds=0",
        ]

    def _client(self):  # type: ignore[no-untyped-def]
        """A botocore client, so that the fixture does not depend on the code under test."""
        config = Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
        session = botocore.session.Session()
        return session.create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=config,
        )

    def _wait(self) -> None:
        client = self._client()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                try:
                    client.put_object(Bucket="probe", Key="probe", Body=b"")
                except client.exceptions.NoSuchBucket:
                    client.create_bucket(Bucket="probe")
                client.put_object(Bucket="probe", Key="probe", Body=b"is it writable")
                return
            except (BotoCoreError, ClientError) as error:
                dead = self._process is None or self._process.poll() is not None
                if dead or time.monotonic() > deadline:
                    tail = (self._folder / "log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"SeaweedFS did not start ({error}):\n{tail}") from None
            time.sleep(0.1)

    def _remove_sockets(self) -> None:
        """Remove sockets that SIGKILL leaves behind; their folder is not configurable."""
        for port in self._ports.values():
            for path in glob.glob(f"/tmp/seaweedfs-*-{port}.sock"):
                Path(path).unlink(missing_ok=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Replace all ``AWS_`` variables by ``values``, and restore them afterwards."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    os.environ.update(values)
    S3FileSystem.clear_instance_cache()  # instances keep their first credentials
    try:
        yield
    finally:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                del os.environ[name]
        os.environ.update(before)
        S3FileSystem.clear_instance_cache()


def _free_ports(count: int) -> list[int]:
    """Free ports, all bound at the same time so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
