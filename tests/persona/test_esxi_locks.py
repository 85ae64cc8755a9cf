"""Which files of the played ESXi host can be read when, over its real sshd; and what that sshd does not let anybody do."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.persona.conftest import SSH, BuildEsxi, MiB

from tokvm.core.errors import ConnectionLost
from tokvm.remote.sftp import RemoteFileError, SftpClient
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.testing.esxi.host import DiskSpec, EsxHost, MachineSpec
from tokvm.testing.esxi.paths import folder_of
from tokvm.testing.sshd import Sshd


@contextlib.contextmanager
def sftp(host: EsxHost, *, deadline_s: float = 10.0) -> Iterator[SftpClient]:
    sshd = host.sshd
    connection = SshHost(SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))
    try:
        with connection.sftp(deadline_s=deadline_s) as client:
            yield client
    finally:
        connection.close()


def whole(client: SftpClient, path: str) -> bytes:
    file = client.open(path)
    raw = bytearray(file.size)
    file.read_into(0, memoryview(raw))
    file.close()
    return bytes(raw)


@pytest.fixture
def host(build_esxi: BuildEsxi) -> EsxHost:
    """Blanks and more in its names; running; one disk with a MiB of data."""
    made = build_esxi(MachineSpec("wéb (1) 'x' [y]", disks=[DiskSpec(4 * MiB)], fields={"annotation": "ü"}))
    made.write_disk(NAME, offset=0, data=bytes(range(256)) * 4096)
    return made


NAME = "wéb (1) 'x' [y]"


def readable(host: EsxHost, client: SftpClient) -> dict[str, bool]:
    """Extents of the first disk, base first, by their names' ends; each asked by sftp and by dd, which must agree."""
    found = {}
    for path in reversed(host.chain(NAME)):
        extent = host.extent(path)
        dd = host.ask("dd", f"if={extent}", "of=/dev/null", "bs=512", "count=1")
        opened = dd.code == 0
        with contextlib.nullcontext() if opened else pytest.raises(RemoteFileError, match="Failure"):
            assert whole(client, extent) == host.local(extent).read_bytes()
        assert ("Device or resource busy" in dd.stderr) != opened
        found[extent.removeprefix(path.removesuffix(".vmdk")).removesuffix(".vmdk") + path[-11:-5]] = opened
        assert whole(client, path).startswith(b"# Disk DescriptorFile\n")
    return found


@pytest.mark.slow
def test_the_lock_matrix(host: EsxHost) -> None:
    with sftp(host) as client:
        assert list(readable(host, client).values()) == [False]
        host.foreign_snapshot(NAME)
        assert list(readable(host, client).values()) == [True, False]
        host.foreign_snapshot(NAME)
        assert list(readable(host, client).values()) == [True, True, False]
        host.guest_stops(NAME)
        assert list(readable(host, client).values()) == [True, True, True]
    assert host.violations() == []


@pytest.mark.parametrize(("kind", "clones"), [("files", True), pytest.param("all", False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_build_that_keeps_the_base_locked(build_esxi: BuildEsxi, kind: str, clones: bool) -> None:
    """ESXi 7.0U1c kept it from everybody; elsewhere vmkfstools gets what dd does not."""
    host = build_esxi(MachineSpec(NAME, disks=[DiskSpec(4 * MiB)]), base_stays_locked=kind)
    host.write_disk(NAME, offset=0, data=b"x" * 512)
    for _ in range(2):
        host.foreign_snapshot(NAME)
    with sftp(host) as client:
        assert list(readable(host, client).values()) == [False, True, False]
        host.guest_stops(NAME)
        assert list(readable(host, client).values()) == [True, True, True]
        host.start(NAME)
    clone = f"{host.directory(NAME)}/tokvm-clone"
    host.local(clone).mkdir()
    with sftp(host) as client:
        words = [
            f"'{one}'" for one in (host.chain(NAME)[-1].replace("'", "'\"'\"'"), f"{clone}/b.vmdk".replace("'", "'\"'\"'"))
        ]
        done = host.run(f"vmkfstools -i {words[0]} {words[1]} -d thin")
        assert (done.code == 0) == clones
        assert ("Failed to lock the file (16392)" in done.stderr) != clones
        if clones:
            assert whole(client, f"{clone}/b-flat.vmdk").startswith(b"x" * 512)
    assert host.violations() == []


@pytest.mark.slow
def test_files_of_a_merge_are_busy_until_it_is_done(build_esxi: BuildEsxi) -> None:
    host = build_esxi(MachineSpec(NAME, disks=[DiskSpec(4 * MiB)]), merge_s=30.0)
    first = host.foreign_snapshot(NAME)["id"]
    host.foreign_snapshot(NAME)
    host.delete_snapshot(NAME, first)
    with sftp(host) as client:
        assert list(readable(host, client).values()) == [False, False, False]
        host.finish_tasks()
        assert list(readable(host, client).values()) == [True, False]


def test_who_reads_a_file_keeps_a_merge_and_a_start_from_it(host: EsxHost) -> None:
    made = host.foreign_snapshot(NAME)["id"]
    base = host.extent(host.chain(NAME)[-1])
    with sftp(host) as client:
        file = client.open(base)
        host.delete_snapshot(NAME, made)
        assert (host.snapshots(NAME), len(host.chain(NAME))) == ([], 2)
        assert "consolidationNeeded = true" in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
        task = host.ask("vim-cmd", "vmsvc/get.tasklist", 1).stdout.split("'vim.Task:")[-1].split("'")[0]
        assert 'state = "error"' in host.ask("vim-cmd", "vimsvc/task_info", task).stdout
        file.close()
        host.consolidate(NAME)
        assert len(host.chain(NAME)) == 1
        assert "consolidationNeeded = false" in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
        host.guest_stops(NAME)
        file = client.open(base)
        assert "FileLocked" in host.vim("vmsvc/power.on", 1).stdout
        assert not host.is_running(NAME)
        file.close()
        assert host.vim("vmsvc/power.on", 1).stdout == "Powering on VM:\n"
        assert host.is_running(NAME)


def test_what_is_no_disk_is_not_for_sftp(host: EsxHost) -> None:
    folder = host.directory(NAME)
    with sftp(host) as client:
        for path in (f"{folder}/{NAME}.vmx", f"{folder}/vmware.log"):
            with pytest.raises(RemoteFileError, match="denied"):
                client.open(path)
        with pytest.raises(RemoteFileError, match="denied"):
            client.listdir(folder)
        for path in ("/etc/passwd", f"{folder}/nothing.vmdk", f"{folder}/../x.vmdk"):
            with pytest.raises(RemoteFileError, match="No such file"):
                client.open(path)
    assert len(host.violations()) == 3


def test_a_datastores_name_leads_to_the_same_file(host: EsxHost) -> None:
    host.guest_stops(NAME)
    path = host.extent(host.chain(NAME)[0])
    named = path.replace(host.state()["datastores"][0]["uuid"], "datastore1")
    with sftp(host) as client:
        assert whole(client, named) == whole(client, path)


@pytest.mark.slow
def test_a_session_that_dies_or_freezes_after_some_bytes(host: EsxHost) -> None:
    host.guest_stops(NAME)
    for settings in ({"die_after": 200_000}, {"die_after": -1, "freeze_after": 200_000}):
        host.set_sftp(**settings)
        with sftp(host, deadline_s=1.0) as client:
            file = client.open(host.extent(host.chain(NAME)[0]))
            with pytest.raises(ConnectionLost):
                file.read_into(0, memoryview(bytearray(file.size)))


@pytest.mark.slow
def test_the_stock_sftp_client_fetches_a_frozen_file(host: EsxHost, tmp_path: Path) -> None:
    host.foreign_snapshot(NAME)
    extent, sshd = host.extent(host.chain(NAME)[-1]), host.sshd
    assert folder_of(extent) == host.directory(NAME)
    quoted = "".join(f"\\{letter}" if letter in " '\"[]()*?\\" else letter for letter in extent)
    batch = f'get {quoted} "{tmp_path}/out"\n'
    command = ["sftp", "-F", str(sshd.config_file), "-P", str(sshd.port), "-b", "-", f"{sshd.user}@{sshd.host}"]
    done = subprocess.run(command, input=batch.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == host.local(extent).read_bytes()


# sshd, as ESXi 8.0.2 has it


def attempt(sshd: Sshd, *options: str) -> subprocess.CompletedProcess[bytes]:
    line = "vim-cmd vmsvc/getallvms; echo tokvm-0123456789abcdef $?"
    argv = ["ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), *options, "--", f"{sshd.user}@{sshd.host}", line]
    return subprocess.run(argv, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=30)


@pytest.mark.slow
def test_ciphers_and_keys_of_fips_mode(host: EsxHost, tmp_path: Path) -> None:
    sshd = host.sshd
    assert attempt(sshd).returncode == 0
    assert attempt(sshd, "-c", "aes128-ctr").returncode == 0
    done = attempt(sshd, "-c", "chacha20-poly1305@openssh.com")
    assert (done.returncode, b"no matching cipher" in done.stderr) == (255, True)
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with (sshd.folder / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())  # installed correctly, and of no use
    config = tmp_path / "config"
    config.write_text(sshd.config_file.read_text().replace(str(sshd.identity), str(key)))
    done = attempt(sshd, "-F", str(config))
    assert (done.returncode, b"Permission denied" in done.stderr) == (255, True)


@pytest.mark.slow
def test_no_more_than_ten_sessions_in_a_connection_and_no_tunnels(host: EsxHost, tmp_path: Path) -> None:
    sshd, socket = host.sshd, tmp_path / "s"
    options = ["-F", str(sshd.config_file), "-p", str(sshd.port), "-S", str(socket)]
    target = f"{sshd.user}@{sshd.host}"
    subprocess.run(["ssh", *options, "-M", "-f", "-N", "--", target], check=True, stdin=subprocess.DEVNULL, timeout=20)
    open_ones = []
    try:
        for _ in range(10):
            argv = ["ssh", *options, "-s", "--", target, "sftp"]
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"\x00\x00\x00\x05\x01\x00\x00\x00\x03")
            process.stdin.flush()
            assert process.stdout.read(5)[4] == 2  # VERSION: it is open
            open_ones.append(process)
        eleventh = subprocess.run(
            ["ssh", *options, "-o", "ControlMaster=no", "-s", "--", target, "sftp"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=20,
        )
        assert b"Session open refused by peer" in eleventh.stderr
    finally:
        for process in open_ones:
            process.kill()
            process.communicate()
        subprocess.run(["ssh", *options, "-O", "exit", "--", target], capture_output=True, check=False)
    done = subprocess.run(
        ["ssh", *options, "-S", "none", "-W", f"127.0.0.1:{sshd.port}", "--", target],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert b"administratively prohibited" in done.stderr


@pytest.mark.slow
def test_a_banner_is_shown_before_anything_else(build_esxi: BuildEsxi, ssh: SSH) -> None:
    host = build_esxi(banner="Zutritt nur für Befugte\n")
    done = ssh(host, "date +%s; echo tokvm-0123456789abcdef $?")
    assert b"Zutritt" in done.stderr
    assert done.stdout.endswith(b"tokvm-0123456789abcdef 0\n")
