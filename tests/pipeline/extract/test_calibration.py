"""Codec steps that are chosen by measuring: the coarsest that keep the promise, decided once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.cli.config_files import merge
from pipeline.cli.options import parse_options
from pipeline.convert import convert
from pipeline.convert.streams import plan_streams
from pipeline.cost_estimate.estimate import _calibration_notes
from pipeline.datasets import Listing, list_images
from pipeline.distributed.log_relay import progress_logger
from pipeline.extract.calibration import MARGIN, next_levels
from pipeline.extract.compatibility import check_request
from pipeline.extract.encoder import Encoder
from pipeline.extract.encoder_pool import EncoderPool
from pipeline.extract.target_store import missing_tasks, open_store
from pipeline.extract.tasks import calibration_items
from pipeline.inspect.__main__ import main as inspect
from pipeline.inspect.suggest_extraction import _codecs
from pipeline.store import Store
from pipeline.store.codecs import decode_column, encode_column
from schemas.calibration import Calibration
from schemas.codecs import CodecOptions
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.streams import Column

SAMPLES, IMAGES = 24, 8


def options(folder: Path | str, codec: object = "faithful", **more: Any) -> ExtractConfig:
    values: dict[str, Any] = {"dataset": "demo", "store": str(folder), "shard_size": 12}
    chosen = {"calibration": IMAGES, **({"name": codec} if isinstance(codec, str) else codec)}  # type: ignore[dict-item]
    return ExtractConfig.model_validate(
        merge({**PRESETS["demo"], **values, "batch_size": 6}, {"codec": chosen, **more})
    )


def digits(config: ExtractConfig) -> Listing:
    everything = list_images(config)
    return Listing(everything.items[:SAMPLES], everything.num_classes)


def make(config: ExtractConfig, encoder: Encoder | None = None) -> Store:
    encoder = encoder or Encoder(config, device="cpu", threads=1)
    existing = Store.open(str(config.store)) if Store.exists(str(config.store)) else None
    store = open_store(config, digits(config), existing, encoder)
    for task in missing_tasks(config, digits(config), store):
        encoder.encode_shard(store.url, store.manifest, task)
    store.finish()
    return store


def calibration_of(store: Store, name: str | None = None) -> Calibration:
    found = store.manifest.teacher_stream(name)[1].calibration
    assert found is not None
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Store]:
    made: dict[str, Store] = {}
    root = tmp_path_factory.mktemp("calibrated")

    def get(cut: str) -> Store:
        if cut not in made:
            made[cut] = make(options(root / cut, cut=cut))
        return made[cut]

    return get


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("answer", [1, 2, 17, 23, 24, 400, 999])
def test_the_search_finds_the_coarsest_levels(exponent: float, answer: int) -> None:
    """Errors may also fall by another power than the expected square."""
    shares: dict[int, float] = {}
    while (levels := next_levels(shares, 23, 999)) is not None:
        assert levels not in shares
        shares[levels] = (1 - MARGIN) * (answer / levels) ** exponent
    assert min(n for n, share in shares.items() if share <= 1 - MARGIN) == answer
    assert answer == 1 or answer - 1 in shares
    assert len(shares) < 16


@pytest.mark.parametrize("share", [1.0, 5.0, math.inf])
def test_a_search_ends_where_no_step_keeps_the_promise(share: float) -> None:
    shares: dict[int, float] = {}
    while (levels := next_levels(shares, 23, 999)) is not None:
        shares[levels] = share
    assert max(shares) == 999
    assert len(shares) < 20


def upper(errors: np.ndarray) -> float:
    return float(errors.mean() + 2 * errors.std(ddof=1) / math.sqrt(len(errors)))


def divergence(p: Tensor, q: Tensor) -> np.ndarray:
    """Mean KL of rows, by image and layer."""
    p, q = p.double(), q.double()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean((-2, -1)).numpy()


def teacher_values(config: ExtractConfig, keys: tuple[str, ...]) -> tuple[Any, dict[str, Tensor]]:
    """The teacher and, for these images, its tokens entering layer 2 and its targets."""
    encoder = Encoder(config, device="cpu", threads=1)
    items = {item.key: item for item in list_images(config).items}
    crops = np.stack([encoder._crop(items[key]) for key in keys])
    with torch.no_grad():
        teacher = encoder.teacher
        tokens, _ = teacher.run_blocks(
            teacher.embed(teacher.preprocess(torch.from_numpy(crops).permute(0, 3, 1, 2))), 0, 2
        )
        targets = teacher.finish(*teacher.run_blocks(tokens, 2))
    return teacher, {"tokens": tokens, **targets._asdict()}


def test_steps_of_maps_are_the_coarsest_by_layer(stores: Callable[[str], Store]) -> None:
    """By the formulas of the codecs, written out again."""
    store = stores("maps")
    found = calibration_of(store)
    assert (found.images, len(set(found.keys)), found.margin) == (IMAGES, IMAGES, 0.05)
    _, values = teacher_values(options(store.url), found.keys)
    probabilities = torch.softmax(values["attention_logits"], -1)
    columns = store.manifest.teacher_stream()[1].columns

    def share_of_maps(row: int, levels: int) -> float:
        root = probabilities[:, row].sqrt()
        scale = (255 / root.amax(-1, keepdim=True)).clamp(max=levels)
        code = (root * scale).round().clamp(min=0.3).square()
        kl = divergence(
            probabilities[:, row : row + 1], (code / code.sum(-1, keepdim=True))[:, None]
        )
        return upper(kl[:, 0]) / 2e-4

    attention = [curve for curve in found.curves if curve.columns == ("attention",)]
    assert [curve.layer for curve in attention] == [2, 3, 4, 5]
    levels = columns["attention"].levels or (int(columns["attention"].codec[4:]),) * 4
    assert [curve.codec for curve in attention] == [f"sqrt{n}" for n in levels]
    for row, chosen in enumerate(levels):
        assert share_of_maps(row, chosen) <= 0.95 < share_of_maps(row, chosen - 1)

    def share_of_features(levels: int) -> float:
        x = values["features"].double()
        centre = x.median(1, keepdim=True).values.half()
        rms = x.square().mean(-1, keepdim=True).sqrt()
        step = (rms / levels).float()
        decoded = centre.float() + ((x - centre) / step).round() * step
        cosine = torch.cosine_similarity(x, decoded, dim=-1)
        return upper((1 - cosine).mean(-1).numpy()) / 1e-4

    chosen = int(columns["features"].codec.removeprefix("rms"))
    assert share_of_features(chosen) <= 0.95 < share_of_features(chosen - 1)
    assert columns["class_token"].codec == "float16"


@pytest.mark.parametrize("codec", ["faithful", "small"])
def test_the_step_of_activations_is_the_coarsest(codec: str, tmp_path: Path) -> None:
    config = options(tmp_path / "store", codec, cut="activations")
    found = calibration_of(make(config))
    teacher, values = teacher_values(config, found.keys)
    exact = torch.softmax(values["attention_logits"], -1)
    bound = {"faithful": (2e-4, 1e-4), "small": (1e-3, 1e-3)}[codec]

    def share(levels: int) -> float:
        column = Column(shape=tuple(values["tokens"].shape[1:]), codec=f"tokens{levels}")
        decoded = decode_column("tokens", column, encode_column("tokens", column, values["tokens"]))
        with torch.no_grad():
            targets = teacher.finish(*teacher.run_blocks(decoded, 2))
        kl = divergence(exact, torch.softmax(targets.attention_logits, -1)).mean(1)
        cosine = torch.cosine_similarity(targets.features, values["features"], dim=-1).double()
        return max(upper(kl) / bound[0], upper((1 - cosine.mean(-1)).numpy()) / bound[1])

    (curve,) = found.curves
    chosen = int(curve.codec.strip("abcdefghijklmnopqrstuvwxyz"))
    assert share(chosen) <= 0.95 < share(chosen - 1)
    points = {point.codec: point for point in curve.points}
    assert points[curve.codec].share == pytest.approx(share(chosen), rel=0.02)
    assert points[curve.codec].kl == found.errors.kl
    assert found.errors.gradient_cosine > 0.9999 if codec == "faithful" else 0.999


def test_layers_with_levels_of_their_own_are_stored_and_read(
    stores: Callable[[str], Store],
) -> None:
    column = stores("qk").manifest.teacher_stream()[1].columns["query"]
    x = torch.randn(2, *column.shape, generator=torch.Generator().manual_seed(0))
    mixed = Column(shape=column.shape, codec="heads30", levels=(10, 30, 5, 20))
    stored = encode_column("query", mixed, x)
    torch.testing.assert_close(
        stored["query.step"],
        x.square().mean((-2, -1)).sqrt() / torch.tensor([10, 30, 5, 20]).view(1, 4, 1),
    )
    plain = Column(shape=column.shape, codec="heads30")  # how readers of earlier versions see it
    assert torch.equal(decode_column("query", mixed, stored), decode_column("query", plain, stored))
    error = (decode_column("query", mixed, stored) - x).square().mean((0, 2, 3, 4)).sqrt()
    torch.testing.assert_close(
        error, torch.tensor([1 / 10, 1 / 30, 1 / 5, 1 / 20]) / 12**0.5, rtol=0.05, atol=0
    )


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (
            {"codec": "tokens9", "shape": (4, 2, 3, 5), "levels": (9, 9, 9, 9)},
            "no levels of single",
        ),
        (
            {"codec": "heads9", "shape": (4, 5), "levels": (9, 9, 9, 9)},
            "no levels of single layers",
        ),
        ({"codec": "heads9", "shape": (4, 2, 3, 5), "levels": (9, 9)}, "2 levels for 4 layers"),
        (
            {"codec": "heads9", "shape": (2, 2, 3, 5), "levels": (9, 10)},
            "more levels than its codec",
        ),
        ({"codec": "heads9", "shape": (1, 2, 3, 5), "levels": (0,)}, "greater than or equal to 1"),
    ],
)
def test_levels_that_do_not_fit_their_column_are_refused(column: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Column.model_validate(column)


def no_calibration(*_: object, **__: object) -> Calibration:
    raise AssertionError("a second calibration")


def test_a_resumed_extraction_takes_the_steps_of_the_manifest(
    stores: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("qk")
    config = options(store.url, cut="qk")
    before = Path(store.root, "qk", "shard-000001.tar").read_bytes()
    Path(store.root, "commits", "shard-000001.json").unlink()
    monkeypatch.setattr("pipeline.extract.encoder.calibrate", no_calibration)
    again = make(config)
    assert again.manifest == store.manifest
    assert Path(store.root, "qk", "shard-000001.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("codec", "reason"),
    [
        ({"kl": 1e-4}, r"codec\.kl 0\.0002, this extraction has 0\.0001"),
        ({"feature_cosine": 0.99}, r"codec\.feature_cosine 0\.9999, this extraction has 0\.99"),
        ({"name": "small"}, "codec faithful, this extraction has small"),
        ({"name": "float16"}, r"codec of features rms\d+, this extraction has float16"),
        ({"calibration": 0}, r"codec of features rms\d+, this extraction has rms26"),
        ({"calibration": 5}, r"codec\.calibration, in images, 8, this extraction has 5"),
        ({"seed": 1}, r"codec\.seed 0, this extraction has 1"),
    ],
)
def test_another_promise_than_that_of_the_store_is_refused(
    stores: Callable[[str], Store], codec: dict[str, Any], reason: str
) -> None:
    store = stores("maps")
    config = options(store.url, codec)
    with pytest.raises(UserError, match=f"was made with {reason}"):
        check_request(config, digits(config), store)


def test_fixed_steps_leave_no_trace_and_are_resumed_by_the_default(tmp_path: Path) -> None:
    fixed = options(tmp_path / "store", {"calibration": 0}, cut="activations")
    store = make(fixed)
    text = Path(store.root, "manifest.json").read_text()
    assert "calibration" not in text
    assert "levels" not in text
    assert store.manifest.teacher_stream()[1].columns["tokens"].codec == "rice23"
    check_request(options(store.url, cut="activations"), digits(fixed), store)
    with pytest.raises(
        UserError, match=r"codec\.kl none \(fixed steps\), this extraction has 0.01"
    ):
        check_request(options(store.url, {"kl": 0.01}, cut="activations"), digits(fixed), store)


def test_a_codec_by_name_is_not_calibrated(tmp_path: Path) -> None:
    named = options(tmp_path / "a", cut="activations", column_codecs={"tokens": "tokens28"})
    stream = make(named).manifest.teacher_stream()[1]
    assert (stream.columns["tokens"].codec, stream.calibration) == ("tokens28", None)
    partly = options(tmp_path / "b", cut="qk", column_codecs={"query": "float16"})
    store = make(partly)
    stream = store.manifest.teacher_stream()[1]
    assert (stream.columns["query"].codec, stream.columns["query"].levels) == ("float16", ())
    assert calibration_of(store).columns == {"features", "key"}
    check_request(partly, digits(partly), store)
    for codec in ("float16", "heads28"):  # the second is that of the set, and would be measured
        query = Column(shape=stream.columns["query"].shape, codec=codec)
        changed = {"columns": {**stream.columns, "query": query}}
        suggested = list(_codecs(stream.model_copy(update=changed), 32))
        assert suggested == ["--column-codecs.query", codec]


def test_crops_and_features_alone(tmp_path: Path) -> None:
    assert (
        make(options(tmp_path / "a", cut="image")).manifest.teacher_stream()[1].calibration is None
    )
    found = calibration_of(make(options(tmp_path / "b", layers=())))
    assert [curve.columns for curve in found.curves] == [("features",)]
    assert found.errors.kl is None


def test_an_added_stream_of_the_same_tensors_has_their_steps(
    stores: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = options(tmp_path / "store", cut="activations")
    first = calibration_of(make(base))
    added = options(base.store or "", cut="activations", add_stream="second", class_token="none")
    monkeypatch.setattr("pipeline.extract.encoder.calibrate", no_calibration)
    assert calibration_of(make(added), "second") == first
    other = options(base.store or "", cut="activations", add_stream="third", layers=(3,))
    with pytest.raises(AssertionError, match="a second calibration"):
        make(other)


def test_images_of_a_calibration_are_seeded_and_at_most_half(tmp_path: Path) -> None:
    config = options(tmp_path)
    listing = digits(config)
    one = [item.key for item in calibration_items(config, listing)]
    assert one == [item.key for item in calibration_items(config, listing)]
    assert len(set(one)) == 2 * IMAGES
    other = options(tmp_path, {"seed": 1})
    assert one != [item.key for item in calibration_items(other, listing)]
    assert [CodecOptions(calibration=256).images(n) for n in (1, 2, 5, 511, 10**6)] == [
        1,
        1,
        2,
        255,
        256,
    ]


def test_progress_of_a_calibration_is_reported_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(tmp_path)
    encoder = Encoder(config, device="cpu", threads=1)
    reports: list[int] = []
    shape = encoder.describe().autoencoder.latent_shape  # type: ignore[union-attr]
    found = encoder.calibrate(digits(config).items, IMAGES, shape, reports.append)
    assert reports[:3] == [6, 8, 16]  # the teacher's batches of 6, and one chunk of the first pass
    steps = {after - before for before, after in pairwise([0, *reports])}
    assert max(steps) <= IMAGES
    points = max(len(curve.points) for curve in found.curves)
    assert len(reports) >= 2 + 1 + points + 1

    pool = object.__new__(EncoderPool)

    def call_one(call: Any, **_: str) -> str:
        for done in (IMAGES, 3, 11 * IMAGES):  # an actor that died has begun again
            progress_logger.info("", extra={"task": 0, "done": done})
        return "found"

    monkeypatch.setattr(pool, "call_one", call_one)
    assert pool.calibrate([], IMAGES, shape) == "found"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"measure codec steps: 0/{7 * IMAGES} images (0%)"
    assert lines[-1].startswith(f"measure codec steps: {11 * IMAGES}/{11 * IMAGES} images (100%)")


def broken(encoder: Encoder, value: float) -> Encoder:
    """With a last norm that gives ``value`` alone."""
    encoder.teacher.vit.norm.weight.fill_(0.0)
    encoder.teacher.vit.norm.bias.fill_(value)
    return encoder


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "image 'digit-.*': the teacher's features holds NaN or an infinity"),
        (0.0, "the teacher's features is the same for every token of 8 images"),
        (1.5, "the teacher's features is the same for every token of 8 images"),
    ],
)
def test_a_teacher_that_gives_nothing_to_measure_is_refused(
    tmp_path: Path, value: float, reason: str
) -> None:
    config = options(tmp_path / "store")
    with pytest.raises(UserError, match=reason) as error:
        make(config, broken(Encoder(config, device="cpu", threads=1), value))
    assert "\n" not in str(error.value)
    assert not Store.exists(str(config.store))


def test_a_promise_that_no_step_keeps_is_refused(tmp_path: Path) -> None:
    config = options(tmp_path / "store", {"kl": 1e-9}, cut="activations")
    with pytest.raises(
        UserError, match=r"no step of tokens keeps KL 1e-09 .* --codec\.kl"
    ) as error:
        make(config)
    assert "rice999" in str(error.value)


def test_gradients_may_need_finer_steps(tmp_path: Path) -> None:
    bound = 1 - 1e-6
    codec = {"name": "small", "gradient_cosine": bound}
    found = calibration_of(make(options(tmp_path / "store", codec, cut="activations")))
    (curve,) = found.curves
    coarser = [point for point in curve.points if point.share <= 1 - MARGIN]
    assert len(coarser) > 1  # steps that keep the other bounds alone
    assert curve.codec == curve.points[-1].codec
    assert found.errors.gradient_cosine >= bound


def test_maps_that_roots_cannot_hold_get_cbrt8(tmp_path: Path) -> None:
    """A finer codec of 8 bits, for all layers."""
    store = make(options(tmp_path / "store", {"kl": 2.2e-5}))
    curves = [curve for curve in calibration_of(store).curves if curve.layer is not None]
    assert {curve.codec for curve in curves} == {"cbrt8"}
    assert store.manifest.teacher_stream()[1].columns["attention"].codec == "cbrt8"
    assert calibration_of(store).errors.kl < 2.2e-5 * 0.95


def test_fidelity_checks_the_promise_on_other_images(
    stores: Callable[[str], Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = stores("activations")
    assert inspect([store.url, "--fidelity", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == SAMPLES - IMAGES
    promise = found["promise"]
    assert (promise["kept"], promise["other_images"], promise["kl"]) == (True, True, 2e-4)
    assert promise["errors"]["kl"] == pytest.approx(found["attention_kl_mean"])
    assert inspect([store.url, "--fidelity", "6"]) == 0
    assert "promise        kept on 6 other images: KL " in capsys.readouterr().out
    path = Path(store.root, "manifest.json")
    text = path.read_text()
    values = json.loads(text)
    values["streams"]["activations"]["calibration"]["promise"]["kl"] = 1e-5
    path.write_text(json.dumps(values))
    try:
        assert inspect([store.url, "--fidelity", "6"]) == 1
    finally:
        path.write_text(text)
    assert "promise        NOT KEPT on 6 other images: KL " in capsys.readouterr().out


def test_a_conversion_keeps_the_steps(stores: Callable[[str], Store], tmp_path: Path) -> None:
    store = stores("qk")
    before = store.manifest.teacher_stream()[1]

    def converted(name: str, **more: Any) -> Any:
        config = ConvertConfig(source=store.url, target=str(tmp_path / name), workers=1, **more)
        return convert(config).store.manifest.teacher_stream()[1]

    for name, codec in (("a", None), ("b", "faithful")):
        same = converted(name, codec=codec, format="zarr")
        assert (same.columns, same.calibration) == (before.columns, before.calibration)
    fewer = converted("c", layers=(3, 5))
    assert fewer.columns["query"].codec == before.columns["query"].codec
    if before.columns["query"].levels:
        assert fewer.columns["query"].levels == before.columns["query"].levels[1::2]
    assert [c.layer for c in fewer.calibration.curves] == [None, 3, 5]
    maps = converted("d", cut="maps")
    assert (maps.calibration, maps.columns["attention"].codec) == (None, "cbrt8")
    small = converted("e", codec="small")
    assert (small.calibration, small.columns["query"].levels) == (None, ())


def test_a_layer_is_not_stored_finer_than_it_is_kept(
    stores: Callable[[str], Store], tmp_path: Path
) -> None:
    """Not even where the finest layer of its column is: the largest levels name the codec."""
    store = stores("qk")
    name, stream = store.manifest.teacher_stream()
    query = stream.columns["query"].model_copy(
        update={"codec": "heads30", "levels": (10, 30, 5, 20)}
    )
    stream = stream.model_copy(update={"columns": {**stream.columns, "query": query}})
    streams = {**store.manifest.streams, name: stream}
    store = Store(store.url, store.manifest.model_copy(update={"streams": streams}))

    def plan(codec: str, **more: Any) -> Any:
        columns = {"query": codec}
        config = ConvertConfig(
            source=store.url, column_codecs=columns, target=str(tmp_path / "target"), **more
        )
        (found,) = (plan for plan in plan_streams(config, store) if plan.source == name)
        return found.after.columns["query"]

    assert plan("heads5").levels == ()
    assert plan("heads30").levels == (10, 30, 5, 20)
    assert plan("heads10", layers=(2, 3, 5)).levels == ()
    for codec, layers in (("heads6", (2, 3, 4, 5)), ("heads11", (2, 3)), ("heads29", (3, 4))):
        with pytest.raises(UserError, match=r"keeps its query in heads(5|10) in a layer; heads"):
            plan(codec, layers=layers)


def parsed(*argv: str) -> CodecOptions:
    config = parse_options(
        ExtractConfig, list(argv), command="x", about="y", presets=PRESETS, preset_key="dataset"
    )
    return config.codec


def test_options_of_the_codec(tmp_path: Path) -> None:
    assert parsed() == CodecOptions()
    chosen = parsed("--codec", "small", "--codec.kl", "5e-4", "--codec.calibration", "32")
    assert chosen == CodecOptions(name="small", kl=5e-4, calibration=32)
    assert chosen.promise is not None
    assert (chosen.promise.kl, chosen.promise.feature_cosine) == (5e-4, 0.999)
    file = tmp_path / "options.yaml"
    file.write_text("codec: small\n")
    assert parsed("--config", str(file), "--codec.kl", "5e-4").name == "small"
    assert parsed("--config", str(file), "--codec", "int8").name == "int8"
    file.write_text("codec: {name: small, kl: 5e-4}\n")
    assert parsed("--config", str(file)).kl == 5e-4
    assert parsed("--dataset", "demo").calibration == 64
    assert parsed("--codec.calibration", "0").promise is None
    assert parsed("--codec", "float16").promise is None


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--codec", "smal"), "codec.name: Input should be 'faithful', 'small'"),
        (("--codec", "int8", "--codec.kl", "1e-3"), "kl is a target of 'faithful' and 'small'"),
        (("--codec.kl", "1e-3", "--codec.calibration", "0"), "kl needs a calibration"),
        (("--codec.kl", "0"), "codec.kl: Input should be greater than 0"),
        (("--codec.feature-cosine", "1"), "codec.feature_cosine: Input should be less than 1"),
        (("--codec.calibration", "-1"), "greater than or equal to 0"),
        (("--codec.fidelity", "1"), "unknown option --codec.fidelity"),
    ],
)
def test_options_that_contradict_each_other_are_refused(argv: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


def test_a_plan_tells_the_calibration_and_its_time() -> None:
    """0.5 GFLOP for all blocks and 7 passes, with and without codec, of 0.1 GFLOP, 256 times."""
    flops: Any = SimpleNamespace(training={"image": 5 * 10**8, "activations": 10**8})
    device: Any = SimpleNamespace(rates=SimpleNamespace(teacher=10**9))

    def notes(config: ExtractConfig, images: int = 10**6) -> list[str]:
        return list(_calibration_notes(config, images, flops, device))

    (note,) = notes(ExtractConfig(cut="activations"))
    assert "steps of codec 'faithful' are chosen before the extraction, on 256 images" in note
    assert f"about {256 * 1.9 / 60:.3g} min on one device" in note
    assert "on 10 images" in notes(ExtractConfig(), 20)[0]
    for other in (
        {"cut": "image"},
        {"codec": "int8"},
        {"codec": {"calibration": 0}},
        {"cut": "activations", "column_codecs": {"tokens": "tokens23"}},
    ):
        assert notes(ExtractConfig.model_validate(other)) == []
