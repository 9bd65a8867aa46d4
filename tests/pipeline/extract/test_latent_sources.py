"""Latent files of a data set, encoded without an autoencoder."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.autoencoders import Autoencoder
from pipeline.cli.config_files import merge
from pipeline.datasets import list_images
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.digits import list_digits, read_digit
from pipeline.datasets.folder import list_class_folders
from pipeline.datasets.imagenet import list_imagenet
from pipeline.diffusion.normalisation import Normalisation
from pipeline.extract import latent_sources as latents_module
from pipeline.extract.encoder import Encoder, ShardResult
from pipeline.extract.latent_sources import StoredLatents
from pipeline.extract.tasks import make_manifest, make_tasks
from pipeline.inspect.__main__ import main as inspect
from pipeline.store import Store, StreamReader
from pipeline.store.manifest_diff import check_same_store
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from tests.repa import image_name, latent_name, npy, random_repa, write_repa

SIZE = 32
DAMAGE: dict[str, bytes] = {
    "is not a .npy file": b"no numbers",
    "holds 2000 bytes of numbers": npy(np.zeros((8, 8, 8), np.float32))[:2128],
    "holds pickled objects": npy(np.array([None])),
    "its header promises": npy(np.zeros((8, 8, 8), np.float32)).replace(b"8, 8, 8", b"8,8888,8"),
    "is larger than": bytes(1 << 20),
    "not finite": npy(np.full((8, 8, 8), np.nan, np.float32)),
    "not standard deviations": npy(np.full((8, 8, 8), -1, np.float32)),
    r"has shape \(8, 4, 4\); the first latent has \(8, 8, 8\)": npy(np.zeros((8, 4, 4), "f4")),
}


def config_of(dataset: str, source: Path, store: Path, **overrides: object) -> ExtractConfig:
    """The demo's small networks, with a batch size that does not divide the shard size."""
    values = {
        "dataset": dataset,
        "source": str(source),
        "store": str(store),
        "shard_size": 10,
        "batch_size": 4,
    }
    return ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, overrides))


def run(config: ExtractConfig) -> tuple[Store, list[ShardResult]]:
    encoder = Encoder(config, device="cpu", threads=1)
    about, listing = encoder.describe(), list_images(config)
    manifest = make_manifest(config, listing, about)
    store = Store.create(str(config.store), manifest)
    tasks = make_tasks(listing, config.shard_size)
    results = [encoder.encode_shard(store.url, manifest, task) for task in tasks]
    if all(result.committed for result in results):
        store.finish()
    return store, results


def contents(store: Store) -> tuple[list[str], dict[str, np.ndarray]]:
    """Keys, and every column of all samples, in order."""
    keys = [store.record(shard).keys for shard in range(store.manifest.num_shards)]
    shards = np.repeat(np.arange(len(keys)), [len(of_shard) for of_shard in keys])
    rows = np.concatenate([np.arange(len(of_shard)) for of_shard in keys])
    streams = (StreamReader(store, name).read(shards, rows) for name in store.manifest.streams)
    columns = {column: values for stream in streams for column, values in stream.items()}
    return [key for of_shard in keys for key in of_shard], columns


def forbid_autoencoders(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an autoencoder is loaded")

    patch.setattr(latents_module, "Autoencoder", refuse)
    for kind in ("AutoencoderKL", "AutoencoderTiny"):
        patch.setattr(getattr(diffusers, kind), "from_pretrained", refuse)


@pytest.fixture
def no_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_autoencoders(monkeypatch)


def digits_tree(folder: Path, _: pytest.FixtureRequest) -> None:
    for item in list_digits().items[:24]:
        path = folder / f"class{item.label}" / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_digit(item))


def imagenet_tree(folder: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue("shared") / "data" / "imagenet_sample"
    for item in list_imagenet(str(source), None).items[:24]:
        path = folder / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / item.path, path)


@pytest.mark.parametrize("make_tree", [digits_tree, imagenet_tree])
def test_the_store_is_that_of_the_same_images_with_the_latents_of_the_files(
    make_tree: Callable[[Path, pytest.FixtureRequest], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    originals = tmp_path / "tree"
    make_tree(originals, request)
    source = originals / "train" if (originals / "train").is_dir() else originals
    items = list_class_folders(str(source)).items  # sorted, in the order of `convert`'s numbers
    crops = [decode_crop((source / item.path).read_bytes(), SIZE) for item in items]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    moments = torch.cat(Autoencoder("demo").encode(pixels), 1).numpy()
    labels = [item.label for item in items]
    prepared = write_repa(tmp_path / "repa", crops, list(moments), labels)

    expected_keys, expected = contents(run(config_of("folder", source, tmp_path / "a"))[0])
    with monkeypatch.context() as patch:
        forbid_autoencoders(patch)
        store, _ = run(config_of("repa", prepared, tmp_path / "b"))
    keys, found = contents(store)

    number_of = {item.key: number for number, item in enumerate(items)}
    numbers = [number_of[key] for key in expected_keys]
    assert keys == [image_name(number).removesuffix(".png") for number in numbers]
    assert found.keys() == expected.keys()
    for column in found.keys() - {"mean", "std"}:
        assert np.array_equal(found[column], expected[column]), column
    assert np.array_equal(found["mean"], moments[numbers, :4].astype(np.float16))
    assert np.array_equal(found["std"], moments[numbers, 4:].astype(np.float16))
    np.testing.assert_allclose(
        found["mean"].astype("f4"), expected["mean"].astype("f4"), atol=0.01, rtol=0.01
    )
    assert store.manifest.num_shards == 3


@pytest.mark.usefixtures("no_autoencoder")
@pytest.mark.parametrize("complaint", DAMAGE)
def test_a_damaged_latent_is_a_bad_image(tmp_path: Path, complaint: str) -> None:
    source = random_repa(tmp_path / "data")
    (source / "vae-sd" / latent_name(3)).write_bytes(DAMAGE[complaint])
    _, (result,) = run(config_of("repa", source, tmp_path / "stop"))
    assert (result.committed, len(result.bad_images)) == (False, 1)
    assert result.bad_images[0].path == f"images/{image_name(3)}"
    store, (result,) = run(config_of("repa", source, tmp_path / "skip", on_bad_image="skip"))
    error = result.bad_images[0].error
    assert re.match(rf"vae-sd/{latent_name(3)}: .*{complaint}", error)
    assert "\n" not in error
    assert (result.committed, result.samples) == (True, 5)
    assert image_name(3).removesuffix(".png") not in store.record(0).keys


@pytest.mark.usefixtures("no_autoencoder")
def test_missing_files_and_other_sizes_are_bad_images(tmp_path: Path) -> None:
    source = random_repa(tmp_path / "data")
    (source / "vae-sd" / latent_name(0)).unlink()  # also the first one read
    (source / "images" / image_name(2)).unlink()
    Image.new("RGB", (64, 64)).save(source / "images" / image_name(4))
    store, (result,) = run(config_of("repa", source, tmp_path / "store", on_bad_image="skip"))
    errors = {bad.path: bad.error for bad in result.bad_images}
    assert errors == {
        f"images/{image_name(0)}": f"vae-sd/{latent_name(0)}: No such file or directory",
        f"images/{image_name(2)}": "No such file or directory",
        f"images/{image_name(4)}": "64x64 pixels; its latent is of these pixels: expected "
        "32x32, or another --resolution",
    }
    assert len(contents(store)[0]) == 3


def test_a_source_without_one_good_latent_is_one_line(tmp_path: Path) -> None:
    source = random_repa(tmp_path / "data")
    config = config_of("repa", source, tmp_path / "store")
    for path in (source / "vae-sd").rglob("*.npy"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its first latents can be read: vae-sd/.*5\.npy"):
        StoredLatents(config)
    (source / "vae-sd" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"vae-sd/dataset\.json lists no latents at its beginning"):
        StoredLatents(config)


def test_an_empty_object_is_bad_and_failing_storage_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("repa", random_repa(tmp_path / "data"), tmp_path / "store")
    latents, item = StoredLatents(config), list_images(config).items[0]

    def fail_with(error: OSError) -> None:
        def read(_: object) -> bytes:
            raise error

        monkeypatch.setattr(latents, "_read_file", read)

    fail_with(OSError(errno.EINVAL, "The requested range is not satisfiable"))
    with pytest.raises(BadImageError, match=rf"^{item.latent}: is empty$"):
        latents.read(item)
    fail_with(OSError("the network is down"))
    with pytest.raises(OSError, match="network is down"):
        latents.read(item)


def test_the_manifest_says_where_latents_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random_repa(tmp_path / "data")
    store, _ = run(config_of("repa", source, tmp_path / "store"))
    vae = store.manifest.autoencoder
    assert (vae.name, vae.kind, vae.weights_sha256) == ("demo", "AutoencoderKL", None)
    assert (vae.scaling_factor, vae.shift_factor) == (pytest.approx(0.50309), 0)
    assert vae.latent_shape == (4, 8, 8)
    assert inspect([store.url]) == 0
    page = capsys.readouterr().out
    assert f"demo (not run here: latents taken over from {source}), latents 4x8x8" in page
    other = vae.model_copy(update={"name": "another"})
    with pytest.raises(UserError, match=r"autoencoder\.name demo, this extraction has another"):
        check_same_store(
            store.manifest, store.manifest.model_copy(update={"autoencoder": other}), store.url
        )


def test_scaling_is_known_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    source = random_repa(tmp_path / "data")

    def stored(name: str) -> StoredLatents:
        return StoredLatents(config_of("repa", source, tmp_path, autoencoder=name))

    default = stored(ExtractConfig().autoencoder)
    assert default.normalisation == Normalisation(0.18215)
    folder = tmp_path / "vae"
    folder.mkdir()
    text = '{"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": 0.25}'
    (folder / "config.json").write_text(text)
    assert stored(str(folder)).normalisation == Normalisation(0.5, 0.25)
    (folder / "config.json").write_text(
        text.replace(
            '"shift_factor": 0.25', '"latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 2, 8]'
        )
    )
    statistics = (1.0, 2.0, 3.0, 4.0), (2.0, 2.0, 2.0, 8.0)
    assert stored(str(folder)).normalisation == Normalisation(0.5, 0.0, *statistics)
    info = stored(str(folder)).info(32)
    assert (info.latents_mean, info.latents_std) == statistics
    with pytest.raises(UserError, match="--autoencoder 'some/vae': is not a folder with"):
        stored("some/vae")
    (folder / "config.json").write_text(text.replace("KL", "Tiny"))
    with pytest.raises(UserError, match="is of class AutoencoderTiny; latents with mean and std"):
        stored(str(folder))
