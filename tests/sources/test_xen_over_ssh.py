"""The XenServer source over a real ssh and sshd when things break: what is raised, and that the next try is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, ImageError, NotOff, SourceError
from tokvm.core.machine import Disk, PowerState, Snapshot, VirtualMachine
from tokvm.core.units import MiB
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.xenserver import power, snapshots
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing.xenserver.host import DiskSpec, HostOptions, MachineSpec, XenHost, build_host

pytestmark = pytest.mark.slow

SIZE = 8 * MiB
MARK = "tokvm-ab12cd34-"


@pytest.fixture
def xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[XenHost]:
    monkeypatch.setattr(power, "POLL_S", 0.05)
    monkeypatch.setattr(snapshots, "POLL_S", 0.05)
    options = HostOptions(ha_delay_s=0.0, in_use_s=4.0)
    with build_host(tmp_path / "host", machines=[MachineSpec("web", disks=[DiskSpec(SIZE)])], options=options) as host:
        yield host
        assert host.violations() == []


@pytest.fixture
def over_ssh(xen: XenHost) -> Iterator[XenServerSource]:
    sshd = xen.sshd
    config = SshConfig.parse(
        sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts), progress_deadline_s=6.0
    )
    source = XenServerSource(SshHost(config))
    yield source
    source.close()


def machine(xen: XenHost) -> VirtualMachine:
    return VirtualMachine(xen.uuid("web"), "web", 1, 1, (Disk(0, xen.vdi("web"), SIZE, device="0"),))


def read(reader: DiskReader, target: bytearray, position: int = 0) -> int:
    """Apply chunks until the end or an error; the last position is where `target` is complete up to."""
    reached = position
    try:
        for chunk in reader.chunks(position):
            if chunk.data is not None:
                target[chunk.offset : chunk.offset + chunk.length] = chunk.data
            reached = chunk.position
            chunk.release()
    except SourceError:
        assert reached > position
    finally:
        reader.close()
    return reached


def read_all(source: XenServerSource, disk: Disk, at: Snapshot) -> None:
    reader = source.open_disk(disk, at, None)
    try:
        for chunk in reader.chunks():
            chunk.release()
    finally:
        reader.close()


def fill(xen: XenHost) -> None:
    for block in range(4):
        xen.write_disk("web", offset=block * 2 * MiB, data=bytes([block + 1]) * MiB)


def test_a_broken_stream_goes_on_where_it_was_with_the_tail_form(xen: XenHost, over_ssh: XenServerSource) -> None:
    fill(xen)
    vm = machine(xen)
    at = over_ssh.snapshot(vm, f"{MARK}1")
    target = bytearray(SIZE)
    xen.fault("vdi-export", "cut", at=5 * MiB)
    reached = read(over_ssh.open_disk(vm.disks[0], at, None), target)
    assert 2 * MiB < reached < 6 * MiB
    end = read(over_ssh.open_disk(vm.disks[0], at, None), target, reached)
    assert end > reached
    assert bytes(target) == xen.read_disk("web")
    assert any("| tail -c +" in command for command in xen.commands())


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("cut", ConnectionLost),
        ("stall", ConnectionLost),
        ("fail", SourceError),
        ("short", ImageError),
        ("http_500", ImageError),
    ],
)
def test_a_stream_that_ends_badly_is_never_taken_for_whole(
    xen: XenHost, over_ssh: XenServerSource, kind: str, error: type[Exception]
) -> None:
    fill(xen)
    vm = machine(xen)
    at = over_ssh.snapshot(vm, f"{MARK}1")
    if kind == "http_500":
        xen.fault("vdi-export", "http_500")
    else:
        xen.fault("vdi-export", kind, at=3 * MiB)
    with pytest.raises(error) as caught:
        read_all(over_ssh, vm.disks[0], at)
    assert "127.0.0.1" in str(caught.value)


def test_a_full_disk_in_place_of_a_delta_is_refused(xen: XenHost, over_ssh: XenServerSource) -> None:
    vm = machine(xen)
    first = over_ssh.snapshot(vm, f"{MARK}1")
    second = over_ssh.snapshot(vm, f"{MARK}2")
    xen.fault("vdi-export", "full")
    with pytest.raises(ImageError, match="differencing"):
        over_ssh.open_disk(vm.disks[0], second, first)


def test_a_base_that_is_gone_is_a_refusal_with_the_command(xen: XenHost, over_ssh: XenServerSource) -> None:
    vm = machine(xen)
    at = over_ssh.snapshot(vm, f"{MARK}1")
    gone = Snapshot(at.key, at.mark, {vm.disks[0].key: "99999999-9999-4999-8999-999999999999"})
    with pytest.raises(SourceError, match=r"vdi-export.*does not know this object"):
        over_ssh.open_disk(vm.disks[0], at, gone)


def test_a_snapshot_in_use_by_an_export_is_removed_a_little_later(xen: XenHost, over_ssh: XenServerSource) -> None:
    """dom0 detaches the disk some seconds after the export (`in_use_s`)."""
    vm = machine(xen)
    at = over_ssh.snapshot(vm, f"{MARK}1")
    read(over_ssh.open_disk(vm.disks[0], at, None), bytearray(SIZE))
    over_ssh.remove_snapshot(vm.uuid, at)
    assert xen.snapshots("web") == []
    assert list(xen.state()["vdis"]) == [vm.disks[0].key]
    assert any("vdi-destroy" in command for command in xen.commands())


def test_a_shutdown_given_up_at_the_deadline_is_seen_to_be_pending(xen: XenHost, over_ssh: XenServerSource) -> None:
    uuid = xen.uuid("web")
    xen.set_guest("web", shutdown_s=60.0)
    with pytest.raises(NotOff):
        over_ssh.shut_down(uuid, deadline_s=5.0, force=False)
    assert over_ssh.stop_pending(uuid)
    assert not over_ssh.off_evidence(uuid).proved


def test_ha_cannot_start_what_is_fenced_and_can_again_after(xen: XenHost, over_ssh: XenServerSource) -> None:
    with xen.edit() as state:
        state["vms"][xen.uuid("web")]["fields"]["ha-restart-priority"] = "restart"
        state["vms"][xen.uuid("web")]["maps"]["other-config"]["auto_poweron"] = "true"
    uuid = xen.uuid("web")
    over_ssh.fence(uuid, "tokvm: cutover")
    over_ssh.shut_down(uuid, deadline_s=30, force=False)
    xen.restart_host()
    assert over_ssh.off_evidence(uuid).proved
    over_ssh.unfence(uuid)
    assert over_ssh.power(uuid) in (PowerState.RUNNING, PowerState.OFF)  # HA may have been quicker than we
    over_ssh.start(uuid)
    assert over_ssh.power(uuid) is PowerState.RUNNING
    maps = xen.vm("web")["maps"]
    assert maps["blocked-operations"] == {}
    assert maps["other-config"]["auto_poweron"] == "true"
    assert "tokvm-fence" not in maps["other-config"]


def test_a_host_that_breaks_every_connection_is_lost_not_answered(xen: XenHost, over_ssh: XenServerSource) -> None:
    uuid = xen.uuid("web")
    xen.fault("power-state", "drop", times=1)
    assert over_ssh.power(uuid) is PowerState.RUNNING  # asked again
    xen.fault("power-state", "drop", times=0)
    with pytest.raises(ConnectionLost):
        over_ssh.power(uuid)
    xen.clear_faults()
    assert over_ssh.power(uuid) is PowerState.RUNNING
