"""The arithmetic of a plan against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.cost_estimate.costs import Demand, Rates, Stored, Work, break_even_runs, cost_of
from pipeline.cost_estimate.report import advise

WORK = Work(
    step=1_000,
    alignment=200,
    autoencoder=300,
    extraction={"maps": 500, "activations": 100, "image": 0},
    training={"maps": 0, "activations": 400, "image": 500},
    tail_weights={"maps": 0, "activations": 25, "image": 250},
    tail_blocks={"maps": 0, "activations": 4, "image": 5},
)
RATES = Rates(
    teacher=100.0, autoencoder=60.0, student=200.0, decode_seconds=2.0, decode_beside=True
)
DEMAND = Demand(
    images=3_600,
    aligned_images=7_200,
    run_images=14_400,
    encoders=2,
    trainers=4,
    bytes_per_second=100.0,
    device_hour=10.0,
    tb_month=1e9,  # so that 1000 bytes cost 1 a month
    months=2,
    runs=3,
)


def test_every_number_of_one_cut() -> None:
    cost = cost_of(Stored("activations", "faithful", 50), WORK, RATES, DEMAND)
    assert cost.store_bytes == 3_600 * 50 + 4 * 25
    # networks 300/60 + 100/100 = 6 s, beside 2 s of decoding, then 0.5 s of writing: 6.5 h in all
    assert cost.extraction_device_hours == pytest.approx(6.5)
    assert cost.extraction_hours == pytest.approx(3.25)
    # step 5 s, projector and logits 1 s, teacher 4 s: no wait for half a second of reading
    assert cost.teacher_share == pytest.approx(0.8)
    assert cost.read_needed == pytest.approx(5.0)
    assert not cost.waits
    assert cost.run_device_hours == pytest.approx(2 * 4)
    assert cost.storage_per_month == pytest.approx(180.1)
    assert cost.once == pytest.approx(65 + 2 * 180.1)
    assert cost.per_run == pytest.approx(80)
    assert cost.total == pytest.approx(65 + 2 * 180.1 + 240)


def test_a_trainer_that_waits_for_bytes_pays_for_the_wait() -> None:
    cost = cost_of(Stored("maps", "faithful", 900), WORK, RATES, DEMAND)
    # 9 s of reading against 6 s of arithmetic
    assert cost.waits
    assert cost.wait_share == pytest.approx(3 / 5)
    assert cost.read_needed == pytest.approx(150)
    assert cost.run_device_hours == pytest.approx(2 * 3)


def test_on_a_cpu_decoding_takes_time_from_the_networks() -> None:
    rates = replace(RATES, decode_beside=False)
    cost = cost_of(Stored("image", "uint8", 100), WORK, rates, DEMAND)
    assert cost.extraction_device_hours == pytest.approx(5 + 2 + 1)


def test_a_store_that_exists_has_paid_for_its_extraction() -> None:
    cost = cost_of(Stored("maps", "faithful", 100, exists=True), WORK, RATES, DEMAND)
    assert cost.extraction_device_hours == 0
    assert cost.once == pytest.approx(2 * 360)


@pytest.mark.parametrize(
    ("once", "per_run", "runs"),
    [
        (50, 10, 1),  # cheaper in every way
        (100, 10, 1),
        (130, 10, 4),  # 30 more once, 10 less a run: equal after 3
        (131, 10, 4),
        (139, 10, 4),
        (140, 10, 5),
        (130, 20, 0),  # nothing saved
        (90, 20, 1),
        (90, 21, 0),  # cheaper at first, not for long
    ],
)
def test_runs_until_caching_is_cheaper(once: float, per_run: float, runs: int) -> None:
    assert break_even_runs(once, per_run, other_once=100, other_per_run=20) == runs


def test_break_even_agrees_with_the_totals() -> None:
    ways = [Stored("maps", "faithful", 400), Stored("image", "uint8", 100)]
    advice = advise(ways, WORK, RATES, DEMAND)
    runs = advice.costs[0].break_even_runs
    assert runs is not None
    for number, cheaper in ((runs, True), (runs - 1, False)):
        maps, online = advise(ways, WORK, RATES, replace(DEMAND, runs=number)).costs
        assert (maps.total < online.total) is cheaper


def test_the_online_teacher_is_said_to_be_the_better_buy() -> None:
    ways = [Stored("maps", "faithful", 400), Stored("image", "uint8", 100)]
    advice = advise(ways, WORK, RATES, replace(DEMAND, device_hour=0.0))
    assert advice.online_is_better
    assert advice.costs[0].break_even_runs is None
    assert any("online teacher is the better buy" in reason for reason in advice.reasons)
    assert any("never pays" in reason for reason in advice.reasons)


def test_only_candidates_are_recommended() -> None:
    ways = [
        Stored("maps", "faithful", 400),
        Stored("maps", "small", 4, candidate=False),
        Stored("image", "uint8", 100),
    ]
    advice = advise(ways, WORK, RATES, DEMAND)
    assert min(advice.costs, key=lambda cost: cost.total).stored == ways[1]
    assert advice.best.stored.candidate
    assert any(r.startswith("'maps' in small would cost") for r in advice.reasons)
    assert not any(
        r.startswith("'maps' in small would cost")
        for r in advise([ways[0], ways[2]], WORK, RATES, DEMAND).reasons
    )
