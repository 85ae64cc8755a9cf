"""Raw files as targets: which are taken, which are refused untouched, and what identity means."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import KiB, MiB
from tokvm.targets.open import TargetSpec, open_target
from tokvm.targets.probe import probe_target
from tokvm.targets.rawfile import TOKEN
from tokvm.targets.readback import ReadBack

Sha = Callable[[str], str]
SIZE = 4 * MiB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk.raw"


def refused(spec: TargetSpec, *, size: int = SIZE, expect: str | None = None) -> str:
    with pytest.raises(UnsafeTarget) as caught:
        open_target(spec, size=size, expect=expect).close()
    return str(caught.value)


def test_a_new_file_is_sparse_private_and_known_to_be_zero(disk: Path) -> None:
    writer = open_target(TargetSpec(str(disk)), size=SIZE + 512)
    assert writer.known_zero
    assert writer.size == SIZE + 512
    writer.close()
    found = disk.stat()
    assert (found.st_size, found.st_blocks, found.st_mode & 0o777) == (SIZE + 512, 0, 0o600)


def test_create_false_makes_nothing(disk: Path) -> None:
    assert "no such target" in refused(TargetSpec(str(disk), create=False))
    assert not disk.exists()


def test_a_foreign_file_is_refused_and_untouched(disk: Path, fingerprint: Sha) -> None:
    disk.write_bytes(b"letters to my mother")
    before = fingerprint(str(disk))
    assert "no run of ours made it" in refused(TargetSpec(str(disk)))
    assert "is not its size" in refused(TargetSpec(str(disk), force=True, confirm="21"))
    assert "another target" in refused(TargetSpec(str(disk)), expect="file:1:abc")
    assert fingerprint(str(disk)) == before


def test_consent_to_lose_a_file(disk: Path) -> None:
    disk.write_bytes(b"x" * 100)
    writer = open_target(TargetSpec(str(disk), force=True, confirm="100"), size=SIZE)
    assert not writer.known_zero
    writer.close()
    assert disk.stat().st_size == SIZE


def test_an_empty_file_is_taken(disk: Path) -> None:
    disk.touch()
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    assert writer.known_zero
    writer.close()


def test_the_file_of_the_earlier_run_is_taken_and_grows_but_never_shrinks(disk: Path) -> None:
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    identity = writer.identity
    writer.write(0, memoryview(b"x" * 512))
    writer.flush()
    writer.close()
    again = open_target(TargetSpec(str(disk)), size=2 * SIZE, expect=identity)
    assert (again.identity, again.size, again.known_zero) == (identity, 2 * SIZE, False)
    again.close()
    smaller = open_target(TargetSpec(str(disk)), size=SIZE, expect=identity)
    assert smaller.size == disk.stat().st_size == 2 * SIZE
    smaller.close()


def test_a_file_made_but_not_yet_written_is_taken_again(disk: Path) -> None:
    """The run died between making the file and recording its identity."""
    open_target(TargetSpec(str(disk)), size=SIZE).close()
    again = open_target(TargetSpec(str(disk)), size=SIZE)
    assert again.known_zero
    again.close()


def test_a_foreign_file_that_is_one_hole_of_another_size_is_refused(disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(SIZE + 512)
    assert "no run of ours" in refused(TargetSpec(str(disk)))


def test_a_file_that_is_one_hole_of_the_disk_s_size_is_taken(disk: Path) -> None:
    """As a run leaves it that died in making it, on a filesystem that takes no attributes."""
    with disk.open("wb") as file:
        file.truncate(SIZE)
    probe_target(TargetSpec(str(disk)), size=SIZE)
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    assert writer.known_zero
    writer.close()


@pytest.mark.parametrize("dies_in", ["setxattr", "ftruncate", "fsync"])
def test_a_file_whose_maker_died_is_taken_again(disk: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(os, dies_in, die)
        with pytest.raises(Killed):
            open_target(TargetSpec(str(disk)), size=SIZE)
    again = open_target(TargetSpec(str(disk)), size=2 * SIZE)
    assert again.known_zero
    again.close()


def test_a_copy_in_the_place_of_our_file_is_refused(disk: Path) -> None:
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    identity = writer.identity
    writer.write(0, memoryview(b"x" * 512))
    writer.close()
    shutil.move(disk, disk.with_suffix(".old"))
    shutil.copy2(disk.with_suffix(".old"), disk)
    assert "another target" in refused(TargetSpec(str(disk)), expect=identity)


def test_a_file_taken_over_by_consent_is_no_longer_the_earlier_owners(disk: Path) -> None:
    first = open_target(TargetSpec(str(disk)), size=SIZE)
    identity = first.identity
    first.write(0, memoryview(b"x" * 512))
    first.close()
    open_target(TargetSpec(str(disk), force=True), size=SIZE).close()
    assert "another target" in refused(TargetSpec(str(disk)), expect=identity)


def test_identity_without_attributes_is_inode_and_birth(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_attributes(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", no_attributes)
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    identity = writer.identity
    writer.write(0, memoryview(b"x" * 512))
    writer.close()
    assert ":born-" in identity
    assert TOKEN not in os.listxattr(disk)
    open_target(TargetSpec(str(disk)), size=SIZE, expect=identity).close()


def test_the_earlier_runs_file_gone_is_refused_and_not_made_anew(disk: Path) -> None:
    assert "is gone" in refused(TargetSpec(str(disk)), expect="file:1:abc")
    assert not disk.exists()


def test_links_are_refused(disk: Path, tmp_path: Path) -> None:
    disk.touch()
    link, hard = tmp_path / "soft", tmp_path / "hard"
    link.symlink_to(disk)
    assert "symbolic link" in refused(TargetSpec(str(link)))
    hard.hardlink_to(disk)
    assert "hard links" in refused(TargetSpec(str(disk)))


def test_a_file_locked_by_another_is_refused(disk: Path) -> None:
    disk.touch()
    with disk.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "locked" in refused(TargetSpec(str(disk)))
    open_target(TargetSpec(str(disk)), size=SIZE).close()


def test_a_file_we_hold_is_refused_to_a_second_run(disk: Path) -> None:
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    assert "locked" in refused(TargetSpec(str(disk)), expect=writer.identity)
    writer.close()


def test_qemu_and_we_exclude_each_other(disk: Path) -> None:
    """The real thing: qemu's image locking, in both directions."""
    qemu_io = shutil.which("qemu-io")
    if qemu_io is None:
        pytest.skip("qemu-io is not installed")
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    identity = writer.identity
    theirs = subprocess.run([qemu_io, "-f", "raw", "-c", "write 0 512", str(disk)], check=False, capture_output=True, text=True)
    assert theirs.returncode != 0
    assert "lock" in theirs.stderr
    writer.close()
    child = subprocess.Popen([qemu_io, "-f", "raw", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write("read 0 512\n")
        child.stdin.flush()
        while "read 512/512" not in child.stdout.readline():
            pass
        assert "locked parts of it, as QEMU does" in refused(TargetSpec(str(disk)), expect=identity)
    finally:
        child.communicate("quit\n", timeout=20)
    open_target(TargetSpec(str(disk)), size=SIZE, expect=identity).close()


@pytest.mark.root
def test_a_file_under_a_loop_device_is_refused(loop: Callable[..., str], tmp_path: Path) -> None:
    loop()
    assert "loop" in refused(TargetSpec(str(tmp_path / "backing-0.img"), force=True))


def test_a_link_flipped_while_opening_never_leads_astray(tmp_path: Path) -> None:
    """Either the file named is opened, or nothing is: a racing symlink never gets us to the other file."""
    victim, ours = tmp_path / "victim", tmp_path / "ours"
    victim.write_bytes(b"v" * 4096)
    name = tmp_path / "name"
    stop = threading.Event()

    def flip() -> None:
        turn = 0
        while not stop.is_set():
            fresh = tmp_path / "fresh"
            fresh.unlink(missing_ok=True)
            if turn % 2:
                fresh.symlink_to(victim)
            else:
                fresh.touch()
            fresh.replace(name)
            turn += 1

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(150):
            try:
                writer = open_target(TargetSpec(str(name), force=True), size=4096)
            except TargetError:
                continue
            assert os.fstat(writer.fileno()).st_ino != victim.stat().st_ino
            writer.close()
    finally:
        stop.set()
        thread.join()
    assert victim.read_bytes() == b"v" * 4096
    assert not ours.exists()


def test_read_back_for_verification_checks_the_identity(disk: Path) -> None:
    writer = open_target(TargetSpec(str(disk)), size=SIZE)
    writer.write(1000, memoryview(b"hello"))
    writer.flush()
    reader = ReadBack.open(disk, expect=writer.identity)
    assert bytes(reader.read_back(1000, 5)) == b"hello"
    assert reader.is_hole(MiB, 64 * KiB)
    assert not reader.is_hole(0, 64 * KiB)
    reader.close()
    writer.close()
    with pytest.raises(UnsafeTarget):
        ReadBack.open(disk, expect="file:1:abc")
