"""A morph's states, and what may go wrong between them: full folders, failing flushes, disks that change or are swapped."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.guest.disks import change
from tests.guest.kills import KILLED, run_child
from tests.targets.conftest import loop  # noqa: F401 - a fixture

from tokvm.app.morph import open_disk
from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import KiB, MiB
from tokvm.guest import canary, morph_store
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.engines import MorphReport, morph_disks
from tokvm.guest.morph_advice import UNMORPH, of_cutover
from tokvm.guest.morph_record import NAME, MorphRecord, MorphState
from tokvm.guest.morph_store import MorphStore, Undone
from tokvm.targets.open import TargetSpec, open_target

# The children use no thread of ours; 3.12 and later warn about forking while any thread lives.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SIZE = 2 * MiB + 1536
BETWEEN = MiB + 12 * KiB
"""Not in a cell that is looked at."""
NEW = {4096: 8192, 300 * KiB: 100 * KiB, SIZE - 512: 512}


class Place:
    """One disk, its content before, and as it shall be morphed."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.before = path.read_bytes()
        after = bytearray(self.before)
        for offset, length in NEW.items():
            after[offset : offset + length] = b"\x09" * length
        self.after = bytes(after)

    def store(self) -> MorphStore:
        return MorphStore(self.folder, [GuestDisk(str(self.path))], open_disk)

    def morphed(self) -> MorphStore:
        store = self.store()
        write_new(store.begin())
        return store

    def undo(self) -> None:
        with self.store() as store:
            store.undo()

    def committed(self) -> MorphStore:
        store = self.morphed()
        store.commit()
        return store


def write_new(disks: tuple[GuestDisk, ...]) -> None:
    change(disks[0], *(f"write -P 9 {offset} {length}" for offset, length in NEW.items()))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return Place(path, tmp_path / "morph")


def test_from_nothing_to_committed_and_back(place: Place) -> None:
    store = place.store()
    assert store.state() is MorphState.NOTHING
    assert store.undo() is Undone.NOTHING
    write_new(store.begin())
    assert store.state() is MorphState.OVERLAYS
    assert place.path.read_bytes() == place.before
    assert store.commit() == 8192 + 100 * KiB + 512 + 1024  # the last page of the disk has 1536 bytes and differs as a whole
    assert store.state() is MorphState.COMMITTED
    assert place.path.read_bytes() == place.after
    assert store.commit() == 0
    assert store.undo() is Undone.EXACT
    assert place.path.read_bytes() == place.before
    assert store.state() is MorphState.NOTHING
    assert list(place.folder.iterdir()) == []
    assert store.undo() is Undone.NOTHING


def test_an_overlay_that_nobody_used_is_committed_without_a_write(place: Place) -> None:
    store = place.store()
    store.begin()
    mtime = place.path.stat().st_mtime_ns
    assert store.commit() == 0
    assert place.path.stat().st_mtime_ns == mtime


def test_forgotten_it_cannot_be_undone(place: Place) -> None:
    store = place.committed()
    store.forget()
    assert list(place.folder.iterdir()) == []
    assert store.undo() is Undone.NOTHING
    assert place.path.read_bytes() == place.after


def test_an_earlier_morph_is_undone_before_the_next(place: Place) -> None:
    place.committed().close()
    store = place.store()
    store.begin()
    assert place.path.read_bytes() == place.before


def test_the_folder_is_private_and_for_one_at_a_time(place: Place) -> None:
    store = place.morphed()
    assert place.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.folder.iterdir()} == {0o600}
    with pytest.raises(GuestError, match="another run"):
        place.store().undo()
    store.close()
    place.folder.chmod(0o770)
    with pytest.raises(GuestError, match="not ours alone"):
        place.store().undo()


def test_half_a_morph_is_not_committed_by_another_run(place: Place) -> None:
    place.morphed().close()
    with pytest.raises(GuestError, match="broke off"):
        place.store().commit()
    assert place.path.read_bytes() == place.before


@pytest.mark.slow
def test_a_commit_that_was_killed_can_also_be_finished(place: Place) -> None:
    """From the moment on that the undo log is whole, `commit` in a new process converges as `undo` does."""
    resumed = 0
    for point in range(1, 200, 3):
        code = run_child(lambda: place.committed().close(), kill_at=point, seed=point)
        store = place.store()
        if store.state() in (MorphState.LOGGED, MorphState.COMMITTING):
            store.commit()
            resumed += 1
            assert place.path.read_bytes() == place.after
        store.undo()
        store.close()
        assert place.path.read_bytes() == place.before
        if code != KILLED:
            break
    assert code == 0
    assert resumed >= 2


def test_each_step_is_on_the_medium_before_the_next(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may take: everything that was not flushed. So no write to the disk before the log, its name and the
    record are flushed, and no record of the commit before the disk is."""
    seen: list[str] = []

    def watch(name: str) -> None:
        call = getattr(os, name)

        def watched(*args: Any) -> Any:
            target = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else Path(args[1])
            result = call(*args)
            seen.append(f"{name} {target.name}")
            return result

        monkeypatch.setattr(os, name, watched)

    store = place.morphed()
    for name in ("write", "pwrite", "fsync", "fdatasync", "replace"):
        watch(name)
    store.commit()
    kept = [one for one, before in zip(seen, ["", *seen], strict=False) if one != before]
    record = [f"write {NAME}.new", f"fsync {NAME}.new", f"replace {NAME}", "fsync morph"]
    disk = place.path.name
    assert kept[: kept.index(record[0])][-3:] == ["write disk-0.undo", "fsync disk-0.undo", "fsync morph"]
    writes = [number for number, one in enumerate(kept) if one == f"pwrite {disk}"]
    assert kept[: writes[0]][-4:] == record
    rest = kept[writes[-1] + 1 :]
    assert rest[0] == f"fdatasync {disk}"
    assert rest[-4:] == record


# ---- the disk below


def test_a_disk_that_was_written_below_the_morph_is_not_committed_to(place: Place) -> None:
    store = place.morphed()
    with place.path.open("r+b") as file:
        file.seek(BETWEEN + 5)
        file.write(b"!")
    now = place.path.read_bytes()
    with pytest.raises(GuestError, match="changed below"):
        store.commit()
    assert store.undo() is Undone.NOTHING
    assert place.path.read_bytes() == now


def test_a_write_that_left_no_mark_is_seen_where_cells_are_looked_at(place: Place) -> None:
    """As from another host, on shared storage."""
    store = place.morphed()
    found = place.path.stat()
    with place.path.open("r+b") as file:
        file.seek(canary.cell_offsets(SIZE)[-2])
        file.write(b"!")
    os.utime(place.path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(GuestError, match="changed below"):
        store.commit()


@pytest.mark.root
def test_a_device_that_was_written_below_the_morph_is_not_committed_to(loop: Callable[..., str], tmp_path: Path) -> None:  # noqa: F811
    device = Path(loop(size=SIZE))
    place = Place(device, tmp_path / "morph")
    store = place.morphed()
    target = open_target(TargetSpec(str(device), force=True, confirm=str(SIZE)), size=SIZE)
    target.write(BETWEEN, memoryview(b"!" * 512))
    target.flush()
    target.close()
    with pytest.raises(GuestError, match="changed below"):
        store.commit()


@pytest.mark.parametrize("size", [1, 511, 512, 4095, 4096, 4097, 100_000, SIZE, 1 << 44])
def test_cells_are_inside_and_at_both_ends(size: int) -> None:
    cells = canary.cell_offsets(size)
    assert cells[0] == 0
    assert cells[-1] == (size - 1) // 4096 * 4096
    assert len(cells) <= 73
    assert BETWEEN not in canary.cell_offsets(SIZE)


def test_another_file_under_the_name_gets_nothing(place: Place) -> None:
    store = place.committed()
    moved = place.path.with_name("moved")
    place.path.rename(moved)
    place.path.write_bytes(bytes(SIZE))
    vars(morph_store)["PATIENCE_S"], kept = 0.0, morph_store.PATIENCE_S
    try:
        with pytest.raises(UnsafeTarget, match="another target"):
            store.undo()
    finally:
        vars(morph_store)["PATIENCE_S"] = kept
    assert place.path.read_bytes() == bytes(SIZE)
    moved.rename(place.path)
    assert store.undo() is Undone.TOUCHED or place.path.read_bytes() == place.before
    assert place.path.read_bytes() == place.before


def test_an_undo_of_disks_that_a_guest_wrote_to_says_so(place: Place) -> None:
    """Even when the first try of it is killed: the marks of the commit are gone by then."""
    store = place.committed()
    with place.path.open("r+b") as file:
        file.seek(MiB)
        file.write(b"guest")
    with pytest.raises(GuestError, match="morphed before"):
        store.begin()
    store.close()
    assert place.path.read_bytes()[MiB : MiB + 5] == b"guest"
    point = 0
    while place.store().state() is MorphState.COMMITTED:
        point += 1
        assert run_child(place.undo, kill_at=point, seed=point) == KILLED
    assert place.store().state() is MorphState.UNDOING
    assert store.undo() is Undone.TOUCHED


def test_the_same_disk_twice_is_refused(place: Place) -> None:
    disk = GuestDisk(str(place.path))
    with pytest.raises(GuestError, match="twice"):
        MorphStore(place.folder, [disk, disk], open_disk).begin()


def test_a_qcow2_of_ours_is_morphed_and_undone_too(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    content = random.Random(3).randbytes(MiB)
    made = open_target(TargetSpec(str(path), format="qcow2"), size=MiB)
    made.write(0, memoryview(content))
    made.flush()
    made.close()
    disk = GuestDisk(str(path), "qcow2")
    store = MorphStore(tmp_path / "morph", [disk], open_disk)
    change(store.begin()[0], "write -P 9 4k 4k")
    assert store.commit() == 4096
    held = open_disk(disk, None)
    assert bytes(held.read_back(0, MiB)) == content[:4096] + b"\x09" * 4096 + content[8192:]
    held.close()
    store.undo()
    held = open_disk(disk, None)
    assert bytes(held.read_back(0, MiB)) == content
    held.close()


# ---- storage that fails


def failing(name: str, suffix: str, code: int, monkeypatch: pytest.MonkeyPatch, *, times: int = 1) -> None:
    """os.NAME fails so many times on files whose name ends so."""
    call, left = getattr(os, name), [times]

    def wrapped(fd: int, *args: Any) -> Any:
        if left[0] and str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(suffix):
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return call(fd, *args)

    monkeypatch.setattr(os, name, wrapped)


@pytest.mark.parametrize(
    ("call", "suffix"), [("write", ".undo"), ("fsync", ".undo"), ("write", ".new"), ("fsync", ".new"), ("fsync", "/morph")]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.slow
def test_a_folder_that_takes_no_more_costs_nothing(
    call: str, suffix: str, code: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.morphed()
    with monkeypatch.context() as patch:
        failing(call, suffix, code, patch)
        with pytest.raises(GuestError, match="cannot be written") as refused:
            store.commit()
    assert ("make room" in refused.value.fix) == (code == errno.ENOSPC)
    assert place.path.read_bytes() == place.before
    assert store.undo() is Undone.NOTHING


def test_a_folder_with_hardly_any_room_is_refused_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(morph_store, "ROOM", 1 << 60)
    with pytest.raises(GuestError, match="free for overlays"):
        place.store().begin()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_fails_in_the_commit_gets_its_bytes_back(call: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.morphed()
    with monkeypatch.context() as patch:
        failing(call, ".raw", errno.EIO, patch)
        with pytest.raises(TargetError, match="failed"):
            store.commit()
    assert store.state() is MorphState.COMMITTING
    assert store.undo() is Undone.EXACT
    assert place.path.read_bytes() == place.before


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_fails_in_the_undo_can_be_undone_again(call: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.committed()
    with monkeypatch.context() as patch:
        failing(call, ".raw", errno.EIO, patch)
        with pytest.raises(TargetError, match="failed"):
            store.undo()
    assert store.state() is MorphState.UNDOING
    with pytest.raises(GuestError, match="half a morph"):
        store.forget()
    with pytest.raises(GuestError, match="broke off"):
        store.commit()
    assert store.undo() is Undone.EXACT
    assert place.path.read_bytes() == place.before


@pytest.mark.parametrize("most", [1000, 512])
def test_short_writes_are_continued(most: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, write = os.pwrite, os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:most], offset))
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:most]))
        store = place.committed()
        assert place.path.read_bytes() == place.after
        assert store.undo() is Undone.EXACT
    assert place.path.read_bytes() == place.before


COMMIT = """
import sys
from pathlib import Path
from tests.guest.test_morph_store import Place
from tokvm.core.errors import TargetError
place = Place(Path(sys.argv[1]), Path(sys.argv[2]))
try:
    place.committed()
except TargetError as exc:
    print(exc)
    sys.exit(exc.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", [3, 4])  # the first two are of `begin`, the others of the commit: buffered, and O_DIRECT
def test_a_flush_that_the_kernel_fails_is_seen(when: int, place: Place) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    watched = ["-P", str(place.path), "-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={when}"]
    argv = [strace, "-f", "-qq", "-o", "/dev/null", *watched, sys.executable, "-c", COMMIT, str(place.path), str(place.folder)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is not allowed here")
    assert done.returncode == TargetError.exit_code, done.stdout + done.stderr
    assert place.store().state() is MorphState.COMMITTING
    place.store().undo()
    assert place.path.read_bytes() == place.before


# ---- records and overlays that are not as they were


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1, "state": "x", "disks": [], "touched": false}']
)
@pytest.mark.slow
def test_a_record_that_makes_no_sense_stops_everything(text: bytes, place: Place) -> None:
    store = place.committed()
    (place.folder / NAME).write_bytes(text)
    for act in (store.undo, store.begin, store.commit, store.forget):
        with pytest.raises(GuestError, match="makes no sense"):
            act()
    assert place.path.read_bytes() == place.after


def test_a_damaged_log_puts_nothing_back(place: Place) -> None:
    store = place.committed()
    log = place.folder / "disk-0.undo"
    log.write_bytes(log.read_bytes()[:-1])
    with pytest.raises(GuestError, match="ends too early"):
        store.undo()
    assert place.path.read_bytes() == place.after


def test_an_overlay_that_changed_after_its_log_was_written_is_not_committed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.morphed()
    with monkeypatch.context() as patch:
        failing("pwrite", ".raw", errno.EIO, patch)
        with pytest.raises(TargetError):
            store.commit()
    change(GuestDisk(str(place.folder / "disk-0.qcow2"), "qcow2"), "write -P 7 4096 512")
    with pytest.raises(GuestError, match="overlay changed"):
        store.commit()
    assert store.undo() is Undone.EXACT


# ---- while the last delta is still on its way


def test_an_appliance_may_wait_over_shared_disks(place: Place) -> None:
    store = place.store()
    (disk,) = store.begin(shared=True)
    with place.path.open("r+b") as file:
        file.write(b"delta")
    store.renew()
    change(disk, "write -P 9 4096 512")
    store.commit()
    assert place.path.read_bytes()[:5] == b"delta"
    assert place.path.read_bytes()[4096:4608] == b"\x09" * 512
    store.undo()
    assert place.path.read_bytes() == b"delta" + place.before[5:]


def test_what_was_written_too_early_is_not_committed(place: Place) -> None:
    store = place.store()
    (disk,) = store.begin(shared=True)
    change(disk, "write -P 9 4096 512")
    with pytest.raises(GuestError, match="before the disks were complete"):
        store.renew()


# ---- all or nothing


class Broken:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        write_new(disks)
        raise self.error


class Good:
    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        write_new(disks)
        return MorphReport(Way.MICRO, {"apply": 0.5}, warnings=("a word",))


@pytest.mark.parametrize("error", [GuestError("no"), KeyboardInterrupt(), RuntimeError("defect")])
def test_an_engine_that_fails_leaves_nothing(error: BaseException, place: Place) -> None:
    store = place.store()
    with pytest.raises(type(error)):
        morph_disks(store, Broken(error))
    assert place.path.read_bytes() == place.before
    assert MorphRecord.read(place.folder) is None


def test_an_engine_that_works_is_timed(place: Place) -> None:
    report = morph_disks(place.store(), Good())
    assert list(report.seconds) == ["prepare", "apply", "commit"]
    assert report.changed > 0
    assert report.warnings == ("a word",)
    assert place.path.read_bytes() == place.after


def test_a_second_morph_over_a_guest_that_ran_is_refused_and_undoes_nothing(place: Place) -> None:
    place.committed().close()
    with place.path.open("r+b") as disk:
        disk.seek(MiB)
        disk.write(b"\x05" * 4096)
    ran = place.path.read_bytes()

    class Never:
        def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
            raise AssertionError("begin must refuse")

    with place.store() as store, pytest.raises(GuestError, match="somebody wrote"):
        morph_disks(store, Never())
    assert place.path.read_bytes() == ran


def test_whose_morph_it_is_decides_what_to_do_about_it(place: Place) -> None:
    store = place.committed()
    assert not store.touched()
    store.close()
    with place.path.open("r+b") as disk:
        disk.write(b"\x05" * 4096)
    for advice, command in ((UNMORPH, "tokvm unmorph --forget"), (of_cutover("a1"), "tokvm rollback a1")):
        with MorphStore(place.folder, [GuestDisk(str(place.path))], open_disk, advice=advice) as store:
            assert store.touched()
            with pytest.raises(GuestError, match="somebody wrote") as refused:
                store.begin()
        assert command in refused.value.fix
