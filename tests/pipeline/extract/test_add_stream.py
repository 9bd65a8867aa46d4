"""Adding a teacher stream to a store that has others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.extract.__main__ import main as command
from pipeline.extract.job import extract
from pipeline.inspect.__main__ import main as inspect
from pipeline.inspect.summary import summarise
from pipeline.runs.compatibility import check_store
from pipeline.store import Store
from pipeline.targets.sources import Wanted, read_targets
from pipeline.train.loop import train
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from tests.encoded import demo_like
from tests.helpers import all_files, recorded_opens


def added(base: ExtractConfig, **options: Any) -> ExtractConfig:
    """Only new options are given; the others come from the store."""
    teacher = {**base.teacher.model_dump(), **options.pop("teacher", {})}
    values = {"store": base.store, "add_stream": "second", "cut": "activations", **options}
    return ExtractConfig.model_validate(
        {"layers": base.layers, "batch_size": 2, **values, "teacher": teacher}
    )


@pytest.mark.usefixtures("two_cpus")
def test_actors_add_what_one_process_adds(
    images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for name in ("actors", "here"):
        if name == "here":
            request.getfixturevalue("without_ray")
        base = demo_like(images, tmp_path / name / "store", actors=2)
        assert extract(base).images == 12
        assert extract(added(base, layers=(3, 4))).images == 12
        assert extract(added(base, layers=(3, 4))).images == 0
    assert all_files(tmp_path / "actors") == all_files(tmp_path / "here")


def wanted(*layers: int) -> Wanted:
    return Wanted(features=True, layers=layers, heads=6)


@pytest.mark.parametrize("format", ["webdataset", "zarr"])
@pytest.mark.usefixtures("without_ray")
def test_latents_keys_and_shards_stay_and_training_can_choose(
    images: Path, tmp_path: Path, format: str
) -> None:
    base = demo_like(images, tmp_path / "store", format=format)
    store = extract(base).store
    before = all_files(Path(store.root))
    summary = extract(added(base, layers=(3, 4)))
    assert summary.images == 12
    store = Store.open(store.url)
    after = all_files(Path(store.root))
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"manifest.json", "index.json"}
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"second", "second_class", "commits", "second_teacher_tail.safetensors"}
    assert list(store.manifest.streams) == ["latents", "maps", "class", "second", "second_class"]
    for shard in range(store.manifest.num_shards):
        assert store.record(shard, "second").keys == store.record(shard).keys
    assert extract(added(base, layers=(3, 4))).images == 0
    assert extract(base).images == 0

    rows = np.arange(3)
    maps, replayed = (
        read_targets(store, np.ones_like(rows), rows, wanted(3, 4), name)
        for name in ("maps", "second")
    )
    torch.testing.assert_close(replayed.features, maps.features, rtol=0.1, atol=0.1)
    torch.testing.assert_close(replayed.attention, maps.attention, rtol=0.2, atol=5e-3)

    found = summarise(store)
    assert found.complete
    assert found.bytes_per_stream["second"] > 0
    config = run_on(store, "second")
    with recorded_opens() as paths:
        result = train(config, tmp_path / "run", LocalCheckpoints(tmp_path / "run", 1).save)
    assert result["bytes_read"]["second"]["before"] > 0
    assert result["bytes_read"]["maps"] == {"before": 0, "after": 0}
    assert not any("/maps/" in path for path in paths)
    with pytest.raises(UserError, match="several teacher streams: choose one of maps, second"):
        check_store(run_on(store, None), store.manifest)
    with pytest.raises(UserError, match="no teacher stream 'third', only maps, second"):
        check_store(run_on(store, "third"), store.manifest)
    vanilla = AlignmentConfig(feature_weight=0, attention_weight=0)
    check_store(config.model_copy(update={"alignment": vanilla}), store.manifest)


def run_on(store: Store, stream: str | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "store": store.url,
            "steps": 3,
            "global_batch": 4,
            "log_every": 1,
            "student": {
                "model": "SiT-S/1",
                "depth": 3,
                "width": 24,
                "heads": 6,
                "latent_size": 8,
                "num_classes": 2,
            },
            "alignment": {
                "feature_depth": 2,
                "student_layers": [1, 2],
                "teacher_layers": [4, 3],
                "stream": stream,
                "termination": {"kind": "fixed", "step": 2},
            },
        }
    )


@pytest.mark.usefixtures("without_ray")
def test_an_interrupted_addition_is_completed_and_the_store_serves_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = demo_like(images, tmp_path / "store")
    extract(base)
    extract(added(base))
    whole = all_files(tmp_path / "store")
    (tmp_path / "store" / "commits" / "second" / "shard-000001.json").unlink()
    (tmp_path / "store" / "second_teacher_tail.safetensors").unlink()
    store = Store.open(str(tmp_path / "store"))
    store.require_complete()
    with pytest.raises(UserError, match=r"stream 'second' of store .* 1 of 4 shards are missing"):
        store.require_complete("second")
    inspect([store.url])
    assert "INCOMPLETE: stream 'second' lacks" in capsys.readouterr().out
    assert extract(added(base)).images == 3
    assert all_files(tmp_path / "store") == whole


@pytest.mark.usefixtures("without_ray")
def test_skipped_images_are_skipped_in_every_stream(images: Path, tmp_path: Path) -> None:
    base = demo_like(images, tmp_path / "store", on_bad_image="skip")
    assert base.source is not None
    victim = Path(base.source) / "class1" / "03.png"
    whole = victim.read_bytes()
    victim.write_bytes(b"no picture")
    extract(base)
    victim.write_bytes(whole)  # repaired too late for the latents
    extract(added(base))
    store = Store.open(str(tmp_path / "store"))
    assert sum(store.record(s, "second").samples for s in range(4)) == 11
    store.finish()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"add_stream": "maps"}, "was made with a stream of this name"),
        ({"add_stream": "latents"}, "was made with a stream of this name"),
        ({"shard_size": 5}, "was made with shard_size 3, not 5"),
        ({"resolution": 64}, "was made with resolution 32, not 64"),
        ({"format": "zarr"}, "was made with format webdataset, not zarr"),
        ({"store": "/no/store/here"}, "--add-stream needs a store"),
        ({"layers": (2, 9)}, "layer 9"),
    ],
)
@pytest.mark.usefixtures("without_ray")
def test_bad_requests_are_one_line(
    images: Path, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    base = demo_like(images, tmp_path / "store")
    if "store" not in options:
        extract(base)
    with pytest.raises(UserError, match=complaint) as error:
        extract(added(base, **options))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_ray")
def test_an_addition_with_other_options_is_refused(images: Path, tmp_path: Path) -> None:
    base = demo_like(images, tmp_path / "store")
    extract(base)
    extract(added(base))
    with pytest.raises(UserError, match="made with cut activations, this extraction has qk"):
        extract(added(base, cut="qk"))
    with pytest.raises(UserError, match="made with codec faithful, this extraction has small"):
        extract(added(base, codec="small"))
    with pytest.raises(UserError, match=r"made with streams.second.teacher.weights_sha256"):
        extract(added(base, teacher={"weights": "random"}))


@pytest.mark.usefixtures("without_ray")
def test_a_lost_record_of_the_first_streams_is_told_as_incomplete(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = demo_like(images, tmp_path / "store")
    extract(base)
    extract(added(base))
    (tmp_path / "store" / "commits" / "shard-000001.json").unlink()
    assert inspect([str(tmp_path / "store")]) == 0
    assert "INCOMPLETE: 1 of 4 shards are missing (first: 1)" in capsys.readouterr().out


@pytest.mark.usefixtures("without_ray")
def test_the_command_takes_from_the_store_what_it_does_not_say(
    images: Path, tmp_path: Path
) -> None:
    base = demo_like(images, tmp_path / "store", actors=1)
    first = extract(base).store.manifest.teacher_stream()[1].teacher
    argv = ["--store", str(base.store), "--add-stream", "second", "--cut", "activations"]
    assert command([*argv, "--batch-size", "2", "--actors", "1"]) == 0
    store = Store.open(str(base.store))
    second = store.manifest.teacher_stream("second")[1]
    assert (second.teacher, second.cut) == (first, "activations")
    store.require_complete("second")
