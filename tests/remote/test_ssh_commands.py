"""Commands over the control connection of a real sshd."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.remote import rundir
from tokvm.remote.ssh import RemoteCommandError, SshConfig, SshHost, quote

HOSTILE = [
    "-oProxyCommand=touch /tmp/pwned",
    "--",
    "-h",
    "$(id)",
    "`id`",
    "${HOME}",
    "a'b",
    'a"b',
    "a\\b",
    "\\",
    "back\\\nslash newline",
    "new\nline",
    "\r\n",
    "\t tab",
    "",
    " ",
    "*",
    "~root",
    "!!",
    "#",
    "; reboot",
    "| cat",
    "&& id",
    "> /tmp/pwned",
    "\u2018quoted\u2019 \u201a\u201b \u201cdouble\u201d",
    "caf\u00e9 \U0001f4a3",
    "\x1b[31mred\x1b[0m\x07",
    os.fsdecode(b"\xff\xfe\x80 not utf-8"),
    "'" * 50,
    "%s%n",
    "a=b",
    "uuid=x name-label='y'",
]


@pytest.fixture
def argv_of(tmp_path: Path) -> list[str]:
    """A remote program that prints its arguments' bytes."""
    script = tmp_path / "argv.py"
    script.write_text("import os, sys\nos.write(1, b'\\0'.join(map(os.fsencode, sys.argv[1:])))\n")
    return [sys.executable, "-IS", str(script)]


def test_a_command_answers_with_output_and_code(host: SshHost) -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_input_reaches_the_command(host: SshHost) -> None:
    assert host.run(["cat"], input=b"in\0put").stdout == b"in\0put"
    assert host.run(["cat"]).stdout == b""


def test_a_failing_command_is_an_error_with_its_own_words(host: SshHost) -> None:
    with pytest.raises(RemoteCommandError, match="boom") as caught:
        host.run(["sh", "-c", "echo partial; echo 'boom \x1b[2J' >&2; exit 9"])
    assert (caught.value.code, caught.value.stdout) == (9, b"partial\n")
    assert b"boom" in caught.value.stderr
    assert "\x1b" not in str(caught.value)


def test_255_is_never_an_answer(host: SshHost) -> None:
    with pytest.raises(ConnectionLost):
        host.run(["sh", "-c", "exit 255"], check=False)
    with pytest.raises(ConnectionLost):
        host.run(["sh", "-c", "kill -9 $$"], check=False)


def test_hostile_arguments_arrive_byte_for_byte(host: SshHost, argv_of: list[str]) -> None:
    rng = random.Random(7)
    noise = [os.fsdecode(bytes(rng.randrange(1, 256) for _ in range(rng.randrange(30)))) for _ in range(300)]
    arguments = HOSTILE + noise
    done = host.run([*argv_of, *arguments])
    assert done.stdout.split(b"\0") == [os.fsencode(argument) for argument in arguments]


@pytest.mark.slow
def test_a_hostile_command_line_is_only_a_command(host: SshHost) -> None:
    for name in filter(str.strip, HOSTILE):
        with pytest.raises(SourceError):
            host.run([name], timeout_s=10)
    assert not Path("/tmp/pwned").exists()


@pytest.mark.parametrize("line", ["", " ", "\t\n"])
def test_an_empty_line_would_open_a_shell_and_is_refused(host: SshHost, line: str) -> None:
    with pytest.raises(UsageError):
        host.run_line(line)


def test_a_line_with_nul_is_refused(host: SshHost) -> None:
    with pytest.raises(UsageError):
        host.run_line("echo a\0b")


def test_a_command_that_does_not_end_is_a_lost_connection(host: SshHost) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionLost, match="did not end within"):
        host.run(["sleep", "60"], timeout_s=0.5)
    assert time.monotonic() - began < 3
    assert host.run(["echo", "on"]).stdout == b"on\n"


def test_commands_share_one_login(make_server: Callable[..., Any], open_host: Callable[..., SshHost]) -> None:
    server = make_server()
    host = open_host(server)
    for _ in range(5):
        host.run(["true"])
    assert (server.directory / "log").read_text().count("Accepted publickey") == 1


def test_commands_may_run_side_by_side(host: SshHost) -> None:
    answers: list[bytes] = []

    def work(number: int) -> None:
        answers.append(host.run(["sh", "-c", f"sleep 0.2; echo {number}"]).stdout)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [b"%d\n" % number for number in range(6)]


def test_the_socket_is_private_and_its_path_short_and_gone_at_the_end(
    shared_server: Any, open_host: Callable[..., SshHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    host = open_host(shared_server)
    host.run(["true"])
    path = Path(host._control.path())
    assert len(str(path)) + 17 < 108
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    host.close()
    assert not path.parent.exists()
    with pytest.raises(ConnectionLost, match="closed"):
        host.run(["true"])


@pytest.mark.parametrize("how", ["master", "session", "socket"])
@pytest.mark.slow
def test_a_control_connection_that_died_is_made_again(
    make_server: Callable[..., Any], open_host: Callable[..., SshHost], eventually: Callable[..., None], how: str
) -> None:
    server = make_server()
    host = open_host(server)
    host.run(["true"])
    master = host._control.pid
    assert master is not None
    match how:
        case "master":
            os.kill(master, signal.SIGKILL)
        case "session":
            for pid in server.sessions():
                os.kill(pid, signal.SIGKILL)
        case _:
            Path(host._control.path()).unlink()
    if how != "socket":
        eventually(lambda: (Path("/proc") / str(master) / "stat").read_text().split()[2] == "Z")
    assert host.run(["echo", "again"]).stdout == b"again\n"


@pytest.mark.slow
def test_a_session_killed_in_the_middle_of_a_command_is_a_lost_connection(
    make_server: Callable[..., Any], open_host: Callable[..., SshHost]
) -> None:
    server = make_server()
    host = open_host(server)
    host.run(["true"])

    def kill() -> None:
        for pid in server.sessions():
            os.kill(pid, signal.SIGKILL)

    killer = threading.Timer(0.3, kill)
    killer.start()
    with pytest.raises(ConnectionLost):
        host.run(["sleep", "60"], timeout_s=30)
    killer.join()
    assert host.run(["echo", "again"]).stdout == b"again\n"


def test_a_host_that_is_not_there_is_a_lost_connection(shared_server: Any, open_host: Callable[..., SshHost]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        host = open_host(shared_server, port=nobody.getsockname()[1])
        with pytest.raises(ConnectionLost, match="Connection refused"):
            host.run(["true"])


@pytest.mark.slow
def test_a_host_that_accepts_and_says_nothing_is_a_lost_connection(
    shared_server: Any, open_host: Callable[..., SshHost]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        host = open_host(shared_server, port=mute.getsockname()[1], connect_timeout_s=1)
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            host.run(["true"])
        assert time.monotonic() - began < 5


def test_a_refused_login_is_not_called_a_lost_connection(
    shared_server: Any, open_host: Callable[..., SshHost], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    with pytest.raises(SourceError, match="refused the login") as caught:
        open_host(shared_server, identity=str(other)).run(["true"])
    assert not isinstance(caught.value, ConnectionLost)


def test_the_users_ssh_config_counts(shared_server: Any, open_host: Callable[..., SshHost], tmp_path: Path) -> None:
    """And what in it would change the meaning of our sessions does not."""
    file = tmp_path / "ssh config"
    file.write_text(
        f"Host the-xen\n HostName 127.0.0.1\n Port {shared_server.port}\n HostKeyAlias [127.0.0.1]:{shared_server.port}\n"
        f" IdentityFile {shared_server.user_key}\n RemoteCommand echo surprise\n RequestTTY force\n"
        f" ControlMaster auto\n ControlPath {tmp_path}/theirs\n ControlPersist 60\n StrictHostKeyChecking no\n"
        f" LocalForward 127.0.0.1:{shared_server.port} 127.0.0.1:1\n ExitOnForwardFailure yes\n"
    )
    host = open_host(shared_server, host="the-xen", port=None, identity=None, config_file=str(file))
    assert host.run(["echo", "ours"]).stdout == b"ours\n"
    stream = host.stream(quote(["echo", "ours"]))
    try:
        assert stream.read_into(memoryview(bytearray(100))) == 5
        stream.finish()
    finally:
        stream.close()
    assert not (tmp_path / "theirs").exists()
    assert "SHA256:" in host.fingerprint()


def test_nothing_secret_and_no_password_prompt_is_on_the_command_line(host: SshHost) -> None:
    host.run(["true"])
    argv = (Path("/proc") / str(host._control.pid) / "cmdline").read_bytes().split(b"\0")
    assert b"BatchMode=yes" in argv
    assert b"StrictHostKeyChecking=yes" in argv
    assert not any(b"assword" in argument for argument in argv)


@pytest.mark.slow
def test_the_connections_die_with_us_even_by_kill_9(make_server: Callable[..., Any], eventually: Callable[..., None]) -> None:
    server = make_server()
    script = f"""
        import time
        from tokvm.remote.ssh import SshConfig, SshHost
        host = SshHost(SshConfig.parse({server.config().where.removeprefix("ssh://")!r}, identity={str(server.user_key)!r},
                                       known_hosts={str(server.known_hosts)!r}, config_file="/dev/null"))
        host.run(["true"])
        stream = host.stream("cat /dev/zero")
        stream.read_into(memoryview(bytearray(100)))
        print(host._control.pid, stream.pid, flush=True)
        time.sleep(1000)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
        parent.wait()
    eventually(lambda: not any((Path("/proc") / str(pid) / "exe").exists() for pid in pids))
    eventually(lambda: server.sessions() == [])


def test_directories_left_by_the_killed_are_swept_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(rundir, "LONGEST_BASE", 1000)
    (tmp_path / "tokvm-ssh-dead").mkdir(mode=0o700)
    (tmp_path / "tokvm-ssh-young").mkdir(mode=0o700)
    (tmp_path / "other").mkdir()
    (tmp_path / "tokvm-ssh-link").symlink_to(tmp_path / "other")
    mine = rundir.RunDirectory("tokvm-ssh-")
    for path in (tmp_path / "tokvm-ssh-dead", tmp_path / "other", mine.path):
        os.utime(path, (1, 1))
    another = rundir.RunDirectory("tokvm-ssh-")
    try:
        assert not (tmp_path / "tokvm-ssh-dead").exists()
        assert (tmp_path / "tokvm-ssh-young").exists()
        assert (tmp_path / "other").exists()
        assert mine.path.exists()
    finally:
        mine.remove()
        another.remove()


def test_a_hostile_host_never_gets_to_ssh() -> None:
    with pytest.raises(UsageError):
        SshHost(SshConfig(host="-oProxyCommand=touch /tmp/pwned"))
    assert not Path("/tmp/pwned").exists()
