"""The VMDK files of the guests' disks: written for real, frozen, merged.

A layer holds what the guest did between two freezes. A file that a VM runs on holds no truth: a flat one what it held when the
VM started, a delta nothing, and it says that it was not closed.
The truth is written when the layer is frozen or the VM goes off.

CID: VMware creates a delta with its parent's CID and changes it when the file is closed, which a running VM's frozen layers are
not: base and first delta of a running VM bear the same one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial

from tokvm.core.units import TiB
from tokvm.testing.esxi import paths
from tokvm.testing.esxi.state import COWD, FLAT, SESPARSE, Layer, State, Store, datastore_of
from tokvm.testing.hyperv.backend import DATA, UNMAPPED, ZERO, Backend, Change
from tokvm.testing.vmdk_descriptor import NO_PARENT, Dialect, ExtentLine, Identity, default_ddb, write_descriptor

CREATE_TYPES = {FLAT: ("vmfs", "VMFS"), SESPARSE: ("seSparse", "SESPARSE"), COWD: ("vmfsSparse", "VMFSSPARSE")}


def write(store: Store, state: State, backend: Backend, layer: Layer) -> None:
    """Descriptor and extent anew, in place."""
    path = paths.local(store.folder, layer["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if layer["kind"] == FLAT and layer["live"] and paths.local(store.folder, paths.extent_of(layer)).exists():
        describe(store, state, layer)
        return
    changes = [] if layer["live"] else backend.changes(layer["guest"], layer["disk"], layer["since"], layer["upto"])
    data = _runs(backend, layer, changes)
    zeros = [(one.offset, one.length) for one in changes if one.kind == ZERO]
    unmapped = [(one.offset, one.length) for one in changes if one.kind == UNMAPPED]
    fill = partial(_read, backend, layer)
    match layer["kind"]:
        case "flat":
            from tokvm.testing.vmdk_flat_writer import write_flat

            write_flat(path, size=layer["size"], runs=data, zeros=sorted(zeros + unmapped))
        case "sesparse":
            from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse

            open_journal = SesparseOptions(replay_journal=1 if layer["live"] else 0)
            write_sesparse(
                path, size=layer["size"], runs=data, zeros=zeros, unmapped=unmapped, read_parent=fill, options=open_journal
            )
        case _:
            from tokvm.testing.cowd_writer import CowdOptions, write_cowd

            unclean = CowdOptions(unclean=layer["live"])
            write_cowd(path, size=layer["size"], runs=data, zeros=sorted(zeros + unmapped), read_parent=fill, options=unclean)
    describe(store, state, layer)
    for child in [one for one in state["layers"].values() if one["parent"] == layer["path"]]:
        describe(store, state, child)


def describe(store: Store, state: State, layer: Layer) -> None:
    """The descriptor alone: CIDs, and where the parent is."""
    create_type, kind = CREATE_TYPES[layer["kind"]]
    line = ExtentLine(layer["size"], kind, paths.name_of(paths.extent_of(layer)))
    identity = _identity(state, layer)
    ddb = default_ddb(identity, layer["size"])
    if layer["thin"] and layer["kind"] == FLAT:
        ddb["ddb.thinProvisioned"] = "1"
    path = paths.local(store.folder, layer["path"])
    if path.parent.exists():
        path.write_bytes(write_descriptor(create_type, [line], identity=identity, dialect=Dialect(ddb=ddb)))


def _identity(state: State, layer: Layer) -> Identity:
    if not layer["parent"]:
        return Identity(layer["cid"], NO_PARENT)
    parent = state["layers"][layer["parent"]]
    beside = paths.folder_of(parent["path"]) == paths.folder_of(layer["path"])
    return Identity(layer["cid"], parent["cid"], paths.name_of(parent["path"]) if beside else parent["path"])


def _runs(backend: Backend, layer: Layer, changes: Iterable[Change]) -> Iterator[tuple[int, bytes]]:
    written = [one for one in changes if one.kind == DATA]
    if not written:  # of a disk that a VM runs on nothing is asked
        return
    yield from backend.data(layer["guest"], layer["disk"], layer["upto"], written)


def _read(backend: Backend, layer: Layer, offset: int, length: int) -> bytes:
    """What the guest had at the layer's end: the rest of a grain that it wrote a part of."""
    pieces = backend.data(layer["guest"], layer["disk"], layer["upto"], [Change(offset, length, DATA)])
    return b"".join(data for _, data in pieces)


def new_cid(layer: Layer) -> None:
    """The file was closed after somebody wrote to it."""
    layer["cid"] = int.from_bytes(os.urandom(4), "big") & 0xFFFF_FFFD


def child_of(store: Store, state: State, parent: Layer, freeze: str) -> Layer:
    """The delta that a snapshot puts over `parent`: `<name>-<lowest number that is free>-sesparse.vmdk` beside it."""
    stem = paths.stem_of(parent)
    number = 1
    while f"{stem}-{number:06}.vmdk" in state["layers"] or paths.local(store.folder, f"{stem}-{number:06}.vmdk").exists():
        number += 1
    child = parent.copy()
    child["path"], child["kind"] = f"{stem}-{number:06}.vmdk", delta_kind(state, parent)
    child["parent"], child["since"], child["upto"] = parent["path"], freeze, ""
    return child


def delta_kind(state: State, parent: Layer) -> str:
    store = datastore_of(state, parent["path"].split("/")[3])
    return SESPARSE if store["type"] == "VMFS-6" or parent["size"] >= 2 * TiB else COWD


def merge(store: Store, state: State, backend: Backend, parent: Layer, child: Layer) -> None:
    """The child's bytes go into the parent's file; the child's file goes away, and everybody looks at the parent instead."""
    layers = state["layers"]
    parent["upto"], parent["live"] = child["upto"], child["live"]
    del layers[child["path"]]
    for other in layers.values():
        if other["parent"] == child["path"]:
            other["parent"] = parent["path"]
    for vm in state["vms"]:
        for disk in vm["disks"]:
            if disk["top"] == child["path"]:
                disk["top"] = parent["path"]
        for snapshot in vm["snapshots"]:
            snapshot["paths"] = [parent["path"] if path == child["path"] else path for path in snapshot["paths"]]
    write(store, state, backend, parent)
    remove(store, child)


def remove(store: Store, layer: Layer) -> None:
    for path in (layer["path"], paths.extent_of(layer)):
        paths.local(store.folder, path).unlink(missing_ok=True)


def clone(store: Store, backend: Backend, layer: Layer, target: str) -> None:
    """vmkfstools -i: the disk as it was at the layer's end, in one flat file."""
    from tokvm.testing.vmdk_flat_writer import write_flat

    whole = backend.changes(layer["guest"], layer["disk"], "", layer["upto"])
    write_flat(paths.local(store.folder, target), size=layer["size"], runs=_runs(backend, layer, whole))
