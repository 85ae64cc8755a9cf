"""What the facts mean: does the guest boot on KVM's own hardware, what does it need, and which ways lead there. Pure.

    facts ─► what its initramfs or boot-start services drive ─► buses, NICs ─► verdict, ways best first, what to tell a person

What is driven: drives.py. Ways in order: NONE and MICRO, then KERNEL (whoever runs the VM must allow it), COMPATIBLE (slower),
VIRT_V2V (minutes of downtime), and what only a person can do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokvm.core.machine import DiskBus, Finding, Firmware, Severity
from tokvm.core.units import MiB, format_bytes
from tokvm.guest.base import GuestFacts, InitrdFacts, Judgement, LinuxFacts, OsFamily, Verdict, Way, WindowsFacts
from tokvm.guest.drives import VIRTIO, buses_of, drives_virtio, has_virtio_drivers, nics_of
from tokvm.guest.nic_names import NicNames

MICRO_SPACE = 2 * MiB
"""What a micro-morph needs free in /boot: about 1 MiB, and the segment (0.2 MiB packed for Debian 12's cloud kernel)."""
OLDEST_MICRO_WINDOWS = (6, 1)
"""Windows 7 and Server 2008 R2: the oldest that virtio-win's signed drivers are built for."""
_HOSTS = {"x86_64": {"x86_64", "i386"}, "aarch64": {"aarch64"}}


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    why: str
    ways: tuple[Way, ...] = ()
    findings: tuple[Finding, ...] = ()


def judge(
    facts: GuestFacts,
    disks: int,
    *,
    arch: str = "x86_64",
    firmware: Firmware | None = None,
    target_buses: frozenset[DiskBus] = frozenset(DiskBus),
    windows_drivers: bool = True,
    virt_v2v: bool = True,
) -> Judgement:
    """The judgement on a VM with `disks` disks.

    arch: the target host's. firmware: the VM's, where the source tells it (else what the disks say). target_buses: what the
    target's QEMU has. windows_drivers: a tree of virtio drivers for this guest is at hand. virt_v2v: that program is.
    """
    buses = tuple(one for one in buses_of(facts) if one in target_buses)
    outcome = _cannot_at_all(facts, arch, firmware or facts.firmware)
    if outcome is None and facts.linux is not None:
        outcome = _linux(facts.linux, buses, virt_v2v=virt_v2v)
    elif outcome is None and facts.windows is not None:
        outcome = _windows(facts, facts.windows, buses, windows_drivers=windows_drivers, virt_v2v=virt_v2v)
    assert outcome is not None  # _cannot_at_all speaks for every other family
    return Judgement(
        verdict=outcome.verdict,
        why=outcome.why,
        disks=tuple(outcome.verdict if index == facts.boot_disk else Verdict.READY for index in range(disks)),
        ways=outcome.ways,
        buses=buses,
        nics=tuple(str(one) for one in nics_of(facts)),
        findings=(*facts.problems, *outcome.findings),
    )


def with_names(judgement: Judgement, names: NicNames) -> Judgement:
    """The judgement, where the guest's network is configured for names that its cards would not have on KVM."""
    if names.unsure:
        what = f"the network is configured for {', '.join(names.unsure[:4])}, and KVM's cards may have other names"
        fix = "in the guest, bind its configuration to the MAC addresses; or see to it on the console after the move"
        judgement = replace(judgement, findings=(*judgement.findings, _warning(what, fix)))
    if not names.by_mac:
        return judgement
    kept, ways = ", ".join(list(names.by_mac.values())[:4]), judgement.ways
    what = f"the network is configured for {kept}, and KVM's cards have other names"
    fix = (
        "the way `micro` writes a .link file that keeps them; by any other way, bind the configuration to the MAC address first"
    )
    if Way.NONE in ways and Way.MICRO not in ways:
        ways = (Way.MICRO, *ways)
    return replace(judgement, ways=ways, findings=(*judgement.findings, _warning(what, fix, "/etc/systemd/network")))


def _blocker(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.BLOCKER, what, fix, where)


def _warning(what: str, fix: str = "", where: str = "") -> Finding:
    return Finding(Severity.WARNING, what, fix, where)


def _cannot_at_all(facts: GuestFacts, arch: str, firmware: Firmware) -> Outcome | None:
    """What no way can help; None when the guest can be judged. An encrypted guest can still prepare itself."""
    if facts.family is OsFamily.OTHER or (facts.linux is None and facts.windows is None):
        said = [one for one in facts.problems if one.severity is Severity.BLOCKER]
        if said:
            encrypted = any("encrypted" in one.what for one in said)
            return Outcome(Verdict.CANNOT, said[0].what, (Way.PRESTAGE,) if encrypted else ())
        what = f"{facts.product or 'this operating system'} is neither Linux nor Windows"
        return Outcome(Verdict.CANNOT, what, (), (_blocker(what, "move it by hand, on hardware like its own"),))
    if facts.arch and facts.arch not in _HOSTS.get(arch, {arch}):
        what = f"the guest is built for {facts.arch}, the target is {arch}"
        return Outcome(Verdict.CANNOT, what, (), (_blocker(what, f"choose a target of {facts.arch}"),))
    if facts.windows is not None and facts.arch == "i386" and firmware is Firmware.UEFI:
        what = "a 32-bit Windows on UEFI needs a 32-bit firmware, which KVM hosts do not have"
        return Outcome(Verdict.CANNOT, what, (), (_blocker(what, "reinstall it as 64 bit, or on BIOS"),))
    return None


def _linux(linux: LinuxFacts, buses: tuple[DiskBus, ...], *, virt_v2v: bool) -> Outcome:
    kernel = linux.default_kernel
    if kernel is None:
        what = "no kernel was found in the guest's /boot"
        fix = "is /boot on a disk that was not synced? Otherwise install a kernel in the guest"
        return Outcome(Verdict.CANNOT, what, (), (_blocker(what, fix),))
    notes = _linux_notes(linux, kernel)
    others = [Way.COMPATIBLE] if _compatible(buses) else []
    if any(bus in VIRTIO for bus in buses):
        direct = [] if kernel.measured or not kernel.initrd else [Way.KERNEL]
        why = f"the initramfs of {kernel.version} drives {_listed(buses, VIRTIO)} already"
        return Outcome(Verdict.READY, why, (Way.NONE, *direct, *others), (*notes, *_damaged(kernel)))
    stops = _stops(linux, kernel)
    if stops is None:
        return _micro(linux, kernel, others, notes, virt_v2v=virt_v2v)
    v2v = [Way.VIRT_V2V] if virt_v2v and _v2v_can(linux) else []
    if others:
        return Outcome(Verdict.COMPATIBLE, stops.what, (Way.COMPATIBLE, *v2v, Way.PRESTAGE), (*notes, _softened(stops)))
    if v2v:
        return Outcome(Verdict.NEEDS_VIRT_V2V, stops.what, (Way.VIRT_V2V, Way.PRESTAGE), (*notes, _softened(stops)))
    return Outcome(Verdict.CANNOT, stops.what, (Way.PRESTAGE,), (*notes, stops))


def _micro(linux: LinuxFacts, kernel: InitrdFacts, others: list[Way], notes: tuple[Finding, ...], *, virt_v2v: bool) -> Outcome:
    """Virtio can be added. A full /boot only closes the way that writes there."""
    tail = (*others, *([Way.VIRT_V2V] if virt_v2v else []), Way.PRESTAGE)
    if linux.boot_free >= MICRO_SPACE:
        why = f"the initramfs of {kernel.version} lacks virtio, and the guest has the drivers for it"
        return Outcome(Verdict.MICRO, why, (Way.MICRO, Way.KERNEL, *tail), notes)
    full = _warning(
        f"/boot has {format_bytes(linux.boot_free)} free, and a micro-morph needs {format_bytes(MICRO_SPACE)}",
        "remove an old kernel in the guest, then `tokvm sync` again; or cut over by the way `kernel`",
        "/boot",
    )
    # virt-v2v rebuilds the whole initramfs beside the old one: it needs far more.
    return Outcome(Verdict.MICRO, full.what, (Way.KERNEL, *(one for one in tail if one is not Way.VIRT_V2V)), (*notes, full))


def _damaged(kernel: InitrdFacts) -> tuple[Finding, ...]:
    """Where the kernel itself drives the disk (Ubuntu's has virtio built in), what else the initramfs was for may be missed."""
    said = _warning(
        f"the initramfs of {kernel.version}: {kernel.problem}",
        "rebuild it in the guest, then `tokvm sync` again",
        kernel.initrd,
    )
    return (said,) if kernel.initrd and kernel.problem else ()


def _stops(linux: LinuxFacts, kernel: InitrdFacts) -> Finding | None:
    """Why nothing can be added to this kernel's initramfs; None when it can."""
    name, prepare = kernel.version, "in the running guest: add virtio_pci, virtio_blk and virtio_scsi to its initramfs"
    if kernel.measured:
        return _blocker(
            f"the initramfs of {name} is part of a signed or measured boot and must not change", prepare, kernel.initrd
        )
    if kernel.problem:
        return _blocker(f"the initramfs of {name}: {kernel.problem}", f"{prepare}, and rebuild it", kernel.initrd)
    if not has_virtio_drivers(kernel):
        what = f"the guest has no virtio drivers for its kernel {name}"
        return _blocker(what, "install a distribution kernel in the guest (package linux-modules, kernel-modules or alike)")
    return None


def _v2v_can(linux: LinuxFacts) -> bool:
    """virt-v2v makes the newest kernel with virtio the default, and rebuilds its initramfs by the guest's own generator."""
    return bool(linux.generator) and any(has_virtio_drivers(one) and not one.measured for one in linux.kernels)


def _linux_notes(linux: LinuxFacts, kernel: InitrdFacts) -> tuple[Finding, ...]:
    """What is worth knowing, whatever the verdict."""
    lacking = [one.version for one in linux.kernels if one is not kernel and not drives_virtio(one)]
    notes = (
        (bool(lacking), _warning(
            f"other kernels have no virtio in their initramfs: {', '.join(lacking[:4])}",
            "do not choose them in the boot menu before their initramfs was rebuilt", "/boot")),
        (bool(linux.by_name), _warning(
            f"/etc/fstab names disks by their place on the bus, for {', '.join(linux.by_name[:4])}",
            "write UUID=… there, or keep the names by a virtio-scsi or SATA bus", "/etc/fstab")),
        (linux.root.startswith(("/dev/sd", "/dev/hd", "/dev/xvd")), _warning(
            f"the boot menu names the root as {linux.root}, which changes with the bus",
            "write root=UUID=… in the guest's boot menu, or choose a bus with the same names")),
        (linux.btrfs_snapshots, _warning(
            "btrfs snapshots keep the initramfs of their day", "after the move, roll back only to snapshots made on KVM")),
    )  # fmt: skip
    return tuple(note for true, note in notes if true)


def _windows(
    facts: GuestFacts, windows: WindowsFacts, buses: tuple[DiskBus, ...], *, windows_drivers: bool, virt_v2v: bool
) -> Outcome:
    notes = _windows_notes(windows)
    if windows.hibernated:
        what = "Windows is hibernated: its memory belongs to the old hardware, and its disk must not be written to"
        fix = "start it and shut it down for good: shutdown /s /f /t 0 with Fast Startup off (powercfg /h off), then sync again"
        return Outcome(Verdict.CANNOT, what, (), (*notes, _blocker(what, fix, "hiberfil.sys")))
    if any(bus in VIRTIO for bus in buses):
        others = [Way.COMPATIBLE] if _compatible(buses) else []
        why = f"Windows starts its drivers for {_listed(buses, VIRTIO)} at boot"
        return Outcome(Verdict.READY, why, (Way.NONE, *others), (*notes, *_dirty(windows, severity=Severity.WARNING)))
    if windows.dirty:
        (dirty,) = _dirty(windows, severity=Severity.BLOCKER)
        if _compatible(buses):
            return Outcome(Verdict.COMPATIBLE, dirty.what, (Way.COMPATIBLE, Way.PRESTAGE), (*notes, dirty))
        return Outcome(Verdict.CANNOT, dirty.what, (Way.PRESTAGE,), (*notes, dirty))
    return _windows_morph(facts, buses, notes, windows_drivers=windows_drivers, virt_v2v=virt_v2v)


def _windows_morph(
    facts: GuestFacts, buses: tuple[DiskBus, ...], notes: tuple[Finding, ...], *, windows_drivers: bool, virt_v2v: bool
) -> Outcome:
    """Its disk may be written to: which way adds the drivers?"""
    compatible = [Way.COMPATIBLE] if _compatible(buses) else []
    v2v = [Way.VIRT_V2V] if virt_v2v and windows_drivers else []
    old = (facts.major, facts.minor) < OLDEST_MICRO_WINDOWS
    name = facts.product or "this Windows"
    if windows_drivers and not old and facts.arch == "x86_64":
        why = f"{name} has no virtio driver that starts at boot; two driver files and registry keys are enough"
        return Outcome(Verdict.MICRO, why, (Way.MICRO, *compatible, *v2v, Way.PRESTAGE), notes)
    if v2v and not compatible:
        why = f"{name} is too old or not 64 bit for a micro-morph"
        return Outcome(Verdict.NEEDS_VIRT_V2V, why, (*v2v, Way.PRESTAGE), notes)
    lacking = _blocker(f"no virtio drivers for {name} are at hand", "name a virtio-win ISO or folder in the configuration")
    why = f"{name} is too old or not 64 bit for a micro-morph" if windows_drivers else lacking.what
    if compatible:
        said = () if windows_drivers else (_softened(lacking),)
        return Outcome(Verdict.COMPATIBLE, why, (*compatible, *v2v, Way.PRESTAGE), (*notes, *said))
    return Outcome(Verdict.CANNOT, why, (Way.PRESTAGE,), (*notes, lacking))


def _dirty(windows: WindowsFacts, *, severity: Severity) -> tuple[Finding, ...]:
    what = "the Windows volume is marked dirty: Windows itself wants to check it, and nobody else should write to it"
    fix = "in the guest: chkdsk C: /f, restart it, then `tokvm sync` again"
    return (Finding(severity, what, fix, "C:"),) if windows.dirty else ()


def _windows_notes(windows: WindowsFacts) -> tuple[Finding, ...]:
    notes = (
        (windows.fast_startup, _warning(
            "Fast Startup is on: a shutdown from the Start menu hibernates the kernel and leaves the disk unfit for a morph",
            "in the guest: powercfg /h off; tokvm's own shutdown is a full one")),
        (windows.bitlocker, _warning(
            "a volume is encrypted by BitLocker, and its key may be bound to the old machine's TPM",
            "in the guest: manage-bde -protectors -disable C:, and have the recovery key at hand")),
        (windows.static_ip, _warning(
            "an adapter has an address of its own: it stays with the old adapter, and the new one starts with DHCP",
            "let tokvm carry it over, or set it after the move")),
        (windows.group_policy, _warning(
            "group policies apply: they may forbid new drivers or scripts at the first boot",
            "look at the rehearsal's picture")),
    )  # fmt: skip
    return tuple(note for true, note in notes if true)


def _compatible(buses: tuple[DiskBus, ...]) -> bool:
    return any(bus not in VIRTIO for bus in buses)


def _listed(buses: tuple[DiskBus, ...], among: tuple[DiskBus, ...]) -> str:
    return " and ".join(bus for bus in buses if bus in among)


def _softened(finding: Finding) -> Finding:
    """The same, where another way is left."""
    return Finding(Severity.WARNING, finding.what, finding.fix, finding.where)
