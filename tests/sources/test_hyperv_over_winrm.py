"""A whole Hyper-V source over WinRM and SMB, where it differs from SSH: disks on a file server, lost services in mid-copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.core.errors import ConnectionLost
from tokvm.core.machine import Severity
from tokvm.core.units import MiB
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.hyperv import samba
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec, build_host
from tokvm.testing.hyperv.winrm_side import WinrmSide

pytestmark = pytest.mark.slow

SIZE = 8 * MiB
FAR = "\\\\localhost\\vm s\\ü [1]\\web.vhdx"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HyperVHost]:
    """Two VMs: one with its disk on the host, one on a file server."""
    if why := samba.unavailable():
        pytest.skip(why)
    machines = [MachineSpec("near", disks=[DiskSpec(SIZE)]), MachineSpec("far", disks=[DiskSpec(SIZE, path=FAR)])]
    with build_host(tmp_path / "host", machines=machines) as made:
        for name in ("near", "far"):
            made.write_disk(name, 0, offset=MiB, data=os.urandom(2 * MiB))
        yield made
        assert made.violations() == []


@pytest.fixture
def side(host: HyperVHost, tmp_path: Path) -> Iterator[WinrmSide]:
    with WinrmSide(host, tmp_path / "winrm") as made:
        yield made


@pytest.fixture
def source(side: WinrmSide) -> Iterator[HyperVSource]:
    made = side.connect()
    yield made
    made.close()


def copied(source: HyperVSource, name: str, mark: str) -> bytes:
    vm = source.inspect(source.find(name))
    reader = source.open_disk(vm.disks[0], source.snapshot(vm, mark), None)
    disk = bytearray(reader.size)
    for chunk in reader.chunks():
        if chunk.data is not None:
            disk[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        chunk.release()
    reader.close()
    return bytes(disk)


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_disk_is_read_where_it_lies(host: HyperVHost, source: HyperVSource, name: str) -> None:
    vm = source.inspect(source.find(name))
    assert [finding for finding in source.check(vm) if finding.severity is Severity.BLOCKER] == []
    assert copied(source, name, "tokvm-ab12-1") == host.read_disk(name)


def test_both_services_may_break_and_come_back(host: HyperVHost, side: WinrmSide, source: HyperVSource) -> None:
    before = copied(source, "near", "tokvm-ab12-1")
    side.winrm.cut_connections()
    side.winrm.forget_shells()
    side.smb.cut_connections()
    assert copied(source, "near", "tokvm-ab12-1") == before == host.read_disk("near")


def test_a_service_that_is_gone_is_a_lost_connection(host: HyperVHost, side: WinrmSide, source: HyperVSource) -> None:
    vm = source.inspect(source.find("near"))
    at = source.snapshot(vm, "tokvm-ab12-1")
    side.smb.stop()
    with pytest.raises(ConnectionLost, match="SMB"):
        source.open_disk(vm.disks[0], at, None)
    side.winrm.stop()
    with pytest.raises(ConnectionLost, match="quickconfig") as lost:
        source.list_machines()
    assert lost.value.where.startswith("hyperv+winrm://Administrator@127.0.0.1:")
    assert source.url == side.url


def test_its_certificate_is_what_it_is_known_by(side: WinrmSide, source: HyperVSource) -> None:
    from tokvm.testing.certificates import fingerprint

    assert source.fingerprint() == "SHA256:" + fingerprint(side.certificate).replace(":", "").lower()
