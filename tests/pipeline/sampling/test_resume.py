"""Commands whose images may all exist already."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.cli.config_files import merge
from pipeline.sampling.batches import choose_labels, plan_batches
from pipeline.sampling.job import describe_images
from pipeline.sampling.outputs import FolderOutput
from pipeline.sampling.resume import info_of_complete_images
from pipeline.sampling.worker import SampleWorker
from pipeline.store import Store
from pipeline.train.local import train_here
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from tests.stores import tiny_run

BATCHES = plan_batches(4, 2)


@pytest.fixture(scope="module")
def checkpoint(random_store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    values: dict[str, Any] = {"steps": 1, "store": random_store.url, "checkpoint": {"every": 1}}
    train_here(RunConfig.model_validate(merge(tiny_run(), values)), folder)
    return str(folder / "checkpoint-000000001")


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_AUTOENCODER, tmp_path / "decoder"))


def test_images_are_complete_only_where_all_of_them_are_the_requested_ones(
    checkpoint: str, decoder: Path, tmp_path: Path
) -> None:
    config = SampleConfig.model_validate(
        {"num": 4, "batch_size": 2, "autoencoder": str(decoder), "sampler": {"steps": 2}}
    )
    place = str(tmp_path / "samples")
    worker, output = SampleWorker(), FolderOutput(place)
    info = describe_images(config, checkpoint, worker.load(config, checkpoint, "cpu", 1))
    output.open(info)

    def complete(config: SampleConfig) -> bool:
        found = info_of_complete_images(config, checkpoint, [FolderOutput(place)], BATCHES)
        assert found in (None, info)
        return found is not None

    for batch in BATCHES:
        assert not complete(config)
        labels = choose_labels("random", info.classes, 0, batch.first, batch.count)
        output.write(worker.draw(batch, labels, pngs=True))
    output.finish(BATCHES, choose_labels("random", info.classes, 0, 0, 4))
    assert complete(config)
    assert not complete(config.model_copy(update={"labels": "balanced"}))
    assert not complete(config.model_copy(update={"autoencoder": "demo"}))
    weights = next(decoder.glob("*.safetensors"))  # other weights under the same name
    save_file({name: 1.1 * w for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    assert not complete(config)
