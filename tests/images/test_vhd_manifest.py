"""Images by Windows, Hyper-V, Virtual PC, libvhd, DiscUtils and QEMU read to the hash that independent readers agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ImageError
from tokvm.core.units import GiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.stream import StreamKind, VhdStream

Entry = dict[str, Any]
Expand = Callable[[str], Path]

# The manifest names no chain for these; their parents lie beside them.
PARENTS = {
    "dfvfs/fat-differential.vhd": "dfvfs/fat-parent.vhd",
    "dfvfs/image-differential.vhd": "dfvfs/image.vhd",
}


def chain_of(entry: Entry, expand: Expand) -> Chain:
    name = entry["image"]
    names = entry.get("chain") or [*([PARENTS[name]] if name in PARENTS else []), name]
    return Chain.open([open_image(open_file(expand(layer))) for layer in names])


def check_hash(raw: bytes, entry: Entry) -> None:
    """QEMU's image rounds the size up to CHS; what is behind the stated size must be zeros."""
    size = entry["virtual_size"]
    assert hashlib.sha256(raw[:size]).hexdigest() == entry["raw_sha256"]
    assert not any(raw[size:])


def refusal(call: Callable[[], None]) -> ImageError | None:
    try:
        call()
    except ImageError as exc:
        return exc
    return None


@pytest.mark.slow
def test_image_reads_to_its_hash_or_is_refused(manifest_entry: Entry, expand: Expand, kit: Any) -> None:
    def read() -> None:
        chain = chain_of(manifest_entry, expand)
        if chain.size > GiB:
            assert sum(len(window) for window in chain.windows()) == 0
            return
        raw = kit.content(ChainReader(chain))
        if "raw_sha256" in manifest_entry:
            check_hash(raw, manifest_entry)

    refused = refusal(read)
    if refused is None:
        assert manifest_entry.get("expect") != "refuse"
    else:
        assert manifest_entry.get("expect") == "refuse" or manifest_entry.get("may_refuse"), refused
        assert refused.where
        assert refused.fix


def test_the_same_image_as_a_stream(manifest_entry: Entry, expand: Expand, kit: Any) -> None:
    name = manifest_entry["image"]
    raw = expand(name).read_bytes()
    size = manifest_entry.get("virtual_size") if "fixed" in name or name.endswith("parent.vhd") else None

    def read() -> None:
        fixed = None if size is None else StreamKind.FIXED
        stream = VhdStream(kit.Exporter(raw, step=70_000), name=name, expect_size=size, expect_parent=fixed)
        if stream.parent_identity is None and stream.size < GiB:
            check_hash(kit.content(stream), manifest_entry)
        else:
            for chunk in stream.chunks():
                chunk.release()

    refused = refusal(read)
    hashed = "raw_sha256" in manifest_entry and not manifest_entry.get("may_refuse")
    assert refused is None if hashed else refused is not None or "qemu-samples" in name or "mismatch" in name
