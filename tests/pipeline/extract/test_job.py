"""Extraction through Ray: progress, idempotence, deaths and errors."""

from __future__ import annotations

import io
import os
import shlex
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tqdm import tqdm

from pipeline.cli.config_files import merge
from pipeline.cli.options import parse_options
from pipeline.datasets import list_images
from pipeline.distributed import actor_pool as actors_module
from pipeline.distributed.log_relay import ProgressHandler
from pipeline.distributed.ray_cluster import SilenceWarning
from pipeline.extract.encoder import ShardResult
from pipeline.extract.encoder_pool import EncoderActor, EncoderPool
from pipeline.extract.job import _Progress, extract
from pipeline.extract.tasks import ShardTask, make_manifest, make_tasks
from pipeline.inspect.check import check_configs
from pipeline.inspect.verify import verify_store
from pipeline.store import Store
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.networks import WeightsFile
from schemas.store import Manifest, SkippedImage
from tests.encoded import demo_like
from tests.repa import image_name, latent_name, random_repa
from tests.stores import tiny_run

pytestmark = pytest.mark.usefixtures("two_cpus")


def files_of(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def test_actors_that_take_every_cpu_make_progress_and_the_result_is_the_same(
    images: Path, tmp_path: Path
) -> None:
    two = extract(demo_like(images, tmp_path / "two", actors=2))
    assert two.images == 12
    assert sum(two.store.index().samples_per_shard) == 12
    one = extract(demo_like(images, tmp_path / "one", actors=1))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert one.images_per_second > 0

    again = extract(demo_like(images, tmp_path / "two", actors=2))
    assert again.images == 0

    lost = tmp_path / "two" / "commits" / "shard-000002.json"
    lost.unlink()
    assert extract(demo_like(images, tmp_path / "two")).images == 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

    with pytest.raises(UserError, match=r"made with resolution 32, this extraction has 48"):
        extract(demo_like(images, tmp_path / "two", resolution=48))
    with pytest.raises(UserError, match=r"made with streams.class.teacher.weights_sha256"):
        extract(demo_like(images, tmp_path / "two", teacher={"weights": "random"}))
    Image.new("RGB", (9, 9)).save(images / "class0" / "new.png")
    with pytest.raises(UserError, match=r"made with the images"):
        extract(demo_like(images, tmp_path / "two"))


def test_progress_is_reported_by_batch(images: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    with ProgressHandler(lambda shard, done: reports.append((shard, done))):
        extract(demo_like(images, tmp_path / "store", actors=1, shard_size=8, batch_size=3))
    assert reports[-5:] == [(0, 3), (0, 6), (0, 8), (1, 3), (1, 4)]  # after the calibration's


def test_the_bar_counts_each_image_once() -> None:
    """Reports may be late, and begin again where a shard went back to the queue."""
    with tqdm(total=20, file=io.StringIO()) as bar:
        progress = _Progress(bar)
        seen = []
        for shard, done in [(0, 4), (1, 4), (0, 8), (1, 2), (1, 4)]:
            progress.running(shard, done)
            seen.append(bar.n)
        assert seen == [4, 8, 12, 10, 12]
        progress.finished(ShardResult(0, 9, (SkippedImage(key="a", path="a", error=""),), True))
        progress.running(0, 4)
        assert bar.n == 14
        progress.finished(ShardResult(1, 10, (), True))
        assert bar.n == 20


class DiesOnce(EncoderActor):
    """Exits in the middle of shard 1, the first time that anyone works on it."""

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        marker = Path(url).parent / "died"
        if task.shard == 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        return super().encode(url, manifest, task)


class AlwaysDies(EncoderActor):
    """Shard 1 kills whoever touches it."""

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        if task.shard == 1:
            os._exit(1)
        return super().encode(url, manifest, task)


class Slow(EncoderActor):
    """Takes some seconds over shard 1."""

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        time.sleep(3 if task.shard == 1 else 0)
        return super().encode(url, manifest, task)


class DiesOnceOverWeights(EncoderActor):
    """Exits the first time that anyone writes the teacher's weights."""

    def save_tail(self, url: str) -> WeightsFile | None:
        marker = Path(url).parent / "died"
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return super().save_tail(url)


class AlwaysDiesOverWeights(EncoderActor):
    """Writing the teacher's weights kills whoever does it."""

    def save_tail(self, url: str) -> WeightsFile | None:
        os._exit(1)


def encode_with(config: ExtractConfig, actor_class: type[EncoderActor]) -> list[ShardResult]:
    pool = EncoderPool(config, actors=2, cpus=1, gpus=0, actor_class=actor_class)
    try:
        description = pool.describe()
        listing = list_images(config)
        manifest = make_manifest(config, listing, description)
        assert config.store is not None
        store = Store.create(config.store, manifest)
        tasks = make_tasks(listing, config.shard_size)
        results = list(pool.encode(store.url, manifest, tasks))
        store.finish()
        return results
    finally:
        pool.close()


def test_a_dead_actors_shard_is_made_by_another(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    fixed = {"codec": {"calibration": 0}}  # `encode_with` does not calibrate
    results = encode_with(demo_like(images, tmp_path / "a" / "store", **fixed), DiesOnce)
    assert sorted(result.shard for result in results) == [0, 1, 2, 3]
    assert any("shard 1 goes back to the queue" in line for line in caplog.messages)
    extract(demo_like(images, tmp_path / "undisturbed", **fixed))
    assert files_of(tmp_path / "a" / "store") == files_of(tmp_path / "undisturbed")


def test_a_shard_that_kills_every_actor_is_named(images: Path, tmp_path: Path) -> None:
    config = demo_like(images, tmp_path / "store", max_attempts=2)
    with pytest.raises(UserError, match=r"shard 1 \(first image 'class\d/\d+\.png'\) failed 2"):
        encode_with(config, AlwaysDies)


def test_a_shard_that_takes_long_is_told_of(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(actors_module, "SilenceWarning", lambda: SilenceWarning(seconds=0.01))
    encode_with(demo_like(images, tmp_path / "store"), Slow)
    assert "shard 1 has been with an actor for 0 minutes" in caplog.messages


def test_silence_is_told_of_whenever_it_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pipeline.distributed.ray_cluster.time.monotonic", lambda: now)
    silence, told = SilenceWarning(), []
    for second in range(0, 4 * 3600, 30):
        now = 1000.0 + second
        told.append(silence.minutes())
    assert [minutes for minutes in told if minutes is not None] == [10, 20, 40, 80, 160]


def save_tail(config: ExtractConfig, actor_class: type[EncoderActor]) -> WeightsFile | None:
    pool = EncoderPool(config, actors=1, cpus=1, gpus=0, actor_class=actor_class)
    try:
        pool.describe()
        assert config.store is not None
        return pool.save_tail(config.store)
    finally:
        pool.close()


def test_an_actor_that_dies_while_it_writes_weights_is_replaced(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = demo_like(images, tmp_path / "store", cut="activations", max_attempts=2)
    tail = save_tail(config, DiesOnceOverWeights)
    assert tail is not None
    assert (tmp_path / "store" / tail.file).stat().st_size == tail.bytes
    again = "the teacher's weights are written once more:"
    assert sum(message.startswith(again) for message in caplog.messages) == 1
    with pytest.raises(UserError, match="could not be written, 2 times; the last error: Actor"):
        save_tail(config, AlwaysDiesOverWeights)


def test_weights_that_cannot_be_written_are_one_line(images: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "store" / "activations_teacher_tail.safetensors"
    blocked.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        extract(demo_like(images, tmp_path / "store", cut="activations"))
    assert str(error.value).startswith(f"cannot write '{blocked}': [Errno 21] Is a directory")
    assert "\n" not in str(error.value)


def test_bad_images_stop_the_job_or_are_skipped(images: Path, tmp_path: Path) -> None:
    (images / "class1" / "03.png").write_bytes(b"no picture")
    whole = (images / "class0" / "04.png").read_bytes()
    (images / "class0" / "04.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(images / "class1" / "zz.png")
    with pytest.raises(UserError, match=r"bad image class\d/(0\d|zz)\.png"):
        extract(demo_like(images, tmp_path / "store"))
    skipping = demo_like(images, tmp_path / "store", on_bad_image="skip")
    extract(skipping)
    store = Store.open(str(tmp_path / "store"))
    assert sum(store.index().samples_per_shard) == 10
    assert {s.path for s in store.manifest.skipped} == {
        "class1/03.png",
        "class0/04.png",
        "class1/zz.png",
    }
    assert extract(skipping).images == 0


@pytest.mark.usefixtures("without_ray")
def test_latents_are_taken_over_without_an_autoencoder(tmp_path: Path) -> None:
    folder = random_repa(tmp_path / "data", count=7)
    config = demo_like(folder, tmp_path / "store", dataset="repa")
    (folder / "vae-sd" / latent_name(3)).write_bytes(b"no numbers")
    with pytest.raises(UserError, match=r"bad image images/.*3\.png \(vae-sd/.*3\.npy: is not a"):
        extract(config)
    done = extract(config.model_copy(update={"on_bad_image": "skip"}))
    assert sum(done.store.index().samples_per_shard) == 6
    assert [bad.path for bad in done.store.manifest.skipped] == [f"images/{image_name(3)}"]
    assert done.store.manifest.autoencoder.weights_sha256 is None
    assert extract(config).images == 0
    # What made the latents is known by its name alone, so that another name is another store.
    with pytest.raises(UserError, match=r"autoencoder\.(name|scaling_factor) "):
        extract(config.model_copy(update={"autoencoder": "stabilityai/sd-vae-ft-mse"}))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"source": None}, "--source is missing"),
        ({"store": None}, "--store is missing"),
        ({"source": "/nowhere/at/all"}, r"--source '/nowhere/at/all'.*no images"),
        ({"store": "nosuchprotocol://x/y"}, "--store 'nosuchprotocol://x/y'"),
        ({"gpus_per_actor": 1}, r"asks for 1 x 1 GPU; the Ray cluster has 0 GPUs"),
        ({"actors": 3}, r"--actors asks for 3 x 1 CPU; the Ray cluster has 2 CPUs"),
        ({"layers": (4, 9)}, r"--layers asks for layer 9; teacher .* has 6 layers"),
        ({"teacher": {"weights": "/no/such.pth"}}, "'/no/such.pth': cannot read these weights"),
        ({"autoencoder": "/no/such/folder"}, "--autoencoder '/no/such/folder'"),
        ({"teacher": {"model": "resnet18", "weights": "random"}}, "--teacher.model 'resnet18'"),
    ],
)
def test_bad_requests_are_one_line(
    images: Path, tmp_path: Path, overrides: dict[str, object], complaint: str
) -> None:
    values = demo_like(images, tmp_path / "store").model_dump()
    if "model" in overrides.get("teacher", {}):  # type: ignore[operator]
        values["teacher"]["model_args"] = {}
    config = ExtractConfig.model_validate(merge(values, overrides))
    with pytest.raises(UserError, match=complaint) as error:
        extract(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("without_ray")
def test_what_inspect_check_says_is_missing_is_added_by_its_very_command(
    images: Path, tmp_path: Path
) -> None:
    store = extract(demo_like(images, tmp_path / "a store", actors=1)).store
    run = tmp_path / "run.yaml"
    alignment = {"student_layers": [1, 2], "teacher_layers": [1, 5]}
    student = {"latent_size": 8, "num_classes": 2}
    run.write_text(yaml.safe_dump(merge(tiny_run(), {"student": student, "alignment": alignment})))
    (answer,) = check_configs(store, (str(run),))
    assert (answer.ok, "lacks teacher layer 1" in str(answer.reason)) == (False, True)

    argv = shlex.split(str(answer.command))[3:]
    asked = parse_options(
        ExtractConfig, argv, command="", about="", presets=PRESETS, preset_key="dataset"
    )
    before = files_of(tmp_path / "a store")
    more = extract(asked.model_copy(update={"actors": 1}))
    assert more.images == 12
    after = files_of(tmp_path / "a store")
    assert {name for name in before if after[name] != before[name]} == {
        "manifest.json",
        "index.json",
    }
    (answer,) = check_configs(more.store, (str(run),))
    assert (answer.ok, answer.reason) == (True, "with --alignment.stream maps_1_5")
    assert verify_store(more.store).damaged == []
