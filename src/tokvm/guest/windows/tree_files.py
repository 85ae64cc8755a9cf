"""The files of a virtio-win ISO or folder, read without mounting anything.

An ISO is read by pycdlib (pure Python, LGPL-2.1): no appliance, no root and no program for it, and only the wanted files are
read. Names come from Joliet, Rock Ridge or, failing both, ISO 9660; they are relative, with slashes.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pycdlib
from pycdlib.pycdlibexception import PyCdlibException

from tokvm.core.units import MiB
from tokvm.guest.base import GuestError

MAX_FILES = 50_000
MAX_FILE = 128 * MiB
FIX = "give the path of a virtio-win ISO, or of a folder with its files"

# What pycdlib lets out of a damaged image.
_ISO_FAULTS = (PyCdlibException, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class TreeFiles(Protocol):
    """label: what it calls itself (an ISO's volume, a folder's name)."""

    where: str
    label: str
    names: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """One of `names`, whole; GuestError above MAX_FILE or when it cannot be read."""
        ...


@contextmanager
def open_tree(path: Path) -> Iterator[TreeFiles]:
    """GuestError when it is neither a folder nor an ISO that can be read."""
    if path.is_dir():
        yield _Folder(path)
        return
    iso = pycdlib.PyCdlib()
    with _reading(path, FIX):
        iso.open(str(path))
    try:
        yield _Iso(path, iso)
    finally:
        iso.close()


@contextmanager
def _reading(where: object, fix: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise GuestError(f"cannot be read: {exc.strerror or exc}", where=str(where), fix=fix) from exc
    except _ISO_FAULTS as exc:
        raise GuestError(f"this is no ISO image that can be read: {exc}", where=str(where), fix=fix) from exc


class _Folder:
    """Links are followed when they stay inside (Fedora's package links by-os/ to by-driver/)."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._root = path.resolve()
        self.label = self._root.name
        with _reading(path):
            self.names = tuple(sorted(self._walk()))

    def _walk(self) -> Iterator[str]:
        count = 0
        for folder, _, files in os.walk(self._root):
            for file in files:
                count += 1
                if count > MAX_FILES:
                    raise GuestError(f"more than {MAX_FILES} files; this is no tree of drivers", where=self.where, fix=FIX)
                yield Path(folder, file).relative_to(self._root).as_posix()

    def read(self, name: str) -> bytes:
        with _reading(f"{self.where}/{name}"):
            real = (self._root / name).resolve()
            if not real.is_relative_to(self._root) or not real.is_file():
                raise GuestError("this is no file inside the tree", where=f"{self.where}/{name}", fix=FIX)
            with real.open("rb") as file:
                return _bounded(file.read(MAX_FILE + 1), f"{self.where}/{name}")


class _Iso:
    def __init__(self, path: Path, iso: Any) -> None:
        self.where = str(path)
        self._iso = iso
        kind = "joliet_path" if iso.has_joliet() else "rr_path" if iso.has_rock_ridge() else "iso_path"
        self._kind = kind
        with _reading(path, FIX):
            self.label = iso.pvd.volume_identifier.decode("ascii", "replace").strip()
            self._paths = {_name(full): full for full in self._walk()}
        self.names = tuple(sorted(self._paths))

    def _walk(self) -> Iterator[str]:
        count = 0
        for folder, _, files in self._iso.walk(**{self._kind: "/"}):
            for file in files:
                count += 1
                if count > MAX_FILES:
                    raise GuestError(f"more than {MAX_FILES} files; this is no tree of drivers", where=self.where, fix=FIX)
                yield posixpath.join(folder, file)

    def read(self, name: str) -> bytes:
        with _reading(f"{self.where}/{name}"):
            place = {self._kind: self._paths[name]}
            size = self._iso.get_record(**place).get_data_length()
            if size > MAX_FILE:
                raise _too_big(f"{self.where}/{name}", size)
            out = io.BytesIO()
            self._iso.get_file_from_iso_fp(out, **place)
            return _bounded(out.getvalue(), f"{self.where}/{name}")


def _name(full: str) -> str:
    """Without the leading slash and ISO 9660's version (`;1`)."""
    return full.lstrip("/").split(";")[0]


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > MAX_FILE:
        raise _too_big(where, len(data))
    return data


def _too_big(where: str, size: int) -> GuestError:
    return GuestError(f"{size} bytes or more, above the {MAX_FILE} allowed", where=where, fix=FIX)
