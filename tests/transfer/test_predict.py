"""The predicted downtime: what it adds up, and that each part says where it comes from."""

from __future__ import annotations

import json

import pytest

from tokvm.core.units import GiB, MiB
from tokvm.transfer.predict import (
    ASSUMED,
    ASSUMED_CHANGE,
    PARTS,
    Basis,
    Estimate,
    MeasuredPass,
    PassKind,
    Prediction,
    change_rate,
    copy_cost,
    predict_downtime,
    typical,
)

BASE = MeasuredPass(PassKind.BASE, 1000 * MiB, 10.0)


def delta(mib: float, seconds: float, period_s: float = 60.0) -> MeasuredPass:
    return MeasuredPass(PassKind.DELTA, int(mib * MiB), seconds, period_s)


def here(**seconds: float) -> dict[str, Estimate]:
    return {part: Estimate(value, Basis.HERE) for part, value in seconds.items()}


def all_parts(one: dict[str, object]) -> dict[str, object]:
    return dict.fromkeys(PARTS, one)


def test_the_prediction_adds_up() -> None:
    passes = [BASE, delta(60, 0.6, 60.0), delta(30, 0.3, 30.0)]
    assert change_rate(passes) == pytest.approx(MiB)
    known = here(stop=10, boot=20, overhead=2, morph=5, start=1)
    found = predict_downtime(passes, known, since_last_snapshot_s=90)
    assert found.delta_bytes == 100 * MiB
    assert found.delta_s == pytest.approx(1.0, rel=0.01)
    assert found.total_s == pytest.approx(39.0, rel=0.01)
    assert {part.basis for part in found.parts.values()} == {Basis.HERE}
    assert tuple(found.parts) == PARTS


def test_before_anything_was_measured_every_part_says_that_it_is_assumed() -> None:
    found = predict_downtime([BASE], {}, since_last_snapshot_s=100)
    assert {part.basis for part in found.parts.values()} == {Basis.ASSUMED}
    assert found.delta_bytes == 110 * ASSUMED_CHANGE
    assert found.delta_s == pytest.approx(1.1)


def test_before_any_pass_only_the_fixed_parts_are_known() -> None:
    found = predict_downtime([], here(stop=1, boot=2, overhead=3), since_last_snapshot_s=1000)
    assert (found.delta_bytes, found.delta_s) == (0, 0.0)
    assert found.total_s == pytest.approx(6 + ASSUMED["start"].seconds)


def test_what_is_only_assumed_behind_the_stop_stops_no_cutover() -> None:
    guessed = predict_downtime([BASE], {}, since_last_snapshot_s=3600)
    assert guessed.budgeted_s == pytest.approx(sum(ASSUMED[part].seconds for part in ("stop", "overhead", "start")))
    rehearsed = predict_downtime([BASE, delta(10, 1)], {"boot": Estimate(40, Basis.REHEARSED)}, since_last_snapshot_s=60)
    assert rehearsed.budgeted_s == pytest.approx(rehearsed.total_s)


def test_a_weekend_of_changes_is_no_larger_than_the_disks() -> None:
    found = predict_downtime([BASE, delta(60, 1)], {}, since_last_snapshot_s=3 * 86400, most_bytes=2 * GiB)
    assert found.delta_bytes == 2 * GiB


def test_an_idle_guest_s_delta_still_costs_what_any_delta_costs() -> None:
    found = predict_downtime([BASE, delta(0, 0.4), delta(0, 0.5)], {}, since_last_snapshot_s=3600)
    assert found.delta_bytes == 0
    assert found.delta_s == pytest.approx(0.45)


def test_scattered_deltas_cost_more_for_each_byte_than_the_base() -> None:
    passes = [BASE, delta(10, 1.0), delta(40, 2.5), delta(90, 5.0)]
    once_s, per_byte_s = copy_cost(passes)
    assert once_s == pytest.approx(0.5)
    assert per_byte_s * MiB == pytest.approx(0.05)


def test_one_pass_over_a_broken_line_does_not_move_the_rest() -> None:
    passes = [BASE, delta(10, 0.2), delta(30, 0.4), delta(20, 600.0), delta(80, 0.9), delta(5, 0.15)]
    found = predict_downtime(passes, {}, since_last_snapshot_s=50)
    assert found.delta_s < 2


def test_deltas_of_long_ago_count_no_more() -> None:
    slow, fast = [delta(10, 60.0)] * 5, [delta(10, 1.0)] * 5
    assert copy_cost([BASE, *slow, *fast])[0] == pytest.approx(0.9)
    assert typical([60.0] * 5 + [1.0] * 5) == 1.0
    assert typical([]) is None


def test_a_prediction_comes_back_from_its_document() -> None:
    found = predict_downtime([BASE, delta(60, 1)], {"boot": Estimate(12.5, Basis.REHEARSED)}, since_last_snapshot_s=5)
    again = Prediction.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.parts["boot"] == Estimate(12.5, Basis.REHEARSED)
    assert again.to_dict() == found.to_dict()
    assert "boot 12.5 s (rehearsed)" in found.describe()
    assert "morph" not in found.describe()


@pytest.mark.parametrize(
    "change",
    [
        {"predicted_parts": None},
        {"predicted_parts": {"stop": {"seconds": 1, "basis": "assumed"}}},
        {"predicted_parts": dict.fromkeys(PARTS, 3)},
        {"predicted_parts": all_parts({"seconds": 1, "basis": "a star"})},
        {"predicted_parts": all_parts({"seconds": float("nan"), "basis": "assumed"})},
        {"predicted_parts": all_parts({"seconds": -1, "basis": "assumed"})},
        {"predicted_parts": all_parts({"seconds": None, "basis": "assumed"})},
        {"predicted_delta_bytes": "many"},
    ],
)
def test_a_document_that_says_something_else_is_refused(change: dict[str, object]) -> None:
    document = predict_downtime([BASE], {}, since_last_snapshot_s=5).to_dict()
    with pytest.raises(ValueError, match=r"part|Basis"):
        Prediction.from_dict({**document, **change})
