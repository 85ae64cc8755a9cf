"""Pure parsers of inspection: partition tables, NTFS flags, unified kernels, fstab, network configuration."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path

import pytest
from tests.guest import disk_trees

from tokvm.core.units import MiB
from tokvm.guest.initrd.cpio import pack
from tokvm.guest.inspection import interfaces, ntfs, partitions, roots
from tokvm.guest.inspection.fstab import parse_fstab
from tokvm.guest.inspection.initramfs import look_inside, names_in
from tokvm.guest.inspection.kernels import initrd_names, kernel_version, same_file
from tokvm.guest.inspection.partitions import Partition, parse_table
from tokvm.guest.inspection.tree import SHORT_LIMIT
from tokvm.guest.inspection.uki import section_text, sections_of
from tokvm.guest.inspection.windows import is_hibernated


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(partitions.HEAD)


def _sfdisk(path: Path, table: str) -> bytes:
    with path.open("wb") as file:
        file.truncate(64 * MiB)
    subprocess.run(["/usr/sbin/sfdisk", "-q", str(path)], input=table, text=True, check=True)
    return _head(path)


@pytest.mark.slow
def test_a_gpt_as_sfdisk_writes_it(tmp_path: Path) -> None:
    head = _sfdisk(tmp_path / "d", "label: gpt\nsize=1MiB,type=21686148-6449-6E6F-744E-656564454649\nsize=8MiB,type=U\n,\n")
    table = parse_table(head)
    assert (table.scheme, table.bios_boot, len(table.partitions)) == ("gpt", True, 3)
    assert table.esp == Partition(2, partitions.ESP)
    assert not table.boot_code


def test_a_gpt_on_sectors_of_4096_bytes(tmp_path: Path) -> None:
    head = bytearray(_sfdisk(tmp_path / "d", "label: gpt\n,,U\n"))
    header, entry = head[512:1024], head[1024:1152]
    struct.pack_into("<Q", header, 0x48, 2)
    moved = bytes(head[:512]) + bytes(3584) + bytes(header) + bytes(3584) + bytes(entry)
    table = parse_table(moved.ljust(partitions.HEAD, b"\0"))
    assert (table.scheme, table.esp) == ("gpt", Partition(1, partitions.ESP))


def test_an_mbr_with_grub_and_an_active_partition(tmp_path: Path) -> None:
    disk = tmp_path / "d"
    disk.write_bytes(bytes(4 * MiB))
    table = parse_table(_head(disk_trees.with_mbr(disk)))
    assert (table.scheme, table.grub, table.boot_code) == ("mbr", True, True)
    assert table.partitions == (Partition(1, "83", active=True),)
    assert parse_table(_sfdisk(disk, "label: dos\n,8MiB,ef\n,8MiB\n")).esp == Partition(1, "ef")


@pytest.mark.parametrize("head", [b"", bytes(512), bytes(24576), b"\x55\xaa" * 12288])
def test_no_table_and_nonsense(head: bytes) -> None:
    assert all(len(one.kind) == 2 for one in parse_table(head).partitions)


def test_a_gpt_that_points_out_of_itself_has_no_partitions() -> None:
    head = bytearray(partitions.HEAD)
    head[510:512], head[512:520] = b"\x55\xaa", b"EFI PART"
    for fields in [(1 << 60, 128, 128), (2, 2**32 - 1, 2**32 - 1), (2, 128, 0)]:
        struct.pack_into("<QII", head, 512 + 0x48, *fields)
        assert parse_table(bytes(head)).partitions == ()


def _volume(flags: int, *, at: int = 0x58) -> bytes:
    """$Volume's record, its volume information at `at`. At 476 the flags lie under the first sector's update sequence."""
    record = bytearray(1024)
    record[:4] = b"FILE"
    struct.pack_into("<HH", record, 4, 0x30, 3)
    record[0x30:0x36] = b"\x06\x00" + flags.to_bytes(2, "little") + b"\0\0"
    struct.pack_into("<H", record, 0x14, 0x38)
    struct.pack_into("<IIBBHHHIH", record, 0x38, 0x60, at - 0x38, 0, 0, 0x18, 0, 0, 0, 0x18)
    struct.pack_into("<II8xIH", record, at, 0x70, 0x28, 12, 0x18)
    struct.pack_into("<8xBBH", record, at + 0x18, 3, 1, flags)
    struct.pack_into("<I", record, at + 0x28, 0xFFFFFFFF)
    record[510:512] = record[1022:1024] = b"\x06\x00"
    return bytes(record)


@pytest.mark.parametrize(("flags", "dirty"), [(0, False), (1, True), (0x4001, True), (0x0080, False)])
def test_ntfs_dirty_flag(flags: int, dirty: bool) -> None:
    assert ntfs.is_dirty(_volume(flags)) is dirty
    assert ntfs.is_dirty(_volume(flags, at=476)) is dirty


@pytest.mark.parametrize("record", [b"", b"FILE", b"BAAD" + bytes(1020), b"FILE" + bytes(1020), b"FILE" + b"\xff" * 1020])
def test_a_record_that_cannot_be_read_counts_as_dirty(record: bytes) -> None:
    assert ntfs.is_dirty(record)


def test_where_the_volume_record_lies_in_what_mkntfs_made(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    volume.write_bytes(bytes(8 * MiB))
    subprocess.run(["/usr/sbin/mkntfs", "-q", "-F", "-Q", str(volume)], check=True, capture_output=True)
    data = volume.read_bytes()
    place = ntfs.volume_record_place(data[:512])
    assert place is not None
    record = data[place.offset : place.offset + place.size]
    assert "$Volume".encode("utf-16-le") in record
    assert not ntfs.is_dirty(record)
    subprocess.run(["/usr/bin/ntfsfix", str(volume)], check=True, capture_output=True)
    data = volume.read_bytes()
    assert ntfs.is_dirty(data[place.offset : place.offset + place.size])


def test_a_boot_sector_that_is_no_ntfs() -> None:
    assert ntfs.volume_record_place(bytes(512)) is None
    assert ntfs.volume_record_place(b"\xeb\x52\x90NTFS    " + bytes(501)) is None
    assert ntfs.is_bitlocker(b"\xeb\x58\x90-FVE-FS-" + bytes(501))


@pytest.mark.parametrize(
    ("head", "hibernated"),
    [(b"hibr", True), (b"HIBR", True), (b"RSTR", True), (b"wake", False), (bytes(4), False), (b"", False)],
)
def test_hiberfil_holds_a_session_or_not(head: bytes, hibernated: bool) -> None:
    assert is_hibernated(head) is hibernated


def test_fstab_lines_by_name() -> None:
    text = """# comment
UUID=1-2 / ext4 defaults 0 1
/dev/sda1 /boot ext4 defaults 0 2
  /dev/mapper/vg-home\t/home xfs defaults
/dev/hdb2 /old\\040data ext3
/dev/nvme0n1p3 /fast xfs noatime 0 0
/dev/disk/by-id/x /id ext4
/dev/xvda5 none swap sw
tmpfs
"""
    lines = parse_fstab(text)
    assert [line.point for line in lines if line.by_name] == ["/boot", "/old data", "/fast", "none"]
    assert len(lines) == 7


def test_ifupdown() -> None:
    text = "auto lo eth0\niface lo inet loopback\niface eth0 inet dhcp\nallow-hotplug ens192\n"
    text += "  iface eth0:1 inet static\n#iface no\n"
    assert interfaces.chosen(interfaces.from_ifupdown(text)) == ("eth0", "ens192", "eth0:1")


def test_netplan_names_and_labels() -> None:
    text = """network:
  version: 2
  ethernets:
    ens160:
      dhcp4: true
      nameservers: {addresses: [1.1.1.1]}
    lan:
      match:
        macaddress: 00:50:56:aa:bb:cc
      set-name: lan0
    "eth1":
      addresses:
        - 10.0.0.1/24
    any:
      match: {name: "en*"}
  bridges:
    br0:
      interfaces: [ens160]
"""
    assert interfaces.chosen(interfaces.from_netplan(text)) == ("ens160", "lan0", "eth1")


def test_keyfile_networkd_and_ifcfg() -> None:
    assert interfaces.from_keyfile("[connection]\nid=x\ninterface-name=ens224\n[ipv4]\n") == ["ens224"]
    networkd = "[Match]\nName=eth0 en*\n\n[Network]\nDHCP=yes\nName=no\n"
    assert interfaces.chosen(interfaces.from_networkd(networkd)) == ("eth0",)
    files = {"ifcfg-eth0": 'DEVICE="eth0"\nONBOOT=yes\n', "ifcfg-lan": "BOOTPROTO=dhcp\n", "ifcfg-lo": "DEVICE=lo\n"}
    assert interfaces.chosen(interfaces.from_ifcfgs(files)) == ("eth0", "lan")


@pytest.mark.parametrize(
    "text", ["\n" * SHORT_LIMIT, " " * SHORT_LIMIT, "[Match]\n" * 8000, "auto " + "a " * 32_000, "a:\n" * 20_000]
)
def test_no_network_configuration_takes_long(text: str) -> None:
    began = time.process_time()
    readers = (interfaces.from_ifupdown, interfaces.from_netplan, interfaces.from_keyfile, interfaces.from_networkd)
    for read in readers:
        assert len(interfaces.chosen(read(text))) <= interfaces.NAMES_LIMIT
    parse_fstab(text)
    assert time.process_time() - began < 1


def test_names_of_modules_in_depmods_files() -> None:
    text = "kernel/drivers/block/virtio_blk.ko.xz: kernel/lib/a.ko.xz\nkernel/sound/snd-pcm.ko.zst:\nextra/x.ko\nno module\n"
    assert names_in(text) == {"virtio_blk", "snd_pcm", "x"}


def test_an_initramfs_that_is_none_says_so_and_raises_nothing() -> None:
    assert look_inside(disk_trees.initrd("virtio-blk"), "x").modules == {"virtio_blk"}
    for data in (b"", b"\0" * 100, b"MZ", b"\x1f\x8b" + bytes(50)):
        inside = look_inside(data, "/boot/initrd")
        assert (inside.modules, bool(inside.problem)) == (frozenset(), True)


def test_kernel_version_of_an_x86_image() -> None:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    image[0x600:0x640] = b"6.10.9-arch1-2 (linux@archlinux) #1 SMP".ljust(64, b"\0")
    assert kernel_version(bytes(image)) == "6.10.9-arch1-2"
    assert kernel_version(b"MZ") == ""


def test_a_menus_path_and_the_guests_path_are_the_same_file() -> None:
    assert same_file("/vmlinuz-6.1", "/boot/vmlinuz-6.1")
    assert same_file("(hd0,gpt2)/@/boot/vmlinuz-6.1", "/boot/vmlinuz-6.1")
    assert not same_file("/vmlinuz-6.1", "/boot/vmlinuz-6.10")
    assert same_file("/abc/6.1/linux", "/efi/abc/6.1/linux")
    assert not same_file("/abc/6.2/linux", "/efi/abc/6.1/linux")
    assert initrd_names("6.1")[0] == "initrd.img-6.1"


def _uki(sections: dict[str, bytes]) -> bytes:
    table, body, at = b"", b"", 0x200
    for name, content in sections.items():
        padded = content.ljust(0x200, b"\0")
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0, len(padded), at)
        body, at = body + padded, at + len(padded)
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 0, 0)
    return (header + coff + table).ljust(0x200, b"\0") + body


def test_sections_of_a_unified_kernel() -> None:
    image = _uki({".cmdline": b"root=UUID=1 quiet\n\0", ".initrd": b"0707x", ".uname": b"6.9"})
    found = sections_of(image)
    assert section_text(found, ".cmdline") == "root=UUID=1 quiet"
    assert (found[".initrd"], section_text(found, ".uname")) == (b"0707x", "6.9")
    assert ".uname" not in sections_of(image[:-0x200])
    for data in (b"", b"MZ", b"MZ" + b"\xff" * 0x80, image[:0x50]):
        assert sections_of(data) == {}


def test_btrfs_names_of_libguestfs() -> None:
    assert roots._btrfs_device("btrfsvol:/dev/sda2/@/.snapshots/1/snapshot") == "/dev/sda2"
    assert roots._btrfs_device("btrfsvol:/dev/vg/lv/@") == "/dev/vg/lv"
    assert roots._btrfs_device("/dev/sda2") == ""


def test_packed_archives_meet_the_parser() -> None:
    early = pack([("kernel/x86/microcode/x.bin", 0o100644, b"1")])
    inside = look_inside(early + bytes(-len(early) % 512) + disk_trees.initrd("nvme", "ahci"), "x")
    assert inside.modules == {"nvme", "ahci"}
    assert inside.packing == "gzip"
