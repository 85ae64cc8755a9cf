r"""Windows paths, and the same files over SMB.

C:\VMs\a b\d.vhdx               HOST   C$      VMs\a b\d.vhdx        the administrative share of the drive
\\server\share\dir\d.vhdx       server share   dir\d.vhdx            only where the VM's own settings name that server
\\?\UNC\server\share\d.vhdx     the same
\\?\Volume{…}\d.vhdx            refused: no share leads to a volume without a drive letter
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.text import readable

_DRIVE = re.compile(r"(?:\\\\[?.]\\)?([A-Za-z]):\\(.+)", re.DOTALL)
_UNC = re.compile(r"\\\\(?:\?\\UNC\\)?([A-Za-z0-9_](?:[A-Za-z0-9._-]*))\\([^\\]+)\\(.+)", re.DOTALL | re.IGNORECASE)
_NEVER = re.compile(r'[\x00-\x1f<>:"|?*/]')  # in a name of NTFS or ReFS; `:` would open another stream


@dataclass(frozen=True, slots=True)
class Place:
    """A file by SMB. `server` "": the hypervisor itself."""

    server: str
    share: str
    path: str


def problem(path: str) -> str:
    """Why the file cannot be reached over SMB; "" when it can."""
    plain = path.replace("/", "\\")
    match = _DRIVE.fullmatch(plain) or _UNC.fullmatch(plain)
    if match is None:
        return "it has neither a drive letter nor a share, so SMB cannot name it"
    names = [name for part in match.groups()[1:] for name in part.split("\\")]
    if any(name in ("", ".", "..") or _NEVER.search(name) for name in names):
        return "it is no plain path of a file"
    return ""


def place(path: str, *, drive: str, where: str) -> Place:
    """drive: the path that the VM's settings name for its disk. A layer's parent is named by the layer, whoever wrote that: our
    login must not go to a server of its choice."""
    why = problem(path)
    if why:
        raise SourceError(
            f"{readable(path)}: {why}",
            where=where,
            fix="move the VM's storage to a volume with a drive letter of this host (Move-VMStorage)",
        )
    plain = path.replace("/", "\\")
    if local := _DRIVE.fullmatch(plain):
        return Place("", f"{local[1].upper()}$", local[2])
    unc = _UNC.fullmatch(plain)
    assert unc is not None  # problem() saw one of both
    named = _UNC.fullmatch(drive.replace("/", "\\"))
    if named is None or named[1].lower() != unc[1].lower():
        raise SourceError(
            f"{readable(path)}: its server {unc[1]!r} is not that of the VM's disk {readable(drive)}; nobody logs in there",
            where=where,
            fix="look at the chain with Get-VHD; move the VM's storage to one place (Move-VMStorage)",
        )
    return Place(unc[1].lower(), unc[2], unc[3])
