from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.core.errors import DomainError
from tokvm.domain import picture
from tokvm.domain.picture import PNG, keep_picture, take_picture, to_png


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG, each with a checksum that is right."""
    assert data[:8] == PNG
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + length
    return found


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_every_pixel_arrives(width: int, height: int, data: st.DataObject) -> None:
    pixels = data.draw(st.binary(min_size=width * height * 3, max_size=width * height * 3))
    kinds = chunks(to_png(b"P6\n# QEMU\n%d %d\n255\n" % (width, height) + pixels, where="x"))
    assert [kind for kind, _ in kinds] == [b"IHDR", b"IDAT", b"IEND"]
    assert kinds[0][1] == struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.decompress(kinds[1][1])
    stride = width * 3 + 1
    assert [rows[i * stride] for i in range(height)] == [0] * height
    assert b"".join(rows[i * stride + 1 : (i + 1) * stride] for i in range(height)) == pixels


def test_a_png_stays_as_it_is() -> None:
    assert to_png(PNG + b"rest", where="x") == PNG + b"rest"


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"P5\n1 1\n255\n\0", b"P6\n0 1\n255\n", b"P6\n2 1\n255\n12345", b"P6\n1 1\n65535\n123456"]
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DomainError):
        to_png(data, where="x")


class Screen:
    """A virStream and a virDomain that hands it endless bytes."""

    def __init__(self) -> None:
        self.aborted = False

    def newStream(self, _flags: int) -> Screen:
        return self

    def screenshot(self, _stream: Any, _screen: int, _flags: int) -> str:
        return "image/x-portable-pixmap"

    def recv(self, count: int) -> bytes:
        return bytes(count)

    def abort(self) -> None:
        self.aborted = True

    def name(self) -> str:
        return "endless"


def test_an_endless_screen_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "MAX_PICTURE", 1 << 20)
    screen = Screen()
    with pytest.raises(DomainError, match="more than"):
        take_picture(screen, screen)
    assert screen.aborted


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_a_picture_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "screen.png"

    keep_picture(path, PNG)

    assert path.read_bytes() == PNG
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_picture_goes_over_nothing(tmp_path: Path) -> None:
    """Nor through a link."""
    (tmp_path / "screen.png").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FileExistsError):
        keep_picture(tmp_path / "screen.png", PNG)
    assert not (tmp_path / "elsewhere").exists()
