"""A disk's bytes over vSphere's API, by each way there is, against a played vCenter and ESXi that keep the lock matrix."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.sources.vsphere_rig import SIZE, MiB, Rig, applied, rigs

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, HostKeyError, SourceError
from tokvm.core.extents import ExtentKind
from tokvm.core.machine import Snapshot
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.remote.tls import TlsTrust
from tokvm.sources.base import NoLiveDelta
from tokvm.sources.frozen import FrozenDisk, FrozenFile
from tokvm.sources.vmware.api import lease, tracking
from tokvm.sources.vmware.api.faults import VsphereError
from tokvm.sources.vmware.api.lease import LeasedDisk
from tokvm.sources.vmware.api.source import VsphereSource
from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, HostOptions

pytestmark = pytest.mark.slow
Make = Callable[..., Rig]
MARK = "tokvm-ab12cd34-"
NFS = HostOptions(datastores=[DatastoreSpec("nfs 1", type="NFS")])
BOTH = pytest.mark.parametrize("vcenter", [True, False], ids=["vcenter", "esxi"])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    yield from rigs(tmp_path, monkeypatch)


def frozen_base(rig: Rig, source: VsphereSource | None = None) -> tuple[Snapshot, bytes]:
    """A snapshot, and what it froze; the guest writes on."""
    rig.write(MiB, os.urandom(2 * MiB))
    rig.write(SIZE - 512, os.urandom(512))
    made = (source or rig.source).snapshot(rig.vm, f"{MARK}1")
    content = rig.content()
    rig.write(5 * MiB, os.urandom(64 * 512))
    return made, content


def base_of(rig: Rig, at: Snapshot, source: VsphereSource | None = None) -> DiskReader:
    return (source or rig.source).open_disk(rig.vm.disks[0], at, None)


# ---- a lease


@BOTH
@pytest.mark.parametrize("encoding", ["close", "chunked"])
def test_the_base_of_a_running_vm_on_vmfs_is_an_export(make: Make, *, vcenter: bool, encoding: str) -> None:
    rig = make(vcenter=vcenter, disks=[DiskSpec(SIZE), DiskSpec(3 * MiB + 512)], api={"lease_encoding": encoding})
    rig.write(MiB, os.urandom(MiB))
    rig.write(3 * MiB, os.urandom(512), disk=1)
    at = rig.source.snapshot(rig.vm, f"{MARK}1")
    frozen = [rig.content(0), rig.content(1)]
    rig.write(0, b"x" * 512)
    for disk in rig.vm.disks:
        reader = rig.source.open_disk(disk, at, None)
        assert isinstance(reader, LeasedDisk)
        assert applied(reader) == frozen[disk.index]
    calls = rig.vsphere.calls()
    assert (calls.count("ExportSnapshot"), calls.count("HttpNfcLeaseComplete"), calls.count("HttpNfcLeaseAbort")) == (2, 2, 0)
    paths = [str(one["path"]) for one in rig.vsphere.requests() if one["request"] == "nfc"]
    assert [path.rpartition("/")[2] for path in paths] == ["disk-0.vmdk", "disk-1.vmdk"]


def test_a_host_that_only_the_pinned_vcenter_named_is_proved_by_its_word(make: Make) -> None:
    rig = make()
    source = rig.connect(trust=TlsTrust.of(fingerprints=(rig.vsphere.fingerprint,)))
    at, content = frozen_base(rig)
    assert applied(base_of(rig, at, source)) == content


@pytest.mark.parametrize("encoding", ["close", "chunked"])
def test_a_stream_without_its_end_is_not_believed(make: Make, encoding: str) -> None:
    rig = make(api={"end_marker": False, "lease_encoding": encoding})
    at, _ = frozen_base(rig)
    with pytest.raises(ConnectionLost, match="broke off"):
        applied(base_of(rig, at))
    assert rig.vsphere.calls().count("HttpNfcLeaseComplete") == 0
    assert rig.vsphere.calls().count("HttpNfcLeaseAbort") == 1


@pytest.mark.parametrize("encoding", ["close", "chunked"])
def test_a_stream_that_breaks_begins_again_from_its_start(make: Make, encoding: str) -> None:
    rig = make(api={"lease_encoding": encoding})
    at, content = frozen_base(rig)
    rig.vsphere.fault("nfc", "cut_answer", bytes=MiB)
    first = base_of(rig, at)
    with pytest.raises(ConnectionLost):
        applied(first)
    again = base_of(rig, at)
    assert again.fingerprint != first.fingerprint  # so no position of the first is good here
    assert applied(again) == content
    assert rig.vsphere.calls().count("HttpNfcLeaseAbort") == 1


def test_a_reader_that_is_closed_early_gives_its_lease_up(make: Make) -> None:
    rig = make()
    at, _ = frozen_base(rig)
    base_of(rig, at).close()
    assert rig.vsphere.calls().count("HttpNfcLeaseAbort") == 1


def test_a_slow_copy_keeps_its_lease(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "KEEP_ALIVE_S", 0.1)
    rig = make(api={"lease_s": 1.0})
    at, content = frozen_base(rig)
    reader = base_of(rig, at)
    time.sleep(1.6)
    assert applied(reader) == content
    assert rig.vsphere.calls().count("HttpNfcLeaseProgress") >= 5


def test_a_lease_that_the_server_gave_up_is_a_lost_connection(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "KEEP_ALIVE_S", 0.05)
    rig = make()
    at, _ = frozen_base(rig)
    rig.vsphere.fault("HttpNfcLeaseProgress", "fault", name="vim.fault.InvalidState")
    reader = base_of(rig, at)
    time.sleep(0.5)
    with pytest.raises(ConnectionLost, match="lease was lost"):
        applied(reader)


def test_an_expired_session_does_not_end_a_lease_s_progress(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "KEEP_ALIVE_S", 0.05)
    rig = make()
    at, content = frozen_base(rig)
    reader = base_of(rig, at)
    rig.vsphere.fault("HttpNfcLeaseProgress", "logged_out")
    time.sleep(0.4)
    assert applied(reader) == content


def test_an_export_that_fails_says_why(make: Make) -> None:
    rig = make()
    at, _ = frozen_base(rig)
    rig.vsphere.fault("ExportSnapshot", "fault", name="vim.fault.NoPermission", fields={"privilegeId": "VApp.Export"})
    with pytest.raises(SourceError, match=r"VApp\.Export") as refused:
        base_of(rig, at)
    assert "NFC_FILE_LOCKED" in refused.value.what
    assert "--bytes" in refused.value.fix


# ---- what changed, while it runs and when it is off


@BOTH
def test_on_vmfs_what_changed_waits_for_the_stop_and_is_then_read_from_the_closed_files(make: Make, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter)
    at, content = frozen_base(rig)
    target = applied(base_of(rig, at))
    assert target == content
    with pytest.raises(NoLiveDelta, match="NFC_FILE_LOCKED"):
        rig.source.snapshot(rig.vm, f"{MARK}2")
    assert rig.snapshot_names() == [f"{MARK}1"]
    rig.source.shut_down(rig.uuid, deadline_s=20, force=False)
    last = rig.source.snapshot(rig.vm, f"{MARK}final-3")
    reader = rig.source.open_disk(rig.vm.disks[0], last, at)
    assert reader.total <= 64 * 1024
    assert applied(reader, target) == rig.content()
    assert "ConsolidateVMDisks_Task" not in rig.vsphere.calls()
    assert "RemoveSnapshot_Task" not in rig.vsphere.calls()


def test_a_first_snapshot_with_the_same_mark_again_is_no_delta(make: Make) -> None:
    rig = make()
    at, _ = frozen_base(rig)
    assert rig.source.snapshot(rig.vm, f"{MARK}1") == at


def test_somebody_elses_migration_is_no_base_of_ours(make: Make) -> None:
    rig = make()
    rig.source.snapshot(rig.vm, "tokvm-ffffffff-1")
    frozen_base(rig)
    assert len(rig.snapshot_names()) == 2


@pytest.mark.parametrize("options", [NFS, HostOptions(datastores=[DatastoreSpec("old", type="VMFS-5")], locks=False)])
def test_files_that_are_not_locked_give_every_pass_over_https(make: Make, options: HostOptions) -> None:
    rig = make(options=options)
    at, content = frozen_base(rig)
    target = applied(base_of(rig, at))
    assert target == content
    later = rig.source.snapshot(rig.vm, f"{MARK}2")
    assert applied(rig.source.open_disk(rig.vm.disks[0], later, at), target) == rig.content()
    assert "ExportSnapshot" not in rig.vsphere.calls()


@BOTH
def test_with_a_hosts_ssh_every_pass_comes_by_sftp(make: Make, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter)
    source = rig.connect(ssh=True)
    at, content = frozen_base(rig, source)
    target = applied(base_of(rig, at, source))
    assert target == content
    for number in (2, 3):
        now = source.snapshot(rig.vm, f"{MARK}{number}")
        target = applied(source.open_disk(rig.vm.disks[0], now, at), target)
        assert target == rig.content()
        rig.write(number * MiB, os.urandom(8192))
        at = now
    assert rig.vsphere.requests() == []


def test_the_host_that_runs_the_vm_is_filled_in(make: Make) -> None:
    rig = make()
    asked: list[str] = []

    def connect(url: str) -> object:
        asked.append(url)
        return rig._ssh(f"ssh://{rig.host.sshd.netloc}")

    source = rig.connect(connect=connect)
    source._how = type(source._how)("ssh://root@{host}", connect)  # type: ignore[arg-type]
    at, content = frozen_base(rig)
    assert applied(base_of(rig, at, source)) == content
    assert len(set(asked)) == 1
    assert "{" not in asked[0]


def test_a_base_that_stays_locked_over_ssh_falls_back_to_the_export(make: Make) -> None:
    rig = make(options=HostOptions(base_stays_locked="files"))
    source = rig.connect(ssh=True)
    at, content = frozen_base(rig, source)
    reader = base_of(rig, at, source)
    assert isinstance(reader, LeasedDisk)
    assert applied(reader) == content


def test_a_host_that_will_not_have_us_is_told_and_no_other_way_taken_in_silence(make: Make) -> None:
    rig = make()
    at, _ = frozen_base(rig)

    def connect(url: str) -> SshHost:
        return SshHost(SshConfig.parse(url.removeprefix("ssh://"), known_hosts="/dev/null"))

    source = rig.connect(ssh=f"ssh://{rig.host.sshd.netloc}", connect=connect)
    with pytest.raises(HostKeyError):
        base_of(rig, at, source)
    assert "ExportSnapshot" not in rig.vsphere.calls()


def test_bytes_over_https_outlive_the_session(make: Make) -> None:
    rig = make(options=NFS)
    at, content = frozen_base(rig)
    reader = base_of(rig, at)
    rig.vsphere.end_sessions()
    assert applied(reader) == content


def test_a_broken_read_goes_on_where_it_was(make: Make) -> None:
    rig = make(options=NFS)
    at, content = frozen_base(rig)
    first = base_of(rig, at)
    target, position = bytearray(SIZE), 0
    for chunk in first.chunks():
        target[chunk.offset : chunk.offset + chunk.length] = chunk.data or bytes(chunk.length)
        position = chunk.position
        chunk.release()
        break
    first.close()
    again = base_of(rig, at, rig.connect())
    assert again.fingerprint == first.fingerprint
    for chunk in again.chunks(position):
        target[chunk.offset : chunk.offset + chunk.length] = chunk.data or bytes(chunk.length)
        chunk.release()
    again.close()
    assert bytes(target) == content


# ---- what may change under a copy


def test_a_snapshot_that_is_removed_under_a_copy_voids_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokvm.sources.vmware.api.disks.LONG_PASS_S", -1.0)
    rig = make(options=NFS)
    at, _ = frozen_base(rig)
    later = rig.source.snapshot(rig.vm, f"{MARK}2")
    reader = rig.source.open_disk(rig.vm.disks[0], later, at)
    rig.host.delete_snapshot("web", 1)
    with pytest.raises(SourceError, match=r"does not count|changed|refused"):
        applied(reader, bytes(SIZE))


def test_the_server_is_asked_for_the_chain_at_the_end_of_a_long_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenFile, "is_unchanged", lambda _self: True)  # it is no file that tells
    rig = make(options=NFS)
    rig.host.foreign_snapshot("web", "older")
    at, _ = frozen_base(rig)
    reader = base_of(rig, at)
    assert isinstance(reader, FrozenDisk)
    reader.verify_unchanged(ask_host=True)
    rig.host.delete_snapshot("web", 1)
    with pytest.raises(SourceError, match="does not count"):
        reader.verify_unchanged(ask_host=True)
    reader.close()


def test_a_new_snapshot_of_somebody_else_is_no_change(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokvm.sources.vmware.api.disks.LONG_PASS_S", -1.0)
    rig = make(options=NFS)
    at, content = frozen_base(rig)
    reader = base_of(rig, at)
    rig.host.foreign_snapshot("web", "nightly")
    assert applied(reader) == content
    rig.source.snapshot(rig.vm, f"{MARK}2")
    again = base_of(rig, at)
    rig.host.delete_snapshot("web", 2)  # what it held lies above ours
    assert applied(again) == content


def test_a_revert_makes_our_snapshots_useless_and_says_so(make: Make) -> None:
    rig = make(options=NFS)
    at, _ = frozen_base(rig)
    later = rig.source.snapshot(rig.vm, f"{MARK}2")
    rig.host.revert("web", 1)
    with pytest.raises(SourceError, match=r"no frozen image|not younger"):
        rig.source.open_disk(rig.vm.disks[0], later, at)


def test_a_snapshot_that_is_gone_is_told(make: Make) -> None:
    rig = make(options=NFS)
    at, _ = frozen_base(rig)
    rig.source.remove_snapshot(rig.uuid, at)
    with pytest.raises(SourceError, match="is gone"):
        base_of(rig, at)


# ---- changed block tracking


def test_tracking_is_switched_on_for_the_migration_and_off_again(make: Make) -> None:
    rig = make(options=NFS)
    source = rig.connect(cbt=True)
    at, _ = frozen_base(rig, source)
    assert rig.vsphere.tracks("web")
    later = source.snapshot(rig.vm, f"{MARK}2")
    source.remove_snapshot(rig.uuid, at)
    assert rig.vsphere.tracks("web")
    source.remove_snapshot(rig.uuid, later)
    assert not rig.vsphere.tracks("web")
    assert rig.vsphere.extra_config("web") == {}


def test_tracking_that_was_on_before_us_stays_on(make: Make) -> None:
    rig = make(options=NFS)
    first = rig.connect(cbt=True)
    first.remove_snapshot(rig.uuid, frozen_base(rig, first)[0])
    assert not rig.vsphere.tracks("web")
    tracking._set(first._client, first._machines.facts(rig.uuid), wanted=True)
    first.remove_snapshot(rig.uuid, frozen_base(rig, first)[0])
    assert rig.vsphere.tracks("web")


def test_tracking_needs_a_vm_without_snapshots(make: Make) -> None:
    rig = make()
    rig.host.foreign_snapshot("web", "nightly")
    source = rig.connect(cbt=True)
    with pytest.raises(SourceError, match="without any"):
        source.snapshot(rig.vm, f"{MARK}1")
    found = [one.what for one in source.check(rig.vm)]
    assert any("cannot be tracked" in what for what in found)


@pytest.mark.parametrize("star_fails", [False, True])
def test_of_a_flat_base_only_the_areas_in_use_are_read(make: Make, *, star_fails: bool) -> None:
    rig = make(api={"cbt_star_fails": star_fails, "areas": 1})
    source = rig.connect(cbt=True, ssh=True)
    at, content = frozen_base(rig, source)
    reader = base_of(rig, at, source)
    plain = base_of(rig, at, rig.connect(ssh=True))
    assert (reader.total == SIZE) is star_fails
    assert plain.total == SIZE
    if not star_fails:
        assert reader.fingerprint != plain.fingerprint  # another order of reading
    assert applied(reader, os.urandom(SIZE)) == content
    plain.close()


# ---- an NBD server of the operator's


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A socket's path has room for some 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as path:
        yield Path(path)


@pytest.fixture
def serve(sockets: Path) -> Iterator[Callable[[str, bytes], None]]:
    """serve(name, content): at sockets/name.sock."""
    pytest.importorskip("nbd")
    program = shutil.which("qemu-nbd")
    if program is None:
        pytest.skip("qemu-nbd is not installed")
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, content: bytes) -> None:
        (sockets / f"{name}.raw").write_bytes(content)
        socket = sockets / f"{name}.sock"
        argv = [program, "-r", "-t", "-e", "8", "-f", "raw", "-k", str(socket), str(sockets / f"{name}.raw")]
        running.append(subprocess.Popen(argv))
        until = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.02)

    yield start
    for process in running:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("reset", [False, True])
def test_a_server_of_the_operators_gives_every_pass_by_what_changed(
    make: Make, serve: Callable[[str, bytes], None], sockets: Path, *, reset: bool
) -> None:
    rig = make(api={"areas": 1})
    source = rig.connect(nbd=f"nbd+unix:///?socket={sockets}/{{uuid}}-{{snapshot}}-{{number}}-{{index}}.sock", cbt=True)
    at, content = frozen_base(rig, source)
    with pytest.raises(SourceError, match="NBD server"):
        base_of(rig, at, source)
    name = f"{rig.uuid}-{at.key.partition('/')[2]}-2000-0"
    serve(name, content)
    reader = base_of(rig, at, source)
    assert reader.total < SIZE
    target = applied(reader, os.urandom(SIZE))
    assert target == content
    if reset:
        rig.vsphere.reset_tracking("web")
    later = source.snapshot(rig.vm, f"{MARK}2")
    serve(f"{rig.uuid}-{later.key.partition('/')[2]}-2000-0", rig.content())
    delta = source.open_disk(rig.vm.disks[0], later, at)
    changed = sum(window.bytes_of(ExtentKind.DATA) for window in delta.covered())
    assert (changed == SIZE) is reset
    assert applied(delta, target) == rig.content()
    assert rig.vsphere.requests() == []
    assert "ExportSnapshot" not in rig.vsphere.calls()


def test_a_fault_of_the_tracking_is_not_taken_for_nothing_changed(
    make: Make, serve: Callable[[str, bytes], None], sockets: Path
) -> None:
    rig = make()
    source = rig.connect(nbd=f"nbd+unix:///?socket={sockets}/{{snapshot}}.sock", cbt=True)
    at, _ = frozen_base(rig, source)
    later = source.snapshot(rig.vm, f"{MARK}2")
    serve(later.key.partition("/")[2], rig.content())
    rig.vsphere.fault("QueryChangedDiskAreas", "fault", name="vim.fault.FileFault", fields={"file": "x"})
    with pytest.raises((VsphereError, SourceError), match="FileFault"):
        source.open_disk(rig.vm.disks[0], later, at)
