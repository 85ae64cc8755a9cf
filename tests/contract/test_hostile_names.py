"""Whatever a person called a VM, it stays text: over a real ssh and sshd to the played hosts and back, letter for letter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.base import Source
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing.hyperv import host as hyperv
from tokvm.testing.xenserver import host as xenserver

HOSTILE = [
    "-oProxyCommand=touch {canary}",
    "--help",
    "$(touch {canary})",
    "`touch {canary}`",
    "'; touch {canary}; '",
    '"; touch {canary}; "',
    "a'b",
    "a,b\\,c\\\\",
    "two\nlines\n",
    "uuid ( RO)           : 00000000-0000-0000-0000-000000000000",
    " leading and trailing ",
    "\u2018curly\u2019 \u201cquotes\u201d \U0001f4a3",
    "\x1b[2Jred\x07",
    "..",
    "/etc/passwd",
    "%s%n",
    "*",
    os.fsdecode(b"not utf-8 \xff\xfe"),
]

# Those that go through the whole of inspect, or of claim and fence: some 25 commands each, on XenServer a process for each.
INSPECTED = (0, 8, 17)
WRITTEN = (4, 17)


def shown(number: int) -> str:
    return ascii(HOSTILE[number])[:24]


class World:
    """A host whose VMs, and all about them that a person may name, have these names. `seen`: as the hypervisor tells them."""

    canary: Path
    names: list[str]
    host: xenserver.XenHost | hyperv.HyperVHost
    source: Source

    @property
    def seen(self) -> list[str]:
        return self.names

    def uuid(self, number: int) -> str:
        """By the persona's own record, past everything that is tested here."""
        raise NotImplementedError

    def config(self) -> SshConfig:
        sshd = self.host.sshd
        return SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts))


class XenWorld(World):
    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary"
        self.names = [name.replace("{canary}", str(self.canary)) for name in HOSTILE]
        machines = [
            xenserver.MachineSpec(
                name,
                disks=[xenserver.DiskSpec(MiB)],
                nics=[xenserver.NicSpec(f"02:16:3e:00:00:{number:02x}", name)],
                description=name,
            )
            for number, name in enumerate(self.names)
        ]
        self.host = self._xen = xenserver.build_host(folder / "host", machines=machines)
        self.source = XenServerSource(SshHost(self.config()))

    def uuid(self, number: int) -> str:
        return next(str(vm["uuid"]) for vm in self._xen.state()["vms"].values() if vm["name"] == self.names[number])


class HyperVWorld(World):
    """Windows has UTF-16: what no text can be becomes U+FFFD on its way out of PowerShell."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary"
        self.names = [name.replace("{canary}", str(self.canary)) for name in HOSTILE]
        machines = [
            hyperv.MachineSpec(
                name,
                disks=[hyperv.DiskSpec(MiB)],
                nics=[hyperv.NicSpec(f"00155D0000{number:02X}", switch=name)],
                notes=name,
                running=False,
            )
            for number, name in enumerate(self.names)
        ]
        options = hyperv.HostOptions(banner=True, default_shell="powershell")
        self.host = self._hyperv = hyperv.build_host(folder / "host", machines=machines, options=options)
        self.source = HyperVSource(SshHost(self.config()))

    @property
    def seen(self) -> list[str]:
        return [name.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for name in self.names]

    def uuid(self, number: int) -> str:
        return next(vm["id"] for vm in self._hyperv.state()["vms"].values() if vm["name"] == self.names[number])


@pytest.fixture(scope="module", params=[XenWorld, HyperVWorld], ids=["xenserver", "hyperv"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    made: World = request.param(tmp_path_factory.mktemp("hostile"))
    try:
        yield made
    finally:
        made.source.close()
        made.host.close()
    assert not made.canary.exists()


def unharmed(world: World) -> None:
    assert world.host.violations() == []
    assert not world.canary.exists()


@pytest.mark.slow
def test_all_names_are_listed_letter_for_letter(world: World) -> None:
    assert sorted(machine.name for machine in world.source.list_machines()) == sorted(world.seen)
    unharmed(world)


@pytest.mark.slow
def test_every_name_finds_its_own_vm(world: World) -> None:
    assert [world.source.find(name) for name in world.seen] == [world.uuid(number) for number in range(len(world.seen))]
    unharmed(world)


@pytest.mark.slow
@pytest.mark.parametrize("number", INSPECTED, ids=shown)
def test_a_hostile_vm_is_described(world: World, number: int) -> None:
    name = world.seen[number]
    vm = world.source.inspect(world.uuid(number))
    assert (vm.name, vm.description, vm.nics[0].network) == (name, name, name)
    unharmed(world)


@pytest.mark.slow
@pytest.mark.parametrize("number", WRITTEN, ids=shown)
def test_hostile_values_are_written_and_read_back(world: World, number: int) -> None:
    uuid = world.uuid(number)
    assert world.source.claim(uuid, world.names[number]) == world.names[number]
    world.source.fence(uuid, world.names[number])
    assert world.source.is_fenced(uuid)
    world.source.unfence(uuid)
    world.source.release(uuid, world.names[number])
    assert not world.source.is_fenced(uuid)
    unharmed(world)
