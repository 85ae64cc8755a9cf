"""Which drivers a virtio-win tree has for a Windows, and what the first boot is given: pure."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pycdlib
import pytest
from tests.guest.signing import Signing, new_signing
from tests.guest.virtio_win import make_tree

from tokvm.core.machine import Severity
from tokvm.guest.base import GuestError, GuestFacts, OsFamily, WindowsFacts
from tokvm.guest.windows import first_boot
from tokvm.guest.windows.addresses import HEADER, Adapter, as_csv
from tokvm.guest.windows.driver_tree import Target, find_drivers, target_of
from tokvm.guest.windows.hive_edit import check_base_block
from tokvm.lab.windows_hives import RELEASES, empty_hive

SERVER_2022 = Target("Windows Server 2022", ("2k22", "win2022"), "x86_64")


@pytest.fixture(scope="module")
def red_hat(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return new_signing(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, red_hat: Signing) -> Path:
    return make_tree(tmp_path_factory.mktemp("virtio-win-0.1.285"), red_hat)


def facts(build: int, edition: str, arch: str = "x86_64") -> GuestFacts:
    return GuestFacts(OsFamily.WINDOWS, product="Windows", arch=arch, windows=WindowsFacts(build=build, edition=edition))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(("win2k8r2", "2k8r2"), ("win2k12r2", "2k12r2"), ("win2k16", "2k16"), ("win2k19", "2k19")),
        *(("win2k22", "2k22"), ("win2k25", "2k25"), ("win10", "w10"), ("win11", "w11")),
    ],
)
def test_the_build_says_which_folder(name: str, folder: str) -> None:
    release = RELEASES[name]
    assert target_of(facts(release.build, release.edition)).folders[0] == folder


@pytest.mark.parametrize(("build", "arch"), [(3790, "x86_64"), (20348, "ia64"), (0, "x86_64")])
def test_what_virtio_never_drove_is_refused(build: int, arch: str) -> None:
    with pytest.raises(GuestError, match="no virtio drivers"):
        target_of(facts(build, "ServerStandard", arch))


@pytest.mark.slow
def test_a_folder_tree_gives_the_versions_own_drivers(tree: Path, red_hat: Signing) -> None:
    found = find_drivers(tree, SERVER_2022)
    assert [one.name for one in found.drivers] == ["viostor", "vioscsi", "netkvm", "balloon"]
    assert [one.name for one in found.storage] == ["viostor", "vioscsi"]
    assert sorted(found.storage[0].files) == ["viostor.cat", "viostor.inf", "viostor.sys"]
    assert b"viostor 2k22" in (found.storage[0].file(".sys") or b"")
    assert {signer.der for one in found.drivers for signer in one.signers} == {red_hat.der}
    assert found.agent == b"msi 64"
    assert found.findings == ()


def test_an_iso_gives_the_same_as_its_folder(tree: Path, tmp_path: Path) -> None:
    iso = tmp_path / "virtio-win.iso"
    image = pycdlib.PyCdlib()
    image.new(joliet=3, vol_ident="virtio-win")
    places = sorted(path.relative_to(tree) for path in tree.rglob("*"))
    short: dict[Path, str] = {Path(): ""}
    for number, place in enumerate(places):
        plain = f"{short[place.parent]}/F{number}"
        short[place] = plain
        if (tree / place).is_dir():
            image.add_directory(plain, joliet_path=f"/{place}")
        else:
            image.add_file(str(tree / place), f"{plain}.;1", joliet_path=f"/{place}")
    image.write(str(iso))
    image.close()
    from_iso, from_folder = find_drivers(iso, SERVER_2022), find_drivers(tree, SERVER_2022)
    assert from_iso.drivers == from_folder.drivers
    assert from_iso.agent == from_folder.agent


def test_a_by_os_tree_is_read_too(tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "drivers" / "amd64" / "Win2022"
    place.mkdir(parents=True)
    for file in [*(tree / "viostor/2k22/amd64").iterdir(), *(tree / "NetKVM/2k22/amd64").iterdir()]:
        (place / file.name).write_bytes(file.read_bytes())
    found = find_drivers(tmp_path, SERVER_2022)
    assert [(one.name, len(one.files)) for one in found.drivers] == [("viostor", 3), ("netkvm", 3)]
    assert any("vioscsi" in one.what for one in found.findings)


def test_a_tree_without_the_version_is_a_blocker_and_smbus_a_warning(tree: Path) -> None:
    found = find_drivers(tree, Target("Windows Server 2025", ("2k25", "win2025"), "x86_64"))
    assert found.drivers == ()
    assert [one.severity for one in found.findings] == [Severity.BLOCKER, Severity.WARNING]
    assert "2k25" in found.findings[0].what
    assert "smbus" in found.findings[1].what


def test_a_changed_catalogue_is_refused_with_its_place(tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "viostor/2k22/amd64"
    place.mkdir(parents=True)
    for file in (tree / "viostor/2k22/amd64").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "viostor.cat").write_bytes((place / "viostor.cat").read_bytes().replace(b"viostor 2k22", b"viostor 2k23"))
    with pytest.raises(GuestError, match="not that of the content") as refused:
        find_drivers(tmp_path, SERVER_2022)
    assert "viostor.cat" in refused.value.where


@pytest.mark.parametrize("content", [b"", b"no iso", bytes(1 << 17)])
def test_what_is_no_iso_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.iso"
    file.write_bytes(content)
    with pytest.raises(GuestError, match="no ISO"):
        find_drivers(file, SERVER_2022)


def test_a_hostile_file_name_never_reaches_the_guest(tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "viostor/2k22/amd64"
    place.mkdir(parents=True)
    for file in (tree / "viostor/2k22/amd64").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "viostor & calc.exe").write_bytes(b"x")
    with pytest.raises(GuestError, match="odd name"):
        find_drivers(tmp_path, SERVER_2022)
    for name in ("certs/%PATH%.cer", "a b", "../x", "drivers/a/../b", "x\ny", "a'b", "$(calc)", "-x", "a" * 65):
        with pytest.raises(GuestError):
            first_boot.check_names([name])


@pytest.mark.slow
def test_scripts_are_the_same_for_every_guest_and_data_lies_beside(tree: Path, red_hat: Signing) -> None:
    """Hostile text of the guest and of certificates is in no script, and in the data only what was checked."""
    hostile = new_signing(red_hat.folder / "hostile", "/CN=$(calc) \\& '; Remove-Item C:")
    found = find_drivers(make_tree(red_hat.folder / "tree", hostile, versions=("2k22",)), SERVER_2022)
    adapter = Adapter("00:50:56:a1:b2:c3", ("192.0.2.10",), ("255.255.255.0",), ("192.0.2.1",), ("192.0.2.53", "192.0.2.54"))
    made = first_boot.files(found, [adapter], runner=None, remove_tools=True)
    plain = first_boot.files(find_drivers(tree, SERVER_2022), [], runner=b"MZ", remove_tools=False)
    for name in first_boot.SCRIPTS:
        assert made[name] == plain[name] == first_boot.script(name)
        assert b"\r\n" in made[name]
        assert b"\n" not in made[name].replace(b"\r\n", b"")
        assert made[name].isascii()
    assert [name for name in made if name.startswith("certs/")] == [f"certs/{found.drivers[0].signers[0].sha1}.cer"]
    assert {"rhsrvany.exe"} == set(plain) - set(made) - {name for name in plain if name.startswith("certs/")}


def test_the_addresses_file_is_csv_of_checked_words() -> None:
    adapter = Adapter("00:50:56:a1:b2:c3", ("192.0.2.10", "192.0.2.11"), ("255.255.255.0",) * 2, ("192.0.2.1",), ())
    rows = list(csv.DictReader(io.StringIO(as_csv([adapter]).decode())))
    assert tuple(rows[0]) == HEADER
    assert rows[0]["addresses"].split() == list(adapter.addresses)
    assert rows[0]["dns"] == ""


def test_a_hive_that_was_not_written_out_is_refused() -> None:
    whole = empty_hive()[:512]
    check_base_block(whole, "SYSTEM")
    for at in (4, 8, 100, 508):
        changed = bytearray(whole)
        changed[at] ^= 1
        with pytest.raises(GuestError, match="not written its registry out"):
            check_base_block(bytes(changed), "SYSTEM")
    for bad in (b"", b"regf", b"x" * 512):
        with pytest.raises(GuestError, match="no registry hive"):
            check_base_block(bad, "SYSTEM")
