"""Teachers whose attention cannot be read: features alone, small and with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pipeline.cli.options import parse_options
from pipeline.inspect.verify import verify_store
from pipeline.store import Store
from pipeline.targets.class_token import read_class_tokens
from pipeline.targets.sources import Wanted, read_targets
from pipeline.teachers import Teacher
from pipeline.teachers.manifest_check import create_meta_teacher
from pipeline.teachers.token_network import TokenNetwork
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig, TeacherConfig
from schemas.networks import TeacherInfo
from tests.conversions import SAMPLES, SHARD, encode, options

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4}


class Family(NamedTuple):
    model: str
    prefix: int
    class_token: bool
    args: dict[str, Any] = SMALL
    width: int = 48


FAMILIES = [
    Family("beit_base_patch16_224", 1, True),  # relative position bias, norm after the pooling
    Family("beitv2_base_patch16_224", 1, True),
    Family("samvit_base_patch16", 0, False, width=256),  # its neck's width, a map of features
    Family("naflexvit_base_patch16_gap", 4, False),  # registers alone
    Family("naflexvit_base_patch16_siglip", 0, False),
    Family("vit_relpos_base_patch16_224", 0, False),
    Family("vit_relpos_medium_patch16_cls_224", 1, True),
    Family("vit_srelpos_small_patch16_224", 0, False),
    Family("vit_small_patch16_18x2_224", 1, True),  # two attentions in a block
    Family("cait_s24_224", 1, True),
    Family("xcit_small_12_p16_224", 1, True),  # attention over channels
    Family("tnt_s_patch16_224", 1, True, {"depth": 2}, 384),
]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)


def config_of(family: Family) -> TeacherConfig:
    return TeacherConfig(model=family.model, weights="random", model_args=family.args)


def test_features_are_timms_tokens(family: Family, images: Tensor) -> None:
    teacher = Teacher(config_of(family), resolution=64, layers=())
    assert isinstance(teacher.vit, TokenNetwork)
    out = teacher(images)
    network = teacher.vit.network
    with torch.no_grad():
        tokens = network.forward_features(teacher.preprocess(images))
    if tokens.ndim == 4:
        tokens = torch.stack(
            [tokens[..., row, column] for row in range(4) for column in range(4)], 1
        )
    if isinstance(getattr(network, "norm", None), nn.Identity):
        tokens = network.fc_norm(tokens)
    torch.testing.assert_close(out.features, tokens[:, family.prefix :], rtol=1e-6, atol=1e-6)
    assert out.features.shape == (2, 16, family.width)
    assert teacher.has_class_token == family.class_token
    expected = tokens[:, 0] if family.class_token else tokens[:, family.prefix :].mean(1)
    torch.testing.assert_close(out.class_token, expected, rtol=1e-6, atol=1e-6)
    assert out.attention_logits.shape[1] == 0


def test_the_manifest_describes_the_network(family: Family) -> None:
    info = Teacher(config_of(family), resolution=64, layers=()).info()
    assert (info.grid, info.prefix, info.width) == ((4, 4), family.prefix, family.width)
    again = TeacherInfo.model_validate_json(info.model_dump_json())
    assert "layers" not in info.model_dump()
    create_meta_teacher(again, 64, "here")
    with pytest.raises(UserError, match=r"here.grid is"):
        create_meta_teacher(again.model_copy(update={"grid": (5, 5)}), 64, "here")


def test_layers_of_these_are_refused_with_the_way_out(family: Family) -> None:
    with pytest.raises(UserError, match="--layers none") as error:
        Teacher(config_of(family), resolution=64, layers=(0,))
    assert family.model in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model", ["swin_tiny_patch4_window7_224", "resnet18", "hiera_tiny_224", "pit_s_224"]
)
def test_networks_without_one_grid_of_tokens_are_refused(model: str) -> None:
    with pytest.raises(UserError, match="cannot be tapped"):
        Teacher(TeacherConfig(model=model, weights="random"), resolution=64, layers=())


def test_sizes_that_do_not_fit_are_refused() -> None:
    config = config_of(FAMILIES[0]).model_copy(update={"image_size": 20})
    with pytest.raises(UserError, match="20 is not a multiple of the teacher's patch size 16"):
        Teacher(config, resolution=64, layers=())


@pytest.mark.parametrize("cut", ["maps", "image"])
@pytest.mark.parametrize("model", ["beit_base_patch16_224", "vit_relpos_base_patch16_224"])
def test_a_store_of_features_alone(tmp_path: Path, model: str, cut: str) -> None:
    teacher = {"model": model, "weights": "random", "image_size": 16, "model_args": SMALL}
    config = options(tmp_path / "store", teacher=teacher, layers="none", cut=cut)
    store = Store.open(encode(config).url)
    stream = store.manifest.teacher_streams[cut]
    assert stream.teacher.layers == ()
    if cut == "maps":
        assert stream.columns.keys() == {"features", "class_token"}
    rows = torch.arange(SAMPLES).numpy()
    targets = read_targets(store, rows // SHARD, rows % SHARD, Wanted(True, (), 1))
    assert targets.attention is None
    assert targets.features is not None
    assert targets.features.shape == (SAMPLES, 16, 48)
    assert ("class" in store.manifest.streams) == ("beit" in model)
    if "beit" in model:
        tokens = read_class_tokens(store, rows // SHARD, rows % SHARD)
        assert tokens.std(0).mean() > 0.01
    assert verify_store(store).damaged == []


def test_none_is_a_word_of_the_command_line() -> None:
    for cut in ("maps", "image"):
        argv = ["--dataset", "imagenet", "--layers", "none", "--cut", cut]
        config = parse_options(
            ExtractConfig, argv, command="", about="", presets=PRESETS, preset_key="dataset"
        )
        assert config.layers == ()


def test_cuts_that_are_defined_by_layers_are_refused() -> None:
    for cut in ("activations", "qk"):
        with pytest.raises(ValueError, match=f"cut '{cut}' is defined by them; use --cut maps"):
            ExtractConfig.model_validate({"cut": cut, "layers": "none"})
