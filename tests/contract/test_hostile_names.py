"""Whatever a person called a VM, it stays text: over a real ssh and sshd to the XenServer persona and back, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, NicSpec, XenHost, build_host

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

# Those that go through the whole of inspect, or of claim and fence: some 25 commands each, a process of the persona for each.
INSPECTED = (0, 8, 17)
WRITTEN = (4, 17)


def shown(number: int) -> str:
    return ascii(HOSTILE[number])[:24]


@dataclass
class World:
    host: XenHost
    source: XenServerSource
    names: list[str]
    canary: Path

    def uuid(self, number: int) -> str:
        """By the persona's own record, past everything that is tested here."""
        found = [vm["uuid"] for vm in self.host.state()["vms"].values() if vm["name"] == self.names[number]]
        return str(found[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hostile")
    canary = folder / "canary"
    names = [name.replace("{canary}", str(canary)) for name in HOSTILE]
    machines = [
        MachineSpec(name, disks=[DiskSpec(MiB)], nics=[NicSpec(f"02:16:3e:00:00:{number:02x}", name)], description=name)
        for number, name in enumerate(names)
    ]
    host = build_host(folder / "host", machines=machines)
    sshd = host.sshd
    config = SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts))
    source = XenServerSource(SshHost(config))
    try:
        yield World(host, source, names, canary)
    finally:
        source.close()
        host.close()
    assert not canary.exists()


def unharmed(world: World) -> None:
    assert world.host.violations() == []
    assert not world.canary.exists()


def test_all_names_are_listed_byte_for_byte(world: World) -> None:
    assert sorted(machine.name for machine in world.source.list_machines()) == sorted(world.names)
    unharmed(world)


@pytest.mark.slow
def test_every_name_finds_its_own_vm(world: World) -> None:
    assert [world.source.find(name) for name in world.names] == [world.uuid(number) for number in range(len(world.names))]
    unharmed(world)


@pytest.mark.slow
@pytest.mark.parametrize("number", INSPECTED, ids=shown)
def test_a_hostile_vm_is_described(world: World, number: int) -> None:
    name = world.names[number]
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
