"""Disk files over SMB, against a real Samba: names, share modes, lost connections, logins, and what is refused in clear."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from smbprotocol.open import FilePipePrinterAccessMask, ShareAccess
from tests.sources.hyperv_double import FOLDER, KEY, VM, FakeHost, FakeShell, write_layer

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.core.units import KiB, MiB
from tokvm.sources.hyperv import disks, smb_link, snapshots
from tokvm.sources.hyperv.faults import Fault, HyperVError
from tokvm.sources.hyperv.smb import SmbFile, SmbFiles
from tokvm.sources.hyperv.smb_link import SmbAccess, SmbLink
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.hyperv import samba
from tokvm.testing.hyperv.samba import Samba

pytestmark = pytest.mark.slow

DISK = Disk(0, KEY, 64 * MiB, device="SCSI 0:0")
C = "C:\\"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Samba, Path]]:
    """One server for all tests that leave it alone; each works in a folder of its own."""
    if why := samba.unavailable():
        pytest.skip(why)
    drive = tmp_path_factory.mktemp("drive")
    shares = {"C$": drive, "vms": drive}
    with Samba(tmp_path_factory.mktemp("samba"), shares) as server:
        yield server, drive


@pytest.fixture
def server(shared: tuple[Samba, Path]) -> Samba:
    return shared[0]


@pytest.fixture
def drive(shared: tuple[Samba, Path]) -> Path:
    return shared[1]


@pytest.fixture
def files(server: Samba) -> Iterator[SmbFiles]:
    made = SmbFiles(server.host, access(server))
    yield made
    made.close()


def access(server: Samba, *, password: str = samba.PASSWORD, silence_s: float = 10.0) -> SmbAccess:
    return SmbAccess(samba.USER, password, port=server.port, silence_s=silence_s)


def write(drive: Path, name: str, size: int) -> bytes:
    data = os.urandom(size)
    (drive / name).parent.mkdir(parents=True, exist_ok=True)
    (drive / name).write_bytes(data)
    return data


def opened(files: SmbFiles, path: str, *, drive: str = C) -> SmbFile:
    return files.open_layer(path, drive=drive, where="hv1")


def read(file: SmbFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("size", [1, 511, 64 * KiB, MiB - 1, MiB, MiB + 1, 20 * MiB + 7])
def test_every_byte_arrives_where_it_belongs(files: SmbFiles, drive: Path, size: int) -> None:
    data = write(drive, "whole.bin", size)
    file = opened(files, C + "whole.bin")
    assert file.size == size
    assert read(file, 0, size) == data
    assert read(file, size - 1, 1) == data[-1:]
    assert read(file, size // 3, size // 2) == data[size // 3 : size // 3 + size // 2]
    assert read(file, size, 0) == b""
    with pytest.raises(ImageError, match="ends at"):
        read(file, size - 1, 2)
    file.close()
    assert files.open_files == set()


def test_what_comes_short_is_asked_for_again(files: SmbFiles, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(drive, "short.bin", 3 * MiB + 5)
    file = opened(files, C + "short.bin")
    whole = smb_link._data

    def half(raw: bytes, *, most: int) -> memoryview:
        found = whole(raw, most=most)
        return found[: -(-len(found) // 2)]

    monkeypatch.setattr(smb_link, "_data", half)
    assert read(file, 0, len(data)) == data


@pytest.mark.parametrize(
    "raw",
    [b"", bytes(16), struct.pack("<HBBIQ", 17, 80, 0, 5, 0) + bytes(4), struct.pack("<HBBIQ", 17, 79, 0, 4, 0) + bytes(4)],
)
def test_an_answer_that_is_none(raw: bytes) -> None:
    with pytest.raises(ValueError, match="READ response"):
        smb_link._data(raw, most=4)


def test_readers_share_a_connection_and_its_credits(files: SmbFiles, drive: Path) -> None:
    data = write(drive, "many.bin", 32 * MiB)
    several = [opened(files, C + "many.bin") for _ in range(3)]
    with ThreadPoolExecutor(12) as threads:
        places = [(number * 977 * KiB % (24 * MiB), 8 * MiB - number) for number in range(48)]
        reads = [threads.submit(read, several[number % 3], *at) for number, at in enumerate(places)]
        assert all(done.result() == data[at : at + length] for done, (at, length) in zip(reads, places, strict=True))


def test_a_server_that_grants_few_credits_is_read_in_small_pieces(tmp_path: Path, drive: Path) -> None:
    data = write(drive, "poor.bin", 5 * MiB + 3)
    with Samba(tmp_path / "samba", {"C$": drive}, {"smb2 max credits": "12"}) as poor:
        files = SmbFiles(poor.host, access(poor))
        file = opened(files, C + "poor.bin")
        with ThreadPoolExecutor(4) as threads:
            assert all(got == data for got in threads.map(lambda _: read(file, 0, len(data)), range(4)))
        files.close()


@pytest.mark.parametrize(
    "name",
    [
        "a b\\d [1].vhdx",
        "ü ß é 中文\\𝄞.vhdx",
        "it's $(reboot) `x` %PATH% & ^.vhdx",
        "-o\\#{x};$.avhdx",
        ".hidden\\...x",
        "trailing~1.x",
    ],
)
def test_names_pass_unharmed(files: SmbFiles, drive: Path, name: str) -> None:
    data = write(drive, "names/" + name.replace("\\", "/"), 1000)
    for path in (C + "names\\" + name, "\\\\?\\c:\\names\\" + name, "C:/names/" + name.replace("\\", "/")):
        file = opened(files, path)
        assert read(file, 0, 1000) == data
        file.close()


class Frozen:
    """A chain of three layers on the drive, as the host's scripts tell of it."""

    def __init__(self, drive: Path, server: Samba, folder: Path) -> None:
        self.folder = drive / FOLDER.removeprefix(C).replace("\\", "/")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shell = FakeShell()
        content = [os.urandom(3 * MiB), os.urandom(2 * MiB), os.urandom(MiB)]
        write_layer(self.folder, "d.vhdx", 1, [(0, content[0]), (20 * MiB, content[0])])
        write_layer(self.folder, "d_1.avhdx", 2, [(MiB, content[1])], parent=1)
        write_layer(self.folder, "d_2.avhdx", 3, [(21 * MiB, content[2])], parent=2)
        disk = bytearray(64 * MiB)
        for at, data in ((0, content[0]), (20 * MiB, content[0]), (MiB, content[1]), (21 * MiB, content[2])):
            disk[at : at + len(data)] = data
        self.disk = bytes(disk)
        self.marks = [self._freeze(number) for number in (1, 2, 3)]
        self.server = server

    def _freeze(self, number: int) -> Snapshot:
        path = self.shell.vm.chain[-1]
        made = self.shell.vm.freeze(f"tokvm-ab12-{number}")
        return Snapshot(f"{VM}/{made['id']}", f"tokvm-ab12-{number}", {KEY: path})

    def connect(self, *, silence_s: float = 10.0) -> HyperVSource:
        files = SmbFiles(self.server.host, access(self.server, silence_s=silence_s))
        return HyperVSource(FakeHost(), shell=self.shell, files=files)


@pytest.fixture
def frozen(drive: Path, server: Samba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    monkeypatch.setattr(snapshots, "POLL_S", 0.01)
    monkeypatch.setattr(disks, "SETTLE_S", 0.1)
    return Frozen(drive, server, tmp_path)


def copy(source: HyperVSource, frozen: Frozen, *, after_first: Any = None) -> bytes:
    reader = source.open_disk(DISK, frozen.marks[2], None)
    disk = bytearray(reader.size)
    try:
        for number, chunk in enumerate(reader.chunks()):
            if chunk.data is not None:
                disk[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
            chunk.release()
            if number == 0 and after_first is not None:
                after_first()
    finally:
        reader.close()
    return bytes(disk)


def test_a_whole_chain_is_byte_for_byte_the_disk(frozen: Frozen) -> None:
    source = frozen.connect()
    assert hashlib.sha256(copy(source, frozen)).digest() == hashlib.sha256(frozen.disk).digest()
    source.remove_snapshot(VM, frozen.marks[2])  # no handle is left that would forbid it
    source.close()


def test_a_change_under_the_copy_voids_it(frozen: Frozen) -> None:
    def touch() -> None:
        with (frozen.folder / "d.vhdx").open("r+b") as file:
            file.seek(64 * KiB + 8)
            file.write((77).to_bytes(8, "little"))

    source = frozen.connect()
    with pytest.raises(SourceError, match="layers changed while they were read"):
        copy(source, frozen, after_first=touch)
    source.close()


def test_a_file_that_was_replaced_voids_the_copy(frozen: Frozen) -> None:
    def replace() -> None:
        write_layer(frozen.folder, "new", 9, [(0, os.urandom(MiB))])
        (frozen.folder / "new").replace(frozen.folder / "d.vhdx")

    source = frozen.connect()
    with pytest.raises(SourceError, match="layers changed"):
        copy(source, frozen, after_first=replace)
    source.close()


def test_a_cut_connection_is_lost_and_another_source_goes_on(frozen: Frozen) -> None:
    source = frozen.connect()
    reader = source.open_disk(DISK, frozen.marks[2], None)
    assert frozen.server.cut_connections() > 0
    with pytest.raises(ConnectionLost) as lost:
        list(reader.chunks())
    assert "run the same command again" in lost.value.fix
    reader.close()
    again = frozen.connect()
    assert copy(again, frozen) == frozen.disk
    again.close()
    assert copy(source, frozen) == frozen.disk  # as does the same one
    source.close()


def test_a_frozen_server_is_given_up(frozen: Frozen) -> None:
    source = frozen.connect(silence_s=1.0)
    reader = source.open_disk(DISK, frozen.marks[2], None)
    frozen.server.freeze_connections()
    begun = time.monotonic()
    with pytest.raises(ConnectionLost):
        list(reader.chunks())
    reader.close()
    source.close()
    assert time.monotonic() - begun < 15
    frozen.server.thaw_connections()


def test_after_a_cut_a_file_of_another_size_is_refused(files: SmbFiles, server: Samba, drive: Path) -> None:
    write(drive, "grows.bin", MiB)
    file = opened(files, C + "grows.bin")
    server.cut_connections()
    with pytest.raises(ConnectionLost):
        read(file, 0, 1)
    write(drive, "grows.bin", MiB + 1)
    with pytest.raises(ImageError, match="size changed"):
        read(file, 0, 1)


def test_what_somebody_has_for_himself_is_in_use(files: SmbFiles, server: Samba, drive: Path) -> None:
    write(drive, "held.bin", 1000)
    for shared in (0, ShareAccess.FILE_SHARE_WRITE):
        other = SmbLink(server.host, access(server), where="smb://other")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smb_link, "SHARED", shared)
            held = other.open("C$", "held.bin", name="held")
        with pytest.raises(HyperVError) as refused:
            opened(files, C + "held.bin")
        assert refused.value.fault is Fault.IN_USE
        other.close_handle(held)
        file = opened(files, C + "held.bin")  # the connection is as good as before
        file.close()
        other.close()


def test_nobody_writes_renames_or_deletes_what_we_read(files: SmbFiles, server: Samba, drive: Path) -> None:
    write(drive, "ours.bin", 1000)
    file = opened(files, C + "ours.bin")
    other = SmbLink(server.host, access(server), where="smb://other")
    for wanted in (FilePipePrinterAccessMask.FILE_WRITE_DATA, FilePipePrinterAccessMask.DELETE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smb_link, "_READ", wanted)
            patch.setattr(smb_link, "SHARED", 7)
            with pytest.raises(HyperVError) as refused:
                other.open("C$", "ours.bin", name="ours")
        assert refused.value.fault is Fault.IN_USE
    assert other.size_of("C$", "ours.bin", name="ours") == 1000  # a look is no reading
    file.close()
    other.close()


def test_a_killed_process_leaves_nothing_open(files: SmbFiles, server: Samba, drive: Path) -> None:
    write(drive, "left.bin", 1000)
    code = f"""
        import sys, time
        from tokvm.sources.hyperv.smb import SmbFiles
        from tokvm.sources.hyperv.smb_link import SmbAccess
        files = SmbFiles({server.host!r}, SmbAccess({samba.USER!r}, sys.stdin.readline()[:-1], port={server.port}))
        files.open_layer("C:\\\\left.bin", drive="C:\\\\", where="x")
        print("open", flush=True)
        time.sleep(60)
    """
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=pipe, stdout=pipe, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(samba.PASSWORD + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "open\n"
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    other = SmbLink(server.host, access(server), where="smb://other")
    deadline = time.monotonic() + 5
    while True:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(smb_link, "_READ", FilePipePrinterAccessMask.FILE_WRITE_DATA)
                other.open("C$", "left.bin", name="left")
            break
        except HyperVError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    other.close()


def test_a_missing_file_folder_and_share(files: SmbFiles, drive: Path) -> None:
    write(drive, "there/is.bin", 10)
    for path in (C + "there\\is not.bin", C + "nowhere\\is.bin", "Z:\\x.bin"):
        with pytest.raises(HyperVError) as refused:
            opened(files, path)
        assert refused.value.fault is Fault.NO_SUCH_FILE
        assert refused.value.fix
    with pytest.raises(HyperVError):
        opened(files, C + "there")  # a folder
    file = opened(files, C + "there\\is.bin")
    file.close()


@pytest.mark.parametrize("settings", [{}, {"map to guest": "bad user"}, {"map to guest": "bad password"}])
def test_a_wrong_password_is_no_login_not_even_a_guests(tmp_path: Path, settings: dict[str, str]) -> None:
    if why := samba.unavailable():
        pytest.skip(why)
    with Samba(tmp_path / "samba", {"C$": tmp_path}, settings) as server:
        for user, password in ((samba.USER, "wrong"), ("nobody else", samba.PASSWORD)):
            with pytest.raises(SourceError) as refused:
                SmbLink(server.host, SmbAccess(user, password, port=server.port), where="smb://hv1")
            assert not isinstance(refused.value, ConnectionLost)
            assert password not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"server smb encrypt": "off"}, "no SMB encryption"),
        ({"server min protocol": "SMB2", "server max protocol": "SMB2_10"}, "no SMB 3"),
    ],
)
def test_a_server_without_encryption_or_smb3_hears_no_login(tmp_path: Path, settings: dict[str, str], why: str) -> None:
    if missing := samba.unavailable():
        pytest.skip(missing)
    with Samba(tmp_path / "samba", {"C$": tmp_path}, {**settings, "log level": "3"}) as server:
        with pytest.raises(SourceError, match=why):
            SmbLink(server.host, access(server), where="smb://hv1")
        logged = b"".join(path.read_bytes() for path in server.folder.glob("smbd*"))
        assert samba.USER.encode() not in logged


@pytest.mark.parametrize(
    "settings", [{"server signing": "mandatory"}, {"server smb encrypt": "required"}, {"server max protocol": "SMB3_00"}]
)
def test_strict_and_old_servers_are_read(tmp_path: Path, settings: dict[str, str]) -> None:
    if why := samba.unavailable():
        pytest.skip(why)
    data = write(tmp_path, "x.bin", 3 * MiB)
    with Samba(tmp_path / "samba", {"C$": tmp_path}, settings) as server:
        files = SmbFiles(server.host, access(server))
        assert read(opened(files, C + "x.bin"), 0, len(data)) == data
        files.close()


@pytest.mark.parametrize("command", [None, 0, 1])
def test_an_answer_in_clear_is_not_taken(files: SmbFiles, drive: Path, command: int | None) -> None:
    """What somebody in between could put there: a well-formed answer without encryption or signature. command: what it says of
    itself that it answers; logging in (0, 1) is the one thing that is answered in clear."""
    data = write(drive, "clear.bin", 1000)
    file = opened(files, C + "clear.bin")
    connection: Any = files.linked("").link._connection
    plain = connection._decrypt
    received = connection.transport.recv

    def stripped(timeout: float) -> bytes:
        from smbprotocol.connection import SMB2TransformHeader

        raw: bytes = received(timeout)
        if raw[:4] != b"\xfdSMB":
            return raw
        header = SMB2TransformHeader()
        header.unpack(raw)
        found = bytearray(plain(header))
        if command is not None:
            found[12:14] = struct.pack("<H", command)
        return bytes(found)

    assert read(file, 0, 1000) == data
    connection.transport.recv = stripped

    def reads() -> None:
        for _ in range(3):  # the thread may still be waiting for the first one in the old way
            read(file, 0, 1000)

    with pytest.raises(ConnectionLost):
        reads()


def test_a_message_of_any_length_is_not_waited_for() -> None:
    """Somebody on port 445 who is no SMB server, and says that gigabytes come."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"\xff\xff\xff\xf0" + bytes(1000))
                peer.recv(4096)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(ConnectionLost, match="4294967280 bytes"):
            SmbLink("127.0.0.1", SmbAccess("x", "y", port=listener.getsockname()[1], silence_s=5), where="smb://hv1")
        thread.join(5)


def test_nobody_there_is_a_lost_connection() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        with pytest.raises(ConnectionLost):
            SmbLink("127.0.0.1", SmbAccess("x", "y", port=taken.getsockname()[1]), where="smb://hv1")


def test_a_disk_on_a_file_server_is_read_from_there(files: SmbFiles, drive: Path) -> None:
    data = write(drive, "far/d.vhdx", 1000)
    for path in ("\\\\localhost\\vms\\far\\d.vhdx", "\\\\?\\UNC\\LOCALHOST\\vms\\far\\d.vhdx"):
        file = opened(files, path, drive="\\\\LocalHost\\vms\\far\\d_1.avhdx")
        assert read(file, 0, 1000) == data
        file.close()


@pytest.mark.parametrize("drive_path", [C + "x.vhdx", "\\\\nas\\vms\\d.avhdx", ""])
def test_no_login_goes_to_a_server_that_a_layer_names(files: SmbFiles, drive_path: str) -> None:
    with pytest.raises(SourceError, match="nobody logs in there"):
        opened(files, "\\\\attacker.example\\vms\\d.vhdx", drive=drive_path)
    assert files._links == {}
