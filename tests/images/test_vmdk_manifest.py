"""VMDKs by VMware, ESXi, VirtualBox, DiscUtils and QEMU read to the hash that independent readers agree on."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.images.conftest import fixtures_dir
from tests.images.mutation import drain
from tests.images.naive_vmdk import Beside

from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind
from tokvm.core.units import GiB, MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vmdk.descriptor import extent_names
from tokvm.images.vmdk.stream import VmdkStream

Entry = dict[str, Any]
Unpack = Callable[[str], Path]

# Extents of a split or flat disk, and images whose extents are not in the fixtures. None of them is a whole disk.
ALONE = {
    "built/qemu-vmdk-2gbsparse/base-s001.vmdk": "only the disk's descriptor",
    "vmdk-rs/twoGbMaxExtentSparse-s001.vmdk": "only the disk's descriptor",
    "vmdk-rs/monolithicFlat.vmdk": "monolithicFlat-flat.vmdk",
    "vmdk-rs/twoGbMaxExtentFlat.vmdk": "twoGbMaxExtentFlat-f001.vmdk",
    "vmdk-rs/vmfs_thick-000001.vmdk": "vmfs_thick-000001-delta.vmdk",
}
DELTAS = {
    "derived/malicious/vmdk/d-delta.vmdk": "unknown",
    "derived/sesparse-aligned/base-000001-sesparse.vmdk": "unknown",
    "dissect/sesparse.vmdk": "unknown",
    "derived/malicious/vmdk/parent-abs.vmdk": "cid-deadbeef",
}
STREAMS = ("vmdk-rs/streamOptimized.vmdk", "built/qemu-vmdk-stream/base.vmdk")
WIDE = "qemu-samples/iotest-version3.vmdk"


def entries() -> list[Entry]:
    path = fixtures_dir() / "MANIFEST.json"
    found = json.loads(path.read_text()) if path.exists() else []
    return [entry for entry in found if entry["image"].endswith(".vmdk") and not entry["image"].endswith("-flat.vmdk")]


def params(wanted: Callable[[Entry], bool]) -> list[Any]:
    missing = pytest.mark.skip(reason="no external fixtures (TOKVM_FIXTURES)")
    found = [pytest.param(entry, id=entry["image"]) for entry in entries() if wanted(entry)]
    return found or [pytest.param({}, marks=missing)]


def is_hashed(entry: Entry) -> bool:
    return "raw_sha256" in entry and entry["virtual_size"] < GiB


def is_refused(entry: Entry) -> bool:
    return (entry.get("expect") == "refuse" and entry["image"] not in DELTAS) or entry["image"] in ALONE


@pytest.fixture(scope="module")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpack]:
    """An image in a directory with all files that lie beside it, each under its own name."""
    root = tmp_path_factory.mktemp("vmdks")

    def unpacked(name: str) -> Path:
        folder = root / Path(name).parent
        if not folder.exists():
            folder.mkdir(parents=True)
            for packed in (fixtures_dir() / Path(name).parent).glob("*.vmdk.xz"):
                (folder / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
        return root / name

    yield unpacked
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def opened(path: Path) -> Any:
    expect = "raw" if path.name.endswith("-flat.vmdk") else None
    return open_image(open_file(path), expect=expect, extents=Beside(path.parent, open_file))


def chain_of(entry: Entry, unpack: Unpack) -> Chain:
    names = entry.get("chain") or [entry["image"]]
    forced = "sesparse-aligned" in entry["image"]  # its chain in the manifest is of bare files
    return Chain.open([opened(unpack(name)) for name in names], force_linkage=forced)


@pytest.mark.parametrize("entry", params(is_hashed))
@pytest.mark.slow
def test_an_image_reads_to_its_hash(entry: Entry, unpack: Unpack, kit: Any) -> None:
    chain = chain_of(entry, unpack)
    assert chain.size == entry["virtual_size"]
    found = guest_order_hash(chain) if chain.size > 64 * MiB else hashlib.sha256(kit.content(ChainReader(chain))).hexdigest()
    assert found == entry["raw_sha256"]
    for layer in chain.layers:
        json.dumps(layer.describe())
        layer.file.close()


@pytest.mark.parametrize("entry", params(is_refused))
def test_what_is_no_whole_disk_is_refused(entry: Entry, unpack: Unpack) -> None:
    with pytest.raises(ImageError, match=ALONE.get(entry["image"])) as caught:
        chain_of(entry, unpack)
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("entry", params(lambda entry: entry["image"] in DELTAS))
def test_a_child_alone_is_no_disk_and_goes_over_no_disk_that_it_does_not_name(entry: Entry, unpack: Unpack, kit: Any) -> None:
    """Its hint is shown, and followed by nobody; content is read over whatever the target holds."""
    layer = opened(unpack(entry["image"]))
    chain = Chain.open([layer])
    assert chain.partial
    assert layer.linkage.parents == (DELTAS[entry["image"]],)
    drain(ChainReader(chain))
    with pytest.raises(ImageError, match=r"does not say over which|made over"):
        Chain.open([Chain.raw(kit.File(bytes(512))), layer])


def test_descriptors_give_the_same_chain_without_force(unpack: Unpack, kit: Any) -> None:
    entry = next((e for e in entries() if "sesparse-aligned/base-000001.vmdk" in e["image"]), None)
    if entry is None:
        pytest.skip("no external fixtures (TOKVM_FIXTURES)")
    folder = unpack(entry["image"]).parent
    assert extent_names(open_file(folder / "base-000001.vmdk")) == ("base-000001-sesparse.vmdk",)
    chain = Chain.open([opened(folder / "base.vmdk"), opened(folder / "base-000001.vmdk")])
    assert hashlib.sha256(kit.content(ChainReader(chain))).hexdigest() == entry["raw_sha256"]


@pytest.mark.parametrize("entry", params(lambda entry: entry["image"] in STREAMS))
def test_the_same_image_as_a_stream(entry: Entry, unpack: Unpack, kit: Any) -> None:
    raw = unpack(entry["image"]).read_bytes()
    stream = VmdkStream(kit.Exporter(raw, step=70_000), name="export", expect_size=entry["virtual_size"])
    assert hashlib.sha256(kit.content(stream)).hexdigest() == entry["raw_sha256"]


def wide() -> tuple[Entry, Path]:
    found = next((entry for entry in entries() if entry["image"] == WIDE), None)
    if found is None:
        pytest.skip("no external fixtures (TOKVM_FIXTURES)")
    return found, fixtures_dir() / f"{WIDE}.xz"


def test_a_sparse_stream_of_16_gib_is_the_same_both_ways(kit: Any) -> None:
    """By its grains: what is between them is zeros in both."""
    _, packed = wide()
    raw = lzma.decompress(packed.read_bytes())
    layer = open_image(kit.File(raw, "wide.vmdk"))
    stream = VmdkStream(kit.Exporter(raw, step=9000), name="wide")
    assert grains_of(ChainReader(Chain.open([layer]))) == grains_of(stream)


def grains_of(reader: Any) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for chunk in reader.chunks():
        assert chunk.kind is ExtentKind.DATA
        for at in range(0, chunk.length, 65536):
            found[chunk.offset + at] = hashlib.sha256(chunk.data[at : at + 65536]).digest()
        chunk.release()
    return found


@pytest.mark.slow
def test_a_sparse_stream_of_16_gib_reads_to_its_hash(kit: Any) -> None:
    entry, packed = wide()
    layer = open_image(kit.File(lzma.decompress(packed.read_bytes()), "wide.vmdk"))
    assert layer.size == entry["virtual_size"]
    assert guest_order_hash(Chain.open([layer])) == entry["raw_sha256"]


def guest_order_hash(chain: Chain) -> str:
    """Of the whole disk, without holding it."""
    digest, at, zeros = hashlib.sha256(), 0, bytes(MiB)
    for extent in (extent for window in chain.windows() for extent in window.only(ExtentKind.DATA)):
        hash_zeros(digest, extent.offset - at, zeros)
        raw = memoryview(bytearray(extent.length))
        chain.layers[extent.layer].file.read_into(extent.file_offset, raw)
        digest.update(raw)
        at = extent.end
    hash_zeros(digest, chain.size - at, zeros)
    return digest.hexdigest()


def hash_zeros(digest: Any, count: int, zeros: bytes) -> None:
    for _ in range(count // len(zeros)):
        digest.update(zeros)
    digest.update(zeros[: count % len(zeros)])
