"""Complete runs of REG on a store with class tokens: they are data, in both phases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jobs.sample import main as draw_command
from pipeline.checkpoints.export import export_checkpoint
from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.reference_format import join_state, read_file
from pipeline.checkpoints.state import load_optimizer
from pipeline.checkpoints.student import load_student, load_trained_student
from pipeline.distributed.process_group import ProcessGroup
from pipeline.inspect.check import check_configs
from pipeline.runs.compatibility import resolve_run
from pipeline.runs.metrics import read_metrics
from pipeline.sampling.generate import draw_latents
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.targets.class_token import read_class_tokens
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.noise import draw
from pipeline.train.trainer import Trainer
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import assert_same_weights, run, weights
from tests.processes import train_on
from tests.stores import WIDTH, add_class_stream, add_random_stream, make_random_store

Make = Callable[..., RunConfig]
NO_ATTENTION = {"attention_weight": 0}


@pytest.fixture(scope="module")
def tokens_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return add_class_stream(make_random_store(tmp_path_factory.mktemp("tokens")))


@pytest.fixture
def reg_config(run_config: Make, tokens_store: Store) -> Make:
    """A tiny run of REG with HASTE's attention loss: three aligned steps, three not."""

    def make(**overrides: Any) -> RunConfig:
        student = {"class_token": WIDTH, **overrides.pop("student", {})}
        return run_config(**{"store": tokens_store.url, "student": student, **overrides})

    return make


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]


def test_the_alignment_ends_and_the_class_token_stays(reg_config: Make, tmp_path: Path) -> None:
    summary = run(reg_config(), tmp_path / "a")
    rows = rows_of(tmp_path / "a")
    assert [row["phase"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(("feature" in row) == ("attention" in row) == (row["phase"] == 1) for row in rows)
    assert all(row["class_token"] > 0 for row in rows)
    assert summary["bytes_read"]["maps"]["before"] > 0
    assert summary["bytes_read"]["maps"]["after"] == 0
    assert summary["bytes_read"]["class"]["after"] > 0
    assert summary["bytes_read"]["latents"]["after"] > 0
    student, state = load_student(tmp_path / "a")
    assert student.config.class_token == WIDTH
    assert state.store["class_token.stream"] == "class"
    images = draw_latents(student, [1, 2], SamplerConfig(steps=3, guidance=1.5))
    assert images.isfinite().all()


def test_a_run_without_class_token_does_not_read_the_stream(
    run_config: Make, tokens_store: Store, tmp_path: Path
) -> None:
    summary = run(run_config(store=tokens_store.url), tmp_path / "with")
    assert summary["bytes_read"]["class"] == {"before": 0, "after": 0}
    run(run_config(), tmp_path / "without")  # the same numbers, in a store without the stream
    assert_same_weights(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert all("class_token" not in row for row in rows_of(tmp_path / "with"))
    saved = json.loads((latest_checkpoint(tmp_path / "with") / "state.json").read_text())
    assert "class_token" not in saved["config"]["student"]
    assert not {"class_weight", "class_stream"} & saved["config"]["diffusion"].keys()
    assert "class_token.stream" not in saved["store"]


def test_entanglement_alone_reads_no_teacher(reg_config: Make, tmp_path: Path) -> None:
    off = {"feature_weight": 0, "attention_weight": 0, "termination": None}
    summary = run(reg_config(alignment=off), tmp_path / "a")
    assert summary["bytes_read"]["maps"] == {"before": 0, "after": 0}
    assert all(row["class_token"] > 0 for row in rows_of(tmp_path / "a"))


def batch_of(store: Store, config: RunConfig, streams: list[str]) -> Batch:
    order = SampleOrder(config.seed, store.index().samples_per_shard, config.data.window)
    loader = BatchLoader(store, streams, order, global_batch=config.global_batch)
    batch = next(iter(loader))
    loader.close()
    return batch


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_losses_are_those_of_the_formula(reg_config: Make, tokens_store: Store, path: str) -> None:
    """Noisy inputs, targets and all losses, from the stored arrays and the draws."""
    config = reg_config(diffusion={"path": path, "class_weight": 0.07})
    trainer = Trainer(config, tokens_store, ProcessGroup())
    torch.manual_seed(3)
    for parameter in trainer.module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = batch_of(tokens_store, config, ["latents", "class", "maps"])
    draws = draw(config.seed, batch.positions, (4, 8, 8), 0.1, class_token=WIDTH)
    t = draws.t
    columns = {k: torch.from_numpy(v).float() for k, v in batch.columns["latents"].items()}
    latents = (columns["mean"] + columns["std"] * draws.posterior) * 0.5
    clean = torch.from_numpy(batch.columns["class"]["class_token"]).float()
    half = torch.pi / 2
    alpha, sigma, d_alpha, d_sigma = (
        (1 - t, t, -torch.ones_like(t), torch.ones_like(t))
        if path == "linear"
        else (
            (half * t).cos(),
            (half * t).sin(),
            -half * (half * t).sin(),
            half * (half * t).cos(),
        )
    )

    def mix(a: Tensor, x: Tensor, b: Tensor, e: Tensor) -> Tensor:
        return torch.stack([p * u + q * v for p, u, q, v in zip(a, x, b, e, strict=True)])

    x, v = mix(alpha, latents, sigma, draws.noise), mix(d_alpha, latents, d_sigma, draws.noise)
    assert draws.class_noise is not None
    c = mix(alpha, clean, sigma, draws.class_noise)
    w = mix(d_alpha, clean, d_sigma, draws.class_noise)
    labels = torch.where(draws.drop_label, 5, columns["label"].long())
    module = trainer.module
    with torch.no_grad():
        out = module.student(x, t, labels, module.taps, c)
        projected = module.projector(out.features)
        features = torch.from_numpy(batch.columns["maps"]["features"]).float()
        targets = torch.cat([clean[:, None], features], dim=1)
        right = {
            "denoising": (out.prediction - v).square().mean((1, 2, 3)).sum(),
            "class_token": (out.class_prediction - w).square().mean(1).sum(),
            "feature": -F.cosine_similarity(projected, targets, dim=-1).mean(1).sum(),
        }
        probs = torch.from_numpy(batch.columns["maps"]["attention"]).float()[:, [2, 0]]
        probs = probs / probs.sum(-1, keepdim=True)  # layers 3 and 1 of 1, 2, 3
        logits = torch.stack(
            [q[:, :3] @ k[:, :3].transpose(2, 3) / 6**0.5 for q, k in out.attended], dim=1
        )
        assert logits.shape[-2:] == (16, 16)  # patches alone
        crosses = -(probs * logits.log_softmax(-1)).sum(-1)
        right["attention"] = crosses.flatten(1).mean(1).sum()
        inputs = trainer.inputs(batch)
        found = trainer.losses(module, inputs, trainer.targets_of(batch))
    for name, value in zip(module.losses, found, strict=True):
        if name in right:
            assert value.item() == pytest.approx(right[name].item(), rel=1e-5), name
    total = right["denoising"] + 0.07 * right["class_token"]
    total = total + 0.5 * right["feature"] + 0.5 * right["attention"]
    assert trainer.total(found).item() == pytest.approx(total.item(), rel=1e-5)
    trainer.close()


def test_draws_are_appended() -> None:
    """A run without class token keeps its draws; a token's noise is a function of the position."""
    positions = np.array([3, 11, 40])
    plain, tokens = (
        draw(1, positions, (4, 8, 8), 0.1),
        draw(1, positions, (4, 8, 8), 0.1, class_token=12),
    )
    for one, other in zip(plain[:4], tokens[:4], strict=True):
        assert torch.equal(one, other)
    assert plain.class_noise is None
    alone = draw(1, positions[1:2], (4, 8, 8), 0.1, class_token=12)
    assert tokens.class_noise.shape == (3, 12)
    assert torch.equal(alone.class_noise[0], tokens.class_noise[1])
    many = draw(0, np.arange(300), (1, 1, 1), 0.1, class_token=100).class_noise
    assert abs(many.mean().item()) < 0.03
    assert many.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_resumed_run_is_bit_identical(reg_config: Make, tmp_path: Path, killed_at: int) -> None:
    run(reg_config(log_every=4), tmp_path / "whole")
    train_on(1, reg_config(log_every=4, steps=killed_at), tmp_path / "parts")
    train_on(1, reg_config(log_every=4), tmp_path / "parts")
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    names = ("step", "denoising", "class_token", "grad_norm")
    last = [{n: rows_of(tmp_path / f)[-1][n] for n in names} for f in ("parts", "whole")]
    assert last[0]["class_token"] == last[1]["class_token"] or killed_at % 4


def test_micro_batches_and_ranks_change_nothing(reg_config: Make, tmp_path: Path) -> None:
    optimizer = {"eps": 1e-3}
    run(reg_config(optimizer=optimizer), tmp_path / "one")
    split = {"workers": {"micro_batch": 2}, "optimizer": optimizer}
    train_on(2, reg_config(**split), tmp_path / "two")
    for one, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for name in ("denoising", "class_token", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=2e-5)
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_trains_the_same_losses(reg_config: Make, tmp_path: Path) -> None:
    run(reg_config(steps=1), tmp_path / "float32")
    run(reg_config(steps=1, precision="bfloat16"), tmp_path / "bfloat16")
    (one,), (other,) = rows_of(tmp_path / "float32"), rows_of(tmp_path / "bfloat16")
    for name in ("denoising", "class_token", "feature"):
        assert other[name] == pytest.approx(one[name], rel=2e-2, abs=2e-2)


def test_the_probe_measures_the_whole_denoising_loss(reg_config: Make, tokens_store: Store) -> None:
    """Without images' velocities to learn, the denoising gradient is the class token's alone."""
    config = reg_config(alignment={"termination": {"kind": "gradient_cosine"}})
    found = []
    for weight in (0.0, 1e6):
        changed = config.model_copy(
            update={"diffusion": config.diffusion.model_copy(update={"class_weight": weight})}
        )
        trainer = Trainer(changed, tokens_store, ProcessGroup())
        torch.manual_seed(3)
        for parameter in trainer.module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        order = SampleOrder(0, tokens_store.index().samples_per_shard, 2)
        probe = GradientProbe(trainer, tokens_store, order)
        found += probe.gradient_cosines([0.3], 6)
        assert set(probe.bytes_read) == {"latents", "class", "maps"}
        trainer.close()
    assert abs(found[0] - found[1]) > 1e-3


def test_another_teacher_s_stream_aligns_patches_alone(reg_config: Make, tmp_path: Path) -> None:
    store = add_class_stream(make_random_store(tmp_path / "store"))
    store = add_random_stream(store, "second", weights_sha256="3" * 64)
    options = {"stream": "second", "attention_weight": 0, "feature_depth": 3}
    config = reg_config(
        store=store.url,
        alignment={"stream": "maps", **NO_ATTENTION, "others": [options]},
    )
    trainer = Trainer(config, store, ProcessGroup())
    batch = batch_of(store, config, ["latents", "class", "maps", "second"])
    module = trainer.module
    inputs = trainer.inputs(batch)
    with torch.no_grad():
        found = dict(
            zip(
                module.losses,
                trainer.losses(module, inputs, trainer.targets_of(batch)).tolist(),
                strict=True,
            )
        )
        out = module.student(*inputs[:3], module.taps, inputs.class_token.noisy)
        projected = module.other_projectors["1"](out.features[:, 1:])
        features = torch.from_numpy(batch.columns["second"]["features"]).float()
        right = -F.cosine_similarity(projected, features, dim=-1).mean(1).sum()
    assert found["feature_second"] == pytest.approx(right.item(), rel=1e-5)
    trainer.close()


CONV = {"projector": "conv", "projector_kernel": 3, **NO_ATTENTION}


def test_a_convolution_aligns_patches_alone(reg_config: Make, tokens_store: Store) -> None:
    """iREPA's projector has no place for a token beside the grid."""
    config = reg_config(alignment=CONV)
    trainer = Trainer(config, tokens_store, ProcessGroup())
    batch = batch_of(tokens_store, config, ["latents", "class", "maps"])
    module, inputs = trainer.module, trainer.inputs(batch)
    with torch.no_grad():
        found = trainer.losses(module, inputs, trainer.targets_of(batch))
        out = module.student(*inputs[:3], module.taps, inputs.class_token.noisy)
        projected = module.projector(out.features[:, 1:])
        features = torch.from_numpy(batch.columns["maps"]["features"]).float()
        right = -F.cosine_similarity(projected, features, dim=-1).mean(1).sum()
    assert found[1].item() == pytest.approx(right.item(), rel=1e-5)
    trainer.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": {"termination": {"ramp": {"kind": "linear", "steps": 2}, "step": 3}}},
        {"diffusion": {"time": "lognormal"}},
    ],
    ids=["ramp", "lognormal"],
)
def test_other_recipes_combine_with_the_class_token(
    reg_config: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    summary = run(reg_config(**changes), tmp_path / "a")
    assert summary["bytes_read"]["maps"]["after"] == 0
    assert all(row["class_token"] > 0 for row in rows_of(tmp_path / "a"))


def test_the_teacher_s_grid_may_differ(reg_config: Make, tokens_store: Store) -> None:
    """Patches are resampled, the class token is not."""
    config = reg_config(student={"class_token": WIDTH, "model": "SiT-S/4"})
    trainer = Trainer(config, tokens_store, ProcessGroup())
    batch = batch_of(tokens_store, config, ["latents", "class", "maps"])
    losses = trainer.losses(trainer.module, trainer.inputs(batch), trainer.targets_of(batch))
    assert losses.isfinite().all()
    trainer.total(losses).backward()
    assert all(p.grad is not None for p in trainer.module.parameters())
    trainer.close()


def test_class_tokens_are_those_of_the_store(reg_config: Make, tokens_store: Store) -> None:
    config = reg_config()
    trainer = Trainer(config, tokens_store, ProcessGroup())
    batch = batch_of(tokens_store, config, ["latents", "class", "maps"])
    order = SampleOrder(config.seed, tokens_store.index().samples_per_shard, config.data.window)
    right = read_class_tokens(tokens_store, *order.locate(batch.positions))
    assert torch.equal(trainer.inputs(batch).class_token.clean, right)
    trainer.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "width": (
        {"student": {"class_token": 16}},
        r"student.class_token is 16, the tokens of class stream 'class' have 12 numbers: set "
        r"--student.class-token 12",
    ),
    "no such stream": (
        {"diffusion": {"class_stream": "other"}},
        "holds no class stream 'other', only class",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_store_that_does_not_fit_is_refused(
    reg_config: Make, tokens_store: Store, case: str
) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refusal:
        resolve_run(reg_config(**changes), tokens_store.manifest, None, None)
    assert "\n" not in str(refusal.value)


def test_a_store_without_class_tokens_is_refused(reg_config: Make, random_store: Store) -> None:
    with pytest.raises(UserError, match=r"--add-stream class"):
        resolve_run(reg_config(), random_store.manifest, None, None)


def test_means_of_patches_are_used_where_they_are_named(reg_config: Make, tmp_path: Path) -> None:
    store = add_class_stream(make_random_store(tmp_path / "store"), token="mean")
    with pytest.raises(UserError, match=r"only the mean of its patches: set --diffusion.class-str"):
        resolve_run(reg_config(store=store.url), store.manifest, None, None)
    named = reg_config(store=store.url, diffusion={"class_stream": "class"})
    assert resolve_run(named, store.manifest, None, None).diffusion.class_stream == "class"


def test_a_run_keeps_its_class_stream(reg_config: Make, tmp_path: Path) -> None:
    store = add_class_stream(make_random_store(tmp_path / "store"))
    train_on(1, reg_config(store=store.url, steps=2), tmp_path / "run")
    store = add_random_stream(store, "second", weights_sha256="3" * 64)
    add_class_stream(store, "second_class")
    config = reg_config(store=store.url, alignment={"stream": "maps"})
    train_on(1, config, tmp_path / "run")
    assert rows_of(tmp_path / "run")[-1]["step"] == 6


def test_check_names_what_a_store_lacks(
    reg_config: Make, random_store: Store, tokens_store: Store, tmp_path: Path
) -> None:
    files = []
    for name, width in (("right", WIDTH), ("wrong", 16)):
        config = reg_config(student={"class_token": width}).model_dump(mode="json")
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**config, "store": None}))
        files.append(str(path))
    right, wrong = check_configs(tokens_store, tuple(files))
    assert right.ok
    assert not wrong.ok
    assert "--student.class-token 12" in str(wrong.reason)
    (missing,) = check_configs(random_store, (files[0],))
    assert not missing.ok
    assert (
        f"add it with: python -m pipeline.extract --store {random_store.url} --add-stream class"
        in (str(missing))
    )


def test_check_takes_the_class_stream_of_the_teacher_that_it_names(
    reg_config: Make, tmp_path: Path
) -> None:
    store = add_class_stream(make_random_store(tmp_path / "store"))
    store = add_class_stream(add_random_stream(store, "late", layers=(0,)), "late_class")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**reg_config().model_dump(mode="json"), "store": None}))
    (answer,) = check_configs(store, (str(file),))
    assert answer.ok
    assert answer.reason == "with --alignment.stream maps"
    named = reg_config(store=store.url, alignment={"stream": "maps"})
    assert resolve_run(named, store.manifest, None, None).diffusion.class_stream == "class"


def test_options_without_a_class_token_are_refused(run_config: Make) -> None:
    with pytest.raises(ValueError, match=r"class_stream is read with student.class_token only"):
        run_config(diffusion={"class_stream": "class"})
    with pytest.raises(ValueError, match=r"class_weight is that of a class token: set student"):
        run_config(diffusion={"class_weight": 0.1})
    with pytest.raises(ValueError, match="class_token is for SiT"):
        run_config(student={"model": "DiT-S/2", "class_token": 12})


def test_an_export_is_drawn_as_its_run(reg_config: Make, tmp_path: Path) -> None:
    run(reg_config(), tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    out = tmp_path / "reg.pt"
    export_checkpoint(checkpoint, out)
    one, other = load_trained_student(checkpoint).student, load_trained_student(out).student
    sampler = SamplerConfig(steps=4, guidance=2.0, class_guidance=1.3)
    labels = [1, 4]
    images = draw_latents(one, labels, sampler)
    assert torch.equal(draw_latents(other, labels, sampler), images)

    pictures = []
    for source in (checkpoint, out):
        png = tmp_path / "grid.png"
        argv = ["--checkpoint", str(source), "--png", str(png), "--classes", "0,4"]
        argv += ["--per-class", "1", "--sampler.steps", "3", "--autoencoder", "demo"]
        argv += ["--sampler.guidance", "2.3", "--sampler.class-guidance", "0", "--device", "cpu"]
        assert draw_command(argv) == 0
        pictures.append(np.asarray(Image.open(png)))
    assert np.array_equal(*pictures)

    names = list(join_state(read_file(out)))
    assert names[-4:] == [f"{n}.{leaf}" for n in ("cls_projectors2", "wg_norm") for leaf in LEAVES]
    final = [name for name in names if name.startswith("final_layer.")]
    assert final[2:4] == ["final_layer.linear_cls.weight", "final_layer.linear_cls.bias"]
    content = torch.load(out, weights_only=True)
    assert list(content["model"]) == names
    assert content["model"]["pos_embed"].shape[1] == 17
    # the reference numbers its parameters in this order, the frozen table among them
    moments, parameters = load_optimizer(checkpoint)["state"], list(one.named_parameters())
    for number, (name, parameter) in enumerate(parameters):
        state = content["opt"]["state"][names.index(name)]
        assert torch.equal(state["exp_avg"], moments[number]["exp_avg"])
        assert state["exp_avg"].shape == parameter.shape
    assert content["opt"]["param_groups"][0]["params"] == list(range(len(names)))


LEAVES = ("weight", "bias")
