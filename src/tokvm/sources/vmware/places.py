"""Where files lie: datastores, and the three ways in which VMware names a file.

    [Store 1] web/web.vmdk                          in dumps: the datastore's name, which may hold anything
    /vmfs/volumes/<uuid>/web/web.vmdk               what is used here: names change, uuids do not
    web.vmdk, /vmfs/volumes/Store 1/web/web.vmdk    in .vmx, .vmsd and descriptors: beside the file, or from the root

A path may hold blanks, quotes and `$(reboot)`; it is never given to a shell unquoted. `..` leads nowhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.sources.vmware.esxcli import Row, parse_rows
from tokvm.sources.vmware.fields import confused
from tokvm.sources.vmware.shell import Shell

ROOT = "/vmfs/volumes/"
WITH_FILES = ("VMFS", "NFS")
"""File systems on which a disk is files; vsan, VVOL and vsanD are not."""
_LISTING = ("esxcli", "--formatter=xml", "storage", "filesystem", "list")
_LONGEST = 4096


@dataclass(frozen=True, slots=True)
class Datastore:
    """mount: `/vmfs/volumes/<uuid>`. type: `VMFS-6`, `NFS`, `vsan`, … size, free: bytes."""

    name: str
    mount: str
    type: str
    size: int
    free: int

    @property
    def has_files(self) -> bool:
        return self.type.upper().startswith(WITH_FILES)


class Datastores:
    """All that are mounted, as they were when they were listed."""

    def __init__(self, found: list[Datastore], where: str) -> None:
        self._found = found
        self._where = where

    @classmethod
    def ask(cls, shell: Shell) -> Datastores:
        text = shell.ask_one(*_LISTING)
        try:
            return cls([_datastore(row) for row in parse_rows(text) if _is_mounted(row)], shell.where)
        except ValueError as exc:
            raise confused(shell.where, " ".join(_LISTING), str(exc)) from exc

    def find(self, text: str) -> tuple[Datastore, str]:
        """The datastore of `[name] path` and the path in it. SourceError when no mounted one is meant, or two may be."""
        found = [one for one in self._found if one.name and text.startswith(f"[{one.name}] ")]
        if len(found) != 1:
            what = "names no mounted datastore" if not found else f"may lie on {len(found)} datastores"
            raise self._refuse(text, what)
        return found[0], self._checked(text, text[len(found[0].name) + 3 :])

    def path(self, text: str) -> str:
        """`[name] path` as a path from the root."""
        store, inside = self.find(text)
        return f"{store.mount}/{inside}"

    def beside(self, text: str, folder: str) -> str:
        """A name as .vmx, .vmsd and descriptors have it, seen from the directory `folder`, as a path from the root."""
        if text.startswith("["):
            return self.path(text)
        if not text.startswith("/"):
            return f"{folder}/{self._checked(text, text)}"
        if not text.startswith(ROOT):
            raise self._refuse(text, "lies outside of the datastores")
        volume, _, inside = text.removeprefix(ROOT).partition("/")
        found = [one for one in self._found if volume == one.mount.removeprefix(ROOT)]
        found = found or [one for one in self._found if volume == one.name]
        if len(found) != 1:
            raise self._refuse(text, "lies on no datastore that is mounted, or on one of several with that name")
        return f"{found[0].mount}/{self._checked(text, inside)}"

    def of(self, path: str) -> Datastore:
        """The datastore of a path from the root."""
        found = next((one for one in self._found if path.startswith(f"{one.mount}/")), None)
        if found is None:
            raise self._refuse(path, "lies on no datastore that is mounted")
        return found

    def _checked(self, text: str, path: str) -> str:
        parts = path.split("/")
        odd = any(part in ("", ".", "..") for part in parts)
        if odd or len(path) > _LONGEST or any(ord(sign) < 32 or ord(sign) == 127 for sign in path):
            raise self._refuse(text, "is no plain path inside of a datastore")
        return path

    def _refuse(self, text: str, what: str) -> SourceError:
        return SourceError(
            f"{readable(repr(text), limit=200)} {what}",
            where=self._where,
            fix="look at the VM's disks in the host's client; tokvm opens files of mounted datastores by plain names only",
        )


def _is_mounted(row: Row) -> bool:
    return row.get("Mounted") == "true" and bool(row.get("MountPoint"))


def _datastore(row: Row) -> Datastore:
    mount = row.get("MountPoint", "")
    if not mount.startswith(ROOT) or "/" in mount.removeprefix(ROOT) or mount.removeprefix(ROOT) in ("", ".", ".."):
        raise ValueError(f"{readable(repr(mount), limit=80)} is no mount point")
    return Datastore(row.get("VolumeName", ""), mount, row.get("Type", ""), _number(row, "Size"), _number(row, "Free"))


def _number(row: Row, name: str) -> int:
    text = row.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{name} is {readable(repr(text), limit=40)}")
    return int(text)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]
