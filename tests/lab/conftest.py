"""Real guests for the lab's tests: one image for the whole run, a clock and VMs for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.layer import open_vhd
from tokvm.lab.clock import OutsideClock
from tokvm.lab.guest_image import GuestImage, GuestSettings, build_data_disk, build_guest
from tokvm.lab.kernel import GuestKernel, find_kernel
from tokvm.lab.source_vm import SourceVm

VmFactory = Callable[..., SourceVm]


@pytest.fixture(scope="session")
def kernel() -> GuestKernel:
    return find_kernel()


@pytest.fixture(scope="session")
def guest(kernel: GuestKernel, tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    """A guest with one data disk; its other settings come by the kernel's command line."""
    out = tmp_path_factory.mktemp("guest") / "guest.raw"
    return build_guest(out, size=96 * MiB, settings=GuestSettings(data_disks=1), kernel=kernel)


@pytest.fixture(scope="session")
def data_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data_disk(tmp_path_factory.mktemp("data") / "data.raw", index=1, size=16 * MiB)


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[OutsideClock]:
    with OutsideClock(tmp_path / "clock.jsonl") as running:
        yield running


@pytest.fixture
def new_vm(tmp_path: Path, guest: GuestImage, data_disk: Path) -> Iterator[VmFactory]:
    """Makes VMs over copies of the guest; whatever still runs at the end is killed."""
    made: list[SourceVm] = []

    def create(name: str = "guest", *, clock_port: int = 0, write_rate: int = 0) -> SourceVm:
        settings = GuestSettings(name=name, clock_port=clock_port, write_rate=write_rate, ledger_s=0.1, data_disks=1)
        vm = SourceVm.create(
            tmp_path / f"vm-{name}", name=name, guest=guest, data_disks=[data_disk], extra_words=settings.kernel_words()
        )
        made.append(vm)
        return vm

    yield create
    for vm in made:
        vm.destroy()


@pytest.fixture
def flatten() -> Callable[[Sequence[Path], bytes], bytes]:
    """The disk that a chain of VHDs, base first, says: read by tokvm itself, over the bytes of an older disk."""

    def apply(vhds: Sequence[Path], older: bytes) -> bytes:
        reader = ChainReader(Chain.open([open_vhd(open_file(vhd)) for vhd in vhds]))
        disk = bytearray(older.ljust(reader.size, b"\0"))
        for chunk in reader.chunks(0):
            disk[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
        reader.close()
        return bytes(disk)

    return apply
