"""`--check` warns of codecs that are too coarse for normalised targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.inspect.check import check_configs
from pipeline.inspect.codec_check import MAX_ERROR, _target_error
from pipeline.inspect.fidelity import measure_config
from pipeline.store import Store
from schemas.run import RunConfig
from tests.encoded import encode

STUDENT = {"model": "SiT-S/1", "depth": 3, "width": 24, "heads": 6}
SPATIAL = {"normalisation": "spatial", "normalisation_strength": 0.8}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(**alignment: Any) -> RunConfig:
    pairs = {"student_layers": [1], "teacher_layers": [5], "attention_weight": 0}
    values = {"feature_depth": 2, **pairs, **alignment}
    student = {**STUDENT, "latent_size": 8, "num_classes": 10}
    return RunConfig.model_validate({"student": student, "alignment": values})


def answer(store: Store, folder: Path, config: RunConfig) -> str | None:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True, mode="json")))
    (found,) = check_configs(store, (str(file),))
    assert found.ok
    return found.reason


@pytest.mark.parametrize(("cut", "codec"), [("maps", "small"), ("activations", "small")])
def test_the_estimate_is_the_error_against_the_teacher(
    tmp_path: Path, cut: str, codec: str
) -> None:
    """Within a tenth: the same images, compared with the teacher's own targets."""
    store = encode(tmp_path / "store", cut=cut, codec=codec)
    config = run(**SPATIAL)
    found = measure_config(store, config, 8)["alignment"]
    true = 1 - found.cosine_sum / found.tokens
    assert _target_error(store, cut, config.alignment) == pytest.approx(true, rel=0.1)


def test_only_coarse_codecs_of_normalised_targets_are_warned_of(tmp_path: Path) -> None:
    small = encode(tmp_path / "small", codec="small")
    faithful = encode(tmp_path / "faithful", codec="faithful")
    warning = answer(small, tmp_path, run(**SPATIAL))
    assert warning is not None
    assert warning.startswith("warning: codec rms8 of stream 'maps' moves targets with")
    assert f"more than {MAX_ERROR:g}" in warning
    assert answer(faithful, tmp_path, run(**SPATIAL)) is None
    assert answer(small, tmp_path, run()) is None
    assert answer(encode(tmp_path / "image", cut="image"), tmp_path, run(**SPATIAL)) is None
