"""The files of the played Hyper-V host over its real sshd, as Win32-OpenSSH gives them out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from tests.persona.conftest import BuildHyperV, MiB

from tokvm.core.errors import ConnectionLost
from tokvm.remote.sftp import RemoteFileError, SftpClient
from tokvm.remote.sftp_wire import Kind, string, u32
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec
from tokvm.testing.hyperv.paths import to_sftp

PATH = "C:\\dir with blanks\\ü 名 [1] 'x' $(y)\\Dïsk.vhdx"


@contextlib.contextmanager
def sftp(host: HyperVHost, *, deadline_s: float = 10.0) -> Iterator[SftpClient]:
    sshd = host.sshd
    connection = SshHost(SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))
    try:
        with connection.sftp(deadline_s=deadline_s) as client:
            yield client
    finally:
        connection.close()


@pytest.fixture
def host(build_hyperv: BuildHyperV) -> HyperVHost:
    """Its base is frozen and holds a MiB of data."""
    made = build_hyperv(MachineSpec("web", disks=[DiskSpec(4 * MiB, path=PATH)]), orphans=True)
    made.write_disk("web", offset=0, data=bytes(range(256)) * 4096)
    made.foreign_checkpoint("web")
    return made


def base(host: HyperVHost) -> str:
    return to_sftp(host.chain("web")[-1])


def top(host: HyperVHost) -> str:
    return to_sftp(host.chain("web")[0])


def whole(client: SftpClient, path: str) -> bytes:
    file = client.open(path)
    raw = bytearray(file.size)
    file.read_into(0, memoryview(raw))
    file.close()
    return bytes(raw)


def _sent(kind: int, body: bytes, number: int) -> bytes:
    """A request of any kind."""
    return string(bytes([kind]) + u32(number) + body)


def until(what: Callable[[], object], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_frozen_file_comes_whole_in_short_reads(host: HyperVHost) -> None:
    with sftp(host) as client:
        assert client.read_size == 32768  # no limits@openssh.com
        assert whole(client, base(host)) == host.local(PATH).read_bytes()
    assert host.opened() == [(PATH, False)]
    assert host.violations() == []
    host.set_sftp(limits=True, cap=1000)
    with sftp(host) as client:
        assert client.read_size == 4096
        assert whole(client, base(host)) == host.local(PATH).read_bytes()


@pytest.mark.slow
def test_names_are_the_same_in_any_case_and_listed(host: HyperVHost) -> None:
    with sftp(host) as client:
        assert whole(client, base(host).swapcase()) == host.local(PATH).read_bytes()
        names = [entry.name for entry in client.listdir(base(host).rpartition("/")[0])]
        assert sorted(names) == sorted([base(host).rpartition("/")[2], top(host).rpartition("/")[2]])
        assert client.stat(base(host)).size == host.local(PATH).stat().st_size


def test_the_file_that_a_vm_runs_on_is_a_failure_and_no_more(host: HyperVHost) -> None:
    with sftp(host) as client:
        with pytest.raises(RemoteFileError, match="Failure"):
            client.open(top(host))
        host.guest_stops("web")
        assert whole(client, top(host))
    assert host.opened()[0] == (host.chain("web")[0], True)


@pytest.mark.slow
def test_files_of_a_merge_are_a_failure_and_those_of_others_are_not(host: HyperVHost) -> None:
    host.foreign_checkpoint("web")
    with host.edit() as state:
        state["options"]["merge_s"] = 30.0
    host.delete_checkpoint("web", host.checkpoints("web")[1]["id"])
    middle = to_sftp(host.chain("web")[1])
    with sftp(host) as client:
        with pytest.raises(RemoteFileError, match="Failure"):
            client.open(middle)
        client.open(base(host)).close()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/C:/nothing", "/etc/passwd", "C:/x", "/C:/../../etc/passwd", "/C:/a:b", "/D:/x"])
def test_what_is_not_there_is_not_found(host: HyperVHost, path: str) -> None:
    with sftp(host) as client, pytest.raises(RemoteFileError, match="No such file"):
        client.open(path)


@pytest.mark.slow
def test_whoever_would_write_is_refused_and_recorded(host: HyperVHost) -> None:
    before = host.local(PATH).read_bytes()
    with sftp(host) as client:
        raw = base(host).encode()
        for kind, more in ((3, u32(2) + u32(0)), (3, u32(0x1A) + u32(0)), (13, b""), (18, string(raw))):
            reply = client._pipe.ask(partial(_sent, kind, string(raw) + more))
            assert reply.kind == Kind.STATUS
    assert len(host.violations()) == 4
    assert host.local(PATH).read_bytes() == before


@pytest.mark.slow
def test_a_session_that_dies_or_freezes_after_some_bytes(host: HyperVHost) -> None:
    for settings in ({"die_after": 200_000}, {"die_after": -1, "freeze_after": 200_000}):
        host.set_sftp(**settings)
        with sftp(host, deadline_s=1.0) as client:
            file = client.open(base(host))
            with pytest.raises(ConnectionLost):
                file.read_into(0, memoryview(bytearray(file.size)))


@pytest.mark.slow
def test_replies_in_any_order_are_put_right(host: HyperVHost) -> None:
    host.set_sftp(shuffle=True)
    with sftp(host) as client:
        assert whole(client, base(host)) == host.local(PATH).read_bytes()


@pytest.mark.slow
def test_a_closed_file_holds_nothing_up(host: HyperVHost) -> None:
    with sftp(host) as client:
        client.open(base(host)).close()
        data = {"vm": host.id("web"), "id": host.checkpoints("web")[0]["id"], "mark": "nightly"}
        assert host.ask("remove-checkpoint", data).value["removed"] is True
    assert host.chain("web") == [PATH]


@pytest.mark.slow
def test_an_orphan_keeps_its_files_until_it_is_ended(host: HyperVHost) -> None:
    """Win32-OpenSSH 1605: the connection broke, the sftp-server lives on and holds what it had open."""
    with sftp(host) as client:
        client.open(base(host))
        assert host.ask("leftovers", {"end": True}).value == {"processes": []}  # its sshd lives: somebody's session
        host.sshd.cut_connections()
    data: dict[str, object] = {"vm": host.id("web"), "id": host.checkpoints("web")[0]["id"], "mark": "nightly"}
    assert until(lambda: host.ask("leftovers", {"end": False}).value["processes"])
    answer = host.ask("remove-checkpoint", data).framed
    assert (answer["ok"], answer["hresult"]) == (False, -2147024864)
    assert len(host.checkpoints("web")) == 1
    (found,) = host.ask("leftovers", {"end": True}).value["processes"]
    assert found["ended"] is True
    assert host.ask("leftovers", {"end": False}).value == {"processes": []}
    assert host.ask("remove-checkpoint", data).value["removed"] is True
    assert host.chain("web") == [PATH]


@pytest.mark.slow
def test_somebody_elses_merge_waits_for_readers(host: HyperVHost) -> None:
    with sftp(host) as client:
        file = client.open(base(host))
        host.delete_checkpoint("web", host.checkpoints("web")[0]["id"])
        assert len(host.chain("web")) == 2
        file.close()
        assert host.chain("web") == [PATH]


@pytest.mark.slow
def test_an_open_file_is_not_free_for_the_witness(host: HyperVHost) -> None:
    host.guest_stops("web")
    data: dict[str, object] = {"vm": host.id("web")}
    with sftp(host) as client:
        file = client.open(top(host))
        assert [one["free"] for one in host.ask("evidence", data).value["files"]] == [False]
        file.close()
        assert [one["free"] for one in host.ask("evidence", data).value["files"]] == [True]


@pytest.mark.slow
def test_an_old_build_gives_out_rubbish_where_a_new_one_refuses(build_hyperv: BuildHyperV) -> None:
    """Without sharing rules the running VM's file can be read, and holds nothing that can be believed."""
    host = build_hyperv(MachineSpec("web", disks=[DiskSpec(4 * MiB, path=PATH)]), locks=False)
    host.write_disk("web", offset=0, data=b"truth" * 512)
    with sftp(host) as client:
        got = whole(client, top(host))
    assert got.startswith(b"vhdxfile")
    assert b"truth" not in got
