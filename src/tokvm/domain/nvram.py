"""UEFI's variables with a boot entry for a loader: what a disk copy loses, because they lay in the old host's NVRAM.

    firmware volume  ZeroVector 16 | file system GUID 16 | length 8 | "_FVH" | attributes 4 | header length 2 | checksum 2 | …
    variable store   GUID 16 | size 4 (header and variables) | format 0x5A | state 0xFE | reserved 6
    variable         0x55AA | state 1 | reserved 1 | attributes 4 | monotonic count 8 | EFI_TIME 16 | key index 4
                     | name size 4 | data size 4 | vendor GUID 16 | name (UTF-16, NUL) | data | padding to 4
    free space       0xFF; what lies behind the store (the work space of writes that survive a power cut) is left alone

Little-endian. Flash can only clear bits: a variable is 0x3F when added, 0x3E while a new value is being written behind it (and
still counts when that never came), 0x3D or 0x3C when deleted.

    Boot####         attributes 4 (1: active) | length of the path 2 | description (UTF-16, NUL) | device path
    device path      file path node 04 04, length 2, name (UTF-16, NUL) | end 7F FF 04 00
    BootOrder        2 bytes for each entry, first to last

A path of a file alone is UEFI's short form: firmware looks for the file on every disk. OVMF first tries the disks in libvirt's
boot order for their \\EFI\\BOOT\\BOOTX64.EFI, then our entry (OVMF 2022.11). Specs: edk2, VariableFormat.h (MdeModulePkg) and
PiFirmwareVolume.h (MdePkg); UEFI 2.10, 3.1.2, 3.1.3 and 10.3.5.4.
"""

from __future__ import annotations

import fnmatch
import json
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokvm.core.errors import DomainError
from tokvm.core.units import MiB, round_up

DEFAULT_LOADER = "\\EFI\\BOOT\\BOOTX64.EFI"
MAX_VARIABLES = 16 * MiB
# Where libvirt looks for firmware too; a file of the same name further right goes before (QEMU, docs/interop/firmware.json).
DESCRIPTORS = (Path("/usr/share/qemu/firmware"), Path("/etc/qemu/firmware"))

_NVDATA = uuid.UUID("fff12b8d-7696-4c8b-a985-2747075b4f50").bytes_le
_AUTHENTICATED = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792").bytes_le
_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le
_VOLUME = struct.Struct("<16s16sQ4sIHH")
_STORE = struct.Struct("<16sIBB6x")
_VARIABLE = struct.Struct("<HBxIQ16sIII16s")
_START = 0x55AA
_ADDED, _IN_TRANSITION, _DELETED = 0x3F, 0x3E, 0xFD
# Non-volatile, seen by firmware and operating system.
_ATTRIBUTES = 7
_ACTIVE = 1
_END_OF_PATH = b"\x7f\xff\x04\x00"


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in the store; `file_offset` is where its header begins."""

    file_offset: int
    state: int
    vendor: bytes
    name: str
    data: bytes

    @property
    def is_global(self) -> bool:
        return self.vendor == _GLOBAL and self.state in (_ADDED, _IN_TRANSITION)


@dataclass(frozen=True, slots=True)
class VariableStore:
    """A whole file of variables. `free`: where the next variable goes; `end`: where the store ends."""

    content: bytes
    variables: tuple[Variable, ...]
    free: int
    end: int

    @classmethod
    def parse(cls, content: bytes, *, where: str) -> Self:
        """DomainError when this is no store of authenticated variables, as OVMF has them."""
        first, end = _bounds(content, where)
        variables = tuple(_variables(content, first, end, where))
        last = variables[-1] if variables else None
        free = first if last is None else _behind(content, last.file_offset)
        return cls(content, variables, free, end)

    def find(self, name: str) -> Variable | None:
        """The firmware's own variable of that name, its newest value."""
        named = [one for one in self.variables if one.is_global and one.name == name]
        return max(named, key=lambda one: one.state, default=None)

    def with_boot_entry(self, loader: str, description: str) -> bytes:
        """The file's bytes with a new first entry in the boot order. DomainError when there is no room for it."""
        order = self.find("BootOrder")
        taken = {one.name.upper() for one in self.variables if one.is_global}
        number = next(number for number in range(0x10000) if f"BOOT{number:04X}" not in taken)
        before = b"" if order is None else order.data
        added = _variable(f"Boot{number:04X}", load_option(loader, description))
        added += _variable("BootOrder", number.to_bytes(2, "little") + before)
        if self.free + len(added) > self.end:
            raise DomainError(f"no room for {len(added)} bytes of UEFI variables", fix="start from the firmware's own template")
        content = bytearray(self.content)
        content[self.free : self.free + len(added)] = added
        for one in self.variables:
            if one.is_global and one.name == "BootOrder":
                content[one.file_offset + 2] &= _DELETED
        return bytes(content)


def load_option(loader: str, description: str) -> bytes:
    """EFI_LOAD_OPTION for a file on whatever disk has it; `loader` as firmware writes it: `\\EFI\\debian\\shimx64.efi`."""
    if not loader.startswith("\\") or "/" in loader or "\0" in loader or len(loader) > 255:
        raise DomainError(f"{loader!r} is no path of a boot loader", fix="write it as UEFI does: \\EFI\\debian\\shimx64.efi")
    name = _text(loader)
    path = struct.pack("<BBH", 4, 4, 4 + len(name)) + name + _END_OF_PATH
    return struct.pack("<IH", _ACTIVE, len(path)) + _text(description[:64]) + path


def find_template(*, machine: str, secure_boot: bool, folders: tuple[Path, ...] = DESCRIPTORS) -> Path:
    """The empty variables of the firmware that libvirt chooses for such a domain: the first by name whose features fit."""
    found = {file.name: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))}
    for name in sorted(found):
        text = found[name].read_text()
        if text.strip() and (template := _template(json.loads(text), machine=machine, secure_boot=secure_boot)):
            return Path(template)
    kind = "with secure boot and its keys" if secure_boot else "without secure boot"
    raise DomainError(f"no UEFI {kind} is installed for {machine}", where=str(folders[0]), fix="install ovmf (RHEL: edk2-ovmf)")


def write_variables(path: Path, template: Path, *, loader: str | None = None, description: str = "tokvm") -> None:
    """Make `path` from `template`, with a boot entry for `loader` when one is given. A file already there is replaced."""
    content = _read(template)
    if loader is not None:
        content = VariableStore.parse(content, where=str(template)).with_boot_entry(loader, description)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.chmod(0o600)
        beside.replace(path)
    except OSError as failed:
        beside.unlink(missing_ok=True)
        raise DomainError(f"the UEFI variables cannot be written: {failed.strerror}", where=str(path)) from failed


def _read(template: Path) -> bytes:
    try:
        with template.open("rb") as file:
            content = file.read(MAX_VARIABLES + 1)
    except OSError as failed:
        raise DomainError(f"the UEFI variables cannot be read: {failed.strerror}", where=str(template)) from failed
    if len(content) > MAX_VARIABLES:
        raise DomainError(f"more than {MAX_VARIABLES} bytes of UEFI variables", where=str(template))
    return content


def _template(described: dict[str, Any], *, machine: str, secure_boot: bool) -> str | None:
    """nvram-template of a descriptor that fits; None of any other."""
    features = set(described.get("features", ()))
    mapping = described.get("mapping", {})
    template = mapping.get("nvram-template", {})
    machines = [
        pattern
        for target in described.get("targets", ())
        if target.get("architecture") == "x86_64"
        for pattern in target.get("machines", ())
    ]
    example = {"q35": "pc-q35-1.0", "pc": "pc-i440fx-1.0"}.get(machine, machine)
    fits = (
        "uefi" in described.get("interface-types", ())
        and mapping.get("device") == "flash"
        and template.get("format") == "raw"
        and any(fnmatch.fnmatchcase(example, pattern) for pattern in machines)
        and {"secure-boot", "enrolled-keys"} & features == ({"secure-boot", "enrolled-keys"} if secure_boot else set())
    )
    return str(template["filename"]) if fits else None


def _bounds(content: bytes, where: str) -> tuple[int, int]:
    """Where the first variable begins and the store ends."""
    damaged = DomainError("this is no file of UEFI variables", where=where, fix="give a copy of OVMF's *_VARS*.fd")
    if len(content) < _VOLUME.size:
        raise damaged
    _zero, kind, length, signature, _attributes, header, _checksum = _VOLUME.unpack_from(content)
    if kind != _NVDATA or signature != b"_FVH" or length > len(content) or header + _STORE.size > length:
        raise damaged
    store, size, formatted, state = _STORE.unpack_from(content, header)
    if store != _AUTHENTICATED or (formatted, state) != (0x5A, 0xFE) or not _STORE.size <= size <= length - header:
        raise damaged
    return header + _STORE.size, header + size


def _variables(content: bytes, first: int, end: int, where: str) -> Iterator[Variable]:
    at = first
    while at + _VARIABLE.size <= end and content[at : at + 2] != b"\xff\xff":
        start, state, _attributes, _count, _time, _key, name_size, data_size, vendor = _VARIABLE.unpack_from(content, at)
        name_at = at + _VARIABLE.size
        data_at = name_at + name_size
        if start != _START or data_at + data_size > end:
            raise DomainError("a damaged UEFI variable", where=f"{where}@{at:#x}", fix="start from the firmware's own template")
        name = content[name_at:data_at].decode("utf-16-le", errors="replace").rstrip("\0")
        yield Variable(at, state, vendor, name, content[data_at : data_at + data_size])
        at = _behind(content, at)


def _behind(content: bytes, at: int) -> int:
    fields = _VARIABLE.unpack_from(content, at)
    return round_up(at + _VARIABLE.size + fields[6] + fields[7], 4)


def _variable(name: str, data: bytes) -> bytes:
    raw = _text(name)
    header = _VARIABLE.pack(_START, _ADDED, _ATTRIBUTES, 0, bytes(16), 0, len(raw), len(data), _GLOBAL)
    whole = header + raw + data
    return whole.ljust(round_up(len(whole), 4), b"\xff")


def _text(text: str) -> bytes:
    return text.encode("utf-16-le", errors="replace") + b"\0\0"
