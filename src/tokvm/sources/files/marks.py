"""Marks on image files: which layer was the top when a pass was made.

    user.tokvm.mark.tokvm-<migration>-<n>      an extended attribute of the layer's file, empty

The bytes of the image and its modification time stay as they are. A file system without extended attributes (NFS, FAT), or a
file that we may not change, bears no mark: then only this process knows, and a later command copies the base anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re

from tokvm.images.base import ReadAt

log = logging.getLogger(__name__)

_PREFIX = "user.tokvm.mark."
_NUMBER = re.compile(r"-([0-9]{1,18})\Z")


def of(file: ReadAt) -> list[str]:
    """The marks of a file."""
    try:
        names = os.listxattr(_fd(file))
    except OSError:
        return []
    return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]


def add(file: ReadAt, mark: str) -> None:
    try:
        os.setxattr(_fd(file), _PREFIX + mark, b"")
    except OSError as exc:
        log.warning("%s cannot bear a mark (%s): the next command will copy this disk anew", file.name, exc.strerror)


def remove(file: ReadAt, mark: str) -> None:
    with contextlib.suppress(OSError):  # it never had one
        os.removexattr(_fd(file), _PREFIX + mark)


def order(mark: str) -> tuple[int, str]:
    """Marks in the order they were given: by the number at their end."""
    match = _NUMBER.search(mark)
    return (int(match[1]) if match else -1, mark)


def _fd(file: ReadAt) -> int:
    fileno = getattr(file, "fileno", None)
    if fileno is None:
        raise OSError("it is no local file")
    return int(fileno())
