"""The whole thing: real guests, the real command, the outside clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.core.units import KiB, MiB
from tokvm.lab import home as homes
from tokvm.lab.errors import LabError
from tokvm.lab.run import down, run
from tokvm.lab.settings import SOURCES, GuestKind, LabSettings
from tokvm.lab.source_vm import SourceVm
from tokvm.testing import pids
from tokvm.testing.xenserver.host import XenHost

DAILY = ("xenserver", "esxi-vmfs5", "vcenter-api")

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path / "labs"
    monkeypatch.setenv("TOKVM_LAB_DIR", str(folder))
    yield folder
    down()


# Those of .ci/run, as the README shows them, are run there every day.
SHAPED = [pytest.param(source, marks=() if source in DAILY else pytest.mark.nightly) for source in SOURCES]


@pytest.mark.parametrize("source", SHAPED)
def test_a_running_guest_is_migrated_and_nothing_is_left_behind(root: Path, source: str) -> None:
    said: list[str] = []
    settings = LabSettings(source=source, disk_size=96 * MiB, rtt_s=0.002, link_rate=200.0 * MiB)
    report = run(settings, progress=said.append)
    assert report.exit_code == 0, report.text
    document = json.loads(json.dumps(report.document))
    assert document["outcome"] == "migrated"
    assert document["ledger"]["lost"] == 0
    assert document["ledger"]["acknowledged"] >= 20
    passes = ["base", "final"] if source == "vcenter-api" else ["base", "delta", "delta", "final"]
    assert [one["kind"] for one in document["passes"]] == passes
    assert document["target"]["root"].startswith("vda")
    times = document["downtime_s"]
    assert times["total"] == pytest.approx(sum(times[part] for part in ("stop", "delta", "start", "boot")), abs=0.01)
    assert 0 < times["total"] < 600
    assert list(root.iterdir()) == []
    assert said


@pytest.mark.parametrize(
    "guest",
    [
        GuestKind.MINI_NO_VIRTIO,
        pytest.param(GuestKind.DEBIAN_NO_VIRTIO, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)]),
    ],
)
def test_a_guest_without_virtio_is_rehearsed_morphed_and_moved(root: Path, guest: GuestKind, tmp_path: Path) -> None:
    report = run(LabSettings(guest=guest, rehearse=True, passes=2, write_rate=64 * KiB, pictures=tmp_path / "pictures"))
    assert report.exit_code == 0, report.text
    document = json.loads(json.dumps(report.document))
    assert (document["outcome"], document["ledger"]["lost"]) == ("migrated", 0)
    assert document["target"]["root"].startswith("vda")
    rehearsal, foretold = document["rehearsal"], document["predicted"]
    assert (rehearsal["works"], rehearsal["verdict"], rehearsal["proof"]["sign"]) == (True, "micro-morph", "serial")
    assert set(document["downtime_s"]) == {"total", "stop", "delta", "morph", "start", "boot"}
    assert foretold["total"] == pytest.approx(sum(value for part, value in foretold.items() if part != "total"), abs=0.01)
    assert rehearsal["timings"]["boot"] > 0
    assert Path(rehearsal["screenshot"]).parent == tmp_path / "pictures"
    assert Path(rehearsal["screenshot"]).read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in Path(rehearsal["drawn"]).read_text()
    assert list(root.iterdir()) == []


def test_a_guest_that_never_boots_is_not_moved(root: Path) -> None:
    with pytest.raises(LabError, match="never boots"):
        run(LabSettings(guest=GuestKind.WINDOWS_PHONY))
    assert not root.exists()


def test_a_failed_migration_is_reported_as_failed_and_cleaned_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokvm.lab.moving.migrate_argv", lambda *_args, **_more: ["migrate", "--no-such-option"])
    report = run(LabSettings(disk_size=64 * MiB))
    assert report.exit_code == 1
    assert report.document["outcome"] == "failed"
    assert list(root.iterdir()) == []


def test_a_lab_that_is_up_outlives_its_starter_and_goes_down(root: Path) -> None:
    """`up` in a process that ends; the guest goes on and acknowledges; `down` in another."""
    code = (
        "from tokvm.lab.run import up\n"
        "from tokvm.lab.settings import LabSettings\n"
        "print(up(LabSettings(disk_size=64 << 20))[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=300)
    place = Path(done.stdout.decode().strip())
    record = homes.LabRecord.load(place)
    host = XenHost(place / "host")
    (name,) = record.machines.values()
    assert host.is_running(name)
    vm = SourceVm(place / "host" / "backend" / host.uuid(name))
    pid = vm.qemu.pid()
    assert pid is not None
    assert down() == 1
    assert vm.qemu.pid() is None
    assert pids.wait_gone(pid)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing_that_down_does_not_find(root: Path, number: signal.Signals) -> None:
    """SIGKILL: `down` finds it all. SIGTERM, as the command line handles it: the run takes itself down."""
    code = (
        "import signal, sys\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "from tokvm.lab.run import run; from tokvm.lab.settings import LabSettings\n"
        "run(LabSettings(disk_size=64 << 20), progress=lambda text: print(text, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b": tokvm migrate" in line:
                break
        (place,) = homes.all_homes()
        host = XenHost(place / "host")
        (name,) = homes.LabRecord.load(place).machines.values()
        qemu = SourceVm(place / "host" / "backend" / host.uuid(name)).qemu.pid()
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(timeout=60) != 0
    if number is signal.SIGKILL:
        assert place.exists()
        assert down() == 1
    assert list(root.iterdir()) == []
    assert qemu is not None
    assert pids.wait_gone(qemu)
    until = time.monotonic() + 10  # what was killed is gone as soon as the kernel comes to it
    while (left := named_in_processes(str(place))) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def named_in_processes(text: str) -> list[str]:
    """Command lines in which `text` occurs."""
    found = (read_if_there(file) for file in Path("/proc").glob("[0-9]*/cmdline"))
    return [line.decode(errors="replace") for line in found if text.encode() in line]


def read_if_there(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
