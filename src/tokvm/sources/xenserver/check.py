"""What is in the way of one VM, before anything is done to it. Reads only, and fresh, whatever the caller knew before."""

from __future__ import annotations

from collections.abc import Iterator

from tokvm.core.machine import Disk, Finding, PowerState, Severity, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import GiB, format_bytes
from tokvm.sources.xenserver import claims, fence, power, snapshots
from tokvm.sources.xenserver.inventory import MACHINES, attached_disks, sr_values
from tokvm.sources.xenserver.xe import Row, Xe, parse_map, value_of

LARGEST_VHD = 2040 * GiB  # sm's own limit; beyond it XCP-ng 8.3 makes qcow2 disks
LONG_CHAIN = 20  # sm refuses to snapshot at about 30 layers, and we add some
_THICK = ("lvm", "lvmoiscsi", "lvmohba", "lvmofcoe")
_THIN_MARGIN = 10  # a thin SR should have room for 1/10 of the disks while our snapshots stand


def findings(xe: Xe, vm: VirtualMachine, own: set[str]) -> list[Finding]:
    """`own`: owners' names under which this process holds VMs."""
    if vm.uuid not in xe.column(MACHINES, "uuid"):
        return [
            _blocker(
                "this is no VM that can be moved: it is gone, or a template, a snapshot or a control domain",
                "look with `tokvm ls`; deploy a template as a VM first",
                vm.uuid,
            )
        ]
    return [
        *_hardware(vm),
        *_state(xe, vm, own),
        *_snapshots(xe, vm),
        *_disks(xe, vm),
    ]


def _blocker(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.BLOCKER, what, fix, where)


def _warning(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.WARNING, what, fix, where)


def _hardware(vm: VirtualMachine) -> Iterator[Finding]:
    if vm.extra.get("virtualization") == "pv":
        loader = vm.extra.get("pv-bootloader") or "none"
        yield _blocker(
            f"it is a paravirtual (PV) guest (boot loader {readable(loader, limit=40)}), which KVM cannot run",
            "convert it to HVM on the host first: a normal kernel, a boot loader on its disk, HVM-boot-policy=BIOS order",
        )
    if vm.tpm:
        yield _blocker(
            "it has a virtual TPM, whose secrets cannot be taken along; BitLocker would ask for its recovery key",
            "suspend or remove what uses it (BitLocker: manage-bde -protectors -disable), then remove the vTPM",
        )
    if vm.extra.get("secureboot") == "auto":
        yield _warning("secure boot is `auto`: whether it is on depends on the pool", "the target will start without it")


def _state(xe: Xe, vm: VirtualMachine, own: set[str]) -> Iterator[Finding]:
    state = power.power(xe, vm.uuid)
    if state not in (PowerState.RUNNING, PowerState.OFF):
        yield _blocker(f"it is {state}; its memory holds what its disks do not", "resume it, or shut it down")
    busy = power.operations(xe, vm.uuid) & {"export", "migrate_send", "pool_migrate", "snapshot", "checkpoint", "copy", "clone"}
    if busy:
        yield _warning(f"the host is busy with it: {', '.join(sorted(busy))}", "let backups and moves end first")
    holder = claims.owner(xe, vm.uuid)
    if holder is not None and holder not in own:
        yield _blocker(
            f"it is claimed by another run: {readable(holder)}",
            f"finish that migration; if nobody runs it: xe vm-param-remove uuid={vm.uuid} param-name=other-config "
            f"param-key={claims.OWNER}",
        )
    yield from _starting(xe, vm)


def _starting(xe: Xe, vm: VirtualMachine) -> Iterator[Finding]:
    priority = xe.ask(*value_of("vm", vm.uuid, "ha-restart-priority"))
    if priority:
        yield _warning(
            f"high availability protects it (priority {readable(priority, limit=40)})",
            "nothing: the cutover takes it out of HA and a rollback puts it back",
        )
    fenced = fence.record(xe, vm.uuid) is not None
    blocked = xe.key(vm.uuid, "blocked-operations", "start")
    if fenced:
        yield _warning("it is fenced by an earlier cutover", "if no cutover is under way, `tokvm rollback` unfences it")
    elif blocked is not None:
        yield _warning(
            f"somebody blocks its start: {readable(blocked)}",
            "take that block away, or a rollback could not start it again",
        )


def _snapshots(xe: Xe, vm: VirtualMachine) -> Iterator[Finding]:
    names = snapshots.names(xe, vm.uuid)
    others = [name for name in names if not snapshots.is_mark(name)]
    if others:
        shown = ", ".join(readable(repr(name), limit=60) for name in others[:5])
        yield _warning(
            f"it has {len(others)} snapshot(s) of somebody else: {shown}",
            "they stay; nothing of them is copied. Pause backup jobs: a merge on the host slows both",
        )
    if len(names) >= LONG_CHAIN:
        yield _warning(
            f"its snapshot chain is long ({len(names)}); the host refuses new ones at about 30",
            "remove snapshots that nobody needs and let the host merge them",
        )


def _disks(xe: Xe, vm: VirtualMachine) -> Iterator[Finding]:
    attached = attached_disks(xe, vm.uuid)
    if not attached:
        yield _blocker("it has no disk", "nothing to copy: make a new VM on the target")
        return
    if [disk.vdi for disk in attached] != [disk.key for disk in vm.disks]:
        yield _blocker("its disks changed while it was looked at", "run the same command again")
        return
    for disk, vbd in zip(vm.disks, attached, strict=True):
        found = xe.values("vdi", disk.key, ["sharable", "sm-config"])
        yield from _disk(disk, found, writable=vbd.writable)
    yield from _room(xe, vm)


def _disk(disk: Disk, found: Row, *, writable: bool) -> Iterator[Finding]:
    where = f"disk {disk.index} ({disk.key})"
    image = parse_map(found["sm-config"]).get("image-format", "vhd").lower()
    if found["sharable"] != "false":
        yield _blocker(
            "it may be written by several VMs, so a snapshot of one is no moment of it", "detach it from the VM", where
        )
    if not writable:
        yield _blocker(
            "it is attached read-only, and the target would make it writable", "detach it, or set its mode to RW", where
        )
    if image != "vhd" or disk.size > LARGEST_VHD:
        yield _blocker(
            f"it is {format_bytes(disk.size)} of {readable(image, limit=20)}; only VHD disks up to 2040 GiB can be exported",
            "move it to a repository with VHD disks, or copy its contents inside the guest",
            where,
        )


def _room(xe: Xe, vm: VirtualMachine) -> Iterator[Finding]:
    """Our snapshots need space: on a thick SR each takes the whole size again, on a thin one what is written meanwhile."""
    repositories = [(disk.key, xe.ask(*value_of("vdi", disk.key, "sr-uuid"))) for disk in vm.disks]
    facts = sr_values(xe, repositories, ["type", "name-label", "physical-size", "physical-utilisation"])
    for sr, fact in facts.items():
        size, used = (
            xe.number(fact[name], value_of("sr", sr, name), least=-1, most=1 << 62)
            for name in ("physical-size", "physical-utilisation")
        )
        if size <= 0 or used < 0:
            continue  # a repository that does not know
        need = sum(disk.size for disk, (_, at) in zip(vm.disks, repositories, strict=True) if at == sr)
        yield from _room_on(fact, free=size - used, need=need)


def _room_on(fact: Row, *, free: int, need: int) -> Iterator[Finding]:
    where = f"SR {readable(fact['name-label'], limit=60)} ({fact['type']})"
    have = f"{format_bytes(max(free, 0))} free, its disks have {format_bytes(need)}"
    if fact["type"] in _THICK and free < need:
        yield _blocker(f"no room for one snapshot: {have}", "free space; a snapshot here takes a disk's whole size", where)
    elif fact["type"] in _THICK and free < 3 * need:
        yield _warning(f"room for few snapshots: {have}", "free space, or let only few passes run", where)
    elif free < need // _THIN_MARGIN:
        yield _warning(f"little room for snapshots: {have}", "free space; the guest stops when the repository is full", where)
