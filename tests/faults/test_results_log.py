"""The results log, its table, and the plans of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import UserError
from tests.faults.__main__ import available
from tests.faults.faults import FAULTS
from tests.faults.plan import draw
from tests.faults.results_log import Result, ResultsLog
from tests.faults.table import as_json, page


def result(run: int = 0, fault: str = "kill-worker", **values: object) -> Result:
    defaults = {"seed": 7, "work": "training", "environment": "disk", "at": 3, "survived": True}
    return Result.model_validate({**defaults, "run": run, "fault": fault, **values})


def test_results_are_stored_and_the_next_run_is_numbered(tmp_path: Path) -> None:
    results_log = ResultsLog(tmp_path, seed=7)
    assert (results_log.results(), results_log.next_run()) == ([], 0)
    results_log.append([result(0), result(0)])
    results_log.append([result(4)])
    again = ResultsLog(tmp_path, seed=7)
    assert [r.run for r in again.results()] == [0, 0, 4]
    assert again.next_run() == 5
    assert ResultsLog(tmp_path, seed=8).results() == []


def test_an_incomplete_line_is_dropped(tmp_path: Path) -> None:
    results_log = ResultsLog(tmp_path, seed=7)
    results_log.append([result(0), result(1)])
    data = results_log.path.read_bytes()
    results_log.path.write_bytes(data[:-5])
    assert [r.run for r in results_log.results()] == [0]
    results_log.append([result(1)])
    assert results_log.path.read_bytes() == data


def test_one_object_of_integers() -> None:
    failed = result(survived=False, lost=20, duplicated=10, hung=True)
    assert as_json([result(), failed]) == {
        "faults": 2,
        "survived": 1,
        "lost": 20,
        "duplicated": 10,
        "hung": 1,
    }


def test_the_table_has_a_row_for_each_fault_and_names_problems() -> None:
    failed = result(2, "sigterm", survived=False, lost=10, problem="no step 3")
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
    assert {m.fault for plan in plans for m in plan.injections} == set(kinds)
    for plan in plans:
        fitting = [FAULTS[injection.fault] for injection in plan.injections]
        assert all(plan.work in fault.works for fault in fitting)
        assert all(f.environment is None or f.environment.name == plan.environment for f in fitting)
        ats = [injection.at for injection in plan.injections]
        assert 1 <= min(ats) <= max(ats) < plan.work.total


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(UserError, match=r"no fault 'kill-wroker' \(did you mean 'kill-worker'"):
        available(["kill-wroker"])
