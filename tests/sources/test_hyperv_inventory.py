"""What a host says of its VMs, as values; and what is refused because it makes no sense."""

from __future__ import annotations

from typing import Any, cast

import pytest
from tests.sources.hyperv_double import BASE_ID, FOLDER, IN_USE, KEY, VM, FakeShell, connect, guid, nic

from tokvm.core.errors import SourceError, UsageError
from tokvm.core.machine import Firmware, PowerState
from tokvm.core.units import GiB, MiB, TiB
from tokvm.sources.hyperv.faults import HyperVError
from tokvm.sources.hyperv.paths import problem, same, sftp_path

Changed = dict[str, Any]


def inspected(shell: FakeShell) -> Changed:
    return cast("Changed", shell.vm.inspect({}))


def test_a_machine_is_described() -> None:
    vm = connect(FakeShell()).inspect(VM)
    assert (vm.uuid, vm.name, vm.vcpus, vm.memory, vm.power) == (VM, "web", 2, GiB, PowerState.RUNNING)
    assert (vm.firmware, vm.secure_boot, vm.tpm, vm.hypervisor) == (Firmware.UEFI, True, False, "hyperv")
    (disk,) = vm.disks
    assert (disk.index, disk.key, disk.size, disk.device) == (0, KEY, 64 * MiB, "SCSI 0:0")
    assert (disk.bootable, disk.storage, disk.label) == (True, "NTFS", "d.vhdx")
    assert [(one.index, one.mac, one.network) for one in vm.nics] == [(0, "00:15:5d:01:01:01", "LAN")]


def test_a_disk_keeps_its_key_when_checkpoints_come_and_go() -> None:
    shell = FakeShell()
    source = connect(shell)
    before = source.inspect(VM)
    shell.vm.freeze("nightly")
    shell.vm.freeze("weekly")
    assert source.inspect(VM).disks == before.disks


def test_the_notes_are_the_description_without_our_line() -> None:
    shell = FakeShell()
    shell.vm.line = '{"owner":"me","v":1}'
    assert connect(shell).inspect(VM).description == shell.vm.notes
    shell.vm.extra["notes"] = "first\n#tokvm {}\r\nlast"
    assert connect(shell).inspect(VM).description == "first\nlast"


def test_generation_1_is_bios_and_boots_from_ide() -> None:
    shell = FakeShell()
    (disk,) = inspected(shell)["disks"]
    shell.vm.extra = {
        "generation": 1,
        "firmware": None,
        "security": None,
        "disks": [{**disk, "location": 1}, {**disk, "controller": "IDE", "number": 1}, {**disk, "controller": "IDE"}],
    }
    vm = connect(shell).inspect(VM)
    assert (vm.firmware, vm.secure_boot) == (Firmware.BIOS, False)
    assert [(one.index, one.device, one.bootable) for one in vm.disks] == [
        (0, "IDE 0:0", True),
        (1, "IDE 1:0", False),
        (2, "SCSI 0:1", False),
    ]


def test_generation_2_boots_from_the_drive_of_its_firmware() -> None:
    shell = FakeShell()
    (disk,) = inspected(shell)["disks"]
    shell.vm.extra = {
        "disks": [{**disk, "location": 10}, {**disk, "location": 9}],
        "firmware": {"secureBoot": "Off", "bootDrive": {"number": 0, "location": 10}},
    }
    vm = connect(shell).inspect(VM)
    assert [(one.device, one.bootable) for one in vm.disks] == [("SCSI 0:9", False), ("SCSI 0:10", True)]
    assert vm.secure_boot is False


@pytest.mark.parametrize(
    ("dynamic", "maximum", "memory"), [(False, 8 * GiB, GiB), (True, 8 * GiB, 8 * GiB), (True, TiB, GiB), (True, MiB, GiB)]
)
def test_memory_is_the_maximum_that_somebody_chose(dynamic: bool, maximum: int, memory: int) -> None:
    shell = FakeShell()
    shell.vm.extra = {"memory": {"startup": GiB, "dynamic": dynamic, "maximum": maximum}}
    assert connect(shell).inspect(VM).memory == memory


def test_an_empty_drive_is_no_disk() -> None:
    shell = FakeShell()
    (disk,) = inspected(shell)["disks"]
    shell.vm.extra["disks"] = [disk, {**disk, "location": 1, "path": "", "layers": []}]
    assert [one.device for one in connect(shell).inspect(VM).disks] == ["SCSI 0:0"]


def test_a_file_that_a_merge_takes_away_is_not_a_disk_that_shrank() -> None:
    shell = FakeShell()
    (disk,) = inspected(shell)["disks"]
    failed = {"type": "System.IO.FileNotFoundException", "message": "weg", "hresult": -2147024894, "id": "x"}
    empty = dict.fromkeys(("format", "type", "size", "fileSize", "diskId", "logicalSector", "physicalSector"))
    shell.vm.extra["disks"] = [{**disk, "layers": [{**empty, "path": disk["path"], "parent": "", "error": failed}]}]
    with pytest.raises(SourceError, match="cannot be looked at now"):
        connect(shell).inspect(VM)
    failed["hresult"], failed["type"] = -2147024891, "System.UnauthorizedAccessException"
    assert [one.size for one in connect(shell).inspect(VM).disks] == [0]


STATES = {2: "running", 3: "off", 9: "paused", 6: "suspended", 32779: "suspended", 32785: "running"}


@pytest.mark.parametrize("state", [*STATES, 1, 4, 10, 11, 32773, 32781, 32786, 99999])
def test_only_off_is_off(state: int) -> None:
    shell = FakeShell()
    shell.vm.state = state
    assert connect(shell).power(VM) == STATES.get(state, "unknown")
    assert connect(shell).list_machines()[0].power == STATES.get(state, "unknown")


def test_a_machine_is_found_by_name_and_by_id() -> None:
    shell = FakeShell()
    source = connect(shell)
    assert source.find("web") == source.find(VM) == source.find(f"{{{VM.upper()}}}") == VM
    with pytest.raises(UsageError, match="no VM 'nobody'"):
        source.find("nobody")
    machines = [{"id": guid(number), "name": "twin", "state": 3} for number in (1, 2)]
    shell.script["list"] = [{"host": "HV1", "machines": cast("list[object]", machines)}]
    with pytest.raises(UsageError, match=guid(1)):
        source.find("twin")


@pytest.mark.parametrize("uuid", ["", "web", BASE_ID.upper(), f"{VM}'; Remove-VM *", "*"])
def test_only_an_id_names_a_vm(uuid: str) -> None:
    shell = FakeShell()
    with pytest.raises(UsageError):
        connect(shell).power(uuid)
    assert shell.log == []


def chain(*paths: str) -> list[Changed]:
    known = {"format": "VHDX", "type": "x", "size": MiB, "fileSize": 1, "diskId": BASE_ID, "logicalSector": 512, "error": None}
    parents = [*paths[1:], ""]
    return [{**known, "path": path, "parent": parent} for path, parent in zip(paths, parents, strict=True)]


TOP = f"{FOLDER}\\d.vhdx"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"id": guid(9)}, "another VM"),
        ({"name": None}, "name is None"),
        ({"processors": 0}, "processors is 0"),
        ({"processors": True}, "processors is True"),
        ({"generation": 3}, "generation is 3"),
        ({"operational": [2, "x"]}, "whole numbers"),
        ({"disks": {}}, "a list"),
        ({"disks": ["x"]}, "an object"),
        ({"nics": [nic("00155D01010")]}, "MAC"),
        ({"nics": [nic("zz155D010101")]}, "MAC"),
        ({"memory": {"startup": -1, "dynamic": False, "maximum": 0}}, "memory.startup"),
        ({"layers": []}, "layers"),
        ({"layers": chain("C:\\other.vhdx")}, "its own file"),
        ({"layers": [chain(TOP, "C:\\a.vhdx")[0], *chain("C:\\b.vhdx")]}, "not the parent"),
        ({"layers": chain(TOP, "C:\\a.vhdx")[:1]}, "left out"),
        ({"layers": chain(TOP, "C:\\a.vhdx", TOP.upper())}, "twice"),
        ({"layers": chain(TOP, *(f"C:\\{n}.vhdx" for n in range(64)))}, "65 layers"),
        ({"controller": "SATA"}, "controller 'SATA'"),
        ({"number": -1}, "number"),
    ],
)
def test_an_answer_that_contradicts_itself_is_refused(changed: Changed, match: str) -> None:
    shell = FakeShell()
    answer = inspected(shell)
    if changed.keys() & {"layers", "controller", "number"}:
        answer["disks"][0] |= changed
    else:
        answer |= changed
    shell.script["inspect"] = [answer]
    with pytest.raises(HyperVError, match=match):
        connect(shell).inspect(VM)


def test_two_disks_in_one_slot_are_refused() -> None:
    shell = FakeShell()
    answer = inspected(shell)
    answer["disks"] *= 2
    shell.script["inspect"] = [answer]
    with pytest.raises(HyperVError, match="one slot"):
        connect(shell).inspect(VM)


def test_the_hosts_own_failure_passes_through() -> None:
    shell = FakeShell()
    shell.script["inspect"] = [IN_USE]
    with pytest.raises(HyperVError, match="held open"):
        connect(shell).inspect(VM)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\a b\\x.avhdx", "/C:/a b/x.avhdx"),
        ("d:/VMs\\ü [1] 'x’ $(y).vhdx", "/d:/VMs/ü [1] 'x’ $(y).vhdx"),
        ("\\\\?\\C:\\x.vhdx", "/C:/x.vhdx"),
        ("C:\\ClusterStorage\\Volume1\\x.vhdx", "/C:/ClusterStorage/Volume1/x.vhdx"),
    ],
)
def test_a_path_over_sftp(path: str, expected: str) -> None:
    assert sftp_path(path, where="hv1") == expected
    assert problem(path) == ""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("\\\\nas\\vms\\x.vhdx", "SMB"),
        ("//nas/vms/x.vhdx", "SMB"),
        ("\\\\?\\UNC\\nas\\vms\\x.vhdx", "SMB"),
        ("\\\\?\\Volume{0b1c}\\x.vhdx", "drive letter"),
        ("\\\\.\\PhysicalDrive1", "drive letter"),
        ("C:x.vhdx", "drive letter"),
        ("x.vhdx", "drive letter"),
        ("C:\\x.vhdx:stream", "drive letter"),
        ("C:\\x\0.vhdx", "drive letter"),
        ("", "drive letter"),
    ],
)
def test_a_path_that_sftp_cannot_reach(path: str, why: str) -> None:
    assert why in problem(path)
    with pytest.raises(SourceError, match=why):
        sftp_path(path, where="hv1")


def test_windows_tells_neither_cases_nor_slashes_apart() -> None:
    assert same("C:\\VMs\\Ä.VHDX") == same("\\\\?\\c:/vms/ä.vhdx")
    assert same("C:\\a") != same("C:\\b")
