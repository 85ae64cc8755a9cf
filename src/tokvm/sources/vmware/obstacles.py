"""What is in the way of a VMware VM, whichever way it was looked at, over SSH or by the API. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokvm.core.machine import Finding, PowerState, Severity
from tokvm.core.text import readable
from tokvm.core.units import format_bytes
from tokvm.sources.vmware.hardware import DiskDevice
from tokvm.sources.vmware.marks import is_mark

MOST_SNAPSHOTS = 28  # ESXi allows 32 in a chain, and we add some
WISE_SNAPSHOTS = 3  # VMware's own advice
THIN_MARGIN = 10  # a datastore should have room for 1/10 of the disks while our snapshots stand


def blocker(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.BLOCKER, what, fix, where)


def warning(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.WARNING, what, fix, where)


def hardware(
    *, template: bool, encrypted: bool, tpm: bool, persistent_memory: bool, passed_through: Sequence[str], macs: Sequence[str]
) -> Iterator[Finding]:
    """macs: of its network adapters, "" where none is chosen yet. passed_through: the kinds of devices."""
    if template:
        yield blocker("it is a template, which never runs", "make a VM of it, or convert its disks: tokvm image convert")
    if encrypted:
        yield blocker(
            "it is encrypted: its files hold ciphertext",
            "decrypt it first, while it is off: give it a storage policy without encryption (Edit VM Storage Policies)",
        )
    if tpm:
        yield blocker(
            "it has a virtual TPM, whose secrets cannot be taken along; BitLocker would ask for its recovery key",
            "suspend or remove what uses it (BitLocker: manage-bde -protectors -disable), then remove the TPM, while it is off",
        )
    if persistent_memory:
        yield blocker("it has persistent memory (NVDIMM), which no snapshot holds", "copy what it holds, then remove it")
    if passed_through:
        yield blocker(
            f"it has devices of the host passed through ({', '.join(passed_through)}), so it cannot be frozen",
            "remove them from the VM; give the target its own",
        )
    for index, mac in enumerate(macs):
        if not mac:
            yield blocker(
                "it has no MAC address yet: one is chosen when the VM first starts",
                "start it once, or give it one",
                f"network adapter {index}",
            )


def state(*, power: PowerState, question: str, fault_tolerance: str, tools_running: bool) -> Iterator[Finding]:
    """question: what it waits for an answer to, "" for nothing."""
    if power not in (PowerState.RUNNING, PowerState.OFF):
        yield blocker(
            f"it is {power}; its memory may hold what its disks do not",
            "resume it in the host's client, or shut it down",
        )
    if question:
        yield blocker(f"it waits for an answer: {readable(question)}", "answer it in the host's client")
    if fault_tolerance not in ("notConfigured", "disabled"):
        yield blocker(
            f"fault tolerance is {readable(fault_tolerance, limit=40)}: such a VM has no snapshots",
            "turn fault tolerance off in vCenter",
        )
    if power is PowerState.RUNNING and not tools_running:
        yield warning(
            "VMware Tools do not run in the guest, so it cannot be asked to stop",
            "install or start them (open-vm-tools); else shut it down from inside when the cutover begins, or use --force-off",
        )


def snapshots(names: Sequence[str], *, needs_consolidation: bool) -> Iterator[Finding]:
    """names: of all its snapshots, ours too."""
    if needs_consolidation:
        yield blocker(
            "its disks need consolidation: layers without a snapshot are left over",
            "Snapshots > Consolidate in the host's client",
        )
    if len(names) > MOST_SNAPSHOTS:
        yield blocker(
            f"it has {len(names)} snapshots; a chain ends at 32, and a migration makes some more",
            "remove those that nobody needs",
        )
    others = [name for name in names if not is_mark(name)]
    if others:
        shown = ", ".join(readable(repr(name), limit=60) for name in others[:5])
        wise = ", which is more than is wise" if len(others) > WISE_SNAPSHOTS else ""
        yield warning(
            f"it has {len(others)} snapshot(s) of somebody else{wise}: {shown}",
            "they stay, and must stay until the end: removing one merges files that are being copied. Pause backup jobs",
        )


def no_disk() -> Finding:
    return blocker("it has no disk", "nothing to copy: make a new VM on the target")


def disk(device: DiskDevice) -> Iterator[Finding]:
    """All but what it lies on."""
    where = f"disk {device.node}"
    if device.mode.startswith("independent"):
        yield blocker(
            f"its mode is {readable(device.mode, limit=40)}: snapshots leave it out, so nothing can be read while it runs",
            "set its mode to dependent (persistent) while the VM is off; or detach it and move it by itself",
            where,
        )
    elif device.mode not in ("persistent", ""):
        yield blocker(
            f"its mode is {readable(device.mode, limit=40)}: what is written is thrown away at power-off",
            "set its mode to persistent while the VM is off",
            where,
        )
    if device.rdm:
        kind = "physical" if device.rdm.startswith("physical") else "virtual"
        yield blocker(
            f"it is a raw device mapping ({kind}): its bytes are on a LUN, not in a file of a datastore",
            "give the LUN to the target itself; or turn it into a virtual disk first (a virtual one: by storage vMotion)",
            where,
        )
    if device.shared:
        yield blocker(
            f"it may be written by several VMs ({readable(device.shared, limit=40)}), so a snapshot of one is no moment of it",
            "detach it from the VM; move its cluster's data by other means",
            where,
        )
    if not device.chain:
        yield blocker(f"it is no file ({readable(device.kind, limit=60)})", "turn it into a virtual disk on a datastore", where)


def room(store: str, *, free: int, need: int) -> Iterator[Finding]:
    """What is written while our snapshots stand goes to new files beside what the VM writes now. need: the disks' sizes."""
    if free < need // THIN_MARGIN:
        yield warning(
            f"little room for snapshots: {format_bytes(free)} free, its disks have {format_bytes(need)}",
            "free space; ESXi pauses the guest with a question when the datastore is full",
            f"datastore {readable(store, limit=60)}",
        )
