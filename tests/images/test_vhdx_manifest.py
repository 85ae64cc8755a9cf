"""Images by Windows, Hyper-V, DiscUtils and QEMU read to the hash that independent readers agree on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.images.conftest import fixtures_dir
from tests.images.mutation import refusal

from tokvm.core.extents import ExtentKind
from tokvm.core.units import GiB, MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader

Entry = dict[str, Any]
Expand = Callable[[str], Path]

# The manifest names no chain for this one; its parent lies beside it.
PARENTS = {"dfvfs/fat-differential.vhdx": "dfvfs/fat-parent.vhdx"}


def entries() -> list[Any]:
    path = fixtures_dir() / "MANIFEST.json"
    found = json.loads(path.read_text()) if path.exists() else []
    found = [entry for entry in found if str(entry["image"]).endswith((".vhdx", ".avhdx"))]
    if not found:
        return [pytest.param({}, marks=pytest.mark.skip(reason="no external fixtures (TOKVM_FIXTURES)"))]
    large = [pytest.mark.slow]
    return [
        pytest.param(entry, id=entry["image"], marks=large if entry.get("virtual_size", 0) >= GiB else []) for entry in found
    ]


def digest(reader: ChainReader) -> str:
    """Of the whole disk; what is not DATA is fed as zeros, a MiB at a time."""
    data = {}
    for chunk in reader.chunks():
        if chunk.kind is ExtentKind.DATA:
            assert chunk.data is not None
            data[chunk.offset] = bytes(chunk.data)
        chunk.release()
    found = hashlib.sha256()
    at = 0
    for offset in [*sorted(data), reader.size]:
        assert offset >= at
        for start in range(at, offset, MiB):
            found.update(bytes(min(MiB, offset - start)))
        found.update(data.get(offset, b""))
        at = offset + len(data.get(offset, b""))
    return found.hexdigest()


@pytest.mark.parametrize("entry", entries())
@pytest.mark.slow
def test_image_reads_to_its_hash_or_is_refused(entry: Entry, expand: Expand) -> None:
    name = entry["image"]
    names = entry.get("chain") or [*([PARENTS[name]] if name in PARENTS else []), name]

    def read() -> None:
        chain = Chain.open([open_image(open_file(expand(layer))) for layer in names])
        assert chain.size == entry.get("virtual_size", chain.size)
        found = digest(ChainReader(chain))
        assert found.startswith(str(entry.get("raw_sha256") or entry.get("raw_sha256_prefix", "")))

    refused = refusal(read)
    assert (refused is not None) == (entry.get("expect") == "refuse"), refused
    if refused is not None:
        assert refused.where
        assert refused.fix
