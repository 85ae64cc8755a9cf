"""Targets that must be refused with not one byte written: the device's hash is the same before and after."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.core.errors import UnsafeTarget
from tokvm.core.units import KiB, MiB
from tokvm.targets import interlocks
from tokvm.targets.open import TargetSpec, open_target

pytestmark = pytest.mark.root

Sha = Callable[[str], str]
LoopMaker = Callable[..., str]
SIZE = 8 * MiB

SIGNATURES: dict[str, dict[int, bytes]] = {
    "ext4": {1080: b"\x53\xef"},
    "xfs": {0: b"XFSB"},
    "ntfs": {0: b"\xebR\x90NTFS    "},
    "btrfs": {64 * KiB + 64: b"_BHRfS_M"},
    "gpt": {512: b"EFI PART"},
    "gpt-4kn": {4096: b"EFI PART"},
    "gpt-backup-only": {-512: b"EFI PART"},
    "mbr": {510: b"\x55\xaa"},
    "swap": {4 * KiB - 10: b"SWAPSPACE2"},
    "luks": {0: b"LUKS\xba\xbe\x00\x02"},
    "bitlocker": {3: b"-FVE-FS-"},
    "lvm": {512: b"LABELONE"},
    "md-1.2": {4096: b"\xfc\x4e\x2b\xa9"},
    "md-1.0": {SIZE - 8 * KiB: b"\xfc\x4e\x2b\xa9"},
    "md-0.90": {SIZE - 64 * KiB: b"\xfc\x4e\x2b\xa9"},
    "dm-snapshot": {0: b"SnAp"},
    "qcow2": {0: b"QFI\xfb\x00\x00\x00\x03"},
    "vmdk": {0: b"KDMV\x01\x00\x00\x00"},
    "cowd": {0: b"COWD\x01\x00\x00\x00"},
    "vhdx": {0: b"vhdxfile"},
    "vhd": {0: b"conectix"},
    "vhd-footer": {-512: b"conectix"},
    "descriptor": {0: b"# Disk DescriptorFile\n"},
    "iso9660": {32 * KiB + 1: b"CD001"},
    "ceph": {0: b"bluestore block device\n"},
}


def refused(spec: TargetSpec, *, size: int = SIZE, expect: str | None = None) -> str:
    """What the refusal says."""
    with pytest.raises(UnsafeTarget) as caught:
        open_target(spec, size=size, expect=expect).close()
    assert caught.value.exit_code == 9
    assert caught.value.where.startswith(spec.path)
    assert caught.value.fix
    return caught.value.what


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.slow
def test_a_device_that_holds_something_is_refused(name: str, loop: LoopMaker, fingerprint: Sha) -> None:
    device = loop(size=SIZE, content=SIGNATURES[name])
    before = fingerprint(device)
    assert "holds something" in refused(TargetSpec(device))
    assert fingerprint(device) == before


@pytest.mark.parametrize("name", ["ext4", "qcow2"])
@pytest.mark.parametrize("confirm", [None, "", "8388607", "9M", "yes", "SERIAL-OF-ANOTHER"])
@pytest.mark.slow
def test_force_without_the_right_size_or_serial_is_refused(
    name: str, confirm: str | None, loop: LoopMaker, fingerprint: Sha
) -> None:
    device = loop(size=SIZE, content=SIGNATURES[name])
    before = fingerprint(device)
    assert "holds something" in refused(TargetSpec(device, force=True, confirm=confirm))
    assert "holds something" in refused(TargetSpec(device, confirm="8388608"))
    assert fingerprint(device) == before


@pytest.mark.parametrize("confirm", ["8388608", "8M", "8 MiB"])
def test_force_with_the_right_size_is_consent(confirm: str, loop: LoopMaker, fingerprint: Sha) -> None:
    device = loop(size=SIZE, content=SIGNATURES["ext4"])
    before = fingerprint(device)
    writer = open_target(TargetSpec(device, force=True, confirm=confirm), size=SIZE)
    assert not writer.known_zero
    writer.close()
    assert fingerprint(device) == before


@pytest.mark.slow
def test_a_real_filesystem_and_a_real_partition_table_are_refused(loop: LoopMaker, fingerprint: Sha) -> None:
    filesystem, table, swap = loop(), loop(), loop()
    subprocess.run(["mkfs.ext4", "-q", filesystem], check=True)
    subprocess.run(["sfdisk", "-q", table], input="label: gpt\n,\n", text=True, check=True)
    subprocess.run(["mkswap", swap], check=True, capture_output=True)
    for device in (filesystem, table, swap):
        before = fingerprint(device)
        assert "holds something" in refused(TargetSpec(device))
        assert fingerprint(device) == before


def test_a_mounted_device_is_refused_even_with_consent(loop: LoopMaker, fingerprint: Sha, tmp_path: Path) -> None:
    device = loop()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", "-o", "ro,noload", device, str(point)], check=True)
    try:
        before = fingerprint(device)
        assert f"mounted on {point}" in refused(TargetSpec(device, force=True, confirm=str(SIZE)))
        assert fingerprint(device) == before
    finally:
        subprocess.run(["umount", str(point)], check=True)


def _partitioned(loop: LoopMaker) -> str:
    device = loop(size=32 * MiB, options=("--partscan",))
    subprocess.run(["sfdisk", "-q", device], input="label: dos\n,8MiB\n,8MiB\n", text=True, check=True)
    subprocess.run(["partx", "--update", device], check=False, capture_output=True)
    if not Path(f"{device}p2").exists():
        pytest.skip("no partition nodes for loop devices here")
    return device


def test_a_disk_and_a_sibling_of_a_mounted_partition_are_refused(loop: LoopMaker, fingerprint: Sha, tmp_path: Path) -> None:
    device = _partitioned(loop)
    subprocess.run(["mkfs.ext4", "-q", f"{device}p1"], check=True)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", "-o", "ro,noload", f"{device}p1", str(point)], check=True)
    try:
        before = fingerprint(device)
        assert "mounted on" in refused(TargetSpec(f"{device}p1", force=True, confirm="8M"), size=MiB)
        assert "same disk" in refused(TargetSpec(f"{device}p2", force=True, confirm="8M"), size=MiB)
        assert "same disk" in refused(TargetSpec(device, force=True, confirm="32M"), size=MiB)
        assert fingerprint(device) == before
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_partitions_of_one_disk_have_identities_of_their_own(loop: LoopMaker) -> None:
    device = _partitioned(loop)
    first = open_target(TargetSpec(f"{device}p1"), size=8 * MiB)
    identity = first.identity
    first.close()
    second = open_target(TargetSpec(f"{device}p2"), size=8 * MiB)
    assert second.identity != identity
    second.close()
    assert "another target" in refused(TargetSpec(f"{device}p2"), expect=identity)


def test_swap_in_use_is_refused(loop: LoopMaker) -> None:
    device = loop()
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    if subprocess.run(["swapon", device], check=False, capture_output=True).returncode != 0:
        pytest.skip("swapon is not allowed here")
    try:
        assert "swaps on it" in refused(TargetSpec(device, force=True, confirm=str(SIZE)))
    finally:
        subprocess.run(["swapoff", device], check=True)


def test_a_device_another_process_holds_exclusively_is_refused(loop: LoopMaker, fingerprint: Sha) -> None:
    device = loop()
    before = fingerprint(device)
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert "holds it exclusively" in refused(TargetSpec(device))
    finally:
        os.close(fd)
    assert fingerprint(device) == before


def test_while_we_hold_it_nobody_else_gets_it(loop: LoopMaker) -> None:
    device = loop()
    writer = open_target(TargetSpec(device), size=SIZE)
    try:
        assert "in use" in refused(TargetSpec(device))
        assert subprocess.run(["mkfs.ext4", "-q", device], check=False, capture_output=True).returncode != 0
    finally:
        writer.close()
    open_target(TargetSpec(device), size=SIZE).close()


def _hold(path: str, code: str) -> subprocess.Popen[bytes]:
    before = "import os, fcntl, sys, struct, time\nfd = os.open(sys.argv[1], os.O_RDWR)\n"
    script = f"{before}{code}\nprint('held', flush=True)\ntime.sleep(60)\n"
    child = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "open for writing in"),
        ("fcntl.flock(fd, fcntl.LOCK_EX)", "locked it"),
        # bytes 100 and 201 are where QEMU says "I write" and "nobody else may" (block/file-posix.c)
        ("fcntl.fcntl(fd, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 100, 1, 0))", "locked parts of it"),
    ],
    ids=["writer", "flock", "ofd-lock"],
)
@pytest.mark.slow
def test_a_device_in_another_programs_hands_is_refused(
    code: str, message: str, loop: LoopMaker, fingerprint: Sha, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interlocks, "LOCK_WAIT_S", 0.3)
    device = loop()
    before = fingerprint(device)
    child = _hold(device, code)
    try:
        assert message in refused(TargetSpec(device))
    finally:
        _end(child)
    assert fingerprint(device) == before
    open_target(TargetSpec(device), size=SIZE).close()


def test_a_backing_file_under_a_second_loop_device_is_refused(loop: LoopMaker, fingerprint: Sha, tmp_path: Path) -> None:
    device = loop()
    loop(backing=tmp_path / "backing-0.img")
    before = fingerprint(device)
    assert "too" in refused(TargetSpec(device))
    assert fingerprint(device) == before


def test_a_backing_file_that_somebody_writes_is_refused(loop: LoopMaker, tmp_path: Path) -> None:
    device = loop()
    child = _hold(str(tmp_path / "backing-0.img"), "")
    try:
        assert "open for writing in" in refused(TargetSpec(device))
    finally:
        _end(child)


@pytest.mark.parametrize("missing", [1, 512, MiB])
def test_a_device_that_is_too_small_is_refused(missing: int, loop: LoopMaker, fingerprint: Sha) -> None:
    device = loop()
    before = fingerprint(device)
    assert f"{missing} too few" in refused(TargetSpec(device, force=True, confirm=str(SIZE)), size=SIZE + missing)
    assert fingerprint(device) == before


def test_a_read_only_device_is_refused(loop: LoopMaker, fingerprint: Sha) -> None:
    device = loop(options=("--read-only",))
    before = fingerprint(device)
    refused(TargetSpec(device))
    assert fingerprint(device) == before


def test_a_link_that_means_another_device_on_resume_is_refused(loop: LoopMaker, fingerprint: Sha, tmp_path: Path) -> None:
    first, second = loop(), loop()
    link = tmp_path / "by-id"
    link.symlink_to(first)
    writer = open_target(TargetSpec(str(link)), size=SIZE)
    identity = writer.identity
    writer.close()
    link.unlink()
    link.symlink_to(second)
    before = fingerprint(second)
    assert "another target" in refused(TargetSpec(str(link)), expect=identity)
    assert "another target" in refused(TargetSpec(str(link), previous=identity, force=True, confirm=str(SIZE)))
    assert fingerprint(second) == before


def test_the_device_of_the_earlier_run_may_hold_anything(loop: LoopMaker) -> None:
    device = loop()
    writer = open_target(TargetSpec(device), size=SIZE)
    identity = writer.identity
    writer.write(510, memoryview(b"\x55\xaa"))
    writer.flush()
    writer.close()
    assert "holds something" in refused(TargetSpec(device))
    open_target(TargetSpec(device), size=SIZE, expect=identity).close()


def test_a_re_attached_loop_device_over_another_file_is_refused(loop: LoopMaker, tmp_path: Path) -> None:
    device = loop(node=f"/dev/loop{1000 + os.getpid() % 30000}")  # far from where `losetup --find` looks meanwhile
    writer = open_target(TargetSpec(device), size=SIZE)
    identity = writer.identity
    writer.close()
    subprocess.run(["losetup", "-d", device], check=True)
    other = tmp_path / "other.img"
    other.write_bytes(b"\x53" * SIZE)
    subprocess.run(["losetup", device, str(other)], check=True)
    assert "another target" in refused(TargetSpec(device), expect=identity)


def test_the_hosts_root_disk_is_refused() -> None:
    number = Path("/").stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not node.exists():
        pytest.skip("the root filesystem is on no block device")
    assert "in use" in refused(TargetSpec(f"/dev/{node.resolve().name}", force=True, confirm="1G"), size=MiB)


def test_what_is_neither_file_nor_device_is_refused(tmp_path: Path) -> None:
    fifo, sock = tmp_path / "fifo", tmp_path / "sock"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        assert "directory" in refused(TargetSpec(str(tmp_path)))
        assert "fifo" in refused(TargetSpec(str(fifo)))
        assert "socket" in refused(TargetSpec(str(sock)))
        for device in ("/dev/full", "/dev/null", "/dev/zero"):
            assert "character device" in refused(TargetSpec(device, force=True))


def test_a_mistyped_device_name_does_not_become_a_file() -> None:
    for path in ("/dev/sdqq9", "/proc/sdq", "/sys/sdq"):
        assert "no such device" in refused(TargetSpec(path))
        assert not Path(path).exists()


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    assert "nowhere" in refused(TargetSpec(str(link)))
    assert not (tmp_path / "nothing").exists()


def test_a_bare_ofd_lock_struct_is_what_the_kernel_expects() -> None:
    assert struct.calcsize("hhqqi4x") == 32
