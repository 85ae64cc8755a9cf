"""The guest's ledger as seen from the host: the same rules as data/ledger.awk, which the guest itself uses.

    n boot up w1 … w8 sum\\n          all decimal; boot: 31 bits of the boot id; up: centiseconds; w: noise
    sum = fold of (sum of the record before, n, boot, up, w1 … w8): h = (h * 65599 + field) mod (2^31 - 1)

The sum chains the records, so equal sums at the same number mean equal histories up to there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FIELDS = 12
MULTIPLIER = 65599
MODULUS = 2**31 - 1
MAX_DIGITS = 10


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    """`last` and `sum` are of the last record; `missing` counts gaps, `bad` records that do not fit; `torn` is a last line cut
    short, which nobody was told of; `sums` maps number → sum of every record present."""

    last: int
    sum: int
    missing: int
    bad: int
    torn: bool
    sums: dict[int, int]

    @property
    def count(self) -> int:
        return len(self.sums)

    @property
    def sound(self) -> bool:
        return self.missing == 0 and self.bad == 0


def check_ledger(content: bytes) -> LedgerCheck:
    """Verify a whole ledger file."""
    sums: dict[int, int] = {}
    last = last_sum = missing = bad = 0
    chained, torn, before = True, False, (0, 0)
    for line in content.removesuffix(b"\n").split(b"\n") if content else ():
        before, torn = (last, last_sum), False
        record = _record(line)
        number = record[0] if record else 0
        if record and (
            number > last + 1 or (number == last + 1 and (not chained or fold(last_sum, record[:-1]) == record[-1]))
        ):
            missing += number - last - 1
            last, last_sum, chained = number, record[-1], True
            sums[number] = last_sum
        else:
            bad, last, chained, torn = bad + 1, last + 1, False, True
    if torn:
        (last, last_sum), bad = before, bad - 1
    return LedgerCheck(last, last_sum, missing, bad, torn, sums)


def fold(previous: int, fields: Iterable[int]) -> int:
    """The sum of a record from the one before it and its own other fields."""
    for field in fields:
        previous = (previous * MULTIPLIER + field) % MODULUS
    return previous


def _record(line: bytes) -> tuple[int, ...] | None:
    fields = line.split()
    if len(fields) != FIELDS or not all(field.isdigit() and len(field) <= MAX_DIGITS for field in fields):
        return None
    return tuple(int(field) for field in fields)
