"""The page of `python -m pipeline.report`: its text, and its layout in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.checkpoints.integrity import write_state
from pipeline.cli.config_files import merge, read_yaml
from pipeline.report import checkpoint_attention
from pipeline.report.__main__ import main
from pipeline.runs.reader import read_run
from pipeline.store import Store
from pipeline.text import MAX_TEXT
from pipeline.train.local import train_here
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.validation import validate
from tests.browser import browser_page, find_chromium
from tests.pipeline.evaluate.sets import about_samples

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"
HOSTILE = "<img src=x onerror=alert(1)> $x^2$ \" ' & \ud800"


def make_run(folder: Path, *, ended: int | None = 400, **options: Any) -> Path:
    """The files of a run of 1000 steps, without training."""
    folder.mkdir(parents=True)
    alignment = {"termination": {"kind": "fixed", "step": ended}} if ended else {}
    config = RunConfig.model_validate({"steps": 1000, "alignment": alignment, **options})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    rows: list[dict[str, Any]] = []
    for step in range(10, 1001, 10):
        phase = 2 if ended and step > ended else 1
        row = {"step": step, "phase": phase, "denoising": 10 / step, "grad_norm": 1.0}
        row |= {"feature": -0.5, "attention": 3.0} if phase == 1 else {}
        row |= {"steps_per_second": 4.0, "images_per_second": 8.0, "data_wait_share": 0.1}
        row |= {"bytes_per_second_latents": 100, "bytes_per_second_maps": 900 * (2 - phase)}
        rows.append(row)
        if step == ended:
            rows.append({"step": step, "event": "alignment terminated", "trigger": "fixed"})
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    row = {"step": step, "fid": 30.0 + step, "sfid": None, "precision": 0.5, "recall": 0.5}
    row |= {"samples": 5000, "network": "inception", "reference": "digits", "weights": "ema"}
    return row | values


def draw(folder: Path, steps: range, size: tuple[int, int] = (64, 48)) -> None:
    folder.mkdir()
    for step in steps:
        Image.new("RGB", size, (200, step % 255, 90)).save(folder / f"step-{step:09d}.png")


def report(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[str, dict[str, Any]]:
    """The page and the JSON object of --json."""
    out = Path(argv[0]).parent / "out" / "report.html"
    assert main([*map(str, argv), "--html", str(out), "--json"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    page = out.read_text()
    found = json.loads(output)
    assert found["bytes"] == out.stat().st_size
    return page, found


def test_in_a_browser_all_pictures_load_and_a_phone_need_not_scroll_sideways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed here")
    first = make_run(tmp_path / HOSTILE.replace("\ud800", ""), store=f"s3://b/{HOSTILE[:-1]}")
    second = make_run(tmp_path / ("a-very-long-name." * 12), ended=None, seed=3)
    write_rows(first / "evaluations.jsonl", [evaluation(n, network=HOSTILE) for n in (100, 200)])
    for folder in (first, second):
        draw(folder / "samples", range(100, 400, 100), (900, 300))
        draw(folder / "attention", range(100, 200, 100))
    _, found = report(capsys, first, second)
    with browser_page(executable) as page:
        for width in (390, 1280):
            page.open(tmp_path / "out" / "report.html", width=width, dark=width == 390)
            assert page.evaluate("document.title").startswith("Training report")
            loaded = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
            pictures = page.evaluate(loaded)
            assert len(pictures) > 12
            assert all(pictures)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.querySelectorAll('[onerror], script').length") == 0
            assert HOSTILE[:20] in page.evaluate("document.body.innerText")
        assert page.messages == []
    assert found["warnings"] == []


def test_attention_is_drawn_from_checkpoints_unless_switched_off(
    digits_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = read_yaml(CONFIGS / "demo.yaml") | {"store": digits_store.url, "global_batch": 4}
    changes = {
        "steps": 2,
        "log_every": 1,
        "checkpoint": {"every": 1},
        "alignment": {"termination": {"kind": "fixed", "step": 1}},
    }
    config = validate(RunConfig, merge(values, changes), where="test")
    train_here(config, tmp_path / "run")
    page, found = report(capsys, tmp_path / "run")
    assert found["runs"][0]["termination_step"] == 1
    assert found["warnings"] == []
    assert "2: alignment ended at step 1" in page
    assert "0 B of the teachers' streams were read after the alignment had ended" in page
    for step in (1, 2):
        assert f'alt="Attention of teacher and student of run at step {step}"' in page
    page, _ = report(capsys, tmp_path / "run", "--attention", "none")
    assert "<h2>Attention" not in page


def test_a_remote_store_is_opened_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", store="https://127.0.0.1:9/stolen?key=s3cret")
    (run / "checkpoint-000000400").mkdir()
    page, _ = report(capsys, run)
    assert "is not on this machine: --attention remote opens it." in page
    assert "s3cret" not in page
    page, _ = report(capsys, run, "--attention", "remote")
    assert "run: attention cannot be drawn from its checkpoints: checkpoint" in page


@pytest.mark.parametrize(
    "student",
    [
        {"width": 1 << 20, "heads": 16},
        {"width": 10**400 * 16, "heads": 16},
        {"depth": 10**9, "width": 4, "heads": 1},
        {"num_classes": 10**12},
        {"latent_size": 1 << 20},
    ],
)
def test_a_student_above_the_limits_is_not_built(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    student: dict[str, int],
) -> None:
    run = make_run(tmp_path / "run", store=str(tmp_path / "store"))
    autoencoder = {"name": "demo", "kind": "AutoencoderTiny", "weights_sha256": "a" * 64}
    autoencoder |= {"scaling_factor": 1.0, "shift_factor": 0.0, "latent_shape": [4, 32, 32]}
    empty = ("store", "termination", "trigger", "bytes_read", "meter")
    state: dict[str, Any] = {key: {} for key in empty}
    state |= {"version": 2, "step": 400, "metrics_rows": 0, "autoencoder": autoencoder}
    state["classes"] = {"count": 3}  # of the store, fewer than the student's
    state["config"] = RunConfig.model_validate({"student": student}).model_dump(mode="json")
    (run / "checkpoint-000000400").mkdir()
    write_state(run / "checkpoint-000000400", state)

    def load(*_: Any) -> None:
        raise AssertionError("the student was built")

    monkeypatch.setattr(checkpoint_attention, "load_student", load)
    page, _ = report(capsys, run)
    assert (
        "the student of checkpoint-000000400 is too large: the report builds students of at most 2"
        in page
    )


def test_a_checkpoint_above_the_limits_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_store: Store
) -> None:
    changes = {"steps": 1, "log_every": 1, "checkpoint": {"every": 1}}
    values = read_yaml(CONFIGS / "demo.yaml") | {"store": digits_store.url, "global_batch": 4}
    config = validate(RunConfig, merge(values, changes), where="test")
    train_here(config, tmp_path / "run")
    monkeypatch.setattr(checkpoint_attention, "MAX_BYTES", 1000)
    _, note = checkpoint_attention.draw_checkpoint_attention(read_run(str(tmp_path / "run")))
    assert note is not None
    assert "checkpoint-000000001 has 0 GiB; the report reads at most 0" in note


def test_attention_that_cannot_be_drawn_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", store=str(tmp_path / "gone"))
    page, _ = report(capsys, run)
    assert "run: it has no checkpoint yet." in page
    (run / "checkpoint-000000400").mkdir()
    page, found = report(capsys, run)
    assert "run: attention cannot be drawn from its checkpoints: checkpoint" in page
    assert found["warnings"] == ["run: checkpoint-000000400 has no state.json"]


def test_no_text_of_a_run_becomes_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", store=HOSTILE[:-1], wandb=HOSTILE[:-1])
    rows = [evaluation(100, network=HOSTILE, reference=HOSTILE), evaluation(200, weights=HOSTILE)]
    write_rows(run / "evaluations.jsonl", rows)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (500, 600):
            file.write(json.dumps({"step": step, "event": HOSTILE, HOSTILE: step}) + "\n")
    page, _ = report(capsys, run)
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<script" not in page
    outside = re.sub(r'(?:content|src)="[^"]*"', "", page)
    assert "http" not in outside.replace("http-equiv", "")
    assert "default-src 'none'" in page.replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (json.dumps(["a red bus", HOSTILE, "a red bus", 3]), ["a red bus", "&lt;img src=x"]),
        ("[", []),
        ("{}", []),
    ],
)
def test_captions_stand_below_their_pictures(
    text: str, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    draw(run / "samples", range(100, 200, 100))
    texts = PngInfo()
    texts.add_itxt("captions", text)
    file = run / "samples" / "step-000000100.png"
    Image.new("RGB", (64, 48)).save(file, pnginfo=texts)
    page, found = report(capsys, run)
    assert found["warnings"] == []
    assert len(re.findall("<li>a red bus</li>", page)) == len(shown[:1])
    assert all(f"<li>{caption}" in page for caption in shown)
    assert (f"<summary>{len(shown)} captions</summary>" in page) == bool(shown)


def test_names_of_classes_stand_below_their_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a grid is saved, and as a hostile file may have them."""
    run = make_run(tmp_path / "run")
    file = run / "samples" / "step-000000100.png"
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    save_grid(images, file, 2, row_names=["0 golden retriever", f"1 {HOSTILE}"])
    page, found = report(capsys, run)
    assert found["warnings"] == []
    assert "<small>rows: 0 golden retriever, 1 &lt;img src=x" in page


def test_long_texts_of_a_run_are_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", store="s3://b/" + "x" * 10_000)
    write_rows(run / "evaluations.jsonl", [evaluation(100, network="y" * 100_000)])
    page, _ = report(capsys, run)
    assert max(len(texts) for texts in re.findall("x+|y+", page)) <= 2 * MAX_TEXT


def test_the_command_starts_without_torch_and_matplotlib() -> None:
    code = "import sys, pipeline.report.__main__; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "ray", "matplotlib"} & set(modules)


def test_numbers_of_other_networks_or_sample_counts_get_panels_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    rows = [evaluation(100), evaluation(200, samples=50_000), evaluation(300, network="dino")]
    write_rows(run / "evaluations.jsonl", rows)
    write_rows(other / "evaluations.jsonl", [evaluation(100)])
    page, _ = report(capsys, run, other)
    titles = re.findall(r"<strong>(FID,[^<]*)</strong>", page)
    assert titles == [
        "FID, inception, 5,000 samples, against digits",
        "FID, inception, 50,000 samples, against digits",
        "FID, dino, 5,000 samples, against digits",
    ]


def identified(**changes: Any) -> dict[str, Any]:
    """Fields of a row that identify network, reference and sampling."""
    sampler = {"steps": 250, "guidance": 1.5, "guidance_high": 0.72}
    about = about_samples(**{"sampler": sampler, **changes.pop("about", {})})
    row = {
        "network_identity": {"size": 299, "weights_sha256": "c" * 16, "arguments": ""},
        "reference_sha256": "d" * 16,
        "decoder": "demo",
        "sampling": about.sampling.model_dump(mode="json"),
    }
    return {**row, **changes}


def test_a_line_has_one_network_one_reference_and_one_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is identified by its digest, not by its path."""
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    unguided = {"sampler": {"steps": 250}}
    identity = {"size": 299, "weights_sha256": "e" * 16, "arguments": ""}
    rows = [
        evaluation(100, **identified()),
        evaluation(200, **identified(about=unguided)),
        evaluation(300, **identified(network_identity=identity)),
        evaluation(400, **identified(reference_sha256="f" * 16)),
        evaluation(500, **identified(sampling={"by": "somebody else"})),
    ]
    write_rows(run / "evaluations.jsonl", rows)
    elsewhere = identified(reference="/mnt/copy.npz")
    write_rows(other / "evaluations.jsonl", [evaluation(100, **elsewhere)])
    page, _ = report(capsys, run, other)
    titles = re.findall(r"<strong>(FID,[^<]*)</strong>", page)
    drawn = "seed 0, random labels of classes 0-9, decoder demo (bbbbbbbb), float32"
    against = "5,000 samples, against digits"
    guided = f"sde of 250 steps, guidance 1.5 at t in [0, 0.72], {drawn}"
    inception = "FID, inception (299 px, weights"
    assert titles == [
        f"{inception} cccccccc), {against} (dddddddd), {guided}",
        f"{inception} cccccccc), {against} (dddddddd), sde of 250 steps, no guidance, {drawn}",
        f"{inception} eeeeeeee), {against} (dddddddd), {guided}",
        f"{inception} cccccccc), {against} (ffffffff), {guided}",
        f"{inception} cccccccc), {against} (dddddddd), drawn by {{&#34;by&#34;: "
        "&#34;somebody else&#34;}",
    ]


def test_only_options_that_differ_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ended=None, seed=7)]
    page, _ = report(capsys, *runs)
    rows = re.findall(r'<th scope="row">(.*?)</tr>', page.partition("What differs")[2])
    cells = [re.sub(r"<wbr>", "", line).replace("</th>", "") for line in rows]
    listed = [line.replace("</td>", "").split("<td>") for line in cells]
    assert ["seed", "0", "7"] in listed
    assert ["alignment.termination.step", "400", "none"] in listed
    assert not any(line[0] in {"steps", "global_batch", "name"} for line in listed)


def test_damage_is_reported_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    (run / "summary.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "denoising": NaN, "phase": 2}\n[1]\n{"step": 1020, "deno')
    (run / "evaluations.jsonl").write_text('{"step": 100\n' + json.dumps(evaluation(200)) + "\n")
    draw(run / "samples", range(100, 400, 100))
    (run / "samples" / "step-000000200.png").write_bytes(b"GIF89a")
    complete = (run / "samples" / "step-000000300.png").read_bytes()
    (run / "samples" / "step-000000300.png").write_bytes(complete[: len(complete) // 2])
    page, found = report(capsys, run)
    warnings = "\n".join(found["warnings"])
    for part in (
        "config.yaml cannot be read",
        "summary.json cannot be read",
        "skipped 1 damaged line of evaluations.jsonl, first at line 1",
        "skipped 1 damaged line of metrics.jsonl, first at line 103",
        "'denoising' is not a finite number in 1 rows, first at step 1,010",
        "the picture of step 200 is not a complete PNG file",
        "the picture of step 300 is not a complete PNG file",
    ):
        assert part in warnings
    assert len(found["warnings"]) == 7
    assert page.count('src="data:image/png') == 1


def test_steps_that_not_all_runs_drew_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    draw(runs[0] / "samples", range(100, 1001, 100))
    draw(runs[1] / "samples", range(200, 1001, 50))
    page, _ = report(capsys, *runs)
    assert "Some steps are missing in some runs" in page
    assert re.findall("<h3>Step ([0-9,]+)", page) == ["200", "400", "500", "700", "800", "1,000"]


def test_runs_of_one_name_get_different_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    _, found = report(capsys, *runs)
    assert [run["name"] for run in found["runs"]] == ["x/run", "y/run"]


def test_a_long_run_makes_a_small_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    write_rows(run / "metrics.jsonl", [{**row, "step": 100 * n} for n in range(1, 4_002)])
    page, found = report(capsys, run)
    assert "means of 11 rows" in page
    assert found["bytes"] < 500_000


def test_invalid_arguments_give_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").touch()
    for argv, complaint in (
        ([], "RUN is missing"),
        ([str(run)], "--html is missing"),
        ([str(tmp_path / "no"), "--html", "x"], "no such folder"),
        ([str(tmp_path / "empty"), "--html", "x"], "holds no metrics.jsonl"),
        ([str(run), f"{run}/", "--html", "x"], "named 2 times"),
        ([str(run), "--html", str(tmp_path)], str(tmp_path)),
    ):
        with pytest.raises(UserError, match=re.escape(complaint)):
            main(argv)


def test_failed_evaluations_become_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not observations of a trigger."""
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (500, 600):
            row = {"step": step, "event": "no evaluation", "reason": "3 of 10 samples <b>"}
            file.write(json.dumps(row) + "\n")
    page, found = report(capsys, run)
    assert found["warnings"] == [
        "run: no evaluation at step 500: 3 of 10 samples <b>, 2 times in all"
    ]
    assert "3 of 10 samples &lt;b&gt;" in page
    assert page.count("no evaluation") == 1


def test_each_plot_has_a_table_and_each_run_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a run")
    page, _ = report(capsys, run)
    tables = re.findall(r'<details class="values">.*?</details>', page, re.DOTALL)
    assert len(tables) == page.count("over steps. Last:")
    denoising = next(table for table in tables if ">0.01<" in table)
    rows = re.findall(r'<th scope="row">([\d,]+)</th><td>([^<]+)</td>', denoising)
    assert rows[0] == ("10", "1")
    assert rows[-1] == ("1,000", "0.01")
    assert all(
        float(value) == pytest.approx(10 / float(step.replace(",", "")), rel=1e-3)
        for step, value in rows
    )
    assert f"python jobs/train_haste.py --config &#39;{run}/config.yaml&#39;" in page
