"""An initramfs is read as the kernel reads it: against what cpio, zstd, xz, lz4 and others made; and never believed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokvm.core.units import MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd import archive
from tokvm.guest.initrd.cpio import pack
from tokvm.guest.initrd.packing import Packing
from tokvm.guest.initrd.stream import Budget

FOLDER = "lib/modules/6.1.0-9/kernel"
MODULES = ("virtio_blk.ko", "virtio-pci.ko.xz", "sd_mod.ko.zst", "ext4.ko.gz")
NAMES = frozenset({"virtio_blk", "virtio_pci", "sd_mod", "ext4"})


def by_program(*argv: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(argv, input=data, stdout=subprocess.PIPE, check=True).stdout


PACKERS: dict[Packing, Callable[[bytes], bytes]] = {
    Packing.NONE: bytes,
    Packing.GZIP: gzip.compress,
    Packing.XZ: by_program("xz", "--check=crc32", "-c"),
    Packing.LZMA: by_program("xz", "--format=lzma", "-c"),
    Packing.BZIP2: bz2.compress,
    Packing.ZSTD: by_program("zstd", "-qc"),
    Packing.LZ4: by_program("lz4", "-lqc"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / FOLDER).mkdir(parents=True)
    for number, name in enumerate(MODULES):
        (root / FOLDER / name).write_bytes(os.urandom(1000 * number + 1))
    (root / "lib/modules/6.1.0-9/modules.dep").write_text("kernel/virtio_blk.ko:\n")
    (root / "conf").mkdir()
    (root / "conf/modules").write_text("ext4\n")
    (root / "bin").symlink_to("usr/bin")
    (root / "zeros").write_bytes(bytes(3 * MiB))
    return root


@pytest.fixture(scope="module")
def by_cpio(tree: Path) -> bytes:
    """The tree, packed by cpio(1) as mkinitramfs and dracut do."""
    names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    argv = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
    return subprocess.run(argv, cwd=tree, input=names, stdout=subprocess.PIPE, check=True).stdout


MICROCODE = pack([("kernel/x86/microcode/GenuineIntel.bin", 0o100644, b"\x01" * 5001)])


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.slow
def test_the_modules_are_found_however_it_is_packed_and_whatever_lies_around_it(packing: Packing, by_cpio: bytes) -> None:
    packed = PACKERS[packing](by_cpio)
    early = MICROCODE + bytes(-len(MICROCODE) % 512)
    late = gzip.compress(pack([(f"{FOLDER}/nvme.ko", 0o100644, b"x")]))

    assert archive.modules_in(packed) == NAMES
    assert archive.modules_in(early + packed) == NAMES
    whole = archive.read(early + packed + bytes(-len(packed) % 4 + 4) + late + bytes(700))

    assert frozenset(whole.module_files) == {*NAMES, "nvme"}
    assert whole.packing is packing
    assert [piece.packing for piece in whole.pieces] == [Packing.NONE, packing, Packing.GZIP]
    assert whole.end == len(early) + len(packed) + (-len(packed) % 4 + 4) + len(late)
    assert whole.text("conf/modules") == "ext4\n"
    assert whole.text("lib/modules/6.1.0-9/modules.dep") == "kernel/virtio_blk.ko:\n"
    assert whole.members["bin"].mode & 0o170000 == 0o120000


def test_names_and_sizes_are_those_that_cpio_lists(by_cpio: bytes) -> None:
    listed = subprocess.run(["cpio", "--quiet", "-t"], input=by_cpio, stdout=subprocess.PIPE, check=True).stdout.decode()

    assert set(archive.read(by_cpio).members) == set(listed.split())


def test_what_is_packed_here_cpio_unpacks(tmp_path: Path) -> None:
    packed = pack([("a", 0o040755, b""), ("a/b", 0o100644, b"12345"), ("a/c", 0o100600, b"")])

    subprocess.run(["cpio", "--quiet", "-idm"], cwd=tmp_path, input=packed, check=True)

    assert (tmp_path / "a/b").read_bytes() == b"12345"
    assert (tmp_path / "a/c").read_bytes() == b""


def test_a_later_member_replaces_an_earlier_one() -> None:
    first, second = (pack([("conf/modules", 0o100644, text)]) for text in (b"one\n", b"two\n"))

    assert archive.read(first + second).text("conf/modules") == "two\n"


def test_several_archives_in_one_packed_run_are_all_read() -> None:
    """Appended lz4 is one run with what it is appended to; cpio pads archives to 512."""
    both = pack([("m/modules/a.ko", 0o100644, b"")]) + bytes(512) + pack([("m/modules/b.ko", 0o100644, b"")]) + bytes(300)

    assert archive.modules_in(gzip.compress(both)) == {"a", "b"}


def raw(name: bytes = b"a\0", **fields: int) -> bytes:
    """A header of chosen fields, and the name."""
    values = dict.fromkeys(("ino", "mode", "uid", "gid", "nlink", "mtime", "size", "a", "b", "c", "d", "namesize", "check"), 0)
    values |= {"mode": 0o100644, "namesize": len(name), **fields}
    return b"070701" + b"".join(b"%08x" % value for value in values.values()) + name


GOOD = pack([("a", 0o100644, b"12345")])
HOSTILE = {
    "empty": b"",
    "only zeros": bytes(5000),
    "no archive": b"#!/bin/sh\n",
    "cut header": GOOD[:60],
    "cut name": GOOD[:111],
    "cut content": raw(size=100),
    "content of 4 GiB": raw(size=0xFFFFFFFF),
    "no trailer": GOOD[:120],
    "name of nothing": raw(b"", namesize=0),
    "name of 4 GiB": raw(namesize=0xFFFFFFFF),
    "name without an end": raw(b"abcd") + bytes(200),
    "sign in a number": GOOD.replace(b"00000005", b"+0000005", 1),
    "space in a number": GOOD.replace(b"00000005", b"0000 005", 1),
    "off the multiple of four": GOOD + bytes(2) + GOOD,
    "junk behind": GOOD + b"junk",
    "gzip cut": gzip.compress(GOOD)[:-9],
    "gzip damaged": gzip.compress(GOOD)[:20] + b"\xff" * 20,
    "gzip of junk": gzip.compress(b"junk" * 100),
    "gzip of nothing": gzip.compress(b""),
    "xz cut": lzma.compress(GOOD)[:-20],
    "bzip2 cut": bz2.compress(GOOD)[:-5],
    "lzma with 4 GiB of dictionary": b"\x5d\0\0\0\xff" + b"\xff" * 8 + bytes(100),
    "zstd cut": PACKERS[Packing.ZSTD](GOOD)[:-5],
    "zstd damaged": PACKERS[Packing.ZSTD](GOOD * 100)[:30] + bytes(30),
    "zstd of a reserved block": b"\x28\xb5\x2f\xfd\x20\x05" + b"\x07\0\0" + bytes(9),
    "lz4 cut": PACKERS[Packing.LZ4](GOOD)[:-5],
    "lz4 of a huge block": b"\x02\x21\x4c\x18\xff\xff\xff\x7f" + bytes(100),
    "lzo": b"\x89LZO\0\x0d\x0a\x1a\x0a" + bytes(100),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_damaged_or_hostile_is_refused_with_the_place(data: bytes) -> None:
    with pytest.raises(GuestError) as caught:
        archive.read(data)

    assert "@0x" in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("unpacked", gzip.compress(raw(size=39 * MiB) + bytes(39 * MiB), 1)),
        ("members", gzip.compress(pack([(f"{i}", 0o100644, b"") for i in range(300)]))),
        ("names", gzip.compress(pack([("n" * 4000, 0o100644, b"")] * 30))),
        ("kept", gzip.compress(pack([("x/modules/modules.dep", 0o100644, bytes(100_000))] * 3))),
        ("archives", GOOD * 20),
    ],
)
def test_a_bomb_meets_its_limit(field: str, data: bytes) -> None:
    small = Budget(unpacked=8 * MiB, members=200, names=100_000, kept=250_000, archives=15)

    with pytest.raises(GuestError, match=rf"beyond every measure.*\({field}\)"):
        archive.read(data, budget=small)


def test_a_kept_file_is_bounded_before_it_is_read() -> None:
    with pytest.raises(GuestError, match="has 2000000000 bytes"):
        archive.read(raw(b"x/modules/modules.dep\0", size=2_000_000_000) + bytes(100))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.sampled_from([bytes, gzip.compress, zlib.compress]))
@pytest.mark.slow
def test_any_bytes_are_read_or_refused(noise: bytes, at: int, packer: Callable[[bytes], bytes]) -> None:
    data = bytearray(GOOD + bytes(12) + GOOD)
    data[at : at + len(noise)] = noise

    candidates = (packer(bytes(data)), noise, b"070701" + noise, b"\x28\xb5\x2f\xfd" + noise, b"\x02\x21\x4c\x18" + noise)
    refusals = [refusal(candidate) for candidate in candidates]

    assert all("@0x" in refused for refused in refusals if refused)


def refusal(data: bytes) -> str:
    """Where it was refused; "" when it was not."""
    try:
        archive.read(data, budget=Budget(unpacked=MiB))
    except GuestError as refused:
        return refused.where
    return ""


NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20).filter(
    lambda name: name not in {"TRAILER!!!", "."}
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NAME, st.binary(max_size=40)), max_size=8), st.integers(0, 9))
@pytest.mark.slow
def test_what_is_packed_is_read_back(entries: Iterable[tuple[str, bytes]], zeros: int) -> None:
    packed = pack([(name, 0o100644, content) for name, content in entries])

    read = archive.read(packed + bytes(4 * zeros) + gzip.compress(packed))

    assert {name: member.size for name, member in read.members.items()} == {name: len(content) for name, content in entries}
