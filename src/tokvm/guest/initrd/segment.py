"""What is appended to a guest's initramfs so that it finds its disk on KVM: one archive with only what is absent.

    old initramfs | zeros up to a multiple of 4 | gzip( newc: modules, depmod's files for all, conf/modules )

The kernel unpacks archives one after the other whatever their packing, a later file over an earlier one (init/initramfs.c).
Only lz4 is another matter: kernels before 5.14 take whatever follows an lz4 stream for more of it ("lib/decompress_unlz4.c:
correctly handle zero-padding around initrds"), so there the segment is lz4 as well, with no byte in between.

Loading: udev asks by modalias, in initramfs-tools and dracut alike, and finds the new modules in the new indexes. The list of
initramfs-tools is extended besides. Directories are made only where there is nothing yet: a directory over a symbolic link
(/lib) would replace it.
"""

from __future__ import annotations

import gzip
import itertools
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokvm.core.text import readable
from tokvm.core.units import MiB, round_up
from tokvm.guest.base import GuestError
from tokvm.guest.initrd import cpio, module_file
from tokvm.guest.initrd.archive import FORCED, Archive
from tokvm.guest.initrd.modules import BUS, DISKS, Lists
from tokvm.guest.initrd.packing import Packing
from tokvm.guest.initrd.union import depmod_files
from tokvm.remote import process

SEGMENT_LIMIT = 64 * MiB
SQUASHED = ("squash-root.img", "squashfs-root.img")
_FILE, _FOLDER = 0o100644, 0o040755
_PACK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Segment:
    """`content` goes to `offset` of the initramfs (its end, or up to 3 zeros behind it). added: names of the modules in it."""

    offset: int
    content: bytes
    added: tuple[str, ...]

    def applied(self, initrd: bytes) -> bytes:
        return initrd + bytes(self.offset - len(initrd)) + self.content


def make(archive: Archive, size: int, *, version: str, arch: str, lists: Lists, read: Callable[[str], bytes]) -> Segment | None:
    """The segment for an initramfs of `size` bytes; None when it has all it needs. `read` gives a module's file by its path
    below the root's folder of modules. GuestError when the guest's modules do not fit, or nothing can be appended."""
    folder = modules_folder(archive, version)
    present = archive.modules_below(folder)
    added = lists.missing(present)
    if not added:
        return None
    _refuse(archive, size)
    files: dict[str, bytes] = {}
    paths: dict[str, str] = {}
    plain = bool(present) and all(path.endswith(".ko") for path in present.values())  # its modprobe may know no other
    left = SEGMENT_LIMIT
    for name in added:
        path = lists.path(name)
        packed = read(path)
        elf = module_file.unpack(packed, path)
        left -= max(len(packed), len(elf))
        if left < 0:
            raise _too_large()
        module_file.check(elf, version=version, arch=arch, where=path)
        paths[name] = path[: path.rindex(".ko") + 3] if plain else path
        files[f"{folder}/{paths[name]}"] = elf if plain else packed
    files |= {f"{folder}/{name}": text for name, text in depmod_files(archive, folder, lists, present, paths).items()}
    files |= _forced(archive, lists)
    return Segment(*_packed(archive, size, _entries(archive, files)), added)


def modules_folder(archive: Archive, version: str) -> str:
    """Where the initramfs has this kernel's modules: `usr/lib/modules/6.1.0-9` or `lib/modules/6.1.0-9`."""
    folders = {
        path.partition(f"/modules/{version}/")[0] for path in archive.module_files.values() if f"/modules/{version}/" in path
    }
    if len(folders) > 1 or (archive.module_files and not folders):
        raise GuestError(
            f"the initramfs has modules, but not in one folder of kernel {readable(version)}",
            fix="build it again in the guest, or take another way than micro",
        )
    if folders:
        return f"{folders.pop()}/modules/{version}"
    link = archive.members.get("lib")
    return f"{'lib' if link is not None and link.is_directory else 'usr/lib'}/modules/{version}"


def _refuse(archive: Archive, size: int) -> None:
    if any(posixpath.basename(name) in SQUASHED for name in archive.members):
        raise GuestError(
            "the initramfs keeps its files in a squashfs, which hides what is added",
            fix="take another way than micro, or have dracut omit its squash module in the guest",
        )
    if archive.pieces[-1].packing is Packing.LZ4 and size != archive.end:
        raise GuestError(
            "behind the lz4 archive are zeros: older kernels would not look behind them",
            fix="build it again in the guest, or take another way than micro",
        )


def _too_large() -> GuestError:
    return GuestError(
        f"virtio's modules and the lists of modules have more than the {SEGMENT_LIMIT} bytes allowed",
        fix="take another way than micro, or strip the modules in the guest",
    )


def _forced(archive: Archive, lists: Lists) -> dict[str, bytes]:
    text = archive.text(FORCED)
    if text is None:
        return {}

    def listed(name: str) -> bool:
        return re.search(rf"(?<!\S){name}(?!\S)", text) is not None

    names = [name for name in (BUS, *DISKS) if name in lists.files and not listed(name)]
    ended = text if text.endswith("\n") or not text else f"{text}\n"
    return {FORCED: (ended + "".join(f"{name}\n" for name in names)).encode("utf-8", "surrogateescape")}


def _entries(archive: Archive, files: Mapping[str, bytes]) -> list[tuple[str, int, bytes]]:
    parents = {parent for name in files for parent in _parents(name)}
    folders = [(name, _FOLDER, b"") for name in sorted(parents) if name not in archive.members]
    return folders + [(name, _FILE, files[name]) for name in sorted(files)]


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _packed(archive: Archive, size: int, entries: list[tuple[str, int, bytes]]) -> tuple[int, bytes]:
    """(offset, bytes). mtime 0 in gzip's header, so that equal input gives equal bytes."""
    if sum(len(content) for _, _, content in entries) > SEGMENT_LIMIT:
        raise _too_large()
    plain = cpio.pack(entries)
    if archive.pieces[-1].packing is not Packing.LZ4:
        return round_up(size, 4), gzip.compress(plain, 6, mtime=0)
    run = itertools.takewhile(lambda piece: piece.packing is Packing.LZ4, reversed(archive.pieces))
    aligned = bytes(-sum(piece.unpacked for piece in run) % 4) + plain  # of what all of the lz4 unpacks to
    done = process.run(["lz4", "-lzcq"], input=aligned, timeout_s=_PACK_TIMEOUT_S, where="lz4")
    if done.code != 0:
        raise GuestError("lz4 cannot pack the segment", where="lz4", fix="install lz4 again")
    return size, done.stdout
