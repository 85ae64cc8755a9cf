"""The ESXi source over a real ssh and sshd when things break: what is raised, and that the next try is right."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.machine import Disk, PowerState, Severity, Snapshot, VirtualMachine
from tokvm.core.units import MiB
from tokvm.remote.errors import LoginRefused
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.vmware import power, snapshots
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.source import EsxSource
from tokvm.testing.esxi.host import (
    AutostartSpec,
    DatastoreSpec,
    DiskSpec,
    EsxHost,
    HostOptions,
    MachineSpec,
    NicSpec,
    build_host,
)

pytestmark = pytest.mark.slow

SIZE = 8 * MiB
NAME = "wéb [1] 'x’ $(y)"
MARK = "tokvm-ab12cd34-"

Build = Callable[..., EsxHost]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    monkeypatch.setattr(power, "ON_S", 2.0)
    for module in (power, snapshots):
        monkeypatch.setattr(module, "POLL_S", 0.05)
    made: list[EsxHost] = []

    def build(options: HostOptions | None = None, **spec: object) -> EsxHost:
        spec = {"disks": [DiskSpec(SIZE)], **spec}
        machine = MachineSpec(str(spec.pop("name", NAME)), **spec)  # type: ignore[arg-type]
        made.append(build_host(tmp_path / f"host{len(made)}", machines=[machine], options=options))
        return made[-1]

    yield build
    for host in made:
        host.close()
        assert host.violations() == []


def ssh_config(host: EsxHost) -> SshConfig:
    sshd = host.sshd
    return SshConfig.parse(
        sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts), progress_deadline_s=6.0
    )


def connect(host: EsxHost) -> EsxSource:
    return EsxSource(SshHost(ssh_config(host)))


@pytest.fixture
def source(host: EsxHost) -> Iterator[EsxSource]:
    made = connect(host)
    yield made
    made.close()


@pytest.fixture
def host(build: Build) -> EsxHost:
    return build(HostOptions(merge_s=0.5))


@pytest.fixture
def vm(host: EsxHost, source: EsxSource) -> VirtualMachine:
    return source.inspect(host.vm(NAME)["uuid"])


def content(reader: DiskReader, onto: bytes = bytes(SIZE)) -> bytes:
    """What a target holds after this pass."""
    target = bytearray(onto)
    try:
        for chunk in reader.chunks():
            target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
    finally:
        reader.close()
    return bytes(target)


def drain(reader: DiskReader, position: int, positions: list[int]) -> None:
    for chunk in reader.chunks(position):
        positions.append(chunk.position)
        chunk.release()


def disk_of(vm: VirtualMachine) -> Disk:
    return vm.disks[0]


def take(source: EsxSource, vm: VirtualMachine, number: int) -> Snapshot:
    return source.snapshot(vm, f"{MARK}{number}")


def test_a_vm_that_comes_back_under_another_number_is_found_again(host: EsxHost, source: EsxSource, vm: VirtualMachine) -> None:
    host.write_disk(NAME, offset=MiB, data=b"a" * 4096)
    first = take(source, vm, 1)
    host.vmotion_away(NAME)
    with pytest.raises(EsxError, match="no such VM") as caught:
        source.open_disk(disk_of(vm), first, None)
    assert caught.value.fault is Fault.NO_SUCH_VM
    host.vmotion_back(NAME)
    assert content(source.open_disk(disk_of(vm), first, None)) == host.read_disk(NAME)
    assert source.snapshots(vm.uuid, MARK) == [first]


def test_a_vm_that_was_moved_to_other_storage_is_not_read_on(build: Build) -> None:
    host = build(HostOptions(datastores=[DatastoreSpec("one"), DatastoreSpec("two")]))
    source = connect(host)
    vm = source.inspect(host.vm(NAME)["uuid"])
    first = take(source, vm, 1)
    host.storage_vmotion(NAME, "two")
    with pytest.raises(SourceError, match="no such disk"):
        source.open_disk(disk_of(vm), first, None)
    assert source.inspect(vm.uuid).disks[0].key.startswith("scsi0:0:[two] ")
    source.close()


def test_a_merge_under_a_read_is_noticed_or_did_no_harm(host: EsxHost, source: EsxSource, vm: VirtualMachine) -> None:
    """A backup's snapshot lies below ours; removing it rewrites the base."""
    host.foreign_snapshot(NAME)
    host.write_disk(NAME, offset=MiB, data=b"a" * 4096)
    first = take(source, vm, 1)
    wanted = host.read_disk(NAME)
    reader = source.open_disk(disk_of(vm), first, None)
    host.delete_snapshot(NAME, host.snapshots(NAME)[0]["id"])
    host.finish_tasks()
    try:
        assert content(reader) == wanted
    except (SourceError, ImageError):
        assert content(source.open_disk(disk_of(vm), first, None)) == wanted


def test_a_snapshot_that_somebody_removes_is_gone_and_the_rest_is_right(
    host: EsxHost, source: EsxSource, vm: VirtualMachine
) -> None:
    made = []
    for number in (1, 2, 3):
        host.write_disk(NAME, offset=number * MiB, data=bytes([number]) * 4096)
        made.append(take(source, vm, number))
    base = content(source.open_disk(disk_of(vm), made[0], None))
    host.delete_snapshot(NAME, host.snapshots(NAME)[1]["id"])
    host.finish_tasks()
    assert [one.key for one in source.snapshots(vm.uuid, MARK)] == [made[0].key, made[2].key]
    with pytest.raises(SourceError, match="is gone"):
        source.open_disk(disk_of(vm), made[1], made[0])
    assert content(source.open_disk(disk_of(vm), made[2], made[0]), base) == host.read_disk(NAME)


def test_after_a_revert_a_snapshot_of_the_other_branch_is_of_no_use(
    host: EsxHost, source: EsxSource, vm: VirtualMachine
) -> None:
    first, second = take(source, vm, 1), take(source, vm, 2)
    host.revert(NAME, host.snapshots(NAME)[0]["id"])
    with pytest.raises(SourceError, match="no frozen image"):
        source.open_disk(disk_of(vm), second, first)
    assert [one.disks.keys() for one in source.snapshots(vm.uuid, MARK)] == [{disk_of(vm).key}, set()]


def test_a_connection_that_dies_in_a_pass_is_lost_and_goes_on_where_it_was(
    host: EsxHost, source: EsxSource, vm: VirtualMachine
) -> None:
    host.write_disk(NAME, offset=0, data=b"a" * SIZE)
    first = take(source, vm, 1)
    host.set_sftp(die_after=3 * MiB)
    reader = source.open_disk(disk_of(vm), first, None)
    positions: list[int] = [0]
    with pytest.raises(ConnectionLost):
        drain(reader, 0, positions)
    reader.close()
    host.set_sftp(die_after=-1)
    other = connect(host)
    again = other.open_disk(disk_of(vm), first, None)
    assert again.fingerprint == reader.fingerprint
    drain(again, positions[-1], positions)
    again.close()
    other.close()
    assert positions == sorted(set(positions))
    assert positions[-1] == SIZE


@pytest.mark.parametrize("kind", ["drop", "lost_reply", "no_answer", "cut_answer", "error_after", "late"])
def test_whatever_becomes_of_an_order_there_is_one_snapshot(
    host: EsxHost, source: EsxSource, vm: VirtualMachine, kind: str
) -> None:
    host.fault("snapshot.create", kind, seconds=0.5)
    for _ in range(2):
        try:
            made = take(source, vm, 1)
            break
        except ConnectionLost:
            continue
    assert [one["name"] for one in host.snapshots(NAME)] == [f"{MARK}1"]
    assert source.snapshots(vm.uuid, MARK) == [made]


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("get.summary", kind) for kind in ("drop", "lost_reply", "hostd_down", "cut_answer", "no_answer")),
        ("snapshot.get", "hostd_down"),
        ("cat", "drop"),
    ],
)
def test_a_read_survives_one_bad_moment(host: EsxHost, source: EsxSource, vm: VirtualMachine, command: str, kind: str) -> None:
    host.fault(command, kind)
    assert source.snapshots(vm.uuid, MARK) == []
    assert host.faults_left() == []


def test_our_files_are_closed_so_that_the_host_can_merge(host: EsxHost, source: EsxSource, vm: VirtualMachine) -> None:
    first = take(source, vm, 1)
    reader = source.open_disk(disk_of(vm), first, None)
    with pytest.raises(SourceError, match="while disks are read"):
        source.remove_snapshot(vm.uuid, first)
    reader.close()
    source.remove_snapshot(vm.uuid, first)
    assert host.vm(NAME)["fields"]["consolidationNeeded"] is False
    assert host.snapshots(NAME) == []


def test_a_vm_that_needs_consolidation_is_blocked_until_somebody_does_it(
    host: EsxHost, source: EsxSource, vm: VirtualMachine
) -> None:
    """A backup reads a file that the host wants to merge."""
    made = host.foreign_snapshot(NAME)
    backup = SshHost(ssh_config(host))
    with backup.sftp() as client:
        client.open(host.extent(host.chain(NAME)[-1]))
        host.delete_snapshot(NAME, made["id"])
        host.finish_tasks()
        found = [one for one in source.check(vm) if "need consolidation" in one.what]
        assert [one.severity for one in found] == [Severity.BLOCKER]
    backup.close()
    while host.holders():
        time.sleep(0.05)
    host.consolidate(NAME)
    assert source.check(vm) == []


def test_a_locked_base_is_seen_before_its_first_byte(build: Build) -> None:
    host = build(HostOptions(base_stays_locked="files"))
    source = connect(host)
    vm = source.inspect(host.vm(NAME)["uuid"])
    first = take(source, vm, 1)
    with pytest.raises(EsxError, match="Device or resource busy") as caught:
        source.open_disk(disk_of(vm), first, None)
    assert caught.value.fault is Fault.LOCKED
    source.close()


def test_two_witnesses_follow_what_the_host_does(host: EsxHost, source: EsxSource, vm: VirtualMachine) -> None:
    assert source.off_evidence(vm.uuid).proved is False
    host.guest_stops(NAME)
    assert source.off_evidence(vm.uuid).proved is True
    host.vmotion_away(NAME)
    with pytest.raises(EsxError):
        source.off_evidence(vm.uuid)
    host.vmotion_back(NAME)
    host.ha_restarts(NAME)
    assert source.off_evidence(vm.uuid).proved is (not host.is_running(NAME))


def test_a_fenced_vm_stays_off_over_a_restart_of_the_host(build: Build) -> None:
    host = build(autostart=AutostartSpec(order=2))
    source = connect(host)
    uuid = host.vm(NAME)["uuid"]
    source.fence(uuid, "tokvm: a cutover")
    source.shut_down(uuid, deadline_s=20, force=False)
    host.host_restarts()
    assert not host.is_running(NAME)
    assert source.is_fenced(uuid)
    source.unfence(uuid)
    host.host_restarts()
    assert host.is_running(NAME)
    assert source.power(uuid) is PowerState.RUNNING
    source.close()


def test_a_question_at_power_on_is_told(build: Build) -> None:
    host = build(running=False, asks="This virtual machine might have been moved or copied.")
    source = connect(host)
    with pytest.raises(SourceError, match="moved or copied"):
        source.start(host.vm(NAME)["uuid"])
    source.close()


@pytest.mark.parametrize(("dumps", "version"), [("old", "5.5.0"), ("lean", "8.0.3")])
def test_old_and_new_ways_to_print_are_read(build: Build, dumps: str, version: str) -> None:
    host = build(HostOptions(dumps=dumps, version=version, fault_code=0, vcenter="192.0.2.7", limits=False, cap=32768))
    source = connect(host)
    vm = source.inspect(source.find(NAME))
    found = source.check(vm)
    assert [one.severity for one in found] == [Severity.WARNING]
    assert "192.0.2.7" in found[0].what
    host.write_disk(NAME, offset=MiB, data=b"a" * 4096)
    first = take(source, vm, 1)
    assert content(source.open_disk(disk_of(vm), first, None)) == host.read_disk(NAME)
    source.fence(vm.uuid, "x")
    source.shut_down(vm.uuid, deadline_s=20, force=False)
    assert source.off_evidence(vm.uuid).proved
    source.close()


def test_a_key_that_esxi_does_not_take_is_named(host: EsxHost, tmp_path: Path) -> None:
    key = tmp_path / "ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    sshd = host.sshd
    config = SshConfig.parse(sshd.netloc, config_file="/dev/null", known_hosts=str(sshd.known_hosts), identity=str(key))
    source = EsxSource(SshHost(config))
    with pytest.raises(LoginRefused) as caught:
        source.list_machines()
    assert "ecdsa" in caught.value.fix
    source.close()


HOSTILE = [
    "-oProxyCommand=touch {canary}",
    "$(touch {canary})",
    "`touch {canary}`",
    "'; touch {canary}; '",
    '"; touch {canary}; "',
    'ends in "quotes"',
    "two\nlines",
    "12     [datastore1] x/x.vmx   y   vmx-19",
    "\u2018curly\u2019 \U0001f4a3",
    "%s%n 100%",
    "a|b||22",
    "*",
]


USED = (1, 4, 5, 7)
"""Those that go through all of a migration's commands."""


def test_hostile_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    names = [name.replace("{canary}", str(canary)) for name in HOSTILE]
    machines = [
        MachineSpec(name, disks=[DiskSpec(MiB)], nics=[NicSpec(network=name)], fields={"annotation": name}, running=False)
        for name in names
    ]
    with build_host(tmp_path / "host", machines=machines) as host:
        source = connect(host)
        assert [one.name for one in source.list_machines()] == names
        for name in (names[number] for number in USED):
            go_through(source, host.vm(name)["uuid"], name)
        source.close()
        assert host.violations() == []
    assert not canary.exists()


def go_through(source: EsxSource, uuid: str, name: str) -> None:
    vm = source.inspect(uuid)
    assert (vm.name, vm.description, vm.nics[0].network) == (name, name, name)
    assert source.claim(uuid, name) == name
    source.fence(uuid, name)
    source.unfence(uuid)
    first = take(source, vm, 1)
    content(source.open_disk(vm.disks[0], first, None), bytes(MiB))
    source.remove_snapshot(uuid, first)
    source.release(uuid, name)
