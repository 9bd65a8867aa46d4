"""The class stream: extracted beside every cut, and computed from stores that lack it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.convert.class_stream import add_class_stream
from pipeline.extract.compatibility import check_request
from pipeline.extract.encoder import Encoder
from pipeline.extract.job import extract
from pipeline.extract.target_store import missing_tasks, open_store
from pipeline.extract.tasks import make_tasks
from pipeline.inspect.orphans import find_orphans
from pipeline.inspect.summary import describe, summarise
from pipeline.inspect.verify import verify_store
from pipeline.store import Store, StreamReader
from pipeline.targets.class_token import read_class_tokens
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.streams import ClassStream
from tests.conversions import BATCH, SAMPLES, SHARD, converted, digits, encode, options
from tests.encoded import demo_like
from tests.helpers import all_files, edit_json, recorded_opens

CUTS = ("maps", "qk", "activations", "image")
NO_CLASS_TOKEN: dict[str, Any] = {
    "teacher": {
        "model": "vit_base_patch16_siglip_224.webli",
        "weights": "random",
        "image_size": 32,
        "model_args": {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 4},
    },
    "layers": (1, 2),
}
NUMBERS = np.arange(SAMPLES)
ROWS = NUMBERS // SHARD, NUMBERS % SHARD


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(store: Store, name: str = "class") -> np.ndarray:
    return StreamReader(store, name).read(*ROWS)["class_token"]


def expected(config: ExtractConfig, mean: bool = False) -> torch.Tensor:
    """By the definition: timm's tokens after its norm, in batches as the extraction has them."""
    encoder = Encoder(config, device="cpu", threads=1)
    vit, found = encoder.teacher.vit, []
    for task in make_tasks(digits(config), SHARD):
        for start in range(0, len(task.items), BATCH):
            crops = np.stack([encoder._decode(i)[0] for i in task.items[start : start + BATCH]])
            pixels = encoder.teacher.preprocess(torch.from_numpy(crops).permute(0, 3, 1, 2))
            with torch.inference_mode():
                out = vit.forward_features(pixels)
            found.append(out[:, vit.num_prefix_tokens :].mean(1) if mean else out[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_has_the_class_token_beside_it(tmp_path: Path, cut: str, format: str) -> None:
    config = options(tmp_path / "store", cut=cut, format=format)
    store = encode(config)
    stream = store.manifest.streams["class"]
    assert isinstance(stream, ClassStream)
    assert (stream.token, stream.added, stream.teacher.layers) == ("class", False, ())
    assert list(store.manifest.streams) == ["latents", cut, "class"]
    found = read_class_tokens(store, *ROWS)
    torch.testing.assert_close(found, expected(config), rtol=1e-3, atol=1e-3)
    if cut in {"maps", "qk"}:
        np.testing.assert_array_equal(tokens(store), tokens(store, cut))
    assert verify_store(store).damaged == []
    assert find_orphans(store).removable == find_orphans(store).unknown == []
    assert store.record(0).streams.keys() == {"latents", cut, "class"}


def test_tokens_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    made = [tokens(encode(options(tmp_path / cut, cut=cut))) for cut in CUTS]
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def test_the_codec_of_the_column_is_that_of_the_stream(tmp_path: Path) -> None:
    for cut in ("maps", "activations"):
        config = options(tmp_path / cut, cut=cut, column_codecs={"class_token": "float32"})
        store = encode(config)
        assert tokens(store).dtype == np.float32
        exact = expected(config)
        torch.testing.assert_close(torch.from_numpy(tokens(store)), exact, rtol=1e-6, atol=1e-6)
    half = encode(options(tmp_path / "half", cut="maps"))
    error = np.abs(tokens(half).astype(np.float32) - tokens(store)) / np.abs(tokens(store))
    assert 1e-5 < error.max() < 2**-11  # half a unit in the last place


def test_none_and_a_teacher_without_class_token_write_no_stream(tmp_path: Path) -> None:
    none = encode(options(tmp_path / "none", cut="activations", class_token="none"))
    siglip = encode(options(tmp_path / "siglip", **NO_CLASS_TOKEN))
    for store in (none, siglip):
        assert store.manifest.class_streams == {}
    with pytest.raises(UserError, match=r"--column-codecs.class_token: cut 'image' has no"):
        encode(
            options(
                tmp_path / "x",
                cut="image",
                class_token="none",
                column_codecs={"class_token": "float32"},
            )
        )


@pytest.mark.parametrize("cut", CUTS)
def test_the_mean_is_stored_where_it_is_asked_for(tmp_path: Path, cut: str) -> None:
    config = options(tmp_path / "store", **NO_CLASS_TOKEN, cut=cut, class_token="mean")
    store = encode(config)
    stream = store.manifest.class_streams["class"]
    assert stream.token == "mean"
    text = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert text["streams"]["class"]["token"] == "mean"
    found = read_class_tokens(store, *ROWS)
    torch.testing.assert_close(found, expected(config, mean=True), rtol=2e-3, atol=1e-3)


def without_class_stream(store: Store) -> Store:
    """The store as an earlier version would have written it."""
    root = Path(store.root)
    for path in [root / "manifest.json", *root.glob("commits/*.json")]:
        edit_json(path, lambda values: values["streams"].pop("class"))
    edit_json(root / "index.json", lambda values: values["bytes_per_stream"].pop("class"))
    for path in sorted(root.glob("class/**/*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "class").rmdir()
    (root / "zarr.json").unlink(missing_ok=True)
    return Store.open(store.url)


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
@pytest.mark.parametrize("cut", CUTS)
def test_what_is_computed_later_is_what_is_extracted(tmp_path: Path, cut: str, format: str) -> None:
    """Bit for bit: the tokens of 'activations' are stored in float32 for it."""
    codecs = {"tokens": "float32"} if cut == "activations" else {}
    config = options(tmp_path / "store", cut=cut, format=format, column_codecs=codecs)
    extracted = tokens(encode(config))
    old = without_class_stream(Store.open(str(tmp_path / "store")))
    before = all_files(Path(old.root))
    with recorded_opens() as paths:
        codec = "float16" if codecs else None
        store, samples = add_class_stream(old, "class", codec=codec, device="cpu", workers=2)
    assert samples == SAMPLES
    np.testing.assert_array_equal(tokens(store), extracted)
    if format == "zarr" and cut in {"maps", "qk"}:
        assert not any("/attention/" in path or "/query/" in path for path in paths)
    after = all_files(Path(store.root))
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"manifest.json", "index.json"}
    stream = store.manifest.class_streams["class"]
    assert (stream.added, [origin.cut for origin in stream.converted_from]) == (True, [cut])
    assert verify_store(store).damaged == []
    assert find_orphans(store).removable == []
    assert add_class_stream(store, "class", codec=codec, device="cpu")[1] == 0
    assert all_files(Path(store.root)) == after


def test_a_quantised_cut_gives_nearly_the_same(tmp_path: Path) -> None:
    extracted = read_class_tokens(encode(options(tmp_path / "s", cut="activations")), *ROWS)
    old = without_class_stream(Store.open(str(tmp_path / "s")))
    store, _ = add_class_stream(old, "class", device="cpu")
    found = read_class_tokens(store, *ROWS)
    assert torch.cosine_similarity(found, extracted).min() > 0.9999
    assert not torch.equal(found, extracted)


def test_an_interrupted_computation_is_completed(tmp_path: Path) -> None:
    encode(options(tmp_path / "store", cut="activations"))
    store, _ = add_class_stream(
        without_class_stream(Store.open(str(tmp_path / "store"))), "class", device="cpu"
    )
    whole = all_files(Path(store.root))
    Path(store.root, "commits", "class", "shard-000001.json").unlink()
    with pytest.raises(UserError, match=r"stream 'class' of store .* 1 of 3 shards are missing"):
        Store.open(store.url).require_complete("class")
    assert add_class_stream(Store.open(store.url), "class", device="cpu")[1] == SHARD
    assert all_files(Path(store.root)) == whole
    with pytest.raises(UserError, match="was made with class_token class, not mean"):
        add_class_stream(Store.open(store.url), "class", "mean", device="cpu")


def test_the_mean_of_stored_features(tmp_path: Path) -> None:
    config = options(tmp_path / "s", codec="float32", class_token="none")
    store, _ = add_class_stream(encode(config), "class", "mean", device="cpu")
    assert store.manifest.class_streams["class"].columns["class_token"].codec == "float32"
    found = read_class_tokens(store, *ROWS)
    torch.testing.assert_close(found, expected(config, mean=True), rtol=1e-5, atol=1e-5)
    page = describe(store, summarise(store))
    assert "token      mean of the patch tokens of vit_small_patch14_dinov2.lvd142m" in page
    assert "made from  maps (float32)" in page
    # the column of a teacher without class token is that mean
    column = encode(options(tmp_path / "siglip", **NO_CLASS_TOKEN))
    store, _ = add_class_stream(column, "class", "mean", device="cpu")
    np.testing.assert_array_equal(tokens(store), tokens(store, "maps"))


def test_what_a_store_cannot_give_is_one_line(tmp_path: Path) -> None:
    siglip = encode(options(tmp_path / "siglip", **NO_CLASS_TOKEN))
    maps = encode(options(tmp_path / "maps", class_token="none"))
    image = encode(options(tmp_path / "image", cut="image", class_token="none"))
    lost = encode(options(tmp_path / "lost", cut="activations", class_token="none"))
    Path(lost.root, "activations_teacher_tail.safetensors").unlink()
    cases: list[tuple[Store, str, dict[str, Any], str]] = [
        (siglip, "class", {}, "no class token; --class-token mean takes the mean"),
        (maps, "clip_class", {}, "no teacher stream to compute it from; it can compute maps_class"),
        (maps, "class", {"codec": "float32"}, "in float16, which are copied: leave out"),
        (image, "class", {"codec": "uint8"}, "takes float16, bfloat16, float32"),
        (lost, "class", {}, "activations_teacher_tail.safetensors is missing"),
    ]
    for store, name, given, complaint in cases:
        with pytest.raises(UserError, match=complaint) as error:
            add_class_stream(store, name, device="cpu", **given)
        assert "\n" not in str(error.value)
    Path(maps.root, "commits", "shard-000001.json").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        add_class_stream(maps, "class", device="cpu")
    assert "class" not in Store.open(maps.url).manifest.streams


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"source": "/images"}, "leave out --source"),
        ({"cut": "maps"}, "leave out --cut"),
        ({"column_codecs": {"features": "float32"}}, "leave out --column-codecs.features"),
        ({"class_token": "none"}, "--class-token none adds nothing"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, given: dict[str, Any], complaint: str
) -> None:
    encode(options(tmp_path / "store", class_token="none"))
    values = {"store": str(tmp_path / "store"), "add_stream": "class", **given}
    with pytest.raises(UserError, match=complaint):
        extract(ExtractConfig.model_validate(values))


def test_conversions_keep_class_tokens(tmp_path: Path) -> None:
    store = encode(options(tmp_path / "store", cut="activations"))
    other = converted(store, tmp_path / "other", cut="maps", format="zarr", codec="small")
    assert list(other.manifest.streams) == ["latents", "maps", "class"]
    np.testing.assert_array_equal(tokens(other), tokens(store))
    alone = converted(store, tmp_path / "alone", stream="activations")
    np.testing.assert_array_equal(tokens(alone), tokens(store))


@pytest.mark.usefixtures("without_ray")
def test_an_added_stream_has_its_own_class_stream(images: Path, tmp_path: Path) -> None:
    base = demo_like(images, tmp_path / "store", actors=1)
    extract(base)
    teacher = {**base.teacher.model_dump(), "weights": "random"}
    values = {"store": base.store, "add_stream": "second", "cut": "activations", "layers": (3, 4)}
    added = ExtractConfig.model_validate({**values, "batch_size": 2, "teacher": teacher})
    store = extract(added).store
    assert list(store.manifest.streams) == ["latents", "maps", "class", "second", "second_class"]
    assert store.manifest.class_stream("second")[0] == "second_class"
    assert store.manifest.class_stream("maps")[0] == "class"
    whole = all_files(Path(store.root))
    for stream in ("second", "second_class"):
        Path(store.root, "commits", stream, "shard-000001.json").unlink()
        again = extract(added)
        assert (again.images, all_files(Path(store.root)) == whole) == (3, True)
    assert extract(added).images == 0
    assert verify_store(store).damaged == []
    with pytest.raises(UserError, match="made with class_token class, this extraction has none"):
        extract(added.model_copy(update={"class_token": "none"}))
    long = {**values, "teacher": teacher, "add_stream": "x" * 60}
    with pytest.raises(UserError, match="has more than 64 characters: choose a shorter name"):
        extract(ExtractConfig.model_validate(long))


def test_a_store_that_was_begun_without_is_completed_without(tmp_path: Path) -> None:
    """As an earlier version began it; asked for by name, class tokens are refused with the way."""
    config = options(tmp_path / "store", cut="maps")
    encode(config)
    old = without_class_stream(Store.open(str(tmp_path / "store")))
    tars, record = all_files(Path(old.root, "maps")), old.record(1)
    for path in ("commits/shard-000001.json", "maps/shard-000001.tar", "index.json"):
        Path(old.root, path).unlink()
    encoder = Encoder(config, device="cpu", threads=1)
    check_request(config, digits(config), old)
    store = open_store(config, digits(config), old, encoder)
    (task,) = missing_tasks(config, digits(config), store)
    encoder.encode_shard(store.url, store.manifest, task)
    store.finish()
    assert all_files(Path(store.root, "maps")) == tars
    assert (store.record(1), store.manifest) == (record, old.manifest)
    for token in ("class", "mean"):
        asked = options(tmp_path / "store", class_token=token)
        with pytest.raises(UserError, match=r"made without class tokens: .*--add-stream class$"):
            check_request(asked, digits(config), store)
