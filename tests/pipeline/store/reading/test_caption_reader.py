"""Captions of visits against a plain reading: one generator a visit, every column of every row."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.randomness import Purpose, generator, uniform_pairs
from pipeline.store import BatchLoader, SampleOrder, ShardWriter, Store, StreamReader
from pipeline.store.reading.caption_reader import DROPPED, CaptionReader
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.row_request import ShardRows
from pipeline.store.reading.stream_reader import DamagedShardError
from tests.stores import add_text_stream, make_random_store

SEED, DROP = 5, 0.3
CASES = [  # codec, lossless, cached on a disk
    ("rms32", "zstd", False),
    ("rms32", "zstd", True),
    ("rms32", "none", False),
    ("float16", "blosc", False),
    ("float16", "none", True),
    ("rice24", "none", False),
    ("rice24", "none", True),
]


def text_store(folder: Path, codec: str = "rms32", lossless: str = "zstd", **kind: str) -> Store:
    return add_text_stream(
        make_random_store(folder, **kind), codec=codec, captions=4, lossless=lossless
    )


def plain_visits(
    store: Store, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of each visit's caption; zeros where it is dropped."""
    every = StreamReader(store, "text").read(shards, rows)
    names = [name for name in every if name.startswith("caption0")]
    found = {name.replace("caption0", "caption"): np.zeros_like(every[name]) for name in names}
    found[DROPPED] = np.zeros(len(rows), bool)
    for visit, (shard, row, epoch) in enumerate(np.stack([shards, rows, epochs], 1).tolist()):
        sample = shard * store.manifest.shard_size + row
        which, drop = generator(Purpose.CAPTION, SEED, epoch, sample).random(2)
        count = store.record(shard, "text").captions["text"].counts[row]
        found[DROPPED][visit] = drop < DROP
        if drop >= DROP:
            for name in names:
                chosen = name.replace("caption0", f"caption{int(which * count)}")
                found[name.replace("caption0", "caption")][visit] = every[chosen][visit]
    return found


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
@pytest.mark.parametrize(("codec", "lossless", "cached"), CASES)
def test_a_loader_reads_what_a_plain_reading_does(
    tmp_path: Path, format: str, codec: str, lossless: str, cached: bool
) -> None:
    store = text_store(tmp_path / "store", codec, lossless, format=format)
    order = SampleOrder(SEED, store.index().samples_per_shard, window=2)
    disk = DiskCache(tmp_path / "disk", 1 << 30) if cached else None
    loader = BatchLoader(
        store, ["latents", "text"], order, global_batch=5, disk=disk, caption_drop=DROP
    )
    for batch in islice(loader, 14):  # three epochs of 22 samples
        shards, rows = order.locate(batch.positions)
        expected = plain_visits(store, shards, rows, order.epochs_of(batch.positions))
        check(batch.columns["text"], expected)
    loader.close()


def test_captions_of_another_compression_are_read(tmp_path: Path) -> None:
    """A store that this software does not write."""
    url = text_store(tmp_path / "store", "float16", "none").url
    other = text_store(tmp_path / "other", "float16", "zstd")
    manifest, replaced = Path(url, "manifest.json"), "caption1"
    values = json.loads(manifest.read_text())
    values["streams"]["text"]["columns"][replaced]["lossless"] = "zstd"
    manifest.write_text(json.dumps(values))
    plain = Store.open(url)
    for shard in range(plain.manifest.num_shards):
        with ShardWriter(url, plain.manifest, shard, added="text") as writer:
            record = other.record(shard, "text")
            rows = np.arange(len(record.keys))
            found = StreamReader(other, "text").read(np.full(len(rows), shard), rows)
            for row, key in enumerate(record.keys):
                writer.add(key, {"text": {name: array[row] for name, array in found.items()}})
            writer.commit()
    store = Store.open(url)
    samples = np.arange(22)
    visits = samples // 6, samples % 6, samples % 3
    found = CaptionReader(store, seed=SEED, drop=DROP).columns(*visits)
    check(found, plain_visits(store, *visits))


def test_visits_of_any_order_are_read(tmp_path: Path) -> None:
    store = text_store(tmp_path / "store")
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 22, 60)  # repeated ones too
    visits = samples // 6, samples % 6, rng.integers(0, 4, 60)
    reader = CaptionReader(store, seed=SEED, drop=DROP)
    check(reader.columns(*visits), plain_visits(store, *visits))


def test_captions_of_a_shard_are_one_request_in_a_tar(tmp_path: Path) -> None:
    store = text_store(tmp_path / "store")
    reader = CaptionReader(store, seed=SEED, drop=0, epochs_of=np.zeros_like)
    rows = np.arange(6)
    groups = [ShardRows(shard, rows, rows + 6 * shard, 0, 0) for shard in range(3)]
    reader.fill(reader.empty(18), groups)
    assert reader.opens == 3
    held = store.record(0, "text").streams["text"][0]
    read = {name for name in held.sizes if name != "lengths"}
    assert 0 < reader.bytes_read < sum(sum(held.sizes[name]) for name in read) * 3


@pytest.mark.parametrize("lossless", ["zstd", "none"])
@pytest.mark.parametrize("part", ["caption2", "caption2.step"])
def test_damage_of_a_caption_is_named_and_no_other_visit_has_it(
    tmp_path: Path, lossless: str, part: str
) -> None:
    store = text_store(tmp_path / "store", lossless=lossless)
    row = store.record(1, "text").captions["text"].counts.index(4)
    (file,) = store.record(1, "text").streams["text"]
    begin, size = file.offsets[part][row], file.sizes[part][row]
    path = tmp_path / "store" / file.file
    data = bytearray(path.read_bytes())
    data[begin + size - 3] ^= 1
    path.write_bytes(data)
    named = rf"sample 'sample-{6 + row}', column '{part}'"
    damaged = 0
    for epoch in range(30):
        reader = CaptionReader(store, seed=SEED, drop=0)
        choice = reader.choose(np.array([1]), np.array([row]), np.array([epoch]))
        visit = np.array([1]), np.array([row]), np.array([epoch])
        if choice.number[0] == 2:
            damaged += 1
            with pytest.raises(DamagedShardError, match=named):
                reader.columns(*visit)
        else:
            reader.columns(*visit)
    assert damaged


def test_a_checksum_is_verified_once_for_each_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.store import checksums

    store, checked = text_store(tmp_path / "store"), []
    plain = dict(checksums.CHECKSUMS)
    for kind, function in plain.items():
        monkeypatch.setitem(
            checksums.CHECKSUMS,
            kind,
            lambda start, data, function=function: checked.append(1) or function(start, data),
        )
    reader = CaptionReader(store, seed=SEED, drop=0)
    shards, rows = np.zeros(6, np.int64), np.arange(6)
    seen = set()
    for epoch in range(12):
        visits = shards, rows, np.full(6, epoch)
        before = len(checked)
        reader.columns(*visits)
        new = set(enumerate(reader.choose(*visits).number.tolist())) - seen
        assert len(checked) - before == 3 * len(new)  # codes, steps and centre
        seen |= new


@pytest.mark.parametrize("seed", [0, 7, -3, (1 << 63) + 5, 1 << 70])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_pairs_of_uniform_numbers_are_those_of_generators(seed: int) -> None:
    rng = np.random.default_rng(0)
    epochs, samples = rng.integers(0, 1 << 62, 40), rng.integers(0, 1 << 40, 40)
    epochs[:2], samples[:3] = 0, [0, 1, 1 << 62]
    expected = [
        generator(Purpose.CAPTION, seed, *place).random(2)
        for place in zip(epochs.tolist(), samples.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(
        uniform_pairs(Purpose.CAPTION, seed, epochs, samples), np.array(expected)
    )
    three = [generator(Purpose.LABELS, seed, 1, 2, n).random(2) for n in range(5)]
    ones = np.ones(5, np.int64)
    found = uniform_pairs(Purpose.LABELS, seed, ones, 2 * ones, np.arange(5))
    np.testing.assert_array_equal(found, np.array(three))
    assert uniform_pairs(Purpose.LABELS, seed, ones[:0]).shape == (0, 2)
