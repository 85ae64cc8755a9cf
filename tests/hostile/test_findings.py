"""What fuzzing found, one test each, by what was wrong."""

from __future__ import annotations

import pytest
from fuzz.memory import SparseFile, SparseStream
from fuzz.targets import CORPUS, STREAM

from tokvm.core.errors import ImageError
from tokvm.images.open import open_image
from tokvm.images.vmdk.stream import VmdkStream


def test_a_stream_whose_overhead_reaches_over_its_first_grains_is_refused() -> None:
    """Its tables come first and list grains that lie before the place where the grains are said to begin: read from there on,
    the disk was without them, and nobody was told."""
    raw = (CORPUS / "vmdk-stream" / "finding-overhead-over-the-first-grains").read_bytes()
    file: SparseFile = STREAM.expand(raw)
    with pytest.raises(ImageError, match="overhead is 34; allowed: at most 32") as caught:
        VmdkStream(lambda at: SparseStream(file, at, 4096), name="disk.vmdk")
    assert caught.value.where == "disk.vmdk@0x40"
    assert open_image(file).size == 41 * 512  # as a file it is whole: nothing of it is skipped
