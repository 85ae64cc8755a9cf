"""Files over SFTP: OpenSSH's own server, and one with faults behind a real sshd."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.units import KiB, MiB
from tokvm.remote.sftp import RemoteFileError, SftpClient, SftpFile
from tokvm.remote.sftp_wire import Body, Status, WireError
from tokvm.remote.ssh import SshHost

OpenHost = Callable[..., SshHost]


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(3 * MiB + 12345)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "disk"
    file.write_bytes(content)
    return str(file)


@pytest.fixture
def fake_client(fake: Any, open_host: OpenHost) -> Callable[..., SftpClient]:
    def make(deadline_s: float = 10.0, **faults: object) -> SftpClient:
        fake.faults(**faults)
        return open_host(fake.server).sftp(deadline_s=deadline_s)

    return make


def read_all(file: SftpFile, length: int) -> bytes:
    """The whole by read_ranges; fails when a byte comes twice."""
    found = bytearray(length)
    seen = bytearray(length)

    def sink(offset: int, piece: memoryview) -> None:
        assert not any(seen[offset : offset + len(piece)])
        found[offset : offset + len(piece)] = piece
        seen[offset : offset + len(piece)] = b"\1" * len(piece)

    file.read_ranges([(0, length)], sink)
    assert all(seen)
    return bytes(found)


def test_a_file_is_read_as_it_is(host: SshHost, path: str, content: bytes) -> None:
    with host.sftp() as sftp:
        file = sftp.open(path)
        assert file.size == len(content)
        assert path in file.name
        assert sftp.read_size == 255 * KiB
        assert read_all(file, file.size) == content
        file.close()
        with pytest.raises(RemoteFileError):
            file.read_into(0, memoryview(bytearray(1)))


def test_read_into_fills_the_buffer_from_any_offset(host: SshHost, path: str, content: bytes) -> None:
    with host.sftp() as sftp:
        file = sftp.open(path)
        for length in (0, 1, 255 * KiB - 1, 255 * KiB, 255 * KiB + 1, 2 * MiB):
            buffer = bytearray(length)
            file.read_into(777, memoryview(buffer))
            assert buffer == content[777 : 777 + length]


def test_the_last_byte_is_read_and_none_behind_it(host: SshHost, path: str, content: bytes) -> None:
    with host.sftp() as sftp:
        file = sftp.open(path)
        buffer = bytearray(1)
        file.read_into(file.size - 1, memoryview(buffer))
        assert buffer == content[-1:]
        with pytest.raises(ImageError, match="ends here") as caught:
            file.read_into(file.size - 10, memoryview(bytearray(11)))
        assert f"@{file.size:#x}" in caught.value.where
        file.read_into(0, memoryview(buffer))
        assert buffer == content[:1]


def test_ranges_are_read_and_nothing_else(host: SshHost, path: str, content: bytes) -> None:
    ranges = [(5, 10), (4096, 300 * KiB), (len(content) - 7, 7), (100, 0)]
    got: dict[int, bytes] = {}
    with host.sftp() as sftp:
        sftp.open(path).read_ranges(ranges, lambda offset, piece: got.update({offset: bytes(piece)}))
    assert sum(len(piece) for piece in got.values()) == sum(length for _, length in ranges)
    assert all(content[offset : offset + len(piece)] == piece for offset, piece in got.items())


def test_threads_share_one_connection(host: SshHost, path: str, content: bytes) -> None:
    wrong: list[int] = []
    with host.sftp() as sftp:
        file = sftp.open(path)

        def reader(seed: int) -> None:
            for step in range(40):
                offset = (seed * 7919 + step * 104729) % (len(content) - 600 * KiB)
                buffer = bytearray(1 + (seed * step * 4099) % (600 * KiB))
                file.read_into(offset, memoryview(buffer))
                if buffer != content[offset : offset + len(buffer)]:
                    wrong.append(offset)

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        assert read_all(file, file.size) == content
        for thread in threads:
            thread.join()
    assert wrong == []


def test_stat_and_listdir(host: SshHost, tmp_path: Path) -> None:
    names = {"plain", "with space", "new\nline", "-dash", "caf\u00e9", os.fsdecode(b"\xff\xfe")}
    for name in names:
        (tmp_path / name).write_bytes(b"12345")
    with host.sftp() as sftp:
        assert sftp.stat(str(tmp_path / "plain")).size == 5
        entries = sftp.listdir(str(tmp_path))
        assert {entry.name for entry in entries} == names
        assert all(entry.attributes.size == 5 for entry in entries)
        for name in names:
            assert sftp.open(f"{tmp_path}/{name}").size == 5


def test_refusals_name_the_file(host: SshHost, tmp_path: Path) -> None:
    with host.sftp() as sftp:
        for attempt in (sftp.open, sftp.stat, sftp.listdir):
            with pytest.raises(RemoteFileError, match="no such file") as caught:
                attempt(f"{tmp_path}/absent")
            assert caught.value.status == Status.NO_SUCH_FILE
            assert "absent" in caught.value.where
        with pytest.raises(SourceError, match="NUL"):
            sftp.open(f"{tmp_path}/a\0b")
        assert sftp.stat(str(tmp_path)).mode is not None


def test_a_failing_sink_stops_the_transfer_with_its_own_error(host: SshHost, path: str) -> None:
    def sink(_offset: int, _piece: memoryview) -> None:
        raise ImageError("the disk says no")

    with host.sftp() as sftp:
        file = sftp.open(path)
        with pytest.raises(ImageError, match="the disk says no"):
            file.read_ranges([(0, file.size)], sink)
        file.read_into(0, memoryview(bytearray(10)))


def test_closing_ends_a_read_in_another_thread(fake_client: Callable[..., SftpClient], path: str) -> None:
    sftp = fake_client(deadline_s=30, stall_after=100_000)
    file = sftp.open(path)
    caught: list[BaseException] = []

    def reader() -> None:
        try:
            file.read_into(0, memoryview(bytearray(2 * MiB)))
        except ConnectionLost as exc:
            caught.append(exc)

    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.3)
    sftp.close()
    thread.join(timeout=5)
    assert "closed" in str(caught[0])


@pytest.mark.parametrize("cap", [10_000, 64 * KiB])
@pytest.mark.slow
def test_short_reads_are_asked_for_again(fake_client: Callable[..., SftpClient], path: str, content: bytes, cap: int) -> None:
    with fake_client(cap=cap) as sftp:
        file = sftp.open(path)
        assert read_all(file, file.size) == content
        buffer = bytearray(300 * KiB)
        file.read_into(99, memoryview(buffer))
        assert buffer == content[99 : 99 + 300 * KiB]


def test_replies_may_come_in_any_order(fake_client: Callable[..., SftpClient], path: str, content: bytes) -> None:
    with fake_client(shuffle=True, cap=50_000) as sftp:
        file = sftp.open(path)
        assert read_all(file, file.size) == content


def test_a_server_without_limits_is_asked_for_32_kib(fake_client: Callable[..., SftpClient], path: str, content: bytes) -> None:
    with fake_client(extensions=False) as sftp:
        assert sftp.read_size == 32 * KiB
        assert read_all(sftp.open(path), len(content)) == content


@pytest.mark.parametrize(("limits", "read_size"), [(0, 32 * KiB), (1, 4 * KiB), (2**64 - 1, 255 * KiB)])
@pytest.mark.slow
def test_limits_are_believed_within_reason(
    fake_client: Callable[..., SftpClient], path: str, limits: int, read_size: int
) -> None:
    with fake_client(limits=limits) as sftp:
        assert sftp.read_size == read_size
        sftp.open(path).read_into(0, memoryview(bytearray(300 * KiB)))


@pytest.mark.parametrize("code", [4, 999])
def test_a_status_in_the_middle_is_an_error_at_that_offset(
    fake_client: Callable[..., SftpClient], path: str, code: int
) -> None:
    with fake_client(status=code) as sftp:
        file = sftp.open(path)
        with pytest.raises(RemoteFileError, match="as told") as caught:
            file.read_into(0, memoryview(bytearray(MiB)))
        assert caught.value.status == code
        assert "@0x" in caught.value.where
        file.read_into(0, memoryview(bytearray(4096)))


@pytest.mark.parametrize("damage", ["oversize", "undersize", "count", "more", "empty", "twice", "stranger", "kind"])
@pytest.mark.slow
def test_a_reply_that_lies_ends_the_connection(fake_client: Callable[..., SftpClient], path: str, damage: str) -> None:
    with fake_client(damage=damage) as sftp:
        file = sftp.open(path)
        began = time.monotonic()

        def read_twice() -> None:
            for _ in range(2):
                file.read_into(0, memoryview(bytearray(2 * MiB)))

        with pytest.raises(SourceError, match="not the SFTP protocol"):
            read_twice()
        assert time.monotonic() - began < 5


def test_a_count_of_names_is_checked_before_it_is_believed(fake_client: Callable[..., SftpClient]) -> None:
    with fake_client() as sftp, pytest.raises(SourceError, match="cannot be in"):
        sftp.listdir("/")


@pytest.mark.parametrize(
    "faults", [{"greeting": "Welcome to the machine! Your sins are logged.\n"}, {"version": 2}, {"greeting": "\xff" * 20}]
)
@pytest.mark.slow
def test_what_is_no_sftp_is_refused_at_the_greeting(fake_client: Callable[..., SftpClient], faults: dict[str, object]) -> None:
    with pytest.raises(SourceError, match="not the SFTP protocol"):
        fake_client(**faults)


def test_a_server_that_dies_is_a_lost_connection(fake_client: Callable[..., SftpClient], path: str) -> None:
    with fake_client(die_after=MiB) as sftp:
        file = sftp.open(path)
        with pytest.raises(ConnectionLost):
            read_all(file, file.size)
        with pytest.raises(ConnectionLost):
            file.read_into(0, memoryview(bytearray(1)))


@pytest.mark.slow
def test_silence_is_a_lost_connection_at_the_deadline(fake_client: Callable[..., SftpClient], path: str) -> None:
    with fake_client(deadline_s=0.5, stall_after=MiB) as sftp:
        file = sftp.open(path)
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no byte came over sftp for 0\.5 s"):
            read_all(file, file.size)
        assert 0.4 < time.monotonic() - began < 3


@pytest.mark.slow
def test_a_stopped_sftp_server_is_a_lost_connection_though_sshd_answers(
    make_server: Callable[..., Any], open_host: OpenHost, path: str
) -> None:
    server = make_server()
    with open_host(server).sftp(deadline_s=0.7) as sftp:
        file = sftp.open(path)
        (reader,) = server.processes("sftp-server")
        os.kill(reader, signal.SIGSTOP)
        with pytest.raises(ConnectionLost, match="no byte came"):
            file.read_into(0, memoryview(bytearray(100)))


def test_a_killed_session_is_a_lost_connection(make_server: Callable[..., Any], open_host: OpenHost, path: str) -> None:
    server = make_server()
    with open_host(server).sftp() as sftp:
        file = sftp.open(path)
        for pid in server.sessions():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionLost, match="reading over sftp"):
            file.read_into(0, memoryview(bytearray(100)))


def test_a_host_without_sftp_says_so(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    server = make_server(sftp="/nonexistent/sftp-server")
    with pytest.raises(SourceError):
        open_host(server).sftp()


@pytest.mark.parametrize(
    ("take", "data"),
    [
        (Body.u32, b"\0\0\0"),
        (Body.u64, b"\0" * 7),
        (Body.string, b""),
        (Body.string, b"\0\0\0\1"),
        (Body.string, b"\xff\xff\xff\xff" + bytes(100)),
        (Body.names, b"\0\0\0\2" + bytes(23)),
        (Body.names, b"\0\0\0\1\0\0\0\7abcdefgh"),
        (Body.attributes, b"\0\0\0\1" + bytes(7)),
        (Body.attributes, b"\x80\0\0\0\xff\xff\xff\xff"),
    ],
)
def test_fields_never_reach_behind_their_packet(take: Callable[[Body], object], data: bytes) -> None:
    with pytest.raises(WireError):
        take(Body(data))
