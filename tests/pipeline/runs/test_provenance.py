"""Samples that may be recorded for a run, and others that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.hashing import sha256_of_arrays
from pipeline.runs.provenance import check_samples_are_of
from schemas.errors import UserError
from schemas.sample import SampleAbout
from tests.pipeline.evaluate.sets import about_samples

STATE = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}


def info_of(run: Path) -> SampleAbout:
    digest = sha256_of_arrays((name, STATE[name].numpy()) for name in sorted(STATE))
    return about_samples(checkpoint=str(run / "checkpoint-000000300"), weights_sha256=digest)


def with_checkpoint(run: Path, state: dict[str, torch.Tensor]) -> Path:
    (run / "checkpoint-000000300").mkdir(parents=True)
    save_file(state, run / "checkpoint-000000300" / "model.safetensors")
    return run


def test_weights_identify_a_run_in_any_folder(tmp_path: Path) -> None:
    run = with_checkpoint(tmp_path / "run", STATE)
    check_samples_are_of(str(run), info_of(run), 300)
    check_samples_are_of(str(run), info_of(tmp_path / "where-it-lay"), 300)
    other = with_checkpoint(tmp_path / "other", {**STATE, "a": torch.zeros(2, 2)})
    for named in (run, other):  # refused even for the same folder, because it was trained again
        with pytest.raises(UserError, match="were not drawn from the 'model' weights of its check"):
            check_samples_are_of(str(other), info_of(named), 300)


def test_without_the_checkpoint_the_folder_identifies_the_run(tmp_path: Path) -> None:
    for name in ("run", "other", "copies/run"):
        (tmp_path / name).mkdir(parents=True)
    run, copy = tmp_path / "run", tmp_path / "copies" / "run"
    check_samples_are_of(str(run), info_of(run), 300)
    (tmp_path / "link").symlink_to(run)
    check_samples_are_of(str(tmp_path / "link"), info_of(run), 300)
    for other in (tmp_path / "other", copy):
        with pytest.raises(UserError, match=r"recorded as those of .*/run/checkpoint-000000300"):
            check_samples_are_of(str(other), info_of(run), 300)
    run.rmdir()  # it was moved
    check_samples_are_of(str(copy), info_of(run), 300)


def test_a_file_names_no_run(tmp_path: Path) -> None:
    info = about_samples(checkpoint="/downloads/haste.pt", step=None)
    check_samples_are_of(str(tmp_path), info, 300)
    run = with_checkpoint(tmp_path / "run", STATE)
    with pytest.raises(UserError, match="were not drawn from"):
        check_samples_are_of(str(run), info, 300)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    run = with_checkpoint(tmp_path / "run", STATE)
    (run / "checkpoint-000000300" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model.safetensors' cannot be read"):
        check_samples_are_of(str(run), info_of(run), 300)
