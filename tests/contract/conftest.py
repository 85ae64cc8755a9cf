"""Worlds that a Source is tried in: the same questions to each.

xenserver: the real source, the real ssh, a real sshd, the XenServer persona behind it
hyperv:    the same with the Hyper-V persona
winrm:     the same persona behind a WinRM service that speaks PSRP, its drives behind a real Samba
esx:       the same with the ESXi persona, on a datastore with seSparse snapshots
vcenter:   the real vSphere source, a played vCenter over the ESXi persona; disks by SFTP from the host
hostd:     the same with an ESXi's own API, on NFS; disks by /folder alone
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
from tokvm.remote.tls import TlsTrust
from tokvm.sources.base import Source
from tokvm.sources.hyperv import power as hyperv_power
from tokvm.sources.hyperv import snapshots as hyperv_snapshots
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.sources.vmware import power as esx_power
from tokvm.sources.vmware import snapshots as esx_snapshots
from tokvm.sources.vmware.api import lease as api_lease
from tokvm.sources.vmware.api import power as api_power
from tokvm.sources.vmware.api import snapshots as api_snapshots
from tokvm.sources.vmware.api import tasks as api_tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.place import Place
from tokvm.sources.vmware.api.source import Bytes, VsphereSource
from tokvm.sources.vmware.source import EsxSource
from tokvm.sources.xenserver import power, snapshots
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing import fakes
from tokvm.testing.esxi import host as esxi
from tokvm.testing.hyperv import host as hyperv
from tokvm.testing.hyperv import samba
from tokvm.testing.vsphere.host import VSphere
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


class WinrmWorld(HyperVWorld):
    """Implements World, over WinRM and SMB."""

    def __init__(self, folder: Path) -> None:
        from tokvm.testing.hyperv.winrm_side import WinrmSide

        self._side: WinrmSide | None = None
        super().__init__(folder)

    def connect(self) -> HyperVSource:
        from tokvm.testing.hyperv.winrm_side import WinrmSide

        self._side = self._side or WinrmSide(self.host, self.host.folder.parent / "winrm")
        self.sources.append(self._side.connect())
        return self.sources[-1]

    def close(self) -> None:
        super().close()
        if self._side is not None:
            self._side.close()


class EsxWorld:
    """Implements World."""

    name = NAME
    grain = max(SIZES)
    """A flat base has no map."""

    def __init__(self, folder: Path) -> None:
        disks = [esxi.DiskSpec(size) for size in SIZES]
        nics = [esxi.NicSpec(mac="00:50:56:0a:0b:0c", network='LAN, the "first"'), esxi.NicSpec(mac="00:50:56:0A:0B:0D")]
        spec = esxi.MachineSpec(NAME, disks=disks, nics=nics, vcpus=2, fields={"annotation": 'a "b"\n1  [ds] c/c.vmx'})
        options = esxi.HostOptions(merge_s=0.3, fault_code=0)
        self.host = esxi.build_host(folder, machines=[spec], options=options)
        self.sources: list[EsxSource] = []
        self.source: Source = self.connect()

    @property
    def vm(self) -> str:
        return self.host.vm(NAME)["uuid"]

    def described(self) -> VirtualMachine:
        store = self.host.state()["datastores"][0]
        bases = [self.host.chain(NAME, index)[-1] for index in range(len(SIZES))]
        named = [base.replace(f"/vmfs/volumes/{store['uuid']}/", f"[{store['name']}] ") for base in bases]
        disks = [
            Disk(index, f"scsi0:{index}:{name}", size, device=f"scsi0:{index}")
            for index, (name, size) in enumerate(zip(named, SIZES, strict=True))
        ]
        return VirtualMachine(self.vm, NAME, 2, 1, tuple(disks))

    def connect(self) -> EsxSource:
        sshd = self.host.sshd
        config = SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts))
        self.sources.append(EsxSource(SshHost(config)))
        return self.sources[-1]

    def write(self, disk: int, offset: int, data: bytes) -> None:
        self.host.write_disk(NAME, disk, offset=offset, data=data)

    def read(self, disk: int) -> bytes:
        return self.host.read_disk(NAME, disk)

    def foreign_snapshot(self) -> None:
        self.host.foreign_snapshot(NAME, "nightly, of\nsomebody")

    def snapshot_count(self) -> int:
        return len(self.host.snapshots(NAME))

    def lose_reply(self, verb: str) -> None:
        self.host.fault({"snapshot": "snapshot.create", "start": "power.on", "stop": "power.shutdown"}[verb], "lost_reply")

    def ignore_shutdown(self) -> None:
        self.host.set_guest(NAME, ignores_shutdown=True)

    def close(self) -> None:
        for source in self.sources:
            source.close()
        self.host.close()


class VsphereWorld(EsxWorld):
    """Implements World, over the API. The snapshots that are made through it are the same host's."""

    def __init__(self, folder: Path, *, vcenter: bool) -> None:
        disks = [esxi.DiskSpec(size) for size in SIZES]
        spec = esxi.MachineSpec(NAME, disks=disks, vcpus=2, fields={"annotation": 'a "b"\n]]>'})
        store = esxi.DatastoreSpec("Store [1] + ä", type="VMFS-6" if vcenter else "NFS")
        self.host = esxi.build_host(folder, machines=[spec], options=esxi.HostOptions(merge_s=0.3, datastores=[store]))
        self.vsphere = VSphere(self.host, vcenter=vcenter)
        self._from_host = vcenter
        self.opened: list[VsphereSource] = []
        self.source: Source = self.connect()

    def connect(self) -> VsphereSource:  # type: ignore[override]
        trust = TlsTrust.of(ca_file=str(self.vsphere.ca_file))
        client = Client(Place.parse(self.vsphere.url.removeprefix("vpx:")), lambda: self.vsphere.password, trust)
        how = Bytes(f"ssh://{self.host.sshd.netloc}", self._ssh) if self._from_host else None
        self.opened.append(VsphereSource(client, how))
        return self.opened[-1]

    def _ssh(self, url: str) -> SshHost:
        sshd = self.host.sshd
        where = url.removeprefix("ssh://")
        return SshHost(SshConfig.parse(where, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))

    def lose_reply(self, verb: str) -> None:
        method = {"snapshot": "CreateSnapshot_Task", "start": "PowerOnVM_Task", "stop": "ShutdownGuest"}[verb]
        self.vsphere.fault(method, "lost_reply")

    def close(self) -> None:
        for source in self.opened:
            source.close()
        assert self.vsphere.violations() == []
        self.vsphere.close()
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
    yield from _hyperv_world(HyperVWorld, tmp_path, monkeypatch)


@pytest.fixture
def winrm_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HyperVWorld]:
    if why := samba.unavailable():
        pytest.skip(why)
    yield from _hyperv_world(WinrmWorld, tmp_path, monkeypatch)


def _hyperv_world(kind: type[HyperVWorld], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HyperVWorld]:
    """Waiting is shortened: the persona is quick."""
    monkeypatch.setattr(hyperv_power, "POLL_S", 0.05)
    monkeypatch.setattr(hyperv_snapshots, "POLL_S", 0.05)
    made = kind(folder / "host")
    try:
        yield made
        assert made.host.violations() == []
    finally:
        made.close()


@pytest.fixture
def esx_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EsxWorld]:
    """Waiting is shortened: the persona is quick."""
    monkeypatch.setattr(esx_power, "POLL_S", 0.05)
    monkeypatch.setattr(esx_snapshots, "POLL_S", 0.05)
    made = EsxWorld(tmp_path / "host")
    try:
        yield made
        assert made.host.violations() == []
    finally:
        made.close()


def _vsphere_world(folder: Path, monkeypatch: pytest.MonkeyPatch, *, vcenter: bool) -> Iterator[VsphereWorld]:
    """Waiting is shortened: the endpoint is quick."""
    for module in (api_power, api_snapshots, api_tasks, api_lease):
        monkeypatch.setattr(module, "POLL_S", 0.05)
    made = VsphereWorld(folder / "host", vcenter=vcenter)
    try:
        yield made
        assert made.host.violations() == []
    finally:
        made.close()


@pytest.fixture
def vcenter_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VsphereWorld]:
    yield from _vsphere_world(tmp_path, monkeypatch, vcenter=True)


@pytest.fixture
def hostd_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VsphereWorld]:
    yield from _vsphere_world(tmp_path, monkeypatch, vcenter=False)


@pytest.fixture(
    params=[
        "fake",
        pytest.param("xenserver", marks=pytest.mark.slow),
        pytest.param("hyperv", marks=pytest.mark.slow),
        pytest.param("winrm", marks=pytest.mark.slow),
        pytest.param("esx", marks=pytest.mark.slow),
        pytest.param("vcenter", marks=pytest.mark.slow),
        pytest.param("hostd", marks=pytest.mark.slow),
    ]
)
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return FakeWorld()
    name = {"xenserver": "xen"}.get(request.param, request.param)
    made: World = request.getfixturevalue(f"{name}_world")
    return made
