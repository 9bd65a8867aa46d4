"""Parts of the demo of captions: digits that are called by their names, and a check that pictures
follow their captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.pretrain.text_encoder import train_text_encoder
from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.student import load_trained_student
from pipeline.datasets.digits import digits_images, list_digits, read_digit
from pipeline.pretrain.options import CAPTIONS, NAMES, PROMPTS
from pipeline.sampling.generate import draw_images
from pipeline.sampling.prompts import PromptEmbedder, open_prompts
from pipeline.teachers import Teacher
from schemas.extract import PRESETS, TeacherConfig
from schemas.sample import SampleConfig

NEIGHBOURS = 10
SAMPLER = {"method": "ode", "steps": 30, "guidance": 2.0}


def write_source(folder: Path) -> None:
    """The digits as PNG files, and captions.jsonl with the captions of each."""
    folder.mkdir(parents=True)
    lines = []
    for item in list_digits().items:
        (folder / item.path).write_bytes(read_digit(item))
        captions = [caption.format(NAMES[item.label]) for caption in CAPTIONS]
        lines.append(json.dumps({"file": item.path, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


class DigitJudge:
    """Names of digits by the nearest neighbours among the real ones, of the teacher's class
    tokens."""

    def __init__(self) -> None:
        preset = PRESETS["demo"]
        self._teacher = Teacher(
            TeacherConfig.model_validate(preset["teacher"]), resolution=32, layers=()
        )
        images, labels = digits_images(32)
        self.labels = torch.from_numpy(labels)
        self.tokens = self._tokens(torch.from_numpy(images).permute(0, 3, 1, 2))

    def prototypes(self) -> Tensor:
        """Mean class token of each digit, (10, E)."""
        return torch.stack([self.tokens[self.labels == digit].mean(0) for digit in range(10)])

    def agreement(self, images_B3RR: Tensor, digits_B: Tensor) -> float:
        """Fraction of uint8 images whose neighbours are mostly the digit of their caption."""
        nearest = (self._tokens(images_B3RR) @ self.tokens.T).topk(NEIGHBOURS).indices
        votes = torch.nn.functional.one_hot(self.labels[nearest], 10).sum(1)
        return (votes.argmax(1) == digits_B).float().mean().item()

    @torch.inference_mode()
    def _tokens(self, images_B3RR: Tensor) -> Tensor:
        parts = (self._teacher(part).class_token for part in images_B3RR.split(256))
        return torch.nn.functional.normalize(torch.cat(list(parts)), dim=-1)


def prepare(folder: Path) -> dict[str, Any]:
    """Write the captioned digits and the text encoder below ``folder``; options of the extraction
    into its store. Raises ``UserError`` without Transformers."""
    write_source(folder / "source")
    train_text_encoder(DigitJudge().prototypes(), folder / "text_encoder")
    return {
        **PRESETS["demo"],
        "dataset": "folder",
        "source": str(folder / "source"),
        "captions": str(folder / "source" / "captions.jsonl"),
        "store": str(folder / "store"),
        "text": {"encoder": str(folder / "text_encoder")},
    }


def measure_agreement(run: Path, pictures: int = 100) -> tuple[float, int]:
    """Fraction of pictures of the run that are of their caption's digit, and their number."""
    values = {"checkpoint": str(run), "caption": PROMPTS, "sampler": SAMPLER}
    config = SampleConfig.model_validate(values)
    trained, prompts = load_trained_student(run), open_prompts(config)
    assert prompts is not None
    assert trained.text_encoder is not None
    context = PromptEmbedder(prompts, trained.text_encoder, config)(range(pictures))
    images = draw_images(
        trained.student, open_decoder(None, trained.encoder), context, config.sampler
    )
    return DigitJudge().agreement(images, torch.arange(pictures) % len(NAMES)), pictures
