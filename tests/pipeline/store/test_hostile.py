"""A store may come from anyone: what it says is bounded and checked before it is believed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numcodecs import Zstd

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.cli.config_files import merge
from pipeline.inspect.fidelity import measure_fidelity
from pipeline.store import Store, StreamReader
from pipeline.store.arrays import check_columns
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.file_source import FileSource, whole_up_to
from pipeline.store.reading.stream_reader import DamagedShardError
from pipeline.targets.sources import Wanted, open_targets
from pipeline.targets.tail import load_tail
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from schemas.store import StreamFile
from schemas.streams import Column
from schemas.validation import validate
from tests.encoded import encode
from tests.helpers import edit_json, known_key, known_values
from tests.stores import make_random_store, tiny_run

Change = Callable[[dict[str, Any]], None]


def column(**values: Any) -> Change:
    return lambda manifest: manifest["streams"]["maps"]["columns"]["features"].update(values)


def teacher(**values: Any) -> Change:
    return lambda manifest: manifest["streams"]["maps"]["teacher"].update(values)


def large(codec: str) -> Change:
    """Maps of 90 x 100 tokens, within bounds, whose attention is stored with ``codec``."""

    def change(manifest: dict[str, Any]) -> None:
        stream = manifest["streams"]["maps"]
        stream["teacher"]["grid"] = [90, 100]
        stream["columns"]["features"]["shape"] = [9000, 12]
        stream["columns"]["attention"].update(shape=[3, 3, 9000, 9000], codec=codec)

    return change


def latents(name: str, **values: Any) -> Change:
    return lambda manifest: manifest["streams"]["latents"]["columns"][name].update(values)


def rename(new: str, *path: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        table = manifest
        for part in path[:-1]:
            table = table[part]
        table[new] = table.pop(path[-1])

    return change


def opening_says(store: Store) -> str:
    with pytest.raises(UserError) as error:
        Store.open(store.url)
    message = str(error.value)
    assert message.startswith(f"{store.url}/manifest.json is damaged: ")
    assert "\n" not in message
    return message


BAD_MODELS = ("hf-hub:timm/vit", "local-dir:/tmp/evil", "timm/vit", "../x", "", "a b", "x" * 200)
BAD_NAMES = ("..", "../x", "/etc", "a/b", "a\\b", "a.b.c", "", "a\n", "A", "~", "s3://x", "é", "-a")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leaves_the_store(known_store: Store, name: str) -> None:
    path = Path(known_store.root, "manifest.json")
    before = path.read_bytes()
    for where in (("streams", "maps"), ("streams", "maps", "columns", "features")):
        edit_json(path, rename(name, *where))
        opening_says(known_store)
        path.write_bytes(before)
    tail = {"file": f"{name}.safetensors", "bytes": 1, "sha256": "0" * 64}
    if name != "-a":
        edit_json(path, lambda m: m["streams"]["maps"].update(tail=tail))
        assert "tail" in opening_says(known_store)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # the codec's own arrays are larger than the column: two planes of it
        (large("heads9"), "1458000000 elements; the limit"),
        (column(codec="int8", shape=[1 << 24, 1 << 24]), "281474976710656 elements"),
        (column(codec="cbrt8", shape=[1 << 24] * 8), "elements; the limit"),
        (column(codec="uint8", shape=[0, *[1 << 24] * 7]), "shape"),
        (column(codec="float32", shape=[1] * 65), "at most 8"),
        (column(codec="heads24"), "layers x heads"),
        (column(codec="int8_group64"), "not a multiple"),
        (column(codec="int8_outliers16"), "too few"),
        *((column(codec=name), "codec") for name in ("tokens1000", "sqrt0", "pickle", "<f4", "O")),
        (column(lossless="bz2"), "lossless"),
        (column(lossless="../zstd"), "lossless"),
        (column(shape=[1.5, 2]), "shape"),
        (column(shape="16x12"), "shape"),
        (teacher(grid=[-1, 4]), "grid"),
        (teacher(grid=[1 << 40, 4]), "grid"),
        (teacher(grid=[1 << 16, 1 << 16]), "grid"),
        (teacher(grid=[3, 3]), "its cut 'maps' keeps"),
        (teacher(heads=0), "heads"),
        (teacher(heads=4), "4 heads of 4 numbers are not a width of 12"),
        (teacher(heads=6, head_width=2), "its cut 'maps' keeps"),
        (teacher(layers=[-1]), "layers"),
        (teacher(layers=[]), "stream 'maps' does not hold what its cut 'maps' keeps"),
        (teacher(layers=[3, 2, 1]), "layers: name each layer once"),
        (teacher(layers=[1, 2, 9]), "no layer 9 in a depth of 4"),
        (teacher(layers=[1, 2]), "its cut 'maps' keeps"),
        (teacher(depth=100_000), "depth"),
        (teacher(seed=-1), "seed"),
        (teacher(std=[1, 0, 1]), "std"),
        (teacher(mean=[0, float("nan"), 0]), "mean"),
        (teacher(model_args={"depth": 100_000}), "100000 is out of range"),
        (teacher(model_args={"depth": 5}), "model_args.depth is not 4"),
        (teacher(model_args={"embed_dim": 1 << 18}), "model_args: 262144 is out of range"),
        (teacher(model_args={"embed_dim": 10**4000}), "an enormous number is out of range"),
        (teacher(model_args={"embed_dim": 24}), "model_args.embed_dim is not 12"),
        (teacher(model_args={"num_heads": 1}), "model_args.num_heads is not 3"),
        (teacher(model_args={"mlp_ratio": float("inf")}), "inf is out of range"),
        (teacher(model_args={"a": [[[0] * 100]]}), "more than 64"),
        (teacher(model_args={"a": "b" * (1 << 15)}), "32768 characters"),
        *((teacher(model=name), "model") for name in BAD_MODELS),
        (lambda m: m.update(resolution=10**9), "resolution"),
        (lambda m: m.update(resolution=-5), "resolution"),
        (lambda m: m["dataset"].update(name="../x"), "dataset.name"),
        (rename("commits", "streams", "maps"), "'commits' is the folder of the commit records"),
        (lambda m: m.pop("version"), "version: Field required"),
        (latents("label", codec="float16"), "column 'label' of stream 'latents' is of codec float"),
        (latents("mean", codec="tokens23", shape=[4, 64]), "not a mean and a std"),
        (latents("mean", codec="int8"), "column 'mean' of stream 'latents' is of codec int8"),
        (latents("mean", shape=[4, 8, 9]), "not a mean and a std"),
        (lambda m: m["streams"]["latents"]["columns"].pop("std"), "not a mean and a std"),
        (lambda m: m["autoencoder"].update(latent_shape=[4, 8, 9]), "not those of square images"),
        (lambda m: m["autoencoder"].update(latent_shape=[1, 99, 99]), "not those of square"),
        (lambda m: m["streams"]["maps"]["columns"].pop("attention"), "its cut 'maps' keeps"),
        (column(shape=[12, 16]), "its cut 'maps' keeps"),
        (lambda m: m["streams"]["maps"].update(cut="qk"), "its cut 'qk' keeps"),
        (teacher(model_args={"checkpoint_path": "/tmp/evil.pth"}), "checkpoint_path is refused"),
        (teacher(model_args={"pretrained": True}), "pretrained is refused"),
        (lambda m: m["autoencoder"].update(scaling_factor=0), "scaling_factor"),
        (lambda m: m["autoencoder"].update(latent_shape=[4, 0, 8]), "latent_shape"),
    ],
)
def test_a_manifest_that_promises_the_impossible_is_refused(
    known_store: Store, change: Change, reason: str
) -> None:
    edit_json(Path(known_store.root, "manifest.json"), change)
    assert reason in opening_says(known_store)


@pytest.mark.parametrize(
    ("codec", "shape", "reason"),
    [
        ("tokens999", (1 << 15, 1 << 15), "2147483648 elements; the limit"),
        ("rms1", (1 << 14, 1 << 16), "2147483648 elements; the limit"),
        ("tokens20", (4,), "it is for tokens x channels"),
        ("int8", (), "vectors"),
        ("int8_centred", (12,), "several tokens"),
        ("cbrt8", (), "rows of probabilities"),
    ],
)
def test_a_codec_is_for_some_shapes(codec: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"column 'x', codec {codec}: .*{reason}"):
        check_columns({"x": Column(shape=shape, codec=codec)})


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
def test_every_shape_within_bounds_can_be_listed(tmp_path: Path, format: str) -> None:
    """Opening, and what zarr is told of it, allocate nothing of what is promised."""
    store = make_random_store(tmp_path, samples=2, shard_size=2, format=format)
    edit_json(tmp_path / "manifest.json", large("cbrt8"))
    Store.open(store.url).zarr_metadata()
    with pytest.raises(DamagedShardError):
        StreamReader(Store.open(store.url), "maps").read(np.array([0]), np.array([0]))


def test_more_than_memory_holds_is_one_line(known_store: Store) -> None:
    edit_json(Path(known_store.root, "manifest.json"), large("float32"))
    reader = StreamReader(Store.open(known_store.url), "maps")
    many = np.zeros(1 << 20, np.int64)
    with pytest.raises(UserError, match=r"1048576 samples of stream 'maps' .* do not fit"):
        reader.read(many, many)


def edit_record(store: Store, change: Callable[[dict[str, Any]], object]) -> Store:
    edit_json(Path(store.root, "commits", "shard-000001.json"), change)
    return Store.open(store.url)


def read_first(store: Store, *, verify: bool = True, limit: int = 8 << 20) -> None:
    reader = StreamReader(store, "maps", verify=verify, whole_file_limit=limit)
    reader.read(np.array([1]), np.array([0]))


def test_a_record_cannot_have_more_read_than_a_sample_takes_up(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(record: dict[str, Any]) -> None:
        file = record["streams"]["maps"][0]
        file["bytes"] = 1 << 40
        file["sizes"]["features"][2] = 1 << 39

    for function in ("read_ranges", "read_directly"):
        name = f"pipeline.store.reading.file_source.{function}"
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(DamagedShardError, match=r"column 'features' 549755813888 bytes, more than"):
        read_first(edit_record(known_store, change))


def test_a_file_without_arrays_is_refused(known_store: Store) -> None:
    about: dict[str, Any] = {"file": "x", "bytes": 0, "sha256": "0" * 64}
    about |= {"offsets": {}, "sizes": {}, "crc32": {}}
    with pytest.raises(DamagedShardError, match="x holds no array"):
        read_first(edit_record(known_store, lambda r: r["streams"]["maps"].append(about)))


def test_no_more_is_read_of_a_file_than_was_committed(known_store: Store) -> None:
    path = Path(known_store.root, "maps", "shard-000001.tar")
    expected = path.read_bytes()
    os.truncate(path, 1 << 33)  # sparse
    reader = StreamReader(known_store, "maps")
    found = reader.read(np.array([1]), np.array([0]))
    assert 0 < reader.bytes_read <= len(expected)
    assert np.array_equal(found["features"][0], known_values(1, 0)["maps"]["features"])


def replace_member(store: Store, suffix: str, data: bytes) -> Store:
    """The store with other bytes in place of the first sample's member of shard 1, and a record
    that vouches for them: what an attacker would do."""
    path = Path(store.root, "maps", "shard-000001.tar")
    buffer = io.BytesIO()
    offsets: dict[str, list[int]] = {}
    sizes: dict[str, list[int]] = {}
    with tarfile.open(path) as old, tarfile.TarFile(fileobj=buffer, mode="w") as new:
        for number, info in enumerate(old):
            handle = old.extractfile(info)
            assert handle is not None
            member = handle.read()
            part = info.name.split(".")[1]
            if number < 3 and part == suffix:
                member = data
            info.size = len(member)
            new.addfile(info, io.BytesIO(member))
            offsets.setdefault(part, []).append(new.offset - -(-len(member) // 512) * 512)
            sizes.setdefault(part, []).append(len(member))
    whole = buffer.getvalue()
    path.write_bytes(whole)
    about = StreamFile(
        file="maps/shard-000001.tar",
        bytes=len(whole),
        sha256="0" * 64,
        offsets=offsets,
        sizes=sizes,
        crc32={
            part: [
                zlib.crc32(whole[o : o + n])
                for o, n in zip(offsets[part], sizes[part], strict=True)
            ]
            for part in offsets
        },
    )
    return edit_record(store, lambda r: r["streams"].update(maps=[about.model_dump()]))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Trap:
    """Would end the process if anyone unpickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (66,))


@pytest.mark.parametrize("limit", [8 << 20, 0])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(np.zeros((16, 12), np.float32)),
        npy(np.zeros((12, 16), np.float16)),
        npy(np.zeros((16, 11), np.float16)),
        npy(np.array([Trap()], dtype=object)),
        Zstd().encode(bytes(1 << 22)),
        os.urandom(512),
    ],
    ids=["empty", "cut", "wider", "turned", "smaller", "pickle", "zstd", "noise"],
)
def test_members_that_are_not_as_promised_are_refused(
    known_store: Store, data: bytes, verify: bool, limit: int
) -> None:
    store = replace_member(known_store, "features", data)
    with pytest.raises(DamagedShardError, match=f"sample '{known_key(1, 0)}', column 'features'"):
        read_first(store, verify=verify, limit=limit)


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
@pytest.mark.parametrize("lossless", ["zstd", "blosc"])
@pytest.mark.parametrize("verify", [True, False])
def test_compressed_noise_and_bombs_are_refused(
    tmp_path: Path, format: str, lossless: str, verify: bool
) -> None:
    """The manifest says that the bytes are compressed; they are whatever they are."""
    store = make_random_store(tmp_path, samples=2, shard_size=2, format=format)
    edit_json(tmp_path / "manifest.json", column(lossless=lossless))
    with pytest.raises(DamagedShardError, match="column 'features': its compressed form"):
        StreamReader(Store.open(store.url), "maps", verify=verify).read(
            np.array([0]), np.array([0])
        )


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_cut_off_zarr_shard_is_refused(tmp_path: Path, length: int) -> None:
    store = make_random_store(tmp_path, samples=2, shard_size=2, format="zarr")
    os.truncate(tmp_path / "maps" / "features" / "c" / "0" / "0" / "0", length)
    with pytest.raises(DamagedShardError, match="column 'features': the file is too short"):
        StreamReader(store, "maps").read(np.array([0]), np.array([0]))


def test_a_link_out_of_the_store_gives_nothing_away(known_store: Store, tmp_path: Path) -> None:
    """Links are followed, since a stream may lie on another disk; what they lead to has to be what
    was committed, in verified and unverified reads alike."""
    secret = tmp_path / "secret"
    secret.write_text("password: hunter2\n" * 2000)
    path = Path(known_store.root, "maps", "shard-000001.tar")
    path.unlink()
    path.symlink_to(secret)
    for verify in (True, False):
        with pytest.raises(DamagedShardError) as error:
            read_first(known_store, verify=verify)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("limit", [8 << 20, 0])
def test_a_link_to_what_never_ends_is_damage(known_store: Store, limit: int) -> None:
    path = Path(known_store.root, "maps", "shard-000001.tar")
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DamagedShardError, match="is damaged"):
        read_first(known_store, limit=limit)


@pytest.mark.parametrize("place", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("limit", [8 << 20, 0])
def test_what_is_no_file_is_damage_with_and_without_a_disk_cache(
    known_store: Store, tmp_path: Path, limit: int, place: Callable[[Path], None]
) -> None:
    path = Path(known_store.root, "maps", "shard-000001.tar")
    path.unlink()
    place(path)
    for disk in (None, DiskCache(str(tmp_path / "cache"), 1 << 20)):
        source = FileSource(
            known_store.filesystem, known_store.root, fetch_whole=whole_up_to(limit), disk=disk
        )
        reader = StreamReader(known_store, "maps", source=source)
        with pytest.raises(DamagedShardError, match="is damaged"):
            reader.read(np.array([1]), np.array([0]))


def test_a_shard_is_replaced_not_written_through_a_link(known_store: Store, tmp_path: Path) -> None:
    from tests.helpers import write_known_shard

    victim = tmp_path / "victim"
    victim.write_text("keep me")
    for file in ("maps/shard-000001.tar", "commits/shard-000001.json"):
        path = Path(known_store.root, file)
        path.unlink()
        path.symlink_to(victim)
    write_known_shard(known_store.url, known_store.manifest, 1, 3)
    assert victim.read_text() == "keep me"
    read_first(Store.open(known_store.url))


def test_a_tail_of_another_size_is_not_read(tmp_path: Path) -> None:
    store = encode(tmp_path, samples=1, cut="image")
    os.truncate(tmp_path / "image_teacher_tail.safetensors", 1 << 40)  # sparse; more than memory
    with pytest.raises(UserError, match="is damaged: its checksum is wrong"):
        load_tail(store, "image", (3,))
    edit_json(tmp_path / "manifest.json", lambda m: tail_of(m).update(bytes=1 << 40))
    with pytest.raises(
        UserError, match=r"streams\.image\.tail\.bytes is 1099511627776; blocks 0 to"
    ):
        load_tail(Store.open(store.url), "image", (3,))


def tail_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (stream,) = (s for s in manifest["streams"].values() if "tail" in s)
    tail: dict[str, Any] = stream["tail"]
    return tail


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return encode(tmp_path_factory.mktemp("activations"), samples=1, cut="activations")


@pytest.fixture
def edited(activations: Store, tmp_path: Path) -> Callable[[Change], Store]:
    """A copy with another manifest."""

    def make(change: Change) -> Store:
        shutil.copytree(activations.root, tmp_path / "edited")
        edit_json(tmp_path / "edited" / "manifest.json", change)
        return Store.open(str(tmp_path / "edited"))

    return make


def replayed(**values: Any) -> Change:
    return lambda manifest: manifest["streams"]["activations"]["teacher"].update(values)


SMALL = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6}


def channels(patch: int) -> Change:
    arguments = {**SMALL, "in_chans": 1 << 14, "patch_size": patch}
    return replayed(image_size=8 * patch, model_args=arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            replayed(
                heads=3,
                head_width=32,
                model_args={"patch_size": 4, "embed_dim": 96, "depth": 6},
            ),
            "heads is 3, but that of .* is 6",
        ),
        (replayed(depth=7, model_args={**SMALL, "depth": 7}), "tail.bytes is"),
        (replayed(grid=[4, 16]), r"grid is \(4, 16\), but that of '\w"),
        (replayed(image_size=64), r"grid is \(8, 8\), but"),
        (replayed(mean=[0.5, 0.5, 0.5]), "mean is"),
        (replayed(layers=[1, 2, 3, 4]), "tail.bytes is .*; blocks 1 to 5 of"),
        (replayed(model_args={**SMALL, "mlp_ratio": 9000}), "tail.bytes is"),
        (replayed(model_args={**SMALL, "mlp_ratio": 5}), "tail.bytes is"),
        (channels(512), "157286. MB of weights; the limit"),
        (channels(64), "24576 MB of weights outside its blocks; the limit"),
        (replayed(model_args={**SMALL, "no_such": 1}), "teacher: --teacher.model .*no_such"),
        (replayed(model="mixer_b16_224", model_args={"num_blocks": 1 << 14}), "not a vision trans"),
        (replayed(model="vit_of_tomorrow"), "timm has no model 'vit_of_tomorrow'"),
    ],
)
def test_a_teacher_that_is_not_as_declared_is_never_built(
    edited: Callable[[Change], Store],
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    reason: str,
) -> None:
    store = edited(change)
    monkeypatch.setattr("pipeline.targets.tail.Teacher", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(UserError, match=reason) as error:
        load_tail(store, "activations", (3,))
    assert str(error.value).startswith(f"{store.url}/manifest.json: streams.activations.")
    assert "\n" not in str(error.value)


def test_weights_of_other_blocks_are_told_by_the_file_in_the_store(
    activations: Store, edited: Callable[[Change], Store]
) -> None:
    """As many bytes, under other names."""
    data = Path(activations.root, "activations_teacher_tail.safetensors").read_bytes()
    data = data.replace(b"blocks.0.norm1", b"blocks.9.norm1")
    digest = hashlib.sha256(data).hexdigest()
    store = edited(lambda m: tail_of(m).update(sha256=digest))
    path = Path(store.root, "activations_teacher_tail.safetensors")
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        load_tail(store, "activations", (3,))
    assert str(error.value) == (
        f"{store.url}/{path.name} does not hold blocks 2 to 5 of "
        "'vit_small_patch14_dinov2.lvd142m': blocks.0.norm1.weight is missing"
    )


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    """On a GPU they would kill the process without a word."""
    store = make_random_store(tmp_path / "store", samples=6, shard_size=3)  # labels 0 to 4
    edit_json(tmp_path / "store" / "manifest.json", lambda m: m["dataset"].update(num_classes=2))
    values = merge(tiny_run(), {"store": store.url, "student": {"num_classes": 2}})
    config = RunConfig.model_validate(values)
    with pytest.raises(UserError, match="a label outside its 2 classes"):
        train(config, tmp_path / "run", LocalCheckpoints(tmp_path / "run", keep=1).save)


def read_texts(store: Store) -> None:
    store = Store.open(store.url)
    store.index()
    store.record(1)


@pytest.mark.parametrize("file", ["manifest.json", "index.json", "commits/shard-000001.json"])
def test_the_version_counts_wherever_it_stands(known_store: Store, file: str) -> None:
    path = Path(known_store.root, file)

    def without(values: dict[str, Any]) -> None:
        del values["version"], values["more"]

    def newer(values: dict[str, Any]) -> None:
        values.pop("version")
        values["more"] = "x" * 5000
        values["version"] = 3

    read_texts(known_store)
    for change, reason in (
        (newer, "is of version 3, newer than this software knows (2); update it"),
        (without, "is damaged: version: Field required"),
    ):
        edit_json(path, change)
        with pytest.raises(UserError) as error:
            read_texts(known_store)
        assert str(error.value).endswith(f"{file} {reason}")


@pytest.mark.parametrize("file", ["manifest.json", "index.json", "commits/shard-000001.json"])
def test_no_file_of_text_fills_the_memory(known_store: Store, file: str) -> None:
    path = Path(known_store.root, file)
    with path.open("rb+") as handle:
        handle.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match=f"{file} is damaged: it is longer than 256 MB"):
        read_texts(known_store)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{file} is damaged: Invalid JSON"):
        read_texts(known_store)


def test_attention_that_no_memory_holds_is_not_computed(
    edited: Callable[[Change], Store],
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        stream = manifest["streams"]["activations"]
        stream["teacher"]["grid"] = [256, 256]
        stream["columns"]["tokens"]["shape"] = [1 + 256 * 256, 96]

    store = edited(change)
    for layers, reason in (((3, 4), "the attention of one image in stream"), ((), "grid is")):
        with pytest.raises(UserError, match=reason):
            open_targets(store, None, Wanted(True, layers, 6), torch.device("cpu"))


def test_fidelity_makes_no_student_that_no_memory_holds(
    edited: Callable[[Change], Store],
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["resolution"] = 4096
        manifest["autoencoder"]["latent_shape"] = [4, 2048, 2048]
        for name in ("mean", "std"):
            latents(name, shape=[4, 2048, 2048])(manifest)

    with pytest.raises(UserError, match="a student like this teacher is too large"):
        measure_fidelity(edited(change), 1)


def test_no_stream_takes_the_folder_of_the_commit_records() -> None:
    with pytest.raises(UserError, match="add_stream: 'commits' is the folder of the commit"):
        validate(ExtractConfig, {"add_stream": "commits"}, where="x")
