"""One module file: unpacked as the kernel loads it, and checked to be this kernel's. Its bytes, with their signature, stay."""

from __future__ import annotations

import struct

from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.packing import Stream, packing_at
from tokvm.guest.initrd.stream import Budget, Unpacked

MODULE_LIMIT = 16 * MiB
_ELF = b"\x7fELF"
_BIG_ENDIAN = 2
# e_machine by libguestfs' names of architectures; ELF specification, <elf.h>.
_MACHINES = {"x86_64": 62, "i386": 3, "aarch64": 183, "ppc64le": 21, "ppc64": 21, "s390x": 22, "riscv64": 243}


def unpack(data: bytes, where: str) -> bytes:
    """A module file's ELF; GuestError when it is damaged or more than 16 MiB."""
    if data.startswith(_ELF):
        return data
    view = memoryview(data)
    pieces = Stream(view, 0, packing_at(view, 0, where), where).pieces()
    source = Unpacked(pieces, Budget(unpacked=MODULE_LIMIT), where)
    out = bytearray()
    while source.more():
        out += source.read_some()
    return bytes(out)


def check(elf: bytes, *, version: str, arch: str, where: str) -> None:
    """GuestError when a module is not for this kernel (vermagic) or not for this CPU: the kernel would refuse it."""
    if not elf.startswith(_ELF) or len(elf) < 20:
        raise GuestError("no ELF file", where=where, fix="install the kernel's package in the guest again")
    (machine,) = struct.unpack_from(">H" if elf[5] == _BIG_ENDIAN else "<H", elf, 18)
    if arch in _MACHINES and machine != _MACHINES[arch]:
        raise GuestError(f"a module for machine {machine}, in a guest of {arch}", where=where)
    if b"vermagic=" + version.encode() + b" " not in elf:
        found = elf.partition(b"vermagic=")[2][:64].split(b"\0")[0].decode(errors="replace")
        raise GuestError(
            f"a module of another kernel ({readable(found) or 'it does not say which'}), not {version}",
            where=where,
            fix="install the kernel's package in the guest again, or run depmod there",
        )
