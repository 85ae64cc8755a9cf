"""Reading frozen layers: which files, checked how, what a lock is told as, and that a change under us is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.sources.esx_double import CID, DIR, KEY, MOUNT, SIZE, VM, FakeEsx, connect

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ImageError, SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.core.units import GiB, MiB
from tokvm.sources.vmware import disks, snapshots
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.source import EsxSource
from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat

DISK = Disk(0, KEY, SIZE, device="scsi0:0")
A, B, C = (bytes([value]) * 4096 for value in b"abc")
LOCKED = f"{DIR}/web-flat.vmdk"


class Frozen:
    """web (A at 0, A at 8 MiB), then web-000001 (B at 0), then web-000002 (C at 4 MiB), then the one that the VM writes, which
    does not exist here: nobody may open it."""

    def __init__(self, folder: Path, *, clone_base: bool = False) -> None:
        self.host = FakeEsx(folder)
        self.source: EsxSource = connect(self.host, clone_base=clone_base)
        self.server = self.host.sftp_server
        self.host.write_base([(0, A), (8 * MiB, A), (SIZE - 512, b"z" * 512)])
        self.host.write_delta("web-000001.vmdk", "web.vmdk", [(0, B)])
        self.host.write_delta("web-000002.vmdk", "web-000001.vmdk", [(4 * MiB, C)])
        self.marks = [self._freeze(number) for number in (1, 2, 3)]

    def _freeze(self, number: int) -> Snapshot:
        uid = self.host.freeze(f"tokvm-ab12-{number}")
        return Snapshot(f"{VM}/{uid}", f"tokvm-ab12-{number}", {})

    def open(self, at: int, since: int | None = None) -> DiskReader:
        return self.source.open_disk(DISK, self.marks[at], None if since is None else self.marks[since])

    def read(self, at: int, since: int | None = None) -> dict[int, bytes]:
        reader = self.open(at, since)
        try:
            return contents(reader)
        finally:
            reader.close()


def contents(reader: DiskReader) -> dict[int, bytes]:
    """Offset → the first byte of each piece of 4 KiB below the last one that is DATA and not zero."""
    found: dict[int, bytes] = {}
    for chunk in reader.chunks():
        data = b"" if chunk.data is None else bytes(chunk.data)
        found |= {chunk.offset + at: data[at : at + 1] for at in range(0, len(data), 4096) if any(data[at : at + 4096])}
        chunk.release()
    found.pop(SIZE - 4096, None)
    return found


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    monkeypatch.setattr(snapshots, "POLL_S", 0.01)
    monkeypatch.setattr(disks, "SETTLE_S", 0.1)
    return Frozen(tmp_path)


@pytest.mark.slow
def test_a_base_is_all_layers_up_to_the_snapshot(frozen: Frozen) -> None:
    assert frozen.read(0) == {0: b"a", 8 * MiB: b"a"}
    assert frozen.read(1) == {0: b"b", 8 * MiB: b"a"}
    assert frozen.read(2) == {0: b"b", 8 * MiB: b"a", 4 * MiB: b"c"}
    assert frozen.server.handles == []


def test_a_delta_is_the_layers_in_between(frozen: Frozen) -> None:
    assert frozen.read(1, 0) == {0: b"b"}
    assert frozen.read(2, 1) == {4 * MiB: b"c"}
    assert frozen.read(2, 0) == {0: b"b", 4 * MiB: b"c"}
    assert frozen.server.handles == []


def test_a_delta_does_not_open_the_base_itself(frozen: Frozen) -> None:
    frozen.server.locked.add(LOCKED)
    assert frozen.read(1, 0) == {0: b"b"}


def test_what_the_vm_writes_is_never_opened(frozen: Frozen) -> None:
    frozen.read(2)
    frozen.read(2, 0)
    assert not [path for path in frozen.server.opened if "000003" in path]
    assert {path.rpartition("/")[2] for path in frozen.server.opened} == {
        "web.vmdk", "web-flat.vmdk", "web-000001.vmdk", "web-000001-sesparse.vmdk", "web-000002.vmdk",
        "web-000002-sesparse.vmdk",
    }  # fmt: skip


def test_layers_with_one_cid_are_told_apart_by_file_name(frozen: Frozen) -> None:
    """A running VM's layers all bear the base's CID: who went by it would read the wrong layer, or lose one."""
    frozen.host.write_delta("web-000002.vmdk", "web.vmdk", [(4 * MiB, C)])
    with pytest.raises(ImageError, match="parentFileNameHint"):
        frozen.open(2)
    with pytest.raises(ImageError, match="parentFileNameHint"):
        frozen.open(2, 1)
    assert frozen.server.handles == []


def test_a_layer_of_another_disk_is_refused_by_its_cid(frozen: Frozen) -> None:
    write_sesparse(
        frozen.host.folder / "web-000001.vmdk", size=SIZE, runs=[(0, B)],
        identity=Identity(cid=CID, parent_cid=CID + 1, parent_hint="web.vmdk"),
    )  # fmt: skip
    for since in (None, 0):
        with pytest.raises(ImageError, match="made over"):
            frozen.open(1, since)


def test_a_hint_may_be_a_whole_path(frozen: Frozen) -> None:
    for hint in (f"{MOUNT}/web/web.vmdk", "/vmfs/volumes/Store [1]/web/web.vmdk"):
        frozen.host.write_delta("web-000001.vmdk", hint, [(0, B)])
        assert frozen.read(1, 0) == {0: b"b"}


@pytest.mark.parametrize("hint", ["/etc/passwd", "../other/web.vmdk", f"{MOUNT}/other/web.vmdk", "web-000001.vmdk"])
def test_a_hint_that_leads_elsewhere_is_refused_and_not_followed(frozen: Frozen, hint: str) -> None:
    frozen.host.write_delta("web-000001.vmdk", hint, [(0, B)])
    with pytest.raises((ImageError, SourceError)):
        frozen.open(1)
    assert not [path for path in frozen.server.opened if "other" in path or "etc" in path]


@pytest.mark.parametrize("name", ["other-flat.vmdk", "web.vmx", "web-flat.vmdk.bak", "webx-flat.vmdk"])
@pytest.mark.slow
def test_an_extent_of_another_name_is_not_opened(frozen: Frozen, name: str) -> None:
    path = frozen.host.folder / "web.vmdk"
    path.write_bytes(path.read_bytes().replace(b"web-flat.vmdk", name.encode()))
    (frozen.host.folder / name).write_bytes(b"secret" * SIZE)
    with pytest.raises(ImageError, match="not given"):
        frozen.open(0)
    assert not [opened for opened in frozen.server.opened if opened.endswith(name)]


def test_a_base_whose_last_sector_cannot_be_read_is_refused_before_the_first_byte(frozen: Frozen) -> None:
    """The descriptor and the first sector read well: only the end tells."""

    def fails(path: str, offset: int) -> None:
        if path == LOCKED and offset >= SIZE - 512:
            raise ImageError("the file ends here", where=path)

    frozen.server.before_read = fails
    with pytest.raises(ImageError, match="ends here"):
        frozen.open(0)
    assert frozen.server.handles == []


def test_a_flat_file_that_is_shorter_than_its_disk_is_refused(frozen: Frozen) -> None:
    with (frozen.host.folder / "web-flat.vmdk").open("r+b") as file:
        file.truncate(SIZE - 512)
    with pytest.raises(ImageError, match="size of the VMFS extent"):
        frozen.open(0)


def test_a_disk_that_its_descriptor_makes_smaller_is_refused(frozen: Frozen) -> None:
    """Nobody would write the rest of the target."""
    write_flat(frozen.host.folder / "web.vmdk", size=SIZE - MiB, runs=[(0, A)], identity=Identity(cid=CID))
    with pytest.raises(ImageError, match=f"speaks of {SIZE - MiB} bytes, the host of {SIZE}"):
        frozen.open(0)
    assert frozen.server.handles == []


def test_a_failure_is_explained_by_one_dd(frozen: Frozen) -> None:
    frozen.server.locked.add(LOCKED)
    with pytest.raises(EsxError, match="Device or resource busy") as caught:
        frozen.open(0)
    assert caught.value.fault is Fault.LOCKED
    assert "--clone-base" in caught.value.fix
    assert "vpx://" in caught.value.fix
    assert frozen.host.sent("dd") == [("dd", f"if={LOCKED}", "of=/dev/null", "bs=512", "count=1")]
    assert frozen.server.handles == []


def test_a_failure_that_is_no_lock_is_told_as_it_is(frozen: Frozen) -> None:
    frozen.server.locked.add(LOCKED)
    frozen.host.script["dd"] = [(1, "", f"dd: can't open '{LOCKED}': Input/output error\n"), (0, "", "")]
    with pytest.raises(EsxError, match="Input/output error") as caught:
        frozen.open(0)
    assert caught.value.fault is Fault.UNKNOWN
    with pytest.raises(EsxError, match="dd reads it"):
        frozen.open(0)


def test_a_locked_delta_is_refused_with_what_holds_it(frozen: Frozen) -> None:
    frozen.server.locked.add(f"{DIR}/web-000001-sesparse.vmdk")
    with pytest.raises(EsxError, match="a layer that a snapshot froze is locked") as caught:
        frozen.open(1, 0)
    assert "7.0U1c" in caught.value.fix


@pytest.fixture
def cloning(tmp_path: Path) -> Frozen:
    made = Frozen(tmp_path, clone_base=True)
    made.server.locked.add(LOCKED)
    return made


def test_a_locked_base_is_cloned_when_the_operator_said_so(cloning: Frozen) -> None:
    path = f"{DIR}/tokvm-clone/tokvm-ab12-1-scsi0-0.vmdk"
    reader = cloning.open(0)
    assert ("vmkfstools", "-i", f"{DIR}/web.vmdk", path, "-d", "thin") in cloning.host.log
    assert contents(reader) == {0: b"a", 8 * MiB: b"a"}
    reader.close()
    assert not cloning.host.local(f"{DIR}/tokvm-clone").exists()
    assert cloning.read(1, 0) == {0: b"b"}


def test_a_clone_is_kept_until_its_pass_is_over(cloning: Frozen) -> None:
    first = cloning.open(0)
    chunks = first.chunks()
    next(chunks).release()
    chunks.close()  # type: ignore[attr-defined]
    first.close()
    assert cloning.read(0) == {0: b"a", 8 * MiB: b"a"}
    assert len([words for words in cloning.host.log if words[:2] == ("vmkfstools", "-i")]) == 1
    assert not cloning.host.local(f"{DIR}/tokvm-clone").exists()


def test_a_clone_that_somebody_left_is_made_anew(cloning: Frozen) -> None:
    path = cloning.host.local(f"{DIR}/tokvm-clone/tokvm-ab12-1-scsi0-0.vmdk")
    path.parent.mkdir()
    path.write_bytes(b"half")
    path.with_name("tokvm-ab12-1-scsi0-0-flat.vmdk").write_bytes(b"half")
    assert cloning.read(0) == {0: b"a", 8 * MiB: b"a"}
    assert ("vmkfstools", "-U", f"{DIR}/tokvm-clone/{path.name}") in cloning.host.log


@pytest.mark.slow
def test_clones_go_with_their_snapshot_and_with_the_claim(cloning: Frozen) -> None:
    cloning.open(0).close()
    cloning.source.remove_snapshot(VM, cloning.marks[1])
    assert cloning.host.local(f"{DIR}/tokvm-clone").exists()
    cloning.source.claim(VM, "me@here 1")
    cloning.source.release(VM, "me@here 1")
    assert not cloning.host.local(f"{DIR}/tokvm-clone").exists()


def test_a_clone_needs_room_for_all_of_the_disk(cloning: Frozen) -> None:
    cloning.host.free = SIZE + GiB - 1
    with pytest.raises(SourceError, match="no room to clone"):
        cloning.open(0)
    assert not [words for words in cloning.host.log if words[0] == "vmkfstools"]


def test_a_clone_that_fails_says_so(cloning: Frozen) -> None:
    cloning.host.script["vmkfstools"] = [(255, "", "Failed to open 'web.vmdk': Failed to lock the file (16392)\n")]
    with pytest.raises(SourceError, match="16392"):
        cloning.open(0)


def test_a_dirty_layer_is_refused(frozen: Frozen) -> None:
    write_sesparse(
        frozen.host.folder / "web-000001.vmdk", size=SIZE, runs=[(0, B)], options=SesparseOptions(replay_journal=1),
        identity=Identity(cid=CID, parent_cid=CID, parent_hint="web.vmdk"),
    )  # fmt: skip
    with pytest.raises(ImageError, match="replay_journal"):
        frozen.open(1, 0)


def test_the_same_layers_are_the_same_reader_to_anybody(frozen: Frozen) -> None:
    first, again = frozen.open(1), connect(frozen.host).open_disk(DISK, frozen.marks[1], None)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != frozen.open(2).fingerprint


@pytest.mark.parametrize("name", ["web-000001-sesparse.vmdk", "web-flat.vmdk", "web-000001.vmdk"])
@pytest.mark.slow
def test_a_layer_that_is_opened_for_writing_meanwhile_voids_the_pass(frozen: Frozen, name: str) -> None:
    reader = frozen.open(1)
    path = frozen.host.folder / name
    raw = bytearray(path.read_bytes())
    raw[520 if len(raw) > 4096 else len(raw) // 2] ^= 1  # seSparse: the volatile header
    path.write_bytes(raw)
    with pytest.raises(SourceError, match="changed while they were read"):
        contents(reader)
    reader.close()


def test_a_layer_that_is_gone_or_shorter_voids_the_pass(frozen: Frozen) -> None:
    reader = frozen.open(1, 0)
    frozen.server.before_read = lambda path, _: (frozen.host.local(path).write_bytes(b"x"), None)[1]
    with pytest.raises((SourceError, ImageError)):
        contents(reader)
    reader.close()


@pytest.mark.slow
def test_after_a_long_pass_the_host_is_asked_for_the_chain_again(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen.read(2)
    asked = len(frozen.host.sent("device.getdevices"))
    monkeypatch.setattr(disks, "LONG_PASS_S", -1.0)
    frozen.read(2)
    assert len(frozen.host.sent("device.getdevices")) == asked + 2
    reader = frozen.open(2)
    frozen.host.do_snapshot_remove(("", "", "12", "1"))
    with pytest.raises(SourceError, match="changed while"):
        contents(reader)


def test_a_removed_snapshot_moves_the_files_and_the_next_delta_finds_them(frozen: Frozen) -> None:
    """Removing the first merges web-000001 into web.vmdk, which the second froze then."""
    frozen.host.do_snapshot_remove(("", "", "12", "1"))
    frozen.host.write_base([(0, B), (8 * MiB, A)])
    frozen.host.write_delta("web-000002.vmdk", "web.vmdk", [(4 * MiB, C)])
    assert frozen.read(2, 1) == {4 * MiB: b"c"}
    assert frozen.read(1) == {0: b"b", 8 * MiB: b"a"}
    with pytest.raises(SourceError, match="is gone"):
        frozen.open(0)


def test_a_task_on_the_disks_is_waited_for_but_not_for_ever(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen.host.tasks["haTask-12-vim.VirtualMachine.consolidateDisks-1"] = "running"
    assert frozen.read(0) == {0: b"a", 8 * MiB: b"a"}
    frozen.host.tasks["haTask-12-vim.VirtualMachine.consolidateDisks-2"] = "running"  # one that was over stays so
    monkeypatch.setattr(frozen.host, "do_task_info", lambda _: '(vim.TaskInfo) {\n   state = "queued"\n}\n')
    with pytest.raises(SourceError, match="consolidateDisks"):
        frozen.open(0)


def test_snapshots_that_are_of_no_use_are_refused(frozen: Frozen) -> None:
    for at, since, match in ((0, 1, "not younger"), (0, 0, "not younger")):
        with pytest.raises(SourceError, match=match):
            frozen.open(at, since)
    with pytest.raises(SourceError, match="no such disk"):
        frozen.source.open_disk(Disk(0, "scsi0:9:x", SIZE), frozen.marks[0], None)
    frozen.host.chains["scsi0:0"] = ["web-000002.vmdk", "web-000001.vmdk", "web.vmdk"]
    with pytest.raises(SourceError, match="the VM writes now"):
        frozen.open(2)


def test_snapshots_are_not_removed_while_disks_are_read(frozen: Frozen) -> None:
    reader = frozen.open(1)
    with pytest.raises(SourceError, match="while disks are read"):
        frozen.source.remove_snapshot(VM, frozen.marks[0])
    reader.close()
    frozen.source.remove_snapshot(VM, frozen.marks[0])
