"""Which VMs there are, what one is made of, and that neither texts nor numbers are mistaken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.sources.esx_double import DIR, KEY, LOST, OTHER, SIZE, STORE, VM, FakeEsx, connect

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Firmware, Nic, PowerState
from tokvm.core.units import GiB
from tokvm.remote.errors import LoginRefused
from tokvm.sources.vmware import inventory
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.source import EsxSource


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEsx:
    monkeypatch.setattr(inventory, "PAUSE_S", 0.01)
    return FakeEsx(tmp_path)


@pytest.fixture
def source(host: FakeEsx) -> EsxSource:
    return connect(host)


def test_vms_are_listed_by_what_each_says_of_itself(host: FakeEsx, source: EsxSource) -> None:
    host.others = [(7, OTHER, "db")]
    assert [(one.uuid, one.name, one.power) for one in source.list_machines()] == [
        (VM, "web", PowerState.RUNNING),
        (OTHER, "db", PowerState.RUNNING),
    ]
    assert source.find("db") == OTHER
    assert source.find(VM.upper()) == VM
    assert source.url == "esx://root@esx1"


def test_a_host_without_vms_has_none(host: FakeEsx, source: EsxSource) -> None:
    host.script["getallvms"] = ["Vmid   Name   File   Guest OS   Version   Annotation\n"]
    assert source.list_machines() == []


def test_rows_in_an_annotation_are_no_vms(host: FakeEsx, source: EsxSource) -> None:
    host.annotation = f"nice\n99     evil   [{STORE}] evil/evil.vmx   x   vmx-19   \n12   again"
    assert [one.uuid for one in source.list_machines()] == [VM]


def test_a_template_is_no_vm_to_migrate(host: FakeEsx, source: EsxSource) -> None:
    host.template = True
    assert source.list_machines() == []
    with pytest.raises(UsageError, match="no VM"):
        source.find("web")


def test_names_that_are_not_unique_are_refused_with_all_uuids(host: FakeEsx, source: EsxSource) -> None:
    host.others = [(7, OTHER, "web")]
    with pytest.raises(UsageError, match=f"(?s){VM}.*{OTHER}"):
        source.find("web")
    assert source.find(OTHER) == OTHER


def test_a_uuid_that_two_vms_have_is_refused_with_both(host: FakeEsx, source: EsxSource) -> None:
    host.others = [(7, VM, "web-copy")]
    with pytest.raises(UsageError, match=r"(?s)web.*web-copy"):
        source.find(VM)
    with pytest.raises(SourceError, match=r"(?s)2 VMs have this uuid.*web/web\.vmx.*web-copy/web-copy\.vmx"):
        source.inspect(VM)


@pytest.mark.parametrize(("told", "slot"), [(192, 192), (1023, 1023), (1184, None), (-1, None)])
def test_the_slot_that_a_guest_names_its_card_after(host: FakeEsx, source: EsxSource, told: int, slot: int | None) -> None:
    host.slot = told
    assert source.inspect(VM).nics[0].slot == slot


def test_a_machine_is_described(host: FakeEsx, source: EsxSource) -> None:
    host.name, host.annotation = "we/b 100% “ü”", 'the "new" one\nsecond line'
    host.settings = {"firmware": "efi", "uefi.secureBoot.enabled": "TRUE"}
    host.script["get.summary"] = [host.summary(12, VM, "we%2fb 100%25 “ü”", f"[{STORE}] web/web.vmx")] * 2
    vm = source.inspect(VM)
    assert (vm.name, vm.description) == (host.name, host.annotation)
    assert (vm.vcpus, vm.memory, vm.power, vm.hypervisor) == (2, 4 * GiB, PowerState.RUNNING, "vmware")
    assert (vm.firmware, vm.secure_boot, vm.tpm) == (Firmware.UEFI, True, False)
    assert vm.nics == (Nic(0, "00:50:56:aa:bb:cc", 'LAN, the "first"', 192),)
    (disk,) = vm.disks
    assert (disk.key, disk.size, disk.device, disk.bootable, disk.storage) == (KEY, SIZE, "scsi0:0", True, "VMFS-6")
    assert vm.extra["mac-types"] == "assigned"


def test_a_disks_key_outlives_snapshots_and_disks_come_in_order(host: FakeEsx, source: EsxSource) -> None:
    host.chains = {"scsi0:10": ["k.vmdk"], "scsi0:2": ["b.vmdk"], "scsi0:0": ["web.vmdk"]}
    before = source.inspect(VM).disks
    host.freeze("nightly")
    host.freeze("nightly 2")
    assert source.inspect(VM).disks == before
    assert [disk.device for disk in before] == ["scsi0:0", "scsi0:2", "scsi0:10"]


def test_a_boot_disk_that_the_bios_was_told_is_the_boot_disk(host: FakeEsx, source: EsxSource) -> None:
    host.chains = {"scsi0:0": ["web.vmdk"], "scsi0:1": ["web_1.vmdk"]}
    host.settings = {"bios.hddOrder": "scsi0:1"}
    assert [disk.bootable for disk in source.inspect(VM).disks] == [False, True]


def test_an_annotation_full_of_quotes_is_read_and_ends_nowhere_else(host: FakeEsx, source: EsxSource) -> None:
    host.annotation = 'ends with "quotes"\n   }, \n   runtime = (x) {\n      powerState = "poweredOff'
    assert source.inspect(VM).description == host.annotation
    assert [one.uuid for one in source.list_machines()] == [VM]
    assert source.power(VM) is PowerState.RUNNING


def test_a_guest_cannot_speak_for_the_host(host: FakeEsx, source: EsxSource, caplog: pytest.LogCaptureFixture) -> None:
    """Its host name stands unescaped in get.summary."""
    host.guest_name = 'x", \n   }, \n   runtime = (vim.vm.RuntimeInfo) {\n      powerState = "poweredOff'
    with pytest.raises(SourceError, match="cannot be believed"):
        source.power(VM)
    assert source.list_machines() == []
    assert "left out" in caplog.text


def test_a_disk_that_only_a_text_names_is_refused(host: FakeEsx, source: EsxSource) -> None:
    host.devices = f""",
      (vim.vm.device.VirtualDisk) {{
         key = 2009,
         backing = (vim.vm.device.VirtualDisk.FlatVer2BackingInfo) {{
            fileName = "[{STORE}] other/other.vmdk"
         }},
         controllerKey = 1000,
         unitNumber = 9,
         capacityInKB = 1
      }}"""
    with pytest.raises(SourceError, match=r"different files for scsi0:9"):
        source.inspect(VM)


def test_the_vms_number_is_asked_for_anew_when_it_is_anothers(host: FakeEsx, source: EsxSource) -> None:
    source.power(VM)
    host.vmid, host.others = 40, [(12, OTHER, "db")]  # the host was restarted
    assert source.power(VM) is PowerState.RUNNING
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.sent("power.shutdown") == [("vim-cmd", "vmsvc/power.shutdown", "40")]


def test_a_vm_that_moved_away_is_said_to_have(host: FakeEsx, source: EsxSource) -> None:
    source.power(VM)
    host.uuid = OTHER
    with pytest.raises(EsxError, match="no such VM") as caught:
        source.power(VM)
    assert caught.value.fault is Fault.NO_SUCH_VM
    assert "vMotion" in caught.value.fix


def test_the_file_of_another_vm_is_not_taken_for_this_ones(host: FakeEsx, source: EsxSource) -> None:
    host.settings = {"uuid.bios": "00 11 22 33 44 55 66 77-88 99 aa bb cc dd ee ff"}
    with pytest.raises(SourceError, match=r"uuid\.bios"):
        source.inspect(VM)


def test_a_read_is_asked_again_once_when_the_connection_breaks(host: FakeEsx, source: EsxSource) -> None:
    host.script["getallvms"] = [LOST]
    assert len(source.list_machines()) == 1
    host.script["getallvms"] = [LOST, LOST]
    with pytest.raises(ConnectionLost):
        source.list_machines()


def test_an_answer_that_is_cut_is_a_lost_one(host: FakeEsx, source: EsxSource) -> None:
    real = host.run_line

    def cut(command: str, **options: object) -> object:
        done = real(command, **options)  # type: ignore[arg-type]
        return type(done)(done.code, done.stdout[:-3], done.stderr)

    host.run_line = cut  # type: ignore[assignment, method-assign]
    with pytest.raises(ConnectionLost, match="answers came"):
        source.list_machines()


def test_a_management_service_that_restarts_is_waited_for_by_coming_back(host: FakeEsx, source: EsxSource) -> None:
    away = (1, "Connect to localhost failed: Connection failure.\n", "")
    host.script["getallvms"] = [away, away]
    with pytest.raises(ConnectionLost, match="management service"):
        source.list_machines()


def test_a_refused_login_says_which_keys_esxi_takes(host: FakeEsx, source: EsxSource) -> None:
    host.script["getallvms"] = [LoginRefused("the host refused the login", where=host.where, fix="try ssh")]
    with pytest.raises(LoginRefused) as caught:
        source.list_machines()
    assert "ed25519" in caught.value.fix
    assert "rsa" in caught.value.fix


def test_only_a_uuid_becomes_part_of_a_command(host: FakeEsx, source: EsxSource) -> None:
    for text in ("", "12", "$(reboot)", VM.upper(), f"{VM}\n"):
        with pytest.raises(UsageError):
            source.inspect(text)
    assert host.lines == []


def test_questions_go_out_quoted_and_in_one_line(host: FakeEsx, source: EsxSource) -> None:
    source.inspect(VM)
    assert len(host.lines) == 5  # the list, its VMs, the datastores, the VM, the datastores anew
    assert all("\n" not in line for line in host.lines)
    assert ("cat", f"{DIR}/web.vmx") in host.log


def test_a_vmx_that_cannot_be_read_says_so(host: FakeEsx, source: EsxSource) -> None:
    host.do_cat = lambda words: (1, "", "cat: read error: Input/output error\n")  # type: ignore[method-assign]
    with pytest.raises(SourceError, match="Input/output error"):
        source.power(VM)


def test_answers_from_two_moments_are_asked_for_again(host: FakeEsx, source: EsxSource) -> None:
    before = host.do_device_getdevices(())
    host.freeze("nightly")
    host.script["device.getdevices"] = [before, before]
    assert source.inspect(VM).disks[0].key == KEY
    host.script["device.getdevices"] = [before] * 9
    with pytest.raises(EsxError, match="different files"):
        source.inspect(VM)
