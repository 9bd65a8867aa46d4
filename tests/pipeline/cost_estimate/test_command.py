"""The two ends that a plan must tell apart, and the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train_haste import main as train_main
from pipeline.cli.config_files import read_yaml
from pipeline.cost_estimate.command import DEFAULT_TRAINER
from pipeline.cost_estimate.estimate import aligned_steps
from pipeline.cost_estimate.report import WIDTH
from pipeline.extract.__main__ import main as extract_main
from schemas.alignment import FixedStep, ResidualPlateau
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from schemas.validation import validate

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "jobs" / "configs"
H100 = ("--plan.tflops", "200")
SEVEN_B = (
    *("--teacher.model", "vit_7b_patch16_dinov3.lvd1689m"),
    *("--plan.trainer", str(CONFIGS / "sit_b2_haste.yaml")),
)
DEMO = ("--dataset", "demo", "--plan.trainer", str(CONFIGS / "demo.yaml"))


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert extract_main(["--plan", "--json", *argv]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.endswith("\n")
    result: dict[str, Any] = json.loads(out)
    return result


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        extract_main(["--plan", *argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def row(result: dict[str, Any], cut: str, codec: str) -> dict[str, Any]:
    (found,) = [r for r in result["cuts"] if (r["cut"], r["codec"]) == (cut, codec)]
    assert isinstance(found, dict)
    return found


def test_little_to_save_and_only_a_small_store_pays(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *H100)
    online = row(result, "image", "uint8")
    assert online["teacher_share_of_step"] == pytest.approx(0.065, abs=0.002)
    assert result["recommended"] == {"cut": "activations", "codec": "faithful"}
    assert not result["online_is_better"]
    assert row(result, "activations", "faithful")["break_even_runs"] == 1
    # the big stores save more compute, and cost more than that is worth
    for cut in ("maps", "qk"):
        big = row(result, cut, "faithful")
        assert big["bytes"] > 9 * row(result, "activations", "faithful")["bytes"]
        assert big["cost_per_run"] < online["cost_per_run"]
        assert big["break_even_runs"] > result["runs"]
    best = row(result, "activations", "faithful")
    for cut in ("maps", "qk"):
        big = row(result, cut, "faithful")
        assert big["storage_cost_per_month"] > best["storage_cost_per_month"]
        assert big["cost_per_run"] < best["cost_per_run"]
    assert result["reasons"][0].startswith("The online teacher takes 6.6% of a vanilla step")


def test_no_coarser_codec_is_taken_for_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *H100)
    small, best = row(result, "activations", "small"), row(result, **result["recommended"])
    assert small["cost"] < best["cost"]
    assert not small["candidate"]
    assert best["candidate"]
    assert any("with larger errors: --codec small" in reason for reason in result["reasons"])
    chosen = plan(capsys, *H100, "--codec", "small")
    assert chosen["recommended"] == {"cut": "activations", "codec": "small"}


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "float32"])
def test_a_chosen_codec_is_weighed(capsys: pytest.CaptureFixture[str], codec: str) -> None:
    result = plan(capsys, *H100, "--codec", codec)
    candidates = {(c["cut"], c["codec"]) for c in result["cuts"] if c["candidate"]}
    cached = {(cut, codec) for cut in ("maps", "qk", "activations")}
    assert candidates == cached | {("image", "uint8")}
    assert len(result["cuts"]) == 3 * 4 + 1
    plain = plan(capsys, *H100, "--codec", codec, "--compress", "false")
    for cut, name in cached:
        more = row(plain, cut, name)["bytes"] > row(result, cut, name)["bytes"]
        assert more is (codec != "float32")


def test_one_cheap_run_with_big_tokens_is_better_off_online(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prices = ("--plan.runs", "1", "--plan.prices.device-hour", "1", "--codec", "float16")
    result = plan(capsys, *H100, *prices)
    assert result["online_is_better"]
    assert result["recommended"] == {"cut": "image", "codec": "uint8"}
    assert any("is cheaper than" in reason for reason in result["reasons"])


@pytest.mark.parametrize(
    "layers",
    [(), ("--layers", "26,32,39", "--plan.trainer", "DEEP")],
    ids=["the paper's layers", "the same layers by depth"],
)
def test_a_tail_of_big_blocks_is_dear(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, layers: tuple[str, ...]
) -> None:
    deep = tmp_path / "deep.yaml"
    deep.write_text(
        f"base: {CONFIGS / 'sit_b2_haste.yaml'}\nalignment: {{teacher_layers: [26, 32, 39]}}\n"
    )
    result = plan(capsys, *H100, *SEVEN_B, *(str(deep) if a == "DEEP" else a for a in layers))
    online, tail = row(result, "image", "uint8"), row(result, "activations", "faithful")
    assert online["teacher_share_of_step"] > 20
    assert tail["teacher_share_of_step"] > 5
    assert result["recommended"]["cut"] in ("maps", "qk")
    assert not result["online_is_better"]
    best = row(result, **result["recommended"])
    assert best["teacher_share_of_step"] < 0.01
    assert tail["cost_per_run"] > best["cost_per_run"]
    assert tail["cost_once"] < best["cost_once"]
    assert not best["bandwidth_suffices"]
    share = 100 * online["teacher_share_of_step"]
    assert f"takes {share:,.1f}% of a vanilla step" in result["reasons"][0]
    assert any("The trainer still waits for data" in reason for reason in result["reasons"])


def test_slow_storage_speaks_against_big_stores(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *H100, *SEVEN_B, "--plan.gb-per-second", "0.1")
    assert result["recommended"]["cut"] == "activations"
    assert not row(result, "maps", "faithful")["bandwidth_suffices"]


def test_counts_are_integers(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *H100)
    assert result["images"] == 1_281_167
    assert result["aligned_images_per_run"] == 250_000 * 256
    integers = [result[k] for k in ("images", "images_per_run", "workers", "runs")]
    integers += result["flops_per_image"].values()
    for cost in result["cuts"]:
        integers += [cost[k] for k in ("bytes", "bytes_per_image", "teacher_flops_per_image")]
        if cost["break_even_runs"] is not None:
            integers.append(cost["break_even_runs"])
        images = cost["bytes_per_image"] * result["images"]
        assert images <= cost["bytes"]
    assert all(type(value) is int for value in integers)


def test_the_table_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (H100, (*H100, *SEVEN_B), ("--plan.tflops", "0.02", *SEVEN_B), DEMO):
        assert extract_main(["--plan", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= WIDTH
        assert sum(line.startswith(("maps", "qk", "activations", "image")) for line in lines) == 10


def test_the_table_has_five_columns_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    euros = ("--plan.prices.currency", "EUR")
    pages = {}
    for wide in ((), ("--wide",)):
        assert extract_main(["--plan", *H100, *euros, *wide]) == 0
        pages[len(wide)] = capsys.readouterr().out
        assert "3 EUR per device-hour" in " ".join(pages[len(wide)].split())
    narrow, all_columns = pages[0].splitlines(), pages[1].splitlines()
    header = next(line for line in narrow if line.startswith("cut"))
    assert " ".join(header.split()) == "cut codec size added to a run total cost, EUR"
    assert len(narrow) < len(all_columns)
    assert "GFLOP" not in pages[0]
    assert "GFLOP" in pages[1]
    assert pages[0].count("Recommended: ") == 1
    assert "--wide" in pages[0]


def test_a_reader_needs_no_legend(capsys: pytest.CaptureFixture[str]) -> None:
    """A mark is explained where a row has it, no two columns are equal, and epochs are short."""
    for speed, marked in (("1000", False), ("0.001", True)):
        assert extract_main(["--plan", *H100, "--plan.gb-per-second", speed]) == 0
        page = capsys.readouterr().out
        cuts = ("maps ", "qk ", "activations ", "image ")
        rows = [line for line in page.splitlines() if line.startswith(cuts)]
        assert any("*" in line for line in rows) == marked
        assert ("*: the trainer waits for data." in page) == marked
        columns = list(
            zip(*(re.split(r"\s+(?![kMGT]?B|h|min|s\b)", r)[:5] for r in rows), strict=True)
        )
        assert len(set(columns)) == 5
        text = " ".join(page.split())
        epochs = re.search(r"images; aligned for ([\d.]+k?) of ([\d.]+k?) epochs", text)
        assert epochs is not None
        assert max(map(len, epochs.groups())) <= 5
        assert re.search(r"Recommended: .* cost [\d.]+k? USD with the store", text)


def test_these_cores_are_timed_and_priced_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *DEMO, "--plan.device", "cpu")
    assert result["images"] == 1_797
    assert result["device_basis"] == "measured"
    assert all(result["flops_per_second"][k] > 0 for k in ("teacher", "student", "autoencoder"))
    assert result["prices"]["device_hour"] < 3
    assert result["workers"] == 2
    assert row(result, "maps", "faithful")["extraction_hours"] > 0
    assert "this CPU" in result["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, *DEMO)
    assert result["device_basis"] == "assumed"
    assert result["flops_per_second"]["teacher"] == 200_000_000_000_000
    assert result["prices"]["device_hour"] == 3
    cores = plan(capsys, *DEMO, "--plan.device", "cpu")
    for cut, codec in (("maps", "faithful"), ("image", "uint8")):
        hours = row(result, cut, codec)["extraction_hours"]
        assert hours < row(cores, cut, codec)["extraction_hours"]
    assert extract_main(["--plan", *DEMO]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "no GPU here: costs assume one of 200 TFLOP/s (--plan.tflops); "
        "--plan.device cpu estimates this CPU"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("argv", "cuts"), [((), {"activations", "image"}), (SEVEN_B, {"maps", "qk"})], ids=["L", "7B"]
)
def test_the_two_ends_without_a_gpu(
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    cuts: set[str],
) -> None:
    result = plan(capsys, *argv)
    assert result["recommended"]["cut"] in cuts
    assert result["reasons"][1].startswith("Recommended: '")
    best = row(result, **result["recommended"])
    others = {"maps", "qk", "activations"} - {best["cut"]}
    assert all(row(result, cut, "faithful")["cost"] > best["cost"] for cut in others)


def test_nothing_else_on_stdout_and_no_hub() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.extract", "--plan", "--json", *H100],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
    )
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["teacher"] == "vit_base_patch14_dinov2.lvd142m"


def test_training_plans_for_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "sit_b2_haste.yaml")
    micro = ("--workers.micro-batch", "32")
    assert train_main(["--plan", "--config", config, "--json", *H100, *micro]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["student"] == "SiT-B/2"
    assert result["aligned_images_per_run"] == 100_000 * 256
    memory = result["memory"]
    assert memory["micro_batch"] == 32
    assert memory["weights"] == 4 * 137_648_400  # 130.3 M of the student, the rest the projector
    assert memory["teacher_tail"] == 4 * 5 * 7_089_408  # blocks 7 to 11
    sizes = memory["largest_micro_batch"]
    for gb, samples in sizes.items():
        per_sample = sum(memory[f"{part}_per_sample"] for part in ("kept", "targets", "passing"))
        assert memory["fixed"] + samples * per_sample <= float(gb) * 1e9
        assert memory["fixed"] + (samples + 1) * per_sample > float(gb) * 1e9


def test_a_training_plan_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "sit_b2_haste.yaml")
    off = ("--compute.compile", "off")  # the compiler's choice takes seconds to find
    assert train_main(["--plan", "--config", config, *H100, *off]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "GPU memory of a worker in Phase I" in out
    assert "largest --workers.micro-batch that fits: 2" in out
    assert "not measured on a GPU" in " ".join(out.split())


def test_training_takes_over_what_a_data_set_brings(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "demo.yaml")
    argv = ["--plan", "--config", config, "--extract.dataset", "demo", "--json", *H100]
    argv += ["--compute.compile", "off"]
    assert train_main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 1_797
    extraction = plan(capsys, *DEMO, *H100)
    assert result["teacher"] == extraction["teacher"]
    for made, planned in zip(result["cuts"], extraction["cuts"], strict=True):
        assert made["bytes_per_image"] == planned["bytes_per_image"]


def test_a_store_that_exists_is_weighed_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    extraction = ExtractConfig.model_validate(
        {
            "dataset": "demo",
            "store": store,
            "resolution": 32,
            "teacher": {
                "model": "vit_small_patch14_dinov2.lvd142m",
                "weights": "demo",
                "image_size": 32,
                "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
            },
            "autoencoder": "demo",
            "layers": (2, 3, 4, 5),
            "cut": "image",
        }
    )
    written = _write_store(extraction)
    config = str(CONFIGS / "demo.yaml")
    argv = ["--plan", "--config", config, "--store", store, "--json", *H100]
    argv += ["--compute.compile", "off"]
    assert train_main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 8
    made, *others = result["cuts"]
    assert made["exists"]
    assert not any(other["exists"] for other in others)
    assert (made["cut"], made["codec"]) == ("image", "uint8")
    assert made["candidate"]
    assert made["class_bytes"] == 10240 // 8  # a tar of eight headers and blocks, in whole records
    assert made["bytes_per_image"] + made["class_bytes"] == -(-written // 8)
    assert made["extraction_hours"] == 0


def test_the_default_trainer_is_the_published_run() -> None:
    file = CONFIGS / "sit_xl2_haste.yaml"
    assert validate(RunConfig, read_yaml(file), where="") == DEFAULT_TRAINER


def test_aligned_steps() -> None:
    alignment = DEFAULT_TRAINER.alignment

    def steps(termination: Any) -> int:
        changed = alignment.model_copy(update={"termination": termination})
        return aligned_steps(DEFAULT_TRAINER.model_copy(update={"alignment": changed}))

    assert steps(FixedStep(step=250_000)) == 250_000
    assert steps(FixedStep(step=900_000)) == 500_000
    assert steps(FixedStep(step=10, dry=True)) == 500_000
    assert steps(ResidualPlateau(kind="residual_plateau")) == 500_000
    assert steps(None) == 500_000


def test_complaints() -> None:
    assert "plan.runs" in complaint("--plan.runs", "0")
    assert "plan.prices.tb_month" in complaint("--plan.prices.tb-month", "-1")
    assert "did you mean '--plan.trainer'" in complaint("--plan.trainr", "x")
    assert "no.yaml" in complaint("--plan.trainer", "no.yaml")
    assert "--plan.images" in complaint("--dataset", "folder")
    vanilla = str(CONFIGS / "sit_b2_vanilla.yaml")
    assert "nothing to estimate" in complaint("--plan.trainer", vanilla)
    assert "teacher layer 8" in complaint("--layers", "9-11", *H100)
    assert "4x64x64" in complaint("--resolution", "512", *H100)
    assert "give one" in complaint("--plan.device", "cpu", *H100)


def test_without_the_flag_its_options_are_unknown() -> None:
    with pytest.raises(UserError, match="unknown option --json"):
        extract_main(["--json"])


def _write_store(config: ExtractConfig) -> int:
    """A complete store of 8 images, without Ray; its size in bytes."""
    from dataclasses import replace

    from pipeline.datasets import list_images
    from pipeline.extract.encoder import Encoder
    from pipeline.extract.tasks import make_manifest, make_tasks, with_tail
    from pipeline.store import Store

    listing = list_images(config)
    listing = replace(listing, items=listing.items[:8])
    encoder = Encoder(config, device="cpu", threads=1)
    assert config.store is not None
    manifest = with_tail(
        make_manifest(config, listing, encoder.describe()),
        config.cut,
        encoder.save_tail(config.store),
    )
    store = Store.create(config.store, manifest)
    for task in make_tasks(listing, config.shard_size):
        encoder.encode_shard(store.url, manifest, task)
    store.finish()
    return sum(store.index().bytes_per_stream.values())
