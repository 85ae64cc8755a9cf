"""Taking a lab down: everything of ours goes, after any crash, and nothing of anybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.lab import home as homes
from tokvm.lab.errors import LabError
from tokvm.lab.keeper import start_keeper
from tokvm.lab.run import down
from tokvm.lab.settings import LabSettings
from tokvm.testing import pids
from tokvm.testing.sshd import Lifetime
from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, build_host


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "labs"
    monkeypatch.setenv("TOKVM_LAB_DIR", str(folder))
    yield folder
    down()


def test_labs_lie_together_and_go_one_by_one_or_all(root: Path) -> None:
    places = [homes.new_home() for _ in range(3)]
    assert homes.all_homes() == sorted(places)
    assert down(places[0]) == 1
    assert not places[0].exists()
    assert down() == 2
    assert list(root.iterdir()) == []


def test_a_folder_with_other_peoples_files_is_neither_used_nor_removed(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    with pytest.raises(LabError, match="folder of its own"):
        homes.new_home(other)
    with pytest.raises(LabError, match="no lab here"):
        down(other)
    assert (other / "thesis.tex").exists()
    assert homes.labs_root() == root


def test_a_root_that_others_may_write_to_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(LabError, match="somebody else"):
        homes.labs_root()
    root.chmod(0o700)


def test_down_after_the_lab_was_killed_finds_what_it_had_started(root: Path) -> None:
    """A process builds half a lab (sshd, keeper, a child, a tokvm under way) and is killed with -9."""
    code = """
        import os, signal, subprocess, sys
        from tokvm.lab import home
        from tokvm.lab.keeper import start_keeper
        from tokvm.testing import pids
        from tokvm.testing.sshd import Lifetime
        from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, build_host
        place = home.new_home()
        start_keeper(place, "clock")
        host = build_host(place / "host", machines=[MachineSpec("a", disks=[DiskSpec(1 << 20)])], lifetime=Lifetime.OUTLIVES_US)
        start_keeper(place, "link", str(host.sshd.port), "0", "0.01")
        child = subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pids.note(place / "run", "tokvm-1", child.pid)
        print(host.sshd.pid, child.pid, *(pids.noted(file) for file in (place / "run").glob("*.pid")), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False, timeout=60)
    assert done.returncode == -9, done.stderr
    started = [int(word) for word in done.stdout.split()]
    living = [pid for pid in started if pids.start_tick(pid) is not None]
    assert len(living) >= 4
    assert down() == 1
    assert [pid for pid in living if not pids.wait_gone(pid, 5)] == []
    assert list(root.iterdir()) == []


def test_down_spares_a_process_that_only_has_the_same_pid(root: Path) -> None:
    place = homes.new_home()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (place / "run" / "tokvm-7.pid").write_text(f"{innocent.pid} 1\n")
        (place / "host").mkdir()
        down(place)
        assert innocent.poll() is None
        innocent.kill()
    assert not root.joinpath(place.name).exists()


def test_the_keeper_listens_after_its_starter_has_gone(root: Path) -> None:
    place = homes.new_home()
    host = build_host(place / "host", machines=[MachineSpec("a", disks=[DiskSpec(1 << 20)])], lifetime=Lifetime.OUTLIVES_US)
    sshd = host.sshd
    port = start_keeper(place, "link", str(sshd.port), "0", "0.05")
    sshd.also_at(port)
    argv = ["ssh", "-F", str(sshd.config_file), "-p", str(port), f"{sshd.user}@{sshd.host}", "xe host-list"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=30, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (1, b"Unknown command: host-list\n")
    assert root.is_dir()
    assert os.getpid() != pids.noted(place / "run" / "link.pid")


@pytest.mark.parametrize(
    "wrong", [{"source": "vmware"}, {"guests": 0}, {"guests": 17}, {"passes": 0}, {"link_rate": 1.0}, {"rtt_s": -1.0}]
)
def test_an_impossible_lab_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LabError):
        LabSettings(**wrong)  # type: ignore[arg-type]
