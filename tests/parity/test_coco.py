"""MS-COCO as U-ViT's and HASTE's scripts prepare it: crops, moments, tokens, embeddings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.datasets import list_images
from pipeline.datasets.crop import decode_crop
from pipeline.extract.caption_sources import StoredCaptions, text_arrays
from pipeline.extract.encoder import Encoder
from pipeline.extract.latent_sources import StoredLatents
from pipeline.extract.target_store import open_store
from pipeline.extract.tasks import make_tasks
from pipeline.store import Store, StreamReader
from pipeline.store.captions import load_null, text_columns, unpack_texts
from pipeline.store.codecs import decode_column
from pipeline.store.reading.caption_reader import choose_captions
from schemas.extract import PRESETS, ExtractConfig, TextConfig
from schemas.networks import WeightsFile
from schemas.streams import TextStream
from tests.parity.reference import Golden, check_close

FILE = "coco_text"
SPLITS = ("train", "val")


@pytest.fixture
def sources(recipes: Golden) -> Path:
    """The folder of images; skips the test where the directory holds numbers only."""
    folder = recipes.folder / "coco"
    if not (folder / "source").is_dir():
        pytest.skip(f"{recipes.folder} holds numbers only, no images")
    return folder


@pytest.fixture(scope="session")
def weights(recipes: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder's weights in the official names; rows of unused tokens are zero."""
    tensors = recipes.tensors(FILE)
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("text_model.")}
    settings = recipes.configs["coco"]["text_encoder"]
    table = torch.zeros(settings["vocab_size"], settings["hidden_size"])
    table[tensors["token_ids_used"]] = tensors["token_embedding_rows"]
    state["text_model.embeddings.token_embedding.weight"] = table
    file = tmp_path_factory.mktemp("text") / "clip.pt"
    torch.save(state, file)
    return file


def text_config(recipes: Golden, weights: str) -> TextConfig:
    settings = recipes.configs["coco"]["text_encoder"]
    skipped = {"released", "positions", "vocab_size"}
    arguments = {name: value for name, value in settings.items() if name not in skipped}
    arguments["max_position_embeddings"] = settings["positions"]
    return TextConfig(
        keep="embeddings", weights=weights, tokenizer="open_clip", model_args=arguments
    )


def captions(recipes: Golden) -> list[str]:
    return list(recipes.values("coco_values")["captions"])


def config_of(source: Path, dataset: str, split: str, **values: object) -> ExtractConfig:
    return ExtractConfig(dataset=dataset, source=str(source), split=split, **values)


@pytest.mark.parametrize("split", SPLITS)
def test_images_and_captions_are_in_the_reference_s_order(
    recipes: Golden, sources: Path, split: str
) -> None:
    listing = list_images(config_of(sources / "source", "coco", split))
    expected = recipes.values("coco_values")["samples"][split]
    assert [(Path(i.path).name, list(i.captions)) for i in listing.items] == [
        (sample["file_name"], sample["captions"]) for sample in expected
    ]
    assert [sample["index"] for sample in expected] == list(range(len(expected)))
    prepared = list_images(config_of(sources / "coco256_features", "coco256_features", split))
    assert [len(i.contexts) for i in prepared.items] == [len(s["captions"]) for s in expected]


@pytest.mark.parametrize("split", SPLITS)
def test_crops_are_those_behind_the_clipped_pictures(
    recipes: Golden, sources: Path, split: str
) -> None:
    """Their PNG is max(0, 2p - 255) of the pixel p, but for rounding to even: exact below the
    clip, and the latents' stand-in sees the pixels themselves."""
    size = recipes.configs["coco"]["resolution"]
    for number, item in enumerate(list_images(config_of(sources / "source", "coco", split)).items):
        data = (sources / "source" / item.path).read_bytes()
        pixels = decode_crop(data, size, crop="square_lanczos")
        x = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        saved = x.mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8)  # as torchvision's save_image
        folder = sources / "coco256_features" / split
        png = np.asarray(Image.open(folder / f"{number}.png"))
        np.testing.assert_array_equal(saved.permute(1, 2, 0).numpy(), png)
        moments = np.load(folder / f"{number}.npy")
        means = x.reshape(3, size // 8, 8, size // 8, 8).mean((2, 4)).numpy()
        np.testing.assert_allclose(moments[:3], means, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_prepared_moments_hold_log_variances(sources: Path, split: str) -> None:
    source = sources / "coco256_features"
    config = config_of(source, "coco256_features", split)
    latents = StoredLatents(config)
    for number, item in enumerate(list_images(config).items):
        moments = torch.from_numpy(np.load(source / split / f"{number}.npy"))
        mean, log_variance = moments.chunk(2)
        expected = torch.cat([mean, (log_variance.clamp(-30, 20) / 2).exp()])
        check_close("moments", torch.from_numpy(latents.read(item)), expected, 1e-6)


def test_token_ids_are_the_reference_s(recipes: Golden) -> None:
    encoder = open_encoder(text_config(recipes, "random"))
    found = encoder.tokenizer(captions(recipes))
    np.testing.assert_array_equal(found.ids, recipes.tensors(FILE)["input_ids"].numpy())
    stored = recipes.values("coco_values")["captions"]
    np.testing.assert_array_equal(found.ids, np.array(list(stored.values())))


def test_embeddings_are_the_reference_s(recipes: Golden, weights: Path) -> None:
    encoder = open_encoder(text_config(recipes, str(weights)))
    recipes.check(FILE, "last_hidden_state", encoder(captions(recipes)))


def open_encoder(config: TextConfig) -> Any:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")
    from pipeline.text_encoders import TextEncoder

    return TextEncoder(config)


@pytest.mark.parametrize("split", SPLITS)
def test_prepared_embeddings_are_taken_over(recipes: Golden, sources: Path, split: str) -> None:
    config = config_of(sources / "coco256_features", "coco256_features", split)
    listing = list_images(config)
    source = StoredCaptions(config)
    rows = [source.read(item) for item in listing.items]
    texts, expected = captions(recipes), recipes.tensors(FILE)["last_hidden_state"]
    samples = recipes.values("coco_values")["samples"][split]
    most = max(len(item.contexts) for item in listing.items)
    stream = TextStream(
        kind="text",
        keeps="embeddings",
        columns=text_columns(source.info, "float32", captions=most, text_bytes=None),
        captions=most,
        captions_sha256="0" * 64,
        encoder=source.info,
        null=WeightsFile(file="x.safetensors", bytes=0, sha256="0" * 64),
        compute={
            "device": "cpu",
            "precision": "float32",
            "batch_size": 1,
            "threads": 1,
            "versions": {},
        },
    )
    arrays = text_arrays(source, stream, listing.items, rows)
    tolerance = recipes.tolerance(FILE, "last_hidden_state")
    for row, sample in enumerate(samples):
        for number, text in enumerate(sample["captions"]):
            found = arrays[f"caption{number}"][row]
            check_close(text, found, expected[texts.index(text)], tolerance)
        assert int((arrays["lengths"][row] > 0).sum()) == len(sample["captions"])


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
def test_a_store_of_the_reference_s_captions(
    recipes: Golden, sources: Path, weights: Path, tmp_path: Path, format: str
) -> None:
    """From the source to the decoded embeddings: cosine at least 0.9999 for each token."""
    text = text_config(recipes, str(weights))
    open_encoder(text)  # or skip
    values = {
        **PRESETS["demo"],
        "dataset": "coco",
        "source": str(sources / "source"),
        "split": "train",
        "store": str(tmp_path / "store"),
        "crop": "square_lanczos",
        "text": text,
        "format": format,
        "shard_size": 2,
    }
    config = ExtractConfig.model_validate(values)
    encoder, listing = Encoder(config, device="cpu", threads=1), list_images(config)
    store = open_store(config, listing, None, encoder)
    for task in make_tasks(listing, config.shard_size):
        encoder.encode_shard(store.url, store.manifest, task)
    store.finish()
    texts, expected = captions(recipes), recipes.tensors(FILE)["last_hidden_state"]
    null = load_null(store, "text")["embeddings"]
    check_close(
        "null", null, expected[texts.index("")], recipes.tolerance(FILE, "last_hidden_state")
    )
    for number, sample in enumerate(recipes.values("coco_values")["samples"]["train"]):
        found = read_sample(store, number)
        assert unpack_texts(found["text"][0]) == sample["captions"]
        for k, caption in enumerate(sample["captions"]):
            column = store.manifest.streams["text"].columns[f"caption{k}"]
            parts = {name: torch.from_numpy(array) for name, array in found.items()}
            decoded = decode_column(f"caption{k}", column, parts)[0]
            wanted = expected[texts.index(caption)]
            assert torch.cosine_similarity(decoded, wanted, dim=-1).min() >= 0.9999


def read_sample(store: Store, number: int) -> dict[str, np.ndarray]:
    shard, row = divmod(number, store.manifest.shard_size)
    return StreamReader(store, "text").read(np.array([shard]), np.array([row]))


def test_captions_are_chosen_from_the_reference_s_sets(recipes: Golden) -> None:
    """Their loader draws a caption, then whether it is dropped, from Python's generator, whose
    state depends on the process; ours draws in the same order from a function of the visit."""
    loader = recipes.values("coco_values")["loader"]
    counts, drop = loader["n_captions"], loader["p_uncond"]
    rng = random.Random(loader["python_random_seed"])
    visits = []
    for visit in loader["visits"]:
        number = rng.randint(0, counts[str(visit["index"])] - 1)
        visits.append(None if rng.random() < drop else number)
    assert visits == [visit["caption"] for visit in loader["visits"]]
    samples = np.array([visit["index"] for visit in loader["visits"]] * 100)
    epochs = np.arange(len(samples)) // loader["num_data"]
    held = np.array([counts[str(index)] for index in samples])
    chosen = choose_captions(0, epochs, samples, held, drop=drop)
    for index, count in counts.items():
        found = chosen.number[samples == int(index)]
        assert set(found.tolist()) == set(range(count))
    assert abs(chosen.dropped.mean() - drop) < 4 * (drop * (1 - drop) / len(samples)) ** 0.5
