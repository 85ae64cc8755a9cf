"""Reading frozen layers: which files, checked how, over how many connections, and that a change under us is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any, cast
from uuid import UUID

import pytest
from tests.sources.hyperv_double import FOLDER, KEY, VM, FakeSftp, FakeShell, connect, write_layer

from tokvm.core.disk import Chunk, DiskReader
from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.core.units import MiB
from tokvm.remote.sftp import RemoteFileError
from tokvm.sources.hyperv import disks, files, snapshots
from tokvm.sources.hyperv.files import Lanes
from tokvm.sources.hyperv.source import HyperVSource

DISK = Disk(0, KEY, 64 * MiB, device="SCSI 0:0")
A, B, C = (bytes([value]) * 4096 for value in b"abc")


class Frozen:
    """d.vhdx (A at 0, A at 8 MiB), then d_1.avhdx (B at 0), then d_2.avhdx (C at 4 MiB), then the one that the VM writes."""

    def __init__(self, folder: Path) -> None:
        self.shell = FakeShell()
        self.server = FakeSftp(folder)
        self.source: HyperVSource = connect(self.shell, self.server)
        write_layer(folder, "d.vhdx", 1, [(0, A), (8 * MiB, A)])
        write_layer(folder, "d_1.avhdx", 2, [(0, B)], parent=1)
        write_layer(folder, "d_2.avhdx", 3, [(4 * MiB, C)], parent=2)
        self.marks = [self._freeze(number) for number in (1, 2, 3)]

    def _freeze(self, number: int) -> Snapshot:
        path = self.shell.vm.chain[-1]
        made = self.shell.vm.freeze(f"tokvm-ab12-{number}")
        return Snapshot(f"{VM}/{made['id']}", f"tokvm-ab12-{number}", {KEY: path})

    def read(self, at: int, since: int | None = None) -> dict[int, bytes]:
        reader = self.source.open_disk(DISK, self.marks[at], None if since is None else self.marks[since])
        try:
            return contents(reader)
        finally:
            reader.close()


def contents(reader: DiskReader) -> dict[int, bytes]:
    """Offset → the first byte of each piece of 4 KiB that is DATA and not zero."""
    found: dict[int, bytes] = {}
    for chunk in reader.chunks():
        data = b"" if chunk.data is None else bytes(chunk.data)
        found |= {chunk.offset + at: data[at : at + 1] for at in range(0, len(data), 4096) if any(data[at : at + 4096])}
        chunk.release()
    return found


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    monkeypatch.setattr(snapshots, "POLL_S", 0.01)
    monkeypatch.setattr(disks, "SETTLE_S", 0.1)
    return Frozen(tmp_path)


def test_a_base_is_all_layers_up_to_the_checkpoint(frozen: Frozen) -> None:
    assert frozen.read(0) == {0: b"a", 8 * MiB: b"a"}
    assert frozen.read(1) == {0: b"b", 8 * MiB: b"a"}
    assert frozen.read(2) == {0: b"b", 8 * MiB: b"a", 4 * MiB: b"c"}


def test_a_delta_is_the_layers_in_between(frozen: Frozen) -> None:
    assert frozen.read(1, 0) == {0: b"b"}
    assert frozen.read(2, 1) == {4 * MiB: b"c"}
    assert frozen.read(2, 0) == {0: b"b", 4 * MiB: b"c"}


def test_the_file_that_the_vm_writes_is_never_opened_and_no_handle_is_left(frozen: Frozen) -> None:
    opened: list[str] = []
    frozen.server.before_read = lambda path, _: opened.append(path)
    frozen.read(2)
    assert {path.rpartition("/")[2] for path in opened} == {"d.vhdx", "d_1.avhdx", "d_2.avhdx"}
    assert frozen.server.handles == []


@pytest.mark.slow
def test_the_fingerprint_is_the_same_for_the_same_layers_only(frozen: Frozen) -> None:
    def fingerprint(at: int, since: int | None = None) -> str:
        before = None if since is None else frozen.marks[since]
        reader = frozen.source.open_disk(DISK, frozen.marks[at], before)
        reader.close()
        return reader.fingerprint

    assert fingerprint(2) == fingerprint(2)
    assert len({fingerprint(1), fingerprint(2), fingerprint(1, 0), fingerprint(2, 0), fingerprint(2, 1)}) == 5


def test_layers_are_looked_for_again_after_an_older_checkpoint_went(frozen: Frozen) -> None:
    """Our own pruning: checkpoint 1 goes, d_1 is merged into d, and the delta of 3 since 2 is what it was."""
    frozen.shell.vm.checks.pop(0)
    frozen.shell.vm.merge(f"{FOLDER}\\d.vhdx")
    folder = frozen.server.folder
    write_layer(folder, "d.vhdx", 9, [(0, B), (8 * MiB, A)])
    write_layer(folder, "d_2.avhdx", 3, [(4 * MiB, C)], parent=9)
    assert frozen.read(2, 1) == {4 * MiB: b"c"}
    with pytest.raises(SourceError, match="gone"):
        frozen.read(1, 0)


def drain(chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        chunk.release()


def touch(path: Path, sequence: int) -> None:
    """As whoever opens the image for writing: a header with another sequence number."""
    raw = bytearray(path.read_bytes())
    raw[64 * 1024 + 8 : 64 * 1024 + 16] = sequence.to_bytes(8, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["d.vhdx", "d_1.avhdx"])
def test_a_merge_in_mid_copy_voids_the_pass(frozen: Frozen, name: str) -> None:
    reader = frozen.source.open_disk(DISK, frozen.marks[1], None)
    before = reader.fingerprint
    chunks = reader.chunks()
    next(chunks).release()
    touch(frozen.server.folder / name, 99)
    with pytest.raises(SourceError, match="changed while they were read"):
        drain(chunks)
    reader.close()
    assert frozen.server.handles == []
    again = frozen.source.open_disk(DISK, frozen.marks[1], None)
    assert again.fingerprint != before  # so the pass begins again
    again.close()


def test_structures_torn_by_a_merge_are_no_damage(frozen: Frozen) -> None:
    reader = frozen.source.open_disk(DISK, frozen.marks[1], None)

    def torn(path: str, offset: int) -> None:
        if MiB <= offset < frozen.server.local(path).stat().st_size - 512:
            touch(frozen.server.folder / "d.vhdx", 99)
            raise ImageError("the file ends here", where=path)

    frozen.server.before_read = torn
    with pytest.raises(SourceError, match="changed while they were read"):
        contents(reader)


def test_real_damage_stays_damage(frozen: Frozen) -> None:
    reader = frozen.source.open_disk(DISK, frozen.marks[1], None)

    def torn(path: str, offset: int) -> None:
        if MiB <= offset < frozen.server.local(path).stat().st_size - 512:
            raise ImageError("unreadable", where=path)

    frozen.server.before_read = torn
    with pytest.raises(ImageError, match="unreadable"):
        contents(reader)


@pytest.mark.slow
def test_after_a_long_pass_the_host_is_asked_for_the_chain_again(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen.read(2)
    assert len(frozen.shell.sent("layers")) == 1
    monkeypatch.setattr(disks, "LONG_PASS_S", -1.0)
    frozen.read(2)
    assert len(frozen.shell.sent("layers")) == 3
    reader = frozen.source.open_disk(DISK, frozen.marks[2], None)
    frozen.shell.vm.chain[0] = f"{FOLDER}\\moved.vhdx"
    frozen.shell.vm.checks[0]["disks"] = []
    with pytest.raises(SourceError, match="changed while"):
        contents(reader)


def test_a_merge_under_way_is_waited_for_but_not_for_ever(frozen: Frozen) -> None:
    busy = {**frozen.shell.vm.layers({}), "operational": [2, 32772]}
    frozen.shell.script["layers"] = [busy, busy]
    assert frozen.read(0) == {0: b"a", 8 * MiB: b"a"}
    frozen.shell.vm.operational = [2, 32772]
    with pytest.raises(SourceError, match="is merging"):
        frozen.read(0)


def test_a_delta_over_something_else_is_refused(frozen: Frozen) -> None:
    """The files tell another story than the host: who made the delta's parent?"""
    write_layer(frozen.server.folder, "d.vhdx", 7, [])
    with pytest.raises(ImageError, match=str(UUID(int=1))):
        frozen.read(1, 0)
    with pytest.raises(ImageError, match=str(UUID(int=1))):
        frozen.read(1)
    assert frozen.server.handles == []


def test_a_base_that_is_none_is_refused(frozen: Frozen) -> None:
    write_layer(frozen.server.folder, "d.vhdx", 1, [(0, A)], parent=5)
    with pytest.raises(SourceError, match="no base"):
        frozen.read(0)


def test_a_file_that_is_gone(frozen: Frozen) -> None:
    (frozen.server.folder / "d_1.avhdx").unlink()
    with pytest.raises(RemoteFileError, match="no such file"):
        frozen.read(2)
    assert frozen.server.handles == []


@pytest.mark.parametrize(
    ("key", "match"), [("SCSI:0:0:00000000-0000-4000-8000-00000000000b", "no such disk"), ("IDE:0:0:x", "no such disk")]
)
def test_a_disk_that_was_replaced(frozen: Frozen, key: str, match: str) -> None:
    with pytest.raises(SourceError, match=match):
        frozen.source.open_disk(Disk(0, key, 1), frozen.marks[0], None)


def test_snapshots_in_the_wrong_order_or_renamed(frozen: Frozen) -> None:
    with pytest.raises(SourceError, match="not younger"):
        frozen.read(0, 1)
    frozen.shell.vm.checks[1]["name"] = "somebody's"
    with pytest.raises(SourceError, match="gone"):
        frozen.read(1)


def test_what_the_vm_writes_now_is_never_read_as_frozen(frozen: Frozen) -> None:
    cast("list[Any]", frozen.shell.vm.checks[2]["disks"])[0]["path"] = frozen.shell.vm.chain[-1]
    with pytest.raises(SourceError, match="writes now"):
        frozen.read(2)


def test_no_checkpoint_goes_while_a_disk_is_read(frozen: Frozen) -> None:
    reader = frozen.source.open_disk(DISK, frozen.marks[0], None)
    with pytest.raises(SourceError, match="while disks are read"):
        frozen.source.remove_snapshot(VM, frozen.marks[0])
    reader.close()
    frozen.source.remove_snapshot(VM, frozen.marks[0])


def test_large_reads_share_a_few_connections(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2 * MiB))
    server = FakeSftp(tmp_path)
    lanes = Lanes(server)
    file = lanes.open("/C:/VMs/a b/x", name="x")
    assert server.connections == 1
    together = Barrier(files.LANES, timeout=5)

    def meet(_path: str, offset: int) -> None:
        if offset == MiB:
            together.wait()

    server.before_read = meet
    with ThreadPoolExecutor(files.LANES) as threads:
        reads = [threads.submit(file.read_into, MiB, memoryview(bytearray(MiB))) for _ in range(2 * files.LANES)]
        for read in reads:
            read.result()
    assert server.connections == files.LANES
    assert len(server.handles) == files.LANES
    file.close()
    assert server.handles == []
    assert lanes.open_files == set()
    lanes.close()


def test_small_reads_do_not_open_connections(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(MiB))
    server = FakeSftp(tmp_path)
    lanes = Lanes(server)
    file = lanes.open("/C:/VMs/a b/x", name="x")
    together = Barrier(2, timeout=0.05)

    def meet(_path: str, _offset: int) -> None:
        together.wait()

    server.before_read = meet
    with pytest.raises(BrokenBarrierError):
        file.read_into(0, memoryview(bytearray(512)))
    server.before_read = lambda _path, _offset: None
    file.read_into(0, memoryview(bytearray(512)))
    assert server.connections == 2  # the first one died with its read


def test_a_broken_connection_is_not_used_again(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(MiB))
    server = FakeSftp(tmp_path)
    lanes = Lanes(server)
    file = lanes.open("/C:/VMs/a b/x", name="x")

    def broken(_path: str, _offset: int) -> None:
        raise ConnectionLost("cut")

    server.before_read = broken
    with pytest.raises(ConnectionLost):
        file.read_into(0, memoryview(bytearray(512)))
    server.before_read = lambda _path, _offset: None
    file.read_into(0, memoryview(bytearray(512)))
    assert server.connections == 2


def test_when_one_connection_breaks_the_others_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2 * MiB))
    server = FakeSftp(tmp_path)
    lanes = Lanes(server)
    file = lanes.open("/C:/VMs/a b/x", name="x")
    together = Barrier(files.LANES, timeout=5)

    def meet_and_break(_path: str, offset: int) -> None:
        if offset == MiB:
            together.wait()
            raise ConnectionLost("cut")

    server.before_read = meet_and_break
    with ThreadPoolExecutor(files.LANES) as threads:
        reads = [threads.submit(file.read_into, MiB, memoryview(bytearray(MiB))) for _ in range(files.LANES)]
    assert all(isinstance(read.exception(), ConnectionLost) for read in reads)
    assert server.connections == files.LANES
    server.before_read = lambda _path, _offset: None
    file.read_into(MiB, memoryview(bytearray(MiB)))
    assert server.connections == files.LANES + 1


def test_a_file_that_changed_its_size_between_connections(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(MiB))
    server = FakeSftp(tmp_path)
    lanes = Lanes(server)
    file = lanes.open("/C:/VMs/a b/x", name="x")

    def broken(_path: str, _offset: int) -> None:
        raise ConnectionLost("cut")

    server.before_read = broken
    with pytest.raises(ConnectionLost):
        file.read_into(0, memoryview(bytearray(512)))
    (tmp_path / "x").write_bytes(bytes(MiB + 1))
    with pytest.raises(ImageError, match="size changed"):
        file.read_into(0, memoryview(bytearray(512)))
    with pytest.raises(ImageError, match="ends at"):
        file.read_into(MiB, memoryview(bytearray(1)))
