"""The guest booted: its ledger, its clock, its snapshots while it writes, its ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.lab.boot_disk import PARTITION_OFFSET
from tokvm.lab.clock import OutsideClock
from tokvm.lab.guest_image import GuestImage, GuestSettings, build_guest
from tokvm.lab.kernel import GuestKernel
from tokvm.lab.ledger import LedgerCheck, check_ledger
from tokvm.lab.programs import find_program, run_program
from tokvm.lab.qemu_process import QemuProcess, VmStatus
from tokvm.lab.qmp import Qmp
from tokvm.lab.source_vm import SourceVm

VmFactory = Callable[..., SourceVm]
Flatten = Callable[[Sequence[Path], bytes], bytes]
BOOT_S = 90.0

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def bios_machine(folder: Path, disk: Path, *, clock: OutsideClock) -> Iterator[QemuProcess]:
    """The target's hardware: BIOS, q35, virtio. Nothing but the disk tells the guest what to do."""
    assert clock.port
    qemu = QemuProcess(folder, mark=f"tokvm-test-{disk.name}")
    options = ["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none"]
    options += ["-no-reboot", "-drive", f"file={disk},format=raw,if=none,id=root", "-device", "virtio-blk-pci,drive=root"]
    options += ["-nic", "user,model=virtio-net-pci", "-chardev", "file,id=serial,path=serial.log", "-serial", "chardev:serial"]
    qemu.start(options)
    try:
        yield qemu
    finally:
        qemu.end()


def ledger_of(disk: Path, *, path: str = "/ledger", offset: int = PARTITION_OFFSET) -> LedgerCheck:
    """The ledger on a disk as a kernel would find it: the journal is replayed on a copy first."""
    copy = disk.with_suffix(".fs")
    with disk.open("rb") as source, copy.open("wb") as target:
        source.seek(offset)
        while block := source.read(MiB):
            target.write(block)
    # Exit status 1: errors corrected, which is what replaying the journal is.
    e2fsck = subprocess.run([find_program("e2fsck", package="e2fsprogs"), "-fy", str(copy)], capture_output=True)
    assert e2fsck.returncode in {0, 1}, e2fsck.stdout
    assert b"UNEXPECTED INCONSISTENCY" not in e2fsck.stdout
    content = run_program(["debugfs", "-R", f"cat {path}", str(copy)], package="e2fsprogs")
    copy.unlink()
    return check_ledger(content)


def test_it_boots_from_bios_on_virtio_and_goes_on_after_a_clean_shutdown(
    clock: OutsideClock, kernel: GuestKernel, tmp_path: Path
) -> None:
    image = build_guest(
        tmp_path / "a.raw", size=64 * MiB, settings=GuestSettings(name="a", clock_port=clock.port), kernel=kernel
    )
    known: frozenset[str] = frozenset()
    for run in range(2):
        with bios_machine(tmp_path, image.disk, clock=clock) as qemu:
            boot = clock.wait_ready("a", timeout_s=BOOT_S, known=known)
            assert boot.root == "vda1"
            clock.wait_acknowledged("a", 5 * (run + 1), timeout_s=30)
            asked = time.monotonic()
            qemu.command("system_powerdown")
            while qemu.pid() is not None:
                assert time.monotonic() < asked + 20
                time.sleep(0.05)
        known |= {boot.id}
        ended = clock.boots("a")[-1]
        assert ended.stopping is not None
        assert ended.last_heartbeat is not None
        assert ended.last_heartbeat < ended.stopping + 0.5
    report = clock.ledger_report("a")
    assert report.intact
    assert report.acknowledged >= 5
    assert clock.troubles("a") == []
    assert set(clock.acknowledged("a").items()) <= set(ledger_of(image.disk).sums.items())


def test_a_snapshot_while_it_writes_holds_all_that_was_acknowledged(
    clock: OutsideClock, new_vm: VmFactory, flatten: Flatten, tmp_path: Path
) -> None:
    vm = new_vm("busy", clock_port=clock.port, write_rate=400_000)
    vm.power_on()
    clock.wait_ready("busy", timeout_s=BOOT_S)
    frozen: list[dict[int, int]] = []
    for number in range(3):
        clock.wait_acknowledged("busy", 8 * (number + 1), timeout_s=60)
        frozen.append(clock.acknowledged("busy"))
        vm.freeze(f"s{number}")
    assert vm.is_running()

    older = b""
    for number, acknowledged in enumerate(frozen):
        disk, data = tmp_path / "disk.raw", tmp_path / "data.raw"
        vm.export_raw(0, f"s{number}", disk)
        vm.export_raw(1, f"s{number}", data)
        found, copy = ledger_of(disk), ledger_of(data, offset=0)
        assert found.sound
        assert copy.sound
        assert set(acknowledged.items()) <= set(found.sums.items())
        assert set(acknowledged.items()) <= set(copy.sums.items())
        # Written to the root first, then to the data disk: one moment for both disks shows in what each has.
        assert found.last - 1 <= copy.last <= found.last
        if number:
            with (tmp_path / "delta.vhd").open("wb") as out:
                vm.export_delta(0, f"s{number - 1}", f"s{number}", out)
            assert (tmp_path / "delta.vhd").stat().st_size > 2 * MiB
            assert flatten([tmp_path / "delta.vhd"], older) == disk.read_bytes()
        older = disk.read_bytes()

    assert vm.shutdown(deadline_s=30)
    assert vm.status() is VmStatus.OFF
    vm.freeze("off")
    vm.export_raw(0, "off", tmp_path / "off.raw")
    assert set(clock.acknowledged("busy").items()) <= set(ledger_of(tmp_path / "off.raw").sums.items())


def test_a_power_cut_loses_nothing_that_was_acknowledged(clock: OutsideClock, new_vm: VmFactory) -> None:
    vm = new_vm("cut", clock_port=clock.port, write_rate=200_000)
    vm.power_on()
    first = clock.wait_ready("cut", timeout_s=BOOT_S)
    vm.freeze("below")  # the guest now writes to a qcow2, whose tables QEMU holds in memory until the guest flushes
    clock.wait_acknowledged("cut", 10, timeout_s=60)
    pid = vm.qemu.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while vm.qemu.pid() is not None:
        time.sleep(0.02)
    assert vm.status() is VmStatus.CRASHED
    vm.power_on()
    clock.wait_ready("cut", timeout_s=BOOT_S, known=frozenset({first.id}))
    report = clock.ledger_report("cut")
    assert report.intact, report
    assert report.acknowledged >= 10
    vm.power_off()
    assert vm.status() is VmStatus.OFF


def test_a_vm_outlives_whoever_started_it(new_vm: VmFactory) -> None:
    vm = new_vm("orphan")
    code = f"from pathlib import Path; from tokvm.lab.source_vm import SourceVm; import os, signal; \
        SourceVm(Path({str(vm.dir)!r})).power_on(); os.kill(os.getpid(), signal.SIGKILL)"
    starter = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert starter.returncode == -signal.SIGKILL, starter.stderr
    time.sleep(0.5)
    found = SourceVm(vm.dir)
    assert found.is_running()
    pid = found.qemu.pid()
    found.power_on()
    assert found.qemu.pid() == pid
    found.destroy()
    assert found.qemu.pid() is None
    assert not vm.dir.exists()


def test_a_snapshot_taken_by_a_process_that_died_is_found_in_qemu(new_vm: VmFactory) -> None:
    vm = new_vm("pending")
    vm.power_on()
    names = vm.dir / "layers.json"
    before = names.read_text()
    vm.freeze("s")
    after = names.read_text()
    names.write_text(before.replace("null", '"s"'))
    assert vm.snapshots() == ["s"]
    assert names.read_text() == after
    names.write_text(after.replace("null", '"never begun"'))
    assert vm.snapshots() == ["s"]
    with vm.qemu.qmp() as qmp:
        assert qmp.execute("query-status")["running"]


def test_a_guest_that_hangs_is_not_off_at_the_deadline(new_vm: VmFactory) -> None:
    vm = new_vm("deaf")
    vm.power_on()
    with Qmp(vm.dir / "qmp.sock") as qmp:
        qmp.execute("stop")
    assert not vm.shutdown(deadline_s=0.5)
    assert vm.is_running()
    vm.power_off()
    assert vm.status() is VmStatus.OFF


def test_the_guest_does_not_wait_for_a_clock_that_is_gone(guest: GuestImage, new_vm: VmFactory, tmp_path: Path) -> None:
    assert guest.disk.exists()
    record = tmp_path / "record.jsonl"
    with OutsideClock(record) as first:
        port = first.port
        vm = new_vm("alone", clock_port=port)
        vm.power_on()
        first.wait_ready("alone", timeout_s=BOOT_S)
        first.wait_acknowledged("alone", 3, timeout_s=30)
        heard = max(first.acknowledged("alone"))
    time.sleep(3)
    with OutsideClock(record, port=port) as second:
        second.wait(lambda clock: max(clock.acknowledged("alone")) > heard + 8, timeout_s=30, what="the guest's return")
        missed = set(range(1, max(second.acknowledged("alone")))) - set(second.acknowledged("alone"))
    assert missed == set()
    assert len({boot.id for boot in second.boots("alone")}) == 1
