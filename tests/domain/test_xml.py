from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokvm.core.errors import DomainError
from tokvm.core.machine import Disk, DiskBus, Firmware, Nic, NicModel, VirtualMachine
from tokvm.core.units import GiB, MiB
from tokvm.domain.base import Accel, DirectKernel, DiskFormat, DomainPlan, TargetDisk
from tokvm.domain.nics import FrameSink
from tokvm.domain.schema import Validation, validate
from tokvm.domain.xml import Stage, domain_xml, rehearsal_folder, source_name

GOLDEN = Path(__file__).parent / "golden"
MakePlan = Callable[..., DomainPlan]

CASES: dict[str, tuple[dict[str, Any], Accel]] = {
    "bios-q35-virtio-tcg": ({}, Accel.TCG),
    "bios-pc-sata-kvm": ({"machine": "pc", "bus": DiskBus.SATA}, Accel.KVM),
    "uefi-q35-scsi-kvm": ({"bus": DiskBus.VIRTIO_SCSI, "firmware": Firmware.UEFI, "bootable": 1}, Accel.KVM),
    "secure-boot-tpm-windows": (
        {
            "firmware": Firmware.UEFI,
            "secure_boot": True,
            "tpm": True,
            "extra": {"guest_os": "windows-2022", "timeoffset": "-7200", "cores_per_socket": "2"},
            "vcpus": 4,
            "networks": {"*": "bridge:br0", "storage": "network:default"},
        },
        Accel.KVM,
    ),
    "ide-pc-windows-tcg": (
        {"machine": "pc", "bus": DiskBus.IDE, "more": {"windows": True, "nic_model": NicModel.E1000}},
        Accel.TCG,
    ),
    "vmware-hardware": (
        {
            "bus": DiskBus.PVSCSI,
            "nics": (Nic(0, "00:50:56:12:34:56", slot=192), Nic(1, "00:50:56:12:34:57", slot=224)),
            "more": {"nic_model": NicModel.VMXNET3, "boot_disk": 1},
        },
        Accel.KVM,
    ),
    "lsi-sas": ({"bus": DiskBus.SAS}, Accel.KVM),
    "nvme-with-big-sectors": (
        {"bus": DiskBus.NVME, "disks": tuple(Disk(i, f"vdi-{i}", GiB, sector=4096) for i in range(2))},
        Accel.KVM,
    ),
    "direct-kernel-prepared-nvram": (
        {
            "firmware": Firmware.UEFI,
            "more": {
                "kernel": DirectKernel("/srv/web.vmlinuz", "/srv/web.initrd", 'root=UUID=1 ro "a b" <&>'),
                "nvram": "/srv/web_VARS.fd",
            },
        },
        Accel.KVM,
    ),
    "hostile-names": (
        {
            "name": '-o $(reboot)\n\x1b]0;pwn\x07 </title> & "quoted" \'n',
            "description": "line\r\nline\x00 ]]>",
            "networks": {"*": "network:a&b<'\""},
            "paths": ("/srv/a&b <c>,format=qcow2 'd'\".raw",),
        },
        Accel.TCG,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, make_plan: MakePlan) -> None:
    facts, accel = CASES[case]
    xml = domain_xml(make_plan(**facts), accel=accel)
    golden = GOLDEN / f"{case}.xml"
    if os.environ.get("TOKVM_UPDATE_GOLDEN"):
        golden.write_text(xml)
    assert xml == golden.read_text()


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.xml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_every_golden_file_is_a_domain_by_libvirts_schema(golden: Path) -> None:
    verdict = validate(golden.read_text(), where=golden.name)
    if verdict is Validation.SKIPPED:
        pytest.skip("libvirt's schemas or xmllint are not installed")
    assert verdict is Validation.PASSED


any_text = st.text(st.characters(exclude_categories=[]), max_size=30)
names = st.one_of(any_text, st.sampled_from(["$(reboot)", "-o", "a/b", "x" * 300, "7", "a\nb", ""]))
uuids = st.uuids().map(str)
macs = st.binary(min_size=6, max_size=6).map(lambda raw: bytes([raw[0] & 0xFE, *raw[1:]]).hex(":"))
choices = st.sampled_from(["network:default", "bridge:br0", "user", "none", "network:a b&<"])


def placeable(bus: DiskBus, machine: str, count: int) -> bool:
    most = {DiskBus.IDE: 4 if machine == "pc" else 0, DiskBus.SAS: 8}
    return count <= most.get(bus, 30)


@st.composite
def plans(draw: st.DrawFn) -> DomainPlan:
    count = draw(st.integers(1, 30))
    firmware = draw(st.sampled_from(Firmware))
    machine = draw(st.sampled_from(["q35", "pc"]))
    vm = VirtualMachine(
        uuid=draw(uuids),
        name=draw(names),
        vcpus=draw(st.integers(1, 255)),
        memory=draw(st.integers(MiB, 4096 * GiB)),
        disks=tuple(Disk(i, str(i), GiB, bootable=draw(st.booleans())) for i in range(count)),
        nics=tuple(
            Nic(i, draw(macs), draw(names), slot=draw(st.sampled_from([None, 160 + 32 * i])))
            for i in range(draw(st.integers(0, 4)))
        ),
        firmware=firmware,
        secure_boot=firmware is Firmware.UEFI and machine == "q35" and draw(st.booleans()),
        tpm=draw(st.booleans()),
        description=draw(any_text),
        hypervisor=draw(any_text),
        extra=draw(
            st.dictionaries(
                st.sampled_from(["guest_os", "timeoffset", "cores_per_socket"]), st.sampled_from(["windows", "3", "-9", "x"])
            )
        ),
    )
    buses = st.sampled_from([bus for bus in DiskBus if placeable(bus, machine, count)])
    disks = tuple(TargetDisk(f"/srv/{i}.raw", draw(st.booleans()), draw(buses), serial=draw(any_text)) for i in range(count))
    return DomainPlan(
        vm,
        vm.name,
        disks,
        {"*": draw(choices)},
        machine=machine,
        nic_model=draw(st.sampled_from(NicModel)),
        boot_disk=draw(st.none() | st.integers(0, count - 1)),
        windows=draw(st.sampled_from([None, False, True])),
        kernel=draw(st.sampled_from([None, DirectKernel("/boot/k", "/boot/i", "quiet")])),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.sampled_from(Accel))
@pytest.mark.slow
def test_every_plan_becomes_a_valid_domain_that_keeps_what_the_source_said(plan: DomainPlan, accel: Accel) -> None:
    xml = domain_xml(plan, accel=accel)
    assert validate(xml, where="generated") in Validation
    root = ET.fromstring(xml)
    assert root.findtext("uuid") == plan.vm.uuid
    assert source_name(xml) == plan.vm.name
    assert [mac.get("address") for mac in root.findall("devices/interface/mac")] == [nic.mac for nic in plan.vm.nics]
    drivers = root.findall("devices/disk/driver")
    assert {driver.get("type") for driver in drivers} == {"raw"}
    targets = [target.get("dev") for target in root.findall("devices/disk/target")]
    assert len(set(targets)) == len(plan.disks)
    order = [int(boot.get("order", "0")) for boot in root.findall("devices/disk/boot")]
    assert sorted(order) == list(range(1, len(plan.disks) + 1))
    memory = int(root.findtext("memory", "0")) * 1024
    assert plan.vm.memory <= memory < plan.vm.memory + MiB


def test_the_bootable_disk_comes_first(make_plan: MakePlan) -> None:
    root = ET.fromstring(domain_xml(make_plan(paths=("/a", "/b", "/c"), bootable=2), accel=Accel.TCG))
    assert [boot.get("order") for boot in root.findall("devices/disk/boot")] == ["2", "3", "1"]


def test_the_27th_disk_is_aa(make_plan: MakePlan) -> None:
    root = ET.fromstring(domain_xml(make_plan(paths=tuple(f"/{i}" for i in range(28))), accel=Accel.TCG))
    assert [target.get("dev") for target in root.findall("devices/disk/target")][24:] == ["vdy", "vdz", "vdaa", "vdab"]


def test_scsi_and_sata_disks_share_one_row_of_names(make_plan: MakePlan) -> None:
    plan = make_plan(paths=("/a", "/b", "/c"))
    buses = (DiskBus.SATA, DiskBus.VIRTIO_SCSI, DiskBus.VIRTIO_BLK)
    plan = replace(plan, disks=tuple(replace(disk, bus=bus) for disk, bus in zip(plan.disks, buses, strict=True)))
    root = ET.fromstring(domain_xml(plan, accel=Accel.TCG))
    found = [(target.get("dev"), target.get("bus")) for target in root.findall("devices/disk/target")]
    assert found == [("sda", "sata"), ("sdb", "scsi"), ("vda", "virtio")]


def test_without_direct_io_the_page_cache_does_the_work(make_plan: MakePlan) -> None:
    root = ET.fromstring(domain_xml(make_plan(), accel=Accel.TCG, buffered=frozenset({0})))
    found = [(driver.get("cache"), driver.get("io")) for driver in root.findall("devices/disk/driver")]
    assert found == [("writeback", "threads"), ("none", "native")]


def test_a_serial_holds_only_what_libvirt_takes(make_plan: MakePlan) -> None:
    plan = make_plan(paths=("/a",))
    plan = replace(plan, disks=(replace(plan.disks[0], serial="ab c/d$" + "e" * 30),))
    assert ET.fromstring(domain_xml(plan, accel=Accel.TCG)).findtext("devices/disk/serial") == "abcd" + "e" * 16


@pytest.mark.parametrize(
    ("choice", "kind", "source", "link"),
    [
        ("network:default", "network", {"network": "default"}, "up"),
        ("network:a:b", "network", {"network": "a:b"}, "up"),
        ("bridge:br0", "bridge", {"bridge": "br0"}, "up"),
        ("user", "user", None, "up"),
        ("none", "user", None, "down"),
    ],
)
def test_networks(make_plan: MakePlan, choice: str, kind: str, source: dict[str, str] | None, link: str) -> None:
    nic = ET.fromstring(domain_xml(make_plan(networks={"*": choice}), accel=Accel.TCG)).find("devices/interface")
    assert nic is not None
    found, state = nic.find("source"), nic.find("link")
    assert nic.get("type") == kind
    assert (None if found is None else found.attrib) == source
    assert state is not None
    assert state.get("state") == link


def test_a_named_network_goes_before_the_star(make_plan: MakePlan) -> None:
    plan = make_plan(networks={"storage": "bridge:br1", "*": "user"})
    root = ET.fromstring(domain_xml(plan, accel=Accel.TCG))
    assert [nic.get("type") for nic in root.findall("devices/interface")] == ["user", "bridge"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"machine": "microvm"}, "microvm"),
        ({"vm_uuid": "42"}, "no uuid"),
        ({"vm_uuid": "9F3A2B1C-0000-4000-8000-0123456789AB"}, "no uuid"),
        ({"vcpus": 0}, "vCPUs"),
        ({"vcpus": 256}, "vCPUs"),
        ({"memory": 0}, "memory"),
        ({"paths": ()}, "no disks"),
        ({"disks": ()}, "2 target disks for 0"),
        ({"secure_boot": True}, "without UEFI"),
        ({"secure_boot": True, "firmware": Firmware.UEFI, "machine": "pc"}, "q35"),
        ({"paths": ("relative.raw",)}, "absolute"),
        ({"paths": ("/a\nb",), "networks": {}}, "nothing says"),
        ({"paths": ("/a\x00b",)}, "absolute"),
        ({"paths": ("/a\udc80b",)}, "absolute"),
        ({"networks": {"other": "user"}}, "nothing says"),
        ({"networks": {"*": "network:"}}, "no network"),
        ({"networks": {"*": "user:x"}}, "no network"),
        ({"networks": {"*": "tap:x"}}, "no network"),
        ({"networks": {"*": "bridge:\x00"}}, "no network"),
        ({"nics": (Nic(0, "01:00:5e:00:00:01"),)}, "unicast"),
        ({"nics": (Nic(0, "52:54:00:12:34:56", slot=192), Nic(1, "52:54:00:12:34:57", slot=192))}, "slots 192, 192"),
        ({"nics": (Nic(0, "52:54:00:12:34:56", slot=0),)}, "slots 0"),
        ({"nics": (Nic(0, "52:54:00:12:34:56", slot=8192),)}, "slots 8192"),
        ({"bus": DiskBus.IDE}, "has no IDE"),
        ({"bus": DiskBus.IDE, "machine": "pc", "paths": tuple(f"/{i}" for i in range(5))}, "5 disks on ide"),
        ({"bus": DiskBus.SAS, "paths": tuple(f"/{i}" for i in range(9))}, "9 disks on sas"),
        ({"bus": DiskBus.SATA, "paths": ("/a",), "disks": (Disk(0, "", GiB, sector=4096),)}, "512 bytes"),
        ({"paths": ("/a",), "disks": (Disk(0, "", GiB, sector=520),)}, "sectors of 520"),
        ({"more": {"boot_disk": 2}}, "disk 2 cannot be booted"),
        ({"more": {"boot_disk": -1}}, "cannot be booted"),
        ({"more": {"nvram": "/srv/vars.fd"}}, "for a BIOS"),
        ({"more": {"nvram": "vars.fd"}, "firmware": Firmware.UEFI}, "absolute"),
        ({"more": {"kernel": DirectKernel("k", "/i", "")}}, "absolute"),
        ({"more": {"kernel": DirectKernel("/k", "/i", "\x00")}}, "no text"),
        ({"nics": (Nic(0, "52:54:00:12:34"),)}, "unicast"),
    ],
)
def test_what_cannot_be_a_domain_is_refused(make_plan: MakePlan, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        domain_xml(make_plan(**facts), accel=Accel.TCG)


def test_a_domain_of_somebody_else_has_no_source_name() -> None:
    assert source_name("<domain><name>x</name></domain>") is None


@pytest.mark.parametrize(("cores", "sockets"), [("1", "4"), ("2", "2"), ("4", "1"), ("3", "1"), ("x", "1"), ("0", "1")])
def test_sockets_follow_the_source_where_they_add_up(make_plan: MakePlan, cores: str, sockets: str) -> None:
    root = ET.fromstring(domain_xml(make_plan(vcpus=4, extra={"cores_per_socket": cores}), accel=Accel.KVM))
    topology = root.find("cpu/topology")
    assert topology is not None
    assert topology.get("sockets") == sockets
    assert int(topology.get("cores", "0")) * int(sockets) == 4


STAGE = Stage("9f3a2b1c-0000-4000-8000-0123456789ab", "/srv/a&b\n", "/srv/serial.log", (FrameSink(5000), FrameSink(5001)))


def test_overlays_are_for_the_stage(make_plan: MakePlan) -> None:
    plan = make_plan(paths=("/srv/overlay.qcow2",), vm_uuid="00000000-0000-4000-8000-000000000001")
    plan = replace(plan, disks=(replace(plan.disks[0], format=DiskFormat.QCOW2),))
    with pytest.raises(DomainError, match="overlays are for rehearsals"):
        domain_xml(plan, accel=Accel.TCG)
    xml = domain_xml(plan, accel=Accel.TCG, stage=STAGE)
    assert validate(xml, where="stage") in Validation
    assert rehearsal_folder(xml) == STAGE.folder
    assert source_name(xml) == plan.vm.name
    root = ET.fromstring(xml)
    assert [driver.get("type") for driver in root.findall("devices/disk/driver")] == ["qcow2"]
    assert [nic.get("type") for nic in root.findall("devices/interface")] == ["udp", "udp"]


def test_a_stage_needs_no_word_about_networks_and_never_boots_from_them(make_plan: MakePlan) -> None:
    root = ET.fromstring(domain_xml(make_plan(networks={}), accel=Accel.TCG, stage=STAGE))
    assert [rom.get("enabled") for rom in root.findall("devices/interface/rom")] == ["no", "no"]
    assert {address.get("address") for address in root.findall("devices/interface/source")} == {"127.0.0.1"}


def test_only_rehearsals_have_a_folder(make_plan: MakePlan) -> None:
    assert rehearsal_folder(domain_xml(make_plan(), accel=Accel.TCG)) is None


@pytest.mark.parametrize(
    ("windows", "extra", "expected"),
    [
        (None, {}, "utc"),
        (True, {}, "localtime"),
        (None, {"guest_os": "Windows 2022"}, "localtime"),
        (False, {"guest_os": "windows-2022"}, "utc"),
        (True, {"rtc": "utc"}, "utc"),
        (False, {"rtc": "local"}, "localtime"),
        (True, {"timeoffset": "3600"}, "variable"),
        (True, {"timeoffset": "0"}, "utc"),
    ],
)
def test_the_clock_is_what_the_guest_takes_it_for(
    make_plan: MakePlan, windows: bool | None, extra: dict[str, str], expected: str
) -> None:
    plan = make_plan(extra=extra, more={"windows": windows})
    clock = ET.fromstring(domain_xml(plan, accel=Accel.TCG)).find("clock")
    assert clock is not None
    assert clock.get("offset") == expected


def test_the_detected_boot_disk_goes_before_the_sources_word(make_plan: MakePlan) -> None:
    plan = make_plan(paths=("/a", "/b", "/c"), bootable=2, more={"boot_disk": 1})
    root = ET.fromstring(domain_xml(plan, accel=Accel.TCG))
    assert [boot.get("order") for boot in root.findall("devices/disk/boot")] == ["3", "1", "2"]


def test_each_scsi_model_has_a_controller_of_its_own(make_plan: MakePlan) -> None:
    plan = make_plan(paths=("/a", "/b", "/c"))
    buses = (DiskBus.PVSCSI, DiskBus.VIRTIO_SCSI, DiskBus.PVSCSI)
    plan = replace(plan, disks=tuple(replace(disk, bus=bus) for disk, bus in zip(plan.disks, buses, strict=True)))
    root = ET.fromstring(domain_xml(plan, accel=Accel.TCG))
    places = [(place.get("controller"), place.get("target")) for place in root.findall("devices/disk/address")]
    assert places == [("0", "0"), ("1", "0"), ("0", "1")]
    controllers = root.findall("devices/controller[@type='scsi']")
    assert [(one.get("index"), one.get("model")) for one in controllers] == [("0", "vmpvscsi"), ("1", "virtio-scsi")]
