"""What is this file? Asked of its bytes, never of its name."""

from __future__ import annotations

from tokvm.core.errors import ImageError
from tokvm.images.base import Layer, ReadAt
from tokvm.images.vhd.footer import has_footer
from tokvm.images.vhd.layer import open_vhd

# Formats that are known by their first bytes but that nothing here reads yet: named, so that nobody takes them for raw.
_OTHERS = {
    b"vhdxfile": "VHDX",
    b"KDMV": "VMDK (hosted sparse)",
    b"COWD": "VMDK (COWD)",
    b"\xbe\xba\xfe\xca": "VMDK (seSparse)",
    b"# Disk DescriptorFile": "VMDK (descriptor)",
    b"QFI\xfb": "qcow2",
    b"QED\0": "QED",
    b"<<< ": "VDI",
}


def open_image(file: ReadAt) -> Layer:
    """The layer in this file, or ImageError when it is no image that can be read. A raw disk is never guessed."""
    if has_footer(file):
        return open_vhd(file)
    start = bytearray(min(32, file.size))
    file.read_into(0, memoryview(start))
    for magic, title in _OTHERS.items():
        if start.startswith(magic):
            raise ImageError(f"this is a {title} image, which is not supported yet", where=file.name, fix="convert it to VHD")
    raise ImageError(
        "no image format was recognised: neither the end nor the start of the file has a known magic",
        where=file.name,
        fix="copy the file again if it should be a VHD; its footer is in the last 512 bytes",
    )
