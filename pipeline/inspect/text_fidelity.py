"""`--fidelity` of captions: stored embeddings against a new forward pass of the text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.interpolant import denoising_loss, interpolate
from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.inspect.fidelity import spread
from pipeline.models import make_student
from pipeline.store import Store, StreamReader
from pipeline.store.captions import unpack_texts
from pipeline.store.codecs import decode_column
from pipeline.text_encoders import TextEncoder
from pipeline.text_encoders.recorded import recorded_config
from schemas.errors import UserError
from schemas.fields import TEXT
from schemas.networks import TextEncoderInfo
from schemas.streams import caption_column
from schemas.student import StudentConfig

BLOCKS = 4
CHUNK = 16


@dataclass(frozen=True)
class TextFidelity:
    """Stored embeddings of captions beside exact ones."""

    stream: str
    codec: str
    captions: int
    """The first caption of so many images."""
    cosine_min: float
    cosine_mean: float
    """Over tokens."""
    relative_error: float
    """Norm of the difference by the norm, over all numbers."""
    loss_relative_error: float
    """Relative error of the denoising loss of an MM-DiT with random weights."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"  captions       stream '{self.stream}' in {self.codec}: cosine mean "
            f"{self.cosine_mean:.6f}, min {self.cosine_min:.6f} over tokens; relative error "
            f"{self.relative_error:.2e}; denoising loss off by {self.loss_relative_error:.2e}"
        )


def measure_texts(store: Store, count: int) -> Iterator[TextFidelity | str]:
    """The captions of ``count`` images in each stream of embeddings, or a line that says why they
    cannot be compared; token ids are exact."""
    where = spread(store, count)[:2]
    for name, info in store.manifest.text_streams.items():
        if info.keeps == "embeddings":
            try:
                store.require_complete(name)
                yield measure_text(store, name, where)
            except UserError as error:
                yield f"  captions       stream '{name}' is not compared: {error}"


@torch.no_grad()
def measure_text(store: Store, stream: str, where: tuple[Any, Any]) -> TextFidelity:
    """Compare the first caption of the samples ``where``: shards and rows. Raises ``UserError``
    where the encoder is not at hand or not that of the store, or texts are unknown."""
    info = store.manifest.text_streams[stream]
    if TEXT not in info.columns:
        raise UserError("the store does not hold their texts")
    encoder = _open_encoder(info.encoder)
    name = caption_column(0)
    columns = StreamReader(store, stream, columns=[name, TEXT]).read(*where)
    texts = [unpack_texts(row)[0] for row in columns.pop(TEXT)]
    parts = {part: torch.from_numpy(array) for part, array in columns.items()}
    stored = decode_column(name, info.columns[name], parts).float()
    chunks = [texts[begin : begin + CHUNK] for begin in range(0, len(texts), CHUNK)]
    exact = torch.cat([encoder(chunk) for chunk in chunks])
    cosine = torch.cosine_similarity(exact.double(), stored.double(), dim=-1)
    one, other = _losses(store, where, exact, stored)
    return TextFidelity(
        stream,
        info.columns[name].codec,
        len(texts),
        cosine.min().item(),
        cosine.mean().item(),
        ((stored - exact).norm() / exact.norm()).item(),
        abs(other - one) / one,
    )


def _losses(store: Store, where: tuple[Any, Any], *contexts: Tensor) -> list[float]:
    """Mean denoising loss of a random student with each of the texts (B, T, E)."""
    channels, size, _ = store.manifest.autoencoder.latent_shape
    tokens, width = contexts[0].shape[1:]
    config = StudentConfig(
        model=f"MMDiT-{BLOCKS}/{1 + (size + 1) % 2}",
        latent_size=size,
        latent_channels=channels,
        text_tokens=tokens,
        text_width=width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = make_student(config)
        mean = torch.from_numpy(StreamReader(store, "latents").read(*where)["mean"]).float()
        latents = normalise(mean, normalisation_of(store.manifest.autoencoder))
        noise, t = torch.randn(latents.shape), torch.rand(len(latents))
    noisy, velocity = interpolate("linear", latents, noise, t)
    return [
        denoising_loss(student(noisy, t, context).prediction, velocity).mean().item()
        for context in contexts
    ]


def _open_encoder(info: TextEncoderInfo) -> TextEncoder:
    """The encoder of a stream. Raises ``UserError``."""
    if info.weights_sha256 is None:
        raise UserError("their encoder was not run here: the source holds the embeddings")
    encoder = TextEncoder(recorded_config(info))
    if encoder.weights_sha256 != info.weights_sha256:
        raise UserError(f"the weights '{info.weights}' are not those that made them")
    return encoder
