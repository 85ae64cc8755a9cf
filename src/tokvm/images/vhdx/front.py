"""Which of the two headers and of the two region tables is to be believed?

    headers         both intact: the one with the higher sequence number; equal numbers only if they say the same
                    one damaged (it was being written when the host lost power): the other, with a warning
    region tables   the first; when it is damaged the second, with a warning

Damaged is a wrong signature or checksum. An intact copy that asks for something refused is refused: its writer meant it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID

from tokvm.core.errors import ImageError
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vhdx.structs import (
    CREATOR_OFFSET,
    CREATOR_SIZE,
    FILE_SIGNATURE,
    FRONT,
    HEADER_OFFSETS,
    HEADER_SIGNATURE,
    HEADER_SIZE,
    MAX_FILE,
    REGION_OFFSETS,
    REGION_SIGNATURE,
    REGION_TABLE_SIZE,
    Header,
    Region,
    Structure,
    is_intact,
    parse_creator,
    parse_regions,
)


@dataclass(frozen=True, slots=True)
class FoundHeader:
    header: Header
    offset: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundRegions:
    regions: dict[UUID, Region]
    offset: int
    warnings: tuple[str, ...] = ()


def read_creator(file: ReadAt) -> str:
    """Check that this is a VHDX at all, and say what wrote it."""
    if not FRONT <= file.size <= MAX_FILE:
        raise bad_field(file.name, 0, "VHDX file size", file.size, f"{FRONT} to {MAX_FILE}")
    raw = read_exact(file, 0, CREATOR_OFFSET + CREATOR_SIZE)
    if raw[:8] != FILE_SIGNATURE:
        raise bad_field(file.name, 0, "VHDX file signature", bytes(raw[:8]), FILE_SIGNATURE.decode())
    return parse_creator(raw[CREATOR_OFFSET:])


def find_header(file: ReadAt) -> FoundHeader:
    """The current header. Its log lies inside the file."""
    good: list[FoundHeader] = []
    damage: list[ImageError] = []
    for offset in HEADER_OFFSETS:
        raw = read_exact(file, offset, HEADER_SIZE)
        try:
            good.append(FoundHeader(Header.parse(raw, name=file.name, offset=offset), offset))
        except ImageError as exc:
            if is_intact(raw, HEADER_SIGNATURE):
                raise
            damage.append(exc)
    if not good:
        raise damage[0]
    found = _current(file.name, good)
    found.header.check_log(file.size, name=file.name, offset=found.offset)
    warnings = tuple(f"one of the two headers is damaged ({exc.what}); the one at {found.offset:#x} is used" for exc in damage)
    return FoundHeader(found.header, found.offset, warnings)


def _current(name: str, good: list[FoundHeader]) -> FoundHeader:
    current = max(good, key=lambda found: found.header.sequence)
    for other in good:
        if other.header.sequence == current.header.sequence and other.header != current.header:
            read = f"{other.header.sequence} in both headers, which differ"
            raise bad_field(name, other.offset + 8, "header sequence number", read, "different numbers, or equal headers")
    return current


def find_regions(file: ReadAt, log: Structure) -> FoundRegions:
    """The regions, none over another, the log or the headers. `file`: as it is after the log's replay."""
    offset, warnings = REGION_OFFSETS[0], tuple[str, ...]()
    raw = read_exact(file, offset, REGION_TABLE_SIZE)
    if not is_intact(raw, REGION_SIGNATURE):
        second = read_exact(file, REGION_OFFSETS[1], REGION_TABLE_SIZE)
        if is_intact(second, REGION_SIGNATURE):
            raw, offset = second, REGION_OFFSETS[1]
            warnings = ("the first region table is damaged; the second one is used",)
    regions = parse_regions(raw, name=file.name, offset=offset, limit=file.size)
    structures = [region.structure for region in regions.values()]
    check_apart([*structures, log] if log[1] < log[2] else structures, file.name)
    return FoundRegions(regions, offset, warnings)


def check_apart(structures: Iterable[Structure], name: str) -> None:
    for (what, at, end), (other, other_at, _) in pairwise(sorted(structures, key=lambda found: found[1:])):
        if other_at < end:
            allowed = f"a place outside the {what} at {at:#x} to {end:#x}"
            raise bad_field(name, other_at, f"{other} offset", f"{other_at:#x}", allowed)
