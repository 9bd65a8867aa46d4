"""Checks of a machine with a GPU against its CPU, in order of worth. On a CPU each of them compares
the CPU with itself, so that the script is rehearsed and all differences are 0."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.selection import checkpoint_name
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import make_student
from pipeline.sampling.generate import draw_latents
from pipeline.store import Store, StreamReader
from pipeline.train.loop import train
from schemas.diffusion import SamplerConfig
from schemas.student import StudentConfig
from tests.encoded import SAMPLES, encode
from tests.gpu.steps import RUN, open_steps, run_config

CPU = torch.device("cpu")
CUTS = ("maps", "qk", "activations", "image")
FLOAT32 = {"precision": "float32", "steps": 8}


class Check(NamedTuple):
    """``run(device)`` returns what it found, by name; a name of ``limits`` must not exceed its
    value."""

    run: Callable[[torch.device], dict[str, Any]]
    limits: dict[str, float]
    gpu_only: bool = False


@cache
def store(cut: str) -> Store:
    return encode(Path(tempfile.mkdtemp(prefix="haste-gpu-")) / "store", cut=cut)


def steps(cut: str, device: torch.device, changes: dict[str, Any], *, strict: bool = False) -> Any:
    """Results of three steps of Phase I and two of Phase II, (5, 5). ``strict``: torch raises where
    a later step of a phase waits for the GPU."""
    with open_steps(store(cut), device, changes) as run:
        results = [run.take(1)]
        with no_waits(strict):
            results.append(run.take(2))
        run.terminate()
        results.append(run.take(1))
        with no_waits(strict):
            results.append(run.take(1))
        return torch.cat(results).double().cpu()


@contextmanager
def no_waits(strict: bool) -> Any:
    if strict:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode("default")


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to that of ``expected``."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"cpus": os.cpu_count()}
    if device.type == "cuda":
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        data = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        near, other = data[: 256 << 20], torch.empty_like(data)
        found["TFLOP/s, bfloat16"] = 2 * 8192**3 / 1e12 / seconds(lambda: x @ x)
        found["TB/s, copy on the GPU"] = 2 * (1 << 30) / 1e12 / seconds(lambda: other.copy_(data))
        copy = seconds(lambda: near.copy_(host, non_blocking=True))
        found["GB/s, from pinned memory"] = (256 << 20) / 1e9 / copy
        heads = torch.randn(3, 32, 16, 256, 72, device=device, dtype=torch.bfloat16)
        found["attention kernel (1: flash)"] = int(torch._fused_sdp_choice(*heads))
    return found


def seconds(call: Callable[[], object], count: int = 10) -> float:
    """Mean wall time of a call on a GPU."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def float32_steps(device: torch.device) -> dict[str, Any]:
    return {cut: difference(steps(cut, device, FLOAT32), steps(cut, CPU, FLOAT32)) for cut in CUTS}


def fast_steps(device: torch.device) -> dict[str, Any]:
    """Compiled, in float32 and bfloat16; on a CPU as in ``float32_steps``."""
    gpu = device.type == "cuda"
    expected = steps("maps", CPU, FLOAT32)
    found = {}
    for precision in ("float32", "bfloat16"):
        fast = {"precision": precision if gpu else "float32"}
        compiled = {"compute": {"compile": "on" if gpu else "off"}}
        result = steps("maps", device, {**FLOAT32, **fast, **compiled})
        # the last column is the gradient's norm, whose rounding is larger
        found[precision] = difference(result[:, :4], expected[:, :4])
    return found


def steps_do_not_wait(device: torch.device) -> dict[str, Any]:
    strict = device.type == "cuda"
    for cut in ("maps", "activations"):
        micro = {"steps": 8, "workers": {"micro_batch": 3}}
        steps(cut, device, micro, strict=strict)
    compiled = {"steps": 8, "compute": {"compile": "on" if strict else "off"}}
    steps("maps", device, compiled, strict=strict)
    return {"runs": 3}


def cuda_graphs(device: torch.device) -> dict[str, Any]:
    """Steps of which later ones are replayed, against the same without, and their times."""
    found: dict[str, Any] = {}
    for cut in ("maps", "activations"):
        results = {}
        for graphs in (False, True):
            changes = {"steps": 99, "compute": {"compile": "off", "cuda_graphs": graphs}}
            with open_steps(store(cut), device, {**FLOAT32, **changes}) as run:
                phase = [run.take(8)]
                run.terminate()
                phase.append(run.take(8))
                results[graphs] = torch.cat(phase).double().cpu()
                name = f"ms a step, {cut}, {'graph' if graphs else 'launched'}"
                start = time.perf_counter()
                run.take(20).cpu()
                found[name] = (time.perf_counter() - start) / 20 * 1e3
        found[cut] = difference(results[True], results[False])
    return found


def copies(device: torch.device) -> dict[str, Any]:
    """The project's own tests of copies to a GPU."""
    test = "tests/pipeline/train/test_device_transfer.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return {"failed": float(done.returncode), "output": done.stdout[-300:]}


def repeats(device: torch.device) -> dict[str, Any]:
    """Largest difference of a weight between two equal runs, and between a run and one that was
    resumed; with compute.deterministic all are 0."""
    gpu = device.type == "cuda"
    compute = {"compile": "on" if gpu else "off", "deterministic": True}
    changes = {"steps": 6, "checkpoint": {"every": 4}, "compute": compute}
    config = run_config(store("maps"), changes)

    def run(resume: Path | None = None) -> dict[int, Path]:
        folder = Path(tempfile.mkdtemp(prefix="haste-gpu-"))
        saved: dict[int, Path] = {}

        def save(step: int, write: Any) -> None:
            LocalCheckpoints(folder, keep=9).save(step, write)
            saved[step] = folder / checkpoint_name(step)

        train(config, folder, save, group=ProcessGroup(device=device), resume=resume)
        return saved

    try:
        first = run()
        return {
            "again": weight_difference(first[6], run()[6]),
            "resumed": weight_difference(first[6], run(first[4])[6]),
        }
    finally:  # the option is for the rest of a process
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)


def weight_difference(one: Path, other: Path) -> float:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def extraction(device: torch.device) -> dict[str, Any]:
    found = {}
    for precision in ("float32", "bfloat16"):
        arithmetic = precision if device.type == "cuda" else "float32"
        read = [tokens(CPU, "float32"), tokens(device, arithmetic)]
        for name in ("tokens", "latents"):
            found[f"{name}, {precision}"] = difference(read[1][name], read[0][name])
    return found


@cache
def tokens(device: torch.device, precision: str) -> dict[str, Tensor]:
    folder = Path(tempfile.mkdtemp(prefix="haste-gpu-")) / "store"
    made = encode(
        folder, cut="activations", device=device.type, precision=precision, codec="float32"
    )
    shards, rows = np.zeros(SAMPLES, np.int64), np.arange(SAMPLES)
    read = {name: StreamReader(made, name).read(shards, rows) for name in made.manifest.streams}
    return {
        "tokens": torch.from_numpy(read["activations"]["tokens"]),
        "latents": torch.from_numpy(read["latents"]["mean"]),
    }


def samplers(device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    student = make_student(StudentConfig.model_validate(RUN["student"])).eval()
    for parameter in student.parameters():  # at initialisation the output is 0
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    found = {}
    for method in ("sde", "ode", "ode_heun"):
        config = SamplerConfig.model_validate({"method": method, "steps": 10, "guidance": 1.5})
        expected = draw_latents(student.to(CPU), [1, 2, 3], config)
        found[method] = difference(draw_latents(student.to(device), [1, 2, 3], config), expected)
    return found


def step_of_xl(device: torch.device) -> dict[str, Any]:
    """SiT-XL/2 with 32 samples: milliseconds of both phases, those of Python, peak memory."""
    from types import SimpleNamespace

    from tests.bench.steps import make_data, make_stepper, run_configs
    from tests.bench.timing import Clock

    options = SimpleNamespace(
        student="SiT-XL/2",
        cut="maps",
        depth=None,
        width=None,
        precision="auto",
        compile="auto",
        plain=False,
        recipe=(),
        device="cuda",
    )
    clock = Clock.of("cuda")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), options, 32)
        stepper = make_stepper("phase 1", run_configs(options, data.store), data, clock)
        found = {"seconds of the first steps": clock.time(lambda: stepper.take(3))}
        torch.cuda.reset_peak_memory_stats()
        found["ms, Phase I"] = clock.time(lambda: stepper.take(10)) * 100
        found["GB, peak of Phase I"] = torch.cuda.max_memory_allocated() / 1e9
        start = time.perf_counter()
        stepper.take(3)
        found["ms of Python"] = (time.perf_counter() - start) / 3 * 1e3
        stepper.trainer.terminate({})
        stepper.take(3)
        found["ms, Phase II"] = clock.time(lambda: stepper.take(10)) * 100
        found["Phase I / Phase II"] = found["ms, Phase I"] / found["ms, Phase II"]
        stepper.trainer.close()
    return found


CHECKS: dict[str, Check] = {
    "machine": Check(machine, {}),
    "float32 steps": Check(float32_steps, dict.fromkeys(CUTS, 2e-3)),
    "steps do not wait": Check(steps_do_not_wait, {}),
    "compiled steps": Check(fast_steps, {"float32": 5e-3, "bfloat16": 2e-2}),
    "CUDA graphs": Check(cuda_graphs, {"maps": 1e-4, "activations": 1e-4}),
    "copies": Check(copies, {"failed": 0}),
    "SiT-XL/2": Check(step_of_xl, {"Phase I / Phase II": 1.1}, gpu_only=True),
    "repeats": Check(repeats, {"again": 0, "resumed": 0}),
    "extraction": Check(
        extraction,
        {
            "tokens, float32": 1e-3,
            "latents, float32": 1e-3,
            "tokens, bfloat16": 2e-2,
            "latents, bfloat16": 1e-3,
        },
    ),
    "samplers": Check(samplers, dict.fromkeys(("sde", "ode", "ode_heun"), 1e-3)),
}


def run_checks(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """Run the checks for about ``budget`` seconds, each going on where one fails; ``out`` is
    written after each. A check that begins in time is not cut short."""
    began = time.monotonic()
    # for ``repeats``: cuBLAS reads it once, when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    report: dict[str, Any] = {
        "device": name or "CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
        "checks": {},
    }
    for check_name, check in CHECKS.items():
        if check.gpu_only and device.type != "cuda":
            result: dict[str, Any] = {"status": "skipped", "reason": "needs a GPU"}
        elif time.monotonic() - began > budget:
            result = {"status": "skipped", "reason": "out of time"}
        else:
            result = _run(check, device)
        report["checks"][check_name] = result
        print(f"{result['status']:8}{check_name:20}{_short(result)}", flush=True)
        out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    return report


def _run(check: Check, device: torch.device) -> dict[str, Any]:
    start = time.monotonic()
    if "torch._dynamo" in sys.modules:  # another check's variants count towards its limit
        torch._dynamo.reset()
    result: dict[str, Any] = {"status": "ok"}
    try:
        result["values"] = values = check.run(device)
        # a comparison with NaN is false
        bad = [name for name, limit in check.limits.items() if not values[name] <= limit]
        if bad:
            result |= {"status": "FAILED", "reason": f"above the limit: {', '.join(bad)}"}
    except Exception as error:
        lines = traceback.format_exception(error)
        result |= {"status": "FAILED", "reason": str(error)[:400], "trace": "".join(lines)[-4000:]}
    return result | {"limits": check.limits, "seconds": round(time.monotonic() - start, 1)}


def _short(result: dict[str, Any]) -> str:
    values = result.get("values", {})
    shown = [f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float)]
    return ", ".join([*shown, *([result["reason"]] if "reason" in result else [])])
