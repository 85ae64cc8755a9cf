"""Images of other formats, and images that are two at once: for whoever asks the bytes what they are."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from tests.hostile.case import Hostile, Outcome, files, write_sparsely
from tests.hostile.vhd_images import footed, vhd
from tests.hostile.vhdx_images import vhdx
from tests.hostile.vmdk_images import descriptor, sparse

SECRET_PATH = "/etc/shadow"


def qcow2(*, backing: bytes = b"", data_file: bytes = b"", size: int = 1 << 20) -> bytes:
    """Version 3, as far as a prober looks: the header, an extension with the data file's name, the backing file's name."""
    extension = b""
    if data_file:
        padded = data_file.ljust(-(-len(data_file) // 8) * 8, b"\0")
        extension = struct.pack(">II", 0x44415441, len(data_file)) + padded
    names_at = 104 + len(extension) + 8
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, names_at if backing else 0, len(backing), 16, size, 0, 1, 3 << 16, 1 << 16, 1,
        0, 0, 4 if data_file else 0, 0, 0, 4, 104,
    )  # fmt: skip
    return (head + extension + bytes(8) + backing).ljust(4 << 16, b"\0")


def fixed(content: bytes) -> bytes:
    """A fixed VHD whose guest wrote this."""
    size = -(-len(content) // 512) * 512
    return content.ljust(size, b"\0") + footed(vhd("fixed", size=size), 84, b"\0")[-512:]


def polyglot(content: bytes) -> bytes:
    """The same bytes, with an intact footer for them at the end."""
    return fixed(content)


def guest_names_the_child(folder: Path) -> Sequence[str]:
    """A raw base whose guest wrote a descriptor that calls the layer above it an extent."""
    base = descriptor('RW 8 VMFS "child.vhd"').ljust(16384, b"\0")
    write_sparsely(folder / "base.raw", base)
    child = bytearray(vhd("differencing"))
    child[512 + 40 : 512 + 56] = bytes(16)  # made over a raw parent
    child[512 + 36 : 512 + 40] = bytes(4)
    child[512 + 36 : 512 + 40] = struct.pack(">I", ~sum(child[512:1536]) & 0xFFFFFFFF)
    write_sparsely(folder / "child.vhd", bytes(child))
    return ["base.raw", "child.vhd"]


def guest_disk(folder: Path) -> bytes:
    """Of a fixed VHD: all but its footer."""
    return (folder / "disk.vhd").read_bytes()[:-512]


def raw_disk(folder: Path) -> bytes:
    return (folder / "disk.raw").read_bytes()


def base_and_child(folder: Path) -> bytes:
    """The child's first three blocks begin with a sector of its own."""
    found = bytearray((folder / "base.raw").read_bytes())
    for number in range(3):
        found[4096 * number : 4096 * number + 512] = bytes([65 + number]) * 512
    return bytes(found)


_JSON = b'json:{"driver":"file","filename":"/etc/shadow"}'
_HOSTILE_QCOW2 = qcow2(backing=SECRET_PATH.encode())
_HOSTILE_TEXT = descriptor(f'RW 8 FLAT "{SECRET_PATH}" 0')

IMAGES: dict[str, Hostile] = {
    "probe: qcow2 with a backing file": Hostile("CVE-2008-2004, CVE-2015-5163", files(disk_img=_HOSTILE_QCOW2), "qcow2 image"),
    "probe: qcow2 with a data file": Hostile(
        "CVE-2024-32498", files(disk_img=qcow2(data_file=SECRET_PATH.encode())), "qcow2 image"
    ),
    "probe: qcow2 with a json: data file": Hostile("CVE-2024-4467", files(disk_img=qcow2(data_file=_JSON)), "qcow2 image"),
    "probe: qcow2 called .vhd": Hostile("CVE-2024-40767", files(disk_vhd=_HOSTILE_QCOW2), "qcow2 image"),
    "probe: qcow2 said to be a VHD": Hostile(
        "CVE-2024-40767", files(disk_vhd=_HOSTILE_QCOW2), "footer cookie", options=("--format", "vhd")
    ),
    "probe: qcow2 said to be a VMDK": Hostile(
        "CVE-2024-40767", files(disk_vmdk=_HOSTILE_QCOW2), "magic", options=("--format", "vmdk")
    ),
    "probe: QED": Hostile("CVE-2008-2004", files(disk_img=b"QED\0".ljust(4096, b"\0")), "QED image"),
    "probe: VDI": Hostile(
        "CVE-2008-2004", files(disk_img=b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(4096, b"\0")), "VDI image"
    ),
    "probe: LUKS": Hostile("CVE-2008-2004", files(disk_img=b"LUKS\xba\xbe\0\1".ljust(4096, b"\0")), "LUKS"),
    "probe: a raw disk": Hostile(
        "CVE-2010-3851", files(disk_img=b"\xeb\x63\x90".ljust(510, b"\0") + b"\x55\xaa"), "no image format"
    ),
    "probe: a guest's qcow2 header in a fixed VHD": Hostile(
        "CVE-2010-3851", files(disk_vhd=fixed(_HOSTILE_QCOW2)), outcome=Outcome.HARMLESS, content=guest_disk
    ),
    "probe: a guest's qcow2 header in a raw disk": Hostile(
        "CVE-2026-24708",
        files(disk_raw=_HOSTILE_QCOW2),
        outcome=Outcome.HARMLESS,
        options=("--format", "raw"),
        content=raw_disk,
    ),
    "probe: a guest's descriptor in a fixed VHD": Hostile(
        "CVE-2022-47951", files(disk_vhd=fixed(_HOSTILE_TEXT)), "extent file name|ends as a VHD"
    ),
    "probe: a guest's descriptor in what is said to be a fixed VHD": Hostile(
        "CVE-2022-47951",
        files(disk_vhd=fixed(_HOSTILE_TEXT)),
        outcome=Outcome.HARMLESS,
        options=("--format", "vhd"),
        content=guest_disk,
    ),
    "probe: a guest's descriptor in a raw base names the layer above it": Hostile(
        "CVE-2022-47951",
        guest_names_the_child,
        outcome=Outcome.HARMLESS,
        options=("--format", "base.raw=raw"),
        content=base_and_child,
    ),
    "probe: a VHDX that ends as a VHD": Hostile(
        "CVE-2024-40767", files(disk_img=lambda: polyglot(vhdx())), "begins as a VHDX and ends as a VHD"
    ),
    "probe: a VMDK that ends as a VHD": Hostile(
        "CVE-2024-40767", files(disk_img=lambda: polyglot(sparse())), "begins as a VMDK and ends as a VHD"
    ),
    "probe: a guest's VHDX in a fixed VHD": Hostile(
        "CVE-2010-3851",
        files(disk_vhd=lambda: fixed(vhdx())),
        outcome=Outcome.HARMLESS,
        options=("--format", "vhd"),
        content=guest_disk,
    ),
    "probe: a guest's VMDK in a fixed VHD": Hostile(
        "CVE-2010-3851",
        files(disk_vhd=lambda: fixed(sparse())),
        outcome=Outcome.HARMLESS,
        options=("--format", "vhd"),
        content=guest_disk,
    ),
    "probe: a guest's dynamic VHD in a fixed VHD": Hostile(
        "CVE-2010-3851",
        files(disk_vhd=lambda: fixed(vhd())),
        outcome=Outcome.HARMLESS,
        content=guest_disk,
    ),
}
