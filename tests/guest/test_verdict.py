"""What facts mean, as a table: every row is a guest as people have them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokvm.core.machine import DiskBus, Finding, Firmware, NicModel, Severity
from tokvm.core.units import MiB
from tokvm.guest.base import GuestFacts, InitrdFacts, Judgement, LinuxFacts, OsFamily, Verdict, Way, WindowsFacts
from tokvm.guest.drives import buses_of, nics_of
from tokvm.guest.verdict import MICRO_SPACE, judge

VIRTIO = frozenset({"virtio_pci", "virtio_blk", "virtio_scsi"})
VMWARE = frozenset({"sd_mod", "vmw_pvscsi", "ahci", "ata_piix"})
SHIPPED = VIRTIO | {"virtio_net", "sd_mod", "vmxnet3"}
KERNEL = InitrdFacts(
    "6.1", "/boot/vmlinuz-6.1", "/boot/initrd.img-6.1", 20 * MiB, modules=VMWARE, available=SHIPPED, default=True
)
LINUX = LinuxFacts(kernels=(KERNEL,), root="UUID=1", generator="initramfs-tools", boot_free=100 * MiB)
GUEST = GuestFacts(OsFamily.LINUX, root="/dev/sda1", product="Debian", distro="debian", major=12, arch="x86_64", linux=LINUX)
SERVICES = frozenset({"lsi_sas", "storahci", "disk"})
WINDOWS = WindowsFacts(
    systemroot="/Windows", control_set="ControlSet001", boot_start=SERVICES, drivers=frozenset({"e1i65x64.sys"})
)
WIN_GUEST = GuestFacts(
    OsFamily.WINDOWS, root="/dev/sda2", product="Windows Server 2022", major=10, arch="x86_64", windows=WINDOWS
)


def linux(*, kernel: InitrdFacts | None = KERNEL, **changes: object) -> GuestFacts:
    kernels = () if kernel is None else (kernel,)
    return replace(GUEST, linux=replace(LINUX, kernels=kernels, **changes))  # type: ignore[arg-type]


def windows(**changes: object) -> GuestFacts:
    return replace(WIN_GUEST, windows=replace(WINDOWS, **changes))  # type: ignore[arg-type]


def initrd(**changes: object) -> InitrdFacts:
    return replace(KERNEL, **changes)  # type: ignore[arg-type]


NO_MODULES = frozenset[str]()
ROWS: list[tuple[str, GuestFacts, Verdict, tuple[Way, ...]]] = [
    ("virtio in the initramfs", linux(kernel=initrd(modules=VIRTIO)), Verdict.READY, (Way.NONE, Way.KERNEL)),
    ("virtio built in, no initramfs", linux(kernel=initrd(initrd="", modules=NO_MODULES, builtin=VIRTIO, problem="none")),
     Verdict.READY, (Way.NONE,)),
    ("virtio in a unified kernel", linux(kernel=initrd(modules=VIRTIO | VMWARE, measured=True)),
     Verdict.READY, (Way.NONE, Way.COMPATIBLE)),
    ("virtio_scsi without sd_mod finds no disk", linux(kernel=initrd(modules=frozenset({"virtio_pci", "virtio_scsi"}))),
     Verdict.MICRO, (Way.MICRO, Way.KERNEL, Way.VIRT_V2V, Way.PRESTAGE)),
    ("virtio_blk without virtio_pci", linux(kernel=initrd(modules=frozenset({"virtio_blk"}))),
     Verdict.MICRO, (Way.MICRO, Way.KERNEL, Way.VIRT_V2V, Way.PRESTAGE)),
    ("a VMware guest", linux(), Verdict.MICRO, (Way.MICRO, Way.KERNEL, Way.COMPATIBLE, Way.VIRT_V2V, Way.PRESTAGE)),
    ("one byte too little in /boot", linux(boot_free=MICRO_SPACE - 1), Verdict.MICRO,
     (Way.KERNEL, Way.COMPATIBLE, Way.PRESTAGE)),
    ("just enough in /boot", linux(boot_free=MICRO_SPACE), Verdict.MICRO,
     (Way.MICRO, Way.KERNEL, Way.COMPATIBLE, Way.VIRT_V2V, Way.PRESTAGE)),
    ("a measured initramfs", linux(kernel=initrd(measured=True)), Verdict.COMPATIBLE, (Way.COMPATIBLE, Way.PRESTAGE)),
    ("a damaged initramfs", linux(kernel=initrd(modules=NO_MODULES, problem="damaged")),
     Verdict.NEEDS_VIRT_V2V, (Way.VIRT_V2V, Way.PRESTAGE)),
    ("the same, nothing to rebuild it", linux(kernel=initrd(modules=NO_MODULES, problem="damaged"), generator=""),
     Verdict.CANNOT, (Way.PRESTAGE,)),
    ("a Hyper-V guest without virtio drivers", linux(kernel=initrd(modules=frozenset({"hv_storvsc"}), available=NO_MODULES)),
     Verdict.CANNOT, (Way.PRESTAGE,)),
    ("no virtio drivers, but AHCI", linux(kernel=initrd(available=NO_MODULES)), Verdict.COMPATIBLE,
     (Way.COMPATIBLE, Way.PRESTAGE)),
    ("no kernel", linux(kernel=None), Verdict.CANNOT, ()),
    ("another architecture", replace(GUEST, arch="aarch64"), Verdict.CANNOT, ()),
    ("a 32-bit Linux", replace(GUEST, arch="i386"), Verdict.MICRO,
     (Way.MICRO, Way.KERNEL, Way.COMPATIBLE, Way.VIRT_V2V, Way.PRESTAGE)),
    ("a BSD", GuestFacts(OsFamily.OTHER, product="FreeBSD 14"), Verdict.CANNOT, ()),
    ("Windows with viostor", windows(boot_start=frozenset({"viostor"})), Verdict.READY, (Way.NONE,)),
    ("Windows with vioscsi, and AHCI", windows(boot_start=frozenset({"vioscsi", "storahci"})), Verdict.READY,
     (Way.NONE, Way.COMPATIBLE)),
    ("a VMware Windows", windows(), Verdict.MICRO, (Way.MICRO, Way.COMPATIBLE, Way.VIRT_V2V, Way.PRESTAGE)),
    ("Windows on Hyper-V", windows(boot_start=frozenset({"storvsc"})), Verdict.MICRO, (Way.MICRO, Way.VIRT_V2V, Way.PRESTAGE)),
    ("Windows, hibernated", windows(hibernated=True), Verdict.CANNOT, ()),
    ("Windows, hibernated, with viostor", windows(hibernated=True, boot_start=frozenset({"viostor"})), Verdict.CANNOT, ()),
    ("Windows, dirty", windows(dirty=True), Verdict.COMPATIBLE, (Way.COMPATIBLE, Way.PRESTAGE)),
    ("Windows, dirty, on Hyper-V", windows(dirty=True, boot_start=frozenset({"storvsc"})), Verdict.CANNOT, (Way.PRESTAGE,)),
    ("Windows, dirty, with viostor", windows(dirty=True, boot_start=frozenset({"viostor"})), Verdict.READY, (Way.NONE,)),
    ("Server 2003", replace(WIN_GUEST, major=5, minor=2, arch="i386"), Verdict.COMPATIBLE,
     (Way.COMPATIBLE, Way.VIRT_V2V, Way.PRESTAGE)),
    ("Server 2008 on nothing that KVM has", replace(windows(boot_start=frozenset({"symmpi"})), major=6, minor=0),
     Verdict.NEEDS_VIRT_V2V, (Way.VIRT_V2V, Way.PRESTAGE)),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "verdict", "ways"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_verdict_and_ways(facts: GuestFacts, verdict: Verdict, ways: tuple[Way, ...]) -> None:
    judgement = judge(facts, 1)
    assert (judgement.verdict, judgement.ways) == (verdict, ways)
    assert judgement.why
    assert "\n" not in judgement.why
    blockers = [one for one in judgement.findings if one.severity is Severity.BLOCKER]
    assert all(one.fix for one in blockers)
    if verdict is Verdict.CANNOT:
        assert blockers


def test_a_way_that_works_is_never_blocked_unless_a_person_must_act() -> None:
    for _, facts, verdict, ways in ROWS:
        blocked = any(one.severity is Severity.BLOCKER for one in judge(facts, 1).findings)
        must_act = facts.windows is not None and facts.windows.dirty and verdict is Verdict.COMPATIBLE
        assert not (blocked and ways and ways[0] is not Way.PRESTAGE) or must_act


@pytest.mark.parametrize(
    ("modules", "bus"),
    [
        ({"virtio_pci", "virtio_blk"}, DiskBus.VIRTIO_BLK),
        ({"virtio_pci", "virtio_scsi", "sd_mod"}, DiskBus.VIRTIO_SCSI),
        ({"vmw_pvscsi", "sd_mod"}, DiskBus.PVSCSI),
        ({"nvme"}, DiskBus.NVME),
        ({"ahci", "sd_mod"}, DiskBus.SATA),
        ({"mptsas", "sd_mod"}, DiskBus.SAS),
        ({"megaraid_sas", "sd_mod"}, DiskBus.MEGASAS),
        ({"ata_piix", "sd_mod"}, DiskBus.IDE),
    ],
)
def test_a_bus_of_linux_needs_all_its_modules_in_initramfs_or_kernel(modules: set[str], bus: DiskBus) -> None:
    assert buses_of(linux(kernel=initrd(modules=frozenset(modules)))) == (bus,)
    assert buses_of(linux(kernel=initrd(modules=NO_MODULES, builtin=frozenset(modules)))) == (bus,)
    for one in modules:
        assert buses_of(linux(kernel=initrd(modules=frozenset(modules - {one})))) == ()


@pytest.mark.parametrize(
    ("service", "bus"),
    [("viostor", DiskBus.VIRTIO_BLK), ("vioscsi", DiskBus.VIRTIO_SCSI), ("pvscsi", DiskBus.PVSCSI), ("stornvme", DiskBus.NVME),
     ("storahci", DiskBus.SATA), ("msahci", DiskBus.SATA), ("lsi_sas", DiskBus.SAS), ("megasas", DiskBus.MEGASAS),
     ("intelide", DiskBus.IDE)],
)  # fmt: skip
def test_a_bus_of_windows_is_a_service_that_starts_at_boot(service: str, bus: DiskBus) -> None:
    assert buses_of(windows(boot_start=frozenset({service, "disk"}))) == (bus,)


def test_buses_and_cards_come_best_first_and_only_what_the_target_has() -> None:
    judgement = judge(linux(), 1)
    assert judgement.buses == (DiskBus.PVSCSI, DiskBus.SATA, DiskBus.IDE)
    assert judgement.nics == ("virtio", "vmxnet3")
    assert judge(linux(), 1, target_buses=frozenset({DiskBus.IDE})).buses == (DiskBus.IDE,)
    none = judge(linux(), 1, target_buses=frozenset({DiskBus.VIRTIO_BLK}))
    assert Way.COMPATIBLE not in none.ways
    assert nics_of(windows(drivers=frozenset({"netkvm.sys", "e1i65x64.sys", "vmxnet3.sys"}))) == (
        NicModel.VIRTIO, NicModel.VMXNET3, NicModel.E1000E)  # fmt: skip
    assert nics_of(linux(kernel=None)) == ()


def test_a_verdict_for_each_disk_in_the_vms_order() -> None:
    assert judge(replace(linux(), boot_disk=1), 3).disks == (Verdict.READY, Verdict.MICRO, Verdict.READY)
    assert judge(linux(), 0).disks == ()


def _said(judgement: Judgement, word: str) -> Finding:
    return next(one for one in judgement.findings if word in one.what)


def test_blocking_findings_say_what_to_do() -> None:
    assert "shutdown /s /f /t 0" in _said(judge(windows(hibernated=True), 1), "hibernated").fix
    assert "chkdsk" in _said(judge(windows(dirty=True), 1), "dirty").fix
    assert "remove an old kernel" in _said(judge(linux(boot_free=1), 1), "/boot has").fix
    assert judge(linux(boot_free=1), 1).why.startswith("/boot has")
    damaged = judge(linux(kernel=initrd(modules=NO_MODULES, builtin=VIRTIO, problem="damaged")), 1)
    assert damaged.verdict is Verdict.READY
    assert "rebuild it in the guest" in _said(damaged, "the initramfs of 6.1: damaged").fix
    assert _said(judge(replace(WIN_GUEST, arch="i386"), 1, firmware=Firmware.UEFI), "32-bit").severity is Severity.BLOCKER
    problem = Finding(Severity.BLOCKER, "the Windows volume is encrypted by BitLocker", "manage-bde -off C:")
    locked = judge(GuestFacts(OsFamily.OTHER, problems=(problem,)), 1)
    assert (locked.verdict, locked.ways, locked.why) == (Verdict.CANNOT, (Way.PRESTAGE,), problem.what)


def test_what_is_worth_knowing_is_a_warning() -> None:
    old = initrd(version="5.10", default=False)
    facts = replace(
        GUEST, linux=replace(LINUX, kernels=(KERNEL, old), by_name=("/data",), root="/dev/sda1", btrfs_snapshots=True)
    )
    findings = judge(facts, 1).findings
    assert {one.severity for one in findings} == {Severity.WARNING}
    assert [word for word in ("5.10", "/data", "/dev/sda1", "snapshots") if not any(word in one.what for one in findings)] == []
    notes = judge(windows(fast_startup=True, bitlocker=True, static_ip=True, group_policy=True), 1).findings
    assert len(notes) == 4
    assert judge(linux(), 1).findings == ()


def test_without_virt_v2v_and_without_drivers() -> None:
    assert Way.VIRT_V2V not in judge(linux(), 1, virt_v2v=False).ways
    lacking = judge(windows(boot_start=frozenset({"storvsc"})), 1, windows_drivers=False)
    assert (lacking.verdict, "virtio-win" in _said(lacking, "no virtio drivers").fix) == (Verdict.CANNOT, True)
    other = judge(windows(), 1, windows_drivers=False)
    assert (other.verdict, other.ways[0]) == (Verdict.COMPATIBLE, Way.COMPATIBLE)


def test_what_inspection_found_stays_among_the_findings() -> None:
    problem = Finding(Severity.WARNING, "the folder /boot is too large")
    assert problem in judge(replace(linux(), problems=(problem,)), 1).findings
