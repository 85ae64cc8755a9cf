"""libguestfs' calls that the Linux micro-morph makes, on a folder of the host: seconds instead of minutes, and it can break.

The same tests' last one, with a real appliance and a boot, says that libguestfs answers like this.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

WRITES = frozenset({"pwrite", "write", "copy_attributes"})


class HostGuestfs:
    """`root` is the guest's /; `free` the bytes free in every file system of it. `break_at`: the number of the writing call
    that fails, before it does anything; `writes`: those made so far. Reads fail while nothing is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.free = 1 << 30
        self.break_at = 0
        self.writes: list[str] = []
        self.mounted: dict[str, str] = {}

    def close(self) -> None: ...

    def __getattribute__(self, name: str) -> Any:
        if name in WRITES:
            self.writes.append(name)
            if len(self.writes) == self.break_at:
                raise RuntimeError("it broke here")
        return super().__getattribute__(name)

    def path(self, name: str) -> Path:
        if not self.mounted:
            raise RuntimeError("you must call guestfs_mount first")
        return self.root / name.lstrip("/")

    def mount_options(self, options: str, device: str, point: str) -> None:
        self.mounted[point] = device

    def umount_all(self) -> None:
        self.mounted = {}

    def realpath(self, name: str) -> str:
        return "/" + str(_known(self.path(name)).resolve().relative_to(self.root.resolve()))

    def statns(self, name: str) -> dict[str, int]:
        found = _known(self.path(name)).stat()
        seconds, nanoseconds = divmod(found.st_mtime_ns, 1_000_000_000)
        return {"st_size": found.st_size, "st_mtime_sec": seconds, "st_mtime_nsec": nanoseconds}

    def statvfs(self, name: str) -> dict[str, int]:
        return {"bavail": self.free // 4096, "frsize": 4096}

    def is_file(self, name: str, *, followsymlinks: bool) -> bool:
        return self.path(name).is_file()

    def is_dir(self, name: str, *, followsymlinks: bool) -> bool:
        return self.path(name).is_dir()

    def ls(self, name: str) -> list[str]:
        return sorted(os.listdir(self.path(name)))  # noqa: PTH208

    def filesize(self, name: str) -> int:
        return _known(self.path(name)).stat().st_size

    def read_file(self, name: str) -> bytes:
        return _known(self.path(name)).read_bytes()

    def pread(self, name: str, count: int, offset: int) -> bytes:
        return self.read_file(name)[offset : offset + count]

    def write(self, name: str, content: bytes) -> None:
        self.path(name).write_bytes(content)

    def pwrite(self, name: str, content: bytes, offset: int) -> int:
        with self.path(name).open("r+b") as file:
            file.seek(offset)
            return file.write(content[:10_000])  # a short write is an answer, too

    def copy_attributes(self, source: str, target: str, *, xattributes: bool) -> None:
        _known(self.path(source))
        _known(self.path(target))

    def vfs_type(self, device: str) -> str:
        return "ext4"

    def modprobe(self, name: str) -> None:
        raise RuntimeError(f"modprobe: FATAL: Module {name} not found")


def _known(path: Path) -> Path:
    """libguestfs says ENOENT as RuntimeError."""
    if not path.exists():
        raise RuntimeError(f"{path.name}: No such file or directory")
    return path
