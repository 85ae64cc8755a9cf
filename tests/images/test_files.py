"""Image files on this host: what may be opened, exact reads, errors that name the place."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import attach_or_skip, detach

from tokvm.core.errors import ImageError
from tokvm.images.base import ReadAt
from tokvm.images.files import open_file
from tokvm.images.page_cache import is_cached


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 64 + b"tail")
    return path


def read(file: ReadAt, offset: int, length: int) -> bytes:
    buffer = mmap.mmap(-1, max(length, 1))
    file.read_into(offset, memoryview(buffer)[:length])
    return buffer[:length]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 1), (1, 4096), (4096, 4096), (8192, 8192), (16384, 4), (4096, 12292)]
)
def test_reads_are_exact(image: Path, direct: bool, offset: int, length: int) -> None:
    file = open_file(image, direct=direct)
    assert isinstance(file, ReadAt)
    assert read(file, offset, length) == image.read_bytes()[offset : offset + length]
    file.close()


@pytest.mark.parametrize(("offset", "length"), [(16388, 1), (0, 16389), (1 << 62, 1), (-1, 1)])
def test_a_read_past_the_end_is_an_error_with_its_place(image: Path, offset: int, length: int) -> None:
    with pytest.raises(ImageError, match="the file ends at 0x4004") as caught:
        read(open_file(image), offset, length)
    assert caught.value.where == f"{image}@{offset:#x}"


def test_a_file_that_shrinks_is_an_error_never_zeros(image: Path) -> None:
    file = open_file(image)
    os.truncate(image, 8192)
    with pytest.raises(ImageError, match="ended 4100 bytes early") as caught:
        read(file, 8188, 4104)
    assert caught.value.where.endswith("@0x2000")


def test_links_fifos_directories_and_missing_files_are_refused(image: Path, tmp_path: Path) -> None:
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(image)
    os.mkfifo(fifo)
    for path, message in (
        (link, "symbolic link"),
        (fifo, "neither a regular file nor a block device"),
        (tmp_path, "neither a regular file nor a block device"),
        (tmp_path / "none", "No such file"),
        (Path("/dev/null"), "neither a regular file nor a block device"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            open_file(path)
        assert caught.value.where == str(path)
        assert caught.value.fix


def test_the_inode_and_the_stamp_tell_files_and_versions_apart(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "hard-link"
    other.hardlink_to(image)
    assert open_file(image).inodes == open_file(other).inodes
    stamp = open_file(image).stamp
    os.utime(image, ns=(1, 1))
    assert open_file(image).stamp != stamp


def test_descriptors_are_closed_also_after_a_refusal(image: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for direct in (False, True):
        file = open_file(image, direct=direct)
        file.close()
        with pytest.raises(ImageError):
            open_file(tmp_path, direct=direct)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(1 << 20))
    device = attach_or_skip(backing)
    try:
        yield Path(device)
    finally:
        detach(device)


@pytest.mark.root
@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_has_its_size_and_bytes(loop_device: Path, tmp_path: Path, direct: bool) -> None:
    file = open_file(loop_device, direct=direct)
    assert file.size == 1 << 20
    assert file.stamp == ""
    assert read(file, 4096, 65536) == (tmp_path / "backing").read_bytes()[4096 : 4096 + 65536]
    file.close()


def test_the_page_cache_is_asked_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 4096)
    file = open_file(path)
    os.fsync(file.fileno())
    assert is_cached(file.fileno(), 512, 65536)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(file.fileno(), 0, 1 << 20):
        pytest.skip("this filesystem lives in the page cache")
    buffer = memoryview(mmap.mmap(-1, 1 << 20))
    file.read_into(512, buffer[: (1 << 20) - 1024])
    assert bytes(buffer[:256]) == bytes(range(256))
    assert not is_cached(file.fileno(), 65536, 65536)
    file.will_read(0, 4096)
    file.close()
