"""A played XenServer, Hyper-V, ESXi host or vSphere for each test, and ssh to it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.testing.esxi import host as esxi
from tokvm.testing.hyperv import host as hyperv
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.xenserver.host import DiskSpec, HostOptions, MachineSpec, XenHost, build_host

MiB = 1 << 20
SSH = Callable[..., "subprocess.CompletedProcess[bytes]"]
Build = Callable[..., XenHost]
BuildHyperV = Callable[..., hyperv.HyperVHost]
BuildEsxi = Callable[..., esxi.EsxHost]
BuildVSphere = Callable[..., VSphere]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Build a host: options by keyword, machines by position. Everything is stopped at the end."""
    hosts: list[XenHost] = []

    def make(*machines: MachineSpec, **options: object) -> XenHost:
        specs = machines or (MachineSpec("web", disks=[DiskSpec(16 * MiB), DiskSpec(5 * MiB)]),)
        host = build_host(tmp_path / f"host{len(hosts)}", machines=specs, options=HostOptions(**options))  # type: ignore[arg-type]
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def host(build: Build) -> XenHost:
    return build()


@pytest.fixture
def ssh() -> SSH:
    """A line sent to a host by the real ssh."""

    def send(host: XenHost, line: str, *, timeout_s: float = 30.0) -> subprocess.CompletedProcess[bytes]:
        sshd = host.sshd
        argv = ["ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), "--", f"{sshd.user}@{sshd.host}", line]
        return subprocess.run(argv, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL)

    return send


@pytest.fixture
def build_hyperv(tmp_path: Path) -> Iterator[BuildHyperV]:
    """Build a Hyper-V host: options by keyword, machines by position. Everything is stopped at the end."""
    hosts: list[hyperv.HyperVHost] = []

    def make(*machines: hyperv.MachineSpec, **options: object) -> hyperv.HyperVHost:
        specs = machines or (hyperv.MachineSpec("web", disks=[hyperv.DiskSpec(8 * MiB), hyperv.DiskSpec(5 * MiB)]),)
        folder = tmp_path / f"hyperv{len(hosts)}"
        host = hyperv.build_host(folder, machines=specs, options=hyperv.HostOptions(**options))  # type: ignore[arg-type]
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def build_esxi(tmp_path: Path) -> Iterator[BuildEsxi]:
    """Build an ESXi host: options by keyword, machines by position. Everything is stopped at the end."""
    hosts: list[esxi.EsxHost] = []

    def make(*machines: esxi.MachineSpec, **options: object) -> esxi.EsxHost:
        specs = machines or (esxi.MachineSpec("web", disks=[esxi.DiskSpec(8 * MiB), esxi.DiskSpec(5 * MiB)]),)
        folder = tmp_path / f"esxi{len(hosts)}"
        host = esxi.build_host(folder, machines=specs, options=esxi.HostOptions(**options))  # type: ignore[arg-type]
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def build_vsphere(build_esxi: BuildEsxi) -> Iterator[BuildVSphere]:
    """A played vSphere over an ESXi host of its own: the host's options in `esxi`, ours by keyword, machines by position."""
    made: list[VSphere] = []

    def make(
        *machines: esxi.MachineSpec, vcenter: bool = True, esxi: dict[str, object] | None = None, **options: object
    ) -> VSphere:
        made.append(VSphere(build_esxi(*machines, **(esxi or {})), vcenter=vcenter, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()
