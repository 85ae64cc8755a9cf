"""Rehearsals that fail, end to end: real disks, a real appliance, a real journal. The source runs, and the cutover refuses.

    lab guest      GRUB, ext4, a Debian kernel, an initramfs that knows IDE alone ─► debugfs spoils a copy of it
    phony Windows  dirty, or put to sleep by Fast Startup
    no system      an empty disk, LUKS

Where nothing is booted, or it does not matter what, the domain host is one on which nobody ever lives.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from tests.app.conftest import DeafHost, Migrate
from tests.domain import conftest as domain_fixtures
from tests.domain.conftest import PrivateLibvirtd
from tests.guest import conftest as guest_fixtures
from tests.guest.disk_trees import with_mbr
from tests.guest.signing import new_signing
from tests.guest.virtio_win import make_tree

from tokvm.app.ways import Replay
from tokvm.core.units import KiB, MiB
from tokvm.domain.host import LibvirtHost
from tokvm.guest.base import Way
from tokvm.lab.boot_disk import PARTITION_OFFSET
from tokvm.lab.guest_image import GuestSettings, build_guest
from tokvm.lab.kernel import find_kernel
from tokvm.lab.programs import run_program
from tokvm.lab.windows_guest import WindowsSettings, build_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
appliance_kernel, libvirtd = guest_fixtures.appliance_kernel, domain_fixtures.libvirtd

LUKS = b"LUKS\xba\xbe\0\x01"


# ---- guests, and how they are spoiled


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that a micro-morph, or its kernel beside the VM, would make boot."""
    return build_guest(tmp_path_factory.mktemp("guests") / "guest.raw", size=96 * MiB, drivers="ide").disk


@pytest.fixture
def guest(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(pristine, tmp_path / "guest.raw"))


def debugfs(disk: Path, *commands: str) -> str:
    argv = ["debugfs", "-w", "-f", "-", f"{disk}?offset={PARTITION_OFFSET}"]
    return run_program(argv, package="e2fsprogs", input_bytes="".join(f"{one}\n" for one in commands).encode()).decode()


def free_bytes(disk: Path) -> int:
    (line,) = [one for one in debugfs(disk, "show_super_stats -h").splitlines() if one.startswith("Free blocks:")]
    return int(line.split()[-1]) * 4 * KiB


def fill(disk: Path, work: Path, *, left: int) -> None:
    """Leave `left` bytes (or the few blocks that describe the filler less) to root."""
    filler = work / "filler"
    filler.write_bytes(b"x" * (free_bytes(disk) - left))
    debugfs(disk, f"write {filler} var-log")
    assert left - 64 * KiB < free_bytes(disk) <= left


def replace_initramfs(disk: Path, work: Path, change: Callable[[bytes], bytes]) -> str:
    path, content = f"/boot/initrd.img-{find_kernel().version}", work / "initrd"
    debugfs(disk, f"dump {path} {content}")
    content.write_bytes(change(content.read_bytes()))
    debugfs(disk, f"rm {path}", f"write {content} {path}")
    return path


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def turned_round(content: bytes) -> bytes:
    return content[::-1]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("windows")
    asleep = WindowsSettings(version="win10", hibernated=True, fast_startup=True)
    made = {
        folder / "clean.raw": WindowsSettings(static_ip=True, tools="vmware"),
        folder / "dirty.raw": WindowsSettings(dirty=True),
        folder / "asleep.raw": asleep,
    }
    build_all(made)
    return {path.stem: path for path in made}


# ---- Linux


def test_a_full_boot_file_system_is_said_before_any_boot(guest: Path, migrate: Migrate, tmp_path: Path) -> None:
    fill(guest, tmp_path, left=512 * KiB)
    host = DeafHost()
    answer = migrate(host, guest).fails(way=Way.MICRO)
    assert answer.why.startswith("/boot has 512 KiB free, and a micro-morph needs ")  # inspection
    assert "; micro: /boot has " in answer.why  # the morph itself, on the overlay
    assert answer.fix.startswith("remove an old kernel in the guest, then `tokvm sync` again; or cut over by the way `kernel`")
    assert host.booted == []


@pytest.mark.nightly
def test_a_guest_with_a_full_boot_file_system_goes_by_its_kernel(guest: Path, migrate: Migrate, tmp_path: Path) -> None:
    fill(guest, tmp_path, left=512 * KiB)
    host = DeafHost(lambda plan: plan.kernel is not None)
    migration = migrate(host, guest)
    answer = migration.rehearse()
    assert (answer.works, answer.way, len(host.booted)) == (True, "kernel", 1)
    assert any("/boot has" in note and "remove an old kernel" in note for note in migration.notes.notes)
    migration.side.refuse_failed_rehearsal(forced=False)


@pytest.mark.nightly
def test_room_that_only_the_morph_itself_finds_missing_leads_to_the_next_way(
    guest: Path, migrate: Migrate, tmp_path: Path
) -> None:
    """Inspection counts what is reserved for root; the morph does not take it."""
    fill(guest, tmp_path, left=3 * MiB)
    debugfs(guest, f"set_super_value r_blocks_count {3 * MiB // (4 * KiB)}")
    host = DeafHost()
    answer = migrate(host, guest).fails()
    assert [one["way"] for one in answer.document["attempts"]] == ["micro", "kernel", "compatible"]
    assert answer.why.startswith("micro: /boot has ")
    assert "kernel: nothing proved that it lives" in answer.why
    assert "remove old kernels in the guest" in answer.fix
    assert len(host.booted) == 2


@pytest.fixture
def two_guests(guest: Path, tmp_path: Path) -> tuple[Path, Path]:
    other = tmp_path / "other.raw"
    return guest, build_guest(other, size=96 * MiB, settings=GuestSettings(name="other"), drivers="ide").disk


@pytest.mark.nightly
def test_of_several_systems_none_is_chosen(two_guests: tuple[Path, Path], migrate: Migrate) -> None:
    host = DeafHost(lambda plan: True)
    answer = migrate(host, *two_guests).fails()
    assert "2 operating systems are on the disks: /dev/sda1, /dev/sdb1" in answer.why
    assert "--root with one of: /dev/sda1 (tokvm lab guest 1), /dev/sdb1 (tokvm lab guest 1)" in answer.fix
    assert host.booted == []


@pytest.mark.nightly
def test_of_several_systems_the_one_that_was_named_goes_on(two_guests: tuple[Path, Path], migrate: Migrate) -> None:
    migration = migrate(DeafHost(lambda plan: True), *two_guests)
    answer = migration.rehearse(root="/dev/sdb1")
    assert (answer.works, answer.way, answer.document["guest"]["root"]) == (True, "micro", "/dev/sdb1")
    migration.side.refuse_failed_rehearsal(forced=False)
    assert cast(Replay, migration.side.replay()).mounts["/"] == "/dev/sdb1"


@pytest.mark.nightly
@pytest.mark.parametrize("change", [cut_in_half, turned_round])
def test_a_broken_initramfs_is_said(change: Callable[[bytes], bytes], guest: Path, migrate: Migrate, tmp_path: Path) -> None:
    replace_initramfs(guest, tmp_path, change)
    host = DeafHost()
    answer = migrate(host, guest).fails()
    assert "the initramfs of" in answer.why
    assert "rebuild it" in answer.fix
    assert answer.document["verdict"] == "boots only on compatible hardware"  # Debian's cloud kernel has NVMe built in


@pytest.mark.nightly
@pytest.mark.root
def test_a_guest_that_panics_is_taken_for_what_it_is(
    guest: Path, migrate: Migrate, tmp_path: Path, libvirtd: PrivateLibvirtd
) -> None:
    """Booted all the same, because the operator wants it so: by the real libvirt, which is left without a domain."""
    import libvirt

    replace_initramfs(guest, tmp_path, turned_round)
    host = LibvirtHost(libvirtd.uri)
    answer = migrate(host, guest).fails(way=Way.NONE)
    assert "its kernel panicked" in answer.why
    assert Path(answer.document["screenshot"]).read_bytes().startswith(b"\x89PNG")
    host.close()
    connection = libvirt.open(libvirtd.uri)
    assert connection.listAllDomains() == []
    connection.close()


# ---- Windows


@pytest.mark.nightly
def test_a_dirty_windows_volume_is_said_with_what_to_do_in_the_guest(windows: dict[str, Path], migrate: Migrate) -> None:
    host = DeafHost()
    answer = migrate(host, windows["dirty"]).fails()
    assert "the Windows volume is marked dirty" in answer.why
    assert "chkdsk C: /f" in answer.fix


@pytest.mark.nightly
def test_of_a_clean_windows_nothing_of_the_kind_is_said(windows: dict[str, Path], migrate: Migrate, tmp_path: Path) -> None:
    """Though the appliance mounts it for writing: its own mount must not be what is found."""
    tree = make_tree(tmp_path / "tree", new_signing(tmp_path / "signing"), versions=("2k22",))
    answer = migrate(DeafHost(lambda plan: True), windows["clean"]).rehearse(virtio_win=str(tree))
    assert (answer.works, answer.way, answer.fix) == (True, "micro", "")
    assert {one["severity"] for one in answer.document["findings"]} <= {"warning"}


@pytest.mark.nightly
def test_a_windows_that_fast_startup_put_to_sleep_is_said_and_not_booted(windows: dict[str, Path], migrate: Migrate) -> None:
    host = DeafHost()
    migration = migrate(host, windows["asleep"])
    answer = migration.fails()
    assert "Windows is hibernated" in answer.why
    assert "powercfg /h off" in answer.fix
    assert any("Fast Startup is on" in note for note in migration.notes.notes)
    assert host.booted == []


# ---- no system that anybody could look at


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("start", "why", "fix"),
    [
        (b"", "no operating system that libguestfs knows", "virt-filesystems"),
        (LUKS, "encrypted by LUKS", "running guest itself"),
    ],
    ids=["empty", "LUKS"],
)
def test_a_disk_without_a_system_to_look_at_is_said(start: bytes, why: str, fix: str, migrate: Migrate, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MiB) + start.ljust(MiB, b"\0"))
    if start:
        with_mbr(disk, boot_code=b"")
    host = DeafHost()
    answer = migrate(host, disk).fails()
    assert why in answer.why
    assert fix in answer.fix
    assert host.booted == []
