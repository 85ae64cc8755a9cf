"""The real sshd under the persona."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.testing import pids
from tokvm.testing.sshd import Lifetime, Sshd


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path / "sshd")
    with server:
        yield server


def ssh(server: Sshd, *words: str) -> subprocess.CompletedProcess[bytes]:
    argv = ["ssh", "-F", str(server.config_file), "-p", str(server.port), "--", f"{server.user}@{server.host}", *words]
    return subprocess.run(argv, capture_output=True, check=False, timeout=20, stdin=subprocess.DEVNULL)


def test_without_a_forced_command_it_is_an_ordinary_sshd(sshd: Sshd) -> None:
    assert ssh(sshd, "echo here").stdout == b"here\n"


def test_a_forced_command_gets_the_line_in_its_environment(tmp_path: Path) -> None:
    with Sshd(tmp_path / "folder with blanks", forced_command=["/usr/bin/printenv", "SSH_ORIGINAL_COMMAND"]) as server:
        assert ssh(server, "echo 'a  b'; reboot").stdout == b"echo 'a  b'; reboot\n"


def test_another_host_key_at_the_same_address_is_refused_by_the_client(sshd: Sshd) -> None:
    port = sshd.port
    sshd.new_host_key()
    assert sshd.port == port
    done = ssh(sshd, "true")
    assert done.returncode == 255
    assert b"HOST IDENTIFICATION HAS CHANGED" in done.stderr


def test_a_restarted_sshd_is_reached_at_the_same_address(sshd: Sshd) -> None:
    port = sshd.port
    sshd.stop()
    assert ssh(sshd, "true").returncode == 255
    sshd.start()
    assert (sshd.port, ssh(sshd, "true").returncode) == (port, 0)


def test_cut_connections_break_and_new_ones_work(sshd: Sshd) -> None:
    argv = ["ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), f"{sshd.user}@{sshd.host}", "echo up; sleep 60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        sshd.cut_connections()
        assert client.wait(timeout=10) == 255
    assert ssh(sshd, "true").returncode == 0


def test_frozen_connections_are_silent_but_alive_and_can_thaw(sshd: Sshd) -> None:
    line = "while echo tick; do sleep 0.02; done"
    argv = ["ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), f"{sshd.user}@{sshd.host}", line]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"tick\n"
        assert sshd.freeze_connections() > 0
        time.sleep(0.2)
        os.set_blocking(client.stdout.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            os.read(client.stdout.fileno(), 1 << 20)
        time.sleep(0.3)
        with pytest.raises(BlockingIOError):
            os.read(client.stdout.fileno(), 1)
        assert client.poll() is None
        sshd.thaw_connections()
        os.set_blocking(client.stdout.fileno(), True)
        assert os.read(client.stdout.fileno(), 4) == b"tick"
        client.kill()


@pytest.mark.parametrize(("lifetime", "survives"), [(Lifetime.WITH_US, False), (Lifetime.OUTLIVES_US, True)])
@pytest.mark.slow
def test_it_dies_with_its_starter_or_is_found_again(tmp_path: Path, lifetime: Lifetime, survives: bool) -> None:
    code = (
        "import sys; from pathlib import Path; from tokvm.testing.sshd import *;"
        f"Sshd(Path(sys.argv[1])).start(Lifetime.{lifetime.name})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sshd")], check=True, timeout=30)
    again = Sshd(tmp_path / "sshd")
    try:
        pid = pids.noted(tmp_path / "sshd" / "run" / "sshd.pid")
        assert ((pid is not None) and not pids.wait_gone(pid, 1.0)) is survives
        if survives:
            assert ssh(again, "true").returncode == 0
    finally:
        again.stop()
    assert again.pid is None


def test_a_pid_that_another_process_has_now_is_not_killed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as innocent:
        note = pids.note(tmp_path, "old", innocent.pid)
        note.write_text(f"{innocent.pid} 12345\n")
        assert pids.kill_noted(tmp_path) == 0
        assert innocent.poll() is None
        pids.note(tmp_path, "ours", innocent.pid)
        assert pids.kill_noted(tmp_path) == 1
