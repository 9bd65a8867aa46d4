"""`--check`: training configs that a store can serve, and commands that add what others need."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoints.store_identity import choose_class_stream, with_text
from pipeline.cli.config_files import read_yaml
from pipeline.cli.progress import progress_bar
from pipeline.inspect.codec_check import coarse_codec
from pipeline.inspect.suggest_extraction import suggest_extraction
from pipeline.runs.compatibility import (
    check_classes,
    check_latents,
    ignored_captions,
    with_classes,
)
from pipeline.store import Store
from pipeline.targets.kinds import STORED
from pipeline.targets.sources import check_stream
from pipeline.targets.tail import check_tail
from pipeline.text import shortened
from schemas.alignment import StreamAlignment, place
from schemas.errors import UserError, plain_text
from schemas.extract import Cut
from schemas.fields import TEXT, class_stream_name
from schemas.run import RunConfig
from schemas.store import Manifest
from schemas.validation import validate

MAX_REASON = 160
"""Characters of a reason in a table."""
MISFIT = "it does not fit this store: "


class Answer(NamedTuple):
    """Result of the check of one config."""

    config: str
    """The file, as the user named it."""
    ok: bool
    reason: str | None = None
    """Reason why it cannot be trained; if it can, an option to set."""
    command: str | None = None
    """Command that adds only what is missing; None where another store is needed."""
    settings: tuple[tuple[str, str], ...] = ()
    """Keys and values that the training needs beside its config."""

    @property
    def by_options(self) -> bool:
        """True if options of the training suffice: streams of ``alignment.others`` are named in the
        config."""
        return self.ok and all(_is_option(key) for key, _ in self.settings)

    @property
    def options(self) -> list[str]:
        """Options that the training needs beside its config; none where they do not suffice."""
        if not self.by_options:
            return []
        return [word for key, value in self.settings for word in (_shown(key), value)]

    def __str__(self) -> str:
        line = f"{'yes' if self.ok else 'no ':<4} {self.config}"
        if self.reason is not None:
            line += f" ({self.reason})" if self.ok else f": {self.reason}"
        return line if self.command is None else f"{line}; add it with: {self.command}"


def _is_option(key: str) -> bool:
    """False for entries of a list, which only a config can set."""
    return not key.startswith("alignment.others.")


def _shown(key: str) -> str:
    """A key as users set it."""
    return f"--{key.replace('_', '-')}" if _is_option(key) else key


def _chosen(setting: tuple[str, str]) -> str:
    """A setting as part of a reason."""
    key, value = setting
    return f"with {_shown(key)} {value}"


def check_configs(store: Store, files: tuple[str, ...]) -> list[Answer]:
    """An answer for each config file, in their order."""
    files = config_files(files)
    base = store.missing_shards()
    if base:
        missing = f"{len(base)} of the store's {store.manifest.num_shards} shards are missing"
        reason = f"{missing}: run its extraction again"
        return [Answer(file, False, reason) for file in files]
    incomplete = {name for name in store.added_streams if store.missing_shards(name)}
    asked = progress_bar(files, unit="config", desc="check") if len(files) > 1 else files
    return [_answer(store, file, incomplete) for file in asked]


def config_files(named: tuple[str, ...]) -> tuple[str, ...]:
    """The config files that --check names: a folder stands for its YAML files. Raises
    ``UserError``."""
    files: list[str] = []
    for name in named:
        if not Path(name).is_dir():
            files.append(name)
            continue
        found = sorted(str(path) for path in Path(name).glob("*.yaml"))
        if not found:
            raise UserError(f"--check {name}: the folder holds no .yaml file")
        files += found
    return tuple(files)


def answers_as_json(answers: list[Answer]) -> dict[str, Any]:
    """All answers; "ok" if every config can be trained."""
    return {
        "configs": [{**one._asdict(), "settings": dict(one.settings)} for one in answers],
        "ok": all(answer.ok for answer in answers),
    }


def answers_as_table(store: Store, answers: list[Answer]) -> str:
    """One line for each config, with its classes, then the commands that add what some lack."""
    rows = [("", "config", "classes", "")]
    commands: dict[str, list[str]] = {}
    for answer in answers:
        name = Path(answer.config).stem
        reason = (answer.reason or "").removeprefix(MISFIT)
        why = shortened(plain_text(reason), MAX_REASON)
        rows.append(("yes" if answer.ok else "no", name, _classes_of(answer.config), why))
        if answer.command is not None:
            commands.setdefault(answer.command, []).append(name)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    possible = sum(answer.ok for answer in answers)
    lines.append(
        f"{possible} of {len(answers)} configs can be trained on this store of "
        f"{store.manifest.dataset.num_classes} classes"
    )
    for command, names in commands.items():
        lines.append(f"for {shortened(', '.join(names), MAX_REASON)}: {command}")
    return "\n".join(lines)


def _classes_of(file: str) -> str:
    """Classes that a config states; "the store's" where it has none."""
    try:
        student = read_yaml(file).get("student") or {}
    except UserError:
        return "?"
    return str(student.get("num_classes", "the store's"))


def _answer(store: Store, file: str, incomplete: set[str]) -> Answer:
    try:
        config = validate(RunConfig, read_yaml(file), where=file)
    except UserError as error:
        return Answer(file, False, str(error).removeprefix(f"{file}: "))
    try:
        check_latents(config, store.manifest)
        check_classes(with_classes(config, store.manifest), store.manifest)
    except UserError as error:
        return Answer(file, False, f"{MISFIT}{error}")
    answers = [
        _answer_stream(store, file, one, incomplete, place(number))
        for number, one in enumerate(config.alignment.streams)
    ]
    if config.student.class_token is not None:
        answers.append(_answer_class_token(store, file, config, incomplete))
    if config.student.family == "MMDiT":
        answers.append(_answer_captions(store, file, config, incomplete))
    if (warning := ignored_captions(config, store.manifest)) is not None:
        answers.append(Answer(file, True, warning))
    return _combine(answers) if answers else Answer(file, True)


def _answer_captions(store: Store, file: str, config: RunConfig, incomplete: set[str]) -> Answer:
    """The answer for the text stream of a student that reads captions."""
    manifest, stated = store.manifest, config.diffusion.text_stream
    held = manifest.text_streams
    failed: UserError | None = None
    for name in held if stated is None else [stated]:
        try:
            with_text(config, manifest, name)
        except UserError as error:
            failed = error
            continue
        if name not in incomplete:
            if stated is not None or len(held) == 1:
                return Answer(file, True)
            setting = ("diffusion.text_stream", name)
            return Answer(file, True, _chosen(setting), settings=(setting,))
        reason = f"text stream '{name}' lacks {len(store.missing_shards(name))} shards"
        return Answer(file, False, reason, _stream_command(store, name))
    if failed is not None:
        return Answer(file, False, str(failed))
    if manifest.dataset.captions is None:
        return Answer(file, False, f"{config.student.model} reads captions: the data set has none")
    reason = f"{config.student.model} reads captions: the store holds none"
    return Answer(file, False, reason, _stream_command(store, TEXT))


def _answer_class_token(store: Store, file: str, config: RunConfig, incomplete: set[str]) -> Answer:
    """The answer for the class stream of a student with a class token."""
    alignment = config.alignment
    if alignment.active and alignment.stream is None:  # the one that the answer of the stream names
        reasons = _refusals(store, alignment, place(0))
        named = (n for n, reason in reasons.items() if reason is None and n not in incomplete)
        alignment = alignment.model_copy(update={"stream": next(named, None)})
        config = config.model_copy(update={"alignment": alignment})
    try:
        name = choose_class_stream(config, store.manifest, config.diffusion.class_stream)
    except UserError as error:
        wanted = _missing_class_stream(store.manifest, config)
        if wanted is None:
            return Answer(file, False, str(error))
        reason = "the store holds no class tokens of the teacher"
        return Answer(file, False, reason, _stream_command(store, wanted))
    if name in incomplete:
        reason = f"class stream '{name}' lacks {len(store.missing_shards(name))} shards"
        computed = store.manifest.class_streams[name].converted_from
        command = _stream_command(store, name) if computed else None
        return Answer(file, False, reason, command)
    return Answer(file, True)


def _missing_class_stream(manifest: Manifest, config: RunConfig) -> str | None:
    """Name for the class stream of the teacher that a config aligns to, by default of the store's
    first; None where it is there, the teacher has no class token of the student's width, or the
    config names another stream."""
    held = manifest.teacher_streams
    name = config.alignment.stream or next(iter(held), None)
    if config.diffusion.class_stream is not None or name is None or name not in held:
        return None
    teacher = held[name].teacher
    if not teacher.prefix or teacher.width != config.student.class_token:
        return None
    if any(s.teacher.same_network(held[name].teacher) for s in manifest.class_streams.values()):
        return None
    return class_stream_name(name, added=held[name].added)


def _stream_command(store: Store, name: str) -> str:
    options = ["--store", store.shown_url, "--add-stream", name]
    return shlex.join(["python", "-m", "pipeline.extract", *options])


def _combine(answers: list[Answer]) -> Answer:
    """One answer for a config with several streams: the reasons and commands of those that cannot
    be trained on, or the options to set."""
    failed = [answer for answer in answers if not answer.ok]
    chosen = failed or answers
    reasons = dict.fromkeys(answer.reason for answer in chosen if answer.reason is not None)
    commands = dict.fromkeys(answer.command for answer in chosen if answer.command is not None)
    separator = "; " if failed else " "
    return Answer(
        answers[0].config,
        not failed,
        separator.join(reasons) or None,
        " && ".join(commands) or None,
        tuple(setting for answer in chosen for setting in answer.settings),
    )


def _answer_stream(
    store: Store, file: str, alignment: StreamAlignment, incomplete: set[str], at: str
) -> Answer:
    """The answer for the options of one stream; ``at``: their key."""
    key = f"{at}.stream"
    manifest = store.manifest
    held = manifest.teacher_streams
    requested = alignment.stream
    reasons = _refusals(store, alignment, at)
    names = list(reasons)
    suitable = [name for name in names if reasons[name] is None]
    complete = [name for name in suitable if name not in incomplete]
    if complete:
        # with one stream, or a stream in the config, there is nothing to choose
        settings = ((key, complete[0]),) if requested is None and len(held) > 1 else ()
        try:
            warning = coarse_codec(store, complete[0], alignment)
        except UserError as error:  # a file of the stream cannot be read
            return Answer(file, False, str(error))
        notes = [*map(_chosen, settings), *([warning] if warning else [])]
        return Answer(file, True, "; ".join(notes) or None, settings=settings)
    if suitable:
        name = suitable[0]
        reason = f"stream '{name}' lacks {len(store.missing_shards(name))} shards"
        suggested = suggest_extraction(store, name, held[name].teacher.layers)
        return Answer(file, False, reason, suggested.command)
    if not held:
        reason = "the store holds no teacher stream"
    elif not names:
        reason = f"the store holds no teacher stream '{requested}', only {', '.join(held)}"
    else:
        reason = "; ".join(
            _missing_layers(store, name, alignment) or reason or ""
            for name, reason in reasons.items()
        )
    try:
        aligned = alignment.teacher_layers if alignment.attention_weight or not held else ()
        layers = {*aligned, *(alignment.target_layers or ())}
        cut: Cut | None = "activations" if alignment.target != STORED else None
        suggested = suggest_extraction(store, requested, sorted(layers), cut)
    except UserError as error:
        return Answer(file, False, f"{reason}; {error}")
    if held and suggested.stream != requested:
        reason += f"; once it is added, train {_chosen((key, suggested.stream))}"
    return Answer(file, False, reason, suggested.command)


def _refusals(store: Store, alignment: StreamAlignment, at: str) -> dict[str, str | None]:
    """Each teacher stream that ``alignment`` may mean, and why it cannot serve it; None: it can."""
    held = store.manifest.teacher_streams
    found: dict[str, str | None] = {}
    for name in held:
        if alignment.stream not in {None, name}:
            continue
        try:
            check_stream(alignment.model_copy(update={"stream": name}), store.manifest, at=at)
            if held[name].cut in {"activations", "image"}:
                check_tail(store, name)
            found[name] = None
        except UserError as error:
            found[name] = str(error)
    return found


def _missing_layers(store: Store, name: str, alignment: StreamAlignment) -> str | None:
    """Sentence about the layers that one stream lacks; None if it has all."""
    held = store.manifest.teacher_streams[name].teacher.layers
    missing_layers = (
        sorted(set(alignment.teacher_layers) - set(held)) if alignment.attention_weight else []
    )
    if not missing_layers:
        return None
    return (
        f"stream '{name}' lacks teacher layer {', '.join(map(str, missing_layers))} (it has "
        f"{', '.join(map(str, held)) or 'none'})"
    )
