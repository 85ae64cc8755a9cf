"""The appliance's care for what changed below it, and for its own end, mostly on a double of libguestfs' handle."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokvm.core.units import MiB
from tokvm.guest import appliance as module
from tokvm.guest.appliance import TABLE, Appliance
from tokvm.guest.base import GuestDisk, GuestError


class Handle:
    """Two disks: sda with a partition table, sdb a physical volume as a whole."""

    def __init__(self) -> None:
        self.flushed: list[str] = []
        self.disks = {"/dev/sda": bytearray(2 * MiB), "/dev/sdb": bytearray(2 * MiB)}

    def list_devices(self) -> list[str]:
        return list(self.disks)

    def list_partitions(self) -> list[str]:
        return ["/dev/sda1", "/dev/sda2"]

    def part_to_dev(self, partition: str) -> str:
        return partition[:-1]

    def pvs(self) -> list[str]:
        return ["/dev/sdb"]

    def pread_device(self, device: str, count: int, offset: int) -> bytes:
        return bytes(self.disks[device][offset : offset + count])

    def blockdev_flushbufs(self, device: str) -> None:
        self.flushed.append(device)

    def drop_caches(self, what: int) -> None: ...

    def close(self) -> None: ...

    def _prepare(self, *_: object, **__: object) -> None: ...

    set_backend = set_backend_settings = set_memsize = set_autosync = add_drive_opts = _prepare


@pytest.fixture
def handle() -> Handle:
    return Handle()


@pytest.fixture
def appliance(handle: Handle) -> Any:
    found = Appliance(handle, [GuestDisk("/a.raw"), GuestDisk("/b.raw")], readonly=False, deadline_s=60)
    yield found
    found.abandon()


@pytest.mark.parametrize(
    ("device", "offset"), [("/dev/sda", 446), ("/dev/sda", TABLE - 1), ("/dev/sdb", 4096), ("/dev/sdb", MiB - 1)]
)
def test_another_layout_below_it_is_seen(appliance: Appliance, handle: Handle, device: str, offset: int) -> None:
    appliance.note_layout()
    appliance.forget()
    handle.disks[device][offset] ^= 1
    with pytest.raises(GuestError, match="partitions or logical volumes changed"):
        appliance.forget()


@pytest.mark.parametrize(("device", "offset"), [("/dev/sda", 63 * 512 + 1024), ("/dev/sda", 2 * MiB - 1), ("/dev/sdb", MiB)])
def test_what_file_systems_write_is_no_other_layout(appliance: Appliance, handle: Handle, device: str, offset: int) -> None:
    appliance.note_layout()
    handle.disks[device][offset] ^= 1
    appliance.forget()
    assert handle.flushed == ["/dev/sda", "/dev/sdb"]


def test_a_physical_volume_is_flushed_too_for_lvm_holds_it_open(appliance: Appliance, handle: Handle) -> None:
    handle.pvs = lambda: ["/dev/sda2"]  # type: ignore[method-assign]
    handle.disks["/dev/sda2"] = bytearray(2 * MiB)
    handle.list_devices = lambda: ["/dev/sda", "/dev/sdb"]  # type: ignore[method-assign]
    appliance.note_layout()
    appliance.forget()
    assert handle.flushed == ["/dev/sda", "/dev/sdb", "/dev/sda2"]


def test_a_rehearsal_that_noted_no_layout_forgets_all_the_same(appliance: Appliance, handle: Handle) -> None:
    handle.disks["/dev/sda"][446] ^= 1
    appliance.forget()


def started(program: str) -> subprocess.Popen[bytes]:
    """A child of that name that does nothing."""
    return subprocess.Popen(["bash", "-c", f"exec -a {program} sleep 60"])


def test_its_deadline_kills_the_process_that_it_knows_and_asks_nobody(handle: Handle) -> None:
    """libguestfs answers get_pid only when the call that hangs has ended."""
    child = started("qemu-system-x86_64")
    found = Appliance(handle, [GuestDisk("/a.raw")], readonly=False, deadline_s=60)
    found._pid = child.pid
    try:
        found.give(0.05)
        assert child.wait(timeout=10) == -signal.SIGKILL
    finally:
        child.kill()
        found.abandon()


def test_while_it_launches_only_what_its_own_thread_started_is_killed(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of a target may be started meanwhile: it is a QEMU, too."""
    with ThreadPoolExecutor(1) as elsewhere:
        older, others = started("qemu-nbd"), []
        killed: list[int] = []

        def launch() -> None:
            others.append(elsewhere.submit(started, "qemu-nbd").result())
            for _ in range(2):  # whatever it starts next, after the deadline too
                with started("qemu-system-x86_64") as hanging:
                    killed.append(hanging.wait(timeout=30))
            raise RuntimeError("appliance closed the connection unexpectedly")

        vars(handle)["launch"] = launch
        monkeypatch.setattr(module, "_bindings", lambda: SimpleNamespace(GuestFS=lambda **_: handle))
        try:
            with pytest.raises(GuestError, match="does not start"):
                Appliance.launch([GuestDisk("/a.raw")], readonly=True, tcg=True, deadline_s=0.5)
            assert killed == [-signal.SIGKILL, -signal.SIGKILL]
            assert [one.poll() for one in (older, *others)] == [None, None]
        finally:
            for one in (older, *others):
                one.kill()
                one.wait()


def test_one_that_was_never_launched_kills_nobody_at_its_deadline(handle: Handle) -> None:
    child = started("qemu-nbd")
    found = Appliance(handle, [GuestDisk("/a.raw")], readonly=False, deadline_s=0.05)
    try:
        time.sleep(0.3)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        found.abandon()


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [0.0, 0.1, 0.3])
def test_a_real_one_that_takes_too_long_to_start_is_gone_at_its_deadline(tmp_path: Path, tcg: bool, deadline_s: float) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MiB))
    mine = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = mine.read_text()
    with ThreadPoolExecutor(1) as elsewhere:
        other = elsewhere.submit(started, "qemu-nbd").result()
        try:
            with pytest.raises(GuestError, match="within its deadline"):
                Appliance.launch([GuestDisk(str(disk))], readonly=True, tcg=tcg, deadline_s=deadline_s)
            assert (mine.read_text(), other.poll()) == (before, None)
        finally:
            other.kill()
            other.wait()
