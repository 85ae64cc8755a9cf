"""The files of the guests' disks, VHDX (and VHD: avhds.py): written for real, frozen, merged.

A layer holds what the guest did between two freezes. A file that a VM runs on holds no truth: it is given a log that nobody can
replay, so that whoever reads it all the same is told. The truth is written when the layer is frozen or the VM goes off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from uuid import UUID

from tokvm.core.units import MiB, round_up
from tokvm.testing.hyperv import paths
from tokvm.testing.hyperv.backend import DATA, UNMAPPED, ZERO, Backend, Change
from tokvm.testing.hyperv.state import DIFFERENCING, FIXED, VHD, State, Store, Vhd, guid
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vhdx_structs import (
    HEADER_OFFSETS,
    HEADER_SIZE,
    METADATA_SIZE,
    Geometry,
    Header,
    disk_items,
    metadata_region,
)
from tokvm.testing.vhdx_writer import write_vhdx

NOBODYS_LOG = UUID("6c6f6700-dead-4000-8000-000000000000")
BLOCK = 2 * MiB  # what Hyper-V gives differencing disks
METADATA_OFFSET = 2 * MiB  # behind the log, in every file that is written here
CREATOR = "Microsoft Windows 10.0.20348.0"


def write(store: Store, state: State, backend: Backend, vhd: Vhd) -> None:
    """Write the file anew, in place, with another DataWriteGuid; its children learn it."""
    vhd["data_guid"] = new_uuid()
    changes = [] if vhd["live"] else backend.changes(vhd["vm"], vhd["disk"], vhd["since"], vhd["upto"])
    if vhd["format"] == VHD:
        _write_vhd(store, state, vhd, changes, backend)
    else:
        _write_vhdx(store, state, vhd, changes, backend)
    for child in [one for one in state["vhds"].values() if one["parent"] == vhd["path"]]:
        relink(store, state, backend, child)


def relink(store: Store, state: State, backend: Backend, vhd: Vhd) -> None:
    """The parent has another DataWriteGuid or path: the locator changes, but not what the file holds, nor its own guid.

    A VHD is written anew where its parent is another file; its parent's writes do not concern it.
    """
    if vhd["format"] == VHD:
        from tokvm.testing.hyperv import avhds

        path, parent = paths.local(store.folder, vhd["path"]), state["vhds"][vhd["parent"]]
        if path.exists() and not vhd["live"] and not avhds.is_linked(path, parent):
            write(store, state, backend, vhd)
        return
    geometry = Geometry(vhd["size"], vhd["block_size"], vhd["logical"], differencing=True)
    items = disk_items(
        geometry,
        physical_sector=vhd["physical"],
        virtual_disk_id=UUID(vhd["disk_id"]),
        leave_allocated=False,
        locator=_locator(vhd["path"], state["vhds"][vhd["parent"]]),
    )
    path = paths.local(store.folder, vhd["path"])
    if path.exists():  # else it is about to be written
        with path.open("r+b") as file:
            file.seek(METADATA_OFFSET)
            file.write(metadata_region(items).ljust(METADATA_SIZE, b"\0"))


def _write_vhd(store: Store, state: State, vhd: Vhd, changes: list[Change], backend: Backend) -> None:
    from tokvm.testing.hyperv import avhds  # hosts of VHDX alone do not pay for it

    path = paths.local(store.folder, vhd["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    avhds.write(path, vhd, state["vhds"].get(vhd["parent"]), _runs(backend, vhd, changes))
    if vhd["live"]:
        avhds.spoil(path)


def _write_vhdx(store: Store, state: State, vhd: Vhd, changes: list[Change], backend: Backend) -> None:
    path = paths.local(store.folder, vhd["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, small = _split(changes, vhd["block_size"], vhd["size"])
    parent = state["vhds"].get(vhd["parent"])
    write_vhdx(
        path,
        size=vhd["size"],
        kind={DIFFERENCING: "differencing", FIXED: "fixed"}.get(vhd["type"], "dynamic"),  # type: ignore[arg-type]
        data_write_guid=UUID(vhd["data_guid"]),
        file_write_guid=UUID(new_uuid()),
        runs=_runs(backend, vhd, small),
        zeros=[(one.offset, one.length) for one in whole if one.kind == ZERO],
        unmapped=[(one.offset, one.length) for one in whole if one.kind == UNMAPPED],
        block_size=vhd["block_size"],
        logical_sector=vhd["logical"],
        physical_sector=vhd["physical"],
        virtual_disk_id=UUID(vhd["disk_id"]),
        locator=_locator(vhd["path"], parent) if parent else None,
        creator=CREATOR,
    )
    if vhd["live"]:
        _open_log(store, vhd)


def _locator(path: str, parent: Vhd) -> dict[str, str]:
    """As Windows writes it: the guid in braces, a path without the demanded prefix, a second linkage of zeros."""
    own, other = paths.folder_of(path), paths.folder_of(parent["path"])
    relative = f".\\{paths.name_of(parent['path'])}" if own == other else parent["path"]
    return {
        "parent_linkage": f"{{{parent['data_guid']}}}",
        "parent_linkage2": "{00000000-0000-0000-0000-000000000000}",
        "relative_path": relative,
        "absolute_win32_path": parent["path"],
    }


def _split(changes: Iterable[Change], block_size: int, size: int) -> tuple[list[Change], list[Change]]:
    """(zeros and trims of whole blocks, everything else), so that each can be written in its way."""
    whole, small = [], []
    for one in changes:
        end = one.offset + one.length
        first = round_up(one.offset, block_size)
        last = end if end == size else end // block_size * block_size
        if one.kind == DATA or first >= last:
            small.append(one)
            continue
        whole.append(Change(first, last - first, one.kind))
        small += [Change(at, stop - at, one.kind) for at, stop in ((one.offset, first), (last, end)) if at < stop]
    return whole, small


def _runs(backend: Backend, vhd: Vhd, changes: list[Change]) -> Iterator[tuple[int, bytes]]:
    for one in changes:
        if one.kind == DATA:
            yield from backend.data(vhd["vm"], vhd["disk"], vhd["upto"], [one])
        else:
            yield one.offset, bytes(one.length)


def _open_log(store: Store, vhd: Vhd) -> None:
    """Both headers name a log of which there is no entry: as good as damaged."""
    with paths.local(store.folder, vhd["path"]).open("r+b") as file:
        for offset in HEADER_OFFSETS:
            file.seek(offset)
            header = Header.unpack(file.read(HEADER_SIZE))
            file.seek(offset)
            file.write(replace(header, log_guid=NOBODYS_LOG).pack())


def child_of(parent: Vhd, freeze: str) -> Vhd:
    """The AVHDX that a checkpoint puts over `parent`: `<name>_<GUID>.avhdx` beside it. Over a VHD it is an AVHD."""
    stem = parent["path"].rpartition(".")[0]
    if parent["parent"]:
        stem = stem.rpartition("_")[0]
    child = parent.copy()
    child["path"], child["type"], child["block_size"] = f"{stem}_{guid()}.a{parent['format'].lower()}", DIFFERENCING, BLOCK
    child["identifier"] = new_uuid()
    child["data_guid"], child["parent"], child["since"] = new_uuid(), parent["path"], freeze
    return child


def merge(store: Store, state: State, backend: Backend, parent: Vhd, child: Vhd) -> None:
    """The child's bytes go into the parent's file; the child's file goes away, and everybody looks at the parent instead."""
    vhds = state["vhds"]
    parent["upto"], parent["live"] = child["upto"], child["live"]
    del vhds[child["path"]]
    for other in vhds.values():
        if other["parent"] == child["path"]:
            other["parent"] = parent["path"]  # its locator follows when the parent is written
    for drive in (drive for vm in state["vms"].values() for drive in vm["drives"]):
        if drive["path"] == child["path"]:
            drive["path"] = parent["path"]
    for checkpoint in state["checkpoints"]:
        checkpoint["paths"] = [parent["path"] if path == child["path"] else path for path in checkpoint["paths"]]
    write(store, state, backend, parent)
    paths.local(store.folder, child["path"]).unlink(missing_ok=True)
