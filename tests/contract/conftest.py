"""Worlds that a Source is tried in: the same questions to each.

xenserver: the real source, the real ssh, a real sshd, the XenServer persona behind it
hyperv:    the same with the Hyper-V persona
fake:      testing.fakes.FakeSource, which the cutover's tests rely on
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tokvm.core.machine import Disk, Snapshot, VirtualMachine
from tokvm.core.units import MiB
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.base import Source
from tokvm.sources.hyperv import power as hyperv_power
from tokvm.sources.hyperv import snapshots as hyperv_snapshots
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.sources.xenserver import power, snapshots
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing import fakes
from tokvm.testing.hyperv import host as hyperv
from tokvm.testing.xenserver.host import DiskSpec, HostOptions, MachineSpec, NicSpec, XenHost, build_host

SIZES = (8 * MiB, 3 * MiB + 512)
NAME = "we,b\\1\n$(id) 'x'"


class World(Protocol):
    """A source with one running VM of two disks, and the hands of its guest."""

    source: Source
    name: str
    grain: int
    """The smallest piece that a base copy can tell from its neighbours, bytes."""

    @property
    def vm(self) -> str:
        """The VM's uuid."""
        ...

    def described(self) -> VirtualMachine:
        """What `inspect` says of uuid and disks, known without asking (asking over a real sshd takes a second)."""
        ...

    def connect(self) -> Source:
        """Another source object to the same host, as the next process would have."""
        ...

    def write(self, disk: int, offset: int, data: bytes) -> None: ...

    def read(self, disk: int) -> bytes: ...

    def foreign_snapshot(self) -> None:
        """Somebody else's snapshot."""
        ...

    def snapshot_count(self) -> int: ...

    def lose_reply(self, verb: str) -> None:
        """The next `snapshot`, `start` or `stop` is done, but its answer is lost."""
        ...

    def ignore_shutdown(self) -> None: ...

    def close(self) -> None: ...


class XenWorld:
    """Implements World."""

    name = NAME
    grain = 512

    def __init__(self, folder: Path) -> None:
        disks = [DiskSpec(size) for size in SIZES]
        nics = [NicSpec("02:16:3E:0A:0B:0C", "LAN, the\nfirst"), NicSpec("02:16:3e:0a:0b:0d")]
        spec = MachineSpec(NAME, disks=disks, nics=nics, vcpus=2, description="-oProxyCommand=x")
        self.host: XenHost = build_host(folder, machines=[spec], options=HostOptions())
        self.sources: list[XenServerSource] = []
        self.source: Source = self.connect()

    @property
    def vm(self) -> str:
        return self.host.uuid(NAME)

    def described(self) -> VirtualMachine:
        disks = [Disk(index, self.host.vdi(NAME, index), size, device=str(index)) for index, size in enumerate(SIZES)]
        return VirtualMachine(self.vm, NAME, 2, 1, tuple(disks))

    def connect(self) -> XenServerSource:
        sshd = self.host.sshd
        config = SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts))
        self.sources.append(XenServerSource(SshHost(config)))
        return self.sources[-1]

    def write(self, disk: int, offset: int, data: bytes) -> None:
        self.host.write_disk(NAME, disk, offset=offset, data=data)

    def read(self, disk: int) -> bytes:
        return self.host.read_disk(NAME, disk)

    def foreign_snapshot(self) -> None:
        made = self.host.run("xe", "vm-snapshot", f"uuid={self.vm}", "new-name-label=tokvm-x")
        with self.host.edit() as state:
            state["vms"][made.text]["name"] = "nightly, of\nsomebody"

    def snapshot_count(self) -> int:
        return len(self.host.snapshots(NAME))

    def lose_reply(self, verb: str) -> None:
        self.host.fault({"snapshot": "xe vm-snapshot", "start": "xe vm-start", "stop": "xe vm-shutdown"}[verb], "lost_reply")

    def ignore_shutdown(self) -> None:
        self.host.set_guest(NAME, ignores_shutdown=True)

    def close(self) -> None:
        for source in self.sources:
            source.close()
        self.host.close()


class HyperVWorld:
    """Implements World."""

    name = NAME
    grain = 2 * MiB

    def __init__(self, folder: Path) -> None:
        disks = [hyperv.DiskSpec(size) for size in SIZES]
        nics = [hyperv.NicSpec("00155D0A0B0C", "LAN, the\nfirst"), hyperv.NicSpec("00155d0a0b0d")]
        spec = hyperv.MachineSpec(NAME, disks=disks, nics=nics, vcpus=2, notes="-oProxyCommand=x")
        options = hyperv.HostOptions(banner=True, merge_s=0.3, orphans=True)
        self.host = hyperv.build_host(folder, machines=[spec], options=options)
        self.sources: list[HyperVSource] = []
        self.source: Source = self.connect()

    @property
    def vm(self) -> str:
        return self.host.id(NAME)

    def described(self) -> VirtualMachine:
        keys = [self.host.disk_key(NAME, index) for index in range(len(SIZES))]
        disks = [
            Disk(index, key, size, device=f"SCSI 0:{index}") for index, (key, size) in enumerate(zip(keys, SIZES, strict=True))
        ]
        return VirtualMachine(self.vm, NAME, 2, 1, tuple(disks))

    def connect(self) -> HyperVSource:
        sshd = self.host.sshd
        config = SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts))
        self.sources.append(HyperVSource(SshHost(config)))
        return self.sources[-1]

    def write(self, disk: int, offset: int, data: bytes) -> None:
        self.host.write_disk(NAME, disk, offset=offset, data=data)

    def read(self, disk: int) -> bytes:
        return self.host.read_disk(NAME, disk)

    def foreign_snapshot(self) -> None:
        self.host.foreign_checkpoint(NAME, "nightly, of\nsomebody")

    def snapshot_count(self) -> int:
        return len(self.host.checkpoints(NAME))

    def lose_reply(self, verb: str) -> None:
        self.host.fault({"snapshot": "checkpoint", "start": "start", "stop": "shutdown"}[verb], "lost_reply")

    def ignore_shutdown(self) -> None:
        self.host.set_guest(NAME, ignores_shutdown=True)

    def close(self) -> None:
        for source in self.sources:
            source.close()
        self.host.close()


class FakeWorld:
    """Implements World. Its guest writes a block at every call, as long as it runs."""

    name = "guest"
    grain = fakes.BLOCK

    def __init__(self) -> None:
        self.world = fakes.World.make(disks=2)
        self.source: Source = self.connect()

    @property
    def vm(self) -> str:
        return fakes.UUID

    def described(self) -> VirtualMachine:
        return self.world.machine()

    def connect(self) -> Source:
        return fakes.FakeSource(self.world)

    def write(self, disk: int, offset: int, data: bytes) -> None:
        self.world.disks[disk][offset : offset + len(data)] = data
        self.world.writes += 1
        for block in range(offset // fakes.BLOCK, -(-(offset + len(data)) // fakes.BLOCK)):
            self.world.changed[disk][block] = self.world.writes

    def read(self, disk: int) -> bytes:
        return bytes(self.world.disks[disk])

    def foreign_snapshot(self) -> None:
        self.world.snapshots["nightly"] = (Snapshot("other", "nightly", {}), [], [])

    def snapshot_count(self) -> int:
        return len(self.world.snapshots)

    def lose_reply(self, verb: str) -> None:
        self.world.plan[self.world.calls] = fakes.Fault.LOSE_REPLY

    def ignore_shutdown(self) -> None:
        self.world.obeys = False

    def close(self) -> None:
        assert self.world.violations == []


@pytest.fixture
def xen_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[XenWorld]:
    """Waiting is shortened: the persona is quick."""
    monkeypatch.setattr(power, "POLL_S", 0.05)
    monkeypatch.setattr(snapshots, "POLL_S", 0.05)
    made = XenWorld(tmp_path / "host")
    try:
        yield made
        assert made.host.violations() == []
    finally:
        made.close()


@pytest.fixture
def hyperv_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HyperVWorld]:
    """Waiting is shortened: the persona is quick."""
    monkeypatch.setattr(hyperv_power, "POLL_S", 0.05)
    monkeypatch.setattr(hyperv_snapshots, "POLL_S", 0.05)
    made = HyperVWorld(tmp_path / "host")
    try:
        yield made
        assert made.host.violations() == []
    finally:
        made.close()


@pytest.fixture(
    params=["fake", pytest.param("xenserver", marks=pytest.mark.slow), pytest.param("hyperv", marks=pytest.mark.slow)]
)
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return FakeWorld()
    made: World = request.getfixturevalue({"xenserver": "xen_world", "hyperv": "hyperv_world"}[request.param])
    return made
