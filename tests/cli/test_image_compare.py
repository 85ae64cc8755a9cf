"""tokvm image compare and verify."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run
from tests.cli.test_image_apply import SIZE, Disk


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    made = Disk(tmp_path)
    for seed in range(3):
        made.add(seed)
    return made


@pytest.mark.parametrize("place", [511, SIZE // 2 + 4096, SIZE - 1])
@pytest.mark.slow
def test_one_flipped_byte_is_found_and_placed(disk: Disk, tokvm: Run, tmp_path: Path, place: int) -> None:
    target = tmp_path / "disk.raw"
    content = bytearray(disk.contents[-1])
    content[place] ^= 1
    target.write_bytes(content)
    done = tokvm("image", "compare", *disk.names, "--to", target, "--json")
    assert done.returncode == 14
    found = json.loads(done.stdout[: done.stdout.index("\n}\n") + 2])
    assert found["ranges"] == [{"offset": place // 512 * 512, "length": 512}]
    assert found["differing_bytes"] == 512


@pytest.mark.slow
def test_the_same_content_in_another_chain_is_the_same(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk.contents[-1])
    argv = ["image", "compare", *disk.names, "--with", raw, "--format", f"{raw}=raw"]
    assert tokvm(*argv).returncode == 0
    assert tokvm("image", "compare", disk.names[0], "--with", raw, "--format", f"{raw}=raw").returncode == 14


@pytest.mark.slow
def test_a_larger_target_must_be_zero_behind_the_disk(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(disk.contents[-1] + bytes(8192))
    assert tokvm("image", "compare", *disk.names, "--to", target).returncode == 0
    target.write_bytes(disk.contents[-1] + bytes(4096) + b"\1" + bytes(4095))
    done = tokvm("image", "compare", *disk.names, "--to", target)
    assert done.returncode == 14
    assert hex(SIZE + 4096) in done.stderr


@pytest.mark.slow
def test_verify_hashes_the_raw_content(disk: Disk, tokvm: Run) -> None:
    done = tokvm("image", "verify", *disk.names, "--sha256", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sha256"] == hashlib.sha256(disk.contents[-1]).hexdigest()
    assert found["size"] == found["data_bytes"] + found["zero_bytes"] + found["absent_bytes"] == SIZE


@pytest.mark.slow
def test_verify_refuses_a_cut_file(disk: Disk, tokvm: Run) -> None:
    raw = disk.names[1].read_bytes()
    disk.names[1].write_bytes(raw[:-70_000] + raw[-512:])
    done = tokvm("image", "verify", *disk.names[:2])
    assert done.returncode == 3
    assert "BAT[" in done.stderr


@pytest.mark.slow
def test_compare_wants_one_thing_to_compare_with(disk: Disk, tokvm: Run) -> None:
    assert tokvm("image", "compare", disk.names[0]).returncode == 2
