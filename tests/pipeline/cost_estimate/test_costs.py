"""The arithmetic of a plan against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.cost_estimate.costs import (
    Cost,
    DeviceRates,
    ImageFlops,
    Scenario,
    StoreLayout,
    break_even_runs,
    cheapest,
    compare_layouts,
    cost_of,
)
from pipeline.cost_estimate.report import advise

FLOPS = ImageFlops(
    step=1_000,
    alignment=200,
    autoencoder=300,
    extraction={"maps": 500, "activations": 100, "image": 0},
    training={"maps": 0, "activations": 400, "image": 500},
    tail_weights={"maps": 0, "activations": 25, "image": 250},
)
RATES = DeviceRates(
    teacher=100.0, autoencoder=60.0, student=200.0, decode_seconds=2.0, decode_overlaps=True
)
SCENARIO = Scenario(
    images=3_600,
    aligned_images_per_run=7_200,
    images_per_run=14_400,
    encoders=2,
    workers=4,
    bytes_per_second_per_worker=100.0,
    device_hour=10.0,
    tb_month=1e9,  # so that 1000 bytes cost 1 a month
    months=2,
    runs=3,
)


def test_every_number_of_one_cut() -> None:
    cost = cost_of(StoreLayout("activations", "faithful", 50), FLOPS, RATES, SCENARIO)
    assert cost.bytes == 3_600 * 50 + 4 * 25
    # networks 300/60 + 100/100 = 6 s, beside 2 s of decoding, then 0.5 s of writing: 6.5 h in all
    assert cost.extraction_device_hours == pytest.approx(6.5)
    assert cost.extraction_hours == pytest.approx(3.25)
    # step 5 s, projector and logits 1 s, teacher 4 s: no wait for half a second of reading
    assert cost.teacher_share_of_step == pytest.approx(0.8)
    assert cost.read_bytes_per_second_per_worker == pytest.approx(5.0)
    assert cost.bandwidth_suffices
    assert cost.device_hours_per_run == pytest.approx(2 * 4)
    assert cost.storage_cost_per_month == pytest.approx(180.1)
    assert cost.cost_once == pytest.approx(65 + 2 * 180.1)
    assert cost.cost_per_run == pytest.approx(80)
    assert cost.cost == pytest.approx(65 + 2 * 180.1 + 240)


def test_a_trainer_that_waits_for_bytes_pays_for_the_wait() -> None:
    cost = cost_of(StoreLayout("maps", "faithful", 900), FLOPS, RATES, SCENARIO)
    # 9 s of reading against 6 s of arithmetic
    assert not cost.bandwidth_suffices
    assert cost.wait_share_of_step == pytest.approx(3 / 5)
    assert cost.read_bytes_per_second_per_worker == pytest.approx(150)
    assert cost.device_hours_per_run == pytest.approx(2 * 3)


def test_on_a_cpu_decoding_takes_time_from_the_networks() -> None:
    rates = replace(RATES, decode_overlaps=False)
    cost = cost_of(StoreLayout("image", "uint8", 100), FLOPS, rates, SCENARIO)
    assert cost.extraction_device_hours == pytest.approx(5 + 2 + 1)


def test_a_store_that_exists_has_paid_for_its_extraction() -> None:
    cost = cost_of(StoreLayout("maps", "faithful", 100, exists=True), FLOPS, RATES, SCENARIO)
    assert cost.extraction_device_hours == 0
    assert cost.cost_once == pytest.approx(2 * 360)


@pytest.mark.parametrize(
    ("once", "per_run", "runs"),
    [
        (50, 10, 1),  # cheaper in every way
        (100, 10, 1),
        (130, 10, 4),  # 30 more once, 10 less a run: equal after 3
        (131, 10, 4),
        (139, 10, 4),
        (140, 10, 5),
        (130, 20, None),  # nothing saved
        (90, 20, 1),
        (90, 21, None),  # cheaper only for few runs
    ],
)
def test_runs_until_caching_is_cheaper(once: float, per_run: float, runs: int | None) -> None:
    assert break_even_runs(once, per_run, other_once=100, other_per_run=20) == runs


def compare(layouts: list[StoreLayout], scenario: Scenario = SCENARIO) -> tuple[Cost, ...]:
    return compare_layouts(layouts, FLOPS, RATES, scenario)


def test_break_even_agrees_with_the_totals() -> None:
    layouts = [StoreLayout("maps", "faithful", 400), StoreLayout("image", "uint8", 100)]
    runs = compare(layouts)[0].break_even_runs
    assert runs is not None
    for number, cheaper in ((runs, True), (runs - 1, False)):
        maps, online = compare(layouts, replace(SCENARIO, runs=number))
        assert (maps.cost < online.cost) is cheaper


def test_advice_for_the_online_teacher() -> None:
    layouts = [StoreLayout("maps", "faithful", 400), StoreLayout("image", "uint8", 100)]
    scenario = replace(SCENARIO, device_hour=0.0)
    costs = compare(layouts, scenario)
    assert cheapest(costs).cut == "image"
    assert costs[0].break_even_runs is None
    advice = advise(costs, scenario)
    assert any("online teacher is cheaper than" in sentence for sentence in advice)
    assert any("never cheaper" in sentence for sentence in advice)
    few = [replace(costs[0], cost=costs[1].cost / 2), *costs[1:]]  # dearer per run only
    assert any("cheaper for few runs only" in sentence for sentence in advise(few, scenario))


def test_only_candidates_are_recommended() -> None:
    layouts = [
        StoreLayout("maps", "faithful", 400),
        StoreLayout("maps", "small", 4, candidate=False),
        StoreLayout("image", "uint8", 100),
    ]
    costs = compare(layouts)
    assert min(costs, key=lambda cost: cost.cost) == costs[1]
    assert cheapest(costs).candidate
    cheaper = "'maps' in small would cost"
    assert any(s.startswith(cheaper) for s in advise(costs, SCENARIO))
    without = compare([layouts[0], layouts[2]])
    assert not any(s.startswith(cheaper) for s in advise(without, SCENARIO))
