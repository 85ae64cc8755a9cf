"""A VM's snapshots and exports. Here the guest is off and qemu-io writes in its stead; test_guest_life.py boots it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tokvm.core.units import KiB, MiB
from tokvm.images.files import open_file
from tokvm.images.vhd.layer import open_vhd
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import GuestImage
from tokvm.lab.programs import run_program
from tokvm.lab.qemu_process import VmStatus
from tokvm.lab.source_vm import SourceVm, mac_of

VmFactory = Callable[..., SourceVm]
Flatten = Callable[[Sequence[Path], bytes], bytes]


def scribble(vm: SourceVm, disk: int, *commands: str) -> None:
    """What a guest would do to its disk: qemu-io commands on the active layer."""
    top = vm.layers(disk)[-1]
    words = [word for command in commands for word in ("-c", command)]
    run_program(["qemu-io", "-f", top.format, *words, str(top.path)], package="qemu-utils")


def raw(vm: SourceVm, disk: int, frozen: str, folder: Path) -> bytes:
    out = folder / f"raw-{disk}"
    vm.export_raw(disk, frozen, out)
    return out.read_bytes()


def base(vm: SourceVm, disk: int, frozen: str, folder: Path) -> Path:
    out = folder / f"base-{disk}.vhd"
    vm.export_base(disk, frozen, out)
    return out


def delta(vm: SourceVm, disk: int, since: str, frozen: str, folder: Path) -> Path:
    out = folder / f"delta-{disk}-{len(list(folder.iterdir()))}.vhd"
    with out.open("wb") as file:
        vm.export_delta(disk, since, frozen, file)
    return out


@pytest.mark.slow
def test_base_and_deltas_make_the_later_disk(new_vm: VmFactory, flatten: Flatten, tmp_path: Path) -> None:
    vm, noise, size = new_vm(), random.Random(5), 16 * MiB
    vhds = []
    for number in range(4):
        offset = noise.randrange(size // 512 - 4000) * 512
        scribble(vm, 1, f"write -P {number + 1} {offset} {noise.randrange(1, 4000) * 512}", f"write -P {number + 101} 0 512")
        vm.freeze(f"s{number}")
        vhds.append(delta(vm, 1, f"s{number - 1}", f"s{number}", tmp_path) if number else base(vm, 1, "s0", tmp_path))
        assert flatten(vhds, b"") == raw(vm, 1, f"s{number}", tmp_path)
    assert flatten([vhds[0], delta(vm, 1, "s0", "s3", tmp_path)], b"") == raw(vm, 1, "s3", tmp_path)


@pytest.mark.slow
def test_a_delta_over_the_older_disk_is_the_newer_one(new_vm: VmFactory, flatten: Flatten, tmp_path: Path) -> None:
    vm = new_vm()
    scribble(vm, 0, "write -P 7 90M 3M")
    vm.freeze("before")
    older = raw(vm, 0, "before", tmp_path)
    scribble(vm, 0, "write -P 9 91M 1M", "write -z 92M 512k", "discard 90M 64k", "write -P 1 95M 1M")
    vm.freeze("after")
    newer = raw(vm, 0, "after", tmp_path)
    assert newer[92 * MiB : 92 * MiB + 512 * KiB] == bytes(512 * KiB)
    assert older != newer
    assert flatten([delta(vm, 0, "before", "after", tmp_path)], older) == newer


def test_a_delta_holds_no_more_than_what_changed(new_vm: VmFactory, tmp_path: Path) -> None:
    vm = new_vm()
    vm.freeze("a")
    scribble(vm, 1, "write -P 1 4M 64k")
    vm.freeze("b")
    vm.freeze("c")
    assert delta(vm, 1, "a", "b", tmp_path).stat().st_size < 3 * MiB
    assert delta(vm, 1, "b", "c", tmp_path).stat().st_size < MiB
    assert delta(vm, 1, "c", "c", tmp_path).stat().st_size < MiB


def test_exports_of_the_same_snapshot_are_the_same(new_vm: VmFactory, tmp_path: Path) -> None:
    vm = new_vm()
    scribble(vm, 1, "write -P 1 1M 1M")
    vm.freeze("a")
    scribble(vm, 1, "write -P 2 5M 1M")
    vm.freeze("b")
    first = base(vm, 1, "a", tmp_path).read_bytes()
    again = base(vm, 1, "a", tmp_path).read_bytes()
    assert first[512:-512] == again[512:-512]
    assert delta(vm, 1, "a", "b", tmp_path).read_bytes() == delta(vm, 1, "a", "b", tmp_path).read_bytes()
    older = open_vhd(open_file(tmp_path / "base-1.vhd"))
    newer = open_vhd(open_file(delta(vm, 1, "a", "b", tmp_path)))
    assert older.identity == str(vm.export_id(1, "a")) == newer.parent_identity
    older.file.close()
    newer.file.close()


def test_frozen_layers_never_change(new_vm: VmFactory, tmp_path: Path) -> None:
    vm = new_vm()
    vm.freeze("a")
    before = raw(vm, 1, "a", tmp_path)
    scribble(vm, 1, "write -P 3 0 1M")
    assert raw(vm, 1, "a", tmp_path) == before
    assert len(vm.layers(1)) == len(vm.layers(0)) == 2


def test_a_snapshot_is_taken_once_whatever_its_name(new_vm: VmFactory) -> None:
    vm, name = new_vm(), "a'b $(id)\n../../é, \""
    for _ in range(2):
        vm.freeze(name)
    vm.freeze("b")
    assert vm.snapshots() == [name, "b"]
    assert SourceVm(vm.dir).snapshots() == [name, "b"]
    assert [layer.format for layer in vm.layers(0)] == ["raw", "qcow2", "qcow2"]


def test_a_dropped_snapshot_is_forgotten_and_its_data_stay(new_vm: VmFactory, flatten: Flatten, tmp_path: Path) -> None:
    vm = new_vm()
    for number in range(3):
        scribble(vm, 1, f"write -P {number} {number}M 1M")
        vm.freeze(f"s{number}")
    vm.drop("s1")
    vm.drop("s1")
    vm.drop("never was")
    assert vm.snapshots() == ["s0", "s2"]
    with pytest.raises(LabError, match="no snapshot"):
        vm.layers(1, "s1")
    assert flatten([base(vm, 1, "s0", tmp_path), delta(vm, 1, "s0", "s2", tmp_path)], b"") == raw(vm, 1, "s2", tmp_path)


def test_what_is_not_there_is_said(new_vm: VmFactory, tmp_path: Path) -> None:
    vm = new_vm()
    vm.freeze("a")
    vm.freeze("b")
    with pytest.raises(LabError, match="no snapshot"):
        vm.export_base(0, "c", tmp_path / "x")
    with pytest.raises(LabError, match="no disk 2"):
        vm.layers(2)
    with pytest.raises(LabError, match="newer than"):
        delta(vm, 0, "b", "a", tmp_path)
    with pytest.raises(LabError, match="no lab VM"):
        SourceVm(tmp_path / "nothing")


def test_a_snapshot_whose_maker_died_first_is_not_there(new_vm: VmFactory) -> None:
    vm = new_vm()
    kept = json.loads((vm.dir / "layers.json").read_text())
    (vm.dir / "layers.json").write_text(json.dumps(kept | {"pending": "half"}))
    assert vm.snapshots() == []
    vm.freeze("half")
    assert vm.snapshots() == ["half"]


def test_a_snapshot_whose_maker_died_last_is_there(new_vm: VmFactory) -> None:
    vm = new_vm()
    vm.freeze("whole")
    kept = json.loads((vm.dir / "layers.json").read_text())
    (vm.dir / "layers.json").write_text(json.dumps(kept | {"frozen": [], "pending": "whole"}))
    assert vm.snapshots() == ["whole"]
    assert len(vm.layers(0)) == 2


def test_more_disks_than_ide_has_are_refused(guest: GuestImage, data_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="5 disks"):
        SourceVm.create(tmp_path / "vm", name="x", guest=guest, data_disks=[data_disk] * 4)
    assert not (tmp_path / "vm").exists()


def test_vms_have_uuids_and_macs_of_their_own(new_vm: VmFactory) -> None:
    one, two = new_vm("one"), new_vm("two")
    assert one.config.uuid != two.config.uuid
    assert one.config.macs != two.config.macs
    assert one.config.macs == (mac_of(one.config.uuid),)
    assert one.config.sizes == (96 * MiB, 16 * MiB)


def test_a_vm_that_never_ran_is_off(new_vm: VmFactory) -> None:
    vm = new_vm()
    assert vm.status() is VmStatus.OFF
    assert vm.shutdown(deadline_s=0)
    vm.power_off()
    assert not vm.is_running()


def test_a_stale_pid_file_names_no_vm(new_vm: VmFactory) -> None:
    vm = new_vm()
    (vm.dir / "qemu.pid").write_text(f"{os.getpid()}\n")
    assert vm.status() is VmStatus.OFF
    vm.destroy()
    assert not vm.dir.exists()
