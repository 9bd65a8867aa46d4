"""Complete runs of an MM-DiT on a store with captions: they are data, in both phases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoints.export import export_checkpoint
from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.student import load_trained_student
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import MMDiT
from pipeline.randomness import Purpose, generator
from pipeline.runs.compatibility import resolve_run
from pipeline.runs.metrics import VALIDATION_LOSS, read_metrics
from pipeline.store import Batch, BatchLoader, SampleOrder, Store, StreamReader
from pipeline.store.captions import load_null
from pipeline.store.codecs import decode_column
from pipeline.store.reading.caption_reader import CaptionReader, choose_captions
from pipeline.store.reading.holdout import key_rank
from pipeline.train.assembly import _open_validator
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.noise import draw
from pipeline.train.trainer import Trainer
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.captions import TEXT, coco_config, extract_here, write_coco
from tests.pipeline.train.test_loop import assert_same_weights, run, weights
from tests.pipeline.train.test_sharding import assert_same_run
from tests.pipeline.train.test_workers import EPS
from tests.processes import train_on
from tests.stores import TEXT_TOKENS, TEXT_WIDTH, add_text_stream, make_random_store

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return add_text_stream(make_random_store(tmp_path_factory.mktemp("text")))


@pytest.fixture
def text_config(run_config: Make, text_store: Store) -> Make:
    """A tiny run of MM-DiT with HASTE's losses: three aligned steps, three not."""

    def make(**overrides: Any) -> RunConfig:
        student = {"model": "MMDiT-4", **overrides.pop("student", {})}
        return run_config(**{"store": text_store.url, "student": student, **overrides})

    return make


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]


def test_the_alignment_ends_and_the_captions_stay(text_config: Make, tmp_path: Path) -> None:
    summary = run(text_config(), tmp_path / "a")
    rows = rows_of(tmp_path / "a")
    assert [row["phase"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(("feature" in row) == ("attention" in row) == (row["phase"] == 1) for row in rows)
    assert all(row["bytes_per_second_text"] >= 0 for row in rows)
    assert summary["bytes_read"]["maps"]["before"] > 0
    assert summary["bytes_read"]["maps"]["after"] == 0
    assert summary["bytes_read"]["text"]["after"] > 0
    assert summary["bytes_read"]["latents"]["after"] > 0


def test_a_checkpoint_needs_no_store(text_config: Make, text_store: Store, tmp_path: Path) -> None:
    run(text_config(steps=4), tmp_path / "a")
    null = load_null(text_store, "text")["embeddings"]
    loaded = load_trained_student(tmp_path / "a")
    assert isinstance(loaded.student, MMDiT)
    assert loaded.student.config.text_shape == (TEXT_TOKENS, TEXT_WIDTH)
    assert torch.equal(loaded.student.null_context, null)
    assert loaded.text_encoder == text_store.manifest.text_streams["text"].encoder
    online = load_trained_student(tmp_path / "a", "model").student
    assert torch.equal(online.null_context, null)
    assert not torch.equal(online.context_embedder.weight, loaded.student.context_embedder.weight)
    saved = json.loads((latest_checkpoint(tmp_path / "a") / "state.json").read_text())
    assert saved["config"]["student"]["initialisation"] == "pytorch"
    assert saved["config"]["student"]["model"] == "MMDiT-4/2"
    assert saved["store"]["text.stream"] == "text"


def test_an_exported_file_needs_no_store(text_config: Make, tmp_path: Path) -> None:
    run(text_config(steps=2, diffusion={"label_drop": 0}), tmp_path / "a")
    folder, file = latest_checkpoint(tmp_path / "a"), tmp_path / "export.pt"
    export_checkpoint(folder, file)
    one, other = load_trained_student(folder), load_trained_student(file)
    for name, tensor in one.student.state_dict().items():
        assert torch.equal(other.student.state_dict()[name], tensor), name
    assert other.text_encoder == one.text_encoder
    assert other.text_encoder is not None
    assert one.student.null_label is other.student.null_label is None  # never without a caption
    content = torch.load(file, weights_only=True)
    names = list(content["model"])
    assert "null_context" not in names  # the authors' network has none
    assert names[-6:] == [
        f"projectors.0.{n}.{leaf}" for n in (0, 2, 4) for leaf in ("weight", "bias")
    ]
    moments = content["opt"]["state"]  # numbered without the table, which is a buffer there
    for number, name in enumerate(name for name in names if name != "pos_embed"):
        assert moments[number]["exp_avg"].shape == content["model"][name].shape


def batch_of(store: Store, config: RunConfig, streams: list[str], step: int = 0) -> Batch:
    order = SampleOrder(config.seed, store.index().samples_per_shard, config.data.window)
    loader = BatchLoader(
        store,
        streams,
        order,
        global_batch=config.global_batch,
        start_step=step,
        caption_drop=config.diffusion.label_drop,
    )
    batch = next(iter(loader))
    loader.close()
    return batch


def captions_of(store: Store, config: RunConfig, positions: np.ndarray) -> tuple[Tensor, Any]:
    """The text embeddings of visits, from all captions of their images; and the choices."""
    order = SampleOrder(config.seed, store.index().samples_per_shard, config.data.window)
    shards, rows = order.locate(positions)
    stored = StreamReader(store, "text").read(shards, rows)
    parts = {name: torch.from_numpy(array) for name, array in stored.items()}
    columns = store.manifest.streams["text"].columns
    every = torch.stack(
        [decode_column(f"caption{n}", columns[f"caption{n}"], parts) for n in range(3)]
    )
    samples = shards * store.manifest.shard_size + rows
    epochs = positions // order.epoch_size
    counts = (stored["lengths"] > 0).sum(1)
    choice = choose_captions(config.seed, epochs, samples, counts, drop=config.diffusion.label_drop)
    texts = every[choice.number, np.arange(len(positions))]
    texts[choice.dropped] = load_null(store, "text")["embeddings"]
    return texts, choice


def test_batches_hold_the_chosen_caption_of_each_visit(
    text_config: Make, text_store: Store
) -> None:
    """Also across an epoch's end, and with a batch larger than a window."""
    config = text_config(global_batch=17, diffusion={"label_drop": 0.3})
    config = resolve_run(config, text_store.manifest, None, None)
    trainer = Trainer(config, text_store, ProcessGroup())
    dropped = numbers = 0
    for step in range(6):
        batch = batch_of(text_store, config, ["latents", "text"], step)
        expected, choice = captions_of(text_store, config, batch.positions)
        found = trainer.inputs(batch).condition
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0)
        dropped += choice.dropped.sum()
        numbers += (choice.number > 0).sum()
    assert 15 < dropped < 50
    assert numbers > 20
    trainer.close()


def test_losses_are_those_of_the_formula(text_config: Make, text_store: Store) -> None:
    config = resolve_run(text_config(), text_store.manifest, None, None)
    trainer = Trainer(config, text_store, ProcessGroup())
    batch = batch_of(text_store, config, ["latents", "text", "maps"])
    draws = draw(config.seed, batch.positions, (4, 8, 8), 0.1)
    columns = {k: torch.from_numpy(v).float() for k, v in batch.columns["latents"].items()}
    latents = (columns["mean"] + columns["std"] * draws.posterior) * 0.5
    t = draws.t.view(-1, 1, 1, 1)
    x, v = (1 - t) * latents + t * draws.noise, draws.noise - latents
    texts, _ = captions_of(text_store, config, batch.positions)
    module = trainer.module
    with torch.no_grad():
        out = module.student(x, draws.t, texts.float(), module.taps)
        assert out.features.shape[1] == 16  # image tokens alone
        projected = module.projector(out.features)
        features = torch.from_numpy(batch.columns["maps"]["features"]).float()
        probs = torch.from_numpy(batch.columns["maps"]["attention"]).float()[:, [2, 0]]
        probs = probs / probs.sum(-1, keepdim=True)  # layers 3 and 1 of 1, 2, 3
        logits = torch.stack([q[:, :3] @ k[:, :3].mT / 6**0.5 for q, k in out.attended], dim=1)
        right = {
            "denoising": (out.prediction - v).square().mean((1, 2, 3)).sum(),
            "feature": -F.cosine_similarity(projected, features, dim=-1).mean(1).sum(),
            "attention": -(probs * logits.log_softmax(-1)).sum(-1).flatten(1).mean(1).sum(),
        }
        found = trainer.losses(module, trainer.inputs(batch), trainer.targets_of(batch))
    for name, value in zip(module.losses, found, strict=True):
        if name in right:
            assert value.item() == pytest.approx(right[name].item(), rel=1e-5), name
    trainer.close()


@pytest.mark.parametrize("killed_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_identical(text_config: Make, tmp_path: Path, killed_at: int) -> None:
    run(text_config(log_every=4), tmp_path / "whole")
    train_on(1, text_config(log_every=4, steps=killed_at), tmp_path / "parts")
    train_on(1, text_config(log_every=4), tmp_path / "parts")
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_micro_batches_and_ranks_change_nothing(text_config: Make, tmp_path: Path) -> None:
    optimizer = {"eps": 1e-3}
    run(text_config(optimizer=optimizer), tmp_path / "one")
    split = {"workers": {"micro_batch": 2}, "optimizer": optimizer}
    train_on(2, text_config(**split), tmp_path / "two")
    for one, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for name in ("denoising", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=2e-5)
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_probe_gives_the_text_to_the_student(text_config: Make, text_store: Store) -> None:
    config = text_config(alignment={"termination": {"kind": "gradient_cosine"}})
    config = resolve_run(config, text_store.manifest, None, None)
    trainer = Trainer(config, text_store, ProcessGroup())
    order = SampleOrder(0, text_store.index().samples_per_shard, 2)
    probe = GradientProbe(trainer, text_store, order)
    (first,) = probe.gradient_cosines([0.3], 6)
    assert set(probe.bytes_read) == {"latents", "text", "maps"}
    assert probe.bytes_read["text"] > 0
    with torch.no_grad():
        trainer.module.student.context_embedder.weight.zero_()
    (without,) = probe.gradient_cosines([0.3], 6)
    assert first != pytest.approx(without, abs=1e-4)
    trainer.close()


def test_a_student_of_classes_does_not_read_captions(
    run_config: Make, text_store: Store, tmp_path: Path
) -> None:
    summary = run(run_config(store=text_store.url), tmp_path / "with")
    assert summary["bytes_read"]["text"] == {"before": 0, "after": 0}
    run(run_config(), tmp_path / "without")
    assert_same_weights(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_a_store_without_captions_is_refused(text_config: Make, random_store: Store) -> None:
    with pytest.raises(UserError, match="MMDiT-4/2 reads captions: the store holds no captions"):
        resolve_run(text_config(store=random_store.url), random_store.manifest, None, None)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"text_width": 768}, "text_width is 768, the captions .* 'text' have 20: set --student"),
        ({"text_tokens": 77}, "text_tokens is 77, the captions .* have 5"),
    ],
)
def test_other_sizes_are_refused(
    text_config: Make, text_store: Store, student: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_run(text_config(student=student), text_store.manifest, None, None)


def test_several_streams_must_be_named(text_config: Make, tmp_path: Path) -> None:
    store = add_text_stream(make_random_store(tmp_path / "s"))
    store = add_text_stream(store, "text_second", codec="float16")
    with pytest.raises(UserError, match=r"several streams .* text, text_second.*text-stream"):
        resolve_run(text_config(store=store.url), store.manifest, None, None)
    with pytest.raises(UserError, match="no stream of captions 'other'"):
        resolve_run(text_config(diffusion={"text_stream": "other"}), store.manifest, None, None)
    chosen = text_config(store=store.url, diffusion={"text_stream": "text_second"}, steps=4)
    summary = run(chosen, tmp_path / "a")
    assert summary["bytes_read"]["text_second"]["after"] > 0
    assert summary["bytes_read"]["text"] == {"before": 0, "after": 0}


def test_token_ids_are_encoded_by_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of token ids gives the student the embeddings of a stream of embeddings; the encoder
    is loaded once, for grids of other captions too."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")
    source = write_coco(tmp_path / "source")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\n")
    found = {}
    for keep in ("embeddings", "tokens"):
        text = {**TEXT, "keep": keep, "codec": "float32"}
        store = extract_here(coco_config(source, tmp_path / keep, text=text))
        channels, size, _ = store.manifest.autoencoder.latent_shape
        student = {"model": "MMDiT-2", "latent_size": size, "latent_channels": channels}
        values: dict[str, Any] = {
            "store": store.url,
            "student": student,
            "global_batch": 12,
            "diffusion": {"label_drop": 0.3},
            "alignment": {"feature_weight": 0, "attention_weight": 0},
            "samples": {"every": 1, "captions": str(prompts)},
        }
        config = resolve_run(RunConfig.model_validate(values), store.manifest, None, None)
        trainer = Trainer(config, store, ProcessGroup())
        batch = batch_of(store, config, ["latents", "text"])
        found[keep] = trainer.inputs(batch).condition, trainer.module.student.null_context
        assert batch.columns["text"]["dropped"].any()
        assert trainer.inputs.captions.encoder_info.weights_sha256 is not None
        if keep == "tokens":
            encoder = trainer.inputs.captions.encoder
            monkeypatch.delattr("pipeline.sampling.prompts.open_recorded")  # it loads another
            embedder = _open_validator(trainer, store, tmp_path).grids.sampler.embedder
            assert torch.equal(embedder(range(1)).captions, encoder(["a red car"]))
            assert batch.columns["text"]["caption"].dtype == np.int64
            batch.columns["text"]["caption"][0, 3] = 10**6
            with pytest.raises(UserError, match="holds a token outside the 49408 of"):
                trainer.inputs(batch)
        trainer.close()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    condition, null = found["tokens"]
    assert (condition == null).all((1, 2)).sum() < 12  # not all are dropped


@pytest.mark.slow
def test_shards_train_what_copies_train(text_config: Make, tmp_path: Path) -> None:
    """FSDP2: the null caption is a buffer, which no worker divides."""
    for name, compute in (("copies", {}), ("shards", {"shard": "fsdp2"})):
        changes = {"optimizer": EPS, "compute": {**compute, "compile": "off"}}
        train_on(2, text_config(workers={"count": 2, "micro_batch": 3}, **changes), tmp_path / name)
    assert_same_run(tmp_path / "copies", tmp_path / "shards")


def test_held_out_captions_are_measured_as_the_formula_says(
    text_config: Make, text_store: Store, tmp_path: Path
) -> None:
    """(v - (noise - x))^2 with the caption of epoch 0, none dropped, in plain torch; the same from
    two stores."""
    validation = {"every": 3, "times": (0.3,), "batch_size": 2}
    config = text_config(
        steps=3, data={"holdout": 0.4}, validation=validation, checkpoint={"every": 3}
    )
    run(config, tmp_path / "run")
    (row,) = [
        r
        for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if r.get("event") == VALIDATION_LOSS
    ]
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    student = load_trained_student(newest, "model").student
    captions = CaptionReader(text_store, seed=0, drop=0.0)
    found = []
    for number in range(22):
        rank = key_rank(f"sample-{number}")
        if rank >= 0.4 * 2**64:
            continue
        shard, place = (np.array([value]) for value in divmod(number, 6))
        stored = StreamReader(text_store, "latents").read(shard, place)
        rng = generator(Purpose.VALIDATION, 0, rank)
        rng.random(2, dtype=np.float32)
        posterior, noise = (
            torch.from_numpy(rng.standard_normal((1, 4, 8, 8), dtype=np.float32)) for _ in range(2)
        )
        mean, std = (torch.from_numpy(stored[part]).float() for part in ("mean", "std"))
        x = 0.5 * (mean + std * posterior)
        context = captions.read(shard, place, np.zeros(1, np.int64)).values.float()
        with torch.no_grad():
            v = student(0.7 * x + 0.3 * noise, torch.tensor([0.3]), context).prediction
        found.append((v - (noise - x)).square().mean().item())
    assert len(found) >= 2
    assert row["validation_model"] == pytest.approx(np.mean(found), rel=1e-5)

    other = add_text_stream(make_random_store(tmp_path / "other", samples=9))
    manifest = Path(other.root, "manifest.json")
    manifest.write_text(manifest.read_text().replace("0" * 64, "9" * 64))
    config = text_config(steps=3, validation={**validation, "store": other.url})
    run(config, tmp_path / "second")
    (row,) = [
        r
        for r in read_metrics(tmp_path / "second" / "metrics.jsonl")
        if r.get("event") == VALIDATION_LOSS
    ]
    assert np.isfinite(row["validation_ema"])
