"""Two extractions or conversions at once: one of two different ones is refused, both of two equal
ones complete, and of two added streams none is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert import convert
from pipeline.convert import job as convert_job
from pipeline.datasets import Listing, list_images
from pipeline.distributed import ray_cluster, resources
from pipeline.distributed.resources import WorkerResources
from pipeline.extract import encoder_pool, job
from pipeline.extract.encoder import Encoder
from pipeline.extract.job import extract
from pipeline.inspect.verify import verify_store
from pipeline.store import Store
from pipeline.targets.tail import load_tail
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.conversions import options
from tests.helpers import all_files
from tests.s3 import SeaweedFS
from tests.stores import add_random_stream, make_random_store

SAMPLES = 5
ROOT = Path(__file__).parents[3]


class LocalPool:
    """The encoder pool of a command, in this process. ``rival`` runs once, when the command has
    looked for a store and has not yet written anything."""

    def __init__(self, config: ExtractConfig, rival: Callable[[], object]) -> None:
        self.encoder = Encoder(config, device="cpu", threads=1)
        self.rival = rival

    def describe(self) -> Any:
        description = self.encoder.describe()
        rival, self.rival = self.rival, int
        rival()
        return description

    def describe_tail(self) -> Any:
        return self.encoder.describe_tail()

    def calibrate(self, *arguments: Any) -> Any:
        return self.encoder.calibrate(*arguments)

    def save_tail(self, url: str) -> Any:
        return self.encoder.save_tail(url)

    def encode(self, url: str, manifest: Any, tasks: Any) -> Any:
        return [self.encoder.encode_shard(url, manifest, task) for task in tasks]

    def close(self) -> None:
        pass


def listing_of(config: ExtractConfig, class_names: Sequence[str] = ()) -> Listing:
    everything = list_images(config, class_names)
    return replace(everything, items=everything.items[:SAMPLES])


def run(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, rival: Callable[[], object] = int
) -> Store:
    """Run `python -m pipeline.extract` without Ray."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "list_images", listing_of)
        patch.setattr(ray_cluster, "ray_cluster", lambda _: patch.context())
        patch.setattr(resources, "choose_resources", lambda *_, **__: WorkerResources(1, 1, 0.0))
        patch.setattr(encoder_pool, "EncoderPool", lambda config, **_: LocalPool(config, rival))
        return extract(config).store


def of_seed(folder: Path | str, seed: int, **given: Any) -> ExtractConfig:
    teacher = {"weights": "random", "seed": seed}
    return options(folder, teacher=teacher, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
def test_two_different_extractions_of_one_new_store(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = of_seed(tmp_path / "store", 1, cut="activations", format=format)
    alone = run(winner.model_copy(update={"store": str(tmp_path / "alone")}), monkeypatch)
    loser = of_seed(tmp_path / "store", 2, cut="activations", format=format)
    (tmp_path / "store").mkdir()  # weights of an extraction that died before its manifest
    (tmp_path / "store" / "activations_teacher_tail.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"made with teacher.seed 1, this extraction has 2"):
        run(loser, monkeypatch, rival=lambda: run(winner, monkeypatch))
    assert all_files(tmp_path / "store") == all_files(Path(alone.root))
    assert verify_store(Store.open(str(tmp_path / "store"))).damaged == []


def test_the_loser_writes_nothing_over_an_unfinished_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner has written only its manifest so far: its zarr metadata and weights follow."""
    first = of_seed(tmp_path / "store", 1, cut="image", format="zarr")
    run(first, monkeypatch)
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()

    def only_the_manifest() -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "manifest.json").write_bytes(manifest)

    shutil.rmtree(tmp_path / "store")
    second = of_seed(tmp_path / "store", 1, cut="maps", format="zarr")
    with pytest.raises(UserError, match="made with cut image, this extraction has maps"):
        run(second, monkeypatch, rival=only_the_manifest)
    assert all_files(tmp_path / "store") == {"manifest.json": manifest}
    store = run(first, monkeypatch)  # completes it, with zarr's metadata
    assert (tmp_path / "store" / "zarr.json").exists()
    assert verify_store(store).damaged == []


def test_the_same_extraction_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_seed(tmp_path / "store", 1, cut="activations")
    alone = run(config.model_copy(update={"store": str(tmp_path / "alone")}), monkeypatch)
    store = run(config, monkeypatch, rival=lambda: run(config, monkeypatch))
    assert all_files(tmp_path / "store") == all_files(Path(alone.root))
    assert store.manifest == alone.manifest


def second_stream(base: Store, name: str, seed: int, **given: Any) -> ExtractConfig:
    teacher = {"weights": "random", "seed": seed}
    return ExtractConfig.model_validate(
        {"store": base.url, "add_stream": name, "teacher": teacher, **given}
    )


@pytest.mark.parametrize("where", ["local", "s3"])
def test_two_added_streams_at_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "store")
    if where == "s3":
        server: SeaweedFS = request.getfixturevalue("s3")
        url = f"{server.bucket()}/store"
    store = run(of_seed(url, 1, cut="image"), monkeypatch)
    one = second_stream(store, "one", 2, cut="image")
    two = second_stream(store, "two", 3, cut="activations")
    run(one, monkeypatch, rival=lambda: run(two, monkeypatch))
    store = Store.open(store.url)
    added = ["two", "two_class", "one", "one_class"]
    assert list(store.manifest.streams) == ["latents", "image", "class", *added]
    assert {n: s.teacher.seed for n, s in store.manifest.teacher_streams.items()} == {
        "image": 1,
        "two": 3,
        "one": 2,
    }
    store.require_complete("latents", *added)
    assert all(store.index().bytes_per_stream[name] > 0 for name in store.manifest.streams)
    assert verify_store(store).damaged == []
    for name in ("one", "two"):
        load_tail(store, name, store.manifest.teacher_streams[name].teacher.layers)


def test_two_added_streams_of_one_name_and_different_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(of_seed(tmp_path / "store", 1), monkeypatch)
    one, two = second_stream(store, "more", 2), second_stream(store, "more", 3)
    with pytest.raises(UserError, match=r"made with teacher.seed 3, this extraction has 2"):
        run(one, monkeypatch, rival=lambda: run(two, monkeypatch))
    assert Store.open(store.url).manifest.teacher_streams["more"].teacher.seed == 3


def test_an_index_holds_the_streams_of_all_commands(tmp_path: Path) -> None:
    """The first command opened the store before the second added its stream."""
    first = make_random_store(tmp_path / "store")
    add_random_stream(first, "second", layers=[0, 3])
    first.finish()
    assert set(Store.open(first.url).index().bytes_per_stream) == {"latents", "maps", "second"}
    assert list(first.manifest.streams) == ["latents", "maps", "second"]


def test_a_replaced_manifest_is_told_of(tmp_path: Path) -> None:
    """As on storage that has no conditional requests."""
    store = make_random_store(tmp_path / "store")
    store.update(lambda manifest: manifest.model_copy(update={"resolution": 32}))
    with pytest.raises(UserError, match=r"made with resolution 32, this command has \d+: another"):
        store.finish()


def test_two_conversions_to_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins when the first has planned and written nothing yet."""
    store = run(of_seed(tmp_path / "store", 1, cut="image"), monkeypatch)

    def config(**given: Any) -> ConvertConfig:
        values = {"source": store.url, "target": str(tmp_path / "target"), "device": "cpu"}
        return ConvertConfig.model_validate({**values, **given})

    def with_rival(config: ConvertConfig, rival: ConvertConfig) -> Store:
        opened = convert_job._open_target

        def open_target(*arguments: Any) -> Store:
            monkeypatch.setattr(convert_job, "_open_target", opened)
            convert(rival)
            return opened(*arguments)

        monkeypatch.setattr(convert_job, "_open_target", open_target)
        return convert(config).store

    with pytest.raises(UserError, match=r"made with .*, this conversion has .*: name another tar"):
        with_rival(config(cut="activations"), config(format="zarr"))
    before = all_files(tmp_path / "target")
    shutil.rmtree(tmp_path / "target")
    target = with_rival(config(format="zarr"), config(format="zarr"))
    assert all_files(tmp_path / "target") == before
    assert verify_store(target).damaged == []
    assert np.sum(target.index().samples_per_shard) == SAMPLES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seeds", "codes"), [((1, 2), [0, 2]), ((1, 1), [0, 0])])
def test_two_processes(seeds: tuple[int, int], codes: list[int], images: Path) -> None:
    """The commands as users type them, each with its own Ray cluster."""
    store = images.parent / "store"
    network = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
    arguments = [
        *("--dataset", "folder", "--source", str(images), "--store", str(store), "--actors", "1"),
        *("--resolution", "32", "--teacher.image-size", "32", "--teacher.weights", "random"),
        *("--teacher.model", "vit_small_patch14_dinov2.lvd142m", "--autoencoder", "demo"),
        *("--layers", "0,1", "--cut", "image", "--shard-size", "3"),
        *(text for key, n in network.items() for text in (f"--teacher.model-args.{key}", str(n))),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.extract", *arguments, "--teacher.seed", str(seed)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    errors = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == codes, errors
    found = Store.open(str(store))
    assert verify_store(found).damaged == []
    winner = next(s for s, p in zip(seeds, processes, strict=True) if p.returncode == 0)
    assert found.manifest.teacher_streams["image"].teacher.seed == winner
    if codes == [0, 2]:
        (lost,) = (e for e, p in zip(errors, processes, strict=True) if p.returncode == 2)
        assert f"was made with teacher.seed {winner}, this extraction has" in lost
