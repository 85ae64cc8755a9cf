"""The segment holds what is absent and nothing else, and kmod finds it: against depmod, modprobe and cpio on a real kernel."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.guest.base import GuestError
from tokvm.guest.initrd import archive, module_file, segment
from tokvm.guest.initrd.archive import Archive, module_name
from tokvm.guest.initrd.cpio import pack
from tokvm.guest.initrd.index import LONGEST_KEY, index
from tokvm.guest.initrd.modules import Lists
from tokvm.guest.initrd.packing import Packing
from tokvm.guest.initrd.union import underscored
from tokvm.lab.guest_initrd import Drivers, make_initrd, modules_tree
from tokvm.lab.kernel import GuestKernel, find_kernel
from tokvm.remote import process

VIRTIO = {"virtio", "virtio_ring", "virtio_pci", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_blk", "virtio_scsi"}
ARCH = "x86_64"


def run(*argv: str, cwd: Path | None = None, input: bytes | None = None) -> str:  # noqa: A002
    return subprocess.run([process.which(argv[0]), *argv[1:]], cwd=cwd, input=input, stdout=-1, check=True).stdout.decode()


@pytest.fixture(scope="module")
def kernel() -> GuestKernel:
    return find_kernel()


@pytest.fixture(scope="module")
def lists(kernel: GuestKernel) -> Lists:
    return lists_of(kernel.modules)


def lists_of(folder: Path) -> Lists:
    dep, builtin, aliases, softdeps = (
        (folder / f"modules.{name}").read_text() for name in ("dep", "builtin", "alias", "softdep")
    )
    return Lists.parse(dep, builtin=builtin, aliases=aliases, softdeps=softdeps)


@pytest.fixture(scope="module")
def old(kernel: GuestKernel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An initramfs with drivers for IDE only, not packed."""
    return make_initrd(kernel, Path(process.which("busybox")), Drivers.IDE, tmp_path_factory.mktemp("initrd"))


def make(old: bytes, kernel: GuestKernel, lists: Lists, **other: object) -> segment.Segment | None:
    arguments: dict[str, object] = {
        "version": kernel.version,
        "arch": ARCH,
        "lists": lists,
        "read": lambda path: (kernel.modules / path).read_bytes(),
    }
    return segment.make(archive.read(old), len(old), **(arguments | other))  # type: ignore[arg-type]


def made(old: bytes, kernel: GuestKernel, lists: Lists, **other: object) -> segment.Segment:
    found = make(old, kernel, lists, **other)
    assert found is not None
    return found


def unpacked(data: bytes, folder: Path) -> Path:
    """What the kernel would make of an initramfs, by cpio(1): archive by archive, each over the one before."""
    folder.mkdir()
    for piece in archive.read(data).pieces:
        packed = data[piece.offset : piece.offset + piece.length]
        plain = gzip.decompress(packed) if piece.packing is Packing.GZIP else packed
        run("cpio", "--quiet", "-idmu", "--no-absolute-filenames", cwd=folder, input=plain)
    return folder


def test_the_modules_absent_are_added_and_only_they(old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    before = archive.read(old)
    found = made(old, kernel, lists)
    only = archive.read(found.content)

    assert set(found.added) == VIRTIO - set(before.module_files) - lists.builtin
    assert set(only.module_files) == set(found.added)
    assert "virtio_net" not in only.module_files
    assert [name for name in only.members if before.members.get(name) and only.members[name].is_directory] == []
    assert archive.modules_in(found.applied(old)) == archive.modules_in(old) | set(found.added)


def test_the_same_input_gives_the_same_bytes(old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    first, second = (made(old, kernel, lists) for _ in range(2))

    assert first == second
    assert first.content[4:8] == bytes(4)  # gzip's mtime
    assert first.offset % 4 == 0


def test_an_initramfs_that_was_extended_has_all_it_needs(old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    applied = made(old, kernel, lists).applied(old)

    assert make(applied, kernel, lists) is None


def test_modules_stay_byte_identical(old: bytes, kernel: GuestKernel, lists: Lists, tmp_path: Path) -> None:
    root = unpacked(made(old, kernel, lists).applied(old), tmp_path / "root")

    for name in VIRTIO - lists.builtin:
        path = lists.path(name)
        assert (root / "lib/modules" / kernel.version / path).read_bytes() == (kernel.modules / path).read_bytes()


def test_modprobe_finds_the_new_modules_by_name_and_by_alias(
    old: bytes, kernel: GuestKernel, lists: Lists, tmp_path: Path
) -> None:
    """modprobe reads the binary indexes. The aliases are what the kernel shows for a virtio disk and a virtio PCI device."""
    root = unpacked(made(old, kernel, lists).applied(old), tmp_path / "root")

    for alias, expected in (
        ("virtio_blk", {"virtio", "virtio_ring", "virtio_blk"}),
        ("virtio:d00000002v00001AF4", {"virtio", "virtio_ring", "virtio_blk"}),
        ("virtio:d00000008v00001AF4", {"virtio", "virtio_ring", "virtio_scsi", "scsi_mod", "scsi_common"}),
        ("pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00", VIRTIO - {"virtio_blk", "virtio_scsi"}),
        ("ata_piix", {"ata_piix", "libata", "scsi_mod", "scsi_common"}),
    ):
        said = run("modprobe", "-d", str(root), "-S", kernel.version, "-D", alias)
        assert {
            module_name(line.split()[1]) for line in said.splitlines() if line.startswith("insmod")
        } == expected - lists.builtin


def test_the_lists_are_those_that_depmod_would_write(old: bytes, kernel: GuestKernel, lists: Lists, tmp_path: Path) -> None:
    root = unpacked(made(old, kernel, lists).applied(old), tmp_path / "root")
    folder = root / "lib/modules" / kernel.version
    ours = both_lists(folder)

    run("depmod", "-b", str(root), kernel.version)

    assert ours == both_lists(folder)


def both_lists(folder: Path) -> tuple[dict[str, set[str]], set[str]]:
    """modules.dep and modules.alias; the order of what a module needs is depmod's whim."""
    dep = dict(line.split(":") for line in (folder / "modules.dep").read_text().splitlines())
    return {path: set(needs.split()) for path, needs in dep.items()}, set((folder / "modules.alias").read_text().splitlines())


def test_the_binary_indexes_are_depmods_byte_for_byte(kernel: GuestKernel) -> None:
    dep = (kernel.modules / "modules.dep").read_text().splitlines()
    order = {module_name(line.partition(":")[0]): number for number, line in enumerate(dep)}
    aliases = [
        line.split() for line in (kernel.modules / "modules.alias").read_text().splitlines() if line.startswith("alias ")
    ]

    assert (
        index((name, number, dep[number]) for name, number in order.items())
        == (kernel.modules / "modules.dep.bin").read_bytes()
    )
    assert (
        index((underscored(alias), order[name], name) for _, alias, name in aliases)
        == (kernel.modules / "modules.alias.bin").read_bytes()
    )


@pytest.mark.parametrize("key", ["a" * (LONGEST_KEY + 1), "modül"])
def test_a_key_that_no_module_has_is_refused(key: str) -> None:
    with pytest.raises(GuestError, match="depmod would not write"):
        index([(key, 0, "x")])


def test_initramfs_tools_list_of_modules_is_extended(old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    before, after = (
        archive.read(old).text("conf/modules"),
        archive.read(made(old, kernel, lists).applied(old)).text("conf/modules"),
    )

    assert before is not None
    assert after == before + "".join(f"{name}\n" for name in ("virtio_pci", "virtio_blk", "virtio_scsi") if name in lists.files)


def packed_modules(kernel: GuestKernel, folder: Path, packer: Callable[[bytes], bytes], suffix: str) -> Lists:
    """The lab's kernel as a distribution that packs modules has it."""
    tree = modules_tree(kernel, ("virtio_blk", "virtio_scsi", "virtio_pci", "sd_mod", "ata_piix"), folder)
    for file in list(tree.rglob("*.ko")):
        file.with_name(file.name + suffix).write_bytes(packer(file.read_bytes()))
        file.unlink()
    texts = {name: (tree / name).read_text() for name in ("modules.dep", "modules.alias", "modules.builtin")}
    dep = texts["modules.dep"].replace(".ko", f".ko{suffix}")
    return Lists.parse(dep, builtin=texts["modules.builtin"], aliases=texts["modules.alias"])


def by_zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=-1, check=True).stdout


@pytest.mark.parametrize(("suffix", "packer"), [(".xz", lzma.compress), (".gz", gzip.compress), (".zst", by_zstd)])
@pytest.mark.slow
def test_packed_modules_are_as_those_in_the_initramfs_are(
    suffix: str, packer: Callable[[bytes], bytes], old: bytes, kernel: GuestKernel, tmp_path: Path
) -> None:
    """Unpacked beside unpacked ones (that modprobe may know no other), packed beside packed ones."""
    lists = packed_modules(kernel, tmp_path, packer, suffix)
    folder = tmp_path / "lib/modules" / kernel.version

    def read(path: str) -> bytes:
        return (folder / path).read_bytes()

    unpacked_too = archive.read(made(old, kernel, lists, read=read).content)
    name = f"lib/modules/{kernel.version}/kernel/drivers/ata/ata_piix.ko{suffix}"
    packed_ones = pack([(name, 0o100644, b"-"), ("lib", 0o040755, b"")])
    packed_too = archive.read(made(packed_ones, kernel, lists, read=read).content)

    assert all(path.endswith(".ko") for path in unpacked_too.module_files.values())
    assert unpacked_too.members[unpacked_too.module_files["virtio_blk"]].size == (
        (kernel.modules / "kernel/drivers/block/virtio_blk.ko").stat().st_size
    )
    assert all(path.endswith(f".ko{suffix}") for path in packed_too.module_files.values())


@pytest.mark.parametrize("packing", ["gzip", "lz4", "zstd"])
@pytest.mark.slow
def test_it_is_appended_as_the_kernel_can_unpack_it(packing: str, old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    """lz4 takes whatever follows for more of it, so the segment is lz4, with no byte in between."""
    argv = {"gzip": ["gzip", "-c"], "lz4": ["lz4", "-lqc"], "zstd": ["zstd", "-qc"]}[packing]
    packed = subprocess.run(argv, input=old[:-3], stdout=-1, check=True).stdout  # of a length that is no multiple of 4
    found = made(packed, kernel, lists)
    whole = archive.read(found.applied(packed))

    assert [str(piece.packing) for piece in whole.pieces] == [packing, "lz4" if packing == "lz4" else "gzip"]
    assert found.offset == (len(packed) if packing == "lz4" else len(packed) + -len(packed) % 4)
    assert set(whole.module_files) >= VIRTIO - lists.builtin
    if packing == "lz4":
        both = subprocess.run(["lz4", "-dqc"], input=found.applied(packed), stdout=-1, check=True).stdout
        assert both.index(b"070701", len(old) - 3) % 4 == 0


def test_a_link_is_never_replaced_by_a_folder(kernel: GuestKernel, lists: Lists) -> None:
    """/lib → usr/lib, and no module in it so far."""
    bare = pack([("usr", 0o040755, b""), ("usr/lib", 0o040755, b""), ("lib", 0o120777, b"usr/lib")])
    only = archive.read(made(bare, kernel, lists).content)

    assert f"usr/lib/modules/{kernel.version}" in only.members
    assert {"lib", "usr", "usr/lib"}.isdisjoint(only.members)


def module(kernel: GuestKernel) -> bytes:
    return (kernel.modules / "kernel/drivers/block/virtio_blk.ko").read_bytes()


def test_a_module_of_another_kernel_or_cpu_is_refused(kernel: GuestKernel) -> None:
    elf = module(kernel)
    module_file.check(elf, version=kernel.version, arch=ARCH, where="m.ko")

    with pytest.raises(GuestError, match="another kernel"):
        module_file.check(elf, version=kernel.version[:-1], arch=ARCH, where="m.ko")
    with pytest.raises(GuestError, match="machine 62"):
        module_file.check(elf, version=kernel.version, arch="aarch64", where="m.ko")
    for junk in (b"", b"\x7fELF", b"#!/bin/sh"):
        with pytest.raises(GuestError, match="ELF"):
            module_file.check(junk, version=kernel.version, arch=ARCH, where="m.ko")


def test_a_module_that_unpacks_to_gigabytes_is_refused() -> None:
    with pytest.raises(GuestError, match="beyond every measure"):
        module_file.unpack(gzip.compress(bytes(20 << 20)), "m.ko.gz")


def with_dep(lists: Lists, **files: tuple[str, tuple[str, ...]]) -> Lists:
    return dataclasses.replace(lists, files={**lists.files, **files})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lists: dataclasses.replace(lists, files={}, builtin=frozenset()), "no virtio drivers"),
        (lambda lists: with_dep(lists, virtio_blk=("kernel/virtio_blk.ko", ("kernel/absent.ko",))), "needs absent"),
    ],
)
def test_lists_that_do_not_lead_to_virtio_are_refused(
    change: Callable[[Lists], Lists], said: str, old: bytes, kernel: GuestKernel, lists: Lists
) -> None:
    with pytest.raises(GuestError, match=said):
        make(old, kernel, change(lists))


def test_lines_that_leave_the_folder_of_modules_are_not_followed() -> None:
    lists = Lists.parse("../../etc/x.ko:\n/etc/y.ko:\nkernel/a.ko: ../b.ko\nkernel/c.ko.xz: kernel/d.ko\nnonsense\n")

    assert set(lists.files) == {"c"}


def test_what_a_module_softly_needs_comes_with_it() -> None:
    dep = "".join(f"k/{name}.ko:\n" for name in ("virtio_pci", "virtio_blk", "virtio_scsi", "crct10dif_generic", "other"))
    dep += "k/sd_mod.ko: k/crc_t10dif.ko\nk/crc_t10dif.ko:\n"
    softdeps = "softdep crc_t10dif pre: crct10dif\nsoftdep other pre: absent\n"
    lists = Lists.parse(dep, aliases="alias crct10dif crct10dif_generic\nalias x other\n", softdeps=softdeps)

    assert lists.missing(["virtio_pci"]) == ("crc_t10dif", "crct10dif_generic", "sd_mod", "virtio_blk", "virtio_scsi")


def test_modules_needing_each_other_in_a_ring_end() -> None:
    lists = Lists.parse("k/virtio_pci.ko: k/virtio_blk.ko\nk/virtio_blk.ko: k/virtio_pci.ko\n")

    assert lists.missing([]) == ("virtio_blk", "virtio_pci")


def test_built_in_drivers_need_no_segment() -> None:
    lists = Lists.parse("", builtin="k/virtio_pci.ko\nk/virtio_blk.ko\n")

    assert lists.missing([]) == ()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("lib/modules/other/k/a.ko", 0o100644, b"")], "not in one folder"),
        ([("lib", 0o040755, b""), ("squash-root.img", 0o100644, b"")], "squashfs"),
    ],
)
def test_an_initramfs_of_another_make_is_refused(
    entries: list[tuple[str, int, bytes]], said: str, kernel: GuestKernel, lists: Lists
) -> None:
    with pytest.raises(GuestError, match=said):
        make(pack(entries), kernel, lists)


def test_zeros_behind_lz4_are_refused(old: bytes, kernel: GuestKernel, lists: Lists) -> None:
    packed = subprocess.run(["lz4", "-lqc"], input=old, stdout=-1, check=True).stdout

    with pytest.raises(GuestError, match="behind the lz4 archive"):
        make(packed + bytes(4), kernel, lists)


@pytest.mark.skipif(shutil.which("lsinitramfs") is None, reason="initramfs-tools-core is not installed")
def test_lsinitramfs_lists_the_same_names(old: bytes, tmp_path: Path) -> None:
    file = tmp_path / "initrd"
    file.write_bytes(gzip.compress(old))
    found: Archive = archive.read(file.read_bytes())

    assert set(run("lsinitramfs", str(file)).split()) == set(found.members)
