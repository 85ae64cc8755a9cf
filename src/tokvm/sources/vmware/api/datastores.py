"""Datastore paths, `[datastore] directory/file.vmdk`, and where a file with such a path can be had.

    /folder     https://HOST/folder/directory/file.vmdk?dcPath=Folder%252FDC&dsName=datastore     vCenter: encoded twice
    /folder     https://HOST/folder/directory/file.vmdk?dcPath=ha-datacenter&dsName=datastore     ESXi: once
    on a host   /vmfs/volumes/<the datastore's uuid>/directory/file.vmdk

Names of datastores and directories are any text without a slash. `..` is nowhere we go.
vCenter decodes dcPath and dsName twice (virt-v2v, input/vCenter.ml): once encoded, a name with a space or a plus is not found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from urllib.parse import quote

from tokvm.core.errors import SourceError
from tokvm.core.text import readable

_PATH = re.compile(r"\[([^\x00-\x1f]{1,256}?)\] ([^\x00-\x1f]{1,2048})")
Names = Callable[[], Collection[str]]


def split_path(path: str, names: Names = tuple) -> tuple[str, str]:
    """(datastore, path on it) of a datastore path. names: the datastores there are, asked for when it has `] ` twice,
    because it may be part of a name, or of a directory's. SourceError for a path that leads elsewhere."""
    known = [name for name in names() if path.startswith(f"[{name}] ")] if path.count("] ") > 1 else []
    if len(known) > 1:
        raise SourceError(f"{readable(path, limit=120)!r} may lie on {len(known)} datastores", fix="rename one of them")
    match = _PATH.fullmatch(path)
    datastore, inner = (known[0], path[len(known[0]) + 3 :]) if known else match.groups() if match else ("", "")
    if match is None or any(part in ("", ".", "..") for part in inner.split("/")):
        raise SourceError(
            f"{readable(path, limit=120)!r} is no path of a file on a datastore", fix="move the VM's files to a plain directory"
        )
    return datastore, inner


def beside(path: str, name: str) -> str:
    """The datastore path of a file beside another one, which lies in a directory. `name` is bare."""
    return f"{path.rpartition('/')[0]}/{name}" if "/" in path else f"{path.rpartition('] ')[0]}] {name}"


def bare_name(path: str) -> str:
    return path.rpartition("/")[2] if "/" in path else path.rpartition("] ")[2]


def folder_target(path: str, *, datacenter: str, twice: bool, names: Names = tuple) -> str:
    """What is asked for on the server's HTTPS port, from `/folder` on."""
    datastore, inner = split_path(path, names)
    once = {"dcPath": quote(datacenter, safe=""), "dsName": quote(datastore, safe="")}
    asked = "&".join(f"{name}={quote(value, safe='') if twice else value}" for name, value in once.items())
    return f"/folder/{quote(inner, safe='/')}?{asked}"
