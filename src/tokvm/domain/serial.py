"""What a guest's serial port says: that somebody may log in, or why nobody ever will.

The file is written by QEMU and bounded here: only what is new is read, a little at a time, and it is cut to nothing when it
gets long. Lines may end in CR LF and hold terminal escapes (GRUB and UEFI draw with them).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.text import readable
from tokvm.core.units import KiB, MiB

# The kernel may have something to say behind a prompt, on the same line.
LOGIN = r"login: *(\[ *\d+\.\d{6}\].*)?$"
# What is looked at in one go; a guest cannot fill more than this between two looks without something being skipped.
READ_AT_ONCE = 256 * KiB
TAIL = 16 * KiB
LONGEST_LINE = 512
FILE_LIMIT = 16 * MiB

_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[0-9=>@-Z\\-_c])")
# A jump to another place of the screen begins something new, as a line's end does.
_JUMP = re.compile(rb"\x1b\[\d*(?:;\d*)?[Hf]")
_ENDS = re.compile(r"[\r\n]+")
# SeaBIOS' last words may come without their line's end; the guest's first ones then follow on the same line.
_BIOS_GOES = re.compile(r"^Booting from [A-Z][\w/ ]*\.{2,3}(?=[^.\r\n])", re.MULTILINE)

FAILURES = (
    (r"ALERT! .* does not exist|Gave up waiting for root (file system )?device", "it finds no root disk"),
    (r"\(initramfs\) *$", "it stopped in the initramfs' shell"),
    (r"Kernel panic - not syncing", "its kernel panicked"),
    (r"Entering emergency mode\.|^dracut:/# *$", "it stopped in dracut's emergency shell"),
    (r"You are in (emergency|rescue) mode|Give root password for maintenance", "it stopped in emergency mode"),
    (r"^(grub rescue>|Entering rescue mode\.\.\.)", "GRUB does not find its modules"),
    (r"^grub> *$", "GRUB does not find its configuration"),
    # Not every error of GRUB ends the boot: a missing font or video mode does not.
    (r"^error: .*(vmlinuz|initrd|initramfs).* not found|you need to load the kernel first", "GRUB does not find the kernel"),
    (r"Failed to boot both default and fallback entries", "GRUB does not find the kernel"),
    (r"UEFI Interactive Shell|^Shell> *$", "UEFI found nothing to boot but its shell"),
    (r'BdsDxe: starting Boot\w+ "EFI Internal Shell"', "UEFI found nothing to boot but its shell"),
    (r"BdsDxe: No bootable option or device was found", "UEFI found nothing to boot"),
    (r">>Start (PXE|HTTP Boot) over IPv[46]", "UEFI found nothing to boot and turned to the network"),
    (r"No bootable device", "the BIOS found nothing to boot"),
)
_FAILURES = tuple((re.compile(pattern), why) for pattern, why in FAILURES)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a guest will not come up, and the line that said so."""

    why: str
    line: str

    def __str__(self) -> str:
        return f"{self.why}: {self.line}"


def find_failure(line: str) -> Failure | None:
    """The known way of not booting that this line tells of."""
    return next((Failure(why, readable(line.strip())) for pattern, why in _FAILURES if pattern.search(line)), None)


def _plain(data: bytes) -> bytes:
    """Without terminal escapes; one that is not complete yet stays."""
    return _ESCAPE.sub(b"", _JUMP.sub(b"\n", data))


class SerialLog:
    """A growing file of text, read to its end again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._half = b""
        self._tail = b""

    def new_lines(self) -> list[str]:
        """The lines since the last call, in order. An unfinished one (a prompt) counts once nothing more comes: `Last login:`
        may be read before the rest of its line."""
        new = self._read()
        data = _plain(self._half + new)
        whole, end, half = data.rpartition(b"\n") if new else (data, b"", b"")
        self._half = half[-LONGEST_LINE:] if new else data
        text = _BIOS_GOES.sub(r"\g<0>\n", (whole + end).decode(errors="replace"))
        return [line[:LONGEST_LINE] for line in _ENDS.split(text) if line.strip()]

    @property
    def tail(self) -> str:
        """The end of what was read, for people: printable, line by line."""
        lines = _ENDS.split(_plain(self._tail).decode(errors="replace"))
        return "\n".join(readable(line, limit=LONGEST_LINE) for line in lines).strip()

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._at:  # cut by us, or put aside by virtlogd
                    self._at = 0
                self._at = max(self._at, size - READ_AT_ONCE)
                file.seek(self._at)
                data = file.read(READ_AT_ONCE)
        except FileNotFoundError:
            return b""
        self._at += len(data)
        self._tail = (self._tail + data)[-TAIL:]
        if self._at > FILE_LIMIT:
            os.truncate(self.path, 0)
            self._at = 0
        return data
