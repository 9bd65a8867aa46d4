"""A store in another form: the same targets where that is possible, a refusal where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.alignment.tail import load_tail, tail_file
from pipeline.alignment.targets import Targets, Wanted, read_targets
from pipeline.convert import Conversion, convert, job
from pipeline.convert.fineness import is_finer
from pipeline.convert.shard import convert_shard
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.plan import make_manifest, make_stream, make_tasks, with_tail
from pipeline.inspect.summary import describe, summarise
from pipeline.store import ShardWriter, Store, StreamReader
from pipeline.store.__main__ import main
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.options import merge
from schemas.store import SkippedImage
from tests.helpers import all_files, known_key, known_manifest, known_values, write_known_store

SAMPLES, SHARD, BATCH = 11, 4, 3
WANTED = Wanted(features=True, layers=(5, 3), heads=6)

Extract = Callable[..., Store]


def options(folder: Path, **given: Any) -> ExtractConfig:
    values = {"dataset": "demo", "store": str(folder), "shard_size": SHARD, "batch_size": BATCH}
    return ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, given))


def digits(config: ExtractConfig) -> Listing:
    everything = list_images(config)
    return Listing(everything.items[:SAMPLES], everything.num_classes)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """Extractions of the first digits by the demo's networks, each made once. Read them only."""
    root = tmp_path_factory.mktemp("extracted")
    made: dict[str, Store] = {}

    def extract(**given: Any) -> Store:
        name = "-".join(f"{key}_{value}" for key, value in given.items()) or "default"
        if name not in made:
            made[name] = encode(options(root / name.replace(" ", ""), **given))
        return made[name]

    return extract


def encode(config: ExtractConfig) -> Store:
    encoder = Encoder(config, device="cpu", threads=1)
    assert config.store is not None
    listing = digits(config)
    tail = encoder.save_tail(config.store)
    manifest = with_tail(make_manifest(config, listing, encoder.describe()), config.cut, tail)
    store = Store.create(config.store, manifest)
    for task in make_tasks(listing, config.shard_size):
        encoder.encode_shard(store.url, manifest, task)
    store.finish()
    return store


def with_added_stream(store: Store, **given: Any) -> None:
    config = options(Path(store.root), **given)
    encoder = Encoder(config, device="cpu", threads=1)
    name = str(config.add_stream)
    stream = make_stream(config, encoder.describe())
    manifest = store.manifest.model_copy(
        update={"streams": {**store.manifest.streams, name: stream}}
    )
    grown = Store.create(store.url, with_tail(manifest, name, encoder.save_tail(store.url)))
    for task in make_tasks(digits(config), SHARD):
        encoder.encode_shard(grown.url, grown.manifest, task)
    grown.finish()


def converted(source: Store, folder: Path, **given: Any) -> Store:
    return run(source, folder, **given).store


def run(source: Store, folder: Path, **given: Any) -> Conversion:
    config = {"source": source.url, "target": str(folder), "device": "cpu", **given}
    return convert(ConvertConfig.model_validate(config))


def targets_of(store: Store, wanted: Wanted = WANTED) -> Targets:
    torch.set_num_threads(1)
    numbers = np.arange(SAMPLES)
    return read_targets(store, numbers // SHARD, numbers % SHARD, wanted)


def assert_close(one: Targets, other: Targets, rtol: float, atol: float) -> None:
    torch.testing.assert_close(one.features, other.features, rtol=rtol, atol=atol)
    torch.testing.assert_close(one.attention, other.attention, rtol=rtol, atol=atol)


def arrays_of(store: Store, stream: str) -> dict[str, np.ndarray]:
    reader = StreamReader(store, stream)
    numbers = np.arange(SAMPLES)
    return reader.read(numbers // SHARD, numbers % SHARD)


def assert_same_arrays(one: Store, other: Store, stream: str, to: str | None = None) -> None:
    a, b = arrays_of(one, stream), arrays_of(other, to or stream)
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].tobytes() == b[part].tobytes(), part


@pytest.mark.parametrize(
    "given",
    [
        {"codec": "faithful"},
        {"cut": "qk", "codec": "int8"},
        {"cut": "activations", "codec": "bfloat16"},
        {"cut": "image", "compress": False},
    ],
)
def test_another_format_and_back_is_byte_identical(
    extracted: Extract, tmp_path: Path, given: dict[str, Any]
) -> None:
    tars = extracted(**given)
    arrays = converted(tars, tmp_path / "zarr", format="zarr")
    name = tars.manifest.teacher_stream()[0]
    assert arrays.manifest.format == "zarr"
    assert arrays.manifest.streams["latents"].columns == tars.manifest.streams["latents"].columns
    for stream in ("latents", name):
        assert_same_arrays(tars, arrays, stream)
    back = converted(arrays, tmp_path / "tars", format="webdataset")
    assert all_files(Path(back.root)) == all_files(Path(tars.root))


def test_a_converted_zarr_is_the_one_that_extraction_makes(
    extracted: Extract, tmp_path: Path
) -> None:
    """But for its tars' history, also in what the manifest says."""
    tars, arrays = extracted(cut="qk"), extracted(cut="qk", format="zarr")
    made = converted(tars, tmp_path / "zarr", format="zarr")
    assert all_files(Path(made.root)) == all_files(Path(arrays.root))
    assert made.manifest.teacher_streams["qk"].converted_from == ()


def test_uncompressed_and_compressed_again(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="qk", codec="int8")
    plain = run(store, tmp_path / "plain", compress=False)
    assert plain.bytes_after > plain.bytes_before
    assert {c.lossless for c in plain.store.manifest.streams["qk"].columns.values()} == {"none"}
    zarr = converted(plain.store, tmp_path / "zarr", format="zarr")  # keeps what it has
    assert {c.lossless for c in zarr.manifest.streams["qk"].columns.values()} == {"none"}
    packed = converted(plain.store, tmp_path / "packed", compress=True)
    assert all_files(Path(packed.root)) == all_files(Path(store.root))


@pytest.mark.parametrize("cut", ["maps", "qk", "activations"])
def test_another_codec_is_what_extraction_would_have_stored(
    extracted: Extract, tmp_path: Path, cut: str
) -> None:
    """From float32 not a bit differs; the second rounding of others stays within their promise."""
    exact = extracted(cut=cut, codec="float32")
    for codec in ("float16", "bfloat16", "int8", "faithful", "small"):
        made = converted(exact, tmp_path / codec, codec=codec)
        direct = extracted(cut=cut, codec=codec)
        assert made.manifest.streams[cut].columns == direct.manifest.streams[cut].columns
        assert_same_arrays(made, direct, cut)
        assert_same_arrays(made, exact, "latents")
    faithful = Store.open(str(tmp_path / "faithful"))
    small = run(faithful, tmp_path / "small-of-faithful", codec="small")
    assert small.bytes_after < small.bytes_before
    coarse, best = targets_of(small.store), targets_of(exact)
    assert divergence(best, coarse) < 1e-3
    assert torch.cosine_similarity(best.features, coarse.features, dim=-1).min() > 0.998


def divergence(exact: Targets, other: Targets) -> torch.Tensor:
    """Mean KL of attention rows in nats."""
    floor = torch.finfo(torch.float32).tiny
    p, q = (t.attention.double().clamp_min(floor) for t in (exact, other))
    return (p * (p / q).log()).sum(-1).mean()


def test_float16_widens_to_float32_without_a_change(extracted: Extract, tmp_path: Path) -> None:
    for codec in ("float16", "bfloat16"):
        half = extracted(codec=codec)
        wide = converted(half, tmp_path / codec, codec="float32")
        assert torch.equal(targets_of(half).features, targets_of(wide).features)
        assert torch.equal(targets_of(half).attention, targets_of(wide).attention)


def test_one_column_in_another_codec_leaves_the_others_alone(
    extracted: Extract, tmp_path: Path
) -> None:
    store = extracted(codec="faithful")
    made = converted(store, tmp_path / "b", column_codecs={"features": "rms12"})
    columns = made.manifest.streams["maps"].columns
    assert {name: column.codec for name, column in columns.items()} == {
        "features": "rms12",
        "class_token": "float16",
        "attention": "cbrt8",
    }
    was, now = arrays_of(store, "maps"), arrays_of(made, "maps")
    assert np.array_equal(was["attention"], now["attention"])
    assert np.array_equal(was["class_token"], now["class_token"])


@pytest.mark.parametrize("cut", ["qk", "activations", "image"])
@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_maps_of_an_earlier_cut_are_those_of_an_extraction(
    extracted: Extract, tmp_path: Path, cut: str, codec: str
) -> None:
    early = extracted(cut="image") if cut == "image" else extracted(cut=cut, codec="float32")
    made = converted(early, tmp_path / "maps", cut="maps", codec=codec)
    direct = extracted(cut="maps", codec=codec)
    name, stream = made.manifest.teacher_stream()
    was = direct.manifest.streams["maps"]
    assert (name, stream.cut, stream.tail) == ("maps", "maps", None)
    assert (stream.columns, stream.teacher) == (was.columns, was.teacher)
    assert not list(Path(made.root).glob("*.safetensors"))
    rounding = 1e-7 if codec == "float32" else 1e-3
    assert_close(targets_of(made), targets_of(direct), rtol=2e-5 + rounding, atol=1e-6)
    if cut != "qk":  # the same arithmetic in the same batches
        assert_same_arrays(made, direct, "maps")
    assert [origin.cut for origin in stream.converted_from] == [cut]
    assert "made from  " + cut in describe(made, summarise(made))


def test_lossy_activations_give_maps_within_their_promise(
    extracted: Extract, tmp_path: Path
) -> None:
    store = extracted(cut="activations", codec="faithful")
    maps = converted(store, tmp_path / "maps", cut="maps")
    codecs = {c.codec for c in maps.manifest.streams["maps"].columns.values()}
    assert codecs == {"rms26", "float16", "cbrt8"}
    assert divergence(targets_of(extracted(codec="float32")), targets_of(maps)) < 3e-4
    origin = maps.manifest.teacher_streams["maps"].converted_from[0]
    assert origin.codecs == {"tokens": "tokens23"}
    assert origin.layers == (2, 3, 4, 5)


def test_queries_and_keys_of_activations(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="activations", codec="float32")
    qk = converted(store, tmp_path / "qk", cut="qk")
    assert_same_arrays(qk, extracted(cut="qk", codec="float32"), "qk")
    maps = converted(qk, tmp_path / "maps", cut="maps")
    assert_close(targets_of(maps), targets_of(extracted(codec="float32")), rtol=2e-5, atol=1e-6)
    cuts = [origin.cut for origin in maps.manifest.teacher_streams["maps"].converted_from]
    assert cuts == ["activations", "qk"]


@pytest.mark.parametrize("cut", ["image", "activations"])
def test_a_later_cut_carries_its_own_tail(extracted: Extract, tmp_path: Path, cut: str) -> None:
    early = extracted(cut="image") if cut == "image" else extracted(cut=cut, codec="float32")
    direct = extracted(cut="activations", codec="float32", layers=(3, 5))
    made = converted(early, tmp_path / "b", cut="activations", layers=(3, 5), codec="float32")
    assert_same_arrays(made, direct, "activations")
    file = tail_file("activations")
    assert (Path(made.root) / file).read_bytes() == (Path(direct.root) / file).read_bytes()
    stream = made.manifest.teacher_streams["activations"]
    assert stream.tail == direct.manifest.teacher_streams["activations"].tail
    assert load_tail(made, "activations", (5,)).first_block == 3
    assert torch.equal(targets_of(made).attention, targets_of(direct).attention)
    assert torch.equal(targets_of(made).features, targets_of(direct).features)


@pytest.mark.parametrize("codec", ["faithful", "float16"])
@pytest.mark.parametrize("cut", ["maps", "qk"])
def test_fewer_layers_are_a_slice(extracted: Extract, tmp_path: Path, cut: str, codec: str) -> None:
    store = extracted(cut=cut, codec=codec)
    made = converted(store, tmp_path / "b", layers=(3, 5))
    stream = made.manifest.teacher_streams[cut]
    assert (stream.teacher.layers, stream.converted_from) == ((3, 5), ())
    was, now = arrays_of(store, cut), arrays_of(made, cut)
    for part in was:
        layered = part.partition(".")[0] in {"attention", "query", "key"}
        assert np.array_equal(was[part][:, [1, 3]] if layered else was[part], now[part])
    assert torch.equal(targets_of(made).attention, targets_of(store).attention)
    assert_same_arrays(made, extracted(cut=cut, codec=codec, layers=(3, 5)), cut)


def test_other_layers_of_the_same_tokens_are_copies(extracted: Extract, tmp_path: Path) -> None:
    """A tail gives every layer behind it, and the whole teacher all."""
    tokens = converted(extracted(cut="activations"), tmp_path / "a", layers=(2, 5))
    assert_same_arrays(tokens, extracted(cut="activations"), "activations")
    assert tokens.manifest.teacher_streams["activations"].converted_from == ()
    crops = converted(extracted(cut="image"), tmp_path / "i", layers=(0, 1))
    assert_same_arrays(crops, extracted(cut="image"), "image")
    assert crops.manifest.teacher_streams["image"].teacher.layers == (0, 1)
    targets_of(crops, Wanted(features=True, layers=(1,), heads=6))


def test_results_do_not_depend_on_workers_and_interruptions(
    extracted: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = extracted(cut="activations", codec="faithful")
    given: dict[str, Any] = {"cut": "maps", "format": "zarr"}
    whole = run(store, tmp_path / "whole", **given, workers=1)
    many = run(store, tmp_path / "many", **given, workers=3)
    assert (whole.shards, many.shards) == (3, 3)
    assert all_files(tmp_path / "whole") == all_files(tmp_path / "many")

    broken = tmp_path / "broken"
    publish = ShardWriter.commit
    for alive in (1, 0):

        def die(writer: ShardWriter, *args: Any, alive: int = alive, **kwargs: Any) -> Any:
            if writer.shard >= alive:
                raise KeyboardInterrupt
            return publish(writer, *args, **kwargs)

        monkeypatch.setattr(ShardWriter, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            run(store, broken, **given, workers=1)
        monkeypatch.undo()
    assert Store.open(str(broken)).missing_shards() == [1, 2]
    with pytest.raises(UserError, match="run its extraction or conversion again"):
        Store.open(str(broken)).require_complete()
    assert run(store, broken, **given).shards == 2
    assert all_files(broken) == all_files(tmp_path / "whole")
    assert run(store, broken, **given).shards == 0
    (broken / "index.json").unlink()
    run(store, broken, **given)
    assert all_files(broken) == all_files(tmp_path / "whole")


def test_a_lost_tail_comes_back(extracted: Extract, tmp_path: Path) -> None:
    given: dict[str, Any] = {"cut": "activations", "layers": (3, 5)}
    made = converted(extracted(cut="image"), tmp_path / "b", **given)
    file = Path(made.root) / tail_file("activations")
    before = file.read_bytes()
    file.unlink()
    run(extracted(cut="image"), tmp_path / "b", **given)
    assert file.read_bytes() == before


def test_a_failing_shard_leaves_one_line(
    extracted: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Store, target: Store, group: Any, shard: int, *args: Any) -> int:
        if shard == 1:
            with monkeypatch.context() as patch:
                patch.setattr(ShardWriter, "add", full_disk)
                return convert_shard(source, target, group, shard, *args)
        return convert_shard(source, target, group, shard, *args)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "convert_shard", fail)
    message = refusal(extracted(), tmp_path / "b", format="zarr", workers=1)
    assert message.startswith("shard 1 of ")
    assert "No space left" in message
    assert not list((tmp_path / "b").rglob(".tmp-*"))


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "a"))
    path = tmp_path / "a" / "maps" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    message = refusal(store, tmp_path / "b", format="zarr")
    assert "stream 'maps', shard 1" in message
    assert "checksum is wrong" in message
    assert 1 in Store.open(str(tmp_path / "b")).missing_shards()


def test_skipped_images_uneven_shards_and_urls(tmp_path: Path) -> None:
    sizes = (3, 0, 2)
    store = Store.create(str(tmp_path / "a"), known_manifest(sizes))
    for shard, samples in enumerate(sizes):
        with ShardWriter(store.url, store.manifest, shard) as writer:
            for row in range(samples):
                writer.add(known_key(shard, row), known_values(shard, row))
            image = SkippedImage(key=f"bad-{shard}", path=f"bad-{shard}.png", error="is empty")
            writer.commit(skipped=[image] * (samples < 3))
    store.finish()
    source = Store.open(f"file://{tmp_path}/a")
    zarr = convert(
        ConvertConfig(source=source.url, target=f"file://{tmp_path}/z", format="zarr")
    ).store
    assert [image.key for image in zarr.manifest.skipped] == ["bad-1", "bad-2"]
    assert zarr.index().samples_per_shard == [3, 0, 2]
    converted(zarr, tmp_path / "b", format="webdataset")
    assert all_files(tmp_path / "b") == all_files(tmp_path / "a")


def test_several_teacher_streams(tmp_path: Path) -> None:
    store = encode(options(tmp_path / "a", cut="qk", codec="float32"))
    with_added_stream(store, add_stream="tokens", cut="activations", codec="float32")
    store = Store.open(store.url)

    both = converted(store, tmp_path / "both", format="zarr")
    assert both.added_streams == ["tokens"]
    converted(both, tmp_path / "again", format="webdataset")
    assert all_files(tmp_path / "again") == all_files(tmp_path / "a")

    maps = converted(store, tmp_path / "maps", cut="maps")
    assert list(maps.manifest.streams) == ["latents", "maps", "tokens"]
    assert maps.manifest.teacher_streams["tokens"].cut == "maps"
    assert not list((tmp_path / "maps").glob("*.safetensors"))

    one = converted(store, tmp_path / "one", stream="tokens", codec="small")
    assert list(one.manifest.streams) == ["latents", "tokens"]
    one.require_complete("latents", "tokens")
    assert one.index().bytes_per_stream.keys() == {"latents", "tokens"}
    targets_of(one)

    assert "no teacher stream 'x', only qk, tokens" in refusal(store, tmp_path / "x", stream="x")
    (Path(store.root) / "commits" / "tokens" / "shard-000001.json").unlink()
    assert "stream 'tokens' of store" in refusal(store, tmp_path / "x", format="zarr")
    converted(store, tmp_path / "first", stream="qk", format="zarr")  # does not need it


def refusal(source: Store, folder: Path, **given: Any) -> str:
    """What the user is told: one line."""
    with pytest.raises(UserError) as error:
        run(source, folder, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "cut"),
    [
        ("maps", "qk"),
        ("maps", "activations"),
        ("maps", "image"),
        ("qk", "activations"),
        ("qk", "image"),
        ("activations", "image"),
    ],
)
def test_an_earlier_cut_is_refused(
    extracted: Extract, tmp_path: Path, source: str, cut: str
) -> None:
    store = extracted() if source == "maps" else extracted(cut=source)
    message = refusal(store, tmp_path / "b", cut=cut)
    assert message.startswith(f"--cut {cut}: stream '{source}' of ")
    assert f"keeps the cut '{source}'" in message
    assert (
        f"python -m pipeline.extract --store {store.url} --add-stream NAME --cut {cut}" in message
    )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("source", "layers", "lacking", "held"),
    [
        ("maps", (1, 3), "1", "2,3,4,5"),
        ("qk", (5, 6, 7), "6,7", "2,3,4,5"),
        ("activations", (1, 3), "1", "2,3,4,5"),
        ("image", (5, 6), "6", "0,1,2,3,4,5"),
    ],
)
def test_layers_that_cannot_be_had_are_named(
    extracted: Extract, tmp_path: Path, source: str, layers: Any, lacking: str, held: str
) -> None:
    store = extracted() if source == "maps" else extracted(cut=source)
    message = refusal(store, tmp_path / "b", layers=layers)
    asked = ",".join(map(str, layers))
    assert message.startswith(f"--layers {asked}: stream '{source}' of ")
    assert f"cannot give layer {lacking}, only {held}" in message


def test_finer_codecs_are_refused(extracted: Extract, tmp_path: Path) -> None:
    for was, now in [
        ("int8", "float32"),
        ("faithful", "float16"),
        ("small", "int8"),
        ("small", "faithful"),
    ]:
        message = refusal(extracted(codec=was), tmp_path / "b", codec=now)
        assert message.startswith(f"--codec {now}: stream 'maps' of ")
        assert "no more faithful" in message
    message = refusal(extracted(), tmp_path / "b", column_codecs={"attention": "float32"})
    assert message.startswith("--column-codecs.attention float32: stream 'maps' of ")
    message = refusal(extracted(), tmp_path / "b", column_codecs={"query": "int8"})
    assert "has no tensor of this name, only features" in message


def test_mixed_codecs_do_not_say_how_to_store_another_cut(
    extracted: Extract, tmp_path: Path
) -> None:
    mixed = converted(
        extracted(cut="qk", codec="float32"), tmp_path / "a", column_codecs={"key": "int8"}
    )
    message = refusal(mixed, tmp_path / "b", cut="maps")
    assert message.startswith("--codec is missing: ")
    assert message.endswith("how to store attention")
    maps = converted(mixed, tmp_path / "b", cut="maps", column_codecs={"attention": "float16"})
    codecs = {n: c.codec for n, c in maps.manifest.streams["maps"].columns.items()}
    assert codecs == {"features": "float32", "class_token": "float32", "attention": "float16"}


def test_another_conversion_is_refused(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(codec="float32")
    converted(store, tmp_path / "b", codec="float16")
    before = all_files(tmp_path / "b")
    for source, given in [
        (store, {"codec": "bfloat16"}),
        (store, {"codec": "float16", "format": "zarr"}),
        (store, {"codec": "float16", "layers": (3, 5)}),
        (extracted(codec="float16"), {}),  # the same numbers, by another way
        (extracted(codec="float32", order_seed=1), {"codec": "float16"}),
        (extracted(cut="qk"), {}),
    ]:
        message = refusal(source, tmp_path / "b", **given)
        assert f"store '{tmp_path / 'b'}' was made with " in message
        assert message.endswith("name another target, or the same source and options")
    assert all_files(tmp_path / "b") == before


def test_places(extracted: Extract, tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "a"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    for place in (tmp_path / "a", link, f"file://{tmp_path}/a"):
        assert "is the store to convert" in refusal(store, place, format="zarr")  # type: ignore[arg-type]
    assert "lies inside the other store" in refusal(store, tmp_path / "a" / "b")
    assert "holds the store to convert" in refusal(store, tmp_path)
    (tmp_path / "a" / "commits" / "shard-000001.json").unlink()
    assert "is not complete: 1 of 4 shards" in refusal(store, tmp_path / "b", format="zarr")
    assert not (tmp_path / "b").exists()


def test_a_manifest_that_lies_is_refused(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "a"))
    maps = store.manifest.teacher_streams["maps"]
    columns = {name: maps.columns[name] for name in ("features", "class_token")}
    streams = {
        **store.manifest.streams,
        "maps": maps.model_copy(update={"columns": columns}),
    }
    liar = Store.create(store.url, store.manifest.model_copy(update={"streams": streams}))
    assert "does not hold what its cut 'maps' keeps" in refusal(liar, tmp_path / "b")


def test_float16_arithmetic_needs_a_gpu(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="activations")
    stream = store.manifest.teacher_streams["activations"]
    half = stream.compute.model_copy(update={"precision": "float16"})
    streams = {
        **store.manifest.streams,
        "activations": stream.model_copy(update={"compute": half}),
    }
    manifest = store.manifest.model_copy(update={"streams": streams, "num_shards": 3})
    fake = Store.create(str(tmp_path / "a"), manifest)
    for shard in range(3):
        with ShardWriter(fake.url, manifest, shard) as writer:
            writer.commit()
    assert "needs a GPU" in refusal(fake, tmp_path / "b", cut="maps")


@pytest.mark.parametrize(
    ("now", "was", "finer"),
    [
        ("float32", "float16", False),
        ("float16", "bfloat16", False),
        ("float32", "int8_centred", True),
        ("bfloat16", "cbrt8", True),
        ("rms26", "rms26", False),
        ("rms27", "rms26", True),
        ("rms8", "rms26", False),
        ("int8", "int8_centred", False),
        ("int8", "tokens20", False),
        ("int8", "tokens8", True),
        ("heads64", "int8", True),
        ("heads24", "int8", False),
        ("tokens20", "rms8", False),
        ("sqrt220", "cbrt8", False),
        ("cbrt8", "sqrt220", True),
        ("int8", "sqrt220", False),
        ("tokens200", "float32", False),
    ],
)
def test_order_of_codecs(now: str, was: str, finer: bool) -> None:
    assert is_finer(now, was) is finer


def test_command(extracted: Extract, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", extracted(codec="float32").url, str(tmp_path / "b"), "--codec", "float16"]
    assert main([*argv, "--format", "zarr", "--layers", "3-5"]) == 0
    out, err = capsys.readouterr()
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'b'} is complete: 11 samples in 3 shards; ")
    before, after = (float(word) for word in last.split() if word.isdigit() and len(word) > 3)
    assert after < before / 2
    assert "convert: 100%" in err
    assert main([*argv, "--format", "zarr", "--layers", "3-5"]) == 0
    assert "was complete already" in capsys.readouterr().out
    for wrong, told in [
        (["copy"], "there is only 'convert'"),
        (["convert", "a"], "name two stores"),
        ([*argv, "c"], "unexpected argument 'c'"),
        ([*argv, "--cot", "maps"], "did you mean '--cut'"),
        ([*argv, "--layers", "5,3"], "lowest first"),
        (["convert", str(tmp_path / "none"), "b"], "holds no store"),
    ]:
        with pytest.raises(UserError, match=told):
            main(wrong)
    assert main(["--help"]) == 0
    assert "convert SOURCE TARGET" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "not the others" in capsys.readouterr().out
