"""Lines of the text lists that come with a kernel's modules (modules.dep, .alias, .softdep, .builtin), in bounded memory.

They come from the guest, whole, up to 16 MiB each. The largest in the field (a distribution's kernel for everything): 7000
modules, 45 000 aliases, 4 KiB in one line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from tokvm.core.text import readable
from tokvm.core.units import KiB
from tokvm.guest.base import GuestError

LONGEST_LINE = 64 * KiB
MOST_LINES = 500_000


def lines(text: str) -> Iterator[str]:
    """One line at a time, without its end; nothing else of the text is copied. GuestError when there is no end of them."""
    at, count = 0, 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        count += 1
        if end - at > LONGEST_LINE or count > MOST_LINES:
            raise GuestError(
                f"a list of the guest's modules is beyond every measure: line {count} has {end - at} bytes",
                where=readable(text[at : at + 60]),
                fix="run depmod in the guest",
            )
        yield text[at:end]
        at = end + 1


def lines_of(text: str, kind: str, names: Collection[str], *, at: int) -> Iterator[str]:
    """The lines `kind … …` whose word number `at` is one of these modules."""
    for line in lines(text):
        parts = line.split(None, at + 1)
        if len(parts) > at and parts[0] == kind and parts[at].replace("-", "_") in names:
            yield line
