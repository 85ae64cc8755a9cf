"""Changed block tracking of the played vSphere against what really differs between two moments."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pyVmomi import vim, vmodl
from tests.persona.conftest import BuildVSphere, MiB
from tests.persona.vsphere_client import connected, disks, machine, result, snapshot, wait

from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, MachineSpec
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.vsphere.tracking import BLOCK

pytestmark = pytest.mark.slow

SIZE = 4 * MiB + 512  # ends within a block
KiB = 1 << 10
Areas = list[tuple[int, int]]


def _build(build_vsphere: BuildVSphere, *, running: bool = True, **options: Any) -> VSphere:
    spec = MachineSpec("web", disks=[DiskSpec(SIZE), DiskSpec(MiB)], running=running)
    return build_vsphere(spec, **options)


def _enable(vm: Any, *, enabled: bool = True) -> Any:
    return wait(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=enabled)))


def _change_id(config: Any, disk: int = 0) -> str | None:
    found: str | None = disks(config)[disk].backing.changeId
    return found


def _areas(vm: Any, taken: Any, change_id: str, *, size: int = SIZE, disk: int = 0) -> tuple[Areas, list[int]]:
    """(all areas, how many were in each page), read as a client should: on from the end of each page to the disk's end."""
    key = disks(vm.config)[disk].key
    found: Areas = []
    pages: list[int] = []
    at = 0
    while at < size:
        page = vm.QueryChangedDiskAreas(taken, key, at, change_id)
        assert page.startOffset == at
        assert page.length > 0
        found += [(one.start, one.length) for one in page.changedArea]
        pages.append(len(page.changedArea))
        at = page.startOffset + page.length
    assert at == size
    return found, pages


def _check(areas: Areas, before: bytes, after: bytes) -> None:
    """Ascending, disjoint, within the disk; nothing that differs is missing, and every area has a reason."""
    end = 0
    outside = bytearray(after)
    for start, length in areas:
        assert end <= start < start + length <= len(after)
        end = start + length
        assert before[start:end] != after[start:end]
        outside[start:end] = before[start:end]
    assert bytes(outside) == before


@pytest.mark.parametrize("vcenter", [True, False])
def test_areas_are_what_differs_between_two_snapshots(build_vsphere: BuildVSphere, vcenter: bool) -> None:
    vsphere = _build(build_vsphere, vcenter=vcenter)
    host, rng = vsphere.host, random.Random(7)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        assert _change_id(vm.config) is None
        assert _enable(vm).state == "success"
        first = snapshot(vm, "a")
        since, before = _change_id(first.config), host.read_disk("web")
        assert since is not None
        result(first.RemoveSnapshot_Task(removeChildren=False))  # its moment is asked for all the same
        for at in (0, BLOCK, SIZE - 512, *(rng.randrange(SIZE // 512) * 512 for _ in range(12))):
            host.write_disk("web", 0, offset=at, data=rng.randbytes(512))
        host.write_disk("web", 1, offset=0, data=b"x" * 512)
        second = snapshot(vm, "b")
        areas, pages = _areas(vm, second, since)
        _check(areas, before, host.read_disk("web"))
        assert sum(length for _, length in areas) < SIZE
        assert max(pages) == 2
        assert 0 in pages  # an empty page in the middle is not the end
        assert _change_id(second.config) != since


def test_a_chain_of_passes_loses_nothing(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    host, rng = vsphere.host, random.Random(3)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        taken = snapshot(vm, "0")
        copy = bytearray(host.read_disk("web"))
        for number in range(1, 4):
            since = _change_id(taken.config)
            assert since is not None
            host.write_disk("web", 0, offset=rng.randrange(SIZE // 512) * 512, data=rng.randbytes(512))
            host.trim_disk("web", 0, offset=128 * KiB, length=4096)
            fresh = snapshot(vm, str(number))
            result(taken.RemoveSnapshot_Task(removeChildren=False))
            at_snapshot = host.read_disk("web", snapshot=host.snapshots("web")[-1]["id"])
            host.write_disk("web", 0, offset=MiB, data=rng.randbytes(512))  # behind the snapshot: of the next pass
            for start, length in _areas(vm, fresh, since)[0]:
                copy[start : start + length] = at_snapshot[start : start + length]
            assert bytes(copy) == at_snapshot
            taken = fresh


def test_nothing_changed_is_one_empty_page_and_no_area(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        since = _change_id(snapshot(vm, "a").config)
        assert _areas(vm, snapshot(vm, "b"), str(since)) == ([], [0])


def test_a_page_covers_no_more_than_its_span(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, span=MiB, areas=100, empty_pages=False)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        since = _change_id(snapshot(vm, "a").config)
        before = vsphere.host.read_disk("web")
        vsphere.host.write_disk("web", 0, offset=MiB - 512, data=b"y" * 1024)
        areas, pages = _areas(vm, snapshot(vm, "b"), str(since))
        assert pages == [1, 1, 0, 0, 0]
        _check(areas, before, vsphere.host.read_disk("web"))


def test_a_star_is_what_was_ever_written(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    vsphere.host.write_disk("web", 0, offset=MiB, data=b"z" * 512)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        taken = snapshot(vm, "a")
        assert _areas(vm, taken, "*")[0] == [(MiB, BLOCK)]
        vsphere.set_options(cbt_star_fails=True)
        with pytest.raises(vim.fault.FileFault):
            vm.QueryChangedDiskAreas(taken, disks(vm.config)[0].key, 0, "*")


def test_an_nfs_datastore_knows_no_star(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, esxi={"datastores": (DatastoreSpec(type="NFS"),)})
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        taken = snapshot(vm, "a")
        with pytest.raises(vim.fault.FileFault):
            vm.QueryChangedDiskAreas(taken, disks(vm.config)[0].key, 0, "*")
        assert _areas(vm, taken, str(_change_id(taken.config))) == ([], [0])


def test_offsets_at_the_end_and_moments_that_were_not_tracked_are_refused(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        untracked = snapshot(vm, "before")
        key = disks(vm.config)[0].key
        with pytest.raises(vmodl.fault.InvalidArgument, match="startOffset"):
            vm.QueryChangedDiskAreas(untracked, key, 0, "*")
        result(untracked.RemoveSnapshot_Task(removeChildren=False))
        _enable(vm)
        taken = snapshot(vm, "a")
        for start in (SIZE, SIZE + 512, -512):
            with pytest.raises(vmodl.fault.InvalidArgument):
                vm.QueryChangedDiskAreas(taken, key, start, "*")
        with pytest.raises(vmodl.fault.InvalidArgument):
            vm.QueryChangedDiskAreas(None, key, 0, "*")  # of a running VM only a snapshot can be asked
        with pytest.raises(vim.fault.FileFault):
            vm.QueryChangedDiskAreas(taken, key, 0, "52 00 00 00 00 00 00 00-00 00 00 00 00 00 00 00/1")


def test_the_final_delta_of_a_vm_that_is_off_needs_no_snapshot(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        since = _change_id(snapshot(vm, "a").config)
        before = vsphere.host.read_disk("web")
        vsphere.host.write_disk("web", 0, offset=512, data=b"l" * 512)
        result(vm.PowerOffVM_Task())
        _check(_areas(vm, None, str(since))[0], before, vsphere.host.read_disk("web"))


@pytest.mark.parametrize("how", ["crash", "revert"])
def test_after_a_reset_the_uuid_is_another_and_the_old_moments_are_worth_nothing(build_vsphere: BuildVSphere, how: str) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        since = str(_change_id(snapshot(vm, "a").config))
        if how == "crash":
            vsphere.reset_tracking("web")
        else:
            vsphere.host.revert("web", vsphere.host.snapshots("web")[0]["id"])
        fresh = snapshot(vm, "b")
        now = str(_change_id(fresh.config))
        assert now.partition("/")[0] != since.partition("/")[0]
        with pytest.raises(vim.fault.FileFault):
            vm.QueryChangedDiskAreas(fresh, disks(vm.config)[0].key, 0, since)
        vsphere.host.write_disk("web", 0, offset=0, data=b"n" * 512)
        assert _areas(vm, snapshot(vm, "c"), now)[0] == [(0, BLOCK)]


def test_it_begins_at_once_when_off_and_at_the_next_stun_when_running(build_vsphere: BuildVSphere) -> None:
    running = _build(build_vsphere)
    with connected(running) as instance:
        vm = machine(instance, running)
        _enable(vm)
        assert vm.config.changeTrackingEnabled is True
        assert _change_id(vm.config) is None
        result(snapshot(vm, "stun").RemoveSnapshot_Task(removeChildren=False))
        assert _change_id(vm.config) is not None
    off = _build(build_vsphere, running=False)
    with connected(off) as instance:
        vm = machine(instance, off)
        _enable(vm)
        assert _change_id(vm.config) is not None
        assert _change_id(vm.config, 0) != _change_id(vm.config, 1)  # each disk has a uuid of its own
        _enable(vm, enabled=False)
        assert _change_id(vm.config) is None


def test_a_snapshot_by_ssh_is_tracked_too(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    host = vsphere.host
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        for number in (1, 2):
            host.vim("vmsvc/snapshot.create", host.vmid("web"), f"tokvm-x-{number}", "tokvm", 0, 0)
            host.write_disk("web", 0, offset=number * MiB, data=b"w" * 512)
        root = vm.snapshot.rootSnapshotList[0]
        child = root.childSnapshotList[0].snapshot
        assert _areas(vm, child, str(_change_id(root.snapshot.config)))[0] == [(MiB, BLOCK)]


@pytest.mark.parametrize(("spec", "wanted"), [({}, "InvalidState"), ({"fields": {"version": "vmx-04"}}, "NotSupported")])
def test_it_is_refused_over_snapshots_and_on_old_hardware(build_vsphere: BuildVSphere, spec: Any, wanted: str) -> None:
    vsphere = build_vsphere(MachineSpec("web", disks=[DiskSpec(MiB)], **spec))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        if not spec:
            snapshot(vm)
        assert type(_enable(vm).error).__name__.rpartition(".")[2] == wanted


def test_independent_and_physical_disks_have_no_change_id(build_vsphere: BuildVSphere) -> None:
    kinds = [DiskSpec(MiB), DiskSpec(MiB, mode="independent_persistent"), DiskSpec(MiB, rdm="physicalMode")]
    vsphere = build_vsphere(MachineSpec("web", disks=kinds, running=False))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        _enable(vm)
        assert [_change_id(vm.config, number) is not None for number in range(3)] == [True, False, False]
