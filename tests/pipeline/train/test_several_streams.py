"""Runs that align to several teacher streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.alignment.aligned_student import AlignedStudent, AlignedTeacher
from pipeline.alignment.losses import Targets, attention_loss, feature_loss
from pipeline.checkpoints.export import export_checkpoint
from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.reference_format import read_file
from pipeline.cli.options import parse_options
from pipeline.models import SiT, Taps
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store
from pipeline.train.local import train_here
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.student import StudentConfig
from tests.pipeline.train.test_loop import assert_same_weights, run, weights
from tests.stores import add_random_stream, make_random_store

Make = Callable[..., RunConfig]
STUDENT = StudentConfig(model="SiT-S/2", depth=4, width=24, heads=4, latent_size=8, num_classes=5)
SECOND: dict[str, Any] = {
    "stream": "second",
    "feature_weight": 0.25,
    "attention_weight": 0.125,
    "feature_depth": 2,
    "student_layers": [0, 2],
    "teacher_layers": [2, 2],
    "projector_width": 20,
}


@pytest.fixture(scope="module")
def two_streams(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return add_random_stream(make_random_store(tmp_path_factory.mktemp("two") / "store"), "second")


def two(make: Make, store: Store, **changes: Any) -> RunConfig:
    alignment = {"stream": "maps", "others": [SECOND], **changes.pop("alignment", {})}
    return make(store=store.url, alignment=alignment, **changes)


def test_losses_are_sums_over_streams_of_other_depths_layers_heads_and_grids() -> None:
    torch.manual_seed(0)
    config = AlignmentConfig.model_validate(
        {
            "feature_weight": 0.5,
            "attention_weight": 0.25,
            "feature_depth": 3,
            "student_layers": [1, 2],
            "teacher_layers": [1, 2],
            "projector_width": 16,
            "others": [SECOND, {**SECOND, "stream": "third", "attention_weight": 0}],
        }
    )
    module = AlignedStudent(
        STUDENT,
        config,
        teacher_width=12,
        heads=3,
        others=[AlignedTeacher(10, 4), AlignedTeacher(8, 2, (2, 2))],
    )
    torch.nn.init.normal_(module.student.final_layer.linear.weight)
    x, t, y, v = (
        torch.randn(2, 4, 8, 8),
        torch.rand(2),
        torch.tensor([1, 2]),
        torch.randn(2, 4, 8, 8),
    )
    targets = [
        Targets(torch.randn(2, 16, 12), torch.softmax(torch.randn(2, 2, 3, 16, 16), -1)),
        Targets(torch.randn(2, 16, 10), torch.softmax(torch.randn(2, 2, 4, 16, 16), -1)),
        Targets(torch.randn(2, 4, 8), None),
    ]
    found = dict(zip(module.losses, module(x, t, y, v, *targets).tolist(), strict=True))

    def tokens(depth: int) -> torch.Tensor:
        features = module.student(x, t, y, Taps(feature_depth=depth)).features
        assert features is not None
        return features

    def logits(layers: tuple[int, ...], heads: int) -> torch.Tensor:
        made = module.student(x, t, y, Taps(attention_layers=layers, heads=heads)).attention_logits
        assert made is not None
        return made

    projectors = dict(module.projectors())
    coarse = tokens(2).transpose(1, 2).unflatten(2, (4, 4))
    coarse = torch.nn.functional.avg_pool2d(coarse, 2).flatten(2).transpose(1, 2)  # 4x4 -> 2x2
    features = [
        feature_loss(projectors[0](tokens(3)), targets[0].features),
        feature_loss(projectors[1](tokens(2)), targets[1].features),
        feature_loss(projectors[2](coarse), targets[2].features),
    ]
    attentions = [
        attention_loss(logits((1, 2), 3), targets[0].attention),
        attention_loss(logits((0, 2), 4), targets[1].attention),
    ]
    f = [value.sum().item() for value in features]
    a = [value.sum().item() for value in attentions]
    expected = {
        "feature": (0.5 * f[0] + 0.25 * f[1] + 0.25 * f[2]) / 1.0,
        "attention": (0.25 * a[0] + 0.125 * a[1]) / 0.375,
        "feature_0": f[0],
        "feature_second": f[1],
        "feature_third": f[2],
        "attention_0": a[0],
        "attention_second": a[1],
        "attention_third": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_resumed_run_is_bit_identical(
    run_config: Make, two_streams: Store, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = run(two(run_config, two_streams), whole)
    for stream in ("maps", "second"):
        assert summary["bytes_read"][stream]["before"] > 0
        assert summary["bytes_read"][stream]["after"] == 0
    for stop in (2, 4, 6):  # in both phases
        train_here(two(run_config, two_streams, steps=stop), parts)
    newest = latest_checkpoint(whole)
    assert newest is not None
    files = {path.stem for path in newest.glob("projector*.safetensors")}
    assert files == {"projector", "projector_ema", "projector_1", "projector_ema_1"}
    assert_same_weights(weights(parts), weights(whole))
    rows = [
        [(r["step"], r.get("feature"), r.get("feature_second"), r["grad_norm"]) for r in rows_of(f)]
        for f in (parts, whole)
    ]
    assert rows[0] == rows[1]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]


def test_metrics_hold_totals_and_each_streams_losses(
    run_config: Make, two_streams: Store, tmp_path: Path
) -> None:
    run(two(run_config, two_streams), tmp_path / "a")
    first, *_, last = rows_of(tmp_path / "a")
    mean = (0.5 * first["feature_maps"] + 0.25 * first["feature_second"]) / 0.75
    assert first["feature"] == pytest.approx(mean, rel=1e-5)
    mean = (0.5 * first["attention_maps"] + 0.125 * first["attention_second"]) / 0.625
    assert first["attention"] == pytest.approx(mean, rel=1e-5)
    assert not any(name.startswith(("feature", "attention")) for name in last)


def test_all_projectors_are_exported_in_order(
    run_config: Make, two_streams: Store, tmp_path: Path
) -> None:
    run(two(run_config, two_streams), tmp_path / "a")
    newest = latest_checkpoint(tmp_path / "a")
    assert newest is not None
    export_checkpoint(newest, tmp_path / "out.pt")
    parts = read_file(tmp_path / "out.pt", "model")
    kept = weights(tmp_path / "a")
    assert [len(p) for p in (parts.projector, *parts.others)] == [6, 6]
    for name, tensor in parts.projector.items():
        assert torch.equal(tensor, kept[f"projector.{name}"])
    assert parts.others[0]["2.weight"].shape == (20, 20)


def test_a_convolution_is_trained_resumed_and_exported(
    run_config: Make, two_streams: Store, tmp_path: Path
) -> None:
    irepa = {
        "projector": "conv",
        "projector_kernel": 3,
        "normalisation": "spatial",
        "normalisation_strength": 0.6,
    }
    config = two(run_config, two_streams, alignment=irepa)
    run(config, tmp_path / "whole")
    for stop in (2, 6):
        train_here(config.model_copy(update={"steps": stop}), tmp_path / "parts")
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    newest = latest_checkpoint(tmp_path / "whole")
    assert newest is not None
    export_checkpoint(newest, tmp_path / "out.pt")
    names = torch.load(tmp_path / "out.pt", weights_only=True)["ema"].keys()
    assert {"projectors.0.projection_layer.weight", "projectors.1.0.weight"} <= names
    parts = read_file(tmp_path / "out.pt", "model")
    assert parts.projector["weight"].shape == (12, 24, 3, 3)


def test_a_convolution_begins_as_pytorch_initialises_it() -> None:
    """Uniform within 1 / sqrt(fan in), bias included; the authors' code leaves it so."""
    config = AlignmentConfig(projector="conv", projector_kernel=3, attention_weight=0)
    module = AlignedStudent(STUDENT, config, teacher_width=64, heads=1)
    limit = (24 * 9) ** -0.5
    projector = dict(module.projectors())[0]
    for weight in projector.parameters():
        assert limit * 0.9 < weight.abs().max() <= limit
    plain = module.student.state_dict().keys()
    assert plain == SiT(STUDENT).state_dict().keys()


def test_one_stream_may_be_named_twice(
    run_config: Make, two_streams: Store, tmp_path: Path
) -> None:
    """Two depths of one teacher: its files are read once."""
    both = {"alignment": {"others": [{**SECOND, "stream": "maps", "attention_weight": 0}]}}
    summary = run(two(run_config, two_streams, **both), tmp_path / "a")
    single = run(run_config(store=two_streams.url, alignment={"stream": "maps"}), tmp_path / "b")
    assert summary["bytes_read"] == single["bytes_read"]
    assert {"feature_maps", "feature_maps.1"} <= rows_of(tmp_path / "a")[0].keys()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"others": [{**SECOND, "teacher_layers": [0, 2]}]},
            r"others\.0\.teacher_layers .*layer 0",
        ),
        (
            {"others": [{**SECOND, "stream": "third"}]},
            r"no teacher stream 'third', only maps, second",
        ),
        (
            {"others": [{**SECOND, "stream": None}]},
            r"alignment\.others\.0\.stream: .*choose one of maps, second",
        ),
    ],
)
def test_a_stream_that_the_store_cannot_serve_is_refused(
    run_config: Make, two_streams: Store, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        train_here(two(run_config, two_streams, alignment=changes), tmp_path / "a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"feature_weight": 0, "attention_weight": 0, "termination": None}, r"move one of others"),
        ({"others": [{"feature_weight": 0, "attention_weight": 0}]}, r"others\.0: both weights"),
        ({"others": [{"feature_depth": 5}]}, r"others\.0\.feature_depth 5 is beyond"),
        ({"others": [{**SECOND, "student_layers": [1, 9]}]}, r"others\.0\.student_layers.*block 9"),
        ({"others": [{**SECOND, "termination": None}]}, r"others\.0\.termination"),
    ],
)
def test_bad_options_are_refused(
    run_config: Make, two_streams: Store, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        two(run_config, two_streams, alignment=changes)


@pytest.mark.parametrize(
    ("others", "complaint"),
    [
        (
            [{**SECOND, "feature_weight": 0.5}],
            r"has 0\.25 for alignment\.others\.0\.feature",
        ),
        ([SECOND, SECOND], r"has 1 entries for alignment\.others, the config says 2 entries"),
        ([], r"has 1 entries for alignment\.others, the config says \(\)"),
    ],
)
def test_a_resumed_run_must_have_the_same_streams(
    run_config: Make,
    two_streams: Store,
    tmp_path: Path,
    others: list[dict[str, Any]],
    complaint: str,
) -> None:
    train_here(two(run_config, two_streams, steps=1), tmp_path / "a")
    config = two(run_config, two_streams, alignment={"others": others})
    with pytest.raises(UserError, match=complaint):
        run(config, tmp_path / "a", latest_checkpoint(tmp_path / "a"))


def test_one_stream_is_saved_as_before(run_config: Make) -> None:
    saved = run_config().model_dump(mode="json")["alignment"]
    assert list(saved) == [
        "feature_weight",
        "attention_weight",
        "feature_depth",
        "student_layers",
        "teacher_layers",
        "projector_width",
        "stream",
        "termination",
    ]


def options(*argv: str) -> RunConfig:
    return parse_options(RunConfig, list(argv), command="train", about="")


def test_further_streams_on_a_command_line() -> None:
    given = "[{stream: clip, feature_weight: 0.25, student_layers: 1-2, teacher_layers: '3,5'}]"
    (other,) = options("--alignment.others", given).alignment.others
    assert (other.stream, other.feature_weight) == ("clip", 0.25)
    assert (other.student_layers, other.teacher_layers) == ((1, 2), (3, 5))
    assert options("--alignment.others", "[]") == RunConfig()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("clip", r"others: expected a list of mappings such as \[\{stream: NAME"),
        ("none", r"others: expected a list of mappings"),
        ("[{steam: clip}]", r"unknown key 'alignment\.others\.0\.steam' \(did you mean 'stream'"),
        ("[{stream: Clip}]", r"others\.0\.stream: String should match"),
    ],
)
def test_bad_lists_of_streams_are_refused(given: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        options("--alignment.others", given)
    assert "\n" not in str(error.value)
