"""Finding a kernel: what apt says, what packages hold, what the cache keeps. The packages are real ones, made here."""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

import pytest

from tokvm.lab import kernel as kernel_module
from tokvm.lab.errors import LabError
from tokvm.lab.kernel import GuestKernel, find_kernel, module_bytes

VERSION = "6.8.0-9-generic"


def package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    tree = folder / f"tree-{name}"
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\nDescription: test\n"
    )
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(folder / f"{name}.deb")], check=True, capture_output=True
    )


@pytest.fixture
def ubuntu(tmp_path: Path, kernel: GuestKernel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt that knows what Ubuntu's does: kernel and modules in two packages, modules packed with zstd, in /usr/lib."""
    archive = tmp_path / "archive"
    archive.mkdir()
    module = tmp_path / "evdev.ko"
    module.write_bytes(module_bytes(kernel.files_of(("evdev",))[-1]))
    subprocess.run(["zstd", "-q", str(module)], check=True)
    inside = f"usr/lib/modules/{VERSION}/kernel/drivers/input/evdev.ko.zst"
    package(archive, f"linux-image-{VERSION}", {f"boot/vmlinuz-{VERSION}": b"the kernel"})
    listing = f"usr/lib/modules/{VERSION}/modules.builtin"
    package(
        archive,
        f"linux-modules-{VERSION}",
        {inside: Path(f"{module}.zst").read_bytes(), listing: b"", listing[:-7] + "order": b""},
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "linux-image-virtual": f"  Depends: linux-image-{VERSION}",
        f"linux-image-{VERSION}": f"  Depends: linux-modules-{VERSION}",
    }
    cases = "".join(f"{name}) echo '{name}'; echo '{answer}';;\n" for name, answer in answers.items())
    for name, body in {
        "apt-cache": f'for last; do :; done; case "$last" in {cases}*) exit 100;; esac',
        "apt-get": f'for word; do [ -e "{archive}/$word.deb" ] && cp "{archive}/$word.deb" .; done; true',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return archive


@pytest.fixture
def no_host_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, *, reason: Exception) -> GuestKernel:
        raise LabError("this host has none", where=str(folder)) from reason

    monkeypatch.setattr(kernel_module, "_unpack_host_kernel", refuse)


@pytest.mark.usefixtures("no_host_kernel")
def test_ubuntus_two_packages_make_one_kernel(tmp_path: Path, ubuntu: Path) -> None:
    found = find_kernel(tmp_path / "cache")
    assert found.version == VERSION
    assert found.image.read_bytes() == b"the kernel"
    assert ubuntu.is_dir()
    assert [file.name for file in found.files_of(("evdev", "ext4"))] == ["evdev.ko.zst"]
    assert module_bytes(found.files_of(("evdev",))[0])[:4] == b"\x7fELF"


@pytest.mark.usefixtures("no_host_kernel")
def test_a_cached_kernel_needs_no_archive(tmp_path: Path, ubuntu: Path) -> None:
    first = find_kernel(tmp_path / "cache")
    for deb in ubuntu.glob("*.deb"):
        deb.unlink()
    assert find_kernel(tmp_path / "cache") == first


@pytest.mark.usefixtures("no_host_kernel")
def test_a_failed_download_leaves_nothing_that_looks_like_a_kernel(tmp_path: Path, ubuntu: Path) -> None:
    (ubuntu / f"linux-image-{VERSION}.deb").write_bytes(b"no package")
    with pytest.raises(LabError):
        find_kernel(tmp_path / "cache")
    assert list((tmp_path / "cache/kernel").iterdir()) == []


@pytest.mark.parametrize("pack", [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_modules_are_unpacked(tmp_path: Path, pack: tuple[str, type[bytes]]) -> None:
    suffix, packed = pack
    file = tmp_path / f"a.ko{suffix}"
    file.write_bytes(packed(b"module"))
    assert module_bytes(file) == b"module"
