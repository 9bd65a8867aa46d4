"""Images to committed shards, on one device, without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.autoencoders import Autoencoder
from pipeline.datasets import ImageItem, Listing
from pipeline.datasets.crop import decode_crop
from pipeline.extract.encoder import Encoder, ShardResult
from pipeline.extract.tasks import ShardTask, make_manifest, make_tasks
from pipeline.precision import choose_precision
from pipeline.store import Store, StreamReader
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.helpers import all_files

Encode = Callable[..., tuple[Store, ShardResult]]

BAD = {3: b"no image", 7: b"\x89PNG\r\n\x1a\n" + bytes(40)}
"""Rows of the first shard, in two of its batches of 4, and their damaged bytes."""


@pytest.fixture
def encode(
    digits_encoder: Encoder,
    digits_store: Store,
    digits_listing: Listing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Encode:
    """Encodes the first shard again, with some images replaced."""

    def run(
        replaced: dict[int, bytes | OSError], on_bad_image: str, name: str = "store"
    ) -> tuple[Store, ShardResult]:
        task = make_tasks(digits_listing, 10)[0]
        changed = {task.items[row].key: data for row, data in replaced.items()}
        read = digits_encoder.read

        def read_changed(item: ImageItem) -> bytes:
            data = changed.get(item.key)
            if isinstance(data, OSError):
                raise data
            return read(item) if data is None else data

        config = digits_encoder.config.model_copy(update={"on_bad_image": on_bad_image})
        with monkeypatch.context() as patch:
            patch.setattr(digits_encoder, "config", config)
            patch.setattr(digits_encoder, "read", read_changed)
            store = Store.create(str(tmp_path / name), digits_store.manifest)
            return store, digits_encoder.encode_shard(store.url, store.manifest, task)

    return run


def first_shard(store: Store, count: int) -> dict[str, np.ndarray]:
    where = np.zeros(count, int), np.arange(count)
    streams = (StreamReader(store, name).read(*where) for name in store.manifest.streams)
    return {column: values for stream in streams for column, values in stream.items()}


def test_the_same_shard_twice_is_the_same_byte_for_byte(
    encode: Encode, digits_store: Store
) -> None:
    first, _ = encode({}, "stop", "a")
    second, _ = encode({}, "stop", "b")
    files = all_files(Path(first.root))
    assert len(files) == 5  # manifest, record, one tar of each stream
    assert files == all_files(Path(second.root))
    original = all_files(Path(digits_store.root))
    for name in set(files) - {"manifest.json"}:
        assert files[name] == original[name]


def test_a_new_encoder_makes_the_same_bytes(
    digits_config: ExtractConfig, digits_store: Store, digits_listing: Listing, tmp_path: Path
) -> None:
    encoder = Encoder(digits_config, device="cpu", threads=1)
    task = make_tasks(digits_listing, 10)[2]
    encoder.encode_shard(str(tmp_path), digits_store.manifest, task)
    original = all_files(Path(digits_store.root))
    assert all(original[name] == data for name, data in all_files(tmp_path).items())


def test_shards_hold_their_images_in_order(digits_store: Store, digits_listing: Listing) -> None:
    assert digits_store.index().samples_per_shard == [10, 10, 4]
    for shard in range(3):
        items = digits_listing.items[10 * shard : 10 * shard + 10]
        record = digits_store.record(shard)
        assert record.keys == [item.key for item in items]
        where = np.full(len(items), shard), np.arange(len(items))
        labels = StreamReader(digits_store, "latents").read(*where)["label"]
        assert labels.tolist() == [item.label for item in items]


def test_what_is_stored_is_what_the_networks_say(
    digits_encoder: Encoder, digits_store: Store, digits_listing: Listing
) -> None:
    items = digits_listing.items[:4]  # the first batch
    crops = np.stack([decode_crop(digits_encoder.read(item), 32) for item in items])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2)
    with torch.inference_mode():
        mean, std = Autoencoder("demo").encode(pixels)
        targets = digits_encoder.teacher(pixels)
    stored = first_shard(digits_store, 4)
    attention = torch.softmax(targets.attention_logits, -1)
    for name, expected in {
        "mean": mean,
        "std": std,
        "features": targets.features,
        "class_token": targets.class_token,
        "attention": attention,
    }.items():
        close = {"rtol": 2e-3, "atol": 2e-4}
        np.testing.assert_allclose(stored[name].astype(np.float32), expected.numpy(), **close)
        assert stored[name].std() > 0, name
    sums = stored["attention"].astype(np.float32).sum(-1)
    np.testing.assert_allclose(sums, 1, atol=2e-3)


def test_stop_commits_nothing_and_lists_every_bad_image(
    encode: Encode, digits_listing: Listing
) -> None:
    store, result = encode(BAD, "stop")
    assert (result.committed, result.samples) == (False, 0)
    assert [bad.path for bad in result.bad_images] == [digits_listing.items[i].path for i in BAD]
    assert result.bad_images[0].error == "not an image"
    assert set(all_files(Path(store.root))) == {"manifest.json"}
    assert 0 in store.missing_shards()


def test_skip_keeps_labels_and_keys_of_the_others(
    encode: Encode, digits_store: Store, digits_listing: Listing
) -> None:
    store, result = encode(BAD, "skip")
    kept = [row for row in range(10) if row not in BAD]
    record = store.record(0)
    assert (result.committed, result.samples, record.samples) == (True, 8, 8)
    assert record.keys == [digits_listing.items[row].key for row in kept]
    assert [bad.key for bad in record.skipped] == [digits_listing.items[row].key for row in BAD]
    assert record.skipped == result.bad_images
    whole, found = first_shard(digits_store, 10), first_shard(store, 8)
    assert found["label"].tolist() == whole["label"][kept].tolist()
    for column, values in found.items():  # the batches are smaller: equal up to rounding
        np.testing.assert_allclose(
            values.astype(np.float32), whole[column][kept].astype(np.float32), rtol=1e-2, atol=1e-2
        )


def test_skipping_twice_is_the_same_byte_for_byte(encode: Encode) -> None:
    stores = [encode(BAD, "skip", name)[0] for name in ("a", "b")]
    assert all_files(Path(stores[0].root)) == all_files(Path(stores[1].root))


def test_a_shard_of_bad_images_alone_is_committed_empty(encode: Encode) -> None:
    store, result = encode(dict.fromkeys(range(10), b"no image"), "skip")
    assert (result.committed, result.samples, len(result.bad_images)) == (True, 0, 10)
    assert store.record(0).samples == 0
    assert store.missing_shards() == [1, 2]


def test_finish_lists_what_was_skipped(
    encode: Encode, digits_store: Store, digits_listing: Listing
) -> None:
    store, _ = encode(BAD, "skip")
    for stream in ("commits", *store.manifest.streams):
        for path in Path(digits_store.root, stream).iterdir():
            if "000000" not in path.name:
                shutil.copy(path, Path(store.root, stream))
    store.finish()
    skipped = Store.open(store.url).manifest.skipped
    assert [bad.key for bad in skipped] == [digits_listing.items[row].key for row in BAD]
    assert store.index().samples_per_shard == [8, 10, 4]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(13, "locked")])
def test_a_file_that_cannot_be_read_is_a_bad_image(encode: Encode, error: OSError) -> None:
    _, result = encode({5: error}, "skip")
    assert [bad.error for bad in result.bad_images] == [error.strerror]
    assert result.samples == 9


def test_failing_storage_is_not_a_bad_image(encode: Encode) -> None:
    with pytest.raises(OSError, match="network is down"):
        encode({5: OSError("the network is down")}, "skip")


def test_description_says_what_decides_the_numbers(
    digits_encoder: Encoder, digits_store: Store
) -> None:
    about = digits_encoder.describe()
    assert about == digits_encoder.describe()
    teacher, autoencoder, compute = about.teacher, about.autoencoder, about.compute
    assert (teacher.weights, teacher.depth, teacher.width, teacher.heads) == ("demo", 6, 96, 6)
    assert (teacher.grid, teacher.image_size, teacher.layers) == ((8, 8), 32, (2, 3, 4, 5))
    assert autoencoder is not None
    assert len(teacher.weights_sha256) == len(autoencoder.weights_sha256) == 64
    assert autoencoder.name == "demo"
    assert autoencoder.latent_shape[1:] == (8, 8)
    assert autoencoder.scaling_factor > 0
    assert (compute.device, compute.precision) == ("cpu", "float32")
    assert (compute.batch_size, compute.threads) == (4, 1)
    assert compute.versions["torch"] == torch.__version__
    assert {"timm", "diffusers", "numpy", "pillow"} <= compute.versions.keys()
    manifest = digits_store.manifest
    name, stream = manifest.teacher_stream()
    assert (name, stream.teacher, manifest.autoencoder) == ("maps", teacher, autoencoder)
    assert stream.compute == manifest.streams["latents"].compute == compute


def test_precision_is_chosen_by_device() -> None:
    auto = ExtractConfig()
    assert choose_precision(auto.precision, "cpu") == "float32"
    assert choose_precision(auto.precision, "cuda") == "bfloat16"
    half = ExtractConfig(precision="float16")
    assert choose_precision(half.precision, "cuda") == "float16"
    with pytest.raises(UserError, match="needs a GPU"):
        choose_precision(half.precision, "cpu")


def test_tasks_are_cut_by_position(digits_listing: Listing) -> None:
    tasks = make_tasks(digits_listing, 10)
    assert [task.shard for task in tasks] == [0, 1, 2]
    assert [item for task in tasks for item in task.items] == list(digits_listing.items)
    assert [len(task.items) for task in tasks] == [10, 10, 4]
    assert make_tasks(Listing([], 1), 10) == []
    assert isinstance(tasks[0], ShardTask)


def test_the_manifest_holds_no_credentials(
    digits_encoder: Encoder, digits_config: ExtractConfig, digits_listing: Listing
) -> None:
    source = "s3://key:hunter2@bucket/images?token=hunter2"
    config = digits_config.model_copy(update={"source": source, "dataset": "folder"})
    about = digits_encoder.describe()
    manifest = make_manifest(config, digits_listing, about)
    assert manifest.dataset.source == "s3://bucket/images"
    assert "hunter2" not in manifest.model_dump_json()
    assert manifest.dataset.fingerprint == digits_listing.fingerprint()
    assert (manifest.num_shards, manifest.dataset.samples) == (3, 24)


@pytest.mark.parametrize("cut", ["maps", "activations"])
def test_numbers_that_no_codec_could_keep_are_refused_by_sample(
    digits_config: ExtractConfig, digits_listing: Listing, tmp_path: Path, cut: str
) -> None:
    values = {**digits_config.model_dump(), "cut": cut, "codec": "faithful"}
    encoder = Encoder(ExtractConfig.model_validate(values), device="cpu", threads=1)
    manifest = make_manifest(encoder.config, digits_listing, encoder.describe())
    task = make_tasks(digits_listing, 10)[0]
    embed = encoder.teacher.embed

    def embed_with_nan(pixels: torch.Tensor) -> torch.Tensor:
        tokens = embed(pixels).clone()
        tokens[2, 5, 7] = float("nan")
        return tokens

    encoder.teacher.embed = embed_with_nan  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"sample '.*' .*NaN or an infinity") as error:
        encoder.encode_shard(str(tmp_path), manifest, task)
    assert task.items[2].key in str(error.value)
    assert "\n" not in str(error.value)
    assert all_files(tmp_path) == {}
