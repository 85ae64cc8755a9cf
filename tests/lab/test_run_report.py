"""Figures of the lab's report: who measured what, and what they add up to."""

from __future__ import annotations

import json

import pytest

from tokvm.lab.command import Event
from tokvm.lab.report import PARTS, GuestReport, LabOutcome, as_text, combined, downtime


def part(name: str, at: float) -> Event:
    return Event(at, {"event": "downtime", "part": name, "seconds": 99.0})


def report(guest: str = "one", *, total: float = 4.0, outcome: LabOutcome = LabOutcome.MIGRATED, lost: int = 0) -> GuestReport:
    times = {"total": total, "stop": 1.0, "delta": 1.0, "start": 1.0, "boot": total - 3.0}
    passes = ({"kind": "base", "bytes": 1 << 20, "seconds": 0.5}, {"kind": "final", "bytes": 4096, "seconds": 0.1})
    ledger: dict[str, object] = {"acknowledged": 100, "lost": lost}
    return GuestReport(guest, "xenserver", passes, times, ledger, {"domain": guest, "state": "running"}, outcome)


def test_the_parts_are_cut_by_the_outside_clock_and_add_up() -> None:
    events = [Event(99.0, {"event": "phase"}), part("stop", 101.5), part("delta", 102.0), part("start", 102.25)]
    times = downtime(100.0, 110.0, events, {})
    assert times == {"total": 10.0, "stop": 1.5, "delta": 0.5, "start": 0.25, "boot": 7.75}
    assert sum(times[name] for name in PARTS if name in times) == times["total"]


def test_a_morph_is_a_part_of_its_own_where_there_was_one() -> None:
    events = [part("stop", 101.5), part("delta", 102.0), part("morph", 105.0), part("start", 105.25)]
    times = downtime(100.0, 110.0, events, {})
    assert times == {"total": 10.0, "stop": 1.5, "delta": 0.5, "morph": 3.0, "start": 0.25, "boot": 4.75}
    own = downtime(100.0, 110.0, [], {"stop": 2.0, "delta": 3.0, "morph": 1.0, "start": 1.0, "total": 7.0})
    assert own == {"total": 10.0, "stop": 2.0, "delta": 3.0, "morph": 1.0, "start": 1.0, "boot": 3.0}


def test_an_event_outside_the_downtime_makes_no_negative_part() -> None:
    times = downtime(100.0, 103.0, [part("stop", 99.0), part("delta", 102.0), part("start", 104.0)], {})
    assert times == {"total": 3.0, "stop": 0.0, "delta": 2.0, "start": 1.0, "boot": 0.0}


def test_without_events_tokvms_own_figures_stand_and_boot_is_the_rest() -> None:
    times = downtime(100.0, 110.0, [part("stop", 101.0)], {"stop": 2.0, "delta": 3.0, "start": 1.0, "total": 6.0})
    assert times == {"total": 10.0, "stop": 2.0, "delta": 3.0, "start": 1.0, "boot": 4.0}


def test_one_guests_document_has_the_promised_keys() -> None:
    document = combined("xenserver", [report()], {"guests": 1})
    assert {"source", "passes", "downtime_s", "ledger", "target", "outcome"} <= document.keys()
    read = json.loads(json.dumps(document))
    assert read["outcome"] == "migrated"
    assert read["ledger"] == {"acknowledged": 100, "lost": 0}
    assert [one["kind"] for one in read["passes"]] == ["base", "final"]


def test_several_guests_are_summed_and_the_worst_decides() -> None:
    reports = [report("one", total=4.0), report("two", total=9.0, outcome=LabOutcome.LOST_WRITES, lost=3)]
    document = json.loads(json.dumps(combined("xenserver", reports, {})))
    assert document["outcome"] == "lost-writes"
    assert document["downtime_s"]["total"] == 9.0
    assert document["ledger"] == {"acknowledged": 200, "lost": 3}
    assert [one["guest"] for one in document["guests"]] == ["one", "two"]
    assert {one["guest"] for one in document["passes"]} == {"one", "two"}


@pytest.mark.parametrize(("outcome", "words"), [(LabOutcome.MIGRATED, "0 lost"), (LabOutcome.FAILED, "failed")])
def test_a_person_reads_what_matters(outcome: LabOutcome, words: str) -> None:
    text = as_text(report(outcome=outcome))
    assert words in text
    assert "downtime  4.00 s seen from outside" in text


def test_a_failure_without_any_figures_is_still_a_report() -> None:
    failed = GuestReport("one", "xenserver", (), {}, {}, {}, LabOutcome.FAILED, "no route")
    assert as_text(failed) == "one: failed: no route"
    assert combined("xenserver", [failed], {})["outcome"] is LabOutcome.FAILED
