"""The script for a GPU machine, rehearsed on the CPU, and the section of results that it writes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import UserError
from tests.gpu import checks
from tests.gpu.__main__ import RESULTS, main
from tests.gpu.checks import CHECKS, Check, run_checks
from tests.gpu.results import HEADING, PREDICTED, section, write_section

CPU = torch.device("cpu")
REPORT: dict[str, Any] = {
    "device": "NVIDIA H100",
    "versions": {"torch": "2.11"},
    "date": "2026-01-02",
    "checks": {
        "SiT-XL/2": {"status": "ok", "values": {"ms, Phase I": 71.26}, "limits": {}, "seconds": 3},
        "samplers": {
            "status": "FAILED",
            "values": {"ode": 0.5},
            "limits": {"ode": 1e-3},
            "reason": "above the limit: ode",
            "seconds": 1.0,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if not check.gpu_only])
def test_check_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All differences are 0."""
    monkeypatch.setattr(checks, "CHECKS", {name: CHECKS[name]})
    (result,) = run_checks(CPU, 60, tmp_path / "out.json")["checks"].values()
    assert result["status"] == "ok", result
    assert {key: result["values"][key] for key in CHECKS[name].limits} == dict.fromkeys(
        CHECKS[name].limits, 0
    )


def test_checks_go_on_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> dict[str, Any]:
        raise RuntimeError("no kernel")

    planted = {
        "fails": Check(fails, {}),
        "is NaN": Check(lambda _: {"x": math.nan}, {"x": 1.0}),
        "is above": Check(lambda _: {"x": 2.0}, {"x": 1.0}),
        "needs a GPU": Check(fails, {}, gpu_only=True),
        "is right": Check(lambda _: {"x": 1.0}, {"x": 1.0}),
    }
    monkeypatch.setattr(checks, "CHECKS", planted)
    out = tmp_path / "out.json"
    assert main(["checks", "--device", "cpu", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["checks"]
    assert {name: result["status"] for name, result in found.items()} == {
        "fails": "FAILED",
        "is NaN": "FAILED",
        "is above": "FAILED",
        "needs a GPU": "skipped",
        "is right": "ok",
    }
    assert "no kernel" in found["fails"]["trace"]


def test_no_check_begins_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"late": Check(lambda _: {}, {})})
    report = run_checks(CPU, -1, tmp_path / "out.json")
    assert report["checks"]["late"]["reason"] == "out of time"


def test_results_replace_their_section(tmp_path: Path) -> None:
    file, report = tmp_path / "RESULTS.md", tmp_path / "checks.json"
    file.write_text(f"# Results\n\ntext\n\n{HEADING}\n\nold\n\n## After\n\nend\n")
    report.write_text(json.dumps(REPORT))
    assert main(["results", str(report), str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Results\n\ntext\n\n")
    assert text.endswith("\n\n## After\n\nend\n")
    assert "old" not in text
    assert "NVIDIA H100, 2026-01-02, torch 2.11." in text
    assert "| SiT-XL/2: ms, Phase I | 72 | 71.26 |" in text
    assert "| samplers | FAILED | 1.0 | ode 0.5 (0.001); above the limit: ode |" in text
    main(["results", str(report), str(file)])
    assert file.read_text() == text


def test_predictions_are_of_values_that_are_measured() -> None:
    sources = Path(checks.__file__).read_text()
    for check, name in PREDICTED:
        assert check in CHECKS
        assert f'"{name}"' in sources


def test_results_have_a_section_on_gpus(tmp_path: Path) -> None:
    """Without a measurement, predictions are marked as such."""
    text = RESULTS.read_text()
    assert text.count(f"{HEADING}\n") == 1
    if "Predicted, not measured" in text:
        copy = tmp_path / "copy.md"
        copy.write_text(text)
        write_section(copy, None)
        assert copy.read_text() == text
        assert "not measured" in section(None)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_wrong_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "a.md").write_text("# Results\n")
    with pytest.raises(UserError, match=r"a\.json': not a file of"):
        main(["results", str(tmp_path / "a.json"), str(tmp_path / "a.md")])
    assert (tmp_path / "a.md").read_text() == "# Results\n"


def test_the_script_is_valid() -> None:
    script = Path(checks.__file__).with_name("run.sh")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    wrong = subprocess.run(["bash", str(script)], check=False, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "usage" in wrong.stderr
