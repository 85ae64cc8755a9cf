"""Export leases of the played vSphere: their streams judged by qemu-img, their lives by the clock."""

from __future__ import annotations

import http.client
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pyVmomi import vim
from tests.persona.conftest import BuildVSphere, MiB
from tests.persona.vsphere_client import connected, machine, read, snapshot, wait

from tokvm.testing.certificates import fingerprint
from tokvm.testing.esxi.host import DiskSpec, MachineSpec
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.vsphere.options import CHUNKED, CLOSE

pytestmark = pytest.mark.slow

SIZES = (6 * MiB, 3 * MiB + 512)
MARKER = bytes(512)


def _build(build_vsphere: BuildVSphere, **options: Any) -> VSphere:
    vsphere = build_vsphere(MachineSpec("web", disks=[DiskSpec(size) for size in SIZES]), **options)
    rng = random.Random(5)
    for number, size in enumerate(SIZES):
        for at in (0, size - 512, MiB, 2 * MiB + 64 * 512):
            vsphere.host.write_disk("web", number, offset=at, data=rng.randbytes(512))
        vsphere.host.write_disk("web", number, offset=MiB + 4096, data=rng.randbytes(MiB))
    return vsphere


def _ready(lease: Any) -> Any:
    """Its HttpNfcLeaseInfo."""
    until = time.monotonic() + 10
    while (state := read(lease, "state")["state"]) == "initializing":
        assert time.monotonic() < until
    assert state == "ready"
    return lease.info


def _disk_urls(info: Any) -> list[str]:
    return [one.url for one in info.deviceUrl if one.disk]


def _get(vsphere: VSphere, url: str, headers: dict[str, str] | None = None) -> tuple[Any, bytes]:
    """(response, body); the host's `*` replaced by where the API is."""
    where = urlsplit(url.replace("*", "127.0.0.1"))
    link = http.client.HTTPSConnection(str(where.hostname), where.port, context=vsphere.client_context(), timeout=20)
    try:
        link.request("GET", where.path, headers=headers or {})
        answer = link.getresponse()
        return answer, answer.read()
    finally:
        link.close()


def _converted(stream: bytes, folder: Path) -> bytes:
    source, target = folder / "stream.vmdk", folder / "disk.raw"
    source.write_bytes(stream)
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(source), str(target)], check=True)
    return target.read_bytes()


@pytest.mark.parametrize("encoding", [CLOSE, CHUNKED])
@pytest.mark.parametrize("vcenter", [True, False])
def test_each_disk_comes_as_it_was_at_the_snapshot(
    build_vsphere: BuildVSphere, tmp_path: Path, vcenter: bool, encoding: str
) -> None:
    vsphere = _build(build_vsphere, vcenter=vcenter, lease_encoding=encoding)
    with connected(vsphere) as instance:
        taken = snapshot(machine(instance, vsphere))
        frozen = [vsphere.host.read_disk("web", number) for number in range(2)]
        vsphere.host.write_disk("web", 0, offset=4 * MiB, data=b"later" * 512)
        for number, size in enumerate(SIZES):
            lease = taken.ExportSnapshot()
            info = _ready(lease)
            assert [one.targetId for one in info.deviceUrl] == ["disk-0.vmdk", "disk-1.vmdk", "disk-2.nvram"]
            answer, stream = _get(vsphere, _disk_urls(info)[number], {"Range": "bytes=512-1023"})
            assert answer.status == 200  # from the start, whatever was asked
            assert answer.getheader("Content-Length") is None
            assert answer.getheader("Accept-Ranges") is None
            assert stream[-512:] == MARKER
            assert _converted(stream, tmp_path)[:size] == frozen[number]
            lease.HttpNfcLeaseComplete()
            assert lease.state == "done"
    assert vsphere.violations() == []


def test_a_url_names_the_host_in_vcenter_and_nobody_on_esxi(build_vsphere: BuildVSphere) -> None:
    for vcenter in (True, False):
        vsphere = _build(build_vsphere, vcenter=vcenter)
        with connected(vsphere) as instance:
            info = _ready(snapshot(machine(instance, vsphere)).ExportSnapshot())
            where = urlsplit(_disk_urls(info)[0])
            shown = fingerprint(vsphere.folder / "tls" / ("esxi.pem" if vcenter else "vsphere.pem"), "sha1")
            assert info.deviceUrl[0].sslThumbprint == shown
            if vcenter:
                assert (where.hostname, where.port == vsphere.port) == ("127.0.0.1", False)
            else:
                assert where.netloc == f"*:{vsphere.port}"


def test_of_several_disks_on_one_lease_the_later_ones_end_early_without_a_word(
    build_vsphere: BuildVSphere, tmp_path: Path
) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        taken = snapshot(machine(instance, vsphere))
        urls = _disk_urls(_ready(taken.ExportSnapshot()))
        first, second = (_get(vsphere, url)[1] for url in urls)
        assert first[-512:] == MARKER
        assert second[-512:] != MARKER
        alone = _get(vsphere, _disk_urls(_ready(taken.ExportSnapshot()))[1])[1]
        assert alone.startswith(second[:1024])
        assert len(second) < len(alone)
        vsphere.set_options(lease_truncates=False)
        urls = _disk_urls(_ready(taken.ExportSnapshot()))
        assert [len(_get(vsphere, url)[1]) for url in urls] == [len(first), len(alone)]


def test_the_end_marker_can_be_missing(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        taken = snapshot(machine(instance, vsphere))
        whole = _get(vsphere, _disk_urls(_ready(taken.ExportSnapshot()))[0])[1]
        vsphere.set_options(end_marker=False)
        assert len(_get(vsphere, _disk_urls(_ready(taken.ExportSnapshot()))[0])[1]) == len(whole) - 512


def test_a_stream_can_break_off(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, lease_encoding=CHUNKED)
    with connected(vsphere) as instance:
        url = _disk_urls(_ready(snapshot(machine(instance, vsphere)).ExportSnapshot()))[0]
        vsphere.fault("nfc", "cut_answer", bytes=70000)
        with pytest.raises(http.client.IncompleteRead) as broken:
            _get(vsphere, url)
        assert len(broken.value.partial) == 70000
        assert len(_get(vsphere, url)[1]) > 70000


def test_a_lease_lives_for_as_long_as_somebody_reports_progress(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        lease = snapshot(machine(instance, vsphere)).ExportSnapshot()
        info = _ready(lease)
        assert info.leaseTimeout == 300
        for percent in (10, 50):
            vsphere.clock.move(250)
            lease.HttpNfcLeaseProgress(percent)
        assert (lease.state, lease.transferProgress) == ("ready", 50)
        vsphere.clock.move(301)
        assert lease.state == "error"
        assert isinstance(lease.error, vim.fault.Timedout)
        with pytest.raises(vim.fault.Timedout):
            lease.HttpNfcLeaseProgress(60)
        assert _get(vsphere, _disk_urls(info)[0])[0].status == 404


def test_a_stream_ends_with_its_lease(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(MachineSpec("web", disks=[DiskSpec(48 * MiB)]), lease_encoding=CHUNKED)
    vsphere.host.write_disk("web", 0, offset=0, data=random.Random(1).randbytes(48 * MiB))
    with connected(vsphere) as instance:
        url = _disk_urls(_ready(snapshot(machine(instance, vsphere)).ExportSnapshot()))[0]
        where = urlsplit(url)
        link = http.client.HTTPSConnection("127.0.0.1", where.port, context=vsphere.client_context(), timeout=20)
        link.request("GET", where.path)
        answer = link.getresponse()
        answer.read(MiB)
        vsphere.clock.move(301)
        with pytest.raises((http.client.IncompleteRead, OSError)):
            answer.read()
        link.close()


def test_who_aborts_is_seen_and_who_asks_after_the_end_is_refused(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        lease = snapshot(machine(instance, vsphere)).ExportSnapshot()
        _ready(lease)
        lease.HttpNfcLeaseAbort(None)
        assert lease.state == "error"
        for call in (lease.HttpNfcLeaseComplete, lambda: lease.HttpNfcLeaseProgress(1)):
            with pytest.raises((vim.fault.InvalidState, vim.fault.Timedout)):
                call()


def test_a_snapshot_that_is_exported_is_not_removed(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        taken = snapshot(machine(instance, vsphere))
        lease = taken.ExportSnapshot()
        _ready(lease)
        assert isinstance(wait(taken.RemoveSnapshot_Task(removeChildren=False)).error, vim.fault.FileLocked)
        lease.HttpNfcLeaseComplete()
        assert wait(taken.RemoveSnapshot_Task(removeChildren=False)).state == "success"


def test_a_whole_vm_is_exported_only_when_it_is_off(build_vsphere: BuildVSphere, tmp_path: Path) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        with pytest.raises(vim.fault.InvalidPowerState):
            vm.ExportVm()
        wait(vm.PowerOffVM_Task())
        stream = _get(vsphere, _disk_urls(_ready(vm.ExportVm()))[0])[1]
        assert _converted(stream, tmp_path) == vsphere.host.read_disk("web")


def test_leases_of_several_clients_stream_side_by_side(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere)
    with connected(vsphere) as instance:
        taken = snapshot(machine(instance, vsphere))
        urls = [_disk_urls(_ready(taken.ExportSnapshot()))[0] for _ in range(4)]
        with ThreadPoolExecutor(4) as clients:
            got = list(clients.map(lambda url: _get(vsphere, url)[1][-512:], urls))
        assert got == [MARKER] * 4
