"""Everything that is in the way is found before anything is done, each with the command that lifts it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from tests.sources.hyperv_double import FOLDER, GONE, VM, FakeShell, connect, nic, volume

from tokvm.core.machine import Finding, Severity, VirtualMachine
from tokvm.core.units import GiB
from tokvm.sources.hyperv.inventory import SHUTDOWN_SERVICE

Changed = dict[str, Any]


def findings(shell: FakeShell, owner: str = "") -> list[Finding]:
    source = connect(shell)
    return source.check(source.inspect(VM), owner=owner)


def blockers(shell: FakeShell) -> list[Finding]:
    return [one for one in findings(shell) if one.severity is Severity.BLOCKER]


def warnings(shell: FakeShell) -> list[Finding]:
    return [one for one in findings(shell) if one.severity is Severity.WARNING]


def test_nothing_is_in_the_way_of_a_plain_vm() -> None:
    assert findings(FakeShell()) == []


def test_looking_changes_nothing() -> None:
    shell = FakeShell()
    findings(shell)
    assert {script for script, _ in shell.log} <= {"inspect", "power"}


@pytest.mark.parametrize(
    ("changed", "what", "fix"),
    [
        ({"security": {"tpm": True, "shielded": True, "encryptedState": True}}, "shielded", "Set-VMSecurityPolicy"),
        ({"security": {"tpm": True, "shielded": False, "encryptedState": False}}, "TPM", "Disable-VMTPM"),
        ({"replication": {"state": 6, "mode": 1}}, "replicated", "Remove-VMReplication"),
        ({"nics": [nic("000000000000")]}, "no MAC", "StaticMacAddress"),
        ({"services": []}, "shutdown integration service", "Enable-VMIntegrationService"),
        ({"operational": [2, 32772]}, "being merged", "Status"),
        ({"operational": [11, 32774]}, "moved", "let it end"),
        ({"state": 9}, "paused", "Resume-VM"),
        ({"state": 6}, "suspended", "Start-VM"),
        ({"checkpointType": "Disabled"}, "switched off", "Set-VM -CheckpointType Production"),
        ({"disks": []}, "no disk", "new VM"),
    ],
)
def test_a_blocker_comes_with_what_lifts_it(changed: Changed, what: str, fix: str) -> None:
    shell = FakeShell()
    shell.vm.extra = changed
    found = blockers(shell)
    assert [one for one in found if what in one.what and fix in one.fix], found


@pytest.mark.parametrize(
    ("changed", "what", "fix"),
    [
        ({"passThrough": 3, "layers": []}, "disk 3 of the host", "New-VHD -SourceDisk"),
        ({"shared": True}, "several VMs", "detach"),
        ({"controller": "PMEM"}, "persistent memory", "remove"),
    ],
)
def test_a_disk_that_cannot_be_copied(changed: Changed, what: str, fix: str) -> None:
    shell = FakeShell()
    answer = cast("Changed", shell.vm.inspect({}))
    answer["disks"][0] |= changed
    shell.vm.extra["disks"] = answer["disks"]
    assert [one for one in blockers(shell) if what in one.what and fix in one.fix and "disk" in one.where]


@pytest.mark.parametrize(
    ("path", "what"), [("\\\\nas\\vms\\d.vhdx", "file server"), ("\\\\?\\Volume{0b}\\d.vhdx", "no drive letter")]
)
def test_storage_that_sftp_cannot_reach(path: str, what: str) -> None:
    shell = FakeShell()
    shell.vm.chain = [path]
    assert [one for one in blockers(shell) if what in one.what and "Move-VMStorage" in one.fix]


def test_a_file_on_a_file_server_that_cannot_even_be_looked_at() -> None:
    shell = FakeShell()
    answer = cast("Changed", shell.vm.inspect({}))
    failed = {"type": "System.UnauthorizedAccessException", "message": "Zugriff", "hresult": -2147024891, "id": "x"}
    empty = dict.fromkeys(("format", "type", "size", "fileSize", "diskId", "logicalSector", "physicalSector"))
    for path, what in (("\\\\nas\\vms\\d.vhdx", "file server"), (f"{FOLDER}\\d.vhdx", "cannot be looked at")):
        answer["disks"][0] |= {"path": path, "layers": [{**empty, "path": path, "parent": "", "error": failed}]}
        shell.vm.extra["disks"] = answer["disks"]
        assert [one for one in blockers(shell) if what in one.what]


def test_a_shared_vhd_set() -> None:
    shell = FakeShell()
    answer = cast("Changed", shell.vm.inspect({}))
    answer["disks"][0]["layers"][0]["format"] = "VHDSet"
    shell.vm.extra["disks"] = answer["disks"]
    assert [one for one in blockers(shell) if "several VMs" in one.what]


def test_a_disk_with_large_sectors_needs_a_target_that_has_them() -> None:
    shell = FakeShell()
    answer = cast("Changed", shell.vm.inspect({}))
    answer["disks"][0]["layers"][0]["logicalSector"] = 4096
    shell.vm.extra["disks"] = answer["disks"]
    assert [one for one in warnings(shell) if "4Kn" in one.what and "logical_block_size 4096" in one.fix]
    assert blockers(shell) == []


def test_a_backups_recovery_checkpoint_blocks_and_a_persons_is_only_told() -> None:
    shell = FakeShell()
    shell.vm.freeze("nightly, of\nsomebody")
    shell.vm.freeze("tokvm-ab12-1")
    assert blockers(shell) == []
    assert [one for one in warnings(shell) if r"nightly, of\nsomebody" in one.what]
    shell.vm.freeze("Veeam", kind="Recovery")
    assert [one for one in blockers(shell) if "backup" in one.what and "Remove-VMSnapshot" in one.fix]


def test_the_cluster_decides_which_node_to_ask() -> None:
    shell = FakeShell()
    shell.vm.cluster = {"group": "web", "owner": "hv1", "priority": 2000, "restartAction": 2}
    assert blockers(shell) == []
    assert [one for one in warnings(shell) if "role web" in one.what]
    shell.vm.cluster["owner"] = "HV2"
    assert [one for one in blockers(shell) if "HV2" in one.what and "hyperv://HV2" in one.fix]


def test_a_cluster_that_cannot_be_asked() -> None:
    shell = FakeShell()
    failed = {"type": "x", "message": "kein Modul", "hresult": 1, "id": "CommandNotFoundException"}
    empty = {"group": "", "owner": "", "priority": None, "restartAction": None}
    shell.vm.extra["cluster"] = {**empty, "error": failed}
    assert [one for one in blockers(shell) if "kein Modul" in one.what and "RSAT-Clustering" in one.fix]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"memory": {"startup": GiB, "dynamic": True, "maximum": 4 * GiB}}, "the target gets 4 GiB"),
        ({"nics": [nic(vlan={"mode": "Access", "access": 12, "native": 0})]}, "VLAN 12"),
        ({"nics": [nic(vlan={"mode": "Trunk", "access": 0, "native": 7})]}, "VLAN 7"),
        ({"checkpointType": "Standard"}, "save the memory"),
        ({"automaticCheckpoints": True}, "whenever it starts"),
        (
            {"services": [{"component": SHUTDOWN_SERVICE.lower(), "enabled": True, "status": 12}]},
            "does not answer",
        ),
    ],
)
def test_what_is_worth_knowing(changed: Changed, what: str) -> None:
    shell = FakeShell()
    shell.vm.extra = changed
    assert [one for one in warnings(shell) if what in one.what]
    assert blockers(shell) == []


def test_little_room_and_a_long_chain() -> None:
    shell = FakeShell()
    for number in range(40):
        shell.vm.freeze(f"tokvm-ab12-{number}")
    answer = cast("Changed", shell.vm.inspect({}))
    answer["disks"][0]["volume"] = volume(free=1 << 20)
    shell.vm.extra["disks"] = answer["disks"]
    told = [one.what for one in warnings(shell)]
    assert any("little room" in one for one in told)
    assert any("41 layers" in one for one in told)


def test_files_that_still_wait_for_a_merge() -> None:
    shell = FakeShell()
    shell.vm.freeze("nightly")
    shell.vm.checks.clear()
    assert [one for one in warnings(shell) if "d_1.avhdx" in one.what]


def test_a_claim_by_another_blocks_and_our_own_does_not() -> None:
    shell = FakeShell()
    shell.vm.line = '{"owner":"two@host 2","v":1}'
    assert [one for one in blockers(shell) if "two@host 2" in one.what]
    assert findings(shell, owner="two@host 2") == []
    shell.vm.line = '{"fence":{"auto_start":"Start","priority":null,"reason":"x","restart_action":null},"v":1}'
    assert [one for one in warnings(shell) if "fenced" in one.what]


def test_a_vm_that_is_gone() -> None:
    shell = FakeShell()
    vm = connect(shell).inspect(VM)
    shell.script["inspect"] = [GONE]
    assert [one.severity for one in connect(shell).check(vm)] == [Severity.BLOCKER]


def test_disks_that_changed_meanwhile() -> None:
    shell = FakeShell()
    vm = VirtualMachine(VM, "web", 1, 1, ())
    assert any("changed while" in one.what for one in connect(shell).check(vm))
