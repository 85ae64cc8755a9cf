"""/etc/fstab: which lines name a device by its place on the bus (`/dev/sda1`), a name that changes on another bus."""

from __future__ import annotations

import re
from dataclasses import dataclass

LINES_LIMIT = 2000
_BY_NAME = re.compile(r"/dev/(?:sd[a-z]{1,3}|hd[a-z]|xvd[a-z]{1,3}|nvme\d+n\d+)\d*(?:p\d+)?")
_ESCAPE = re.compile(r"\\([0-3][0-7]{2})")


@dataclass(frozen=True, slots=True)
class FstabLine:
    """fstab(5)'s first four fields, `\\040` and its like undone."""

    spec: str
    point: str
    kind: str
    options: str = ""

    @property
    def by_name(self) -> bool:
        return _BY_NAME.fullmatch(self.spec) is not None


def parse_fstab(text: str) -> tuple[FstabLine, ...]:
    """Lines that say at least what, where and of which kind; all others are left out, as mount(8) does."""
    found = []
    for line in text.splitlines()[:LINES_LIMIT]:
        fields = line.split(None, 5)
        if len(fields) >= 3 and not fields[0].startswith("#"):
            found.append(FstabLine(*(_plain(one) for one in fields[:4])))
    return tuple(found)


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)[:1024]
