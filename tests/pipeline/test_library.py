"""``open_store``: samples, targets and batches of a store in plain Python."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.examples import plain_loop
from pipeline import library, open_store
from pipeline.library import OpenStore
from pipeline.store import StreamReader
from pipeline.targets.sources import Wanted, read_targets
from schemas.errors import UserError
from tests.stores import make_random_store

ROOT = Path(__file__).parents[2]
COUNT = 22


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> OpenStore:
    """Shards of 8, 8 and 6 samples."""
    folder = tmp_path_factory.mktemp("store") / "store"
    made = make_random_store(folder, COUNT, 8)
    return open_store(made.url)


def test_samples_are_those_of_the_shards(store: OpenStore) -> None:
    assert len(store) == COUNT
    assert (store.num_classes, store.image_size, store.latent_shape) == (5, 64, (4, 8, 8))
    columns = StreamReader(store.store, "latents").read(np.array([2]), np.array([1]))
    for index in (17, 17 - COUNT):
        sample = store[index]
        assert sample.key == store.store.record(2).keys[1]
        assert sample.label == columns["label"][0]
        expected = torch.from_numpy(columns["mean"][0]).float() * 0.5  # the scaling factor
        assert torch.equal(sample.latent, expected)
    assert len({sample.key for sample in store}) == COUNT  # the loop ends
    with pytest.raises(IndexError, match="samples 0 to 21, not 22"):
        store[COUNT]


def test_targets_are_those_of_the_losses(store: OpenStore) -> None:
    found = store.targets([3, 17], layers=(3, 1))
    rows = np.array([0, 2]), np.array([3, 1])
    expected = read_targets(store.store, *rows, Wanted(True, (3, 1), 3))
    assert torch.equal(found.features, expected.features)  # type: ignore[arg-type]
    assert torch.equal(found.attention, expected.attention)  # type: ignore[arg-type]
    assert torch.equal(store.targets([17 - COUNT]).features, found.features[1:])  # type: ignore
    for outside in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match=f"samples 0 to 21, not {outside}"):
            store.targets([3, outside])
    assert store.targets([0], features=False).features is None
    with pytest.raises(UserError, match=r"lacks teacher layer 0: it has 1, 2, 3"):
        store.targets([0], layers=[0, 1])


def test_batches_in_the_stored_order(store: OpenStore) -> None:
    batches = store.batches(8, shuffle=False, layers=(2,))
    assert len(batches) == 3
    found = list(batches)
    assert np.concatenate([b.indices for b in found]).tolist() == list(range(COUNT))
    last = found[-1]
    assert last.latents.shape == (6, 4, 8, 8)
    assert last.attention is not None
    assert last.features is not None
    assert torch.equal(last.features, store.targets(range(16, 22)).features)  # type: ignore[arg-type]
    assert last.labels.tolist() == [store[i].label for i in range(16, 22)]
    assert len(list(store.batches(8, shuffle=False, drop_last=True))) == 2
    # drawn around the mean, with the noise of the epoch and step
    mean = torch.stack([store[i].latent for i in range(8)])
    assert 0 < (found[0].latents - mean).abs().max() < 20
    assert torch.equal(next(iter(batches)).latents, found[0].latents)


def test_epochs_are_permutations_that_differ(store: OpenStore) -> None:
    batches = store.batches(4, features=False)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(np.concatenate([b.indices for b in batches]).tolist())
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(COUNT))
    assert sorted(orders[1]) == list(range(COUNT))
    other = np.concatenate([b.indices for b in store.batches(4, seed=1)]).tolist()
    assert other != orders[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_an_epoch(store: OpenStore, shuffle: bool) -> None:
    """Three processes: 22 samples in batches of 3 x 4, the last one filled up to 3 x 4."""
    ranks = [
        list(store.batches(4, shuffle=shuffle, rank=rank, world_size=3, features=False))
        for rank in range(3)
    ]
    assert [[len(b.indices) for b in batches] for batches in ranks] == [[4, 4]] * 3
    together = [
        np.concatenate([batches[step].indices for batches in ranks]).tolist() for step in range(2)
    ]
    assert sorted(set(together[0] + together[1])) == list(range(COUNT))
    assert together[1][-2:] == together[0][:2]
    if not shuffle:
        assert together[0] == list(range(12))
    assert not torch.equal(ranks[0][0].latents, ranks[1][0].latents)


def test_wrong_requests_are_refused(store: OpenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no store"):
        open_store(str(tmp_path))
    with pytest.raises(UserError, match="rank 2 of 2"):
        store.batches(4, rank=2, world_size=2)
    with pytest.raises(UserError, match="batch_size 0"):
        store.batches(0)


def test_the_example_of_the_documentation_runs(
    store: OpenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """As printed, but for the place, size and layers of the store."""
    example = textwrap.dedent((library.__doc__ or "").split("\n\n", 1)[1].split("\n``")[0])
    held = store.store.manifest.teacher_stream(None)[1].teacher.layers
    for printed, own in (
        ("runs/cats/store", store.store.url),
        ("batches(64,", "batches(8,"),
        ("(9, 11)", str(tuple(held))),
    ):
        assert example.count(printed) == 1
        example = example.replace(printed, own)
    losses: list[float] = []
    names: dict[str, Any] = {"mine": lambda *tensors: losses.append(len(tensors))}
    exec(example, names)
    assert losses == [4] * 10 * len(names["batches"])
    assert capsys.readouterr().out.startswith(f"{len(store)} ")
    assert names["sample"].latent.shape == store.latent_shape


def test_leaving_an_iteration_early_ends_its_thread(store: OpenStore) -> None:
    for _ in store.batches(2):
        break
    assert len(list(store.batches(2, features=False))) == 11


def test_import_of_the_package_is_light() -> None:
    code = "import pipeline, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("shuffle", [[], ["--no-shuffle"]])
def test_the_plain_loop_learns(
    store: OpenStore, shuffle: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    means = plain_loop.main([store.store.url, "--epochs", "6", "--batch-size", "4", *shuffle])
    assert means[-1] < means[0] - 0.1
    assert capsys.readouterr().out.count("over 6 batches") == 6


@pytest.mark.slow
def test_the_plain_loop_runs_with_two_processes(store: OpenStore) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "jobs/examples/plain_loop.py", store.store.url, "--batch-size", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over 3 batches") == 2
