"""Options from defaults, presets, YAML and the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.options import leaf_fields, parse_options
from pipeline.cli.yaml12 import dump_yaml, load_yaml
from schemas.alignment import FixedStep, ResidualPlateau
from schemas.errors import UserError, plain_text
from schemas.extract import PRESETS, ExtractConfig
from schemas.inspect import InspectConfig
from schemas.report import ReportConfig
from schemas.run import RunConfig

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def extraction(*argv: str) -> ExtractConfig:
    return parse_options(
        ExtractConfig, list(argv), command="c", about="a", presets=PRESETS, preset_key="dataset"
    )


def training(*argv: str) -> RunConfig:
    return parse_options(RunConfig, list(argv), command="c", about="a")


def inspection(*argv: str) -> InspectConfig:
    return parse_options(InspectConfig, list(argv), command="c", about="a", positional="store")


def complaint(call: Any, *argv: str) -> str:
    """The message of the ``UserError``, which must be one line."""
    with pytest.raises(UserError) as error:
        call(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_defaults_then_preset_then_yaml_then_command_line(yaml_file: Any) -> None:
    default, preset = ExtractConfig(), extraction("--dataset", "demo")
    assert (default.resolution, default.shard_size, default.batch_size) == (256, 64, 32)
    assert (preset.resolution, preset.shard_size, preset.batch_size) == (32, 128, 32)
    assert preset.teacher.weights == "demo"

    file = yaml_file("dataset: demo\nshard_size: 7\nbatch_size: 9\nteacher: {seed: 3}")
    mixed = extraction("--config", file, "--batch-size", "11")
    assert (mixed.resolution, mixed.shard_size, mixed.batch_size) == (32, 7, 11)
    assert (mixed.teacher.seed, mixed.teacher.weights) == (3, "demo")


def test_only_what_was_given_counts_as_set(yaml_file: Any) -> None:
    file = yaml_file("shard_size: 7\nteacher: {seed: 3}")
    config = extraction("--dataset", "demo", "--config", file, "--layers", "2-3")
    assert config.model_fields_set == {"dataset", "shard_size", "teacher", "layers"}
    assert config.teacher.model_fields_set == {"seed"}
    assert (config.resolution, config.teacher.weights) == (32, "demo")
    said = {"dataset": "demo", "shard_size": 7, "teacher": {"seed": 3}, "layers": (2, 3)}
    assert config.model_dump(exclude_unset=True) == said
    assert extraction().model_fields_set == set()
    assert extraction().cut == "activations"


def test_a_later_config_overrides_an_earlier_one(yaml_file: Any) -> None:
    first = yaml_file("steps: 5\nseed: 1", "first.yaml")
    second = yaml_file("steps: 6", "second.yaml")
    config = training("--seed", "2", "--config", first, "--config", second)
    assert (config.steps, config.seed) == (6, 2)


def test_yaml_inherits_from_its_base_through_several_files(yaml_file: Any) -> None:
    yaml_file("steps: 5\nglobal_batch: 8\noptimizer: {eps: 1e-3, weight_decay: 0.5}", "root.yaml")
    yaml_file("base: root.yaml\nglobal_batch: 9\noptimizer: {eps: 0.25}", "middle.yaml")
    config = training("--config", yaml_file("base: middle.yaml\nsteps: 7", "leaf.yaml"))
    assert (config.steps, config.global_batch) == (7, 9)
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (0.25, 0.5)


def test_yaml_that_is_its_own_base_is_an_error(yaml_file: Any) -> None:
    yaml_file("base: b.yaml", "a.yaml")
    assert "leads back" in complaint(training, "--config", yaml_file("base: a.yaml", "b.yaml"))


def test_dotted_options_change_one_leaf_of_a_yaml_mapping(yaml_file: Any) -> None:
    file = yaml_file("alignment: {feature_weight: 0.25, attention_weight: 0.75}")
    config = training("--config", file, "--alignment.feature-weight", "2")
    assert (config.alignment.feature_weight, config.alignment.attention_weight) == (2.0, 0.75)


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--optimizer.learning-rate", "1e-4"], "optimizer.learning_rate", 1e-4),
        (["--optimizer.learning-rate=3"], "optimizer.learning_rate", 3.0),
        (["--optimizer.betas", "0.9,1e-3"], "optimizer.betas", (0.9, 1e-3)),
        (["--optimizer.betas", "[0.5, 0.6]"], "optimizer.betas", (0.5, 0.6)),
        (["--steps", "1e5"], "steps", 100_000),
        (["--workers.max-failures", "-1"], "workers.max_failures", -1),
        (["--workers.max_failures", "7"], "workers.max_failures", 7),
        (["--wandb", "none"], "wandb", None),
        (["--wandb", "12"], "wandb", "12"),
        (["--name", "none"], "name", "none"),
        (["--data.verify"], "data.verify", True),
        (["--data.verify", "false"], "data.verify", False),
        (["--data.verify=false"], "data.verify", False),
        (["--data.verify", "--seed", "4"], "seed", 4),
        (["--precision", "bfloat16"], "precision", "bfloat16"),
        (["--alignment.termination", "none"], "alignment.termination", None),
    ],
)
def test_types_of_training_options(argv: list[str], path: str, value: object) -> None:
    found: Any = training(*argv)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1,2,3", (1, 2, 3)),
        ("7-11", (7, 8, 9, 10, 11)),
        ("1-3, 7", (1, 2, 3, 7)),
        ("4", (4,)),
        ("[2, 5]", (2, 5)),
    ],
)
def test_layers_are_lists_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert extraction("--layers", text).layers == layers


@pytest.mark.parametrize("text", ["11-7", "a", "", "3,1", "[1,", "-1", "0-100000"])
def test_layers_that_make_no_sense_are_refused(text: str) -> None:
    assert "layers" in complaint(extraction, f"--layers={text}")


def value_of(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "018", 18),
        ("steps", "010", 10),
        ("steps", "+5", 5),
        ("steps", "1_000", 1000),
        ("steps", "1e3", 1000),
        ("steps", "1.5e3", 1500),
        ("steps", " 7 ", 7),
        ("seed", "-007", -7),
        ("seed", "9007199254740993", 9007199254740993),
        ("workers.min_count", "01", 1),
        ("optimizer.eps", ".5", 0.5),
        ("optimizer.eps", "5.", 5.0),
        ("optimizer.eps", "010.5", 10.5),
        ("optimizer.eps", "08", 8.0),
        ("optimizer.max_grad_norm", "inf", math.inf),
        ("optimizer.max_grad_norm", ".inf", math.inf),
        ("optimizer.betas", "0.010,00.9", (0.01, 0.9)),
        ("optimizer.betas", "[.010, 0.9]", (0.01, 0.9)),
        ("samples.classes", "010-012", (10, 11, 12)),
        ("samples.classes", "010,012", (10, 12)),
        ("samples.classes", "010, 08-09", (10, 8, 9)),
        ("samples.classes", "[010, 011]", (10, 11)),
        ("samples.classes", "017", (17,)),
        ("name", "018", "018"),
        ("store", "1:30", "1:30"),
        ("store", "2020-01-01", "2020-01-01"),
        ("data.verify", "off", False),
        ("data.verify", "no", False),
        ("data.verify", "yes", True),
        ("data.verify", "On", True),
        ("compute.compile", "off", "off"),
        ("compute.compile", "on", "on"),
    ],
)
def test_numbers_on_a_command_line_are_decimal(path: str, text: str, value: object) -> None:
    found = value_of(training(f"--{path}", text), path)
    assert found == value
    assert type(found) is type(value)
    assert value_of(training(f"--{path}={text}"), path) == value


@pytest.mark.parametrize(
    "path", ["steps", "optimizer.eps", "alignment.student_layers", "workers.min_count"]
)
@pytest.mark.parametrize(
    "text",
    [
        "1:30",
        "0x10",
        "0b1",
        "0o17",
        "1__0",
        "_1",
        "yes",
        "on",
        "true",
        "~",
        "",
        "2020-01-01",
        "nan",
        "NaN",
        ".nan",
        "1:2-1:4",
        "0x1-0x3",
        "٣",
        "1,,2",
        "1,2,",
        "--1",
        "1 2",
        "1-2-3",
        "1_-2",
        "1e2-1e3",
    ],
)
def test_words_that_are_not_decimal_numbers_are_refused(path: str, text: str) -> None:
    message = complaint(training, f"--{path}={text}")
    assert path.rpartition(".")[2].replace("_", "-") in message.replace("_", "-")


@pytest.mark.parametrize(
    "text",
    ["1:30", "0x10", "0b1", "1__0", "1_000", "1,,2", "1,2,", "-1", "1-2-3", "1e2", "1:2-1:4"],
)
def test_words_that_look_like_numbers_are_not_names_of_classes(text: str) -> None:
    assert "samples.classes" in complaint(training, f"--samples.classes={text}")


@pytest.mark.parametrize("text", ["inf", "nan", "1e400"])
@pytest.mark.parametrize(
    "path",
    ["optimizer.learning_rate", "optimizer.betas", "data.memory_gb", "samples.sampler.guidance"],
)
def test_numbers_that_are_not_finite_are_refused(path: str, text: str) -> None:
    assert complaint(training, f"--{path}", f"0.9,{text}" if path.endswith("betas") else text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("018", 18),
        ("1e3", 1000.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("none", "none"),
        ("2020-01-01", "2020-01-01"),
        ("[010, 1_0]", [10, 10]),
        ("{a: 010, b: [1e-3]}", {"a": 10, "b": [0.001]}),
        ("'010'", "010"),
        ('"1:30"', "1:30"),
        ("token", "token"),
    ],
)
def test_words_without_a_type(text: str, value: object) -> None:
    config = extraction(f"--teacher.model-args.x={text}")
    assert config.teacher.model_args["x"] == value
    assert type(config.teacher.model_args["x"]) is type(value)


@pytest.mark.parametrize(
    "text",
    ["1:30", "0x10", "0b1", "0o17", "yes", "Off", "[1, no]", "{a: 0x1F}", "{a: 1:30}", "nan"],
)
def test_words_without_a_type_that_may_mean_another_thing_are_refused(text: str) -> None:
    message = complaint(extraction, f"--teacher.model-args.x={text}")
    assert message.startswith("option --teacher.model-args.x: '")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("steps: 017", "steps", 17),
        ("steps: 018", "steps", 18),
        ("steps: 0o17", "steps", 15),
        ("steps: 0x10", "steps", 16),
        ("steps: 1e3", "steps", 1000),
        ("optimizer: {eps: 1e-3}", "optimizer.eps", 1e-3),
        ("optimizer: {eps: .5}", "optimizer.eps", 0.5),
        ("optimizer: {max_grad_norm: .inf}", "optimizer.max_grad_norm", math.inf),
        ("compute: {compile: on}", "compute.compile", "on"),
        ("compute: {compile: off}", "compute.compile", "off"),
        ("name: off", "name", "off"),
        ("store: 2020-01-01", "store", "2020-01-01"),
        ("store: 1:30", "store", "1:30"),
        ("data: {verify: false}", "data.verify", False),
        ("data: {verify: no}", "data.verify", False),
        ("samples: {classes: 010-012}", "samples.classes", (10, 11, 12)),
        ("samples: {classes: [010, 0o17]}", "samples.classes", (10, 15)),
        ("wandb: ~", "wandb", None),
        ("wandb:", "wandb", None),
        ("data: &d {window: 3}", "data.window", 3),
        ("data: {<<: {window: 3, prefetch: 4}, window: 5}", "data.window", 5),
    ],
)
def test_yaml_follows_version_1_2(yaml_file: Any, text: str, path: str, value: object) -> None:
    found = value_of(training("--config", yaml_file(text)), path)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "steps: 1:30",
        "steps: yes",
        "steps: true",
        "steps: 0b11",
        "steps: 2020-01-01",
        "name: 017",
        "samples: {classes: 1:30}",
        "samples: {classes: true}",
        "optimizer: {eps: on}",
    ],
)
def test_yaml_of_version_1_1_is_refused(yaml_file: Any, text: str) -> None:
    assert complaint(training, "--config", yaml_file(text)).startswith(yaml_file(text))


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "No"])
def test_a_text_that_counts_as_true_is_refused_among_arguments(yaml_file: Any, word: str) -> None:
    for value in (word, f"[1, {word}]", f"{{x: {word}}}"):
        file = yaml_file(f"teacher: {{model_args: {{no: 1, qkv_bias: {value}}}}}")
        message = complaint(extraction, "--config", file)
        assert message.startswith(f"{file}: teacher.model_args: '{word}' is a text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nseed: 1\nsteps: 4", "key 'steps' is there twice, on lines 1 and 3"),
        ('optimizer:\n  eps: 1\n  "eps": 2', "key 'eps' is there twice, on lines 2 and 3"),
        ("data: {window: 2, window: 2}", "key 'window' is there twice, on lines 1 and 1"),
    ],
)
def test_a_repeated_key_is_named(yaml_file: Any, text: str, message: str) -> None:
    file = yaml_file(text)
    assert complaint(training, "--config", file) == f"{file}: {message}"
    message = complaint(extraction, "--teacher.model-args={depth: 1, depth: 2}")
    assert message.startswith("option --teacher.model-args: key 'depth' is there twice")


def test_merged_keys_are_not_repeated_ones(yaml_file: Any) -> None:
    """A merged mapping is itself merged into another."""
    text = """
x: &a {samples: 3}
y: &b {<<: *a, samples: 4}
z: {<<: *b, samples: 5}
w: {<<: *b}
"""
    assert load_yaml(text) == {n: {"samples": s} for n, s in zip("xyzw", (3, 4, 5, 4), strict=True)}


@pytest.mark.parametrize(
    "value",
    [
        *[
            "018",
            "0o17",
            "0x1F",
            "1e3",
            "1:30",
            "on",
            "no",
            "~",
            "",
            "null",
            "2020-01-01",
            "1_000",
            ".5",
            "text",
        ],
        *(True, None, 17, 0.1, 1e-8, 1e30, math.inf, [1, "1"]),
    ],
)
def test_both_versions_of_yaml_read_what_is_written(value: object) -> None:
    text = dump_yaml({"key": value})
    for read in (load_yaml, yaml.safe_load):
        (found,) = read(text).values()
        assert found == value
        assert type(found) is type(value)


def test_entries_of_a_table_add_up() -> None:
    argv = ["--teacher.model-args.depth", "6", "--teacher.model-args.embed-dim=96"]
    assert extraction(*argv).teacher.model_args == {"depth": 6, "embed_dim": 96}
    args = extraction("--dataset", "demo", *argv[:2]).teacher.model_args
    assert args == {**PRESETS["demo"]["teacher"]["model_args"], "depth": 6}
    assert extraction("--teacher.model-args", "{depth: 3}").teacher.model_args == {"depth": 3}


def test_the_argument_without_dashes_fills_the_positional_option() -> None:
    config = inspection("--json", "s3://bucket/store")
    assert config.store == "s3://bucket/store"
    assert config.as_json
    assert "unexpected argument 'b'" in complaint(inspection, "a", "b")
    assert "unexpected argument 'a'" in complaint(training, "a")


def test_a_positional_option_of_several_words_takes_them_wherever_they_stand() -> None:
    def report(*argv: str) -> ReportConfig:
        return parse_options(ReportConfig, list(argv), command="c", about="a", positional="runs")

    config = report("a,b", "--json", "c", "--html", "x.html", "d")
    assert config.runs == ("a,b", "c", "d")
    assert config.as_json
    assert config.html == "x.html"
    assert report("--html", "x").runs == ()


@pytest.mark.parametrize(
    ("call", "option", "right"),
    [
        (extraction, "--shard-sise", "--shard-size"),
        (extraction, "--teacher.wieghts", "--teacher.weights"),
        (extraction, "--weights", "--teacher.weights"),
        (training, "--feature-weight", "--alignment.feature-weight"),
        (training, "--optimizer.lerning_rate", "--optimizer.learning-rate"),
        (training, "--confg", "--config"),
    ],
)
def test_unknown_option_suggests_the_right_one(call: Any, option: str, right: str) -> None:
    message = complaint(call, option, "1")
    assert f"unknown option {option}" in message
    assert f"'{right}'" in message


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("stesp: 3", "stesp", "steps"),
        ("optimizer: {learnin_rate: 3}", "optimizer.learnin_rate", "learning_rate"),
    ],
)
def test_unknown_yaml_key_names_the_file_and_the_right_key(
    yaml_file: Any, text: str, wrong: str, right: str
) -> None:
    file = yaml_file(text)
    for more in ([], ["--store", "x"]):
        message = complaint(training, "--config", file, *more)
        assert message.startswith(f"{file}: unknown key '{wrong}'")
        assert f"'{right}'" in message


def test_wrong_values_are_one_line_that_names_every_key() -> None:
    message = complaint(training, "--steps", "many", "--optimizer.eps", "-1")
    assert "steps" in message
    assert "optimizer.eps" in message
    assert "resolution" in complaint(extraction, "--resolution", "8")
    assert "precision" in complaint(training, "--precision", "float8")
    assert "model_args" in complaint(extraction, "--teacher.model-args", "{a: ")


@pytest.mark.parametrize("argv", [["--store"], ["--store", "--steps", "3"], ["--config"]])
def test_missing_value_is_named(argv: list[str]) -> None:
    assert complaint(training, *argv) == f"option {argv[0]} needs a value"


def test_models_that_contradict_themselves_are_refused() -> None:
    assert "feature_depth 13" in complaint(
        training, "--student.model", "SiT-B/2", "--alignment.feature-depth", "13"
    )
    assert "do not pair up" in complaint(training, "--alignment.student-layers", "1,2")
    assert "global_batch 3" in complaint(training, "--global-batch", "3", "--workers.count", "4")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1,\nb: 2", "not YAML"),
        ("- 1\n- 2", "expected a mapping of options, found list"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("base: nowhere.yaml", "nowhere.yaml: cannot read"),
    ],
)
def test_broken_yaml_is_one_line_that_names_the_file(
    yaml_file: Any, text: str, reason: str
) -> None:
    file = yaml_file(text)
    message = complaint(training, "--config", file)
    assert str(Path(file).parent) in message
    assert reason in message


def test_unreadable_yaml_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert complaint(training, "--config", missing).startswith(f"{missing}: cannot read")
    assert "cannot read this config" in complaint(training, "--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not YAML" in complaint(training, "--config", str(tmp_path / "binary.yaml"))


def test_empty_yaml_is_all_defaults(yaml_file: Any) -> None:
    assert training("--config", yaml_file("# nothing")) == RunConfig()


# design.md, section 5: feature depth, student <- teacher layers, termination, batch; and the
# published size and length of each run.
PAPER = {
    "sit_b2": (12, 5, (2, 3, 4), (7, 9, 11), 100_000, 400_000),
    "sit_l2": (24, 8, (4, 5, 6, 7), (8, 9, 10, 11), 250_000, 400_000),
    "sit_xl2": (28, 8, (4, 5, 6, 7), (8, 9, 10, 11), 250_000, 500_000),
}
WEIGHTS = {"haste": (0.5, 0.5), "repa": (0.5, 0.0), "vanilla": (0.0, 0.0)}


@pytest.mark.parametrize("recipe", WEIGHTS)
@pytest.mark.parametrize("student", PAPER)
def test_configs_have_the_numbers_of_the_paper(student: str, recipe: str) -> None:
    config = training("--config", str(CONFIGS / f"{student}_{recipe}.yaml"))
    depth, feature_depth, student_layers, teacher_layers, end, steps = PAPER[student]
    alignment = config.alignment
    assert config.name == f"{student}_{recipe}"
    assert config.student.model == f"SiT-{student.removeprefix('sit_').upper()[:-1]}/2"
    assert (config.student.size.depth, config.student.num_classes) == (depth, 1000)
    assert (alignment.feature_weight, alignment.attention_weight) == WEIGHTS[recipe]
    assert alignment.feature_depth == feature_depth
    assert alignment.student_layers == student_layers
    assert alignment.teacher_layers == teacher_layers
    assert alignment.projector_width == 2048
    if recipe == "haste":
        assert alignment.termination is not None
        assert (alignment.termination.kind, alignment.termination.step) == ("fixed", end)  # type: ignore[union-attr]
    else:
        assert alignment.termination is None
    assert (config.global_batch, config.steps) == (256, steps)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_loads_with_the_shared_settings_of_the_paper(file: Path) -> None:
    config = training("--config", str(file))
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.0)
    assert (optimizer.eps, optimizer.max_grad_norm) == (1e-8, 1.0)
    assert (config.diffusion.path, config.diffusion.label_drop) == ("linear", 0.1)
    if file.stem != "demo":
        assert (optimizer.learning_rate, config.ema_decay) == (1e-4, 0.9999)
        assert config.global_batch == 256


@pytest.mark.parametrize(
    ("call", "model"),
    [(extraction, ExtractConfig), (training, RunConfig), (inspection, InspectConfig)],
)
def test_help_lists_every_option_with_a_description(
    call: Any, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        call("--help")
    assert leaving.value.code == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    for name, field in leaf_fields(model):
        option = f"  --{name.replace('_', '-')}"
        at = [i for i, line in enumerate(lines) if line.split("  (")[0].split(" {")[0] == option]
        assert at, option
        assert field.description, option
        assert any(lines[i + 1].strip() == " ".join(field.description.split()) for i in at), option


def test_help_shows_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        extraction("--help")
    page = capsys.readouterr().out
    assert "--precision {auto,float32,bfloat16,float16}  (default auto)" in page
    assert "--source  (default none)" in page
    # a data set's preset is told where it differs
    assert "--layers  (default 7,8,9,10,11; with --dataset demo: 2,3,4,5)" in page
    same = "with --dataset imagenet or coco or coco256_features: activations"
    assert f"  (default maps; {same})" in page
    assert "--teacher.weights  (default hub; with --dataset demo: demo)" in page


def test_a_codec_that_does_not_exist_is_told_which_ones_do() -> None:
    for name in ("tokens0", "int4", "sqrt", "tokens20\n"):
        message = complaint(extraction, f"--column-codecs.tokens={name!r}")
        assert "column_codecs.tokens: 'tokens" in message or f"'{name}' is not a codec" in message
        assert "is not a codec: there are float32, " in message
        assert "[1-9]" not in message


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (["s", "--check", "a.yaml"], ("a.yaml",)),
        (["s", "--check", "a.yaml", "b-1-2.yaml", "123"], ("a.yaml", "b-1-2.yaml", "123")),
        (["s", "--check", "a.yaml,b.yaml", "c"], ("a.yaml", "b.yaml", "c")),
        (["--check=a.yaml", "b.yaml", "--json", "s"], ("a.yaml", "b.yaml")),
    ],
)
def test_several_words_follow_an_option_of_texts(argv: list[str], files: tuple[str, ...]) -> None:
    config = inspection(*argv)
    assert (config.check, config.store) == (files, "s")


def test_an_option_of_texts_needs_one() -> None:
    assert "--check needs a value" in complaint(inspection, "s", "--check")
    assert "--check needs a value" in complaint(inspection, "s", "--check", "--json")


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert plain_text("a\n b\x1b[31m\u202e é") == "a b\\x1b[31m\\u202e é"
    assert plain_text("file\udcff") == "file\\udcff"


def test_termination_is_at_a_fixed_step_by_default(tmp_path: Path) -> None:
    def termination(*argv: str) -> Any:
        return training(*argv).alignment.termination

    assert termination("--alignment.termination.step", "5") == FixedStep(step=5)
    kind = ("--alignment.termination.kind", "fixed")
    assert termination("--alignment.termination.step", "5", *kind) == FixedStep(step=5)
    assert termination(*kind, "--alignment.termination.step", "5") == FixedStep(step=5)
    file = tmp_path / "run.yaml"
    file.write_text("alignment: {termination: {step: 7, dry: true}}")
    assert termination("--config", str(file)) == FixedStep(step=7, dry=True)
    assert termination("--alignment.termination.kind", "residual_plateau") == ResidualPlateau(
        kind="residual_plateau"
    )
    kinds = "'fixed', 'gradient_cosine', 'residual_plateau'"
    with pytest.raises(UserError, match=f"alignment.termination: .*'never' .* {kinds}"):
        termination("--alignment.termination.kind", "never")
