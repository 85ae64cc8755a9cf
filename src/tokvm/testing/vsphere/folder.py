"""/folder: the files of the datastores, with Range, as long as nobody has them open.

    GET|HEAD /folder/web/web-flat.vmdk?dcPath=<datacenter>&dsName=<datastore>     Range: bytes=FIRST-LAST

vCenter decodes dcPath and dsName twice, and needs them encoded twice ([C] virt-v2v); an ESXi host once, dcPath=ha-datacenter.

| file of a VM             | off | on, on VMFS                          | on, on NFS           |
|--------------------------|-----|--------------------------------------|----------------------|
| descriptors              | 206 | 206                                  | 206                  |
| extents it does not write | 206 | 500, snapshot or not ([C] field reports) | 206                  |
| the extent on top        | 206 | 500                                  | 500                  |

The 500 is a page of HTML that names NFC_FILE_LOCKED.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from tokvm.testing.esxi import locks, paths
from tokvm.testing.esxi.state import ON, chain
from tokvm.testing.esxi.state import State as EsxState
from tokvm.testing.vsphere.listener import Cut, Exchange
from tokvm.testing.vsphere.machine import escaped, has_extents
from tokvm.testing.vsphere.sessions import basic_credentials, same

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint, Hit
    from tokvm.testing.vsphere.options import Options

PIECE = 1 << 20
PRIVILEGES = ("Datastore.Browse", "Datastore.FileManagement")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_ENCODED = re.compile(r"[A-Za-z0-9_.~/%-]*")  # what a value looks like that is still encoded


class Folder:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def answer(self, exchange: Exchange, hit: Hit) -> None:
        options = self._endpoint.options
        wanted = exchange.headers.get("Range", "")
        self._endpoint.log(request="folder", verb=exchange.verb, path=exchange.path, query=exchange.raw_query, range=wanted)
        if "logged_out" in hit or not self._is_known(exchange, options):
            exchange.send(401, b"", {"WWW-Authenticate": 'Basic realm="VMware HTTP server"'})
            return
        if any(one in options["denied"] for one in PRIVILEGES):
            _page(exchange, 403, "Permission to perform this operation was denied.")
            return
        state = self._endpoint.ground.state()
        path = self._path(exchange, options, state)
        if path is None:
            _page(exchange, 404, "Not Found")
        elif path in busy(state):
            name = paths.bracketed(state, path)
            _page(exchange, 500, f"Failed to open disk: NFC_FILE_LOCKED ({name})")
        else:
            self._send(exchange, paths.local(self._endpoint.ground.folder, path), wanted, options, hit)

    def _is_known(self, exchange: Exchange, options: Options) -> bool:
        session = self._endpoint.sessions.of(exchange.headers.get("Cookie", ""))
        if session is not None and session.user:
            return True
        given = basic_credentials(exchange.headers.get("Authorization", ""))
        return given is not None and same(given[0], options["user"]) and same(given[1], options["password"])

    def _path(self, exchange: Exchange, options: Options, state: EsxState) -> str | None:
        """The host's own path of what was asked for; None when there is no such file."""
        query = exchange.query()
        if options["vcenter"]:
            decoded = {name: _second(query.get(name, "")) for name in ("dcPath", "dsName")}
            parts = [escaped(one) for one in (options["datacenter_folder"], options["datacenter"]) if one]
            right = decoded["dcPath"] == "/".join(parts)
        else:
            decoded = {"dsName": query.get("dsName")}
            right = query.get("dcPath", "ha-datacenter") == "ha-datacenter"
        store = next((one for one in state["datastores"] if escaped(one["name"]) == decoded["dsName"]), None)
        if not right or store is None:
            return None
        path = f"{paths.VOLUMES}/{store['uuid']}/{exchange.path.removeprefix('/folder/')}"
        if not has_extents(state, path) and re.search(r"-(flat|delta|sesparse)\.vmdk$", path):
            return None
        try:
            return path if paths.local(self._endpoint.ground.folder, path).is_file() else None
        except FileNotFoundError:
            return None

    def _send(self, exchange: Exchange, file: Path, wanted: str, options: Options, hit: Hit) -> None:
        size = file.stat().st_size
        found = _RANGE.fullmatch(wanted)
        first, last, status = 0, size - 1, 200
        if found is not None and not options["full_answers"]:
            first, last, status = int(found[1]), min(size - 1, int(found[2] or size - 1)), 206
            if first > last:
                exchange.send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        headers = {"Content-Length": str(last - first + 1), "Content-Type": "application/octet-stream"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        exchange.begin(status, headers)
        if "lost_reply" in hit:
            raise Cut
        if exchange.verb == "GET":
            stop = first + hit["cut_answer"].get("bytes", (last - first) // 2) if "cut_answer" in hit else size
            _copy(exchange, file, first, last + 1, stop)


def busy(state: EsxState) -> set[str]:
    """Paths of the extents that cannot be read by /folder."""
    found = locks.locked(state)
    if not state["options"]["locks"]:
        return found
    on_vmfs = {one["uuid"] for one in state["datastores"] if one["type"].startswith("VMFS")}
    for vm in (one for one in state["vms"] if one["state"] == ON or one["question"]):
        layers = [layer for disk in vm["disks"] for layer in chain(state, disk["top"])]
        found |= {paths.extent_of(layer) for layer in layers if layer["path"].split("/")[3] in on_vmfs}
    return found


def _second(once: str) -> str | None:
    """What is decoded a second time; None for what was encoded only once."""
    return urllib.parse.unquote(once) if _ENCODED.fullmatch(once) else None


def _copy(exchange: Exchange, file: Path, first: int, end: int, stop: int) -> None:
    with file.open("rb") as source:
        source.seek(first)
        while first < min(end, stop):
            data = source.read(min(PIECE, end - first, stop - first))
            if not data:
                raise Cut  # it became shorter: a merge, a revert
            exchange.write(data)
            first += len(data)
    if first < end:
        raise Cut


def _page(exchange: Exchange, status: int, text: str) -> None:
    body = f"<html><head><title>{status}</title></head><body><h1>{status}</h1><p>{text}</p></body></html>".encode()
    exchange.send(status, body, {"Content-Type": "text/html; charset=utf-8"})
