"""What a VM is made of, and what is in the way of moving it."""

from __future__ import annotations

import pytest
from tests.sources.conftest import DISK, OTHER_DISK, SNAPSHOT, SR, VM, ScriptedHost, add_disk, add_snapshot, refusal

from tokvm.core.errors import SourceError
from tokvm.core.machine import Firmware, Severity
from tokvm.sources.xenserver.source import XenServerSource

VBDS = ("vbd-list", f"vm-uuid={VM}", "type=Disk")


def test_hardware(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(
        name_label="a\nname, with: everything", HVM_boot_params="order: cdn; firmware: uefi", platform="secureboot: true"
    )
    vm = source.inspect(VM)
    assert (vm.name, vm.vcpus, vm.memory) == ("a\nname, with: everything", 2, 1 << 30)
    assert (vm.firmware, vm.secure_boot, vm.tpm) == (Firmware.UEFI, True, False)
    assert vm.extra["virtualization"] == "hvm"
    assert vm.extra["boot-order"] == "cdn"
    assert [(nic.mac, nic.network) for nic in vm.nics] == [("02:16:3e:aa:00:01", "LAN")]
    assert [(disk.key, disk.size, disk.storage, disk.bootable) for disk in vm.disks] == [(DISK, 1 << 20, "ext", True)]


def test_disks_come_in_the_order_of_their_position_as_a_number(host: ScriptedHost, source: XenServerSource) -> None:
    for position in ("10", "9", "2"):
        add_disk(host, vdi=OTHER_DISK[:-2] + position.zfill(2), userdevice=position)
    assert [(disk.index, disk.device) for disk in source.inspect(VM).disks] == [(0, "0"), (1, "2"), (2, "9"), (3, "10")]


def test_an_empty_drive_is_no_disk(host: ScriptedHost, source: XenServerSource) -> None:
    add_disk(host, vdi="<not in database>", userdevice="3")
    assert [disk.key for disk in source.inspect(VM).disks] == [DISK]


@pytest.mark.parametrize("bad", [{"userdevice": "hda"}, {"vdi-uuid": "x;y"}, {"userdevice": ""}])
def test_a_disk_that_makes_no_sense_is_refused(host: ScriptedHost, source: XenServerSource, bad: dict[str, str]) -> None:
    host.tables[VBDS][0].update(bad)
    with pytest.raises(SourceError, match="does not understand"):
        source.inspect(VM)


def test_a_mac_that_is_none_is_refused(host: ScriptedHost, source: XenServerSource) -> None:
    host.tables["vif-list", f"vm-uuid={VM}"][0]["MAC"] = "02:16:3e:aa:00:01'/><x"
    with pytest.raises(SourceError, match="is not a MAC"):
        source.inspect(VM)


def test_a_host_that_knows_no_tpm_has_none(host: ScriptedHost, source: XenServerSource) -> None:
    asked = ("vtpm-list", f"vm-uuid={VM}", "params=uuid", "--minimal")
    host.script[asked] = [refusal("Unknown command: vtpm-list"), SNAPSHOT]
    assert source.inspect(VM).tpm is False
    assert source.inspect(VM).tpm is True


def check(source: XenServerSource) -> dict[Severity, list[str]]:
    found = source.check(source.inspect(VM))
    assert all(finding.fix for finding in found)
    return {severity: [f.what for f in found if f.severity is severity] for severity in Severity}


def test_an_ordinary_vm_has_nothing_in_its_way(source: XenServerSource) -> None:
    assert check(source) == {Severity.BLOCKER: [], Severity.WARNING: []}


@pytest.mark.parametrize(
    ("vm", "vdi", "vbd", "expected"),
    [
        ({"HVM_boot_policy": "", "PV_bootloader": "pygrub"}, {}, {}, "paravirtual"),
        ({"power_state": "suspended"}, {}, {}, "suspended"),
        ({"power_state": "paused"}, {}, {}, "paused"),
        ({"power_state": "?"}, {}, {}, "unknown"),
        ({"platform": "vtpm: true"}, {}, {}, "TPM"),
        ({}, {"sharable": "true"}, {}, "several VMs"),
        ({}, {"sm-config": "image-format: qcow2; x: y"}, {}, "qcow2"),
        ({}, {"virtual-size": str(2041 << 30)}, {}, "2040 GiB"),
        ({}, {}, {"mode": "RO"}, "read-only"),
        ({}, {}, {"vdi-uuid": "<not in database>"}, "no disk"),
    ],
)
def test_blockers(
    host: ScriptedHost, source: XenServerSource, vm: dict[str, str], vdi: dict[str, str], vbd: dict[str, str], expected: str
) -> None:
    host.set_vm(**vm)
    host.values.update({(DISK, name): value for name, value in vdi.items()})
    host.tables[VBDS][0].update(vbd)
    assert any(expected in what for what in check(source)[Severity.BLOCKER])


def test_a_template_or_snapshot_is_no_vm(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    host.tables["vm-list", "is-control-domain=false", "is-a-template=false", "is-a-snapshot=false"] = []
    (finding,) = source.check(vm)
    assert finding.severity is Severity.BLOCKER
    assert "template" in finding.what


def test_warnings(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(ha_restart_priority="restart", current_operations="migrate_send")
    host.maps["blocked-operations"]["start"] = "maintenance"
    for number in range(20):
        add_snapshot(host, f"nightly {number}", uuid=f"{SNAPSHOT[:-2]}{number:02d}")
    found = check(source)
    assert found[Severity.BLOCKER] == []
    for word in ("high availability", "migrate_send", "maintenance", "20 snapshot(s) of somebody else", "chain is long"):
        assert any(word in what for what in found[Severity.WARNING]), word


def test_another_owner_blocks_and_our_own_does_not(host: ScriptedHost, source: XenServerSource) -> None:
    host.maps["other-config"]["tokvm-owner"] = "other@host"
    assert any("other@host" in what for what in check(source)[Severity.BLOCKER])
    assert source.claim(VM, "other@host") == "other@host"
    assert check(source)[Severity.BLOCKER] == []


@pytest.mark.parametrize(
    ("kind", "free", "blockers", "warnings"),
    [
        ("lvm", 1 << 19, 1, 0),
        ("lvmoiscsi", 2 << 20, 0, 1),
        ("lvm", 3 << 20, 0, 0),
        ("ext", 1 << 10, 0, 1),
        ("nfs", 1 << 20, 0, 0),
    ],
)
def test_room_for_snapshots(
    host: ScriptedHost, source: XenServerSource, kind: str, free: int, blockers: int, warnings: int
) -> None:
    """The disk has 1 MiB; a snapshot takes all of it on a thick repository."""
    size = 1 << 30
    host.values.update({(SR, "type"): kind, (SR, "physical-size"): str(size), (SR, "physical-utilisation"): str(size - free)})
    found = check(source)
    assert (len(found[Severity.BLOCKER]), len(found[Severity.WARNING])) == (blockers, warnings)


def test_a_repository_that_does_not_know_its_size_says_nothing(host: ScriptedHost, source: XenServerSource) -> None:
    host.values.update({(SR, "physical-size"): "-1", (SR, "physical-utilisation"): "-1"})
    assert check(source)[Severity.WARNING] == []
