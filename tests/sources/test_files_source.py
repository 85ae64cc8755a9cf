"""Image files copied here by hand, layer by layer, as a source."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ImageError, SourceError, UsageError
from tokvm.core.extents import ExtentKind
from tokvm.core.machine import PowerState, Severity, Snapshot
from tokvm.core.units import KiB, MiB
from tokvm.sources.files.source import FilesSource
from tokvm.testing.vhd_writer import write_vhd

SIZE = 5 * MiB
MARK = "tokvm-ab12cd34-"


class Layers:
    """A disk whose layers appear in a folder one after the other, and the bytes that the guest sees."""

    def __init__(self, folder: Path, name: str = "web") -> None:
        self.folder, self.name = folder, name
        self.ids: list[UUID] = []
        self.paths: list[str] = []
        self.disk = bytearray(SIZE)

    def add(self, *runs: tuple[int, bytes]) -> list[str]:
        """Freeze: one more file, which holds these runs. Returns the chain so far."""
        path = self.folder / f"{self.name}-{len(self.paths)}.vhd"
        parent = self.ids[-1] if self.ids else None
        self.ids.append(uuid4())
        with path.open("wb") as out:
            write_vhd(
                out,
                size=SIZE,
                kind="differencing" if parent else "dynamic",
                runs=runs,
                unique_id=self.ids[-1],
                parent_id=parent,
                parent_name="/etc/passwd",
            )
        for offset, data in runs:
            self.disk[offset : offset + len(data)] = data
        self.paths.append(str(path))
        return self.paths


def apply(reader: DiskReader, target: bytearray) -> int:
    """Write what the reader says; returns the number of data bytes."""
    count = 0
    for chunk in reader.chunks():
        assert chunk.kind is not ExtentKind.ABSENT
        target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
        count += chunk.length if chunk.data is not None else 0
        chunk.release()
    reader.close()
    return count


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_the_manual_workflow_layer_by_layer_each_time_in_a_new_process(tmp_path: Path) -> None:
    layers, target = Layers(tmp_path), bytearray(SIZE)
    rounds = [[(0, b"base" * KiB), (3 * MiB, b"more" * KiB)], [(KiB, b"new!" * 256)], [(SIZE - 512, b"last" * 128)]]
    before: Snapshot | None = None
    keys = set()
    for number, runs in enumerate(rounds):
        source = FilesSource.from_paths(layers.add(*runs))
        vm = source.inspect(source.find("web-0"))
        keys.add((vm.uuid, vm.disks[0].key))
        listed = source.snapshots(vm.uuid, MARK)
        assert [snapshot.mark for snapshot in listed] == [f"{MARK}{n}" for n in range(number)]
        assert listed[-1:] == ([before] if before else [])
        now = source.snapshot(vm, f"{MARK}{number}")
        written = apply(source.open_disk(vm.disks[0], now, before), target)
        assert written == sum(len(data) for _, data in runs)
        assert target == layers.disk
        before = now
        source.close()
    assert len(keys) == 1


def test_the_same_mark_stays_on_its_layer_when_others_come(tmp_path: Path) -> None:
    layers = Layers(tmp_path)
    source = FilesSource.from_paths(layers.add((0, b"a" * 512)))
    vm = source.inspect(source.find("web-0"))
    first = source.snapshot(vm, f"{MARK}1")
    later = FilesSource.from_paths(layers.add((0, b"b" * 512)))
    assert later.snapshot(vm, f"{MARK}1") == first
    assert later.snapshot(vm, f"{MARK}2").disks != first.disks
    whole = bytearray(SIZE)
    apply(later.open_disk(vm.disks[0], first, None), whole)
    assert whole[:512] == b"a" * 512


def test_no_new_layer_is_a_delta_that_says_nothing(tmp_path: Path) -> None:
    source = FilesSource.from_paths(Layers(tmp_path).add((0, b"a" * 512)))
    vm = source.inspect(source.find("web-0"))
    first, second = source.snapshot(vm, f"{MARK}1"), source.snapshot(vm, f"{MARK}2")
    reader = source.open_disk(vm.disks[0], second, first)
    assert (reader.size, reader.total, list(reader.chunks())) == (SIZE, 0, [])
    assert [(window.start, window.stop, len(window)) for window in reader.covered()] == [(0, SIZE, 0)]
    reader.close()


def test_the_image_keeps_its_bytes_and_time_and_marks_go_again(tmp_path: Path) -> None:
    (path,) = Layers(tmp_path).add((0, b"a" * 512))
    content, time_before = Path(path).read_bytes(), Path(path).stat().st_mtime_ns
    source = FilesSource.from_paths([path])
    vm = source.inspect(source.find("web-0"))
    snapshot = source.snapshot(vm, f"{MARK}1")
    assert (Path(path).read_bytes(), Path(path).stat().st_mtime_ns) == (content, time_before)
    source.remove_snapshot(vm.uuid, snapshot)
    source.remove_snapshot(vm.uuid, snapshot)
    assert source.snapshots(vm.uuid, MARK) == []
    assert FilesSource.from_paths([path]).snapshots(vm.uuid, MARK) == []


def test_a_file_system_without_marks_still_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    for name in ("setxattr", "listxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuse)
    source = FilesSource.from_paths(Layers(tmp_path).add((0, b"a" * 512)))
    vm = source.inspect(source.find("web-0"))
    snapshot = source.snapshot(vm, f"{MARK}1")
    assert source.snapshot(vm, f"{MARK}1") == snapshot
    assert source.snapshots(vm.uuid, MARK) == [snapshot]
    source.remove_snapshot(vm.uuid, snapshot)
    assert source.snapshots(vm.uuid, MARK) == []


def test_several_disks(tmp_path: Path) -> None:
    chains = [Layers(tmp_path, "a"), Layers(tmp_path, "b")]
    for number, layers in enumerate(chains):
        layers.add((number * 512, b"x" * 512))
        layers.add((number * 1024, b"y" * 512))
    source = FilesSource([layers.paths for layers in chains])
    vm = source.inspect(source.find("a-0"))
    assert [(disk.index, disk.size, disk.bootable) for disk in vm.disks] == [(0, SIZE, True), (1, SIZE, False)]
    snapshot = source.snapshot(vm, f"{MARK}1")
    for disk, layers in zip(vm.disks, chains, strict=True):
        target = bytearray(SIZE)
        apply(source.open_disk(disk, snapshot, None), target)
        assert target == layers.disk


def test_only_the_listed_paths_are_opened(tmp_path: Path) -> None:
    layers = Layers(tmp_path)
    layers.add((0, b"a" * 512))
    layers.add((0, b"b" * 512))
    with pytest.raises(ImageError, match="parent"):
        FilesSource.from_paths(list(reversed(layers.paths))).list_machines()
    child = FilesSource.from_paths(layers.paths[1:])
    vm = child.inspect(child.list_machines()[0].uuid)
    assert [finding.severity for finding in child.check(vm)] == [Severity.WARNING, Severity.BLOCKER]


def test_other_files_than_before_are_refused(tmp_path: Path) -> None:
    one, other = Layers(tmp_path, "one"), Layers(tmp_path, "other")
    one.add((0, b"a" * 512))
    other.add((0, b"a" * 512))
    source = FilesSource.from_paths(one.paths)
    vm = source.inspect(source.find("one-0"))
    snapshot = source.snapshot(vm, f"{MARK}1")
    stranger = FilesSource.from_paths(other.paths)
    with pytest.raises(SourceError, match="another VM"):
        stranger.inspect(vm.uuid)
    with pytest.raises(SourceError, match="other disks"):
        stranger.snapshot(vm, f"{MARK}2")
    with pytest.raises(SourceError, match="not among the files"):
        stranger.open_disk(vm.disks[0], snapshot, None)
    with pytest.raises(UsageError, match="twice"):
        FilesSource([one.paths, one.paths]).list_machines()


def test_what_needs_a_vm_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    source = FilesSource.from_paths(Layers(tmp_path).add())
    uuid = source.find("web-0")
    assert source.power(uuid) is PowerState.UNKNOWN
    assert source.claim(uuid, "me") == "me"
    source.release(uuid, "me")
    for refused in (
        lambda: source.shut_down(uuid, deadline_s=1, force=True),
        lambda: source.stop_pending(uuid),
        lambda: source.off_evidence(uuid),
        lambda: source.fence(uuid, "x"),
        lambda: source.is_fenced(uuid),
        lambda: source.unfence(uuid),
        lambda: source.start(uuid),
    ):
        with pytest.raises(UsageError, match="no VM behind") as caught:
            refused()
        assert "sync" in caught.value.fix
    with pytest.raises(UsageError, match="are the VM 'web-0'"):
        source.find("another")
    for none in ([], [""], ["a", ""]):
        with pytest.raises(UsageError, match="no image files"):
            FilesSource.from_paths(none)


def test_nothing_stays_open(tmp_path: Path) -> None:
    layers = Layers(tmp_path)
    layers.add((0, b"a" * 512))
    layers.add((0, b"b" * 512))
    source = FilesSource.from_paths(layers.paths)
    vm = source.inspect(source.find("web-0"))
    before = open_files()
    first = source.snapshot(vm, f"{MARK}1")
    source.open_disk(vm.disks[0], first, None).close()
    source.open_disk(vm.disks[0], first, first).close()
    source.snapshots(vm.uuid, MARK)
    with pytest.raises(ImageError):
        FilesSource.from_paths([*layers.paths, str(tmp_path / "absent")]).list_machines()
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(ImageError):
        FilesSource.from_paths([*layers.paths, str(tmp_path / "junk")]).list_machines()
    assert open_files() == before
