"""`--check`: which training configs a store can serve, and what would make it serve the others."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.cli.config_files import read_yaml
from pipeline.inspect.suggest_extraction import addition
from pipeline.runs.compatibility import check_latents
from pipeline.store import Store
from pipeline.targets.sources import check_fit
from pipeline.targets.tail import check_tail
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.validation import validate


class Answer(NamedTuple):
    """Whether one config can be trained on the store."""

    config: str
    """The file, as it was named."""
    ok: bool
    reason: str | None = None
    """Why not; or, where it can, what to choose."""
    command: str | None = None
    """What would add what is missing, and only that; None where only another store will do."""

    def __str__(self) -> str:
        line = f"{'yes' if self.ok else 'no ':<4} {self.config}"
        if self.reason is not None:
            line += f" ({self.reason})" if self.ok else f": {self.reason}"
        return line if self.command is None else f"{line}; add it with: {self.command}"


def check_configs(store: Store, files: tuple[str, ...]) -> list[Answer]:
    """An answer for each config file, in their order."""
    base = store.missing_shards()
    if base:
        missing = f"{len(base)} of the store's {store.manifest.num_shards} shards are missing"
        reason = f"{missing}: run its extraction again"
        return [Answer(file, False, reason) for file in files]
    incomplete = {name for name in store.added_streams if store.missing_shards(name)}
    return [_answer(store, file, incomplete) for file in files]


def answers_as_json(answers: list[Answer]) -> dict[str, Any]:
    """All answers, and whether each is a yes."""
    return {
        "configs": [answer._asdict() for answer in answers],
        "ok": all(answer.ok for answer in answers),
    }


def _answer(store: Store, file: str, incomplete: set[str]) -> Answer:
    try:
        config = validate(RunConfig, read_yaml(file), where=file)
    except UserError as error:
        return Answer(file, False, str(error).removeprefix(f"{file}: "))
    try:
        check_latents(config, store.manifest)
    except UserError as error:
        return Answer(file, False, f"it needs another store: {error}")
    if not config.alignment.active:
        return Answer(file, True)
    return _answer_alignment(store, file, config.alignment, incomplete)


def _answer_alignment(
    store: Store, file: str, alignment: AlignmentConfig, incomplete: set[str]
) -> Answer:
    manifest = store.manifest
    held = manifest.teacher_streams
    asked = alignment.stream
    names = [name for name in held if asked in {None, name}]
    reasons: dict[str, str] = {}
    for name in names:
        try:
            check_fit(alignment.model_copy(update={"stream": name}), manifest)
            if held[name].cut in {"activations", "image"}:
                check_tail(store, name)
        except UserError as error:
            reasons[name] = str(error)
    fitting = [name for name in names if name not in reasons]
    complete = [name for name in fitting if name not in incomplete]
    if complete:
        # a store of one stream needs no choice, nor does a config that has made it
        choose = asked is None and len(held) > 1
        return Answer(file, True, f"with --alignment.stream {complete[0]}" if choose else None)
    if fitting:
        name = fitting[0]
        reason = f"stream '{name}' lacks {len(store.missing_shards(name))} shards"
        begun = addition(store, name, held[name].teacher.layers)
        return Answer(file, False, reason, begun.command)
    if not held:
        reason = "the store holds no teacher stream"
    elif not names:
        reason = f"the store holds no teacher stream '{asked}', only {', '.join(held)}"
    else:
        reason = "; ".join(_about(store, name, alignment) or reasons[name] for name in names)
    try:
        more = addition(store, asked, alignment.teacher_layers)
    except UserError as error:
        return Answer(file, False, f"{reason}; {error}")
    if held and more.stream != asked:  # else there is nothing to choose
        reason += f"; once it is added, train with --alignment.stream {more.stream}"
    return Answer(file, False, reason, more.command)


def _about(store: Store, name: str, alignment: AlignmentConfig) -> str | None:
    """What one stream lacks, in short."""
    held = store.manifest.teacher_streams[name].teacher.layers
    lacking = (
        sorted(set(alignment.teacher_layers) - set(held)) if alignment.attention_weight else []
    )
    if not lacking:
        return None
    return (
        f"stream '{name}' lacks teacher layer {', '.join(map(str, lacking))} (it has "
        f"{', '.join(map(str, held)) or 'none'})"
    )
