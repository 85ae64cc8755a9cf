"""What a rehearsal leaves becomes the domain of the cutover; what failed stands in its way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.domain.conftest import make_plan

from tokvm.app.ways import Replay, by_way, hardware_of, refuse_failed, rehearsed
from tokvm.core.errors import Blocked, UsageError
from tokvm.core.machine import DiskBus, NicModel
from tokvm.domain.base import DirectKernel
from tokvm.guest.base import Judgement, Verdict, Way
from tokvm.migration.records import RehearsalRecord

KERNEL = {"image": "/k/vmlinuz", "initrd": "/k/initrd", "cmdline": "root=UUID=1 ro"}


def record(number: int, way: Way, *, works: bool = True, **document: Any) -> RehearsalRecord:
    replay = Replay(way, **document).to_json() if works else None
    return RehearsalRecord(number, 0.0, way, works, {"replay": replay, "why": "no sign of life"})


def test_a_replay_survives_the_journal() -> None:
    made = Replay(Way.MICRO, family="linux", boot_disk=1, mounts={"/": "/dev/sda1"}, micro={"initrds": []})
    assert Replay.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("stored", [None, {"way": "micro", "later": 1}, []])
def test_a_replay_of_another_version_is_refused(stored: object) -> None:
    with pytest.raises(UsageError, match="rehearse"):
        Replay.from_json(stored)


def test_virtio_is_the_plans_own_hardware() -> None:
    plan = by_way(make_plan(), Replay(Way.MICRO, family="linux", boot_disk=1, bus="pvscsi", kernel=KERNEL))
    assert {disk.bus for disk in plan.disks} == {DiskBus.VIRTIO_BLK}
    assert (plan.boot_disk, plan.kernel, plan.nic_model) == (1, None, NicModel.VIRTIO)


def test_the_kernel_way_boots_what_lies_beside_the_vm() -> None:
    assert by_way(make_plan(), Replay(Way.KERNEL, kernel=KERNEL)).kernel == DirectKernel(**KERNEL)


def test_compatible_hardware_is_on_every_disk_and_nic() -> None:
    plan = by_way(make_plan(), Replay(Way.COMPATIBLE, bus="ide", nic="e1000"))
    assert {disk.bus for disk in plan.disks} == {DiskBus.IDE}
    assert (plan.machine, plan.nic_model) == ("pc", NicModel.E1000), "QEMU's q35 has no IDE"
    assert by_way(make_plan(), Replay(Way.COMPATIBLE, bus="pvscsi", nic="vmxnet3")).machine == "q35"


def test_windows_is_told_to_the_domain_only_when_somebody_looked() -> None:
    plan = make_plan()
    assert by_way(plan, Replay(Way.NONE, family="windows", windows=True)).is_windows
    assert by_way(plan, Replay(Way.NONE)).windows is None


def test_compatible_hardware_is_the_guests_own_and_never_virtio() -> None:
    buses = (DiskBus.VIRTIO_BLK, DiskBus.PVSCSI, DiskBus.IDE)
    found = Judgement(Verdict.READY, "", (), (), buses=buses, nics=("vmxnet3", "e1000"))
    assert hardware_of(Way.COMPATIBLE, found) == ("pvscsi", "vmxnet3")
    assert hardware_of(Way.MICRO, found) == ("", "")
    assert hardware_of(Way.COMPATIBLE, Judgement(Verdict.CANNOT, "", (), ()))[0] == ""


def test_the_newest_rehearsal_that_worked_is_replayed() -> None:
    records = [record(1, Way.MICRO, boot_disk=1), record(2, Way.COMPATIBLE, bus="ide"), record(3, Way.MICRO, works=False)]
    assert rehearsed(records, None) == Replay(Way.COMPATIBLE, bus="ide")
    assert rehearsed(records, Way.MICRO) == Replay(Way.MICRO, boot_disk=1)
    assert rehearsed(records, Way.KERNEL) is None
    assert rehearsed([], None) is None


def test_a_failed_rehearsal_stands_in_the_way_until_another_works_or_a_person_says_so() -> None:
    failed = [record(1, Way.MICRO), record(2, Way.MICRO, works=False)]
    with pytest.raises(Blocked, match="no sign of life") as refused:
        refuse_failed(failed, where="web", forced=False)
    assert refused.value.fix.startswith("mend the guest")
    assert "--despite-rehearsal" in refused.value.fix
    told = RehearsalRecord(2, 0.0, Way.MICRO, False, {"why": "/boot is full", "fix": "remove old kernels"})
    with pytest.raises(Blocked, match="/boot is full") as refused:
        refuse_failed([told], where="web", forced=False)
    assert refused.value.fix.startswith("remove old kernels; then rehearse again")
    refuse_failed(failed, where="web", forced=True)
    refuse_failed([*failed, record(3, Way.KERNEL)], where="web", forced=False)
    refuse_failed([], where="web", forced=False)
