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
from tokvm.images.vhd_stream import VhdStream

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


def test_image_reads_to_its_hash_or_is_refused(manifest_entry: Entry, expand: Expand, kit: Any) -> None:
    try:
        chain = chain_of(manifest_entry, expand)
        if chain.size > GiB:
            assert sum(len(window) for window in chain.windows()) == 0
            return
        raw = kit.content(ChainReader(chain))
    except ImageError as exc:
        assert manifest_entry.get("expect") == "refuse" or manifest_entry.get("may_refuse"), exc
        assert exc.where and exc.fix
        return
    assert manifest_entry.get("expect") != "refuse"
    if "raw_sha256" in manifest_entry:
        check_hash(raw, manifest_entry)


def test_the_same_image_as_a_stream(manifest_entry: Entry, expand: Expand, kit: Any) -> None:
    name = manifest_entry["image"]
    raw = expand(name).read_bytes()
    size = manifest_entry.get("virtual_size") if "fixed" in name or name.endswith("parent.vhd") else None
    try:
        stream = VhdStream(kit.Exporter(raw, step=70_000), name=name, expect_size=size)
    except ImageError:
        refusable = "malicious" in name or manifest_entry.get("may_refuse") or "raw_sha256" not in manifest_entry
        assert refusable
        return
    if "malicious" in name:
        with pytest.raises(ImageError, match=r"ended at byte|footer"):
            kit.content(stream)
    elif stream.parent_identity is None and stream.size < GiB:
        check_hash(kit.content(stream), manifest_entry)
    else:
        assert all(chunk.release() is None for chunk in stream.chunks())
