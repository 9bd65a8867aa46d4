"""Whether what is asked of an extraction agrees with a store that is there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.cli.config_files import merge
from pipeline.datasets import Listing
from pipeline.extract.tasks import stream_name
from pipeline.store import Store
from pipeline.targets.cuts import cut_columns
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.store import Manifest, TeacherStream
from schemas.validation import validate


def with_stores_options(config: ExtractConfig, store: Store) -> ExtractConfig:
    """For a stream that is added: what the store's images, shards and teacher are, and what its
    data set's preset says, where the options do not. Raises ``UserError`` where they say otherwise.

    Options that count as said are those in ``model_fields_set``."""
    manifest, dataset = store.manifest, store.manifest.dataset
    said = config.model_dump(exclude_unset=True)
    if config.add_stream in manifest.base_streams:
        raise UserError(
            f"--add-stream {config.add_stream}: store '{store.shown_url}' was made with a stream "
            "of this name; choose another"
        )
    of_store: dict[str, object] = {
        "dataset": dataset.name,
        "resolution": manifest.resolution,
        "format": manifest.format,
        "shard_size": manifest.shard_size,
        "order_seed": dataset.order_seed,
    }
    for option, value in of_store.items():
        if option in said and said[option] != value:
            raise UserError(
                f"store '{store.shown_url}' was made with {option} {value}, not "
                f"{said[option]}: a stream that is added has its shards"
            )
    defaults = {
        **PRESETS.get(dataset.name, {}),
        **_stores_teacher(said.get("teacher", {}), config.add_stream, manifest),
        **of_store,
        "source": dataset.source,
    }
    whole = merge(defaults, {name: value for name, value in said.items() if value is not None})
    return validate(ExtractConfig, whole, where=f"--add-stream to store '{store.shown_url}'")


def _stores_teacher(
    said: Mapping[str, object], stream: str | None, manifest: Manifest
) -> dict[str, object]:
    """The teacher of ``stream`` where that was begun, else of the store's first, and its layers;
    nothing of it where another model is asked for."""
    held = manifest.teacher_streams
    if not held:
        return {}
    teacher = held.get(stream or "", next(iter(held.values()))).teacher
    if said.get("model", teacher.model) != teacher.model:
        return {"teacher": {}}
    options = {"model", "weights", "seed", "image_size", "model_args"}
    return {"teacher": teacher.model_dump(include=options), "layers": teacher.layers}


def check_request(config: ExtractConfig, listing: Listing, store: Store) -> None:
    """What can be told without loading weights. Raises ``UserError``."""
    manifest = store.manifest
    asked: dict[str, tuple[object, object]] = {
        "resolution": (manifest.resolution, config.resolution),
        "format": (manifest.format, config.format),
        "shard_size": (manifest.shard_size, config.shard_size),
        "order_seed": (manifest.dataset.order_seed, config.order_seed),
        "the images": (manifest.dataset.fingerprint[:12], listing.fingerprint()[:12]),
    }
    name = stream_name(config)
    stream = manifest.streams.get(name)
    if config.add_stream is None and name not in manifest.base_streams:
        first = [n for n in manifest.base_streams if n in manifest.teacher_streams]
        asked["cut"] = (", ".join(first), config.cut)
    elif isinstance(stream, TeacherStream):
        teacher = stream.teacher
        asked |= {
            "cut": (stream.cut, config.cut),
            "layers": (teacher.layers, config.layers),
            "batch_size": (stream.compute.batch_size, config.batch_size),
            "teacher.model": (teacher.model, config.teacher.model),
            "teacher.seed": (teacher.seed, config.teacher.seed),
            "teacher.model_args": (teacher.model_args, config.teacher.model_args),
        }
    for key, (was, now) in asked.items():
        if was != now:
            raise _other(store, key, was, now)
    if isinstance(stream, TeacherStream):
        columns = cut_columns(
            config.cut,
            stream.teacher,
            config.resolution,
            config.codec,
            config.column_codecs,
            compress=config.compress,
        )
        for column, now in columns.items():
            was = stream.columns[column]
            if was.codec != now.codec:
                raise _other(store, f"codec of {column}", was.codec, now.codec)
            if was != now:  # their shapes follow from what is equal by now
                raise _other(store, f"compression of {column}", was.lossless, now.lossless)


def _other(store: Store, key: str, was: object, now: object) -> UserError:
    return UserError(
        f"store '{store.shown_url}' was made with {key} {_plain(was)}, this extraction has "
        f"{_plain(now)}: use another --store or the same options"
    )


def _plain(value: object) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
