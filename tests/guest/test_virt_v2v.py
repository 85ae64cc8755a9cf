"""virt-v2v-in-place as a program that is played by a shell script; the real one converts at night (test_virt_v2v_real.py)."""

from __future__ import annotations

import os
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tokvm.core.machine import Firmware, VirtualMachine
from tokvm.core.units import GiB
from tokvm.guest import virt_v2v
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.libvirt_xml import conversion_xml
from tokvm.guest.v2v_failures import failure
from tokvm.guest.virt_v2v import LOG_LIMIT, VirtV2v, features, find_virt_v2v

VM = VirtualMachine("u", "a</name>\x1b", vcpus=2, memory=GiB, disks=())
ABLE = "virt-v2v-in-place\\nvirt-v2v-in-place-2.0\\nin-place\\ninput:libvirtxml\\n"
Maker = Callable[..., VirtV2v]


@pytest.fixture
def play(tmp_path: Path) -> Maker:
    """play(script, able=…) → a conversion by that script; its arguments end up in `argv`, its environment in `env`."""

    def make(script: str, *, able: str = ABLE, **options: object) -> VirtV2v:
        program = tmp_path / "virt-v2v-in-place"
        program.write_text(
            f"#!/bin/bash\nif [ $# = 1 ]; then printf '{able}'; exit; fi\n"
            f"printf '%s\\n' \"$@\" >{tmp_path}/argv; env >{tmp_path}/env; cat >{tmp_path}/stdin\n"
            f'say() {{ printf \'{{ "message": "%s", "timestamp": "t", "type": "%s" }}\\n\' "$2" "$1"; }}\n{script}\n'
        )
        program.chmod(0o755)
        return replace(VirtV2v(str(program), VM, tmp_path / "v2v.log"), **options)  # type: ignore[arg-type]

    return make


DISKS = (GuestDisk("/f/disk-0.qcow2", "qcow2"), GuestDisk("/f/disk-1.qcow2", "qcow2"))


def test_steps_are_told_and_timed(play: Maker, tmp_path: Path) -> None:
    steps: list[str] = []
    run = play(
        "say message Opening; echo '[ 0.0] Opening'; sleep 0.2; say warning 'no grub'; say message Done", on_step=steps.append
    )
    found = run.convert(DISKS)
    assert steps == ["Opening", "Done"]
    assert list(found.seconds) == steps
    assert found.seconds["Opening"] >= 0.2
    assert found.warnings == ("no grub",)
    assert "[ 0.0] Opening" in (tmp_path / "v2v.log").read_text()
    assert (tmp_path / "v2v.log").stat().st_mode & 0o777 == 0o600


def test_what_it_is_told(play: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBGUESTFS_BACKEND", "libvirt")
    monkeypatch.setenv("LIBGUESTFS_TRACE", "1")
    run = play(
        f"cp {tmp_path}/v2v.xml {tmp_path}/seen.xml", tcg=True, root="/dev/sda2", virtio_win="/w.iso", virt_tools="/tools"
    )
    run.convert(DISKS)
    argv = (tmp_path / "argv").read_text().split()
    assert argv == f"-i libvirtxml --machine-readable=stream:stdout --root /dev/sda2 -- {tmp_path}/v2v.xml".split()
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert env["LIBGUESTFS_BACKEND"] == "direct"
    assert env["LIBGUESTFS_BACKEND_SETTINGS"] == "force_tcg"
    assert env["LIBGUESTFS_TRACE"] == "0"
    assert env["VIRTIO_WIN"] == "/w.iso"
    assert env["VIRT_TOOLS_DATA_DIR"] == "/tools"
    assert (tmp_path / "stdin").read_bytes() == b""
    disks = ET.parse(tmp_path / "seen.xml").findall("devices/disk")
    assert [disk.find("source").get("file") for disk in disks] == [disk.path for disk in DISKS]  # type: ignore[union-attr]


def test_a_root_that_it_has_no_name_for_must_be_the_only_one(play: Maker, tmp_path: Path) -> None:
    """The real one, 2.2: `unknown --root option: btrfsvol:/dev/sda3/root`."""
    play("true", root="btrfsvol:/dev/sda3/root").convert(DISKS)
    assert "--root\nsingle\n" in (tmp_path / "argv").read_text()


def test_options_are_used_where_the_program_says_it_has_them(play: Maker, tmp_path: Path) -> None:
    play("true", block_driver="virtio-scsi").convert(DISKS)
    assert "--block-driver" not in (tmp_path / "argv").read_text()
    assert "single" in (tmp_path / "argv").read_text().split()
    play("true", able=ABLE + "block-driver-option\\n", block_driver="virtio-scsi").convert(DISKS)
    assert "--block-driver\nvirtio-scsi\n" in (tmp_path / "argv").read_text()


def test_a_program_that_cannot_do_it_is_refused(play: Maker) -> None:
    with pytest.raises(GuestError, match="libvirt's XML"):
        play("true", able="virt-v2v\\n").convert(DISKS)
    with pytest.raises(GuestError, match="install virt-v2v"):
        features("/nowhere/virt-v2v-in-place")


def test_the_error_is_the_line_that_matters(play: Maker, tmp_path: Path) -> None:
    run = play(
        "say message Converting; say error 'One of rhsrvany.exe or pvvxsvc.exe is missing in /usr/share/virt-tools.'\n"
        "echo 'virt-v2v-in-place: error: One of rhsrvany' >&2; echo noise >&2; exit 1"
    )
    with pytest.raises(GuestError, match=r"rhsrvany.exe or pvvxsvc.exe is missing") as failed:
        run.convert(DISKS)
    assert "VIRT_TOOLS_DATA_DIR" in failed.value.fix
    assert failed.value.where == str(tmp_path / "v2v.log")
    assert "noise" in (tmp_path / "v2v.log").read_text()


def test_without_a_message_the_error_comes_from_stderr(play: Maker) -> None:
    with pytest.raises(GuestError, match="multi-boot operating systems are not supported") as failed:
        play("echo 'virt-v2v-in-place: error: multi-boot operating systems are not supported by virt-v2v' >&2; exit 1").convert(
            DISKS
        )
    assert "--root" in failed.value.fix
    with pytest.raises(GuestError, match="exit code 3"):
        play("exit 3").convert(DISKS)
    with pytest.raises(GuestError, match="exit code -9"):
        play("kill -9 $$").convert(DISKS)


@pytest.mark.slow
def test_at_its_deadline_all_of_it_is_killed(play: Maker, tmp_path: Path) -> None:
    """The appliance's QEMU too: an orphan would hold the overlay's lock."""
    run = play(f"say message Converting; sleep 300 & echo $! >{tmp_path}/pid; wait", deadline_s=1.0)
    with pytest.raises(GuestError, match=r"within 1 s .*\(in: Converting\)"):
        run.convert(DISKS)
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_full_folder_ends_it(play: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virt_v2v, "ROOM", 1 << 60)
    with pytest.raises(GuestError, match="no room left"):
        play("say message Converting; sleep 300").convert(DISKS)


def test_its_words_are_bounded(play: Maker, tmp_path: Path) -> None:
    flood = "head -c 20000000 /dev/zero; head -c 20000000 /dev/zero >&2; echo"
    run = play(f"say message Go; {flood}; echo '{{ [['; echo '{{}}'; say message End")
    assert list(run.convert(DISKS).seconds) == ["Go", "End"]
    assert (tmp_path / "v2v.log").stat().st_size <= LOG_LIMIT


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("inspection could not detect the source guest (or physical machine). No root device found", "boot disk first"),
        ("The guest is hibernated. Windows Hibernation or Fast Restart is in use", "shutdown /s /f /t 0"),
        ("filesystem was mounted read-only: unclean file system", "shutdown /s /f /t 0"),
        ("not enough free space for conversion on filesystem '/boot'. 3.0 MB free < 50 MB needed", "inside the guest"),
        ("libguestfs error: /usr/bin/supermin exited with error status 1.", "SUPERMIN_KERNEL"),
        ("something new", "the disks hold what they held"),
    ],
)
def test_failures_say_what_helps(said: str, fix: str) -> None:
    error = failure(
        [f"virt-v2v-in-place: error: {said}", "", "If reporting bugs, run virt-v2v-in-place with debugging"], 1, log="l"
    )
    assert error.what == f"virt-v2v-in-place failed: {said}"
    assert fix in error.fix


@pytest.mark.parametrize("path", ["/a&b<c>'\".qcow2", "/ü/]]>.qcow2", "/tab\there"])
def test_paths_are_text(path: str) -> None:
    found = ET.fromstring(conversion_xml(VM, [GuestDisk(path, "qcow2")]))
    assert found.find("devices/disk/source").get("file") == path  # type: ignore[union-attr]
    assert found.find("devices/disk/driver").get("type") == "qcow2"  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["/\x00", "/\x1b[2J", "/\udcff", "/\ufffe"])
def test_paths_that_xml_cannot_hold_are_refused(path: str) -> None:
    with pytest.raises(GuestError, match="XML"):
        conversion_xml(VM, [GuestDisk(path)])


def test_many_disks_and_uefi() -> None:
    found = ET.fromstring(conversion_xml(replace(VM, firmware=Firmware.UEFI), [GuestDisk(f"/{n}") for n in range(30)]))
    names = [target.get("dev") for target in found.findall("devices/disk/target")]
    assert names[:2] == ["sda", "sdb"]
    assert names[25:28] == ["sdz", "sdaa", "sdab"]
    assert found.find("os").get("firmware") == "efi"  # type: ignore[union-attr]
    assert found.find("name").text == "morph"  # type: ignore[union-attr]


def test_the_one_that_is_installed_is_understood() -> None:
    program = find_virt_v2v()
    if program is None:
        pytest.skip("virt-v2v is not installed")
    assert "in-place" in features(program)
    assert os.access(program, os.X_OK)
