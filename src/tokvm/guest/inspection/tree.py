"""A mounted guest's files, read with bounds: nothing of the guest decides how much memory or time we spend.

What is absent, no regular file, or a loop of symbolic links reads as empty. What is too large is not read and becomes a
problem. An appliance that died is a GuestError, never an empty file system.
"""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, TypeVar

from tokvm.core.machine import Finding, Severity
from tokvm.core.text import readable
from tokvm.core.units import KiB, MiB, format_bytes
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError

T = TypeVar("T")

TEXT_LIMIT = MiB
SHORT_LIMIT = 64 * KiB
SMALL = MiB
"""Up to here one call brings a file. Calls are what inspection spends its time with where KVM does not work."""
FOLDER_LIMIT = 16 * MiB
"""st_size of a folder: ext4, XFS and btrfs count the entries in it. 16 MiB are some 200 000 names."""
NAMES_LIMIT = 20_000
LISTING_LIMIT = 4 * MiB


@dataclass(frozen=True, slots=True)
class FileStat:
    """size in bytes, mtime in nanoseconds; of the file that a symbolic link leads to."""

    mode: int
    size: int
    mtime_ns: int


class Tree:
    """The file systems mounted in the appliance. Paths are the guest's, absolute. `problems` grows while one reads."""

    def __init__(self, appliance: Appliance) -> None:
        self.appliance = appliance
        self.problems: list[Finding] = []

    def ask(self, call: Callable[..., Any], *args: Any, default: T) -> T | Any:
        """libguestfs' answer, or `default` when it refuses. GuestError when there is no appliance any more."""
        try:
            return call(*args)
        except UnicodeDecodeError:  # the bindings make str of every answer
            return default
        except RuntimeError:
            if self.appliance.g.is_ready():
                return default
            with self.appliance.translated("the appliance ended during the inspection"):
                raise

    def stat(self, path: str) -> FileStat | None:
        found = self.ask(self.appliance.g.statns, path, default=None)
        if found is None:
            return None
        mtime_ns = int(found["st_mtime_sec"]) * 1_000_000_000 + int(found["st_mtime_nsec"])
        return FileStat(int(found["st_mode"]), int(found["st_size"]), mtime_ns)

    def is_file(self, path: str) -> bool:
        found = self.stat(path)
        return found is not None and stat.S_ISREG(found.mode)

    def is_folder(self, path: str) -> bool:
        found = self.stat(path)
        return found is not None and stat.S_ISDIR(found.mode)

    def content(self, path: str, limit: int = TEXT_LIMIT) -> bytes:
        """The whole file; b"" when it is absent, no regular file (a FIFO would wait for ever) or above `limit` bytes."""
        found = self.stat(path)
        if found is None or not stat.S_ISREG(found.mode):
            return b""
        if found.size > limit:
            self.problem(f"{path} has {format_bytes(found.size)} and was not read", where=path)
            return b""
        if found.size <= SMALL:
            return bytes(self.ask(self.appliance.g.read_file, path, default=b""))
        try:
            return self.appliance.read(path, limit)
        except GuestError as failed:
            if not self.appliance.g.is_ready():
                raise
            self.problem(failed.what, where=path)
            return b""

    def text(self, path: str, limit: int = TEXT_LIMIT) -> str:
        """The file as text; bytes that are no UTF-8 become U+FFFD."""
        return self.content(path, limit).decode("utf-8", "replace")

    def head(self, path: str, length: int, at: int = 0) -> bytes:
        """At most `length` (≤ 2 MiB) bytes from `at`; b"" when there is no such regular file."""
        return bytes(self.ask(self.appliance.g.pread, path, length, at, default=b"")) if self.is_file(path) else b""

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Sorted names in a folder that match; [] when there is none. Names that are not printable UTF-8 are left out."""
        found = self.stat(folder)
        if found is None or not stat.S_ISDIR(found.mode):
            return []
        if found.size > FOLDER_LIMIT:
            self.problem(f"the folder {folder} is too large to list ({format_bytes(found.size)})", where=folder)
            return []
        with tempfile.NamedTemporaryFile(prefix="tokvm-names-") as listing:
            self.ask(self.appliance.g.ls0, folder, listing.name, default=None)
            raw = listing.read(LISTING_LIMIT)
        names = [name.decode("utf-8", "replace") for name in raw.split(b"\0")[:NAMES_LIMIT] if name]
        return sorted(name for name in names if name.isprintable() and "\ufffd" not in name and fnmatch(name, pattern))

    def texts(self, folder: str, pattern: str, *, most: int = 200) -> dict[str, str]:
        """Name → text of the files in `folder` that match, the first `most` of them. They are short by nature."""
        return {name: self.text(f"{folder}/{name}", SHORT_LIMIT) for name in self.names(folder, pattern)[:most]}

    def problem(self, what: str, *, where: str = "", fix: str = "", severity: Severity = Severity.WARNING) -> None:
        self.problems.append(Finding(severity, readable(what), fix, readable(where)))


def word(text: Any, limit: int = 120) -> str:
    """A name or version of the guest's: one printable line, bounded."""
    return readable(str(text or "").strip(), limit=limit)
