"""VMDK, all kinds, as a Layer.

    a descriptor      + the extent files that it names, out of those that the caller listed
    KDMV              a whole disk: its descriptor is embedded
    COWD, seSparse    an extent alone, without its descriptor: a child that does not say whose

    guest   |---- extent 0 ----|---- extent 1 ----|-- 2 --|      each with a map of its own: `parts`, `grains`
    file    |-- extent files and descriptor, joined ------|      `images.joined`

Specification: VMware, "Virtual Disk Format 5.0" (2011); each kind's own is in its module: `descriptor`, `sparse`, `inflate`,
`cowd`, `sesparse`.
"""

from __future__ import annotations

import logging
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate

import numpy as np

from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentMap
from tokvm.core.text import readable
from tokvm.images.base import UNKNOWN_PARENT, ExtentFiles, Linkage, MappedLayer, ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.joined import JoinedFile
from tokvm.images.vmdk import cowd, header, sesparse
from tokvm.images.vmdk.cowd import open_cowd
from tokvm.images.vmdk.descriptor import Descriptor, ExtentLine, ExtentType, is_descriptor, read_descriptor
from tokvm.images.vmdk.grains import PartMap
from tokvm.images.vmdk.parts import FlatPart, Part, ZeroPart
from tokvm.images.vmdk.sesparse import open_sesparse
from tokvm.images.vmdk.sparse import open_sparse, read_sparse

log = logging.getLogger(__name__)

_SESPARSE_MAGIC = struct.pack("<Q", sesparse.MAGIC)


class VmdkLayer(MappedLayer):
    """A parsed VMDK. Implements `images.base.Layer`; made by `open_vmdk`. places: where each part's file is in `file`."""

    format = "vmdk"

    def __init__(
        self,
        name: str,
        file: ReadAt,
        parts: Sequence[Part],
        places: Sequence[int],
        *,
        descriptor: Descriptor | None,
        linkage: Linkage,
        warnings: tuple[str, ...],
    ) -> None:
        super().__init__(file, size=sum(part.size for part in parts), linkage=linkage, warnings=warnings)
        self._name = name
        self.descriptor = descriptor
        self.parts = tuple(parts)
        self._places = tuple(places)
        self._starts = list(accumulate((part.size for part in parts[:-1]), initial=0))

    @property
    def name(self) -> str:
        return self._name

    def walker(self) -> Callable[[int, int, int | None], ExtentMap]:
        maps = _PartMaps(self.parts)
        return lambda start, stop, max_rows: self._map(maps, start, stop, max_rows)

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        return self._map(lambda index: self.parts[index].map_part, start, stop, max_rows)

    def _map(self, maps: Callable[[int], PartMap], start: int, stop: int, max_rows: int | None) -> ExtentMap:
        """The maps of the extents in [start, stop), one behind the other."""
        found: list[ExtentMap] = []
        index, at, room = bisect_right(self._starts, start) - 1, start, max_rows
        while at < stop and (room is None or room > 0):
            begin, size = self._starts[index], self.parts[index].size
            part = maps(index)(at - begin, min(stop - begin, size), room)
            found.append(_moved(part, begin, self._places[index]))
            at = begin + part.stop
            index += part.stop == size
            room = None if room is None else room - len(part)
        return _side_by_side(found)

    def describe(self) -> dict[str, object]:
        descriptor = self.descriptor
        found: dict[str, object] = {
            "format": self.format,
            "type": readable(descriptor.create_type) if descriptor else "bare extent",
            "virtual_size": self.size,
            "identity": self.identity,
            "parent_identity": self.parent_identity,
        }
        if descriptor is not None:
            found |= {
                "cid": f"{descriptor.cid:08x}",
                "parent_cid": f"{descriptor.parent_cid:08x}",
                "parent_name": readable(descriptor.parent_hint),
                "adapter_type": readable(descriptor.values.get("ddb.adaptertype", "")),
                "hardware_version": readable(descriptor.values.get("ddb.virtualhwversion", "")),
                "change_tracking": "changetrackpath" in descriptor.values,
            }
        return found | {"extents": self._extents(), "warnings": list(self.warnings)}

    def _extents(self) -> list[dict[str, object]]:
        lines = self.descriptor.extents if self.descriptor else (None,) * len(self.parts)
        found = []
        for part, line in zip(self.parts, lines, strict=True):
            stated: dict[str, object] = {"type": line.type.value, "name": readable(line.name)} if line else {}
            found.append({**stated, "size": part.size, **part.describe()})
        return found


class _PartMaps:
    """One walk's maps of the parts: a new one for each part it comes to, so that only one remembers its grains at a time."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._now: tuple[int, PartMap] | None = None

    def __call__(self, index: int) -> PartMap:
        if self._now is None or self._now[0] != index:
            self._now = None  # before the next one's memory is taken
            self._now = index, self._parts[index].walker()
        return self._now[1]


def _moved(found: ExtentMap, begin: int, place: int) -> ExtentMap:
    """A part's map in the disk's and the joined file's offsets."""
    if begin == place == 0:
        return found
    return ExtentMap(
        found.start + begin, found.stop + begin, found.offset + begin, found.length, found.kind, found.file_offset + place,
        found.layer,
    )  # fmt: skip


def _side_by_side(found: Sequence[ExtentMap]) -> ExtentMap:
    if len(found) == 1:
        return found[0]
    columns = zip(*((one.offset, one.length, one.kind, one.file_offset) for one in found), strict=True)
    return ExtentMap.build(found[0].start, found[-1].stop, *(np.concatenate(column) for column in columns))


def open_vmdk(file: ReadAt, extents: ExtentFiles | None = None) -> VmdkLayer:
    """Parse and check a VMDK, or ImageError naming file, offset, field, the value read and the values allowed.

    extents: the files that a descriptor may name; `descriptor.extent_names` says before which ones it wants.
    """
    start = bytes(read_exact(file, 0, min(32, file.size)))
    if is_descriptor(start):
        layer = _open_descriptor(file, extents)
    elif start.startswith(header.MAGIC):
        layer = _open_monolithic(file)
    elif start.startswith(cowd.MAGIC):
        layer = _bare(file, open_cowd(file, None))
    elif start.startswith(_SESPARSE_MAGIC):
        layer = _bare(file, open_sesparse(file, None))
    else:
        read = repr(start[:8])[1:]
        raise bad_field(file.name, 0, "magic", read, "a descriptor's first line, 'KDMV', 'COWD' or that of seSparse")
    for warning in layer.warnings:
        log.warning("%s: %s", layer.name, warning)
    return layer


def _open_monolithic(file: ReadAt) -> VmdkLayer:
    found = read_sparse(file)
    descriptor = found.descriptor
    if descriptor is None:
        raise ImageError(
            "it is an extent of a disk, and only the disk's descriptor says which part of it",
            where=f"{file.name}@0x1c",
            fix="give the descriptor (the small .vmdk without -s001 or -flat in its name) and list this file beside it",
        )
    part = open_sparse(found, descriptor.extents[0].sectors)
    warnings = (*descriptor.warnings, *part.warnings)
    return VmdkLayer(
        file.name, part.file, [part], [0], descriptor=descriptor, linkage=descriptor.linkage, warnings=warnings
    )  # fmt: skip


def _bare(file: ReadAt, part: Part) -> VmdkLayer:
    """COWD and seSparse say nothing about linkage: over what it was made is for the caller to know."""
    linkage = Linkage((), (UNKNOWN_PARENT,), unique=False)
    warning = "an extent without its descriptor: which disk it was made over cannot be checked"
    return VmdkLayer(file.name, file, [part], [0], descriptor=None, linkage=linkage, warnings=(warning, *part.warnings))


def _open_descriptor(file: ReadAt, extents: ExtentFiles | None) -> VmdkLayer:
    descriptor = read_descriptor(file)
    with ExitStack() as on_failure:
        parts = _open_parts(descriptor, extents, on_failure)
        on_failure.pop_all()
    return _layer_of(file, descriptor, parts)


def _open_parts(descriptor: Descriptor, extents: ExtentFiles | None, on_failure: ExitStack) -> list[Part]:
    parts: list[Part] = []
    files: dict[str, ReadAt] = {}
    for extent in descriptor.extents:
        if extent.type is ExtentType.ZERO:
            parts.append(ZeroPart(extent.size))
            continue
        if extent.name not in files:
            files[extent.name] = _listed(descriptor.name, extent, extents)
            on_failure.callback(files[extent.name].close)
        parts.append(_open_extent(files[extent.name], extent))
    return parts


def _layer_of(file: ReadAt, descriptor: Descriptor, parts: Sequence[Part]) -> VmdkLayer:
    # The descriptor comes last: nobody reads it there, but it is part of what the layer owns and depends on.
    joined: dict[int, ReadAt] = {id(part.file): part.file for part in parts if part.file is not None}
    whole = JoinedFile(file.name, [*joined.values(), file])
    place_of = dict(zip(joined, whole.places, strict=False))
    places = [place_of.get(id(part.file), 0) for part in parts]
    warnings = [*descriptor.warnings, *(f"{part.file.name}: {text}" for part in parts if part.file for text in part.warnings)]
    linkage = descriptor.linkage
    return VmdkLayer(file.name, whole, parts, places, descriptor=descriptor, linkage=linkage, warnings=tuple(warnings))


def _listed(descriptor: str, extent: ExtentLine, extents: ExtentFiles | None) -> ReadAt:
    found = extents.open(extent.name) if extents is not None else None
    if found is None:
        name = readable(extent.name)
        raise ImageError(
            f"line {extent.number} names the extent file {name!r}, which was not given",
            where=descriptor,
            fix=f"list {name} beside the descriptor; no file is opened only because an image names it",
        )
    return found


def _open_extent(file: ReadAt, extent: ExtentLine) -> Part:
    match extent.type:
        case ExtentType.FLAT | ExtentType.VMFS:
            return FlatPart(file, extent)
        case ExtentType.SPARSE:
            return open_sparse(read_sparse(file), extent.sectors)
        case ExtentType.VMFSSPARSE:
            return open_cowd(file, extent.sectors)
        case _:
            return open_sesparse(file, extent.sectors)
