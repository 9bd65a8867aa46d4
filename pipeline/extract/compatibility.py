"""Checks that the options of an extraction agree with an existing store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.cli.config_files import merge
from pipeline.datasets import Listing
from pipeline.extract.captions import adds_captions, text_stream_name
from pipeline.extract.tasks import (
    class_columns_of,
    class_name,
    cut_columns_of,
    extracted_class_stream,
    stream_name,
)
from pipeline.store import Store
from pipeline.store.manifest_diff import in_stored_layout
from pipeline.text import short_value
from schemas.calibration import Calibration
from schemas.codecs import Promise
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.fields import MAX_NAME
from schemas.store import Manifest
from schemas.streams import ClassStream, TeacherStream
from schemas.validation import validate


def with_stores_options(config: ExtractConfig, store: Store) -> ExtractConfig:
    """Options of --add-stream, completed from the store: its images, shards and teacher, and the
    preset of its data set, are defaults.

    Only options in ``model_fields_set`` count as given. Raises ``UserError`` if one of these
    contradicts the store.
    """
    manifest, dataset = store.manifest, store.manifest.dataset
    given = config.model_dump(exclude_unset=True)
    if config.add_stream in manifest.base_streams:
        raise UserError(
            f"--add-stream {config.add_stream}: store '{store.shown_url}' was made with a stream "
            "of this name; choose another"
        )
    store_values: dict[str, object] = {
        "dataset": dataset.name,
        "resolution": manifest.resolution,
        "crop": manifest.crop,
        "split": dataset.split,
        "format": manifest.format,
        "shard_size": manifest.shard_size,
        "order_seed": dataset.order_seed,
    }
    for option, value in store_values.items():
        if option in given and given[option] != value:
            raise UserError(
                f"store '{store.shown_url}' was made with {option} {value}, not "
                f"{given[option]}: an added stream has the store's shards"
            )
    defaults = {
        **PRESETS.get(dataset.name, {}),
        **_teacher_defaults(given.get("teacher", {}), config.add_stream, manifest),
        **store_values,
        "source": dataset.source,
        "captions": dataset.captions_from,
        "allow_empty_classes": bool(dataset.empty_classes),
    }
    values = merge(defaults, {name: value for name, value in given.items() if value is not None})
    return validate(ExtractConfig, values, where=f"--add-stream to store '{store.shown_url}'")


def _teacher_defaults(
    given: Mapping[str, object], stream: str | None, manifest: Manifest
) -> dict[str, object]:
    """Teacher and layers of ``stream`` if it exists, else of the store's first teacher stream;
    empty if another model is given."""
    streams = manifest.teacher_streams
    if not streams:
        return {}
    teacher = streams.get(stream or "", next(iter(streams.values()))).teacher
    if given.get("model", teacher.model) != teacher.model:
        return {"teacher": {}}
    options = {"model", "weights", "seed", "image_size", "model_args", "resize"}
    if teacher.statistics_of == "options":
        options |= {"mean", "std"}
    return {"teacher": teacher.model_dump(include=options), "layers": teacher.layers}


def _check_new_names(config: ExtractConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the class stream of a new teacher stream cannot have its name."""
    name, tokens = stream_name(config), class_name(config)
    if name in manifest.streams or config.class_token == "none":
        return
    if tokens in manifest.streams:
        raise UserError(
            f"--add-stream {name}: the store has a stream '{tokens}', the name of its class "
            "stream: choose another, or --class-token none"
        )
    if len(tokens) > MAX_NAME:
        raise UserError(
            f"--add-stream {name}: its class stream '{tokens}' has more than {MAX_NAME} "
            "characters: choose a shorter name, or --class-token none"
        )


def check_request(config: ExtractConfig, listing: Listing, store: Store) -> None:
    """Compare the options with the manifest, as far as possible without loading weights. Raises
    ``UserError`` that names the first difference."""
    manifest = store.manifest
    values: dict[str, tuple[object, object]] = {
        "resolution": (manifest.resolution, config.resolution),
        "crop": (manifest.crop, config.crop),
        "split": (manifest.dataset.split or "train", config.split or "train"),
        "format": (manifest.format, config.format),
        "shard_size": (manifest.shard_size, config.shard_size),
        "order_seed": (manifest.dataset.order_seed, config.order_seed),
        "the number of classes": (manifest.dataset.num_classes, listing.num_classes),
        **_class_names(manifest.dataset.class_names, listing.class_names),
        "the images": (manifest.dataset.fingerprint[:12], listing.fingerprint()[:12]),
    }
    values |= _captions(config, listing, manifest)
    name = stream_name(config)
    if config.add_stream is not None:
        _check_new_names(config, manifest)
    stream = manifest.streams.get(name)
    if config.add_stream is None and name not in manifest.base_streams:
        first = [n for n in manifest.base_streams if n in manifest.teacher_streams]
        values["cut"] = (", ".join(first), config.cut)
    elif isinstance(stream, TeacherStream):
        teacher = stream.teacher
        values |= {
            "cut": (stream.cut, config.cut),
            "layers": (teacher.layers, config.layers),
            "batch_size": (stream.compute.batch_size, config.batch_size),
            "teacher.model": (teacher.model, config.teacher.model),
            "teacher.seed": (teacher.seed, config.teacher.seed),
            "teacher.model_args": (teacher.model_args, config.teacher.model_args),
            "teacher.resize": (teacher.resize, config.teacher.resize),
        }
        if config.teacher.image_size is not None:
            values["teacher.image_size"] = (teacher.image_size, config.teacher.image_size)
        if teacher.model == config.teacher.model:
            from pipeline.teachers.vit import named_normalisation  # timm takes seconds to import

            mean, std = named_normalisation(teacher.model)
            values |= {
                "teacher.mean": (teacher.mean, config.teacher.mean or mean),
                "teacher.std": (teacher.std, config.teacher.std or std),
            }
        tokens = extracted_class_stream(config, manifest)
        values |= _class_token(config, stream, tokens)
    for key, (stored, requested) in values.items():
        if stored != requested:
            raise _mismatch(store, key, stored, requested)
    if isinstance(stream, TeacherStream):
        calibration = _check_calibration(config, store, stream, len(listing.items))
        columns = cut_columns_of(
            config,
            stream.teacher,
            with_class_stream=tokens is not None,
            calibration=calibration,
        )
        held = dict(stream.columns)
        if tokens is not None:
            columns |= class_columns_of(config, tokens.teacher.width)
            held |= tokens.columns
        chosen = config.column_codecs
        layouts = in_stored_layout({n: c for n, c in columns.items() if n not in chosen}, held)
        for name, requested_column in (columns | layouts).items():
            column = held[name]
            if column.codec != requested_column.codec:
                key = f"codec of {name}"
                raise _mismatch(store, key, column.codec, requested_column.codec)
            if column != requested_column:  # only compression is left: shapes are equal by now
                key = f"compression of {name}"
                raise _mismatch(store, key, column.lossless, requested_column.lossless)


def _check_calibration(
    config: ExtractConfig, store: Store, stream: TeacherStream, samples: int
) -> Calibration | None:
    """The calibration of the stream, whose steps an extraction goes on with; None where it has
    fixed steps, or the options ask for fixed ones. Raises ``UserError`` where the options ask for
    another promise or other images."""
    promise, found, given = config.codec.promise, stream.calibration, config.codec.model_fields_set
    if promise is None:
        return None
    if found is None:  # fixed steps are those of the default promise
        asked = given - {"name", "calibration", "seed"}
        if asked:
            key = sorted(asked)[0]
            raise _mismatch(store, f"codec.{key}", "none (fixed steps)", getattr(config.codec, key))
        return None
    values: dict[str, tuple[object, object]] = {"codec": (found.codec, config.codec.name)}
    for key in Promise.model_fields:
        values[f"codec.{key}"] = (getattr(found.promise, key), getattr(promise, key))
    if "calibration" in given:
        images = config.codec.images(samples)
        values["codec.calibration, in images,"] = (found.images, images)
    if "seed" in given:
        values["codec.seed"] = (found.seed, config.codec.seed)
    for key, (stored, requested) in values.items():
        if stored != requested:
            raise _mismatch(store, key, stored, requested)
    return found


def _captions(
    config: ExtractConfig, listing: Listing, manifest: Manifest
) -> dict[str, tuple[object, object]]:
    """Options of the stream of captions, and the captions of the listing."""
    if config.add_stream is not None and not adds_captions(config):
        return {}
    stream = manifest.text_streams.get(text_stream_name(config))
    kept = config.text.keep or "none"
    if stream is None or kept == "none":
        if adds_captions(config):  # a new stream
            return {}
        stored = "none" if stream is None or stream.added else stream.keeps
        return {"text.keep": (stored, kept)}
    text, held = config.text, stream.encoder
    values: dict[str, tuple[object, object]] = {
        "text.keep": (stream.keeps, kept),
        "text.encoder": (held.encoder, text.encoder),
        "captions": (stream.captions_sha256[:12], listing.captions_sha256()[:12]),
    }
    if held.weights_sha256 is not None:
        values |= {
            "text.seed": (held.seed, text.seed),
            "text.model_args": (held.model_args, text.model_args),
        }
    if stream.keeps == "embeddings":
        values["text.codec"] = (stream.columns["caption0"].codec, text.codec)
    if text.max_tokens is not None:
        values["text.max_tokens"] = (held.tokens, text.max_tokens)
    if text.tokenizer is not None:
        values["text.tokenizer"] = (held.tokenizer, text.tokenizer)
    return values


def _class_token(
    config: ExtractConfig, stream: TeacherStream, tokens: ClassStream | None
) -> dict[str, tuple[object, object]]:
    """The vector of the class stream. A store of an earlier version is completed without one; a
    teacher without prefix tokens has no class token."""
    if tokens is not None:
        return {"class_token": (tokens.token, config.class_token)}
    asked = config.class_token != "none" and "class_token" in config.model_fields_set
    if config.class_token == "mean" or (asked and stream.teacher.prefix):
        raise UserError(
            f"stream '{stream_name(config)}' was made without class tokens: leave out "
            f"--class-token {config.class_token}, and compute them from the store with "
            f"--add-stream {class_name(config)}"
        )
    return {}


def _class_names(
    stored: Sequence[str], requested: Sequence[str]
) -> dict[str, tuple[object, object]]:
    """The first class whose names differ; stores of earlier versions have no names."""
    for number, (old, new) in enumerate(zip(stored, requested, strict=False)):
        if old != new:
            return {f"class {number}": (old, new)}
    return {}


def _mismatch(store: Store, key: str, stored: object, requested: object) -> UserError:
    return UserError(
        f"store '{store.shown_url}' was made with {key} {short_value(stored)}, this extraction "
        f"has {short_value(requested)}: use another --store or the same options"
    )
