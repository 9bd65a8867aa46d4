"""Images that all workers of a run draw together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from pipeline.autoencoders import open_decoder
from pipeline.models import SiT
from pipeline.sampling.blocks import plan_blocks
from pipeline.sampling.draw import check_sampler, draw_images
from pipeline.sampling.precision import choose_arithmetic
from pipeline.train.parallel import Parallel
from schemas.run import RunConfig
from schemas.store import Manifest


class SharedDrawing:
    """The images are the same whatever the number of workers, as each takes whole batches of a
    fixed division."""

    def __init__(self, config: RunConfig, manifest: Manifest, parallel: Parallel) -> None:
        """Raises ``UserError`` where the sampler is not for the student, or the autoencoder cannot
        be loaded."""
        self.options = config.samples
        self.path = config.diffusion.path
        self.parallel = parallel
        check_sampler(config.student, self.options.sampler, option="--samples.sampler.method")
        self.autoencoder = open_decoder(
            self.options.autoencoder, manifest.autoencoder, option="--samples.autoencoder"
        )
        self.precision = choose_arithmetic("auto", parallel.device.type)
        self.resolution = manifest.resolution
        self.num_classes = manifest.dataset.num_classes

    @contextmanager
    def autoencoder_at_hand(self) -> Iterator[None]:
        """On the device; afterwards its memory is the training's again."""
        self.autoencoder.to(self.parallel.device)
        try:
            yield
        finally:
            self.autoencoder.to("cpu")

    def mine(self, count: int) -> list[range]:
        """The batches of ``count`` images that this worker draws, by number."""
        blocks = plan_blocks(count, self.options.batch_size)
        mine = blocks[self.parallel.rank :: self.parallel.world_size]
        return [range(block.first, block.first + block.count) for block in mine]

    def draw(self, student: SiT, labels: Sequence[int], numbers: range) -> Tensor:
        """uint8 (B, 3, R, R) on the CPU: the images with these numbers; ``labels`` are of all."""
        return draw_images(
            student,
            self.autoencoder,
            [labels[number] for number in numbers],
            self.options.sampler,
            path=self.path,
            first_index=numbers.start,
            precision=self.precision,
        )
