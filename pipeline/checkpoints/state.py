"""Contents of a checkpoint: weights as safetensors, AdamW's state, plain values in state.json.

Where several workers write one (``shares``), each has files of the same kinds with some of the
tensors: readers take the union.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.integrity import (
    MAX_THREADS,
    SHARES,
    STATE,
    DamagedCheckpointError,
    HashedFile,
    NonFiniteCheckpointError,
    part_paths,
    verify,
    write_listed_state,
    write_state,
)
from pipeline.checkpoints.reference_format import CLASSES
from pipeline.checkpoints.shares import Files, Share
from pipeline.checkpoints.store_identity import with_saved_streams
from pipeline.precision import is_finite
from pipeline.text import unpickling_fault
from schemas.classes import ClassTable
from schemas.errors import UserError
from schemas.networks import AutoencoderInfo, TextEncoderInfo
from schemas.run import RunConfig
from schemas.validation import validate

T = TypeVar("T")

VERSION = 3
"""The newest version that is read: checkpoints of several workers."""
UNDIVIDED = 2
"""Version of a checkpoint of one worker, which earlier software reads too."""
TEXT_ENCODER = "text_encoder"
OPTIMIZER = "optimizer.pt"
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.float32, torch.float64, torch.int64),
)
"""Types of tensors in the order of safetensors, which writes the last ones first."""
DTYPE_NAMES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
FIXED = (
    "student",
    "diffusion",
    "alignment",
    "optimizer",
    "data",
    "global_batch",
    "seed",
    "ema_decay",
)
"""Parts of a config that a resumed run must not change; of ``data`` only the window counts."""


@dataclass(frozen=True)
class CheckpointContents:
    """Everything that one checkpoint holds, in memory."""

    weights: Mapping[str, Mapping[str, Tensor]]
    """State of each module, by the name of its file: model, ema, and ``projector_files``."""
    optimizer: Mapping[str, Any]
    """AdamW's ``state_dict()``."""
    state: Mapping[str, Any]
    """Plain values: the fields of ``CheckpointState`` and what people may want to read."""
    share: Share | None = None
    """The share whose tensors these are; None: all of them."""

    def write(self, folder: Path) -> None:
        """Fill an empty folder; ``state.json`` is written last, with the checksums of the rest.
        Tensors are read once."""
        checksums = self._write_tensors(folder, lambda name: name)
        write_state(folder, {"version": UNDIVIDED, **self.state}, checksums)

    def write_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write the files of the share; ``state.json`` is left to ``write_shared_state``."""
        assert self.share is not None
        file_of = self.share.file
        return {
            file_of(name): {
                "of": name,
                "bytes": (folder / file_of(name)).stat().st_size,
                "sha256": checksum,
            }
            for name, checksum in self._write_tensors(folder, file_of).items()
        }

    def write_shared_state(self, folder: Path, files: Files) -> None:
        """Write ``state.json`` of a checkpoint with the ``files`` of all shares."""
        shares: dict[str, list[str]] = {}
        for file in sorted(files):
            shares.setdefault(files[file]["of"], []).append(file)
        listed = {
            file: {"bytes": about["bytes"], "sha256": about["sha256"]}
            for file, about in sorted(files.items())
        }
        write_listed_state(folder, {"version": VERSION, **self.state, SHARES: shares}, listed)

    def _write_tensors(self, folder: Path, file_of: Callable[[str], str]) -> dict[str, str]:
        """Write the tensors; ``file_of`` names a file by its name in an undivided checkpoint, by
        which the checksums are returned."""
        checksums = {}
        for name, tensors in self.weights.items():
            with HashedFile(folder / file_of(weights_file(name))) as file:
                _write_safetensors(tensors, file)
            checksums[weights_file(name)] = file.sha256
        with HashedFile(folder / file_of(OPTIMIZER)) as file:
            torch.save(dict(self.optimizer), file)  # type: ignore[arg-type]
        checksums[OPTIMIZER] = file.sha256
        return checksums


@dataclass(frozen=True)
class CheckpointState:
    """Contents of ``state.json``."""

    step: int
    config: RunConfig
    autoencoder: AutoencoderInfo
    store: dict[str, Any]
    """``store_identity`` of the store that the run is trained on."""
    termination: dict[str, Any] | None
    """Step and evidence of the termination; None in Phase I."""
    trigger: dict[str, Any]
    bytes_read: dict[str, dict[str, int]]
    """Per stream: bytes read before and after the termination, over all workers."""
    meter: dict[str, Any]
    """Sums since the last row of the metrics."""
    metrics_rows: int
    """Rows of the metrics file that were written before the checkpoint."""
    looked: bool
    """True if the validation of this step was finished when the checkpoint was written."""
    classes: ClassTable
    """Classes of the store; in checkpoints that do not record them, those of the student."""
    data: dict[str, Any]
    """``BatchLoader.state()``: shards that are left out."""
    text_encoder: TextEncoderInfo | None = None
    """Encoder of the captions of an MMDiT's store; None for other students."""

    @property
    def projector_ema_lag(self) -> int:
        """Steps that ``projector_ema.safetensors`` lacks, because the average is not updated after
        the termination until it is read."""
        terminated = self.termination
        return 0 if terminated is None else self.step - int(terminated["terminated_at_step"])


def read_state(folder: Path) -> CheckpointState:
    """The plain state of a checkpoint whose files all have their sizes. Raises ``UserError``."""
    return parse_state(verify(folder, hashes=False), folder)


def parse_state(state: dict[str, Any], where: str | Path) -> CheckpointState:
    """The state that ``verify`` returned for the checkpoint ``where``. Raises ``UserError``."""
    try:
        if state["version"] > VERSION:
            raise UserError(
                f"checkpoint '{where}' is of version {state['version']}, newer than "
                f"this software knows ({VERSION}); update it"
            )
        config = validate(RunConfig, state["config"], where=f"{where}/{STATE}")
        return CheckpointState(
            step=int(state["step"]),
            config=config,
            autoencoder=AutoencoderInfo(**state["autoencoder"]),
            store=state["store"],
            termination=state["termination"],
            trigger=state["trigger"],
            bytes_read=state["bytes_read"],
            meter=state["meter"],
            metrics_rows=int(state["metrics_rows"]),
            looked=bool(state.get("looked", True)),  # earlier versions validated first
            classes=validate(
                ClassTable,
                state.get(CLASSES, {"count": config.student.num_classes}),
                where=f"{where}/{STATE}, {CLASSES}",
            ),
            data=state.get("data", {}),
            text_encoder=(
                validate(TextEncoderInfo, state[TEXT_ENCODER], where=f"{where}/{STATE}")
                if TEXT_ENCODER in state
                else None
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(where, f"{STATE}: {error}") from None


def weights_file(name: str) -> str:
    """Name of the file of a module's weights in an undivided checkpoint."""
    return f"{name}.safetensors"


def projector_files(number: int) -> tuple[str, str]:
    """Names of the files of a stream's projector and of its average, for the number of the stream
    in ``AlignmentConfig.streams``. The first has none in its names, as when it was the only one."""
    suffix = f"_{number}" if number else ""
    return f"projector{suffix}", f"projector_ema{suffix}"


def classes_to_save(classes: ClassTable, config: RunConfig) -> dict[str, Any]:
    """The entry of ``state.json`` for classes of which more is known than the student's number."""
    known = classes.names or classes.empty or classes.count != config.student.num_classes
    return {CLASSES: classes.model_dump(mode="json")} if known else {}


def _write_safetensors(tensors: Mapping[str, Tensor], file: HashedFile) -> None:
    """The bytes that ``safetensors.torch.save_file`` writes: the length of the header (8 bytes),
    the header in JSON, and the tensors by falling size of their numbers, then by name. That
    function writes to a path only, so that the file would have to be read again for its hash."""
    names = sorted(tensors, key=lambda name: (-DTYPES.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES[DTYPES.index(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_optimizer(folder: Path) -> dict[str, Any]:
    """AdamW's state, on the CPU. The optimizer moves its moments to the weights' device; its step
    counts stay, because its plain form reads them at every step. Raises ``UserError``."""
    state = _mapped_optimizer(folder)  # a copy, because the optimizer may keep the tensors
    return {**state, "state": {n: _cloned(one) for n, one in state.get("state", {}).items()}}


def _cloned(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in tensors.items()}


def _mapped_optimizer(folder: Path) -> dict[str, Any]:
    """AdamW's state, whose tensors are pages of the file, read when they are used."""
    parts = map_parts(_mapped_moments, part_paths(folder, OPTIMIZER))
    if len(parts) == 1:
        return parts[0]
    moments = {number: one for part in parts for number, one in part.get("state", {}).items()}
    return {**parts[0], "state": {number: moments[number] for number in sorted(moments)}}


def _mapped_moments(path: Path) -> dict[str, Any]:
    folder = path.parent
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint '{folder}' lacks {path.name}") from None
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(folder, f"{path.name}: {unpickling_fault(error)}") from None
    except Exception as error:  # damaged bytes make torch and pickle raise any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(folder, f"{path.name}: {reason}") from None
    return state


def verify_finite(folder: Path) -> None:
    """``verify``, and that all weights and moments are finite, for a run that trains on from here.
    Raises ``DamagedCheckpointError``."""
    verify(folder)
    map_parts(_require_finite, sorted(folder.glob("*.safetensors")))
    for state in _mapped_optimizer(folder).get("state", {}).values():
        if not all(is_finite(value) for value in state.values()):
            raise NonFiniteCheckpointError(folder, f"moments of {OPTIMIZER} are")


def _require_finite(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not is_finite(file.get_tensor(name)):
                    raise NonFiniteCheckpointError(path.parent, f"{name} of {path.name} is")
    except SafetensorError as error:
        raise DamagedCheckpointError(path.parent, f"{path.name}: {error}") from None


def check_same_run(state: CheckpointState, config: RunConfig, folder: str | Path) -> None:
    """Raises ``UserError`` where ``config`` changes what a resumed run must not change."""
    for key in FIXED:
        old, new = getattr(state.config, key), getattr(config, key)
        if key == "alignment":  # the streams that it was trained on
            old, new = (with_saved_streams(one, state.store) for one in (old, new))
        if old != new:
            changed = list(_differences(old, new, key))
            if key == "data":  # other options change speed only
                changed = [name for name in changed if name in ("data.window", "data.holdout")]
                if not changed:
                    continue
            raise UserError(
                f"checkpoint '{folder}' is of another model or run: it has "
                f"{_value(state.config, changed[0])} for {changed[0]}, the config says "
                f"{_value(config, changed[0])}; give the run another --name"
            )


def load_weights(folder: Path, name: str, module: torch.nn.Module) -> None:
    """Fill ``module`` from ``NAME.safetensors``. Raises ``UserError`` where it does not fit."""
    tensors = read_weights(folder, name)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"'{folder / weights_file(name)}' is of another model: "
            f"{lines[min(1, len(lines) - 1)].strip()[:200]}"
        ) from None


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Weights of the module ``name``, on the CPU. Raises ``UserError``."""
    parts = map_parts(_read_tensors, part_paths(folder, weights_file(name)))
    return {key: tensor for part in parts for key, tensor in part.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint '{path.parent}' lacks {path.name}") from None
    except SafetensorError as error:
        raise DamagedCheckpointError(path.parent, f"{path.name}: {error}") from None


def map_parts(read: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """Results of ``read`` for each file; several are read at a time."""
    with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="checkpoint") as pool:
        return list(pool.map(read, paths))


def _differences(old: Any, new: Any, key: str) -> Iterator[str]:
    """Dotted names of the options that differ in two values of ``key``."""
    if isinstance(old, BaseModel):
        for name in type(old).model_fields:
            one, other = getattr(old, name), getattr(new, name)
            if one == other:
                continue
            if name == "others" and len(one) == len(other):
                for number, pair in enumerate(zip(one, other, strict=True)):
                    yield from _differences(*pair, f"{key}.{name}.{number}")
            else:
                yield f"{key}.{name}"
    elif old != new:
        yield key


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    if isinstance(config, tuple) and any(isinstance(entry, BaseModel) for entry in config):
        return f"{len(config)} entries"
    return config
