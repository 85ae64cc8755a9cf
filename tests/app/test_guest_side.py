"""What a migration does about its guest: a way that cannot be gone bars no way back, and a trial boot spoils nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.domain.conftest import make_plan
from tests.migration.conftest import Rig

from tokvm.app import guests
from tokvm.app.guests import GuestSide
from tokvm.app.plan import Plan, TargetChoice
from tokvm.app.ways import Replay
from tokvm.core.errors import Blocked
from tokvm.core.machine import Firmware
from tokvm.domain.base import Accel, DomainPlan, LifeSigns, Outcome
from tokvm.domain.nvram import VariableStore
from tokvm.domain.rehearsal import VARIABLES, RehearsalPlan
from tokvm.guest.base import Way
from tokvm.migration.doors import Silent
from tokvm.testing.fakes import World


@dataclass
class Host:
    trials: list[RehearsalPlan] = field(default_factory=list)

    def accel(self) -> Accel:
        return Accel.TCG

    def rehearse(self, trial: RehearsalPlan, *, deadline_s: float) -> LifeSigns:
        self.trials.append(trial)
        return LifeSigns(Outcome.ALIVE, 1.0, "serial")


@pytest.fixture
def side(tmp_path: Path) -> Iterator[GuestSide]:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    rig = Rig(state, World.make())
    rig.begin()
    rig.migration().sync(passes=1)
    plan = Plan("fake://source", (TargetChoice(str(tmp_path / "disk.raw")),))
    yield GuestSide(state, rig.book, plan, Host(), Silent(), lambda *_: None)  # type: ignore[arg-type]
    rig.close()


@pytest.mark.parametrize("way", [Way.MICRO, Way.KERNEL, Way.COMPATIBLE])
def test_a_way_that_was_not_rehearsed_is_refused_before_a_cutover_and_never_by_a_rollback(side: GuestSide, way: Way) -> None:
    asked = replace(side, plan=replace(side.plan, way=way))
    with pytest.raises(Blocked, match="was not rehearsed"):
        asked.require_way()
    with pytest.raises(Blocked, match="was not rehearsed"):
        asked.domain(make_plan())
    assert asked.morpher(make_plan) is None
    asked.folder.mkdir(parents=True)
    (asked.folder / "morph").mkdir(mode=0o700)
    morpher = asked.morpher(make_plan)
    assert morpher is not None
    assert not morpher.changes_disks
    assert morpher.undo()
    morpher.release()


def test_virt_v2v_that_is_not_installed_is_said_before_the_stop(side: GuestSide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "find_virt_v2v", lambda: None)
    with pytest.raises(Blocked, match="not installed"):
        replace(side, plan=replace(side.plan, way=Way.VIRT_V2V)).require_way()
    replace(side, plan=replace(side.plan, way=Way.NONE)).require_way()


def boot_order(nvram: str) -> Any:
    return VariableStore.parse(Path(nvram).read_bytes(), where=nvram).find("BootOrder")


def test_a_trial_boot_has_variables_of_its_own(side: GuestSide) -> None:
    """Both lie in the migration's folder, and a trial removes its own: without a boot entry no loader is found."""
    plan: DomainPlan = side._by_way(make_plan(firmware=Firmware.UEFI), Replay(Way.MICRO, loader="\\EFI\\debian\\grubx64.efi"))
    assert boot_order(plan.nvram)
    side._boots(None, 1)(plan, tuple("/o" for _ in plan.disks))
    assert isinstance(side.host, Host)
    (trial,) = side.host.trials
    assert trial.plan.nvram == plan.nvram
    assert trial.folder / VARIABLES != Path(plan.nvram)
    assert (trial.folder / VARIABLES).parent == Path(plan.nvram).parent
