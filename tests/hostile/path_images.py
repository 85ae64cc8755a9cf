"""Images that name files, devices and URLs of the host, in every way that some importer has fallen for."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.hostile.case import Hostile, Outcome, files, patched
from tests.hostile.vhd_images import vhd
from tests.hostile.vmdk_images import DISK, SECTOR, descriptor, sparse

from tokvm.testing.vmdk_descriptor import ExtentLine, write_descriptor

SECRET = "secret.raw"  # in the folder above the images'
SECTORS = DISK // SECTOR
OWN = "disk-flat.vmdk"


def naming(name: str, kind: str = "FLAT") -> Callable[[Path], Sequence[str]]:
    """A descriptor with this extent, and a file outside of its folder that is large enough to be one."""
    return files(disk_vmdk=descriptor(f'RW {SECTORS} {kind} "{name}"' + (" 0" if kind == "FLAT" else "")))


def own_name(make: Callable[[Path], None]) -> Callable[[Path], Sequence[str]]:
    """A descriptor whose extent has the right name beside it, which is no plain file."""

    def build(folder: Path) -> Sequence[str]:
        (folder / "disk.vmdk").write_bytes(descriptor(f'RW {SECTORS} VMFS "{OWN}"'))
        make(folder / OWN)
        return ["disk.vmdk"]

    return build


def with_hint(hint: str, *more: str) -> Callable[[Path], Sequence[str]]:
    """A child of a flat extent that says where its parent lies."""

    def build(folder: Path) -> Sequence[str]:
        head = (f'parentFileNameHint="{hint}"', *more)
        (folder / "disk.vmdk").write_bytes(descriptor(f'RW {SECTORS} VMFS "{OWN}"', head=head, parent="22222222"))
        (folder / OWN).write_bytes(b"c" * DISK)
        return ["disk.vmdk"]

    return build


def embedded(text: bytes) -> Callable[[], bytes]:
    return lambda: patched(sparse(), (SECTOR, text.ljust(20 * SECTOR, b"\0")))


def bind(path: Path) -> None:
    """A socket; bound by a short name, as those of tests may be too long."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def node(kind: int, major: int, minor: int) -> Callable[[Path], None]:
    return lambda path: os.mknod(path, kind | 0o600, os.makedev(major, minor))


def linked(path: Path) -> None:
    path.symlink_to(path.parent.parent / SECRET)


def hard_linked(path: Path) -> None:
    held = path.with_name("held.raw")
    held.write_bytes(b"h" * DISK)
    path.hardlink_to(held)


def alone(make: Callable[[Path], None], name: str = "disk.vhd") -> Callable[[Path], Sequence[str]]:
    """What is given on the command line is no plain file."""

    def build(folder: Path) -> Sequence[str]:
        make(folder / name)
        return [name]

    return build


def good_link(path: Path) -> None:
    path.with_name("real.vhd").write_bytes(vhd())
    path.symlink_to("real.vhd")


def called(name: str, raw: Callable[[], bytes] = vhd, times: int = 1) -> Callable[[Path], Sequence[str]]:
    """An image under a hostile name."""

    def build(folder: Path) -> Sequence[str]:
        (folder / name).write_bytes(raw())
        return [name] * times

    return build


def neighbour(folder: Path) -> Sequence[str]:
    (folder / "other.raw").write_bytes(b"o" * DISK)
    (folder / "disk.vmdk").write_bytes(descriptor(f'RW {SECTORS} VMFS "other.raw"'))
    return ["disk.vmdk"]


def two_of_a_name(folder: Path) -> Sequence[str]:
    (folder / "disk.vmdk").write_bytes(descriptor(f'RW {SECTORS} VMFS "x.raw"'))
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "x.raw").write_bytes(b"x" * DISK)
    return ["disk.vmdk", "one/x.raw", "two/x.raw"]


_JSON = 'json:{"driver":"file","filename":"/etc/shadow"}'
_NAMES = {
    "an absolute path": "/etc/shadow",
    "a path out of its folder": f"../{SECRET}",
    "a Windows path out of its folder": f"..\\{SECRET}",
    "a path behind its own prefix": f"disk-/../../{SECRET}",
    "a device": "/dev/vda",
    "the environment": "/proc/self/environ",
    "an open file": "/proc/self/fd/0",
    "an NBD URL": "nbd:unix:/tmp/x",
    "an NBD server": "nbd://127.0.0.1:10809/x",
    "QEMU's json:": _JSON,
    "a file URL": "file:///etc/shadow",
    "an ssh URL": "ssh://127.0.0.1/etc/shadow",
    "a fat protocol": "fat:rw:/tmp",
    "its folder": ".",
    "the folder above": "..",
    "a drive": "C:\\Windows\\x.vmdk",
}
_HINTS = {
    "an absolute path": "/etc/shadow",
    "an NBD URL": "nbd://127.0.0.1:10809/x",
    "QEMU's json:": _JSON,
    "a path out of its folder": f"../{SECRET}",
    "a command": "$(reboot)`reboot`;reboot|reboot",
}
_CVE = "CVE-2022-47951"
_ESCAPED = "\x1b]0;owned\x07"
_BESIDE = frozenset({OWN})

IMAGES: dict[str, Hostile] = {
    **{f"path: extent named {title}": Hostile(_CVE, naming(name), "extent file name is") for title, name in _NAMES.items()},
    **{
        f"path: {kind} extent named an absolute path": Hostile(_CVE, naming("/etc/shadow", kind), "extent file name is")
        for kind in ("VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE")
    },
    "path: raw device mapping of a disk": Hostile(_CVE, naming("/dev/sda", "VMFSRDM"), "raw device mapping"),
    "path: raw disk": Hostile(_CVE, naming("/dev/sda", "VMFSRAW"), "raw device mapping"),
    "path: partition of a device behind the offset": Hostile(
        _CVE, files(disk_vmdk=descriptor(f'RW {SECTORS} FLAT "{OWN}" 0 partition /dev/sda')), "text behind the extent"
    ),
    "path: name with a NUL": Hostile(_CVE, naming(f"{OWN}\0/../../etc/shadow"), "descriptor line"),
    "path: name with a newline": Hostile(_CVE, naming(f"disk\nFORGED-{OWN}"), "descriptor line"),
    "path: name with terminal escapes": Hostile("terminal injection", naming(f"{_ESCAPED}.vmdk"), "no control characters"),
    "path: name with 8-bit terminal escapes": Hostile("terminal injection", naming("disk-\x9b2J\u202e.vmdk"), "was not given"),
    "path: name of 4000 characters": Hostile("CVE-2014-0223 family", naming("disk-" + "x" * 4000), "extent file name is"),
    "path: itself": Hostile("a loop", naming("disk.vmdk"), "was not given"),
    "path: a neighbour that was not named": Hostile(_CVE, neighbour, "was not given"),
    "path: one of two files of that name": Hostile("mixed-up files", two_of_a_name, "called x.raw"),
    "path: its extent is a symbolic link": Hostile(_CVE, own_name(linked), "symbolic link", beside=_BESIDE),
    "path: its extent is a dangling link": Hostile(
        _CVE, own_name(lambda path: path.symlink_to("/nonexistent")), "symbolic link", beside=_BESIDE
    ),
    "path: its extent is a FIFO": Hostile("CVE-2015-5162", own_name(os.mkfifo), "no regular file", beside=_BESIDE),
    "path: its extent is a socket": Hostile(_CVE, own_name(bind), "cannot open|no regular file", beside=_BESIDE),
    "path: its extent is a directory": Hostile(_CVE, own_name(Path.mkdir), "no regular file", beside=_BESIDE),
    "path: its extent is a character device": Hostile(
        _CVE, own_name(node(stat.S_IFCHR, 1, 5)), "no regular file", beside=_BESIDE, root=True
    ),
    "path: its extent is a block device": Hostile(
        "a device node out of an unpacked archive",
        own_name(node(stat.S_IFBLK, 7, 0)),
        "no regular file",
        beside=_BESIDE,
        root=True,
    ),
    "path: its extent is a hard link": Hostile(_CVE, own_name(hard_linked), outcome=Outcome.HARMLESS, beside=_BESIDE),
    **{
        f"path: parent hint of {title}": Hostile(
            "CVE-2015-5163", with_hint(hint), "not listed|made over", Outcome.CHILD, beside=_BESIDE
        )
        for title, hint in _HINTS.items()
    },
    "path: parent hint with terminal escapes": Hostile("terminal injection", with_hint(_ESCAPED), "no control characters"),
    "path: change tracking in a host file": Hostile(
        _CVE, with_hint("base.vmdk", 'changeTrackPath="/etc/shadow"'), "not listed|made over", Outcome.CHILD, beside=_BESIDE
    ),
    "path: create type with 8-bit terminal escapes": Hostile(
        "terminal injection",
        with_hint("base.vmdk\x9b2J", 'ddb.adapterType = "\x9b2J"'),
        "not listed|made over",
        Outcome.CHILD,
        beside=_BESIDE,
    ),
    "path: embedded descriptor that names a host file": Hostile(
        _CVE, files(disk_vmdk=embedded(descriptor(f'RW {SECTORS} SPARSE "/etc/shadow"'))), "extent file name is"
    ),
    "path: embedded descriptor with a flat extent": Hostile(
        _CVE,
        files(disk_vmdk=embedded(write_descriptor("monolithicFlat", [ExtentLine(DISK, "FLAT", "x.raw", 0)]))),
        "extents of the embedded",
    ),
    "kind: a FIFO": Hostile("CVE-2015-5162", alone(os.mkfifo), "neither a regular file"),
    "kind: a socket": Hostile("CVE-2015-5162", alone(bind), "cannot open|neither a regular file"),
    "kind: a directory": Hostile("CVE-2015-5162", alone(Path.mkdir), "neither a regular file"),
    "kind: an endless device": Hostile("CVE-2015-5162", alone(node(stat.S_IFCHR, 1, 5)), "neither a regular file", root=True),
    "kind: a symbolic link to a good image": Hostile(_CVE, alone(good_link), "symbolic link"),
    "kind: a symbolic link to a host file": Hostile(_CVE, alone(linked), "symbolic link"),
    "kind: nothing": Hostile("truncation", files(disk_vhd=b""), "no image format"),
    **{
        f"name: {title}": Hostile("CVE-2023-51385", called(name), outcome=Outcome.HARMLESS)
        for title, name in {
            "an option of ssh": "-oProxyCommand=x",
            "a command": "$(reboot).vhd",
            "terminal escapes": f"{_ESCAPED}.vhd",
            "a newline": "x\nFORGED.vhd",
            "not UTF-8": os.fsdecode(b"\xff\xfe.vhd"),
            "quotes": "'\"`.vhd",
            "a right-to-left mark": "\u202edhv.x",
        }.items()
    },
    "name: a newline, in a refusal": Hostile(
        "terminal injection", called("x\nFORGED.vhd", lambda: b"?" * 600), "no image format"
    ),
    "name: a newline, of a layer given twice": Hostile(
        "terminal injection",
        called("x\nFORGED.vhd", times=2),
        "same layer",
        Outcome.WALK,
    ),
}
