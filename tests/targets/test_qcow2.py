"""qcow2 files as targets: which are taken, which are refused untouched, what identity means, what a crash leaves."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import TargetError, UnsafeTarget, UsageError
from tokvm.core.units import KiB, MiB
from tokvm.remote import nbd
from tokvm.remote.qemu_img import create_qcow2
from tokvm.targets import qcow2
from tokvm.targets.open import TargetSpec, open_target
from tokvm.targets.probe import probe_target
from tokvm.targets.qcow2 import Qcow2File
from tokvm.targets.qcow2_header import Qcow2Header
from tokvm.targets.qcow2_readback import Qcow2ReadBack, open_read_back
from tokvm.targets.readback import ReadBack

Sha = Callable[[str], str]
SIZE = 4 * MiB
SECTOR_OF_X = memoryview(b"x" * 512)

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None, reason="needs qemu-utils")
pytest.importorskip("nbd")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def spec(path: Path | str, **more: Any) -> TargetSpec:
    return TargetSpec(str(path), format="qcow2", **more)


def refused(path: Path | str, *, size: int = SIZE, expect: str | None = None, **more: Any) -> str:
    with pytest.raises(UnsafeTarget) as caught:
        open_target(spec(path, **more), size=size, expect=expect).close()
    return str(caught.value)


def info(path: Path) -> Any:
    done = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def qemu_check(path: Path) -> int:
    return subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=False).returncode


def qemu_create(path: Path, size: int, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)], check=True)


def written(path: Path, size: int = SIZE) -> str:
    """Makes a target that holds a sector of x, closes it, and says its identity."""
    writer = open_target(spec(path), size=size)
    writer.write(MiB, SECTOR_OF_X)
    writer.flush()
    writer.close()
    return writer.identity


def test_a_new_file_is_a_small_private_clean_qcow2_known_to_be_zero(disk: Path) -> None:
    probe_target(spec(disk), size=SIZE + 512)
    assert not disk.exists()
    writer = open_target(spec(disk), size=SIZE + 512)
    assert (writer.known_zero, writer.size, writer.path) == (True, SIZE + 512, str(disk))
    writer.zero(0, SIZE)
    assert writer.known_zero
    writer.close()
    found = disk.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_blocks * 512 < MiB
    said = info(disk)
    assert (said["virtual-size"], said["cluster-size"]) == (SIZE + 512, 64 * KiB)
    details = said["format-specific"]["data"]
    assert (details["compat"], details["lazy-refcounts"], details["corrupt"]) == ("1.1", False, False)
    assert qemu_check(disk) == 0


def test_only_we_can_reach_the_socket_and_it_is_gone_after_close(disk: Path) -> None:
    writer = open_target(spec(disk), size=SIZE)
    assert isinstance(writer, Qcow2File)
    folder = Path(writer._server.socket).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    writer.close()
    writer.close()
    assert not folder.exists()


@pytest.mark.parametrize("size", [1, 511, 513, SIZE + 1])
def test_a_disk_that_is_no_whole_number_of_sectors_is_refused(disk: Path, size: int) -> None:
    assert "whole sectors" in refused(disk, size=size)
    with pytest.raises(UnsafeTarget, match="whole sectors"):
        probe_target(spec(disk), size=size)
    assert not disk.exists()


def test_a_format_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(UsageError, match="raw, qcow2"):
        TargetSpec("disk", format="vmdk")


def test_create_false_makes_nothing(disk: Path) -> None:
    assert "no such target" in refused(disk, create=False)
    assert not disk.exists()


def test_a_foreign_file_is_refused_and_untouched(disk: Path, fingerprint: Sha) -> None:
    disk.write_bytes(b"letters to my mother")
    before = (fingerprint(str(disk)), os.listxattr(disk))
    assert "no run of ours made it" in refused(disk)
    assert "is not its size" in refused(disk, force=True, confirm="21")
    assert "another target" in refused(disk, expect="qcow2:1:abc")
    with pytest.raises(UnsafeTarget, match="no run of ours"):
        probe_target(spec(disk), size=SIZE)
    assert (fingerprint(str(disk)), os.listxattr(disk)) == before


def test_a_foreign_qcow2_is_refused_and_with_consent_made_anew(disk: Path, tmp_path: Path, fingerprint: Sha) -> None:
    """Never written into: neither its content nor the backing file that it names is there afterwards."""
    backing = tmp_path / "backing.raw"
    backing.write_bytes(b"b" * SIZE)
    qemu_create(disk, SIZE, "-b", str(backing), "-F", "raw")
    before = fingerprint(str(disk))
    assert "no run of ours made it" in refused(disk)
    assert fingerprint(str(disk)) == before
    size = disk.stat().st_size
    writer = open_target(spec(disk, force=True, confirm=str(size)), size=2 * SIZE)
    assert (writer.known_zero, writer.size) == (True, 2 * SIZE)
    assert bytes(writer.read_back(0, 512)) == bytes(512)
    writer.close()
    assert "backing-filename" not in info(disk)
    assert backing.read_bytes() == b"b" * SIZE


def test_an_empty_file_is_taken(disk: Path) -> None:
    disk.touch()
    writer = open_target(spec(disk), size=SIZE)
    assert writer.known_zero
    writer.close()
    assert info(disk)["virtual-size"] == SIZE


def test_a_blank_qcow2_of_the_disk_s_size_is_taken_and_of_another_is_not(disk: Path) -> None:
    """As a run leaves it that died in making it, on a filesystem that takes no attributes."""
    qemu_create(disk, SIZE)
    assert "no run of ours" in refused(disk, size=2 * SIZE)
    probe_target(spec(disk), size=SIZE)
    open_target(spec(disk), size=SIZE).close()


def test_a_file_made_but_not_yet_written_is_taken_again_and_a_written_one_is_not(disk: Path) -> None:
    open_target(spec(disk), size=SIZE).close()
    writer = open_target(spec(disk), size=2 * SIZE)
    writer.write(0, SECTOR_OF_X)
    assert not writer.known_zero
    writer.close()
    assert "no run of ours" in refused(disk, size=2 * SIZE)


@pytest.mark.parametrize(
    "dies_in", ["os.setxattr", "os.fsync", "tokvm.targets.qcow2.create_qcow2", "tokvm.targets.qcow2.serve"]
)
def test_a_file_whose_maker_died_is_taken_again(disk: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(dies_in, die)
        with pytest.raises(Killed):
            open_target(spec(disk), size=SIZE)
    again = open_target(spec(disk), size=2 * SIZE)
    assert (again.known_zero, again.size) == (True, 2 * SIZE)
    again.close()


def test_the_file_of_the_earlier_run_is_gone_on_with_and_grows_but_never_shrinks(disk: Path) -> None:
    identity = written(disk)
    again = open_target(spec(disk), size=2 * SIZE + 512, expect=identity)
    assert (again.identity, again.size, again.known_zero) == (identity, 2 * SIZE + 512, False)
    assert bytes(again.read_back(MiB, 512)) == bytes(SECTOR_OF_X)
    again.write(2 * SIZE, SECTOR_OF_X)
    again.close()
    smaller = open_target(spec(disk), size=SIZE, expect=identity)
    assert smaller.size == info_size(disk) == 2 * SIZE + 512
    assert bytes(smaller.read_back(2 * SIZE, 512)) == bytes(SECTOR_OF_X)
    smaller.close()
    assert qemu_check(disk) == 0


def info_size(path: Path) -> int:
    """While it is served, QEMU's lock allows only to look without one."""
    done = subprocess.run(
        ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)], check=True, capture_output=True, text=True
    )
    return int(json.loads(done.stdout)["virtual-size"])


def test_an_unwritten_file_gone_on_with_is_still_known_to_be_zero(disk: Path) -> None:
    writer = open_target(spec(disk), size=SIZE)
    writer.close()
    again = open_target(spec(disk), size=SIZE, expect=writer.identity)
    assert again.known_zero
    again.close()


def test_an_image_is_never_taken_for_a_raw_disk_nor_the_other_way(disk: Path, tmp_path: Path, fingerprint: Sha) -> None:
    """The configuration changed between two passes."""
    identity = written(disk)
    before = fingerprint(str(disk))
    with pytest.raises(UnsafeTarget, match="another target"):
        open_target(TargetSpec(str(disk)), size=SIZE, expect=identity)
    assert fingerprint(str(disk)) == before
    raw = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    raw.close()
    assert "another target" in refused(tmp_path / "disk.raw", expect=raw.identity)


def test_the_earlier_runs_file_gone_is_refused_and_not_made_anew(disk: Path) -> None:
    assert "is gone" in refused(disk, expect="qcow2:1:abc")
    assert not disk.exists()


def test_a_copy_in_the_place_of_our_file_is_refused(disk: Path) -> None:
    identity = written(disk)
    shutil.move(disk, disk.with_suffix(".old"))
    shutil.copy2(disk.with_suffix(".old"), disk)
    assert "another target" in refused(disk, expect=identity)


def test_a_file_taken_over_by_consent_is_no_longer_the_earlier_owners(disk: Path) -> None:
    identity = written(disk)
    open_target(spec(disk, force=True), size=SIZE).close()
    assert "another target" in refused(disk, expect=identity)


@pytest.mark.parametrize(
    ("file_offset", "patch", "says"),
    [
        (8, struct.pack(">QI", 0x200, 11), "has a backing file"),
        (72, struct.pack(">Q", 1 << 2), "features 0x4"),
        (72, struct.pack(">Q", 1 << 1), "marked it as corrupt"),
        (60, struct.pack(">I", 1), "snapshots"),
        (32, struct.pack(">I", 2), "encrypted"),
        (20, struct.pack(">I", 21), "2^21 bytes"),
        (4, struct.pack(">I", 2), "version 2"),
        (0, b"KDMV", "no qcow2"),
    ],
    ids=["backing-file", "external-data", "corrupt", "snapshot", "encrypted", "clusters", "version-2", "other"],
)
@pytest.mark.slow
def test_our_file_with_another_header_is_kept_away_from_qemu(disk: Path, file_offset: int, patch: bytes, says: str) -> None:
    """Somebody rebased it or put a hostile header into it: QEMU would open whatever path it names."""
    identity = written(disk)
    with disk.open("r+b") as file:
        file.seek(file_offset)
        file.write(patch)
    assert says in refused(disk, expect=identity)
    with pytest.raises(UnsafeTarget, match="no longer the qcow2"):
        Qcow2ReadBack.open(disk, expect=identity)


def test_any_damage_to_a_header_is_read_or_refused_but_never_crashes(disk: Path) -> None:
    qemu_create(disk, SIZE)
    good = disk.read_bytes()
    rng = random.Random(7)
    blank = 0
    with disk.open("r+b") as file:
        for _ in range(2000):
            at = rng.randrange(4, 80)
            file.seek(0)
            file.write(good[:at] + rng.randbytes(rng.choice((1, 4, 8))) + good[at + 8 :][:64])
            file.flush()
            header = Qcow2Header.read(file.fileno())
            blank += header is not None and header.blank(file.fileno())
            file.seek(0)
            file.write(good[:200])
        file.truncate(103)
        assert Qcow2Header.read(file.fileno()) is None
    assert blank < 2000


def test_links_directories_and_fifos_are_refused(disk: Path, tmp_path: Path) -> None:
    disk.touch()
    link, hard = tmp_path / "soft", tmp_path / "hard"
    link.symlink_to(disk)
    assert "symbolic link" in refused(link)
    hard.hardlink_to(disk)
    assert "hard links" in refused(disk)
    assert "directory" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "fifo" in refused(tmp_path / "fifo")
    assert disk.stat().st_size == 0


def test_no_image_is_made_in_a_pseudo_filesystem_or_a_missing_directory(tmp_path: Path) -> None:
    for path in ("/dev/no-such-device", "/proc/disk", "/sys/disk"):
        assert "no such device" in refused(path)
        assert not Path(path).exists()
    with pytest.raises(TargetError, match="cannot be opened"):
        open_target(spec(tmp_path / "no" / "disk.qcow2"), size=SIZE)
    assert not (tmp_path / "no").exists()


def test_a_file_locked_by_another_is_refused(disk: Path) -> None:
    disk.touch()
    with disk.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "locked" in refused(disk)
    assert disk.stat().st_size == 0


def test_a_file_open_for_writing_elsewhere_is_refused(disk: Path) -> None:
    identity = written(disk)
    script = "import sys; f = open(sys.argv[1], 'r+b'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script, str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        assert "open for writing" in refused(disk, expect=identity)
        other.communicate(b"")
    open_target(spec(disk), size=SIZE, expect=identity).close()


def test_a_file_we_hold_is_refused_to_a_second_run_and_to_qemu(disk: Path) -> None:
    writer = open_target(spec(disk), size=SIZE)
    assert "locked" in refused(disk, expect=writer.identity)
    argv = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(disk)]
    theirs = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert theirs.returncode != 0
    assert "lock" in theirs.stderr
    with pytest.raises(TargetError, match="lock"):
        open_read_back(disk, expect=writer.identity)
    writer.close()


def test_a_file_that_a_vm_uses_is_refused(disk: Path) -> None:
    identity = written(disk)
    argv = ["qemu-io", "-f", "qcow2", str(disk)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vm:
        assert vm.stdin is not None
        assert vm.stdout is not None
        vm.stdin.write("read 0 512\n")
        vm.stdin.flush()
        while "read 512/512" not in vm.stdout.readline():
            pass
        assert "locked parts of it, as QEMU does" in refused(disk, expect=identity)
        vm.communicate("quit\n", timeout=20)
    open_target(spec(disk), size=SIZE, expect=identity).close()


@pytest.mark.root
def test_devices_and_files_under_devices_are_refused(loop: Callable[..., str], tmp_path: Path, fingerprint: Sha) -> None:
    device = loop(size=MiB)
    before = fingerprint(device)
    assert "this is a block device" in refused(device, force=True, confirm="1M", size=MiB)
    with pytest.raises(UnsafeTarget, match="this is a block device"):
        probe_target(spec(device, force=True, confirm="1M"), size=MiB)
    assert "loop" in refused(tmp_path / "backing-0.img", force=True)
    assert fingerprint(device) == before


def test_names_that_qemu_would_read_as_something_else_are_only_names(tmp_path: Path) -> None:
    for name in ("json:{}", "nbd:unix:x", "-f", "a,b=c d", "fat:rw:x", "ü\udcff"):
        path = tmp_path / name
        written(path)
        assert info_by_fd(path) == SIZE


def info_by_fd(path: Path) -> int:
    with path.open("rb") as file:
        header = Qcow2Header.read(file.fileno())
    assert header is not None
    assert header.peculiar == ""
    return header.size


def test_a_path_flipped_behind_our_back_leads_nowhere(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the file was opened another takes its name: QEMU writes into the one that we hold."""
    victim = tmp_path / "victim"
    qemu_create(victim, SIZE)
    before = victim.read_bytes()
    real = create_qcow2

    def flip(fd: int, *, size: int, where: str) -> None:
        disk.rename(tmp_path / "ours")
        disk.symlink_to(victim)
        real(fd, size=size, where=where)

    monkeypatch.setattr(qcow2, "create_qcow2", flip)
    writer = open_target(spec(disk), size=SIZE)
    writer.write(0, SECTOR_OF_X)
    writer.close()
    assert victim.read_bytes() == before
    assert info_by_fd(tmp_path / "ours") == SIZE


def test_a_missing_program_is_named_and_nothing_is_made(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda *_, **__: None)
        with pytest.raises(TargetError, match="qemu-utils"):
            open_target(spec(disk), size=SIZE)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "nbd", None)
        nbd._libnbd.cache_clear()
        with pytest.raises(TargetError, match="python3-libnbd"):
            probe_target(spec(disk), size=SIZE)
    assert not disk.exists()


@pytest.mark.slow
def test_read_back_for_verification_checks_identity_and_writes_nothing(disk: Path, tmp_path: Path, fingerprint: Sha) -> None:
    identity = written(disk)
    before = fingerprint(str(disk))
    reader = open_read_back(disk, expect=identity)
    assert reader.size == SIZE
    assert bytes(reader.read_back(MiB - 1, 514)) == b"\0" + bytes(SECTOR_OF_X) + b"\0"
    assert reader.is_hole(2 * MiB, MiB)
    assert not reader.is_hole(0, 2 * MiB)
    assert isinstance(reader, Qcow2ReadBack)
    with pytest.raises(TargetError):
        reader.write(0, SECTOR_OF_X)
    reader.close()
    assert fingerprint(str(disk)) == before
    with pytest.raises(UnsafeTarget):
        Qcow2ReadBack.open(disk, expect="qcow2:1:abc")
    raw = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    other = open_read_back(tmp_path / "disk.raw", expect=raw.identity)
    assert isinstance(other, ReadBack)
    other.close()
    raw.close()


def leak(path: Path) -> None:
    """A refcount of 1 for a cluster that nothing points to, as a kill in the middle of an allocation leaves it."""
    with path.open("r+b") as file:
        raw = file.read(64)
        table = struct.unpack_from(">Q", raw, 48)[0]
        file.seek(table)
        block = struct.unpack(">Q", file.read(8))[0]
        file.seek(block + 2 * 40)
        assert file.read(2) == b"\0\0"
        file.seek(block + 2 * 40)
        file.write(b"\0\1")
        file.truncate(41 * 64 * KiB)


@pytest.mark.parametrize("attributes", [True, False])
def test_what_a_crash_leaked_is_given_back(disk: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool) -> None:
    if not attributes:

        def refuse(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "setxattr", refuse)
    identity = written(disk)
    leak(disk)
    assert qemu_check(disk) == 3
    if attributes:
        os.setxattr(disk, qcow2.SERVED, b"1")
    open_target(spec(disk), size=SIZE, expect=identity).close()
    assert qemu_check(disk) == 0
    assert qcow2.SERVED not in os.listxattr(disk)


def test_a_file_that_was_closed_well_is_not_checked_again(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check reads all metadata, and the last pass happens in the downtime."""
    identity = written(disk)
    monkeypatch.setattr(qcow2, "repair_leaks", None)
    open_target(spec(disk), size=SIZE, expect=identity).close()


def test_a_damaged_image_is_not_gone_on_with(disk: Path) -> None:
    identity = written(disk)
    os.setxattr(disk, qcow2.SERVED, b"1")
    with disk.open("r+b") as file:
        file.seek(40)
        l1 = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1)
        file.write(struct.pack(">Q", (1 << 63) | (99 << 16)))  # an L2 table behind the file's end
    with pytest.raises(TargetError, match="damaged"):
        open_target(spec(disk), size=SIZE, expect=identity)
