"""tokvm image with VMDK: extent files are found or listed, and equal CIDs do not hide a skipped layer."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
from tests.cli.conftest import Run

from tokvm.testing.sesparse_writer import write_sesparse
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat

MiB = 1 << 20
SIZE = 20 * MiB
CID = 0x1BADB002


def _part(content: bytes, offset: int, length: int) -> bytes:
    return content[offset : offset + length]


@pytest.fixture
def running(tmp_path: Path) -> tuple[list[Path], list[bytes]]:
    """The layers of a running VM as ESX keeps them: flat base, two seSparse deltas, one CID for all of them."""
    rng = random.Random(6)
    content = bytearray(SIZE)
    content[: 3 * MiB] = rng.randbytes(3 * MiB)
    names, contents = [tmp_path / "web.vmdk"], [bytes(content)]
    write_flat(names[0], size=SIZE, runs=[(0, contents[0][: 3 * MiB])], identity=Identity(CID))
    for number in (1, 2):
        runs = [(place * 4096, rng.randbytes(4096)) for place in sorted(rng.sample(range(SIZE // 4096), 40))]
        for offset, data in runs:
            content[offset : offset + 4096] = data
        path = tmp_path / f"web-{number:06}.vmdk"
        below = contents[-1]
        write_sesparse(
            path, size=SIZE, runs=runs, identity=Identity(CID, CID, names[-1].name),
            read_parent=partial(_part, below),
        )  # fmt: skip
        names.append(path)
        contents.append(bytes(content))
    return names, contents


@pytest.mark.slow
def test_the_chain_of_a_running_vm(running: tuple[list[Path], list[bytes]], tokvm: Run, tmp_path: Path) -> None:
    names, contents = running
    target = tmp_path / "disk.raw"
    done = tokvm("image", "convert", *names, "--to", target)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == contents[2]


@pytest.mark.slow
def test_equal_cids_do_not_hide_a_skipped_a_swapped_or_a_repeated_layer(
    running: tuple[list[Path], list[bytes]], tokvm: Run, tmp_path: Path
) -> None:
    names, contents = running
    target = tmp_path / "disk.raw"
    for wrong in ([names[0], names[2]], [names[0], names[2], names[1]]):
        done = tokvm("image", "convert", *wrong, "--to", target)
        assert done.returncode == 3
        assert "web-000001.vmdk" in done.stderr
        assert not target.exists()
    assert tokvm("image", "convert", names[0], "--to", target).returncode == 0
    skipped = tokvm("image", "apply", names[2], "--to", target)
    assert skipped.returncode == 3
    assert "made over the file web-000001.vmdk" in skipped.stderr
    assert target.read_bytes() == contents[0]
    for number in (1, 2):
        assert tokvm("image", "apply", names[number], "--to", target).returncode == 0
        assert target.read_bytes() == contents[number]
        repeated = tokvm("image", "apply", names[number], "--to", target)
        assert repeated.returncode == 3
        assert "applied already" in repeated.stderr


@pytest.mark.slow
def test_listed_extents_are_no_layers_of_their_own(running: tuple[list[Path], list[bytes]], tokvm: Run, tmp_path: Path) -> None:
    names, contents = running
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flat = elsewhere / "web-flat.vmdk"
    (tmp_path / "web-flat.vmdk").rename(flat)
    missing = tokvm("image", "info", names[0])
    assert missing.returncode == 3
    assert "web-flat.vmdk" in missing.stderr
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", names[0], flat, *names[1:], "--to", target).returncode == 0
    assert target.read_bytes() == contents[2]


@pytest.mark.slow
def test_a_bare_layer_needs_force(running: tuple[list[Path], list[bytes]], tokvm: Run, tmp_path: Path) -> None:
    names, contents = running
    target, bare = tmp_path / "disk.raw", tmp_path / "web-000001-sesparse.vmdk"
    assert tokvm("image", "convert", names[0], "--to", target).returncode == 0
    refused = tokvm("image", "apply", bare, "--to", target)
    assert refused.returncode == 3
    assert "does not say over which disk" in refused.stderr
    assert tokvm("image", "apply", bare, "--to", target, "--force-linkage").returncode == 0
    assert target.read_bytes() == contents[1]


@pytest.mark.slow
def test_an_extent_that_is_a_link_is_not_followed(running: tuple[list[Path], list[bytes]], tokvm: Run, tmp_path: Path) -> None:
    names, _ = running
    flat = tmp_path / "web-flat.vmdk"
    flat.rename(tmp_path / "secret")
    flat.symlink_to(tmp_path / "secret")
    done = tokvm("image", "convert", names[0], "--to", tmp_path / "disk.raw")
    assert done.returncode == 3
    assert "symbolic link" in done.stderr


@pytest.mark.slow
def test_info_shows_the_descriptor_and_its_extent(running: tuple[list[Path], list[bytes]], tokvm: Run) -> None:
    names, _ = running
    found = json.loads(tokvm("image", "info", *names, "--json").stdout)
    assert [one["type"] for one in found] == ["vmfs", "seSparse", "seSparse"]
    assert found[2]["parent_name"] == "web-000001.vmdk"
    shown = tokvm("image", "info", names[1]).stdout
    assert "web-000001-sesparse.vmdk" in shown
    assert "20 MiB" in shown
