"""A way to a VM's files: `folder.Folder` (HTTPS) or `sftp.SftpFiles` (the host's SSH). Both take datastore paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tokvm.core.errors import ImageError, SourceError
from tokvm.images.base import Layer, ReadAt
from tokvm.images.open import open_image
from tokvm.sources.frozen import FrozenFile
from tokvm.sources.vmware.api.datastores import bare_name, beside


class Locked(SourceError):
    """The file is there, but a running VM, or a task, holds it."""


class FileChannel(Protocol):
    """Thread-safe."""

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        ...

    def open(self, path: str) -> FrozenFile:
        """The file at this datastore path; its last sector was read. Locked, or SourceError, when it cannot be."""
        ...

    def read_text(self, path: str) -> bytes:
        """All of a descriptor."""
        ...


class Text:
    """A descriptor that was read. Implements `images.base.ReadAt`."""

    def __init__(self, name: str, raw: bytes) -> None:
        self.name = name
        self.size = len(raw)
        self._raw = memoryview(raw)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ImageError(f"the descriptor ends at {self.size:#x}", where=f"{self.name}@{offset:#x}")
        buffer[:] = self._raw[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing is open."""


class _Beside:
    """The extent files of one descriptor. Implements `images.base.ExtentFiles`.

    A descriptor is text on a datastore: it may name files beside itself only, and only such as bear its own name
    (disk.vmdk: disk-flat.vmdk, disk-000001-sesparse.vmdk …), which is how ESXi names them all."""

    def __init__(self, channel: FileChannel, path: str, opened: list[FrozenFile], view: Callable[[FrozenFile], ReadAt]) -> None:
        self._channel = channel
        self._path = path
        self._opened = opened
        self._view = view

    def open(self, name: str) -> ReadAt | None:
        stem = bare_name(self._path).removesuffix(".vmdk")
        if not (name.startswith(f"{stem}-") and name.endswith(".vmdk") and "/" not in name):
            return None
        file = self._channel.open(beside(self._path, name))
        self._opened.append(file)
        return self._view(file)


def open_layer(
    channel: FileChannel, path: str, opened: list[FrozenFile], view: Callable[[FrozenFile], ReadAt] = lambda file: file
) -> Layer:
    """The layer whose descriptor has this datastore path. `opened` gets its extent files, to be closed by the caller.
    view: what of each the layer is to see instead."""
    raw = channel.read_text(path)
    return open_image(Text(f"{channel.kind} {path}", raw), expect="vmdk", extents=_Beside(channel, path, opened, view))
