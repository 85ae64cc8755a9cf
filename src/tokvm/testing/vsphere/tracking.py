"""Changed block tracking, from what the guests really wrote.

    changeId   52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81    a disk's uuid, made anew by every reset, and a number

The number goes up with each snapshot. A running VM that is told to track begins at its next stun (a snapshot, a power cycle);
one that is off at once. Blocks are of 64 KiB, as ESXi's of small disks are: an area may hold more than was written, never less.
Since the moments of removed snapshots are asked for, too, the backend has to keep them (keeping.py).
"""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid5

from pyVmomi import vim, vmodl

from tokvm.testing.esxi.state import OFF, Disk, Snapshot, chain
from tokvm.testing.hyperv.backend import UNMAPPED
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vsphere.ground import Ground
from tokvm.testing.vsphere.machine import Machine
from tokvm.testing.vsphere.options import Options, State, Store, Tracking

BLOCK = 64 << 10
Area = tuple[int, int]


class Tracker:
    def __init__(self, store: Store, ground: Ground) -> None:
        self._store = store
        self._ground = ground

    def look(self, machines: list[Machine]) -> None:
        """What happened since the last look, by whoever's hand: snapshots, power cycles."""
        with self._store.change() as own:
            for machine in machines:
                tracking = own["tracking"].get(machine.vm["guest"])
                if tracking is not None:
                    reverts = self._ground.reverts(machine.vm["guest"])
                    if reverts > tracking["reverts"]:
                        tracking["reverts"], tracking["uuid"], tracking["number"] = reverts, new_uuid(), 1
                    _catch_up(tracking, machine)

    def is_enabled(self, machine: Machine) -> bool:
        tracking = self._tracking(machine)
        return tracking is not None and tracking["enabled"]

    def enable(self, own: State, machine: Machine, *, enabled: bool, now: float) -> None:
        """Within a change of our state."""
        guest = machine.vm["guest"]
        tracking = own["tracking"].setdefault(
            guest, Tracking(enabled=False, tracks=False, since=0.0, uuid="", number=0, reverts=0, marks={}, seen=[])
        )
        if enabled and not tracking["enabled"]:
            seen = [one["freeze"] for one in machine.vm["snapshots"]]
            tracking["enabled"], tracking["tracks"], tracking["since"] = True, machine.vm["state"] == OFF, now
            tracking["uuid"], tracking["number"], tracking["seen"] = new_uuid(), 1, seen
            tracking["reverts"] = self._ground.reverts(guest)
        elif not enabled:
            tracking["enabled"] = tracking["tracks"] = False

    def reset(self, machine: Machine) -> None:
        """As after an unclean crash of the host: what was recorded so far is worth nothing."""
        with self._store.change() as own:
            tracking = own["tracking"].get(machine.vm["guest"])
            if tracking is not None:
                tracking["uuid"], tracking["number"] = new_uuid(), 1

    def change_id(self, machine: Machine, disk: Disk, snapshot: Snapshot | None) -> str | None:
        """Of a disk at a snapshot, or of the running one; None for a moment, or a disk, that is not tracked."""
        tracking = self._tracking(machine)
        if tracking is None or not _can_track(disk):
            return None
        if snapshot is not None:
            mark = tracking["marks"].get(snapshot["freeze"])
            return None if mark is None else _text(mark, disk)
        return _text(f"{tracking['uuid']}/{tracking['number']}", disk) if tracking["enabled"] and tracking["tracks"] else None

    def query(
        self, machine: Machine, snapshot: Snapshot | None, disk: Disk, change_id: str, start: int, options: Options
    ) -> Any:
        """One page of QueryChangedDiskAreas. snapshot: None for the VM as it is, which then must be off."""
        size = machine.layers(disk["top"])[0]["size"]
        if not 0 <= start < size or self.change_id(machine, disk, snapshot) is None:
            raise _wrong("startOffset")  # [C] also what a host says when tracking is not really on
        areas = self._areas(machine, snapshot, disk, change_id, options)
        end, page = _page([area for area in areas if area[0] + area[1] > start], start, size, options)
        extent: Any = vim.VirtualMachine.DiskChangeInfo.DiskChangeExtent
        return vim.VirtualMachine.DiskChangeInfo(
            startOffset=start, length=end - start, changedArea=[extent(start=at, length=length) for at, length in page]
        )

    def _areas(self, machine: Machine, snapshot: Snapshot | None, disk: Disk, change_id: str, options: Options) -> list[Area]:
        """Ascending, disjoint, in whole blocks. FileFault where the host cannot tell."""
        path = snapshot["paths"][disk["number"]] if snapshot else disk["top"]
        vmfs = any(one["uuid"] == path.split("/")[3] and one["type"] != "NFS" for one in machine.state["datastores"])
        if change_id == "*":
            since = None if options["cbt_star_fails"] or not vmfs else ""
        else:
            since = self._freeze_of(machine, disk, change_id)
        if since is None:
            raise _file_fault(machine.bracketed(path))
        upto = snapshot["freeze"] if snapshot else ""
        layer = chain(machine.state, path)[0]
        changes = self._ground.backend().changes(layer["guest"], layer["disk"], since, upto)
        written = [(one.offset, one.length) for one in changes if since or one.kind != UNMAPPED]
        return _blocks(written, layer["size"])

    def _freeze_of(self, machine: Machine, disk: Disk, change_id: str) -> str | None:
        """The moment that a changeId names, if tracking has been on ever since."""
        tracking = self._tracking(machine)
        if tracking is None:
            return None
        return next(
            (
                freeze
                for freeze, mark in tracking["marks"].items()
                if _text(mark, disk) == change_id and mark.partition("/")[0] == tracking["uuid"]
            ),
            None,
        )

    def _tracking(self, machine: Machine) -> Tracking | None:
        return self._store.read()["tracking"].get(machine.vm["guest"])


def _catch_up(tracking: Tracking, machine: Machine) -> None:
    fresh = [one for one in machine.vm["snapshots"] if one["freeze"] not in tracking["seen"]]
    if not tracking["enabled"]:
        tracking["seen"] += [one["freeze"] for one in fresh]
        return
    if machine.vm["since"] > tracking["since"] or fresh:
        tracking["tracks"] = True
    for snapshot in sorted(fresh, key=lambda one: one["id"]):
        tracking["seen"].append(snapshot["freeze"])
        tracking["marks"][snapshot["freeze"]] = f"{tracking['uuid']}/{tracking['number']}"
        tracking["number"] += 1


def _can_track(disk: Disk) -> bool:
    return disk["rdm"] != "physicalMode" and not disk["mode"].startswith("independent") and disk["shared_bus"] == "noSharing"


def _text(mark: str, disk: Disk) -> str:
    """`52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81`: each disk has a uuid of its own."""
    uuid, _, number = mark.partition("/")
    raw = b"\x52" + uuid5(UUID(uuid), str(disk["number"])).bytes[1:]
    return f"{raw[:8].hex(' ')}-{raw[8:].hex(' ')}/{number}"


def _blocks(written: list[Area], size: int) -> list[Area]:
    found: list[list[int]] = []
    for offset, length in written:
        first, stop = offset // BLOCK * BLOCK, min(size, -(-(offset + length) // BLOCK) * BLOCK)
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([first, stop])
    return [(first, stop - first) for first, stop in found]


def _page(areas: list[Area], start: int, size: int, options: Options) -> tuple[int, list[Area]]:
    """(where the page ends, its areas). Before a gap there is a page of the gap alone, if there are to be empty ones."""
    most = min(size, start + options["span"])
    if options["empty_pages"] and (not areas or areas[0][0] > start):
        return min(most, areas[0][0] if areas else size), []
    taken = areas[: options["areas"]]
    end = min(most, taken[-1][0] + taken[-1][1] if len(areas) > len(taken) or options["empty_pages"] else size)
    cut = [(max(at, start), min(at + length, end)) for at, length in taken if at < end]
    return end, [(at, stop - at) for at, stop in cut]


def _wrong(name: str) -> Any:
    return vmodl.fault.InvalidArgument(invalidProperty=name, msg=f"A specified parameter was not correct: {name}")


def _file_fault(path: str) -> Any:
    return vim.fault.FileFault(file=path, msg=f"Error caused by file {path}")
