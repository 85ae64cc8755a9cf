"""What a guest wrote between two freezes, as the played Hyper-V and ESXi are told it. qemu-io writes, qemu-img is the judge."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.reader import ChainReader
from tokvm.images.vhdx.layer import open_vhdx
from tokvm.lab.layer_backend import QEMU_BACKEND, QemuBackend
from tokvm.lab.programs import run_program
from tokvm.lab.source_vm import SourceVm
from tokvm.testing.esxi import host as esxi
from tokvm.testing.hyperv.backend import DATA
from tokvm.testing.hyperv.host import DiskSpec, HostOptions, MachineSpec, build_host

VmFactory = Callable[..., SourceVm]
SIZE = 16 * MiB
DISK = 1


def scribble(vm: SourceVm, noise: random.Random) -> None:
    """Patterns, zeros and discards over each other, at odd sectors, and the disk's last sector."""
    commands = [f"write -P {noise.randrange(1, 256)} {SIZE - 512} 512"]
    for _ in range(12):
        length = 512 * noise.choice((1, 7, 128, 3000))
        place = f"{512 * noise.randrange((SIZE - length) // 512)} {length}"
        commands.append(noise.choice((f"write -P {noise.randrange(1, 256)} {place}", f"write -z {place}", f"discard {place}")))
    top = vm.layers(DISK)[-1]
    words = [word for command in commands for word in ("-c", command)]
    run_program(["qemu-io", "-f", top.format, *words, str(top.path)], package="qemu-utils")


def disk_now(vm: SourceVm, frozen: str, folder: Path) -> bytes:
    out = folder / "raw"
    vm.export_raw(DISK, frozen, out)
    return out.read_bytes()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_changes_laid_over_the_older_disk_make_the_newer_one(new_vm: VmFactory, tmp_path: Path, seed: int) -> None:
    vm, noise = new_vm(), random.Random(seed)
    name, backend = vm.dir.name, QemuBackend(vm.dir.parent)
    disk = bytearray(SIZE)
    since = ""
    for number in range(4):
        scribble(vm, noise)
        frozen = f"S{number}"
        backend.freeze(name, frozen)
        found = backend.changes(name, DISK, since, frozen)
        ends = [0, *(one.offset + one.length for one in found)]
        assert all(one.offset >= end for one, end in zip(found, ends, strict=False)), "ascending and disjoint"
        for one in found:
            disk[one.offset : one.offset + one.length] = bytes(one.length)
        for offset, data in backend.data(name, DISK, frozen, [one for one in found if one.kind == DATA]):
            disk[offset : offset + len(data)] = data
        assert disk == disk_now(vm, frozen, tmp_path)
        since = frozen
    # Over several checkpoints at once, as after a merge; and piece by piece, as a VHDX writer asks.
    older = bytearray(disk_now(vm, "S0", tmp_path))
    for one in QemuBackend(vm.dir.parent).changes(name, DISK, "S0", "S3"):
        older[one.offset : one.offset + one.length] = bytes(one.length)
        if one.kind == DATA:
            for offset, data in backend.data(name, DISK, "S3", [one]):
                older[offset : offset + len(data)] = data
    assert older == disk


@pytest.mark.slow
def test_the_files_of_a_played_host_hold_the_guests_disk(new_vm: VmFactory, tmp_path: Path) -> None:
    """Checkpoints of the host over a VM that is off; its VHDX chain is read back by tokvm."""
    vm, noise = new_vm(), random.Random(7)
    folder = tmp_path / "host"
    spec = MachineSpec("web", disks=[DiskSpec(96 * MiB), DiskSpec(SIZE)], generation=1, running=False)
    options = HostOptions(backend=QEMU_BACKEND)
    with build_host(folder, machines=[spec], options=options) as host:
        vm.dir.rename(folder / "backend" / host.id("web"))
        vm = SourceVm(folder / "backend" / host.id("web"))
        host.write_files()
        for _ in range(3):
            scribble(vm, noise)
            made = host.foreign_checkpoint("web")
            paths = [host.local(path) for path in reversed(host.chain("web", DISK))]
            frozen = Chain.open([open_vhdx(open_file(path)) for path in paths[:-1]])
            disk = bytearray(SIZE)
            reader = ChainReader(frozen)
            for chunk in reader.chunks(0):
                if chunk.data is not None:
                    disk[chunk.offset : chunk.offset + chunk.length] = chunk.data
                chunk.release()
            reader.close()
            assert disk == disk_now(vm, made["freeze"], tmp_path)


@pytest.mark.parametrize("type_", ["VMFS-6", "VMFS-5"])
@pytest.mark.slow
def test_the_files_of_a_played_esxi_hold_the_guests_disk(new_vm: VmFactory, tmp_path: Path, type_: str) -> None:
    """Snapshots of the host over a VM that is off; qemu-img reads each frozen chain of its VMDK files."""
    vm, noise = new_vm(), random.Random(8)
    folder = tmp_path / "host"
    spec = esxi.MachineSpec("web", disks=[esxi.DiskSpec(96 * MiB), esxi.DiskSpec(SIZE)], running=False)
    options = esxi.HostOptions(backend=QEMU_BACKEND, datastores=[esxi.DatastoreSpec(type=type_)])
    with esxi.build_host(folder, machines=[spec], options=options) as host:
        guest = host.store.read()["vms"][0]["guest"]
        vm.dir.rename(folder / "backend" / guest)
        vm = SourceVm(folder / "backend" / guest)
        host.write_files()
        for number in range(1, 4):
            scribble(vm, noise)
            made = host.foreign_snapshot("web")
            image, out = host.local(host.frozen("web", number, DISK)[0]), tmp_path / "out"
            run_program(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(image), str(out)], package="qemu-utils")
            assert out.read_bytes() == disk_now(vm, made["freeze"], tmp_path)
        host.delete_snapshot("web", 2)
        image = host.local(host.frozen("web", 3, DISK)[0])
        run_program(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(image), str(out)], package="qemu-utils")
        assert out.read_bytes() == disk_now(vm, host.snapshots("web")[-1]["freeze"], tmp_path)
