"""What serial lines mean, and how a file that a hostile guest writes is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.domain import serial
from tokvm.domain.serial import FILE_LIMIT, LOGIN, READ_AT_ONCE, TAIL, SerialLog, find_failure


@pytest.mark.parametrize("line", ["web login: ", "Debian GNU/Linux 12 web ttyS0 login:", "login: [   12.345678] audit: x"])
def test_a_login_is_life(line: str) -> None:
    assert re.search(LOGIN, line)


@pytest.mark.parametrize("line", ["Last login: Mon Nov 2", "login: root", "Starting login service"])
def test_a_word_about_logins_is_not(line: str) -> None:
    assert not re.search(LOGIN, line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ALERT!  UUID=6a0c does not exist.  Dropping to a shell!", "root disk"),
        ("Gave up waiting for root file system device.  Common problems:", "root disk"),
        ("(initramfs) ", "initramfs"),
        ("[    1.9] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)", "panicked"),
        ("Entering emergency mode. Exit the shell to continue.", "dracut"),
        ("dracut:/# ", "dracut"),
        ('You are in emergency mode. After logging in, type "journalctl -xb"', "emergency"),
        ("grub rescue> ", "modules"),
        ("grub> ", "configuration"),
        ("error: file `/boot/initrd.img-6.1.0-9-amd64' not found.", "kernel"),
        ("error: ../../grub-core/loader/i386/linux.c:1119:you need to load the kernel first.", "kernel"),
        ("UEFI Interactive Shell v2.2", "shell"),
        ("Shell> ", "shell"),
        ('BdsDxe: starting Boot0002 "EFI Internal Shell" from Fv(7CB8BDC9-F8EB-4F34-AAEA-3EE4AF6516A1)', "shell"),
        (">>Start PXE over IPv4.", "network"),
        ("No bootable device.", "BIOS"),
    ],
)
def test_ways_not_to_boot(line: str, why: str) -> None:
    failure = find_failure(line)
    assert failure is not None
    assert why in failure.why
    assert line.strip() in str(failure)


@pytest.mark.parametrize(
    "line",
    [
        "[  1.2] dracut-initqueue[400]: Warning: dracut-initqueue: timeout, still waiting for following initqueue hooks:",
        "error: no video mode activated.",
        "error: file `/boot/grub/fonts/unicode.pf2' not found.",
        "Boot failed: not a bootable disk",
        'BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0): Not Found',
        "[FAILED] Failed to start VMware Tools.",
        "Begin: Mounting root file system ...",
    ],
)
def test_what_a_guest_survives(line: str) -> None:
    assert find_failure(line) is None


@pytest.fixture
def log(tmp_path: Path) -> SerialLog:
    return SerialLog(tmp_path / "serial.log")


def write(log: SerialLog, data: bytes) -> None:
    with log.path.open("ab") as file:
        file.write(data)


def test_a_file_that_is_not_there_yet_says_nothing(log: SerialLog) -> None:
    assert log.new_lines() == []
    assert log.tail == ""


def test_lines_come_once_and_a_prompt_when_it_stands(log: SerialLog) -> None:
    write(log, b"one\r\n\r\ntwo\nLast login: ")
    assert log.new_lines() == ["one", "two"]
    write(log, b"Mon\nweb login: ")
    assert log.new_lines() == ["Last login: Mon"]
    assert log.new_lines() == ["web login: "]
    write(log, b"root\nthree")
    assert log.new_lines() == ["web login: root"]
    assert log.new_lines() == ["three"]


def test_escapes_are_left_out_even_when_they_come_in_pieces(log: SerialLog) -> None:
    write(log, b"\x1bc\x1b[2J\x1b[01;01HSeaBIOS\x1b[3;1H\x1b[0mgrub rescue> \x1b[?2")
    assert log.new_lines() == ["SeaBIOS"]
    write(log, b"5h\nnext \xff\x07\n")
    assert log.new_lines() == ["grub rescue> ", "next \ufffd\x07"]
    assert log.tail == "SeaBIOS\ngrub rescue> \nnext \ufffd\\x07"


@pytest.mark.parametrize("bios", [b"Booting from ROM..", b"Booting from Hard Disk..."])
def test_the_guests_first_words_are_its_own_behind_a_bios_that_ends_no_line(log: SerialLog, bios: bytes) -> None:
    write(log, b"SeaBIOS (version 1.16)\r\n" + bios + b"\x1bcGave up waiting for root device\r\n" + bios + b"\r\n" + bios)
    assert log.new_lines() == ["SeaBIOS (version 1.16)", bios.decode(), "Gave up waiting for root device", bios.decode()]
    assert log.new_lines() == [bios.decode()]


def test_a_flood_is_skipped_and_cut(log: SerialLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "FILE_LIMIT", 2 * READ_AT_ONCE)
    write(log, b"x" * (3 * READ_AT_ONCE) + b"\nend\n")
    assert log.new_lines()[-1] == "end"
    assert log.path.stat().st_size == 0
    write(log, b"after\n")
    assert log.new_lines() == ["after"]
    assert len(log.tail) <= TAIL
    assert FILE_LIMIT < 1 << 30


def test_a_file_put_aside_is_read_from_its_new_beginning(log: SerialLog) -> None:
    write(log, b"a long first line\n")
    log.new_lines()
    log.path.write_bytes(b"new\n")
    assert log.new_lines() == ["new"]


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_in_any_pieces(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    log = SerialLog(tmp_path_factory.mktemp("s") / "log")
    for piece in pieces:
        write(log, piece)
        assert all(len(line) <= serial.LONGEST_LINE for line in log.new_lines())
    assert all(part.isprintable() for part in log.tail.split("\n"))
