"""MM-DiT as a student family: its sizes, initialisations and text input."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipeline.models import MMDiT, Taps, make_student
from schemas.run import RunConfig
from schemas.student import StudentConfig

CONFIG = StudentConfig(model="MMDiT-3", latent_size=8, text_tokens=5, text_width=12)


def test_the_papers_model_has_its_sizes() -> None:
    paper = StudentConfig(model="MMDiT-24")
    assert paper.model == "MMDiT-24/2"
    assert (paper.size, paper.text_shape) == ((24, 768, 24, 2), (77, 768))
    with torch.device("meta"):
        count = sum(weight.numel() for weight in make_student(paper).parameters())
    assert count == 512_415_504 - 7_344_896  # recipes.md section 5: all, less the projector


def test_the_config_says_how_it_is_initialised() -> None:
    assert CONFIG.model_dump()["initialisation"] == "pytorch"
    assert "initialisation" not in StudentConfig().model_dump()
    zero = CONFIG.model_copy(update={"initialisation": "zero"})
    x, t, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 12)
    assert make_student(CONFIG)(x, t, text).prediction.abs().mean() > 0.01
    assert not make_student(zero)(x, t, text).prediction.any()


def test_pytorchs_initialisation_is_that_of_the_layers() -> None:
    torch.manual_seed(3)
    student = make_student(CONFIG)
    limit = CONFIG.size.width**-0.5  # Linear draws from U(-1/sqrt(n), 1/sqrt(n))
    weight = student.joint_blocks[0].x_block.adaLN_modulation[1].weight.detach()
    assert 0.95 * limit < weight.abs().max() <= limit
    assert weight.std() == pytest.approx(limit / 3**0.5, rel=0.02)


def test_the_third_input_is_the_text() -> None:
    torch.manual_seed(0)
    student = make_student(CONFIG)
    assert isinstance(student, MMDiT)
    x, t, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 12)
    taps = Taps(feature_depth=2, attention_layers=(1,), heads=2)
    out = student(x, t, text, taps)
    assert out.features.shape == (2, 16, 96)
    assert out.attention_logits.shape == (2, 1, 2, 16, 16)
    other = text.clone()
    other[1, 4] += 1
    changed = (student(x, t, other).prediction - out.prediction).abs().amax((1, 2, 3))
    assert changed[0] == 0
    assert changed[1] > 0


def test_the_null_caption_is_saved_with_the_weights() -> None:
    student = make_student(CONFIG)
    assert student.state_dict()["null_context"].shape == (5, 12)
    assert "null_context" not in dict(student.named_parameters())


@pytest.mark.parametrize("key", ["text_width", "text_tokens", "initialisation"])
def test_options_of_captions_are_refused_for_classes(key: str) -> None:
    value = "zero" if key == "initialisation" else 7
    with pytest.raises(ValidationError, match=f"{key} is for MMDiT, not for SiT-B/2"):
        StudentConfig.model_validate({"model": "SiT-B/2", key: value})


@pytest.mark.parametrize("model", ["MMDiT-0", "MMDiT-B/2", "MMDiT-24/3", "MMDiT", "MMDiT-100"])
def test_other_names_are_refused(model: str) -> None:
    with pytest.raises(ValidationError, match="model"):
        StudentConfig(model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": {"model": "MMDiT-3", "class_token": 8}}, "class_token is for SiT"),
        (
            {"student": {"model": "SiT-B/2"}, "diffusion": {"text_stream": "text"}},
            "read by an MMDiT",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"student": {"model": "MMDiT-3"}, **options})
