"""Every bench runs at toy size and says what it measured. Nothing here looks at times."""

from __future__ import annotations

import json

import pytest

from schemas.errors import UserError
from tests.bench.__main__ import BENCHES, main

TEACHER = {
    "patch-size": 4,
    "embed-dim": 128,
    "depth": 4,
    "num-heads": 2,
}
TINY = {
    "frontier": [
        *["--count", "2", "--resolution", "32", "--layers", "1-3", "--measured", "2,3"],
        *["--teacher.model", "vit_small_patch14_dinov2.lvd142m", "--teacher.image-size", "32"],
        *(
            part
            for name, value in TEACHER.items()
            for part in (f"--teacher.model-args.{name}", str(value))
        ),
    ],
    "backends": ["--places", "disk", "--forms", "tiny", "--repeats", "1"],
}


@pytest.mark.parametrize("name", BENCHES)
def test_a_tiny_bench_prints_one_json_object(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--json", *TINY[name]]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["bench"] == name
    assert report["machine"]["torch"]
    assert all(rows for rows in report["tables"].values())


def test_the_frontier_prints_a_table_and_judges_exact_forms_as_exact(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--singles", "false", "--weights", "planted", *TINY["frontier"]]
    assert main(["frontier", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [dict(zip(lines[0].split("|"), line.split("|"), strict=True)) for line in lines[2:]]
    rows = [{key.strip(): value.strip() for key, value in row.items()} for row in rows]
    by_form = {(row["cut"], row["form"]): row for row in rows}
    assert len(by_form) == 19
    for cut, form in (("image", "faithful"), ("maps", "float32"), ("activations", "float32")):
        row = by_form[cut, form]
        assert float(row["KL mean"]) < 1e-12
        assert float(row["gradient cos"]) > 0.999999
    for cut in ("maps", "qk", "activations"):
        faithful, small = by_form[cut, "faithful"], by_form[cut, "small"]
        assert float(faithful["KL mean"]) < float(small["KL mean"]) < 1e-2


def test_an_unknown_bench_is_named() -> None:
    with pytest.raises(UserError, match=r"no bench 'frontie' \(did you mean"):
        main(["frontie"])
