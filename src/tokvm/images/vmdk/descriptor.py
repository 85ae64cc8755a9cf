"""The VMDK descriptor: a text that says what the disk is and which extent files it is made of.

    # Disk DescriptorFile                            LF or CRLF; a file of its own, or embedded in a KDMV extent, NUL-padded
    version=1
    encoding="UTF-8"                                 of the names in it
    CID=38e5266f                                     changes at the first write after an open
    parentCID=ffffffff                               none; else the CID that the parent has
    createType="twoGbMaxExtentSparse"
    parentFileNameHint="base.vmdk"                   shown, never followed
    RW 4192256 SPARSE "disk-s001.vmdk"               access, sectors, type, bare file name
    RW 4192256 FLAT "disk-f002.vmdk" 128             FLAT: and the sector of the file where it begins; VMFS: from the start
    RW 63 ZERO                                       zeros, no file
    ddb.adapterType = "lsilogic"                     the disk data base: key = "value"

Virtual size is the sum of the extents. An extent is opened by a bare name out of the files that the caller listed, or not at
all: descriptors that name host files, devices or URLs are how images attack importers (CVE-2022-47951).
Specification: VMware, "Virtual Disk Format 5.0" (2011). VirtualBox children bear parentCID=ffffffff and no hint; their parent
is in ddb.uuid.parent alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from uuid import UUID

from tokvm.core.errors import ImageError
from tokvm.core.text import readable
from tokvm.core.units import SECTOR, KiB, MiB, TiB
from tokvm.images.base import UNKNOWN_PARENT, Linkage, ReadAt, file_name
from tokvm.images.fields import bad_field, read_exact

MAGIC = b"# disk descriptorfile"  # in any case
MAX_DESCRIPTOR = 1 * MiB
MAX_SIZE = 62 * TiB  # vSphere's largest disk
MAX_EXTENTS = 4096  # a descriptor of 2 GB extents for the 2 TB that hosted products reach has about a thousand
NO_PARENT = 0xFFFFFFFF
_MAX_LINE = 4 * KiB
_MAX_NAME = 255


class ExtentType(Enum):
    FLAT = "FLAT"
    VMFS = "VMFS"
    SPARSE = "SPARSE"
    VMFSSPARSE = "VMFSSPARSE"
    SESPARSE = "SESPARSE"
    ZERO = "ZERO"


# Known, and no file with the disk's bytes: why, and what to do about it.
_NOT_READ = {
    "VMFSRDM": "a raw device mapping: the bytes are on a LUN, not in a file",
    "VMFSRDMP": "a raw device mapping: the bytes are on a LUN, not in a file",
    "VMFSRAW": "a raw device mapping: the bytes are on a LUN, not in a file",
    "VMFSPASSTHROUGHRAWDEVICEMAP": "a raw device mapping: the bytes are on a LUN, not in a file",
    "VSANSPARSE": "a vSAN object, which has no file format of its own",
}

_EXTENT = re.compile(
    r'(RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,19})[ \t]+([A-Z0-9]{1,40})(?:[ \t]+"(.+)"(?:[ \t]+([0-9]{1,19}))?([ \t]+.+)?)?'
)
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_.:-]{0,127})[ \t]*=[ \t]*(.*)")
_ENCODING = re.compile(rb'^[ \t]*encoding[ \t]*=[ \t]*"?([A-Za-z0-9_.-]{1,32})"?[ \t]*\r?$', re.IGNORECASE | re.MULTILINE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_CID = re.compile(r"[0-9a-fA-F]{1,8}")

# By VMware's names. Others are read as UTF-8 where they are that, and as Latin-1, which reads anything, where not.
_ENCODINGS = {
    "utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1", "windows-1250": "cp1250",
    "windows-1251": "cp1251", "windows-1252": "cp1252", "windows-1253": "cp1253", "windows-1254": "cp1254",
    "windows-1255": "cp1255", "windows-1256": "cp1256", "windows-1257": "cp1257", "windows-1258": "cp1258",
    "gbk": "gbk", "gb18030": "gb18030", "gb2312": "gb2312", "windows-936": "cp936", "big5": "big5", "windows-950": "cp950",
    "shift_jis": "cp932", "windows-932": "cp932", "windows-31j": "cp932", "euc-jp": "euc_jp", "euc-kr": "euc_kr",
    "windows-949": "cp949",
}  # fmt: skip

# Said twice with two meanings, each of these makes another disk of it.
_ONCE = frozenset({"cid", "parentcid", "createtype", "parentfilenamehint", "encoding", "ddb.uuid.image", "ddb.uuid.parent"})
_DELTA_TYPES = frozenset({"vmfssparse", "sesparse"})
_NULL_UUID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """sectors: its part of the disk; first_sector: where it begins in its file; number: its line. ZERO: no name."""

    access: str
    sectors: int
    type: ExtentType
    name: str = ""
    first_sector: int = 0
    number: int = 0

    @property
    def size(self) -> int:
        return self.sectors * SECTOR


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor that was checked. values: everything it says, by lower-case key."""

    name: str
    cid: int
    parent_cid: int
    create_type: str
    extents: tuple[ExtentLine, ...]
    values: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(extent.size for extent in self.extents)

    @property
    def parent_hint(self) -> str:
        return self.values.get("parentfilenamehint", "")

    @property
    def extent_names(self) -> tuple[str, ...]:
        """The files it wants, each once."""
        return tuple(dict.fromkeys(extent.name for extent in self.extents if extent.name))

    @property
    def linkage(self) -> Linkage:
        """By CID, and by VirtualBox's uuid. A CID is no unique id: ESX makes a delta with its parent's, and writes another only
        when the file is closed. So the parent's file name is looked at, too."""
        own, parent = self._uuid("ddb.uuid.image"), self._uuid("ddb.uuid.parent")
        ids = (f"cid-{self.cid:08x}", *((f"uuid-{own}",) if own else ()))
        if self.parent_cid != NO_PARENT:
            return Linkage(ids, (f"cid-{self.parent_cid:08x}",), unique=False, parent_file=file_name(self.parent_hint))
        if parent:
            return Linkage(ids, (f"uuid-{parent}",), unique=False, parent_file=file_name(self.parent_hint))
        return Linkage(ids, (UNKNOWN_PARENT,) if self.parent_hint else (), unique=False)

    def _uuid(self, key: str) -> UUID | None:
        found = _uuid_of(self.values.get(key, ""))
        return None if found == _NULL_UUID else found


def is_descriptor(start: bytes | bytearray) -> bool:
    return bytes(start[: len(MAGIC)]).lower() == MAGIC


def extent_names(file: ReadAt) -> tuple[str, ...]:
    """The extent files that a descriptor file wants beside it, before any of them is opened; () when `file` is no such one."""
    if not is_descriptor(read_exact(file, 0, min(len(MAGIC), file.size))):
        return ()
    return read_descriptor(file).extent_names


def read_descriptor(file: ReadAt) -> Descriptor:
    """The descriptor in a file of its own."""
    if file.size > MAX_DESCRIPTOR:
        raise bad_field(file.name, 0, "descriptor size", file.size, f"at most {MAX_DESCRIPTOR} bytes")
    return parse_descriptor(bytes(read_exact(file, 0, file.size)), file.name)


def parse_descriptor(raw: bytes, name: str, *, offset: int = 0) -> Descriptor:
    """Check every line of a descriptor, or ImageError. `offset`: where it begins in the file, for messages."""
    if len(raw) > MAX_DESCRIPTOR:
        raise bad_field(name, offset, "descriptor size", len(raw), f"at most {MAX_DESCRIPTOR} bytes")
    if not is_descriptor(raw):
        raise bad_field(name, offset, "descriptor's first line", repr(raw[:24])[1:], "# Disk DescriptorFile")
    text, warnings = _decode(raw.partition(b"\0")[0])
    return _Parser(name, offset, warnings).parse(text)


def _decode(raw: bytes) -> tuple[str, list[str]]:
    stated = _ENCODING.search(raw)
    label = stated[1].decode("ascii") if stated else "UTF-8"
    codec = _ENCODINGS.get(label.lower())
    for candidate in filter(None, (codec, "utf-8")):
        try:
            return raw.decode(candidate), [] if candidate == codec else [f"the descriptor's encoding {label} is not known"]
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1"), [f"the descriptor is not in its encoding {label}; names beyond ASCII may be shown wrongly"]


class _Parser:
    def __init__(self, name: str, offset: int, warnings: list[str]) -> None:
        self._name = name
        self._offset = offset
        self._warnings = warnings
        self._values: dict[str, str] = {}
        self._extents: list[ExtentLine] = []

    def parse(self, text: str) -> Descriptor:
        for number, line in enumerate(text.split("\n"), 1):
            self._line(number, line.strip(" \t\r"))
        values = self._values
        self._refuse_encrypted()
        self._check_extents()
        for key in ("version", "ddb.uuid.image", "ddb.uuid.parent"):
            self._check_value(key)
        found = Descriptor(
            self._name, self._cid("CID"), self._cid("parentCID"), values.get("createtype", ""), tuple(self._extents), values
        )
        self._warn(found)
        return replace(found, warnings=tuple(self._warnings))

    def _bad(self, number: int, field: str, read: object, allowed: str, *, fix: str = "") -> ImageError:
        text = readable(str(read), limit=120)
        where = f"descriptor line {number}: {field}" if number else f"descriptor: {field}"
        return bad_field(self._name, self._offset, where, text, allowed, **({"fix": fix} if fix else {}))

    def _line(self, number: int, line: str) -> None:
        if len(line) > _MAX_LINE:
            raise self._bad(number, "length", len(line), f"at most {_MAX_LINE} characters")
        if not line or line.startswith("#"):
            return
        if _CONTROL.search(line):
            raise self._bad(number, "text", repr(line), "no control characters")
        extent, pair = _EXTENT.fullmatch(line), _PAIR.fullmatch(line)
        if extent is not None:
            self._extent(number, extent)
        elif pair is not None:
            self._pair(number, pair[1].lower(), pair[2])
        else:
            raise self._bad(number, "text", repr(line), 'key=value, or RW|RDONLY|NOACCESS sectors TYPE "file" [offset]')

    def _pair(self, number: int, key: str, value: str) -> None:
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if key in _ONCE and self._values.get(key, value) != value:
            raise self._bad(number, key, repr(value), f"{self._values[key]!r}, as it was said before")
        self._values[key] = value

    def _extent(self, number: int, match: re.Match[str]) -> None:
        access, sectors, kind, name, first, rest = match.groups()
        if kind in _NOT_READ:
            fix = "copy such a disk from inside the guest, or move it to a datastore as a virtual disk first"
            raise self._bad(number, "extent type", f"{kind}, {_NOT_READ[kind]}", _types(), fix=fix)
        if kind not in ExtentType.__members__:
            raise self._bad(number, "extent type", kind, _types())
        if access == "NOACCESS":
            raise self._bad(number, "extent access", access, "RW or RDONLY")
        if int(sectors) == 0:
            raise self._bad(number, "extent sectors", 0, "at least 1")
        if len(self._extents) == MAX_EXTENTS:
            raise self._bad(number, "number of extents", f"more than {MAX_EXTENTS}", f"at most {MAX_EXTENTS}")
        type_ = ExtentType[kind]
        self._check_place(number, type_, name, first, rest)
        self._extents.append(ExtentLine(access, int(sectors), type_, name or "", int(first or 0), number))

    def _check_place(self, number: int, type_: ExtentType, name: str | None, first: str | None, rest: str | None) -> None:
        """What may stand behind the type."""
        if type_ is ExtentType.ZERO:
            if name is not None:
                raise self._bad(number, "file of a ZERO extent", repr(name), "none")
            return
        if name is None:
            raise self._bad(number, f"file of the {type_.value} extent", "missing", "a file name in double quotes")
        _check_name(name, self._bad(number, "extent file name", repr(name), "a bare file name, in the same directory"))
        if type_ is ExtentType.FLAT:
            if first is None:
                raise self._bad(number, "offset of the FLAT extent", "missing", "the sector of its file where it begins")
            if int(first) * SECTOR > 1 << 62:
                raise self._bad(number, "offset of the FLAT extent", first, "a sector inside a file")
        elif first is not None and int(first) != 0:
            raise self._bad(number, f"offset of the {type_.value} extent", first, "none: it begins where its file does")
        if rest is not None:
            raise self._bad(number, "text behind the extent", repr(rest), "nothing (partitions of devices are not read)")

    def _check_extents(self) -> None:
        if not self._extents:
            raise self._bad(0, "number of extents", 0, f"1 to {MAX_EXTENTS}")
        size = sum(extent.size for extent in self._extents)
        if size > MAX_SIZE:
            raise self._bad(0, "sum of the extents' sectors", size // SECTOR, f"at most {MAX_SIZE // SECTOR} (62 TiB)")
        self._check_shared()

    def _check_shared(self) -> None:
        """A file may be given twice only where both are FLAT, and not the same bytes of it."""
        last: ExtentLine | None = None
        for extent in sorted((e for e in self._extents if e.name), key=lambda e: (e.name, e.first_sector)):
            if last is not None and last.name == extent.name:
                flat = last.type is extent.type is ExtentType.FLAT
                if not flat or last.first_sector + last.sectors > extent.first_sector:
                    raise self._bad(extent.number, "extent file", repr(extent.name), "no bytes that another extent has, too")
            last = extent

    def _refuse_encrypted(self) -> None:
        values = self._values
        keys = [key for key in values if any(part.startswith("encrypt") for part in key.split("."))]
        if keys or "crypt" in values.get("ddb.iofilters", "").lower():
            raise self._bad(
                0, readable(keys[0] if keys else "ddb.iofilters"), "set: the disk is encrypted", "a disk that is not encrypted",
                fix="decrypt it first: give the VM a storage policy without encryption",
            )  # fmt: skip

    def _check_value(self, key: str) -> None:
        value = self._values.get(key)
        if key == "version":
            if value is not None and not re.fullmatch(r"[0-9]{1,3}", value):
                raise self._bad(0, key, repr(value), "a number")
        elif value and _uuid_of(value) is None:
            raise self._bad(0, key, repr(value), "a UUID")

    def _cid(self, key: str) -> int:
        value = self._values.get(key.lower())
        if value is None or not _CID.fullmatch(value):
            raise self._bad(0, key, "missing" if value is None else repr(value), "1 to 8 hexadecimal digits")
        return int(value, 16)

    def _warn(self, found: Descriptor) -> None:
        parents = found.linkage.parents
        if parents == (UNKNOWN_PARENT,):
            hint = readable(found.parent_hint, limit=120)
            self._warnings.append(f"it names a parent ({hint}) but no id of it, so the parent cannot be checked")
        if not parents and found.create_type.lower() in _DELTA_TYPES:
            self._warnings.append(f"a {readable(found.create_type, limit=40)} disk without a parent: unusual")
        if found.values.get("isnativesnapshot", "no").lower() == "yes":
            self._warnings.append("it is a native snapshot: the storage array was to keep its content")


def _types() -> str:
    return ", ".join(ExtentType.__members__)


def _check_name(name: str, error: ImageError) -> None:
    """A bare name, or `error`: nothing that leads elsewhere on any system, and no protocol that some tool would follow."""
    wrong = name in (".", "..") or _CONTROL.search(name) or any(c in "/\\\t" for c in name)
    if wrong or _URL.match(name) or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME:
        raise error


def _uuid_of(text: str) -> UUID | None:
    """`UUID()` alone takes braces, prefixes and dashes anywhere."""
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text.strip(" \t{}")):
        return None
    return UUID(text.strip(" \t{}"))
