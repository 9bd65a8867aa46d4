"""From captioned images to a trained MM-DiT, through Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.train_haste import train_run
from pipeline.checkpoints.student import load_trained_student
from pipeline.extract.job import extract
from pipeline.models import MMDiT
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store
from pipeline.store.captions import load_null
from schemas.run import RunConfig
from tests.captions import coco_config, write_coco

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("two_cpus")]


def test_captions_reach_two_workers_and_outlive_the_alignment(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")
    url = str(tmp_path / "store")
    extract(coco_config(write_coco(tmp_path / "source"), Path(url), actors=1, cpus_per_actor=1))
    store = Store.open(url)
    channels, size, _ = store.manifest.autoencoder.latent_shape
    config = RunConfig.model_validate(
        {
            "name": "text",
            "output": str(tmp_path),
            "store": url,
            "steps": 6,
            "global_batch": 5,
            "log_every": 1,
            "student": {"model": "MMDiT-6", "latent_size": size, "latent_channels": channels},
            "alignment": {
                "feature_depth": 3,
                "student_layers": [1, 2],
                "teacher_layers": [4, 5],
                "projector_width": 16,
                "termination": {"kind": "fixed", "step": 3},
            },
            "workers": {"count": 2, "cpus_per_worker": 0.5},
        }
    )
    summary = train_run(config)
    assert summary["termination_step"] == 3
    assert summary["bytes_read"]["maps"]["before"] > 0
    assert summary["bytes_read"]["maps"]["after"] == 0
    rows = read_metrics(tmp_path / "text" / "metrics.jsonl")
    assert [row["phase"] for row in rows if "phase" in row] == [1, 1, 1, 2, 2, 2]
    assert summary["bytes_read"]["text"]["before"] + summary["bytes_read"]["text"]["after"] > 0
    loaded = load_trained_student(tmp_path / "text")
    assert isinstance(loaded.student, MMDiT)
    assert torch.equal(loaded.student.null_context, load_null(store, "text")["embeddings"])
    assert loaded.text_encoder == store.manifest.text_streams["text"].encoder
