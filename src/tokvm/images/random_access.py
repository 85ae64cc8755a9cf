"""Any bytes of a chain, for whoever does not go through it in the files' order: comparing, hashing in the guest's order."""

from __future__ import annotations

from tokvm.core.extents import ExtentKind
from tokvm.images.chain import Chain


class ChainBytes:
    """A chain's content as `size` and `read_back`, as an open target has them. Thread-safe."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.path = chain.name

    @property
    def size(self) -> int:
        return self._chain.size

    def read_back(self, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset`, which lie inside the disk; ask for a few MiB at most."""
        raw = memoryview(bytearray(length))
        for extent in self._chain.window(offset, offset + length):
            if extent.kind is ExtentKind.DATA:
                file = self._chain.layers[extent.layer].file
                file.read_into(extent.file_offset, raw[extent.offset - offset : extent.end - offset])
        return raw

    def is_hole(self, offset: int, length: int) -> bool:
        """True when nothing in the range is DATA."""
        return not bool(self._chain.window(offset, offset + length).bytes_of(ExtentKind.DATA))
