"""Results that are kept, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import UserError
from tests.faults.__main__ import possible
from tests.faults.faults import FAULTS
from tests.faults.ledger import Ledger, Result
from tests.faults.plan import draw
from tests.faults.table import as_json, page


def result(run: int = 0, fault: str = "kill-worker", **values: object) -> Result:
    about = {"seed": 7, "work": "training", "habitat": "disk", "at": 3, "survived": True}
    return Result.model_validate({**about, "run": run, "fault": fault, **values})


def test_results_are_kept_and_the_next_run_follows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, seed=7)
    assert (ledger.results(), ledger.next_run()) == ([], 0)
    ledger.append([result(0), result(0)])
    ledger.append([result(4)])
    again = Ledger(tmp_path, seed=7)
    assert [r.run for r in again.results()] == [0, 0, 4]
    assert again.next_run() == 5
    assert Ledger(tmp_path, seed=8).results() == []


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, seed=7)
    ledger.append([result(0), result(1)])
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-5])
    assert [r.run for r in ledger.results()] == [0]
    ledger.append([result(1)])
    assert ledger.path.read_bytes() == whole


def test_one_object_of_integers() -> None:
    failed = result(survived=False, lost=20, duplicated=10, hung=True)
    assert as_json([result(), failed]) == {
        "faults": 2,
        "survived": 1,
        "lost": 20,
        "duplicated": 10,
        "hung": 1,
    }


def test_the_table_has_a_row_for_each_fault_and_says_what_was_wrong() -> None:
    failed = result(2, "sigterm", survived=False, lost=10, told="no step 3")
    lines = page([result(seconds=4.0), result(seconds=8.0), failed]).splitlines()
    assert lines[0].split("  ")[0] == "fault"
    assert lines[1].split() == [
        "kill-worker",
        "(training)",
        "2",
        "2",
        "0",
        "0",
        "6.0",
        "(at",
        "most",
        "8.0)",
    ]
    assert lines[2].split() == ["sigterm", "(training)", "1", "0", "10", "0", "-"]
    assert lines[3].split()[:5] == ["all", "3", "2", "10", "0"]
    assert lines[4] == "run 2, sigterm (training): no step 3"


def test_plans_are_a_function_of_seed_and_number() -> None:
    kinds = list(FAULTS)
    plans = [draw(3, number, kinds) for number in range(300)]
    assert plans == [draw(3, number, kinds[::-1]) for number in range(300)]
    assert plans != [draw(4, number, kinds) for number in range(300)]
    assert {m.fault for plan in plans for m in plan.moments} == set(kinds)
    for plan in plans:
        fitting = [FAULTS[moment.fault] for moment in plan.moments]
        assert all(plan.work in fault.works for fault in fitting)
        assert all(f.habitat is None or f.habitat.name == plan.habitat for f in fitting)
        ats = [moment.at for moment in plan.moments]
        assert 1 <= min(ats) <= max(ats) < plan.work.total


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(UserError, match=r"no fault 'kill-wroker' \(did you mean 'kill-worker'"):
        possible(["kill-wroker"])
