"""What is predicted right before a stop, kept with the intent to stop, and what came of it, by the clock of a fake world."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.migration.conftest import Rig

from tokvm.core.errors import BudgetExceeded, TokvmError
from tokvm.migration.forecast import CONVERSION, compared, expected, forecast, foreseen, prediction_in, spent
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import DowntimePart
from tokvm.testing.fakes import BLOCK, Death, Fault, World
from tokvm.transfer.predict import ASSUMED, Basis, Estimate

T = TypeVar("T")
OPTIONS: dict[str, Any] = {"deadline_s": 300.0, "proof_s": 300.0, "settle_s": 10.0}
WAYS = {"none": 0.0, "micro": 4.0, "kernel": 0.0, "compatible": 0.0, "virt-v2v": 140.0, "prestage": 0.0}
"""Seconds that the morph of each way takes; 0 where nothing is left to do in the downtime."""


@dataclass
class SlowWorld(World):
    """A world in which things take time, each call as long as `costs` says, give or take a tenth; the guest writes `rate`
    blocks a second, and answers (but has no agent) `boot_s` after its start."""

    costs: dict[str, float] = field(default_factory=dict)
    boot_s: float = 25.0
    rate: float = 0.5
    luck: random.Random = field(default_factory=random.Random)
    written_until: float = 1000.0
    started: float = 0.0

    def call(self, name: str, act: Callable[[], T], *, lost: type[TokvmError] = TokvmError) -> T:
        self.clock.seconds += self.about(self.costs.get(name, 0.0))
        if name == "host.start":
            self.started = self.clock.seconds + self.about(self.boot_s)
        return super().call(name, act, lost=lost)

    def about(self, seconds: float) -> float:
        return seconds * self.luck.uniform(0.9, 1.1)

    def guests_write(self) -> None:
        due = int((self.clock.seconds - self.written_until) * self.rate)
        self.written_until += due / self.rate
        for _ in range(min(due, len(self.disks[0]) // BLOCK)):
            super().guests_write()

    def answers(self) -> bool:
        return self.target_on and self.clock.seconds >= self.started


@pytest.fixture
def slow_rig(fast_dir: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*, seed: int = 1, way: str = "none") -> Rig:
        path = fast_dir / f"slow-{len(rigs)}"
        path.mkdir(mode=0o700)
        world = SlowWorld.make(blocks=256)
        assert isinstance(world, SlowWorld)
        world.luck, world.lives = random.Random(seed), False
        world.costs = {
            "chunk": 0.05,
            "open_disk": 0.4,
            "snapshot": 1.5,
            "shut_down": 12.0,
            "host.start": 1.0,
            "morph": WAYS[way],
        }
        rigs.append(Rig(path, world, proof=world.answers, morphs=WAYS[way] > 0))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def sync(rig: Rig) -> None:
    rig.begin()
    for passes, pause_s in enumerate((30, 60, 45, 60), 1):
        rig.migration().sync(passes=passes)
        rig.world.clock.sleep(pause_s)


def rehearse(rig: Rig, way: str, *, works: bool = True, **timings: float) -> None:
    rig.book.rehearsed(way, {"works": works, "way": way, "timings": timings}, works=works)


def stranger(rig: Rig, source: str, **seconds: float) -> None:
    """Another VM was cut over before, with these parts; it copied nothing in its downtime."""
    rig.world.clock.sleep(1)
    vm = replace(rig.world.machine(), uuid=f"other-{rig.world.clock.seconds}")
    record = rig.journals[0].create(vm=vm, source=source, plan={}, targets=["/fake/other"])
    book = rig.journals[0].book(record.id)
    book.advance(Event.CUT_OVER)
    for part, value in seconds.items():
        book.timing(1, DowntimePart(part), value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_the_prediction_is_within_a_quarter_of_what_comes(slow_rig: Callable[..., Rig], way: str) -> None:
    for seed in range(6):
        rig = slow_rig(seed=seed, way=way)
        world = rig.world
        assert isinstance(world, SlowWorld)
        sync(rig)
        rehearse(rig, way, morph=world.about(WAYS[way]), boot=world.about(world.boot_s), inspection=60.0)
        stranger(rig, "fake://source", stop=world.about(12), delta=world.about(1.7), start=world.about(1))
        report = rig.migration().cutover(**OPTIONS)
        assert report.proved
        actual, predicted = spent(rig.book, 1), foreseen(rig.book)[1]
        assert sum(actual.values()) == pytest.approx(report.downtime_s["total"], abs=0.01)
        found = compared(predicted, actual)
        assert found.actual_s > 35
        assert found.error_percent is not None
        assert abs(found.error_percent) <= 25, (predicted.describe(), actual)
        assert {part.basis for part in predicted.parts.values()} == {Basis.HERE, Basis.REHEARSED, Basis.SOURCE}


def test_the_prediction_is_kept_with_the_intent_to_stop(slow_rig: Callable[..., Rig]) -> None:
    """Whoever dies right behind it has it already; nobody can change it afterwards."""
    rig = slow_rig()
    sync(rig)
    rig.world.always = {"fence": Fault.DIE_BEFORE}
    with pytest.raises(Death):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.STOP_INTENT
    kept = foreseen(rig.book)[1]
    rig.world.always = {}
    report = rig.migration().cutover(**OPTIONS)
    assert report.prediction == kept
    assert report.to_dict()["predicted_downtime_s"] == pytest.approx(kept.total_s, abs=0.001)
    assert rig.migration().status().prediction == kept


def test_it_is_shown_before_the_stop(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    sync(rig)
    migration, notes = rig.migration(), []

    class Watcher:
        def note(self, text: str) -> None:
            notes.append((text, rig.world.source_on))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    migration._doors = replace(migration._doors, observer=Watcher())
    migration.cutover(**OPTIONS)
    text, on = next(found for found in notes if "predicted downtime" in found[0])
    assert on
    assert "(assumed)" in text
    assert "(measured here)" in text


def test_parts_come_from_the_nearest_that_was_measured(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    sync(rig)

    def basis(part: str) -> tuple[float, Basis]:
        found = forecast(rig.book, rig.book.now())
        assert found is not None
        return round(found.parts[part].seconds, 3), found.parts[part].basis

    assert basis("stop") == (ASSUMED["stop"].seconds, Basis.ASSUMED)
    stranger(rig, "esx://elsewhere", stop=1.0)
    assert basis("stop")[1] is Basis.ASSUMED
    stranger(rig, "fake://elsewhere", stop=44.0)
    assert basis("stop") == (44.0, Basis.HYPERVISOR)
    stranger(rig, "fake://source", stop=33.0, delta=2.5)
    assert basis("stop") == (33.0, Basis.SOURCE)
    assert basis("overhead") == (2.5, Basis.SOURCE)
    assert basis("boot")[1] is Basis.ASSUMED
    rehearse(rig, "none", boot=17.0, morph=3.0)
    rehearse(rig, "micro", boot=999.0, morph=999.0, works=False)
    assert basis("boot") == (17.0, Basis.REHEARSED)
    assert basis("morph") == (3.0, Basis.REHEARSED)
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(TokvmError):
        rig.migration().cutover(**OPTIONS)
    seconds, where = basis("stop")
    assert where is Basis.HERE
    assert seconds == pytest.approx(spent(rig.book, 1)["stop"])
    assert basis("boot") == (17.0, Basis.REHEARSED)


def test_the_way_that_was_chosen_counts_and_the_newest_look_at_it(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig(way="micro")
    sync(rig)

    def morph() -> Estimate:
        found = forecast(rig.book, rig.book.now())
        assert found is not None
        return found.parts["morph"]

    assert morph() == ASSUMED["morph"]
    rig.book.replan({"way": "virt-v2v"})
    assert morph() == CONVERSION
    rehearse(rig, "virt-v2v", morph=240.0, boot=20.0)
    rehearse(rig, "micro", morph=3.0, boot=20.0)
    assert morph() == Estimate(240.0, Basis.REHEARSED)
    rig.book.replan({"way": None})
    assert morph() == Estimate(3.0, Basis.REHEARSED)
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(TokvmError):
        rig.migration().cutover(**OPTIONS)
    assert morph() == Estimate(spent(rig.book, 1)["morph"], Basis.HERE)
    rehearse(rig, "kernel", morph=0.0, boot=20.0)
    assert morph() == Estimate(0.0, Basis.REHEARSED)


def test_a_delta_is_split_into_bytes_and_what_is_around_them(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    sync(rig)
    report = rig.migration().cutover(**OPTIONS)
    parts = spent(rig.book, 1)
    final = report.passes[-1]
    assert final.kind == "final"
    assert parts["delta"] == pytest.approx(final.seconds, abs=0.01)
    assert parts["overhead"] == pytest.approx(report.downtime_s["delta"] - final.seconds, abs=0.01)


def test_each_attempt_keeps_its_own_figures(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    sync(rig)
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(TokvmError):
        rig.migration().cutover(**OPTIONS)
    first = spent(rig.book, 1)
    assert list(first) == ["stop", "delta", "overhead"]
    rig.world.always = {}
    rig.world.clock.sleep(100)
    rig.migration().sync(passes=1)
    rig.migration().cutover(**OPTIONS)
    assert spent(rig.book, 1) == first
    assert list(spent(rig.book, 2)) == ["stop", "delta", "overhead", "start", "boot"]
    predictions = foreseen(rig.book)
    assert sorted(predictions) == [1, 2]
    assert predictions[2].parts["overhead"].basis is Basis.HERE
    assert compared(predictions[1], first).predicted_s < predictions[1].total_s


def test_a_status_predicts_a_cutover_now_and_later_shows_what_was_foreseen(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    rig.begin()
    assert expected(rig.book) is None
    assert rig.migration().status().to_dict()["predicted_downtime_s"] is None
    rig.migration().sync(passes=2)
    soon = rig.migration().status().prediction
    rig.world.clock.sleep(200)
    later = rig.migration().status().prediction
    assert soon is not None
    assert later is not None
    assert later.delta_bytes > soon.delta_bytes
    rig.migration().cutover(**OPTIONS)
    rig.world.clock.sleep(9999)
    done = rig.migration().status()
    assert done.prediction == foreseen(rig.book)[1]
    rig.migration().finish()
    assert rig.migration().status().prediction == done.prediction


def test_a_budget_names_the_parts_that_are_over_it(slow_rig: Callable[..., Rig]) -> None:
    rig = slow_rig()
    sync(rig)
    rehearse(rig, "none", boot=90.0, morph=0.0)
    with pytest.raises(BudgetExceeded, match=r"boot 1 min 30 s \(rehearsed\)"):
        rig.migration().cutover(**OPTIONS, budget_s=60.0)
    assert rig.world.source_on


@pytest.mark.parametrize("note", ["", "by hand", "{", '{"predicted_parts": 3}', "[1]", '{"a": NaN}'])
def test_a_note_without_a_prediction_is_none(note: str) -> None:
    assert prediction_in(note) is None
