"""The ledger's rules, in Python and in the guest's own awk, on the same damaged ledgers."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from tokvm.lab.ledger import LedgerCheck, check_ledger, fold
from tokvm.lab.programs import find_program


def ledger(count: int, *, seed: int = 1, start: int = 0, previous: int = 0) -> list[bytes]:
    """`count` sound records after number `start`, whose sum was `previous`."""
    noise, lines = random.Random(seed), []
    for number in range(start + 1, start + count + 1):
        fields = [number, 12345, number * 10, *(noise.randrange(1 << 31) for _ in range(8))]
        previous = fold(previous, fields)
        lines.append(b" ".join(b"%d" % field for field in [*fields, previous]) + b"\n")
    return lines


def guest_verdict(content: bytes, folder: Path) -> dict[str, int]:
    """What the guest would report at boot: the same pipe as in guest_init.sh."""
    file = folder / "ledger"
    file.write_bytes(content.replace(b"\0", b"#"))
    script = str(resources.files("tokvm.lab").joinpath("data/ledger.awk"))
    busybox = find_program("busybox", package="busybox-static")
    said = subprocess.run([busybox, "awk", "-f", script, str(file)], capture_output=True, check=True, text=True).stdout
    return dict(zip(("last", "sum", "count", "missing", "bad", "torn", "bytes"), map(int, said.split()), strict=True))


def both(content: bytes, folder: Path) -> LedgerCheck:
    host, guest = check_ledger(content), guest_verdict(content, folder)
    assert (host.last, host.sum, host.count, host.missing, host.bad, int(host.torn)) == tuple(guest.values())[:6]
    return host


def flip(line: bytes, at: int) -> bytes:
    return line[:at] + (b"7" if line[at : at + 1] != b"7" else b"3") + line[at + 1 :]


def swap(lines: list[bytes], one: int, other: int) -> list[bytes]:
    lines = list(lines)
    lines[one], lines[other] = lines[other], lines[one]
    return lines


def test_a_sound_ledger_is_sound(tmp_path: Path) -> None:
    lines = ledger(200)
    found = both(b"".join(lines), tmp_path)
    assert found.sound
    assert not found.torn
    assert (found.last, found.count) == (200, 200)
    assert found.sums[200] == int(lines[-1].split()[-1])


def test_an_empty_ledger_is_sound(tmp_path: Path) -> None:
    found = both(b"", tmp_path)
    assert found.sound
    assert (found.last, found.sum, found.torn) == (0, 0, False)


@pytest.mark.parametrize("kept", [1, 5, 40])
def test_a_torn_tail_is_no_loss(tmp_path: Path, kept: int) -> None:
    lines = ledger(20)
    content = b"".join(lines[:19])
    found = both(content + lines[19][:kept], tmp_path)
    assert found.sound
    assert (found.torn, found.last) == (True, 19)
    assert guest_verdict(content + lines[19][:kept], tmp_path)["bytes"] == len(content)


def test_a_tail_that_lost_only_its_newline_is_whole(tmp_path: Path) -> None:
    found = both(b"".join(ledger(20)).removesuffix(b"\n"), tmp_path)
    assert (found.last, found.torn, found.sound) == (20, False, True)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda lines: [*lines[:7], flip(lines[7], 30), *lines[8:]], "a digit changed"),
        (lambda lines: [*lines[:7], flip(lines[7], -3), *lines[8:]], "a digit of the sum changed"),
        (lambda lines: lines[:7] + lines[8:], "a record is missing"),
        (lambda lines: lines[1:], "the first record is missing"),
        (lambda lines: swap(lines, 7, 8), "two records changed places"),
        (lambda lines: [*lines[:8], lines[7], *lines[8:]], "a record came twice"),
        (lambda lines: [*lines[:7], b"\0" * len(lines[7]) + b"\n", *lines[8:]], "a record became zeros"),
        (lambda lines: lines[:7] + ledger(13, seed=2, start=7, previous=99), "the rest is of another history"),
        (lambda lines: [*lines[:7], lines[7].replace(b"\n", b" 5\n"), *lines[8:]], "a record has a field too many"),
    ],
)
def test_damage_shows(tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], why: str) -> None:
    found = both(b"".join(damage(ledger(20))), tmp_path)
    assert not found.sound, why


def test_missing_records_are_counted(tmp_path: Path) -> None:
    lines = ledger(20)
    found = both(b"".join(lines[:5] + lines[9:]), tmp_path)
    assert (found.missing, found.bad, found.last, found.count) == (4, 0, 20, 16)


def test_thousands_of_records_take_no_time(tmp_path: Path) -> None:
    assert both(b"".join(ledger(5000)), tmp_path).count == 5000
