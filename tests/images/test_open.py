"""Which format is it? By bytes only; two that fit are refused; and several files are read as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.files import open_file
from tokvm.images.joined import STEP, JoinedFile
from tokvm.images.open import open_image
from tokvm.images.raw import RawLayer

KiB = 1024


@pytest.mark.parametrize("magic", [b"vhdxfile", b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0", b"# Disk DescriptorFile\n"])
def test_a_file_that_is_two_formats_at_once_is_refused_until_somebody_says_which(kit: Any, magic: bytes) -> None:
    content = magic.ljust(8 * KiB, b"\0")
    fixed = kit.Vhd(len(content), kind=2, sectors={n: content[n * 512 : n * 512 + 512] for n in range(16)}).build()
    with pytest.raises(ImageError, match="and ends as a VHD"):
        open_image(kit.File(fixed))
    assert open_image(kit.File(fixed), expect="vhd").size == len(content)


def test_a_stray_cookie_at_the_end_is_no_footer(kit: Any) -> None:
    """A guest's own bytes at the end of a VHDX: without a checksum they are nothing."""
    raw = b"vhdxfile".ljust(4096, b"\0") + b"conectix".ljust(512, b"\1")
    with pytest.raises(ImageError) as caught:
        open_image(kit.File(raw, "x.vhdx"))
    assert "ends as a VHD" not in str(caught.value)


def test_raw_is_read_only_when_somebody_says_so(kit: Any) -> None:
    raw = os.urandom(4096)
    with pytest.raises(ImageError, match="no image format"):
        open_image(kit.File(raw))
    assert open_image(kit.File(raw), expect="raw").size == 4096


def test_holes_of_a_raw_file_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as out:
        out.truncate(1024 * KiB)
        out.seek(256 * KiB)
        out.write(b"\1" * 64 * KiB)
    file = open_file(path)
    layer = RawLayer(file)
    whole = list(layer.window(0, layer.size))
    assert [extent.kind for extent in whole] == [ExtentKind.ZERO, ExtentKind.DATA, ExtentKind.ZERO]
    assert whole[1] == Extent(256 * KiB, 64 * KiB, ExtentKind.DATA, 256 * KiB)
    assert list(layer.window(260 * KiB, 264 * KiB)) == [Extent(260 * KiB, 4 * KiB, ExtentKind.DATA, 260 * KiB)]
    windows = list(layer.windows(max_rows=1))
    assert windows[0].stop == 320 * KiB
    assert sum(window.stop - window.start for window in windows) == layer.size
    file.close()


def test_joined_files_keep_their_bytes_apart(kit: Any) -> None:
    parts = [os.urandom(5000), os.urandom(STEP), os.urandom(1)]
    joined = JoinedFile("three", [kit.File(part, f"part{number}") for number, part in enumerate(parts)])
    for place, part in zip(joined.places, parts, strict=True):
        assert place % STEP == 0
        buffer = bytearray(len(part))
        joined.read_into(place, memoryview(buffer))
        assert bytes(buffer) == part
    assert joined.locate(joined.places[1] + 7) == ("part1", 7)
    with pytest.raises(ImageError):
        joined.read_into(4999, memoryview(bytearray(2)))
    assert all(b > a + len(part) for a, b, part in zip(joined.places, joined.places[1:], parts, strict=False))
