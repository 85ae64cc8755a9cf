"""What the lists and modules on a guest's disk can cost the host is bounded, whatever they say of each other."""

from __future__ import annotations

import lzma
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tokvm.core.units import KiB, MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd import archive, segment
from tokvm.guest.initrd import index as trie
from tokvm.guest.initrd.cpio import pack
from tokvm.guest.initrd.index import LONGEST_KEY, index
from tokvm.guest.initrd.lines import LONGEST_LINE, MOST_LINES
from tokvm.guest.initrd.module_file import MODULE_LIMIT
from tokvm.guest.initrd.modules import LONGEST_PATH, Lists
from tokvm.guest.initrd.union import DEP_LIMIT, depmod_files

VIRTIO = "kernel/virtio_pci.ko:\nkernel/virtio_blk.ko:\n"
FOLDER = "lib/modules/6.1"


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Never more than `size` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size, f"{peak / MiB:.0f} MiB"


@pytest.mark.parametrize("module", ["virtio_blk", "sound"])
@pytest.mark.parametrize("behind", ["virtio_pci", "absent"])
def test_softdeps_and_aliases_do_not_multiply(module: str, behind: str) -> None:
    softdeps, aliases = f"softdep {module} pre: {'x ' * 3000}\n", f"alias x {behind}\n" * 3000
    dep = f"{VIRTIO}kernel/sound.ko:\n"

    with at_most(8 * MiB):
        assert Lists.parse(dep, aliases=aliases, softdeps=softdeps).missing([]) == ("virtio_blk", "virtio_pci")


def test_an_alias_of_very_many_modules_is_refused() -> None:
    names = [f"m{number}" for number in range(3000)]
    dep = VIRTIO + "".join(f"k/{name}.ko:\n" for name in names)
    aliases = "".join(f"alias {alias} {name}\n" for alias in ("x", "y") for name in names)
    lists = Lists.parse(dep, aliases=aliases, softdeps="softdep virtio_blk pre: x y\nsoftdep m0 pre: x y\n")

    with at_most(8 * MiB), pytest.raises(GuestError, match="more than 200 modules"):
        lists.missing([])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"dep": "\n" * (MOST_LINES + 1)}, "beyond every measure"),
        ({"dep": VIRTIO, "builtin": "x" * (LONGEST_LINE + 1)}, "beyond every measure"),
        ({"dep": ("k/a.ko:" + " b.ko" * 12_000 + "\n") * 50}, "more than 500000 names"),
        ({"dep": VIRTIO, "softdeps": "softdep virtio_blk pre: y\n" * 3000}, "more than 10000 words"),
        (
            {"dep": VIRTIO, "softdeps": "softdep virtio_blk pre: y\n", "aliases": "\n" * (MOST_LINES + 1)},
            "beyond every measure",
        ),
    ],
)
@pytest.mark.slow
def test_lists_beyond_every_measure_are_refused(texts: dict[str, str], said: str) -> None:
    with pytest.raises(GuestError, match=said):
        Lists.parse(**texts).missing([])


def test_a_path_of_very_many_folders_is_no_modules() -> None:
    """Each of its folders would be made in the segment."""
    deep = "k/" * (LONGEST_PATH // 2)

    assert set(Lists.parse(f"{deep}a.ko:\n{deep[8:]}b.ko:\n").files) == {"b"}


def test_lines_end_where_kmod_ends_them() -> None:
    assert set(Lists.parse("k/a.ko:\n\nk/b.ko:\x0bk/c.ko:\nk/d.ko:").files) == {"a", "d"}


def module(size: int) -> bytes:
    """A module of `size` bytes for 6.1 on x86-64, well packed."""
    elf = bytearray(size)
    elf[:6], elf[18:20] = b"\x7fELF\x02\x01", struct.pack("<H", 62)
    elf[64:80] = b"vermagic=6.1 SMP"
    return lzma.compress(bytes(elf), preset=0)


@pytest.mark.parametrize("there", ["a.ko", "a.ko.xz"])
@pytest.mark.slow
def test_modules_are_counted_as_they_are_unpacked(there: str) -> None:
    """Whether the unpacked or the packed ones would be put into the segment."""
    packed = module(MODULE_LIMIT)
    names = [f"kernel/m{number}.ko.xz" for number in range(9)]
    dep = f"kernel/virtio_pci.ko.xz:\nkernel/virtio_blk.ko.xz: {' '.join(names)}\n" + "".join(f"{name}:\n" for name in names)
    initrd = pack([("lib", 0o40755, b""), (f"{FOLDER}/kernel/{there}", 0o100644, b"x")])
    reads = []

    def read(path: str) -> bytes:
        reads.append(path)
        return packed

    with at_most(150 * MiB), pytest.raises(GuestError, match="more than the 67108864 bytes"):
        segment.make(archive.read(initrd), len(initrd), version="6.1", arch="x86_64", lists=Lists.parse(dep), read=read)
    assert len(reads) == 5


def test_short_names_of_long_paths_do_not_multiply() -> None:
    count, deep = 300, "d/" * 1000
    names = [f"m{number}" for number in range(count)]
    lists = Lists.parse("".join(f"{name}.ko: {' '.join(f'{need}.ko' for need in names)}\n" for name in names))
    initrd = archive.read(pack([(f"{FOLDER}/{deep}{name}.ko", 0o100644, b"") for name in names]))

    with at_most(4 * DEP_LIMIT), pytest.raises(GuestError, match=r"modules\.dep of more than"):
        depmod_files(initrd, FOLDER, lists, initrd.modules_below(FOLDER), {})


def test_names_nested_in_each_other_are_indexed() -> None:
    """As deep as keys may be long, and each of them found."""
    entries = [("a" * length, length, f"m{length}") for length in range(1, LONGEST_KEY + 1)]
    found = index([*entries, ("a" * 7 + "-", 3, "side"), ("a" * 7, 1, "first")])

    assert all((priority, value) in values_of(found, key) for key, priority, value in entries)
    assert values_of(found, "a" * 7) == [(1, "first"), (7, "m7")]
    assert values_of(found, "a" * 7 + "-") == [(3, "side")]
    assert values_of(found, "b") == values_of(found, "a" * (LONGEST_KEY + 1)) == []


def values_of(found: bytes, key: str) -> list[tuple[int, str]]:
    """What an index has for a key, looked up as libkmod does (index_mm_search)."""

    def number(at: int) -> int:
        return int.from_bytes(found[at : at + 4], "big")

    offset, rest = number(8), key.encode()
    while offset:
        flags, at = offset >> 28, offset & 0x0FFFFFFF
        if flags & 8:
            prefix = found[at : found.index(0, at)]
            if not rest.startswith(prefix):
                return []
            rest, at = rest[len(prefix) :], at + len(prefix) + 1
        offset = 0
        if flags & 2:
            first, last = found[at], found[at + 1]
            if rest and first <= rest[0] <= last:
                offset = number(at + 2 + 4 * (rest[0] - first))
            at += 2 + 4 * (last - first + 1)
        if not rest:
            return list(_values(found, at)) if flags & 4 else []
        rest = rest[1:]
    return []


def _values(found: bytes, at: int) -> Iterator[tuple[int, str]]:
    count, at = int.from_bytes(found[at : at + 4], "big"), at + 4
    for _ in range(count):
        end = found.index(0, at + 4)
        yield int.from_bytes(found[at : at + 4], "big"), found[at + 4 : end].decode()
        at = end + 1


@pytest.mark.parametrize(
    "entries", [lambda: [(f"{n:04x}\x7f", 0, "x") for n in range(2000)], lambda: [("a", 0, "x" * KiB)] * 200]
)
def test_an_index_beyond_every_measure_is_refused(
    entries: Callable[[], list[tuple[str, int, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(index(entries()))
    monkeypatch.setattr(trie, "INDEX_LIMIT", whole - 1)

    with pytest.raises(GuestError, match="index of the guest's modules"):
        index(entries())
