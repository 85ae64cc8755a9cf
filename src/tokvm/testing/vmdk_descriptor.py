"""Writes VMDK descriptors: the text that names a disk's extents, its content (CID) and its parent's.

    # Disk DescriptorFile
    version=1 | encoding | CID | parentCID | createType | parentFileNameHint (children)
    # Extent description
    RW <sectors> <kind> "<file>" [offset in the file, sectors: FLAT has one, VMFS has none]
    # The Disk Data Base
    ddb.* = "…"

Disk layout is VMware's, "Virtual Disk Format 5.0" (2011); the lines and their order are those that ESXi 6 and later write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.core.units import SECTOR

NO_PARENT = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Identity:
    """Which content this is (CID) and which content it lies upon. A disk with parent_cid NO_PARENT is a base."""

    cid: int = 0x0BAD_CAFE
    parent_cid: int = NO_PARENT
    parent_hint: str = ""

    @property
    def has_parent(self) -> bool:
        return self.parent_cid != NO_PARENT


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One line of the extent description. `kind` is FLAT, VMFS, SPARSE, VMFSSPARSE, SESPARSE or ZERO (which has no name)."""

    length: int
    kind: str
    name: str = ""
    file_offset: int | None = None
    access: str = "RW"

    def text(self) -> str:
        words = [self.access, str(self.length // SECTOR), self.kind]
        if self.name:
            words.append(f'"{self.name}"')
        if self.file_offset is not None:
            words.append(str(self.file_offset // SECTOR))
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the text is written: what differs between the products, and what a test wants to differ."""

    ddb: Mapping[str, str] | None = None
    encoding: str = "UTF-8"
    newline: str = "\n"
    version: int = 1
    header_lines: Sequence[str] = field(default=())


ESXI = Dialect()


def write_descriptor(
    create_type: str, extents: Sequence[ExtentLine], *, identity: Identity | None = None, dialect: Dialect = ESXI
) -> bytes:
    """The descriptor's bytes. The disk's size is the sum of the extents.

    Dialect.ddb None: what ESXi writes (geometry and uuid in a base, the content id alone in a child). header_lines: any more
    lines for the head, such as `changeTrackPath="disk-ctk.vmdk"`.
    """
    identity = identity or Identity()
    ddb = dialect.ddb
    if ddb is None:
        ddb = default_ddb(identity, sum(extent.length for extent in extents))
    head = [
        "# Disk DescriptorFile", f"version={dialect.version}", f'encoding="{dialect.encoding}"', f"CID={identity.cid:08x}",
        f"parentCID={identity.parent_cid:08x}", f'createType="{create_type}"',
    ]  # fmt: skip
    if identity.parent_hint:
        head.append(f'parentFileNameHint="{identity.parent_hint}"')
    body = ["# Extent description", *(extent.text() for extent in extents), "", "# The Disk Data Base ", "#DDB", ""]
    lines = [*head, *dialect.header_lines, *body, *(f'{key} = "{value}"' for key, value in ddb.items()), ""]
    return dialect.newline.join(lines).encode(dialect.encoding)


def default_ddb(identity: Identity, size: int) -> dict[str, str]:
    """The disk data base as ESXi writes it. Ids follow from the CID, so that the same disk is the same file."""
    digest = hashlib.sha256(identity.cid.to_bytes(4, "big")).digest()
    content_id = {"ddb.longContentID": f"{digest[:12].hex()}{identity.cid:08x}"}
    if identity.has_parent:
        return content_id
    uuid = bytes((0x60, 0x00, 0xC2, 0x90 | digest[12] & 15)) + digest[13:25]
    heads, sectors = (255, 63) if size >= 1 << 30 else (64, 32)
    return {
        "ddb.adapterType": "lsilogic",
        "ddb.geometry.cylinders": str(min(size // SECTOR // heads // sectors, 65535)),
        "ddb.geometry.heads": str(heads),
        "ddb.geometry.sectors": str(sectors),
        "ddb.uuid": f"{uuid[:8].hex(' ')}-{uuid[8:].hex(' ')}",
        "ddb.virtualHWVersion": "14",
    } | content_id


def extent_path(path: Path, suffix: str) -> Path:
    """`disk-flat.vmdk` beside `disk.vmdk`."""
    return path.with_name(f"{path.stem}-{suffix}.vmdk")
