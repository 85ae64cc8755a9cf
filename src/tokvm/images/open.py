"""What is this file? Asked of its bytes, never of its name.

    start                        end - 512            it is
    conectix, v_poison           (any)                VHD, dynamic or differencing (the copy of its footer)
    vhdxfile                     no footer            VHDX
    KDMV, COWD, seSparse, text   no footer            VMDK
    one of these                 an intact footer     both: refused
    anything else                conectix, v_poison   VHD, fixed (or dynamic with a damaged copy)

A guest writes the first bytes of a fixed VHD and may write the last ones of a VHDX or VMDK, so a file that is both at once was
made to be misread. Who knows the format from elsewhere (the hypervisor, the operator) says so: `expect`.
"""

from __future__ import annotations

from tokvm.core.errors import ImageError
from tokvm.images.base import ExtentFiles, Layer, ReadAt
from tokvm.images.raw import RawLayer
from tokvm.images.vhd.footer import has_footer, has_intact_footer
from tokvm.images.vhd.layer import open_vhd
from tokvm.images.vhd.structs import FOOTER_COOKIE, POISON_COOKIE
from tokvm.images.vhdx.layer import open_vhdx
from tokvm.images.vmdk.layer import open_vmdk

FORMATS = ("vhd", "vhdx", "vmdk", "raw")

_BY_START = {
    b"vhdxfile": "vhdx",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"\xbe\xba\xfe\xca\0\0\0\0": "vmdk",
    FOOTER_COOKIE: "vhd",
    POISON_COOKIE: "vhd",
}

_DESCRIPTOR = b"# disk descriptorfile"  # in any case

# Known by their first bytes, but no disk of our three hypervisors: named, so that nobody takes them for raw.
_OTHERS = {b"QFI\xfb": "qcow2", b"QED\0": "QED", b"<<< ": "VDI", b"LUKS\xba\xbe": "LUKS"}


def open_image(file: ReadAt, *, expect: str | None = None, extents: ExtentFiles | None = None) -> Layer:
    """The layer in this file, or ImageError when it is no image that can be read. The layer owns `file` when this returns.

    expect: one of FORMATS, from someone who knows; the file is then read as that, or refused. raw is never guessed.
    extents: the further files that a VMDK descriptor may name.
    """
    match expect or _guess(file):
        case "vhd":
            return open_vhd(file)
        case "vhdx":
            return open_vhdx(file)
        case "vmdk":
            return open_vmdk(file, extents)
        case "raw":
            return RawLayer(file)
        case other:
            raise ImageError(f"{other} is no format that is read here", where=file.name, fix=f"one of {', '.join(FORMATS)}")


def _guess(file: ReadAt) -> str:
    start = bytearray(min(32, file.size))
    file.read_into(0, memoryview(start))
    found = next((format_ for magic, format_ in _BY_START.items() if start.startswith(magic)), None)
    if start.lower().startswith(_DESCRIPTOR):
        found = "vmdk"
    if found in ("vhdx", "vmdk") and has_intact_footer(file):
        raise ImageError(
            f"it begins as a {found.upper()} and ends as a VHD: the guest inside may have written one of the two",
            where=file.name,
            fix=f"find out what the hypervisor made, then say so: --format {found}, or --format vhd",
        )
    if found is None and has_footer(file):
        found = "vhd"
    if found is not None:
        return found
    for magic, title in _OTHERS.items():
        if start.startswith(magic):
            raise ImageError(
                f"this is a {title} image, which is not read here", where=file.name, fix="convert it with qemu-img"
            )
    raise ImageError(
        "no image format was recognised: neither the end nor the start of the file has a known magic",
        where=file.name,
        fix="copy the file again if it should be an image; if it is a raw disk, say so: --format raw",
    )
