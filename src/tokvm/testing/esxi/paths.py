"""Names of files on an ESXi host, and where they really are.

/vmfs/volumes/<uuid>/web/web.vmdk     STATE_DIR/vmfs/volumes/<uuid>/web/web.vmdk
[datastore1] web/web.vmdk             as hostd names it
/vmfs/volumes/datastore1              a symlink to the uuid
"""

from __future__ import annotations

from pathlib import Path

from tokvm.testing.esxi.state import FLAT, Layer, State, Vm

VOLUMES = "/vmfs/volumes"


def local(folder: Path, path: str) -> Path:
    """Where the bytes are. FileNotFoundError for whatever is not plainly below /vmfs/volumes."""
    parts = path.split("/")
    if not path.startswith(f"{VOLUMES}/") or any(part in ("", ".", "..") or "\0" in part for part in parts[1:]):
        raise FileNotFoundError(path)
    return folder.joinpath(*parts[1:])


def canonical(state: State, path: str) -> str:
    """The same file by its datastore's uuid; what is not below a datastore stays as it is."""
    parts = path.split("/")
    for one in state["datastores"]:
        if parts[1:4] == ["vmfs", "volumes", one["name"]]:
            parts[3] = one["uuid"]
    return "/".join(parts)


def bracketed(state: State, path: str) -> str:
    """`[datastore1] web/web.vmdk`"""
    _, _, _, uuid, rest = path.split("/", 4)
    name = next((one["name"] for one in state["datastores"] if one["uuid"] == uuid), uuid)
    return f"[{name}] {rest}"


def directory(state: State, vm: Vm) -> str:
    """Of the VM: where its .vmx is."""
    return f"{VOLUMES}/{vm['datastore']}/{vm['folder']}"


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def extent_of(layer: Layer) -> str:
    """The file with the bytes: `web-flat.vmdk` for `web.vmdk`."""
    return f"{layer['path'].removesuffix('.vmdk')}-{layer['kind']}.vmdk"


def stem_of(layer: Layer) -> str:
    """The path without `.vmdk`, and of a delta without its number, for its next sibling's name."""
    stem = layer["path"].removesuffix(".vmdk")
    return stem if layer["kind"] == FLAT else stem[:-7]
