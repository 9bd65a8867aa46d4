"""Conversions that are interrupted, that fail, and what else is in a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.convert import convert, job
from pipeline.convert.__main__ import main
from pipeline.convert.shard import convert_shard
from pipeline.store import ShardWriter, Store
from pipeline.targets.tail import tail_file
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.store import SkippedImage
from tests.conversions import (
    Extract,
    converted,
    encode,
    options,
    refusal,
    run,
    targets_of,
    with_added_stream,
)
from tests.helpers import all_files, known_key, known_manifest, known_values, write_known_store


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
    assert list(maps.manifest.streams) == ["latents", "maps", "class", "tokens"]
    assert maps.manifest.teacher_streams["tokens"].cut == "maps"
    assert not list((tmp_path / "maps").glob("*.safetensors"))

    one = converted(store, tmp_path / "one", stream="tokens", codec="small")
    assert list(one.manifest.streams) == ["latents", "class", "tokens"]
    one.require_complete("latents", "tokens")
    assert one.index().bytes_per_stream.keys() == {"latents", "class", "tokens"}
    targets_of(one)

    assert "no teacher stream 'x', only qk, tokens" in refusal(store, tmp_path / "x", stream="x")
    (Path(store.root) / "commits" / "tokens" / "shard-000001.json").unlink()
    assert "stream 'tokens' of store" in refusal(store, tmp_path / "x", format="zarr")
    converted(store, tmp_path / "first", stream="qk", format="zarr")  # does not need it


def test_command(extracted: Extract, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [extracted(codec="float32").url, str(tmp_path / "b"), "--codec", "float16"]
    assert main([*argv, "--format", "zarr", "--layers", "3-5"]) == 0
    out, err = capsys.readouterr()
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'b'} is complete: 11 samples in 3 shards; ")
    before, after = (float(word) for word in last.split() if word.isdigit() and len(word) > 3)
    assert after < before / 2
    assert "convert: 11/11 images (100%) in " in err
    assert main([*argv, "--format", "zarr", "--layers", "3-5"]) == 0
    assert "was already complete" in capsys.readouterr().out
    for wrong, told in [
        (["a"], "name two stores"),
        ([*argv, "c"], "unexpected argument 'c'"),
        ([*argv, "--cot", "maps"], "did you mean '--cut'"),
        ([*argv, "--layers", "5,3"], "lowest first"),
        ([str(tmp_path / "none"), "b"], "holds no store"),
    ]:
        with pytest.raises(UserError, match=told):
            main(wrong)
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "python -m pipeline.convert SOURCE TARGET" in out
    assert "The only teacher stream to convert" in out


def test_the_former_command_refers_to_this_one() -> None:
    argv = [sys.executable, "-m", "pipeline.store", "convert", "a", "b"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "is now python -m pipeline.convert SOURCE TARGET" in line
