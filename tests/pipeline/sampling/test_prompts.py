"""Images of captions: their texts, embeddings, files and refusals, of a tiny MM-DiT and CLIP."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.sample import main
from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.resolve import find_checkpoint
from pipeline.checkpoints.student import LoadedStudent, load_trained_student
from pipeline.cli.options import parse_options
from pipeline.diffusion.samplers import sample
from pipeline.models import MMDiT
from pipeline.report.gallery import read_captions as read_shown
from pipeline.runs.compatibility import resolve_run
from pipeline.sampling.batches import plan_batches
from pipeline.sampling.captions_file import read_captions
from pipeline.sampling.generate import Context, draw_images, draw_latents
from pipeline.sampling.grid import draw_grid
from pipeline.sampling.job import describe_images
from pipeline.sampling.outputs import FolderOutput, NpzOutput
from pipeline.sampling.prompts import (
    PromptEmbedder,
    StoredPrompts,
    complete_student,
    open_prompts,
)
from pipeline.sampling.resume import info_of_complete_images
from pipeline.sampling.worker import SampleWorker
from pipeline.store import Store
from pipeline.store.reading.caption_reader import CaptionReader
from pipeline.text_encoders import TextEncoder
from pipeline.train.loop import train
from pipeline.visualization.image_grid import save_grid
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.extract import TextConfig
from schemas.run import RunConfig
from schemas.sample import FileOptions, SampleConfig
from schemas.validation import validate
from tests.captions import CAPTIONS, TEXT, coco_config, extract_here, write_coco
from tests.stores import tiny_run

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")

SAMPLER = {"method": "sde", "steps": 3, "guidance": 2.0, "guidance_low": 0.1}
STUDENT = {"model": "MMDiT-2", "latent_size": 8}
KEYS = sorted(CAPTIONS)
"""Ids of the images: their captions have no other order in a store of one shuffle."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three captioned images in two shards."""
    folder = tmp_path_factory.mktemp("coco")
    return extract_here(coco_config(write_coco(folder / "source"), folder / "store"))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(store, tmp_path_factory.mktemp("run"))


def train_tiny(store: Store, folder: Path, **overrides: Any) -> Path:
    """A run of two steps without a teacher."""
    values = {
        **tiny_run(),
        "steps": 2,
        "global_batch": 2,
        "student": STUDENT,
        "alignment": {"feature_weight": 0, "attention_weight": 0},
        "store": store.url,
        **overrides,
    }
    config = resolve_run(RunConfig.model_validate(values), store.manifest, None, None)
    train(config, folder, LocalCheckpoints(folder, keep=1).save)
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> LoadedStudent:
    return load_trained_student(run)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(TextConfig.model_validate(TEXT))


def config_of(run: Path, **options: Any) -> SampleConfig:
    values = {"checkpoint": str(run), "autoencoder": "demo", "sampler": SAMPLER, "device": "cpu"}
    return SampleConfig.model_validate({**values, **options})


def draw_here(config: SampleConfig) -> SampleWorker:
    """One worker in this process writes all outputs."""
    threads = torch.get_num_threads()
    checkpoint = find_checkpoint(config.checkpoint)
    worker = SampleWorker()
    info = describe_images(config, checkpoint, worker.load(config, checkpoint, "cpu", 1))
    assert config.num is not None
    batches = plan_batches(config.num, config.batch_size)
    prompts = open_prompts(config)
    assert prompts is not None
    outputs = [
        *([NpzOutput(config.npz)] if config.npz else []),
        *([FolderOutput(config.folder)] if config.folder else []),
    ]
    for output in outputs:
        output.open(info)
        for batch in output.missing(batches):
            output.write(worker.draw(batch, [], pngs=True))
    assert info_of_complete_images(config, checkpoint, outputs, batches, prompts) == info
    changed = {"caption": ("b",), "captions": None, "store": None}
    other = open_prompts(config.model_copy(update=changed))
    assert info_of_complete_images(config, checkpoint, outputs, batches, other) is None
    for output in outputs:
        output.finish(batches, prompts.texts(range(config.num)))
    torch.set_num_threads(threads)
    return worker


def test_latents_are_the_samplers_of_each_caption_and_the_null_caption(
    trained: LoadedStudent, encoder: TextEncoder
) -> None:
    student = trained.student
    assert isinstance(student, MMDiT)
    torch.testing.assert_close(student.null_context, encoder([""])[0])
    captions, sampler = encoder(["a red car", "zebra"]), SamplerConfig.model_validate(SAMPLER)
    noises: dict[int, torch.Tensor] = {}

    def noise(draw: int) -> torch.Tensor:
        from pipeline.randomness import Purpose, generator

        rows = [
            generator(Purpose.SAMPLING, 0, 4 + i, draw).standard_normal((4, 8, 8), np.float32)
            for i in range(2)
        ]
        noises[draw] = torch.from_numpy(np.stack(rows))
        return noises[draw]

    def guided_by(null: torch.Tensor) -> torch.Tensor:
        def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return student(x, t, y).prediction

        return sample(
            velocity,
            noise(0),
            captions,
            sampler,
            null_label=null,
            step_noise=lambda i: noise(i + 1),
        ).float()

    found = draw_latents(student, Context(captions), sampler, first_index=4)
    assert torch.equal(found, guided_by(student.null_context))
    alone = draw_latents(student, Context(captions[1:]), sampler, first_index=5)
    torch.testing.assert_close(alone[0], found[1], rtol=1e-5, atol=1e-5)
    negative = encoder(["two dogs"])[0]
    other = draw_latents(student, Context(captions, negative), sampler, first_index=4)
    assert torch.equal(other, guided_by(negative))
    assert not torch.equal(other, found)
    with pytest.raises(ValueError, match="cannot draw list"):
        draw_latents(student, [1, 2], sampler)


def test_one_random_caption_of_each_sample_of_a_store(
    store: Store, run: Path, trained: LoadedStudent
) -> None:
    """Image i has sample i; texts, embeddings and the training's reader agree."""
    prompts = open_prompts(config_of(run, store=store.url))
    assert isinstance(prompts, StoredPrompts)
    assert prompts.count == 3
    numbers = list(range(30))
    texts = prompts.texts(numbers)
    keys = [key for shard in (0, 1) for key in store.record(shard).keys]
    for number, text in zip(numbers, texts, strict=True):
        assert text in CAPTIONS[int(keys[number % 3])][:7]
    assert len(set(texts)) > 5  # other captions in the next pass
    assert prompts.texts([7, 3]) == [texts[7], texts[3]]
    again = StoredPrompts(store.url, 1)
    assert again.texts(numbers) != texts
    assert again.sha256(30) != prompts.sha256(30)
    places = (np.array([0, 0, 1]), np.array([0, 1, 0]))
    expected = CaptionReader(store, seed=0, drop=0).read(*places, np.full(3, 2)).values
    assert torch.equal(prompts.embeddings(range(6, 9)), expected)
    assert trained.text_encoder is not None
    config = config_of(run, store=store.url)
    embedder = PromptEmbedder(prompts, trained.text_encoder, config)
    assert torch.equal(embedder(range(6, 9)).captions, expected)
    assert embedder._encoder is None  # stored embeddings need no encoder
    computed = TextEncoder(TextConfig.model_validate(TEXT))(texts[6:9])
    assert torch.cosine_similarity(computed, expected, dim=-1).min() > 0.9999


def authors_file(run: Path, file: Path, **args: object) -> Path:
    """Weights of a run as HASTE's ``train_t2i.py`` writes them: the null caption is elsewhere."""
    state = dict(load_trained_student(run).student.state_dict())
    del state["null_context"]
    projector = {"projectors.0.0.weight": torch.zeros(3, 64)}
    options = argparse.Namespace(
        path_type="linear", prediction="v", enc_type="dinov2-vit-b", **args
    )
    torch.save({"ema": {**state, **projector}, "args": options, "steps": 5}, file)
    return file


def test_a_file_of_the_authors_is_drawn_as_the_run(
    run: Path, store: Store, trained: LoadedStudent, tmp_path: Path
) -> None:
    file = authors_file(run, tmp_path / "haste.pt")
    images = {}
    for name, checkpoint, model in (("run", run, {}), ("file", file, {"model": "MMDiT-2"})):
        path = tmp_path / f"{name}.npz"
        draw_here(config_of(checkpoint, store=store.url, num=3, npz=str(path), **model))
        images[name] = np.load(path)["arr_0"]
    np.testing.assert_array_equal(images["run"], images["file"])
    png = tmp_path / "x.png"
    draw_grid(config_of(file, model="MMDiT-2", store=store.url, png=str(png)))
    assert png.exists()
    found = load_trained_student(file, "ema", "MMDiT-2/2")
    assert found.text_encoder is not None
    config = config_of(file, store=store.url)
    embedder = PromptEmbedder(StoredPrompts(store.url, 0), found.text_encoder, config)
    assert not found.student.null_context.any()
    complete_student(found, embedder)
    for key, tensor in trained.student.state_dict().items():
        assert torch.equal(found.student.state_dict()[key], tensor), key
    assert found.student.convention == trained.student.convention


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("MMDiT-3/2", {}, "has 2 blocks of width 64 and patch 2; MMDiT-3/2 has 3 of width 96"),
        ("MMDiT-2/4", {}, "patch 2; MMDiT-2/4 has 2 of width 64 and patch 4"),
        ("MMDiT-2/2", {"num_classes": 5}, "--num-classes is for students of classes"),
        ("MMDiT-2/2", {"path_type": "cosine"}, "say path_type linear, --path-type says cosine"),
        ("SiT-S/2", {}, r"--model MMDiT-24\)"),
    ],
)
def test_files_of_other_models_are_refused(
    run: Path, tmp_path: Path, model: str, options: dict[str, Any], reason: str
) -> None:
    file = authors_file(run, tmp_path / "haste.pt")
    with pytest.raises(UserError, match=reason):
        load_trained_student(file, "ema", model, FileOptions(**options))


def test_images_of_a_file_with_their_captions(
    run: Path, encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = ["a red car", ["two dogs", "a dog"], {"caption": "word " * 90}]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = config_of(
        run,
        captions=str(file),
        num=5,
        batch_size=2,
        npz=str(tmp_path / "a.npz"),
        folder=str(tmp_path / "pictures"),
    )
    worker = draw_here(config)
    assert (
        "1 of 5 captions were truncated to 77 tokens, first: word word" in capsys.readouterr().err
    )
    prompts = open_prompts(config)
    assert prompts is not None
    texts = prompts.texts(range(5))
    assert texts[::3] == ["a red car"] * 2
    assert {texts[1], texts[4]} <= {"two dogs", "a dog"}
    with np.load(tmp_path / "a.npz") as found:
        assert found["captions"].tolist() == texts
        assert "labels" not in found
        about = json.loads(str(found["about"]))
        images = found["arr_0"]
    assert about["text"]["truncated"] == 1
    assert about["text"]["captions"] == str(file)
    assert about["classes"] == []
    rows = [
        json.loads(line) for line in (tmp_path / "pictures/captions.jsonl").read_text().splitlines()
    ]
    assert rows == [{"file": f"{n:06d}.png", "captions": [t]} for n, t in enumerate(texts)]
    assert read_captions(str(tmp_path / "pictures/captions.jsonl")) == [(text,) for text in texts]
    last = np.asarray(Image.open(tmp_path / "pictures/000004.png"))
    assert np.array_equal(last, images[4])
    latents = draw_latents(
        worker.student, Context(encoder(texts[4:])), config.sampler, first_index=4
    )
    expected = worker.autoencoder.decode(latents).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected[0].astype(int) - last).max() <= 1


def test_grids_have_the_caption_below_each_picture(run: Path, store: Store, tmp_path: Path) -> None:
    png = tmp_path / "grid.png"
    three = {"caption": ("a red car", "zebra " * 40, "Ünïcode\ttext"), "png": str(png)}
    assert draw_grid(config_of(run, **three, per_class=1)).images == 3
    with Image.open(png) as picture:
        width, height = picture.size
        pixels = np.asarray(picture)
    assert width == 2 + 3 * 98
    assert height == 2 + 98 + 3 * 14  # the longest caption has three lines
    below = pixels[100:, :98]
    assert (below < 128).any()  # letters
    assert (pixels[100:, 0] == 255).all()
    captions = ["a red car", ("zebra " * 40).strip(), "Ünïcode text"]
    assert read_shown(png.read_bytes()) == captions  # what a report writes below
    assert draw_grid(config_of(run, **three, per_class=2)).images == 6
    with Image.open(png) as picture:
        assert picture.size == (2 + 2 * 98, 2 + 3 * (98 + 3 * 14))
    assert draw_grid(config_of(run, store=store.url, png=str(png), per_class=1)).images == 3


def test_negative_prompts_and_guidance_change_pictures(run: Path, tmp_path: Path) -> None:
    def picture(**options: Any) -> bytes:
        png = tmp_path / "grid.png"
        config = config_of(run, caption=("zebra",), png=str(png), per_class=1, **options)
        draw_grid(config)
        return png.read_bytes()

    plain = picture()
    assert picture() == plain
    assert picture(negative_prompt="two dogs") != plain
    high = {**SAMPLER, "guidance_low": 0.9}
    assert picture(sampler=high) != plain
    for method in ("ode", "ode_heun"):
        assert picture(sampler={**SAMPLER, "method": method}) != plain


BAD: dict[str, tuple[Sequence[str], str]] = {
    "classes": (["--caption", "a", "--classes", "1"], "--classes is for students of classes"),
    "labels": (["--store", "s", "--labels", "random"], "--labels is for"),
    "none": (
        [],
        "MMDiT-2/2 was trained on captions: give --caption TEXT, --captions FILE or --store",
    ),
    "class alone": (["--classes", "0"], "was trained on captions: give --caption"),
    "empty": (["--caption", " "], "a caption is empty"),
    "two": (["--caption", "a", "--captions", "f"], "--caption and --captions both give captions"),
    "no file": (["--captions", "nowhere.txt"], "--captions 'nowhere.txt' does not exist"),
    "negative": (["--negative-prompt", "a"], "is for captions: give --caption"),
    "no guidance": (
        ["--caption", "a", "--negative-prompt", "b", "--sampler.guidance", "1"],
        "--negative-prompt acts through guidance, which is off",
    ),
    "stream": (["--caption", "a", "--text.stream", "text"], "give --store"),
    "encoder": (["--text.weights", "random"], r"--text.\* is for captions"),
    "weights": (
        ["--caption", "a", "--text.weights", "nowhere.pt"],
        r"the captions' encoder, .*nowhere.pt.*--text.weights",
    ),
    "ddpm": (["--caption", "a", "--sampler.method", "ddpm"], "cannot draw from MMDiT-2/2"),
    "class guidance": (
        ["--caption", "a", "--sampler.class-guidance", "2"],
        "class-guidance is for a student that denoises a class token",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_suit_the_student(
    case: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    common = ["--checkpoint", str(run), "--png", "a.png", "--sampler.guidance", "2"]
    with pytest.raises(UserError, match=message):
        main([*common, "--sampler.steps", "2", "--device", "cpu", *options])
    assert not (tmp_path / "a.png").exists()


def test_a_student_of_classes_reads_no_captions(random_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = {**tiny_run(), "steps": 1, "store": random_store.url}
    train(RunConfig.model_validate(values), folder, LocalCheckpoints(folder, keep=1).save)
    options = ["--checkpoint", str(folder), "--png", str(tmp_path / "a.png")]
    with pytest.raises(UserError, match="--caption: SiT-S/2 was trained on classes and reads no"):
        main([*options, "--caption", "a"])


def test_a_student_without_dropped_captions_is_guided_by_negative_prompts_only(
    store: Store, tmp_path: Path
) -> None:
    run = train_tiny(store, tmp_path / "run", diffusion={"label_drop": 0}, steps=1)
    png = str(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--sampler.guidance 2 needs a student that was also"):
        draw_grid(config_of(run, caption=("a",), png=png))
    draw_grid(config_of(run, caption=("a",), png=png, negative_prompt="b", per_class=1))


def test_captions_of_another_encoder_are_refused(run: Path, tmp_path: Path) -> None:
    text = {**TEXT, "seed": 3}
    other = extract_here(coco_config(write_coco(tmp_path / "c"), tmp_path / "s", text=text))
    with pytest.raises(UserError, match=r"--store '.*' *: the student was trained on captions of"):
        draw_grid(config_of(run, store=other.url, png=str(tmp_path / "a.png")))
    plain = config_of(run, caption=("a",), png=str(tmp_path / "a.png"), text={"encoder": "a/b/c"})
    with pytest.raises(UserError, match=r"the captions' encoder, .* 'a/b/c' is neither a folder"):
        draw_grid(plain)


def test_token_ids_of_a_store_are_encoded(
    store: Store, run: Path, trained: LoadedStudent, tmp_path: Path
) -> None:
    text = {**TEXT, "keep": "tokens"}
    tokens = extract_here(coco_config(write_coco(tmp_path / "c"), tmp_path / "s", text=text))
    config = config_of(run, store=tokens.url)
    prompts, stored = open_prompts(config), StoredPrompts(store.url, 0)
    assert prompts is not None
    assert prompts.stored_as is None
    assert prompts.texts(range(9)) == stored.texts(range(9))
    assert trained.text_encoder is not None
    found = PromptEmbedder(prompts, trained.text_encoder, config)(range(9)).captions
    assert torch.cosine_similarity(found, stored.embeddings(range(9)), dim=-1).min() > 0.9999


@pytest.mark.parametrize("place", ["own", "store", "captions"])
def test_grids_of_a_run_in_training(place: str, store: Store, tmp_path: Path) -> None:
    """The last grid is what the averaged weights draw of the same captions."""
    file = write(tmp_path / "captions.txt", "a red car\ntwo dogs\nzebra")
    given = {"own": {}, "store": {"store": store.url}, "captions": {"captions": str(file)}}[place]
    samples = {"every": 2, "per_class": 1, "batch_size": 2, "sampler": SAMPLER, **given}
    run = train_tiny(store, tmp_path / "run", samples=samples)
    trained = load_trained_student(run)
    config = config_of(run, **(given or {"store": store.url}))
    prompts = open_prompts(config)
    assert prompts is not None
    assert trained.text_encoder is not None
    context = PromptEmbedder(prompts, trained.text_encoder, config)(range(3))
    images = draw_images(
        trained.student, open_decoder(None, trained.encoder), context, config.sampler
    )
    save_grid(images, tmp_path / "expected.png", 1, captions=prompts.texts(range(3)))
    found = np.asarray(Image.open(run / "samples" / "step-000000002.png")).astype(int)
    expected = np.asarray(Image.open(tmp_path / "expected.png"))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": {"classes": "1"}}, "samples.classes: MMDiT-2/2 is conditioned on captions"),
        ({"samples": {"captions": "a", "store": "b"}}, "captions and store exclude each other"),
        ({"samples": {"store": "b"}, "student": {}}, "samples.store is for an MMDiT"),
    ],
)
def test_grids_that_a_run_cannot_draw(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(RunConfig, {"student": STUDENT, **options}, where="config.yaml")


def test_captions_of_grids_are_refused_by_the_names_of_their_options(
    store: Store, tmp_path: Path
) -> None:
    for key in ("captions", "store"):
        missing = str(tmp_path / "missing")
        with pytest.raises(UserError, match=rf"^--samples\.{key} '.*missing'"):
            train_tiny(store, tmp_path / "run", samples={"every": 1, key: missing})


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_caption_is_one_option_with_commas_and_numbers() -> None:
    argv = ["--caption", "a, b", "--png", "x", "--caption", "3-4", "--caption=--none"]
    config = parse_options(SampleConfig, argv, command="sample.py", about="")
    assert config.caption == ("a, b", "3-4", "--none")


def test_files_of_captions(tmp_path: Path) -> None:
    def read(name: str, text: str) -> list[tuple[str, ...]]:
        return read_captions(str(write(tmp_path / name, text)))

    assert read("a.txt", "\ufeffa, b\r\nc\n") == [("a, b",), ("c",)]
    assert read("a.jsonl", '"a"\n{"caption": "b"}\n{"file": "x", "captions": ["c", "d"]}') == [
        ("a",),
        ("b",),
        ("c", "d"),
    ]
    assert read("a.json", '["a", ["b", "c"]]') == [("a",), ("b", "c")]
    coco = write_coco(tmp_path / "coco", split="val") / "annotations/captions_val2014.json"
    assert read_captions(str(coco)) == [tuple(CAPTIONS[number]) for number in KEYS]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\n\nb\n", r"a.txt', line 2: a caption is empty; leave it out"),
        ("a.txt", "", "is empty; expected captions"),
        ("a.txt", b"\xff\xfe", "is not text in UTF-8"),
        ("a.jsonl", '"a"\nb', "line 2: is not JSON"),
        ("a.jsonl", '{"caption": 3}', "line 1: expected a text, a list of texts"),
        ("a.jsonl", '{"captions": []}', "line 1: a caption is empty"),
        ("a.jsonl", r'"\ud800"', "line 1: a caption has characters that UTF-8 does not"),
        ("a.json", '{"images": 3}', "has no list of images"),
        ("a.json", "[]", "expected a list of captions, or COCO's"),
        ("a.json", '["a", ""]', "entry 2: a caption is empty"),
    ],
)
def test_bad_files_of_captions(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        read_captions(str(file))
