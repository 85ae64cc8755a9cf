"""Streams: right ones, and every wrong one."""

from __future__ import annotations

import io
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.structs import DynamicHeader, Footer
from tokvm.testing.xenserver.host import Answer, XenHost

MiB = 1 << 20
Ssh = Callable[..., "subprocess.CompletedProcess[bytes]"]


def snapshot(host: XenHost, number: int, disk: int = 0) -> tuple[str, str]:
    """A snapshot's uuid and the uuid of one of its VDIs."""
    taken = host.run("xe", "vm-snapshot", f"uuid={host.uuid('web')}", f"new-name-label=tokvm-1-{number}").text
    disks = host.run("xe", "vbd-list", f"vm-uuid={taken}", "type=Disk", "params=vdi-uuid", "--minimal").text.split(",")
    return taken, disks[disk]


def export(host: XenHost, vdi: str, base: str = "") -> Answer:
    middle = [f"base={base}"] if base else []
    return host.run("xe", "vdi-export", f"uuid={vdi}", "format=vhd", *middle, "filename=")


def assembled(folder: Path, *streams: bytes) -> bytes:
    """What a chain of exported VHDs reads as, by our own reader."""
    layers = []
    for number, stream in enumerate(streams):
        path = folder / f"{number}.vhd"
        path.write_bytes(stream)
        layers.append(open_image(open_file(path)))
    chain = Chain.open(layers)
    disk = bytearray(chain.size)
    for chunk in ChainReader(chain).chunks():
        if chunk.data is not None:
            disk[chunk.offset : chunk.offset + chunk.length] = chunk.data
        chunk.release()
    return bytes(disk)


def scribble(host: XenHost, disk: int = 0, *, seed: int) -> None:
    size = host.disk_path("web", disk).stat().st_size
    for number in range(5):
        at = (seed * 7919 + number * 1_299_709) % (size - 70_000) // 512 * 512
        host.write_disk("web", disk, offset=at, data=os.urandom(512 * (1 + number * 17)))


@pytest.mark.parametrize("disk", [0, 1])
@pytest.mark.slow
def test_a_base_and_its_deltas_make_the_frozen_disk(host: XenHost, tmp_path: Path, disk: int) -> None:
    streams, taken, base = [], "", ""
    for number in range(1, 4):
        scribble(host, disk, seed=number)
        taken, vdi = snapshot(host, number, disk)
        streams.append(export(host, vdi, base).stdout)
        base = vdi
    host.write_disk("web", disk, offset=0, data=b"after the freeze")
    assert assembled(tmp_path, *streams) == host.frozen_path(taken, disk).read_bytes()


@pytest.mark.slow
def test_what_became_zero_is_data_of_the_delta(host: XenHost, tmp_path: Path) -> None:
    host.write_disk("web", offset=MiB, data=b"x" * 8192)
    _, base = snapshot(host, 1)
    host.write_disk("web", offset=MiB, data=bytes(4096))
    taken, vdi = snapshot(host, 2)
    streams = export(host, base).stdout, export(host, vdi, base).stdout
    assert assembled(tmp_path, *streams) == host.frozen_path(taken).read_bytes()


@pytest.mark.slow
def test_a_stream_has_the_shape_and_the_ids_of_xapis(host: XenHost) -> None:
    scribble(host, seed=1)
    _, base = snapshot(host, 1)
    scribble(host, seed=2)
    _, vdi = snapshot(host, 2)
    stream = export(host, vdi, base).stdout
    footer = Footer.parse(stream[:512], name="stream", offset=0)
    header = DynamicHeader.parse(stream[512:1536], name="stream", offset=512, footer=footer)
    assert stream[-512:] == stream[:512]
    assert (footer.type, str(footer.unique_id), str(header.parent_id)) == (4, vdi, base)


@pytest.mark.slow
def test_a_resumed_export_sends_the_rest_and_no_more(host: XenHost) -> None:
    scribble(host, seed=1)
    _, vdi = snapshot(host, 1)
    whole = export(host, vdi).stdout
    for first in (1, 2, 513, len(whole), len(whole) + 1):
        line = f"set -o pipefail; xe vdi-export uuid={vdi} format=vhd filename= | tail -c +{first}"
        assert host.run(line=line).stdout == whole[first - 1 :]
    sent = [record["sent"] for record in host.exports()]
    assert sent == [len(whole), len(whole), len(whole) - 1, len(whole) - 512, 1, 0]


@pytest.mark.slow
def test_two_exports_of_the_same_are_the_same(host: XenHost) -> None:
    scribble(host, seed=1)
    _, vdi = snapshot(host, 1)
    assert export(host, vdi).stdout == export(host, vdi).stdout


@pytest.mark.slow
def test_a_running_disk_a_lost_base_and_a_foreign_base_are_refused(host: XenHost) -> None:
    _, vdi = snapshot(host, 1)
    _, other = snapshot(host, 2, disk=1)
    assert b"in use" in export(host, host.vdi("web")).stderr
    missing = export(host, vdi, "00000000-0000-4000-8000-000000000001")
    assert (missing.code, missing.stdout) == (1, b"")
    assert b"type: VDI" in missing.stderr
    assert b"incompatible" in export(host, vdi, other).stderr


@pytest.mark.slow
def test_snapshots_have_new_uuids_and_know_where_they_come_from(host: XenHost) -> None:
    taken, vdi = snapshot(host, 1)
    again, other = snapshot(host, 1)
    assert len({taken, again, host.uuid("web")}) == 3
    assert len({vdi, other, host.vdi("web")}) == 3
    assert host.run("xe", "vdi-param-get", f"uuid={vdi}", "param-name=snapshot-of").text == host.vdi("web")
    listed = host.run("xe", "snapshot-list", f"snapshot-of={host.uuid('web')}", "params=name-label", "--minimal")
    assert listed.text == "tokvm-1-1,tokvm-1-1"
    vms = "xe vm-list is-control-domain=false is-a-template=false is-a-snapshot=false params=uuid --minimal"
    assert host.run(line=vms).text == host.uuid("web")


def test_a_snapshot_goes_with_its_disks(host: XenHost) -> None:
    taken, vdi = snapshot(host, 1)
    assert host.run("xe", "snapshot-uninstall", f"uuid={taken}", "force=true").code == 0
    assert host.snapshots("web") == []
    assert b"type: VDI" in export(host, vdi).stderr
    assert not host.folder.joinpath("backend", host.uuid("web"), "frozen", taken).exists()


@pytest.mark.slow
def test_a_disk_in_use_outlives_its_snapshot_and_is_destroyed_later(build: Callable[..., XenHost]) -> None:
    host = build(in_use_s=0.5)
    taken, vdi = snapshot(host, 1)
    export(host, vdi)
    refused = host.run("xe", "snapshot-uninstall", f"uuid={taken}", "force=true")
    assert refused.code == 1
    assert b"in use by some other operation\nvdi: " + vdi.encode() in refused.stderr
    assert host.snapshots("web") == []
    assert b"in use" in host.run("xe", "vdi-destroy", f"uuid={vdi}").stderr
    time.sleep(0.5)
    assert host.run("xe", "vdi-destroy", f"uuid={vdi}").code == 0
    assert not host.folder.joinpath("backend", host.uuid("web"), "frozen", taken).exists()
    assert host.violations() == []


def test_destroying_a_disk_that_somebody_has_is_a_violation(host: XenHost) -> None:
    _, vdi = snapshot(host, 1)
    for disk in (vdi, host.vdi("web")):
        assert host.run("xe", "vdi-destroy", f"uuid={disk}").code == 1
        assert disk in host.state()["vdis"]
    assert len(host.violations()) == 2


def test_the_vm_itself_is_no_snapshot(host: XenHost) -> None:
    assert host.run("xe", "snapshot-uninstall", f"uuid={host.uuid('web')}", "force=true").code == 1


def _exported(host: XenHost, kind: str, **settings: object) -> tuple[bytes, Answer]:
    scribble(host, seed=3)
    _, vdi = snapshot(host, 1)
    good = export(host, vdi).stdout
    host.fault("vdi-export", kind, **settings)  # type: ignore[arg-type]
    return good, export(host, vdi)


def test_fault_short_ends_early_and_claims_success(host: XenHost) -> None:
    good, answer = _exported(host, "short", at=3000)
    assert (answer.code, answer.stdout) == (0, good[:3000])


def test_fault_fail_ends_early_and_says_so(host: XenHost) -> None:
    good, answer = _exported(host, "fail", at=3000)
    assert (answer.code, answer.stdout) == (1, good[:3000])
    assert answer.stderr


@pytest.mark.slow
def test_fault_flip_changes_one_bit(host: XenHost) -> None:
    good, answer = _exported(host, "flip", at=100_000)
    assert [at for at in range(len(good)) if good[at] != answer.stdout[at]] == [100_000]


@pytest.mark.parametrize("at", [70, -100])
@pytest.mark.slow
def test_fault_flip_reaches_the_footers_too(host: XenHost, at: int) -> None:
    good, answer = _exported(host, "flip", at=at)
    assert [n for n in range(len(good)) if good[n] != answer.stdout[n]] == [at % len(good)]


def test_fault_http_500_is_a_page_with_exit_0(host: XenHost) -> None:
    _, answer = _exported(host, "http_500")
    assert (answer.code, answer.stdout[:12]) == (0, b"HTTP/1.1 500")


def test_fault_new_identity_invents_another_uuid_each_time(host: XenHost) -> None:
    good, answer = _exported(host, "new_identity")
    read = [Footer.parse(stream[:512], name="stream", offset=0) for stream in (good, answer.stdout)]
    assert read[0].unique_id != read[1].unique_id
    assert read[0].timestamp != read[1].timestamp
    assert good[1536:-512] == answer.stdout[1536:-512]


@pytest.mark.parametrize(("kind", "type_", "right_parent"), [("wrong_parent", 4, False), ("full", 3, False)])
@pytest.mark.slow
def test_faults_of_a_delta(host: XenHost, kind: str, type_: int, right_parent: bool) -> None:
    _, base = snapshot(host, 1)
    scribble(host, seed=2)
    _, vdi = snapshot(host, 2)
    host.fault("base=", kind)
    stream = export(host, vdi, base).stdout
    footer = Footer.parse(stream[:512], name="stream", offset=0)
    assert footer.type == type_
    parent = DynamicHeader.parse(stream[512:1536], name="stream", offset=512, footer=footer).parent_id
    assert (str(parent) == base) is right_parent


@pytest.mark.slow
def test_fault_stall_sends_some_and_then_nothing_but_stays(host: XenHost) -> None:
    scribble(host, seed=3)
    _, vdi = snapshot(host, 1)
    host.fault("vdi-export", "stall", at=2000)
    sshd = host.sshd
    line = f"xe vdi-export uuid={vdi} format=vhd filename="
    argv = ["ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), f"{sshd.user}@{sshd.host}", line]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        assert isinstance(client.stdout, io.BufferedReader)
        assert len(client.stdout.read(2000)) == 2000
        time.sleep(0.3)
        assert client.poll() is None
        assert host.state()["vdis"][vdi]["readers"]
        client.kill()
    until = time.monotonic() + 5
    while host.state()["vdis"][vdi]["readers"]:
        assert time.monotonic() < until, "the persona outlives its client"
        time.sleep(0.05)


@pytest.mark.slow
def test_fault_cut_breaks_the_connection(host: XenHost, ssh: Ssh) -> None:
    scribble(host, seed=3)
    _, vdi = snapshot(host, 1)
    host.fault("vdi-export", "cut", at=50_000)
    done = ssh(host, f"xe vdi-export uuid={vdi} format=vhd filename=")
    assert done.returncode == 255
    assert len(done.stdout) <= 50_000


@pytest.mark.slow
def test_fault_slow_keeps_to_its_rate(host: XenHost) -> None:
    scribble(host, seed=3)
    _, vdi = snapshot(host, 1)
    size = len(export(host, vdi).stdout)
    host.fault("vdi-export", "slow", rate=size / 0.4)
    began = time.monotonic()
    assert len(export(host, vdi).stdout) == size
    assert time.monotonic() - began >= 0.35
