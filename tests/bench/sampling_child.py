"""Times of one sampler with a student of no cost; runs in any checkout since e20d803, as a file.

``python sampling_child.py BATCH STEPS`` prints one JSON object.
"""

import json
import resource
import sys
import time
from types import SimpleNamespace

import torch
from torch import nn

try:
    from pipeline.diffusion.samplers import sample
    from pipeline.sampling.generate import draw_latents
    from schemas.diffusion import Convention, SamplerConfig
except ImportError:  # e20d803
    from pipeline.sampling.draw import draw_latents

    from pipeline.diffusion.samplers import sample
    from schemas.diffusion import SamplerConfig

    Convention = None

REPEATS = 7


class Student(nn.Module):
    """Predicts zeros, which were made before."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        shape = (4, 32, 32)
        self.config = SimpleNamespace(
            family="SiT", model="SiT-XL/2", latent_shape=shape, class_token=None, num_classes=1000
        )
        self.null_label = 1000
        self.convention = Convention and Convention()
        self.zeros = torch.zeros(batch, *shape)

    def forward(self, x, t, y, class_token_BE=None):
        return SimpleNamespace(prediction=self.zeros, class_prediction=None)


def timed(call):
    wall, caller = time.perf_counter(), time.thread_time()
    result = call()
    return result, time.perf_counter() - wall, time.thread_time() - caller


def main(batch: int, steps: int) -> None:
    torch.set_num_threads(1)
    config = SamplerConfig(method="sde", steps=steps, guidance=1)
    student, labels = Student(batch), [1] * batch
    noise = torch.randn(batch, 4, 32, 32)

    def bare() -> torch.Tensor:
        """The steps' own arithmetic, which a GPU does, on ready noise."""
        return sample(
            lambda x, t, y: student.zeros,
            noise,
            torch.tensor(labels),
            config,
            null_label=1000,
            step_noise=lambda _: noise,
        )

    draw_latents(student, labels, config)  # warms up
    bare()
    bare_wall = bare_caller = wall = caller = float("inf")
    for _ in range(REPEATS):  # the least of each, because their difference is small
        _, one_wall, one_caller = timed(bare)
        bare_wall, bare_caller = min(bare_wall, one_wall), min(bare_caller, one_caller)
        drawn, one_wall, one_caller = timed(lambda: draw_latents(student, labels, config))
        wall, caller = min(wall, one_wall), min(caller, one_caller)
    print(
        json.dumps(
            {
                "caller_ms": (caller - bare_caller) / steps * 1e3,
                "wall_ms": (wall - bare_wall) / steps * 1e3,
                "bare_ms": bare_wall / steps * 1e3,
                "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "sum": drawn.double().sum().item(),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
