"""LibvirtHost on a real libvirtd, whose domains run under TCG."""

from __future__ import annotations

import os
import select
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus, Firmware, Nic, Severity
from tokvm.core.units import GiB, MiB
from tokvm.domain import accel, check, host
from tokvm.domain.base import Accel, DirectKernel, DomainHost, DomainPlan, DomainState
from tokvm.domain.host import LibvirtHost
from tokvm.domain.xml import source_name

pytestmark = pytest.mark.root
NewPlan = Callable[..., DomainPlan]


class Libvirtd(Protocol):
    uri: str

    def start(self) -> None: ...
    def stop(self) -> None: ...


@pytest.fixture
def target(libvirtd: Libvirtd) -> Iterator[LibvirtHost]:
    opened = LibvirtHost(libvirtd.uri, accel=Accel.TCG)
    yield opened
    opened.close()


@pytest.fixture
def raw(libvirtd: Libvirtd) -> Iterator[Any]:
    """libvirt itself, to look behind the host and to play a stranger."""
    import libvirt

    connection = libvirt.open(libvirtd.uri)
    yield connection
    connection.close()


def stranger_xml(plan: DomainPlan) -> str:
    return (
        f"<domain type='qemu'><name>{plan.name}</name><uuid>{plan.vm.uuid}</uuid><memory unit='MiB'>16</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )


def test_it_is_a_domain_host(target: LibvirtHost, libvirtd: Libvirtd) -> None:
    assert isinstance(target, DomainHost)
    assert target.url == libvirtd.uri


def test_a_libvirt_that_is_not_there_is_explained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DomainError, match="cannot connect") as caught:
        LibvirtHost(f"qemu+unix:///system?socket={tmp_path}/none").reach()
    assert "libvirtd" in caught.value.fix
    assert capfd.readouterr() == ("", "")


def test_a_missing_binding_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(DomainError, match="binding") as caught:
        LibvirtHost().reach()
    assert "python3-libvirt" in caught.value.fix


def test_what_is_not_there_is_absent_and_needs_no_stopping(target: LibvirtHost, new_plan: NewPlan) -> None:
    uuid = new_plan().vm.uuid
    target.stop(uuid)
    target.undefine(uuid)
    target.cut_network(uuid)
    assert target.state(uuid) is DomainState.ABSENT
    assert not target.alive(uuid)
    with pytest.raises(DomainError, match="not defined"):
        target.start(uuid)


@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("bus", DiskBus)
@pytest.mark.slow
def test_every_machine_and_bus_is_taken_twice(target: LibvirtHost, new_plan: NewPlan, machine: str, bus: DiskBus) -> None:
    if bus is DiskBus.IDE and machine != "pc":
        pytest.skip("q35 has no IDE")
    plan = new_plan(machine=machine, bus=bus, disks=2)
    target.define(plan)
    target.define(plan)
    assert target.state(plan.vm.uuid) is DomainState.OFF


def test_many_disks_find_a_place(target: LibvirtHost, new_plan: NewPlan) -> None:
    for machine in ("q35", "pc"):
        plan = new_plan(disks=16, machine=machine)
        target.define(plan)
        assert target.state(plan.vm.uuid) is DomainState.OFF


@pytest.mark.parametrize("name", ["$(reboot)", "-o", "a/b\nc", "x" * 300, "é" * 300, "42", "", "..", "a,b=c", "\ud800\x00"])
@pytest.mark.slow
def test_libvirt_takes_every_name(target: LibvirtHost, new_plan: NewPlan, raw: Any, name: str) -> None:
    plan = new_plan(name=name)
    target.define(plan)
    found = raw.lookupByUUIDString(plan.vm.uuid).XMLDesc(0)
    assert source_name(found) == name
    target.undefine(plan.vm.uuid)
    assert target.state(plan.vm.uuid) is DomainState.ABSENT


def test_the_source_uuid_macs_and_raw_format_arrive(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    target.define(plan)
    root = ET.fromstring(raw.lookupByUUIDString(plan.vm.uuid).XMLDesc(0))
    assert root.findtext("uuid") == plan.vm.uuid
    assert [mac.get("address") for mac in root.findall("devices/interface/mac")] == [nic.mac for nic in plan.vm.nics]
    assert [driver.get("type") for driver in root.findall("devices/disk/driver")] == ["raw"]


def test_a_domain_edited_by_hand_is_defined_again_to_the_letter(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    target.define(plan)
    target.redefine(edited := _edited(target.definition(plan.vm.uuid)))
    kept = target.definition(plan.vm.uuid)
    assert "<description>by hand</description>" in kept
    assert 'passwd="secret"' in kept.replace("'", '"'), "a console must not lose its password"
    target.define(plan)
    assert target.definition(plan.vm.uuid) != kept
    target.redefine(kept)
    assert target.definition(plan.vm.uuid) == kept
    target.define(replace(plan, name=f"{plan.name}-other"))
    target.redefine(edited)
    assert raw.lookupByUUIDString(plan.vm.uuid).name() == plan.name


def _edited(xml: str) -> str:
    root = ET.fromstring(xml)
    root.insert(2, description := ET.Element("description"))
    description.text = "by hand"
    devices = root.find("devices")
    assert devices is not None
    for graphics in devices.findall("graphics"):
        devices.remove(graphics)
    ET.SubElement(devices, "graphics", {"type": "vnc", "autoport": "yes", "passwd": "secret"})
    return ET.tostring(root, encoding="unicode")


def test_a_strangers_or_no_definition_is_not_read(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    with pytest.raises(DomainError, match="not defined"):
        target.definition(plan.vm.uuid)
    raw.defineXML(stranger_xml(plan))
    with pytest.raises(DomainError, match="not made by tokvm"):
        target.definition(plan.vm.uuid)


def test_another_vms_name_is_refused(target: LibvirtHost, new_plan: NewPlan) -> None:
    first, second = new_plan(), new_plan()
    target.define(first)
    with pytest.raises(DomainError, match="already has the name"):
        target.define(replace(second, name=first.name))
    assert target.state(second.vm.uuid) is DomainState.ABSENT


def test_a_new_name_replaces_the_old_one(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    target.define(plan)
    target.define(replace(plan, name=f"{plan.name}-new"))
    assert raw.lookupByUUIDString(plan.vm.uuid).name() == f"{plan.name}-new"


def test_a_strangers_domain_is_never_touched(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    stranger = raw.defineXML(stranger_xml(plan))
    before = stranger.XMLDesc(0)
    for act in (target.start, target.undefine, target.cut_network):
        with pytest.raises(DomainError, match="not made by tokvm"):
            act(plan.vm.uuid)
    with pytest.raises(DomainError, match="not made by tokvm"):
        target.define(plan)
    target.stop(plan.vm.uuid)
    assert stranger.XMLDesc(0) == before
    assert [finding.severity for finding in target.check(plan)][:1] == [Severity.BLOCKER]


@pytest.mark.slow
def test_a_strangers_running_domain_is_not_stopped(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    raw.defineXML(stranger_xml(plan)).create()
    with pytest.raises(DomainError, match="not made by tokvm"):
        target.stop(plan.vm.uuid)
    assert target.state(plan.vm.uuid) is DomainState.RUNNING


@pytest.mark.slow
def test_a_domain_lives_from_define_to_undefine(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan()
    uuid = plan.vm.uuid
    target.define(plan)
    target.start(uuid)
    target.start(uuid)
    assert target.state(uuid) is DomainState.RUNNING
    assert not target.alive(uuid)
    target.define(plan)
    with pytest.raises(DomainError, match="runs"):
        target.undefine(uuid)
    with pytest.raises(DomainError, match="runs under the name"):
        target.define(replace(plan, name=f"{plan.name}-new"))
    target.cut_network(uuid)
    for flags in (0, 2):  # the running domain, then what its next start would be (VIR_DOMAIN_XML_INACTIVE)
        links = ET.fromstring(raw.lookupByUUIDString(uuid).XMLDesc(flags)).findall("devices/interface/link")
        assert [link.get("state") for link in links] == ["down", "down"]
    target.stop(uuid)
    target.stop(uuid)
    assert target.state(uuid) is DomainState.OFF
    target.undefine(uuid)
    target.undefine(uuid)
    assert target.state(uuid) is DomainState.ABSENT


@pytest.mark.slow
def test_the_guest_boots_from_the_bootable_disk(target: LibvirtHost, new_plan: NewPlan, raw: Any) -> None:
    plan = new_plan(disks=2, bootable=1)
    with Path(plan.disks[1].path).open("r+b") as file:
        file.write(accel.boot_sector())
    target.define(plan)
    target.start(plan.vm.uuid)
    console = ET.fromstring(raw.lookupByUUIDString(plan.vm.uuid).XMLDesc(0)).find("devices/console/source")
    assert console is not None
    assert accel.MARK in read_until(Path(console.get("path", "")), accel.MARK, deadline_s=60)
    target.stop(plan.vm.uuid)


def read_until(path: Path, mark: bytes, *, deadline_s: float) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        seen, end = b"", time.monotonic() + deadline_s
        while mark not in seen and time.monotonic() < end:
            if select.select([fd], [], [], 0.5)[0]:
                seen += os.read(fd, 4096)
        return seen
    finally:
        os.close(fd)


def test_a_disk_that_is_gone_is_named(target: LibvirtHost, new_plan: NewPlan) -> None:
    plan = new_plan()
    target.define(plan)
    Path(plan.disks[0].path).unlink()
    with pytest.raises(DomainError, match="does not start") as caught:
        target.start(plan.vm.uuid)
    assert plan.disks[0].path in str(caught.value)
    assert target.state(plan.vm.uuid) is DomainState.OFF


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/qemu/firmware").is_dir(), reason="OVMF is not installed")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure-boot"])
def test_uefi_starts_and_its_nvram_goes_with_it(
    target: LibvirtHost, new_plan: NewPlan, raw: Any, libvirtd: Any, secure: bool
) -> None:
    plan = new_plan(firmware=Firmware.UEFI, secure_boot=secure)
    assert [finding.severity for finding in target.check(plan)] == [Severity.WARNING]
    target.define(plan)
    target.start(plan.vm.uuid)
    loader = ET.fromstring(raw.lookupByUUIDString(plan.vm.uuid).XMLDesc(0)).find("os/loader")
    assert loader is not None
    assert (loader.get("secure") == "yes") is secure
    nvram = libvirtd.folder / "lib/qemu/nvram" / f"{plan.name}_VARS.fd"
    assert nvram.exists()
    target.stop(plan.vm.uuid)
    target.undefine(plan.vm.uuid)
    assert not nvram.exists()


def test_a_restarted_libvirtd_is_found_again(target: LibvirtHost, new_plan: NewPlan, libvirtd: Libvirtd) -> None:
    plan = new_plan()
    target.define(plan)
    libvirtd.stop()
    with pytest.raises(DomainError, match="cannot connect"):
        target.state(plan.vm.uuid)
    libvirtd.start()
    assert target.state(plan.vm.uuid) is DomainState.OFF


def test_check_lists_everything_in_the_way(target: LibvirtHost, new_plan: NewPlan) -> None:
    plan = new_plan(memory=2**20 * GiB, networks={"*": "bridge:nobridge0", "storage": "network:nonet"})
    found = target.check(plan)
    text = "\n".join(finding.what for finding in found)
    for part in ("nobridge0", "nonet", "memory"):
        assert part in text
    assert found[-1].severity is Severity.WARNING
    assert "TCG" in found[-1].what
    assert all(finding.fix for finding in found)


def test_check_knows_what_old_libvirts_and_machines_lack(
    target: LibvirtHost, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    nics = (Nic(0, "52:54:00:12:34:56", slot=192),)
    lost = target.check(new_plan(machine="pc", nics=nics))
    assert ["PCI slots" in finding.what for finding in lost] == [True, False]
    nvme, slots = new_plan(bus=DiskBus.NVME), new_plan(nics=nics)
    assert [finding.severity for plan in (nvme, slots) for finding in target.check(plan)] == [Severity.WARNING] * 2
    monkeypatch.setattr(check, "OVERRIDES_SINCE", 10**9)
    for plan in (nvme, slots):
        assert "too old" in target.check(plan)[0].what
        assert target.check(plan)[0].severity is Severity.BLOCKER


def test_check_misses_a_kernel_that_is_gone(target: LibvirtHost, new_plan: NewPlan, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").touch()
    kernel = DirectKernel(str(tmp_path / "vmlinuz"), str(tmp_path / "initrd"), "")
    found = target.check(new_plan(more={"kernel": kernel}))
    assert [finding.severity for finding in found] == [Severity.BLOCKER, Severity.WARNING]
    assert "initrd" in found[0].what


def test_check_says_what_cannot_be_a_domain_at_all(target: LibvirtHost, new_plan: NewPlan) -> None:
    assert [finding.severity for finding in target.check(new_plan(vcpus=999))] == [Severity.BLOCKER]


def test_a_file_system_without_direct_io_gets_the_page_cache(
    target: LibvirtHost, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: object, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(22, "Invalid argument")

    plan = new_plan()
    assert "io='native'" in target.domain_xml(plan).replace('"', "'")
    monkeypatch.setattr(os, "open", refuse)
    assert host._takes_direct_io(plan.disks[0].path) is False


def test_libvirts_own_validation_stands_behind_ours(
    target: LibvirtHost, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = new_plan()
    good = target.domain_xml(plan)
    monkeypatch.setattr(target.__class__, "domain_xml", lambda _self, _plan: good.replace("<vcpu>", "<typo/><vcpu>"))
    with pytest.raises(DomainError, match="typo"):
        target.define(plan)


def test_accel_is_found_by_trying(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    for verdict, expected in ((accel.Kvm.WORKS, Accel.KVM), (accel.Kvm.BROKEN, Accel.TCG), (accel.Kvm.ABSENT, Accel.TCG)):
        monkeypatch.setattr(host, "probe_kvm", lambda verdict=verdict: accel.KvmAnswer(verdict, ""))
        opened = LibvirtHost(libvirtd.uri)
        assert opened.accel() is expected
        opened.close()


def test_where_we_may_not_try_libvirt_is_asked(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "probe_kvm", lambda: accel.KvmAnswer(accel.Kvm.FORBIDDEN, ""))
    for has_kvm, expected in ((True, Accel.KVM), (False, Accel.TCG)):
        monkeypatch.setattr(LibvirtHost, "_libvirt_has_kvm", lambda _self, has_kvm=has_kvm: has_kvm)
        opened = LibvirtHost(libvirtd.uri)
        assert opened.accel() is expected
        opened.close()


def test_an_answering_agent_is_life(target: LibvirtHost, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    import libvirt_qemu  # type: ignore[import-untyped]

    asked: list[str] = []

    def answer(_domain: object, command: str, timeout_s: int, _flags: int) -> str:
        asked.append(command)
        assert 0 < timeout_s <= 5
        return '{"return": {}}'

    plan = new_plan(memory=64 * MiB)
    target.define(plan)
    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", answer)
    assert target.alive(plan.vm.uuid)
    assert asked == ['{"execute": "guest-ping"}']
