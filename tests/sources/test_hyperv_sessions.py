"""PowerShell that stays, over a real ssh and sshd: how many are started, and what becomes of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.core.errors import ConnectionLost
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.hyperv import powershell, sessions
from tokvm.sources.hyperv.faults import HyperVError
from tokvm.sources.hyperv.powershell import PowerShell
from tokvm.testing.hyperv.host import DiskSpec, HostOptions, HyperVHost, MachineSpec, build_host

pytestmark = pytest.mark.slow


class Line:
    """A host with one VM, and PowerShell on it."""

    def __init__(self, folder: Path) -> None:
        machines = [MachineSpec("web", disks=[DiskSpec(1 << 20)])]
        self.host: HyperVHost = build_host(folder, machines=machines, options=HostOptions(banner=True))
        sshd = self.host.sshd
        self.ssh = SshHost(SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))
        self.shell = PowerShell(self.ssh)
        self.vm: dict[str, object] = {"vm": self.host.id("web")}

    def living(self) -> list[int]:
        """The powershell.exe that are there now."""
        started = {int(str(row["pid"])) for row in self.host._log("commands.log") if "started" in row}
        return [pid for pid in started if (Path("/proc") / str(pid) / "exe").exists()]

    def close(self) -> None:
        self.shell.close()
        self.ssh.close()
        self.host.close()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path / "host")
    yield made
    made.close()
    assert made.host.violations() == []


def eventually(true: Callable[[], object], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_one_powershell_answers_all(line: Line) -> None:
    for _ in range(10):
        assert line.shell.ask("power", line.vm)["state"] == 2
    assert line.shell.act("turn-off", line.vm) == {"state": 3}
    assert line.host.powershells() == 1
    assert line.host.commands() == ["power"] * 10 + ["turn-off"]


def test_a_connection_that_broke_in_between_is_made_again(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PROVED_S", 0.0)
    line.shell.ask("list", {})
    line.host.sshd.cut_connections()
    line.shell.ask("list", {})
    line.host.sshd.cut_connections()
    assert line.shell.act("turn-off", line.vm) == {"state": 3}
    assert line.host.powershells() == 3


@pytest.mark.parametrize("fault", ["drop", "lost_reply", "late"])
def test_an_order_is_given_once_whatever_becomes_of_its_powershell(line: Line, fault: str) -> None:
    line.host.fault("turn-off", fault, seconds=30)
    with pytest.raises(ConnectionLost):
        line.shell.act("turn-off", line.vm)
    assert line.host.commands().count("turn-off") == 1
    assert line.shell.ask("power", line.vm)["state"] == (3 if fault == "lost_reply" else 2)


def test_one_that_hangs_is_left_and_another_is_asked(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.host.fault("power", "hang")
    with pytest.raises(ConnectionLost, match="did not answer"):
        line.shell.act("power", line.vm, timeout_s=0.5)
    assert line.shell.ask("power", line.vm)["state"] == 2
    eventually(lambda: len(line.living()) == 1)


def test_a_slow_answer_is_no_answer_to_the_next_question(line: Line) -> None:
    line.host.fault("power", "wait", seconds=1)
    with pytest.raises(ConnectionLost):
        line.shell.act("power", line.vm, timeout_s=0.3)
    assert "machines" in line.shell.ask("list", {})


def test_the_idle_end_on_the_host_too(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "IDLE_S", 0.2)
    line.shell.ask("list", {})
    assert line.host.powershells() == 1
    eventually(lambda: not line.living())
    line.shell.ask("list", {})
    assert line.host.powershells() == 2


def test_close_ends_them_on_the_host(line: Line) -> None:
    line.shell.ask("list", {})
    assert len(line.living()) == 1
    line.shell.close()
    eventually(lambda: not line.living())


def test_kill_9_ends_them_on_the_host(line: Line) -> None:
    sshd = line.host.sshd
    script = f"""
        import time
        from tokvm.remote.ssh import SshConfig, SshHost
        from tokvm.sources.hyperv.powershell import PowerShell
        shell = PowerShell(SshHost(SshConfig.parse({sshd.netloc!r}, config_file={str(sshd.config_file)!r},
                                                   known_hosts={str(sshd.known_hosts)!r})))
        shell.ask("list", {{}})
        print("asked", flush=True)
        time.sleep(1000)
    """
    client = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert client.stdout is not None
    with client.stdout:
        assert client.stdout.readline() == b"asked\n"
        assert len(line.living()) == 1
        client.kill()
        client.wait()
    eventually(lambda: not line.living())


def test_a_host_without_powershell_is_told_so(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powershell, "COMMAND", "powershell.exe -Command Get-VM")
    with pytest.raises(HyperVError, match=r"did not run ping.*is not recognized"):
        line.shell.act("turn-off", line.vm)
    (violation,) = line.host.violations()
    assert violation["command"] == "powershell.exe -Command Get-VM"
    (line.host.folder / "violations").unlink()
