"""A played ESXi host with vSphere's API in front, one running VM, and real sources to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.disk import DiskReader
from tokvm.core.machine import VirtualMachine
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.remote.tls import TlsTrust
from tokvm.sources.vmware.api import lease, power, snapshots, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.place import Place
from tokvm.sources.vmware.api.source import Bytes, VsphereSource
from tokvm.testing.esxi.host import DiskSpec, EsxHost, HostOptions, MachineSpec, build_host
from tokvm.testing.vsphere.host import VSphere

MiB = 1 << 20
SIZE = 8 * MiB
DOCUMENTED = Path(__file__).parents[2] / "docs/vsphere-calls.md"
NAME = "web"
PLAIN = HostOptions()


class Rig:
    """`host` holds the VM, `vsphere` is asked. Every source is closed at the end, and nothing odd may have been asked."""

    def __init__(self, folder: Path, *, vcenter: bool, options: HostOptions, spec: dict[str, Any], api: dict[str, Any]) -> None:
        spec.setdefault("disks", [DiskSpec(SIZE)])
        self.host: EsxHost = build_host(folder / "host", machines=[MachineSpec(NAME, **spec)], options=options)
        self.vsphere = VSphere(self.host, vcenter=vcenter, **api)
        self._sources: list[VsphereSource] = []
        self.source = self.connect()

    @property
    def uuid(self) -> str:
        return self.host.vm(NAME)["uuid"]

    @property
    def vm(self) -> VirtualMachine:
        return self.source.inspect(self.uuid)

    def connect(self, *, trust: TlsTrust | None = None, password: str = "", **how: Any) -> VsphereSource:
        """Another source to it, as the next process would have. how: source.Bytes; `ssh=True`: from the host."""
        if how.get("ssh") is True:
            how |= {"ssh": f"ssh://{self.host.sshd.netloc}", "connect": self._ssh}
        client = Client(
            Place.parse(self.vsphere.url.removeprefix("vpx:")),
            lambda: password or self.vsphere.password,
            trust or TlsTrust.of(ca_file=str(self.vsphere.ca_file)),
        )
        self._sources.append(VsphereSource(client, Bytes(**how)))
        return self._sources[-1]

    def _ssh(self, url: str) -> SshHost:
        sshd = self.host.sshd
        where = url.removeprefix("ssh://")
        return SshHost(SshConfig.parse(where, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))

    def write(self, offset: int, data: bytes, *, disk: int = 0) -> None:
        self.host.write_disk(NAME, disk, offset=offset, data=data)

    def content(self, disk: int = 0) -> bytes:
        return self.host.read_disk(NAME, disk)

    def snapshot_names(self) -> list[str]:
        return [one["name"] for one in self.host.snapshots(NAME)]

    def close(self) -> None:
        for source in self._sources:
            source.close()
        self.vsphere.close()
        self.host.close()


def applied(reader: DiskReader, before: bytes | bytearray | None = None) -> bytes:
    """What a target holds after this pass over `before`; closes the reader."""
    target = bytearray(reader.size if before is None else before)
    try:
        for chunk in reader.chunks():
            target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
    finally:
        reader.close()
    return bytes(target)


def rigs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Waiting is shortened: the endpoint is quick."""
    for module in (power, snapshots, tasks, lease):
        monkeypatch.setattr(module, "POLL_S", 0.03)
    monkeypatch.setattr(power, "LANDING_S", 1.0)
    made: list[Rig] = []

    def make(
        *, vcenter: bool = True, options: HostOptions | None = None, api: dict[str, Any] | None = None, **spec: Any
    ) -> Rig:
        folder = tmp_path / f"rig-{len(made)}"
        made.append(Rig(folder, vcenter=vcenter, options=options or HostOptions(), spec=spec, api=api or {}))
        return made[-1]

    try:
        yield make
        documented = set(re.findall(r"`?\b([A-Z][A-Za-z_]+)\b", DOCUMENTED.read_text(encoding="utf-8")))
        assert {call for one in made for call in one.vsphere.calls()} <= documented
        assert [one.vsphere.violations() for one in made] == [[] for _ in made]
        assert [one.host.violations() for one in made] == [[] for _ in made]
    finally:
        for rig in made:
            rig.close()
