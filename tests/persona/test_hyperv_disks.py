"""The VHDX files of the played Hyper-V host hold what its guests wrote: as four readers see them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from tests.images.vhdx_witnesses import by_dissect, by_libvhdi, by_qemu
from tests.persona.conftest import BuildHyperV, MiB

from tokvm.core.errors import ImageError
from tokvm.images.chain import Chain
from tokvm.images.listed import open_layers
from tokvm.images.reader import ChainReader
from tokvm.images.vhdx.layer import VhdxLayer
from tokvm.testing.hyperv.backend import UNMAPPED, ZERO
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec
from tokvm.testing.vhdx_structs import BlockState

SIZE = 9 * MiB + 512


def by_tokvm(files: list[Path], kind: str = "vhdx") -> bytes:
    """files: base first."""
    layers = open_layers([str(file) for file in files], lambda _: kind)
    reader = ChainReader(Chain.open(layers))
    raw = bytearray(reader.size)
    try:
        for chunk in reader.chunks():
            raw[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
    finally:
        reader.close()
    return bytes(raw)


def frozen(host: HyperVHost, id_: str, disk: int = 0) -> list[Path]:
    """The files below a checkpoint, base first."""
    state = host.state()
    at = next(one["paths"][disk] for one in state["checkpoints"] if one["id"] == id_)
    found: list[Path] = []
    while at:
        found.insert(0, host.local(at))
        at = state["vhds"][at]["parent"]
    return found


def live(host: HyperVHost, disk: int = 0) -> list[Path]:
    return [host.local(path) for path in reversed(host.chain("web", disk))]


def scribble(host: HyperVHost, rng: random.Random, disk: int = 0, *, times: int = 12) -> None:
    """Writes and trims anywhere, of any size; the file of a VM that is off is written once, at the end."""
    guests, vm = host.guests, host.id("web")
    for _ in range(times):
        first = rng.randrange(SIZE // 512)
        sectors = min(rng.choice([1, 3, 128, 5000]), SIZE // 512 - first)
        if rng.random() < 0.3:
            guests.trim(vm, disk, first * 512, sectors * 512, rng.choice([ZERO, UNMAPPED]))
        else:
            guests.write(vm, disk, first * 512, rng.randbytes(512) * sectors)
    host.write_disk("web", disk, offset=0, data=rng.randbytes(512))


def one_machine(build: BuildHyperV, *disks: DiskSpec, running: bool = True, **options: object) -> HyperVHost:
    return build(MachineSpec("web", disks=disks or [DiskSpec(SIZE)], running=running), **options)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("dynamic", 0),
        *(pytest.param(kind, seed, marks=pytest.mark.slow) for kind in ("dynamic", "fixed") for seed in (1, 2, 3)),
    ],
)
def test_every_checkpoint_holds_what_the_guest_had_written_then(build_hyperv: BuildHyperV, kind: str, seed: int) -> None:
    host = one_machine(build_hyperv, DiskSpec(SIZE, kind=kind))
    rng = random.Random(seed)
    made = []
    for number in range(3):
        scribble(host, rng)
        made.append(host.foreign_checkpoint("web", f"c{number}")["id"])
    scribble(host, rng)
    for id_ in made:
        wanted, files = host.read_disk("web", checkpoint=id_), frozen(host, id_)
        assert by_tokvm(files) == wanted
        if len(files) < 3:  # of bitmaps above bitmaps dissect loses the last byte
            assert by_dissect(files[-1]) == wanted
    base = frozen(host, made[0])
    assert by_qemu(base[0]) == by_libvhdi(base[0]) == host.read_disk("web", checkpoint=made[0])
    assert len({host.read_disk("web", checkpoint=id_) for id_ in made}) == 3


def test_a_child_of_partial_blocks_alone(build_hyperv: BuildHyperV) -> None:
    """The only kind that libvhdi reads right: it consults the bitmap whatever the block's state."""
    host = one_machine(build_hyperv)
    host.write_disk("web", offset=0, data=b"base" * 256 * 1024)
    host.foreign_checkpoint("web")
    host.write_disk("web", offset=512, data=b"part" * 128)
    host.write_disk("web", offset=4 * MiB, data=b"more" * 1024)
    id_ = host.foreign_checkpoint("web")["id"]
    base, child = frozen(host, id_)
    assert by_libvhdi(child, base) == by_dissect(child) == host.read_disk("web", checkpoint=id_)


@pytest.mark.slow
def test_a_checkpoint_freezes_the_file_and_the_vm_writes_another(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv, DiskSpec(SIZE, path="C:\\a b\\ü [x].vhdx"))
    host.foreign_checkpoint("web")
    top, base = host.chain("web")
    assert base == "C:\\a b\\ü [x].vhdx"
    assert top.startswith("C:\\a b\\ü [x]_")
    assert top.endswith(".avhdx")
    host.foreign_checkpoint("web")
    assert host.chain("web")[1:] == [top, base]
    assert host.chain("web")[0].startswith("C:\\a b\\ü [x]_")
    assert host.chain("web")[0].count("_") == 1


def test_partial_zero_and_unmapped_blocks_are_in_the_file(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv, DiskSpec(16 * MiB))
    host.write_disk("web", offset=0, data=b"under" * 512 * 1024)
    host.foreign_checkpoint("web")
    host.write_disk("web", offset=512, data=b"part" * 128)
    host.trim_disk("web", offset=2 * MiB, length=2 * MiB, kind="zero")
    host.trim_disk("web", offset=4 * MiB + 512, length=5 * MiB, kind="unmapped")
    second = host.foreign_checkpoint("web")
    (layer,) = open_layers([str(frozen(host, second["id"])[-1])], lambda _: "vhdx")
    assert isinstance(layer, VhdxLayer)
    try:
        states = Counter(_states(frozen(host, second["id"])[-1]))
    finally:
        layer.file.close()
    assert states == {BlockState.PARTIALLY_PRESENT: 3, BlockState.ZERO: 1, BlockState.UNMAPPED: 1, BlockState.NOT_PRESENT: 3}
    assert by_tokvm(frozen(host, second["id"])) == host.read_disk("web", checkpoint=second["id"])


def _states(path: Path) -> list[int]:
    """Of the eight blocks of a 16 MiB disk; the BAT lies behind log and metadata."""
    raw = path.read_bytes()[3 * MiB : 3 * MiB + 64]
    return [raw[at] & 7 for at in range(0, 64, 8)]


def test_the_file_of_a_running_vm_is_no_image(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv)
    host.write_disk("web", offset=0, data=b"x" * 512)
    for _ in range(2):
        with pytest.raises(ImageError, match="log"):
            by_tokvm(live(host)[-1:])
        host.foreign_checkpoint("web")


@pytest.mark.slow
def test_the_file_of_a_vm_that_went_off_is_whole(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv)
    host.foreign_checkpoint("web")
    host.write_disk("web", offset=SIZE - 512, data=b"last" * 128)
    host.guest_stops("web")
    assert by_tokvm(live(host)) == host.read_disk("web")
    host.write_disk("web", offset=0, data=b"by hand " * 64)
    assert by_tokvm(live(host)) == host.read_disk("web")
    host.start("web")
    with pytest.raises(ImageError):
        by_tokvm(live(host))


def test_a_host_that_crashed_leaves_a_log_to_replay(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv, running=False)
    host.write_disk("web", offset=MiB, data=b"in the log?" * 512)
    clean = live(host)[-1].read_bytes()
    host.leave_dirty("web")
    assert live(host)[-1].read_bytes() != clean
    assert by_tokvm(live(host)) == host.read_disk("web")


@pytest.mark.parametrize(
    ("which", "running"),
    [
        (1, True),
        *(pytest.param(which, on, marks=pytest.mark.slow) for which, on in ((0, True), (2, True), (0, False), (2, False))),
    ],
)
@pytest.mark.slow
def test_a_deleted_checkpoint_is_merged_into_its_parent(build_hyperv: BuildHyperV, which: int, running: bool) -> None:
    host = one_machine(build_hyperv, running=running, merge_s=30)
    rng = random.Random(which)
    made = []
    for number in range(3):
        scribble(host, rng)
        made.append(host.foreign_checkpoint("web", f"c{number}")["id"])
    scribble(host, rng)
    chain, files = host.chain("web"), live(host)
    keep = {id_: host.read_disk("web", checkpoint=id_) for number, id_ in enumerate(made) if number != which}
    host.delete_checkpoint("web", made[which])
    assert host.chain("web") == chain
    assert host.ask("power", {"vm": host.id("web")}).value["operational"] == [11, 32772]
    host.finish_merges()
    assert host.ask("power", {"vm": host.id("web")}).value["operational"] == [2]
    gone = list(reversed(chain))[which + 1]
    assert host.chain("web") == [path for path in chain if path != gone]
    assert not host.local(gone).exists()
    assert [file.exists() for file in files].count(False) == 1
    for id_, wanted in keep.items():
        assert by_tokvm(frozen(host, id_)) == wanted
    if running:
        host.guest_stops("web")
    assert by_tokvm(live(host)) == host.read_disk("web")


@pytest.mark.slow
def test_all_checkpoints_deleted_leave_the_first_file_alone(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv, DiskSpec(SIZE), DiskSpec(MiB, kind="fixed"), running=False)
    first = [host.chain("web", disk) for disk in (0, 1)]
    for number in range(4):
        scribble(host, random.Random(number))
        host.foreign_checkpoint("web")
    for one in reversed(host.checkpoints("web")):
        host.delete_checkpoint("web", one["id"])
    assert [host.chain("web", disk) for disk in (0, 1)] == first
    assert by_tokvm(live(host)) == by_qemu(live(host)[0]) == host.read_disk("web")
    assert sorted(path.name for path in host.folder.rglob("*.avhdx")) == []


@pytest.mark.slow
def test_linkage_holds_after_every_change(build_hyperv: BuildHyperV) -> None:
    """No two files share a DataWriteGuid, every child names its parent's, and all have the disk's one id."""
    host = one_machine(build_hyperv, running=False)
    for number in range(4):
        scribble(host, random.Random(number), times=3)
        host.foreign_checkpoint("web")
    host.delete_checkpoint("web", host.checkpoints("web")[1]["id"])
    layers = open_layers([str(file) for file in live(host)], lambda _: "vhdx")
    try:
        ids = [layer.identity for layer in layers]
        assert len(set(ids)) == 4
        assert [layer.parent_identity for layer in layers] == [None, *ids[:-1]]
        assert {str(layer.describe()["virtual_disk_id"]) for layer in layers} == {host.disk_id("web")}
    finally:
        for layer in layers:
            layer.file.close()


@pytest.mark.slow
def test_4k_sectors_are_kept_down_the_chain(build_hyperv: BuildHyperV) -> None:
    host = one_machine(build_hyperv, DiskSpec(8 * MiB, logical=4096))
    host.write_disk("web", offset=4096, data=b"4k" * 2048)
    one = host.foreign_checkpoint("web")
    host.write_disk("web", offset=8192, data=b"4K" * 2048)
    two = host.foreign_checkpoint("web")
    for id_ in (one["id"], two["id"]):
        assert by_tokvm(frozen(host, id_)) == host.read_disk("web", checkpoint=id_)
