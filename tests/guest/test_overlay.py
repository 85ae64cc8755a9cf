"""Overlays: what is in them is what QEMU would say, and nothing of it gets into the disk below."""

from __future__ import annotations

import hashlib
import json
import os
import random
from contextlib import closing
from pathlib import Path

import pytest
from tests.guest.disks import change
from tests.targets.conftest import loop  # noqa: F401 - a fixture

from tokvm.core.units import KiB, MiB
from tokvm.guest import overlay
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.overlay import Overlay, pieces_in
from tokvm.remote import process
from tokvm.remote.qemu_nbd import Cache, QemuNbd

SIZE = 4 * MiB + 1536  # neither whole clusters nor whole pages


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def whole(disk: GuestDisk, to: Path) -> bytes:
    """The disk's content as QEMU reads it, base and all."""
    argv = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.path, str(to)]
    assert process.run(argv, timeout_s=30, where=disk.path).code == 0
    return to.read_bytes()


def laid_over(base: Path, disk: GuestDisk) -> bytes:
    """The same by our own reader."""
    content = bytearray(base.read_bytes())
    with closing(Overlay.open(Path(disk.path), size=len(content))) as layer:
        for offset, length in layer.ranges():
            content[offset : offset + length] = layer.read(offset, length)
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_its_bytes_are_those_that_qemu_reads(seed: int, base: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=SIZE)
    commands = []
    for number in range(12):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(SIZE - offset, rng.choice([512, 4 * KiB, 64 * KiB, 300 * KiB]))
        kind = rng.choice([f"write -P {number + 1}", "write -z", "write -z -u", "discard"])
        commands.append(f"{kind} {offset} {length}")
    before = hashlib.sha256(base.read_bytes()).digest()
    change(disk, *commands)
    assert laid_over(base, disk) == whole(disk, tmp_path / "whole.raw")
    assert hashlib.sha256(base.read_bytes()).digest() == before


def test_an_empty_one_holds_nothing(base: Path, tmp_path: Path) -> None:
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=SIZE)
    with closing(Overlay.open(Path(disk.path), size=SIZE)) as layer:
        assert list(layer.ranges()) == []
        with pytest.raises(GuestError, match="does not hold"):
            layer.read(0, 512)


def test_a_trim_of_the_whole_disk_changes_nothing(base: Path, tmp_path: Path) -> None:
    """A conversion ends with fstrim: it must not make the free space of a big disk into changes that have to be undone."""
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=SIZE)
    change(disk, "write -P 1 0 512", f"discard 0 {4 * MiB}")
    with closing(Overlay.open(Path(disk.path), size=SIZE)) as layer:
        assert list(layer.ranges()) == [(0, 64 * KiB)]
        assert layer.read(0, 512) == b"\x01" * 512
    assert laid_over(base, disk)[512:] == base.read_bytes()[512:]


@pytest.mark.parametrize("name", ["nbd:h:1", 'json:{"a"}', "a,b=c", "new\nline", "'\" $(x)", "-o", "ünïcode", "fd:0"])
@pytest.mark.slow
def test_names_are_names(name: str, tmp_path: Path) -> None:
    base = tmp_path / name
    base.write_bytes(b"\x07" * MiB)
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=MiB)
    change(disk, "write -P 1 0 512")
    assert laid_over(base, disk) == whole(disk, tmp_path / "whole.raw") == b"\x01" * 512 + b"\x07" * (MiB - 512)


def test_a_guest_that_wrote_a_qcow2_header_gains_nothing(tmp_path: Path) -> None:
    """The base is taken for raw, whatever its first bytes say: probing would open the file they name."""
    secret, base = tmp_path / "secret", tmp_path / "base.raw"
    secret.write_bytes(b"secret" * 1000)
    assert process.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(base)], timeout_s=30, where="test"
    ).code == 0  # fmt: skip
    os.truncate(base, MiB)
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=MiB)
    assert whole(disk, tmp_path / "whole.raw") == base.read_bytes()


def test_a_trial_boot_leaves_the_morph_as_it_is(base: Path, tmp_path: Path) -> None:
    morph = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=SIZE)
    change(morph, "write -P 1 0 64k")
    before = Path(morph.path).read_bytes()
    trial = overlay.create(tmp_path / "trial.qcow2", morph, size=SIZE)
    change(trial, "write -P 2 32k 64k")
    assert whole(trial, tmp_path / "t.raw") == b"\x01" * (32 * KiB) + b"\x02" * (64 * KiB) + base.read_bytes()[96 * KiB :]
    assert Path(morph.path).read_bytes() == before


@pytest.mark.root
def test_over_a_block_device(loop: object, tmp_path: Path) -> None:  # noqa: F811
    assert callable(loop)
    device = Path(loop(size=MiB))
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(device)), size=MiB)
    change(disk, "write -P 1 4k 4k")
    assert laid_over(device, disk) == b"\x53" * 4096 + b"\x01" * 4096 + b"\x53" * (MiB - 8192)


def test_one_that_is_still_written_to_is_refused(base: Path, tmp_path: Path) -> None:
    disk = overlay.create(tmp_path / "over.qcow2", GuestDisk(str(base)), size=SIZE)
    fd = os.open(disk.path, os.O_RDWR)
    server = QemuNbd.serve(fd, image_format="qcow2", where="test", cache=Cache.WRITEBACK)
    try:
        with pytest.raises(GuestError, match="lock"):
            Overlay.open(Path(disk.path), size=SIZE)
    finally:
        server.stop()
        os.close(fd)
    Overlay.open(Path(disk.path), size=SIZE).close()


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="No such file"):
        overlay.create(tmp_path / "over.qcow2", GuestDisk(str(tmp_path / "nowhere.raw")), size=MiB)
    with pytest.raises(GuestError, match="sectors"):
        overlay.create(tmp_path / "over.qcow2", GuestDisk(str(tmp_path / "nowhere.raw")), size=MiB + 1)
    assert list(tmp_path.iterdir()) == []


GOOD: dict[str, object] = {"start": 0, "length": 65536, "present": True, "zero": False, "data": True, "offset": 65536}
REST: dict[str, object] = {"start": 65536, "length": SIZE - 65536, "present": False, "zero": True, "data": False}


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    "rows",
    [
        *(without(name) for name in ("start", "length", "present", "offset")),
        *(GOOD | {"start": start} for start in (-512, 512, "0", None)),
        *(GOOD | {"length": length} for length in (0, -1, 65535, 1 << 60)),
        *(GOOD | {"offset": offset} for offset in (-1, 1 << 40)),
        GOOD | {"compressed": True},
    ],
)
def test_a_row_that_makes_no_sense_is_refused(rows: dict[str, object]) -> None:
    assert len(pieces_in(json.dumps([GOOD, REST]), SIZE, MiB, "test")) == 1
    with pytest.raises(GuestError, match="map makes no sense"):
        pieces_in(json.dumps([rows, REST]), SIZE, MiB, "test")


@pytest.mark.parametrize(
    "text", ["", "[", "{}", "[1]", "[" * 100_000, *(json.dumps(rows) for rows in ([GOOD], [REST], [GOOD, GOOD, REST]))]
)
def test_a_map_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GuestError, match="map makes no sense"):
        pieces_in(text, SIZE, MiB, "test")
