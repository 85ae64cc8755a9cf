"""Claim: nobody else migrates this VM; and is it still the VM that the journal knows?"""

from __future__ import annotations

from tokvm.core.errors import Blocked
from tokvm.core.machine import VirtualMachine
from tokvm.core.units import format_bytes
from tokvm.migration.work import Work


def claim(work: Work) -> None:
    """Put our mark on the VM, or find it there; Blocked names whose mark it is."""
    holder = work.ask(lambda uuid: work.doors.source.claim(uuid, work.owner))
    if holder != work.owner:
        raise Blocked(
            f"another tokvm migrates this VM: {holder}",
            where=work.name,
            fix="go on there, or `tokvm finish` it there; only when that state is lost, take the mark off the VM by hand",
        )


def survey(work: Work) -> VirtualMachine:
    """The VM as it is now. A disk that grew is noted down; one that came, went or shrank is Blocked."""
    vm = work.ask(work.doors.source.inspect)
    known = {disk.key: disk for disk in work.book.disks()}
    found = {disk.key: disk for disk in vm.disks}
    if known.keys() != found.keys():
        came, went = sorted(found.keys() - known.keys()), sorted(known.keys() - found.keys())
        raise Blocked(
            f"the VM's disks changed since the migration began (added: {came or 'none'}, removed: {went or 'none'})",
            where=work.name,
            fix="put the disks back, or `tokvm finish` this migration and begin another",
        )
    for key, disk in found.items():
        before = known[key]
        if disk.size < before.size:
            raise Blocked(
                f"disk {before.index} shrank from {before.size} to {disk.size} bytes",
                where=work.name,
                fix="`tokvm finish` this migration and begin another",
            )
        if disk.size > before.size:
            work.note(f"disk {before.index} grew from {format_bytes(before.size)} to {format_bytes(disk.size)}")
            work.book.disk_size(before.index, disk.size)
    work.vm = vm
    return vm
