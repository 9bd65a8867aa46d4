"""Classes of an extraction, from the folder to the manifest, and of what is made from its store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import pipeline.extract.job as job
from pipeline.convert import convert
from pipeline.inspect.__main__ import main as inspect
from pipeline.inspect.source_images import SourceImages
from pipeline.store import Store
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.encoded import demo_like
from tests.helpers import edit_json

WNIDS = ("n01440764", "n02102040", "n07753592")
pytestmark = pytest.mark.usefixtures("without_ray")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, name in enumerate(("ant/1", "bee/1", "bee/2", "cow/1", "cow/2")):
        picture(tmp_path / "set" / f"{name}.png", number)
    return tmp_path / "set"


def stored_labels(store: Store) -> dict[str, int]:
    """Key and label of each sample, as stock webdataset reads them."""
    tars = sorted(str(path) for path in Path(store.root, "latents").glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    return {sample["__key__"]: int(sample["cls"]) for sample in samples}


def page(store: Store, capsys: pytest.CaptureFixture[str]) -> str:
    assert inspect([store.url]) == 0
    return capsys.readouterr().out


def test_names_are_stored_shown_and_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = demo_like(source, tmp_path / "store")
    store = job.extract(base).store
    assert stored_labels(store) == {"ant/1": 0, "bee/1": 1, "bee/2": 1, "cow/1": 2, "cow/2": 2}
    assert store.manifest.dataset.class_names == ("ant", "bee", "cow")
    assert "  classes      0 ant, 1 bee, 2 cow\n" in page(store, capsys)
    assert inspect([store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == ["ant", "bee", "cow"]
    copy = convert(
        ConvertConfig.model_validate({"source": store.url, "target": str(tmp_path / "copy")})
    )
    assert Store.open(copy.store.url).manifest.dataset == store.manifest.dataset
    more = {"store": store.url, "add_stream": "more", "layers": (1,), "batch_size": 2}
    added = job.extract(ExtractConfig.model_validate({**more, "teacher": base.teacher})).store
    assert Store.open(added.url).manifest.dataset == store.manifest.dataset
    (source / "dog").mkdir()  # changes no key and no label
    with pytest.raises(UserError, match="made with the number of classes 3, this extraction has 4"):
        job.extract(base.model_copy(update={"allow_empty_classes": True}))


def test_an_empty_class_is_refused_or_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (source / "bee").iterdir():
        path.unlink()
    config = demo_like(source, tmp_path / "store")
    with pytest.raises(UserError, match="no images in class folder 'bee'"):
        job.extract(config)
    assert not (tmp_path / "store").exists()
    store = job.extract(config.model_copy(update={"allow_empty_classes": True})).store
    assert stored_labels(store) == {"ant/1": 0, "cow/1": 2, "cow/2": 2}
    assert "  no images    1 classes: 1\n" in page(store, capsys)
    more = {"store": store.url, "add_stream": "more", "layers": (1,), "batch_size": 2}
    job.extract(ExtractConfig.model_validate({**more, "teacher": config.teacher}))
    assert Store.open(store.url).manifest.dataset.empty_classes == (1,)
    assert SourceImages(store)([0], [0]).shape == (1, 32, 32, 3)


def test_a_class_whose_images_are_all_skipped_is_an_error(source: Path, tmp_path: Path) -> None:
    for path in (source / "bee").iterdir():
        path.write_bytes(b"no image")
    (source / "cow" / "1.png").write_bytes(b"no image")
    config = demo_like(source, tmp_path / "store", on_bad_image="skip")
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError, match=r"class 'bee' of .* no image left: all 2 were skipped"):
            job.extract(config)
    store = Store.open(str(tmp_path / "store"))
    assert store.manifest.dataset.empty_classes == (1,)
    assert stored_labels(store) == {"ant/1": 0, "cow/2": 2}
    kept = job.extract(config.model_copy(update={"allow_empty_classes": True}))
    assert (kept.images, len(kept.store.manifest.skipped)) == (0, 3)


def test_a_store_of_an_earlier_version_is_completed_without_names(
    source: Path, tmp_path: Path
) -> None:
    config = demo_like(source, tmp_path / "store")
    store = job.extract(config).store
    edit_json(Path(store.root, "manifest.json"), lambda m: m["dataset"].pop("class_names"))
    before = stored_labels(store)
    Path(store.root, "commits", "shard-000001.json").unlink()
    assert job.extract(config).images == 2
    now = Store.open(store.url)
    assert (stored_labels(now), now.manifest.dataset.class_names) == (before, ())
    text = Path(store.root, "manifest.json").read_text()
    assert "class_names" not in text
    assert "empty_classes" not in text


def test_another_stream_of_imagenet_has_the_list_of_its_store(source: Path, tmp_path: Path) -> None:
    for old, new in zip(("ant", "bee", "cow"), WNIDS, strict=True):
        (source / old).rename(source / new)
    listed = (WNIDS[2], WNIDS[0], "n09999999", WNIDS[1])
    (tmp_path / "synsets.txt").write_text("\n".join(listed))
    synsets = {"dataset": "imagenet", "synsets": str(tmp_path / "synsets.txt"), "cut": "maps"}
    config = demo_like(source, tmp_path / "store", **synsets)
    store = job.extract(config).store
    assert store.manifest.dataset.class_names == listed
    assert {key[:9]: label for key, label in stored_labels(store).items()} == {
        WNIDS[2]: 0,
        WNIDS[0]: 1,
        WNIDS[1]: 3,
    }
    more = {"store": store.url, "add_stream": "more", "cut": "maps", "layers": (1,)}
    values = {**more, "batch_size": 2, "teacher": config.teacher, "codec": "float16"}
    assert job.extract(ExtractConfig.model_validate(values)).images == 5
    dataset = Store.open(store.url).manifest.dataset
    assert (dataset.class_names, dataset.empty_classes) == (listed, (2,))


def test_the_page_of_a_thousand_classes_is_short(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = job.extract(demo_like(source, tmp_path / "store")).store

    def change(manifest: dict[str, Any]) -> None:
        names = [f"class \x1b[31m {n} {'long ' * 30}" for n in range(1000)]
        manifest["dataset"] |= {"num_classes": 1000, "class_names": names}

    edit_json(Path(store.root, "manifest.json"), change)
    (line,) = [line for line in page(store, capsys).splitlines() if line.startswith("  classes")]
    assert line.isprintable()
    assert line.endswith("and 990 more")
    assert len(line) < 600
