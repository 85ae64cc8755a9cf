"""tokvm image on files that qemu-img and our writer made."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tokvm.testing.vhd_writer import write_vhd

MiB = 1 << 20
VERBS = ("check", "ls", "sync", "cutover", "migrate", "status", "rollback", "finish", "verify", "image", "lab")


def tokvm(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tokvm", *argv], capture_output=True, text=True, timeout=60)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """A base by qemu-img, a child by our writer, and what the two hold together."""
    size = 9 * MiB
    content = bytearray(size)
    content[MiB : 3 * MiB] = os.urandom(2 * MiB)
    raw = tmp_path / "raw"
    raw.write_bytes(content)
    base = tmp_path / "base.vhd"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", raw, base], check=True
    )
    described = json.loads(tokvm("image", "info", str(base), "--json").stdout)
    child = tmp_path / "child.vhd"
    changed = os.urandom(4096)
    with child.open("wb") as out:
        write_vhd(
            out,
            size=size,
            kind="differencing",
            runs=[(2 * MiB + 512, changed)],
            unique_id=uuid.uuid4(),
            parent_id=uuid.UUID(str(described["identity"])),
        )
    content[2 * MiB + 512 : 2 * MiB + 512 + 4096] = changed
    return base, child, bytes(content)


@pytest.mark.slow
def test_info_says_what_qemu_img_says(chain: tuple[Path, Path, bytes]) -> None:
    base, _, content = chain
    described = json.loads(tokvm("image", "info", str(base), "--json").stdout)
    theirs = json.loads(subprocess.check_output(["qemu-img", "info", "-f", "vpc", "--output=json", base]))
    assert described["format"] == "vhd"
    assert described["virtual_size"] == theirs["virtual-size"] == len(content)


@pytest.mark.slow
def test_convert_copies_the_chain(chain: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    base, child, content = chain
    target = tmp_path / "out.raw"
    done = tokvm("image", "convert", str(base), str(child), "--to", str(target), "--json")
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
    again = tokvm("image", "convert", str(base), "--to", str(target))
    assert again.returncode == 9, "a target with content is refused"
    forced = tokvm("image", "convert", str(base), "--to", str(target), "--overwrite", str(len(content)))
    assert forced.returncode == 0, forced.stderr


@pytest.mark.slow
def test_map_names_every_byte_once(chain: tuple[Path, Path, bytes]) -> None:
    base, child, content = chain
    rows = json.loads(tokvm("image", "map", str(base), str(child), "--json").stdout)
    assert sum(row["length"] for row in rows) == len(content)
    assert all(a["start"] + a["length"] == b["start"] for a, b in itertools.pairwise(rows))
    (upper,) = [row for row in rows if row.get("file") == str(child)]
    assert (upper["start"], upper["length"], upper["depth"]) == (2 * MiB + 512, 4096, 0)


@pytest.mark.slow
def test_map_uses_the_keys_of_qemu_img(chain: tuple[Path, Path, bytes]) -> None:
    base, _, _ = chain
    ours = json.loads(tokvm("image", "map", str(base), "--json").stdout)
    theirs = json.loads(subprocess.check_output(["qemu-img", "map", "-f", "vpc", "--output=json", base]))
    assert set(theirs[0]) - {"offset"} <= set(ours[0])
    assert [(r["start"], r["length"], r["offset"]) for r in ours if r["data"]] == [
        (r["start"], r["length"], r["offset"]) for r in theirs if r["data"]
    ]


@pytest.mark.slow
def test_a_chain_in_the_wrong_order_is_refused(chain: tuple[Path, Path, bytes]) -> None:
    base, child, _ = chain
    done = tokvm("image", "map", str(child), str(base))
    assert done.returncode == 3, done.stderr


@pytest.mark.slow
def test_a_hostile_image_is_refused_by_name_and_field(tmp_path: Path) -> None:
    out = io.BytesIO()
    write_vhd(out, size=4 * MiB, kind="dynamic", runs=[(0, b"x" * 512)], unique_id=uuid.uuid4())
    broken = bytearray(out.getvalue())
    broken[512 + 28 : 512 + 32] = b"\xff" * 4
    path = tmp_path / "broken.vhd"
    path.write_bytes(broken)
    done = tokvm("image", "info", str(path))
    assert done.returncode == 3, done.stderr
    assert "broken.vhd" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.slow
def test_every_verb_explains_itself(verb: str) -> None:
    done = tokvm(verb, "--help")
    assert done.returncode == 0
    assert "Usage: tokvm" in done.stdout
    assert len(done.stdout.splitlines()) > 5


def test_the_errors_page_is_the_one_of_the_classes() -> None:
    printed = subprocess.check_output([sys.executable, "-m", "tokvm.core.errors"], text=True)
    assert (Path(__file__).parents[2] / "docs" / "errors.md").read_text() == printed
