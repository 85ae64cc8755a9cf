"""Random disks with snapshots, in every format: written layer by layer, read as a chain, compared with a plain model.

Each chain follows from its format's name and its seed, which every failure shows; `TOKVM_CHAIN="vhdx 17"` runs that one alone.
Checked: every prefix of the chain reads as the disk did when that layer was frozen; the layers from n on, laid over the disk
as it was before, make the disk of the top; and each layer's map names what its file says, no more and no less.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.images.chain_formats import FORMATS, ChainFormat, Vhd, Vhdx
from tests.images.disk_model import Action, Claim, Content, History, Layer, Op, play, random_history
from tests.images.layer_records import BitmapRecord, GrainRecord, State, StateRecord, WholeRecord, merged, merged_claims

from tokvm.core.disk import BufferPool
from tokvm.core.extents import ExtentKind
from tokvm.images.base import Layer as ImageLayer
from tokvm.images.chain import Chain
from tokvm.images.listed import open_layers
from tokvm.images.reader import ChainReader

FAST = {"vhd": 80, "vhdx": 60, "vhdx of chunks": 15, "vmdk sparse": 50, "vmdk cowd": 40, "vmdk sesparse": 40, "vmdk stream": 15}
NIGHTLY = {
    "vhd": 1500, "vhdx": 1500, "vhdx of chunks": 400, "vmdk sparse": 800, "vmdk cowd": 500, "vmdk sesparse": 500,
    "vmdk stream": 200,
}  # fmt: skip
_POOL = BufferPool(4)


def played(name: str, seed: int, depth: int | None = None) -> tuple[list[Layer], ChainFormat]:
    rng = random.Random(f"{name} {seed}")
    chosen = FORMATS[name](rng)
    return play(random_history(rng, chosen.shape, depth=depth or rng.randrange(1, 5)), chosen.record), chosen


def made(name: str, seed: int, directory: Path, *, depth: int | None = None) -> tuple[list[Layer], list[Path], ChainFormat]:
    """The chain with this seed: played, and written to files, base first."""
    layers, chosen = played(name, seed, depth)
    paths = [directory / f"layer{number}{chosen.suffix}" for number in range(len(layers))]
    for number, path in enumerate(paths):
        chosen.write(layers, number, path)
    return layers, paths, chosen


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[ImageLayer]]:
    found = open_layers(paths)
    try:
        yield found
    finally:
        for layer in found:
            layer.file.close()


def applied(layers: Sequence[ImageLayer], under: Content) -> Content:
    """What a target that held `under` holds after the chunks of these layers."""
    reader = ChainReader(Chain.open(layers), pool=_POOL)
    target = under.copy()
    target.size = max(target.size, reader.size)  # a target grows with zeros before a layer is laid over it
    for chunk in reader.chunks():
        if chunk.kind is ExtentKind.DATA:
            assert chunk.data is not None
            target.write(chunk.offset, chunk.data)
        else:
            assert chunk.kind is ExtentKind.ZERO
            target.zero(chunk.offset, chunk.length)
        chunk.release()
    return target


def claims_of(layer: ImageLayer) -> list[Claim]:
    return merged_claims([(row.offset, row.length, row.kind) for window in layer.windows() for row in window])


def check_claims(layer: ImageLayer, model: Layer) -> None:
    found, expected = claims_of(layer), merged_claims(model.record.claims())
    if isinstance(model.record, WholeRecord):  # the file's own holes are zeros, and it is right to say so
        found, expected = (
            merged_claims([(at, length, ExtentKind.DATA) for at, length, _ in part]) for part in (found, expected)
        )
    assert found == expected, f"{layer.name} says something else"


def check_chain(name: str, seed: int, directory: Path) -> None:
    directory.mkdir()
    try:
        layers, paths, _ = made(name, seed, directory)
        with opened(paths) as images:
            assert len(images) == len(layers)
            for number, (image, model) in enumerate(zip(images, layers, strict=True)):
                assert image.size == model.size
                check_claims(image, model)
                difference = applied(images[: number + 1], Content(0)).difference(model.content)
                assert not difference, f"the disk of layer {number}: {difference}"
                if number:
                    difference = applied(images[number:], layers[number - 1].content).difference(layers[-1].content)
                    assert not difference, f"layers {number} to the top over the disk below them: {difference}"
    except Exception as exc:
        exc.add_note(f'TOKVM_CHAIN="{name} {seed}"')
        raise
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_random_chains_read_as_the_model(name: str, tmp_path: Path) -> None:
    for seed in range(FAST[name]):
        check_chain(name, seed, tmp_path / "chain")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NIGHTLY)
def test_many_random_chains_read_as_the_model(name: str, tmp_path: Path) -> None:
    for seed in range(1000, 1000 + NIGHTLY[name]):
        check_chain(name, seed, tmp_path / "chain")


@pytest.mark.slow
def test_the_fast_chains_have_what_they_are_for() -> None:
    """So that a change to the histories does not quietly make the search easy."""
    for name, count in FAST.items():
        chains = [played(name, seed)[0] for seed in range(count)]
        records = [layer.record for layers in chains for layer in layers[1:]]
        assert {1, 4} <= {len(layers) for layers in chains}
        assert any(record.size % 4096 for record in records)
        assert any({ExtentKind.DATA} == {kind for _, _, kind in record.claims()} for record in records)
        if name.startswith("vhd"):
            assert any(layers[0].size < layers[-1].size for layers in chains)
        if name in ("vhdx", "vhdx of chunks", "vmdk sparse", "vmdk sesparse"):
            assert any({ExtentKind.ZERO} < {kind for _, _, kind in record.claims()} for record in records)
        if name.startswith("vhdx"):
            states = {state for record in records if isinstance(record, StateRecord) for state in record.states.values()}
            assert states == set(State) - {State.NOT_PRESENT}


@pytest.mark.skipif("TOKVM_CHAIN" not in os.environ, reason="no chain is asked for (TOKVM_CHAIN)")
def test_one_chain(tmp_path: Path) -> None:
    name, _, seed = os.environ["TOKVM_CHAIN"].rpartition(" ")
    check_chain(name, int(seed), tmp_path / "chain")


# The same chains, as others read them


def whole(content: Content) -> bytes:
    return content.read(0, content.size)


@pytest.mark.slow
def test_qemu_reads_the_same_bases(tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img (qemu-utils)")
    drivers = {"vhdx": "vhdx", "vhd": "vpc", "vmdk sparse": "vmdk", "vmdk stream": "vmdk"}
    checked = dict.fromkeys(drivers, 0)
    for name, driver in drivers.items():
        for seed in range(12):
            (directory := tmp_path / f"{name}{seed}").mkdir()
            layers, paths, chosen = made(name, seed, directory, depth=1)
            if isinstance(chosen, Vhdx) and (chosen.sector != 512 or chosen.dirty):  # 4096: refused; dirty: written to
                continue
            if isinstance(chosen, Vhd) and chosen.block < 4096:  # taken for blocks without a bitmap
                continue
            out = directory / "raw"
            command = ["qemu-img", "convert", "-f", driver, "-O", "raw", str(paths[0]), str(out)]
            subprocess.run(command, check=True, capture_output=True)
            assert out.read_bytes() == whole(layers[0].content), f"{name} {seed}"
            checked[name] += 1
    assert min(checked.values()) >= 3


@pytest.mark.slow
def test_dissect_reads_the_same_children(tmp_path: Path) -> None:
    """Two layers of VHDX, of one block size and one size, without a log: what dissect is right about."""
    vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    checked = set()
    for seed in range(90):
        (directory := tmp_path / str(seed)).mkdir()
        layers, paths, chosen = made("vhdx", seed, directory, depth=2)
        assert isinstance(chosen, Vhdx)
        if chosen.dirty or chosen.blocks[0] != chosen.blocks[1] or layers[0].size != layers[1].size:
            continue
        disk = vhdx.VHDX(paths[1])
        step, total = disk.block_size // disk.sector_size, disk.size // disk.sector_size
        raw = b"".join(disk.read_sectors(at, min(step, total - at)) for at in range(0, total, step))
        disk.fh.close()
        disk.parent.fh.close()
        assert raw == whole(layers[1].content), f"vhdx {seed}"
        record = layers[1].record
        assert isinstance(record, StateRecord)
        checked |= set(record.states.values())
    assert checked == set(State) - {State.NOT_PRESENT}


# The model itself


def test_sparse_content_is_an_array_of_bytes() -> None:
    rng = random.Random(1)
    size = 3 * Content.PAGE + 512
    content, plain = Content(size), bytearray(size)
    for _ in range(300):
        offset = rng.choice((rng.randrange(size), Content.PAGE - 1, Content.PAGE, 0))
        length = rng.randrange(min(size - offset, 2 * Content.PAGE) + 1)
        if rng.random() < 0.6:
            data = rng.randbytes(length)
            content.write(offset, data)
            plain[offset : offset + length] = data
        else:
            content.zero(offset, length)
            plain[offset : offset + length] = bytes(length)
        assert content.read(offset, length) == plain[offset : offset + length]
    assert whole(content) == plain
    other = content.copy()
    assert not other.difference(content)
    other.write(Content.PAGE + 7, bytes([plain[Content.PAGE + 7] ^ 1]))
    assert other.difference(content).startswith(f"byte {Content.PAGE + 7:#x}")
    assert whole(content) == plain
    assert Content(1).difference(Content(2)) == "sizes 1 and 2"
    for call in (lambda: content.read(size, 1), lambda: content.write(size - 1, b"ab"), lambda: content.zero(-1, 1)):
        with pytest.raises(ValueError, match="not inside"):
            call()


def do(record: StateRecord | BitmapRecord | GrainRecord, *ops: tuple[str, int, int]) -> list[Claim]:
    for action, offset, length in ops:
        getattr(record, action)(offset, length)
    return merged_claims(record.claims())


DATA, ZERO = ExtentKind.DATA, ExtentKind.ZERO


def test_a_bitmap_record_says_what_a_vhd_says() -> None:
    ops = ("write", 512, 512), ("zero", 4096, 1024), ("trim", 0, 8192)
    child = BitmapRecord(8192, base=False, unit=4096, sector=512)
    assert do(child, *ops) == [(512, 512, DATA), (4096, 1024, DATA)]
    base = BitmapRecord(8192 - 512, base=True, unit=4096, sector=512)
    assert do(base, *ops) == [
        (0, 512, ZERO), (512, 512, DATA), (1024, 3072, ZERO), (4096, 1024, DATA), (5120, 2560, ZERO),
    ]  # fmt: skip


def test_a_state_record_says_what_a_vhdx_says() -> None:
    child = StateRecord(5 * 4096, base=False, unit=4096, sector=512, rng=random.Random(3))
    found = do(child, ("write", 512, 512), ("write", 4096, 4096), ("trim", 8192, 4096), ("trim", 12288, 512))
    assert found == [(512, 512, DATA), (4096, 4096, DATA), (8192, 4096, ZERO)]
    assert do(child, ("write", 8704, 512))[-1] == (4096, 8192, DATA)
    assert child.states[2] is State.FULLY_PRESENT  # the parent does not come back around what was trimmed
    base = StateRecord(4096, base=True, unit=4096, sector=512, rng=random.Random(3))
    assert do(base, ("write", 512, 512)) == [(0, 4096, DATA)]


def test_a_grain_record_says_what_a_vmdk_says() -> None:
    child = GrainRecord(4096 * 3 + 512, base=False, unit=4096, sector=512, zeros=True, trims=True)
    assert do(child, ("write", 512, 512), ("zero", 4096, 4096), ("trim", 8192, 4608)) == [(0, 4096, DATA), (4096, 8704, ZERO)]
    assert child.written() == [(512, 512)]
    assert do(child, ("write", 8192, 512)) == [(0, 4096, DATA), (4096, 4096, ZERO), (8192, 4096, DATA), (12288, 512, ZERO)]
    assert child.written() == [(512, 512), (8192, 4096)]  # below the rest of the grain is the trim, not the parent
    without = GrainRecord(8192, base=False, unit=4096, sector=512, zeros=False, trims=False)
    assert do(without, ("zero", 0, 4096), ("trim", 4096, 4096)) == [(0, 4096, DATA)]


def test_a_trim_is_zeros_only_where_the_format_says_so() -> None:
    ops = (Op(Action.WRITE, 0, 8192, seed=1), Op(Action.TRIM, 512, 7680))
    history = History(8192, (ops,))
    kept = play(history, lambda size, base: BitmapRecord(size, base=base, unit=4096, sector=512))
    cut = play(history, lambda size, base: StateRecord(size, base=base, unit=4096, sector=512, rng=random.Random(1)))
    assert whole(kept[0].content) == ops[0].data()
    assert whole(cut[0].content) == ops[0].data()[:4096] + bytes(4096)


def test_neighbours_are_merged() -> None:
    assert merged([(0, 1), (1, 2), (4, 1)]) == [(0, 3), (4, 1)]
    assert merged_claims([(4, 1, ZERO), (0, 4, ZERO), (5, 1, DATA)]) == [(0, 5, ZERO), (5, 1, DATA)]
