"""What is fuzzed: the table of targets. An attempt takes an input; it ends in silence when the input was read or refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz import seeds
from fuzz.checks import Wrong, check_layer, check_refusal, check_stream
from fuzz.memory import MemoryExtents, SparseFile, SparseStream
from fuzz.mutation import Mutator, repair_vhd, repair_vhdx
from fuzz.windows import Windows
from tokvm.core.disk import BufferPool
from tokvm.core.errors import ImageError
from tokvm.core.units import MiB
from tokvm.images.base import Layer
from tokvm.images.open import open_image
from tokvm.images.vhd.stream import StreamKind, VhdStream
from tokvm.images.vmdk.descriptor import MAX_DESCRIPTOR, extent_names
from tokvm.images.vmdk.stream import VmdkStream

CORPUS = Path(__file__).parent / "corpus"
CPU_LIMIT_S = 2.0
MEMORY_LIMIT = 256 * MiB
_STREAM_LIMIT = 2 * MiB
_MAX_VMDK = 1 << 40
_STEP = 10_000
_POOL = BufferPool(6, 65536)
_NAME = "fuzz.img"
_LINES = tuple((at, 48) for at in range(0x600, 0x2200, 0x200))
_GRAINS = (0x3000, 0x3200, 0x3400, 0x3600, 0x4000, 0x4200, 0x4400, 0x4600)

VHD = Windows(((0, 96), (0x200, 96), (0x440, 48), *_LINES, (-512, 96)))
VHDX = Windows((
    (0, 32), (0x10000, 96), (0x20000, 96), (0x30000, 112), (0x40000, 112), (0x1DE000, 160), (0x1DF000, 64), (0x1DFFF0, 16),
    (0x1E0000, 160), (0x1E1000, 64), (0x1E1FF0, 16), (0x200000, 256), (0x210000, 320), (0x300000, 48), (0x308000, 16),
    (0x340000, 16), (0x400000, 32), (0x500000, 32), (0x500200, 32), (0x600000, 48), (0x600100, 32), (-32, 32),
))  # fmt: skip
SPARSE = Windows((
    (0, 80), (0x200, 320), (0x2A00, 32), (0x2C00, 64), (0x3800, 32), (0x3A00, 64), *((at, 160) for at in _GRAINS), (0x4800, 80),
    (-1536, 32), (-1024, 80), (-512, 16),
), _MAX_VMDK)  # fmt: skip
STREAM = Windows(SPARSE.places, _STREAM_LIMIT)
COWD = Windows(((0, 48), (1648, 4), (0x800, 16), (0xA00, 96), (0x4A00, 32), (-512, 16)), _MAX_VMDK)
SESPARSE = Windows((
    (0, 224), (0x200, 32), (0x400, 32), (0x200000, 32), (0x300000, 64), (0x308000, 32), (0x600000, 16), (-4096, 16),
), _MAX_VMDK)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """images: seeds, whole. mutator None: inputs are texts, and libFuzzer changes them with `words` at hand."""

    images: Callable[[], Iterator[bytes]]
    attempt: Callable[[bytes], None]
    mutator: Mutator | None = None
    words: tuple[bytes, ...] = ()

    def compact(self, image: bytes) -> bytes:
        return image if self.mutator is None else self.mutator.windows.compact(image)

    def run(self, data: bytes) -> None:
        """Any exception is a finding, and so is one that takes longer or more memory than a refusal may."""
        before, start = _peak(reset=True), time.process_time()
        self.attempt(data)
        spent, grown = time.process_time() - start, _peak() - before
        if spent > CPU_LIMIT_S or grown > MEMORY_LIMIT:
            raise Wrong(f"{spent:.1f} s of CPU, {grown / MiB:.0f} MiB more memory")


def _peak(*, reset: bool = False) -> int:
    """The most memory that this process had since it was last reset, bytes; as the kernel counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ImageError as exc:
        check_refusal(exc, _NAME)
        return True
    return False


def _file(windows: Windows, expect: str) -> Callable[[bytes], None]:
    def attempt(data: bytes) -> None:
        file = windows.expand(data, _NAME)
        _refused(lambda: check_layer(open_image(file, expect=expect)))

    return attempt


def _layer(file: SparseFile, expect: str) -> Layer | None:
    try:
        return open_image(file, expect=expect)
    except ImageError:
        return None


def _vhd_stream(data: bytes) -> None:
    windows = Windows(VHD.places, _STREAM_LIMIT)
    file = windows.expand(data, _NAME)
    layer = _layer(file, "vhd")
    for kind in (None, *StreamKind):
        size = 4096 if kind is StreamKind.FIXED else None

        def make(kind: StreamKind | None = kind, size: int | None = size) -> VhdStream:
            return VhdStream(_exporter(file), name=_NAME, pool=_POOL, expect_size=size, expect_parent=kind)

        same = layer if kind is not StreamKind.FIXED else None
        _refused(lambda make=make, same=same: check_stream(make, sum(data), same))  # type: ignore[misc]


def _vmdk_stream(data: bytes) -> None:
    file = STREAM.expand(data, _NAME)

    def make() -> VmdkStream:
        return VmdkStream(_exporter(file), name=_NAME, pool=_POOL)

    _refused(lambda: check_stream(make, sum(data), _layer(file, "vmdk")))


def _exporter(file: SparseFile) -> Callable[[int], SparseStream]:
    return lambda at: SparseStream(file, at, _STEP)


def _descriptor(data: bytes) -> None:
    """As a file of its own, with files for whatever bare name it asks for."""
    file = SparseFile([(0, data)], len(data), _NAME)
    extents = MemoryExtents(_extents(), SparseFile([], 1 << 40, _NAME))
    _refused(lambda: _names_are_bare(extent_names(file)))
    _refused(lambda: check_layer(open_image(file, extents=extents)))
    _names_are_bare(tuple(extents.asked))


def _names_are_bare(names: tuple[str, ...]) -> None:
    for name in names:
        if (
            not name
            or Path(name).name != name
            or (name.startswith(".") and not name.strip("."))
            or "\\" in name
            or "\0" in name
        ):
            raise Wrong(f"{name!r} was asked for")


_CACHE: dict[str, SparseFile] = {}


def _extents() -> dict[str, SparseFile]:
    if not _CACHE:
        images = (("d.vmdk", seeds.sparses), ("d-delta.vmdk", seeds.cowds), ("d-sesparse.vmdk", seeds.sesparses))
        for name, made in images:
            raw = next(made())
            _CACHE[name] = SparseFile([(0, raw)], len(raw), _NAME)
    return _CACHE


_WORDS = (
    b"RW ", b"RDONLY ", b"NOACCESS ", b" FLAT ", b" VMFS ", b" SPARSE ", b" VMFSSPARSE ", b" SESPARSE ", b" ZERO\n",
    b" VMFSRDM ", b'"../x"', b'"/etc/shadow"', b'"nbd:x"', b'"json:{}"', b'"."', b'".."', b'"a\\\\b"', b'"a\x00b"',
    b'"a\x1b[2Jb"', b"\xc2\x9b", b"CID=", b"parentCID=", b"ffffffff", b"encoding=", b"GBK", b"shift_jis", b"UTF-8",
    b"windows-1252", b"parentFileNameHint=", b"ddb.uuid.parent=", b"encryption.keySafe=", b"ddb.iofilters=",
    b"9223372036854775807", b"18446744073709551615", b"133143986176", b"RW 1 ZERO\nRW 1 ZERO\n", b"\r\n", b"\0", b'"d.vmdk"',
    b'"d-delta.vmdk"', b'"d-sesparse.vmdk"', b"isNativeSnapshot=yes", b"createType=", b"# Disk DescriptorFile",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "vhd": Target(seeds.vhds, _file(VHD, "vhd"), Mutator(VHD, "big", repair_vhd)),
    "vhd-stream": Target(seeds.vhds, _vhd_stream, Mutator(Windows(VHD.places, _STREAM_LIMIT), "big", repair_vhd)),
    "vhdx": Target(seeds.vhdxs, _file(VHDX, "vhdx"), Mutator(VHDX, "little", repair_vhdx)),
    "vmdk": Target(seeds.sparses, _file(SPARSE, "vmdk"), Mutator(SPARSE, "little", grains=_GRAINS)),
    "vmdk-stream": Target(seeds.streams, _vmdk_stream, Mutator(STREAM, "little", grains=_GRAINS)),
    "cowd": Target(seeds.cowds, _file(COWD, "vmdk"), Mutator(COWD, "little")),
    "sesparse": Target(seeds.sesparses, _file(SESPARSE, "vmdk"), Mutator(SESPARSE, "little")),
    "descriptor": Target(seeds.descriptors, _descriptor, words=_WORDS),
}
MAX_TEXT = MAX_DESCRIPTOR // 256


def inputs(name: str) -> list[Path]:
    """The kept corpus of a target."""
    return sorted((CORPUS / name).glob("*"))
