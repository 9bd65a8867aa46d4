"""A secret in a URL is used and never seen again."""

from __future__ import annotations

import logging
from pathlib import Path

import fsspec
import pytest
import yaml

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.cli.config_files import merge
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.tasks import make_manifest, make_tasks, with_tail
from pipeline.inspect.__main__ import main as inspect
from pipeline.storage.redaction import redact, redacted_config, without_secrets
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from tests.stores import tiny_run

SECRET = "hunter2-3f9a"


def everything_in(folder: Path) -> bytes:
    return b"".join(p.name.encode() + p.read_bytes() for p in folder.rglob("*") if p.is_file())


def digits_run(store: str, output: Path) -> RunConfig:
    """A run on the demo's digits: 8 x 8 latents, teacher layers 2 to 5."""
    values = {
        "store": store,
        "output": f"file://{output}?token={SECRET}",
        "steps": 4,
        "student": {"latent_size": 8, "num_classes": 10},
        "alignment": {"teacher_layers": [3, 2], "termination": {"kind": "fixed", "step": 2}},
        "checkpoint": {"every": 2},
    }
    return RunConfig.model_validate(merge(tiny_run(), values))


@pytest.mark.parametrize("cut", ["maps", "activations"])
def test_a_planted_secret_is_nowhere_after_extraction_and_training(
    digits_config: ExtractConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    cut: str,
) -> None:
    caplog.set_level(logging.INFO)
    name = f"credentials-{cut}"
    url = f"memory://me:{SECRET}@{name}/store?token={SECRET}"
    values = {"store": url, "cut": cut, "source": f"s3://key:{SECRET}@bucket/images?sig={SECRET}"}
    config = digits_config.model_copy(update=values)
    listed = list_images(config)
    listing = Listing(listed.items[:20], listed.num_classes)
    encoder = Encoder(config, device="cpu", threads=1)
    manifest = make_manifest(config, listing, encoder.describe())
    store = Store.create(url, with_tail(manifest, cut, encoder.save_tail(url)))
    for task in make_tasks(listing, config.shard_size):
        encoder.encode_shard(url, store.manifest, task)
    store.finish()

    run = tmp_path / "run"
    train(digits_run(url, tmp_path), run, LocalCheckpoints(run, keep=3).save)
    again = digits_run(url, tmp_path).model_copy(update={"steps": 6})
    train(again, run, LocalCheckpoints(run, keep=3).save, resume=latest_checkpoint(run))
    for argv in (["--verify"], ["--gc"], ["--json"], []):
        assert inspect([url, *argv]) == 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_run(), "name": "other"}))
    inspect([url, "--check", str(tmp_path / "run.yaml"), str(run / "config.yaml")])

    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["store"] == f"memory://{name}/store"
    assert written["output"] == f"file://{tmp_path}"
    newest = latest_checkpoint(run)
    assert newest is not None
    assert read_state(newest).config.store == f"memory://{name}/store"
    assert store.manifest.dataset.source == "s3://bucket/images"
    secret = SECRET.encode()
    assert secret not in everything_in(run)
    memory = fsspec.filesystem("memory")
    held = [memory.cat_file(path) for path in memory.find(store.root)]
    assert len(held) > 6
    assert not any(secret in data for data in held)
    captured = capfd.readouterr()
    assert f"memory://{name}/store" in captured.out
    for text in (captured.out, captured.err, caplog.text):
        assert SECRET not in text


@pytest.mark.parametrize(
    ("url", "text", "shown"),
    [
        ("s3://k:S3cr3t@b/x", "no such bucket: k:S3cr3t@b", "no such bucket: ***@b"),
        ("s3://k:S3cr3t@b/x", "the key S3cr3t is wrong", "the key *** is wrong"),
        ("memory://h/x?token=S3cr3t", "/h/x?token=S3cr3t is missing", "/h/x?*** is missing"),
        ("http://h/x?a=1234&sig=S3cr3t", "403: S3cr3t", "403: ***"),
        ("http://h/x", "http://u:S3cr3t@h/x?y=S3cr3t gone", "http://h/x gone"),
        ("/data/a@b?c", "/data/a@b?c is missing", "/data/a@b?c is missing"),
        ("s3://bucket/a@256/x", "bucket/a@256/x is missing", "bucket/a@256/x is missing"),
    ],
)
def test_what_filesystems_say_is_cleaned(url: str, text: str, shown: str) -> None:
    assert without_secrets(text, url) == shown


@pytest.mark.parametrize(
    "word", ["a", "a.b-", "token", "<token", "://", "a:b@", "=a:", "://a:", "(a:b", "://?", "?"]
)
def test_time_grows_with_the_length_of_a_text(word: str) -> None:
    """With time that grows as the square of the length, this test would not end."""
    text = "<" + word * 200_000
    assert len(redact(text)) <= len(text)


def test_only_urls_are_changed_in_what_is_written_down() -> None:
    values = {"a": ["s3://k:v@b/x?y", {"b": ("/home/me@x?y", 3, None)}], "c": 1e-4}
    assert redacted_config(values) == {
        "a": ["s3://b/x", {"b": ["/home/me@x?y", 3, None]}],
        "c": 1e-4,
    }
