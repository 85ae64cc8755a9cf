"""What the script in the guest says, line by line; data/prestage.sh has the list of lines.

    anything (a profile's greeting) | tokvm-prestage 1 | lines | end | anything

All of it comes from a guest that nobody trusts: bounded, each word of a known shape, and whatever else is refused as a whole.
Only the text of `said` is free; it is shown, never read for meaning.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tokvm.core.text import readable
from tokvm.core.units import KiB, MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.modules import BUS, DISKS

HEADER = b"tokvm-prestage 1"
END = b"end"
MOST = 4 * MiB
LONGEST_LINE = 16 * KiB
MOST_KERNELS = 64
MOST_WORDS = 4096
"""Lines of one kind in one report: network cards, unified kernels."""
SAID_KEPT = 20
DRIVERS = (BUS, *DISKS)

_WORD = r"[A-Za-z0-9._+~:/@=,-]{1,200}"
_VERSION = r"[A-Za-z0-9._+~-]{1,120}"
_PATH = r"/[A-Za-z0-9._+~:/@=,-]{1,400}"
_NUMBER = r"[0-9]{1,15}"
_LINE = re.compile(
    "|".join(
        (
            rf"(system|host|running|mac) ({_WORD})",
            rf"(distribution) ({_WORD}) ({_WORD})",
            r"(refused) (no-linux|no-root|no-room|no-folder|busy|unwritable)",
            r"(generator) (initramfs-tools|dracut|mkinitcpio|none)",
            rf"(unified) ({_PATH})",
            rf"(kernel) ({_VERSION}) ({_PATH}) ({_NUMBER}) ({_NUMBER}) (listed|unreadable|signed)",
            rf"(module) ({_VERSION}) ({'|'.join(DRIVERS)}) (inside|builtin|loadable|none)",
            rf"(config) ({_PATH}) (written|kept|back|stuck)",
            r"(rebuilt) ([0-9]{1,3})",
        )
    )
)


class Held(StrEnum):
    """Where a kernel has a driver: in its initramfs, in itself, below /lib/modules only, nowhere."""

    INSIDE = "inside"
    BUILTIN = "builtin"
    LOADABLE = "loadable"
    NONE = "none"


class Seen(StrEnum):
    """LISTED: the guest's own lister showed what is inside. SIGNED: a signature lies beside it."""

    LISTED = "listed"
    UNREADABLE = "unreadable"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel and its initramfs. size and free (on the file system that holds it) in bytes."""

    version: str
    initrd: str
    size: int
    free: int
    seen: Seen
    drivers: Mapping[str, Held]

    @property
    def lacks(self) -> tuple[str, ...]:
        """Drivers that the kernel has and its initramfs has not."""
        return tuple(name for name in DRIVERS if self.drivers[name] is Held.LOADABLE)

    @property
    def hopeless(self) -> bool:
        """The kernel itself has no virtio: nothing could be put into its initramfs."""
        return self.drivers[BUS] is Held.NONE or all(self.drivers[name] is Held.NONE for name in DISKS)

    @property
    def ready(self) -> bool:
        return not self.hopeless and not self.lacks


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the script. macs: lower case, of its real cards. before: the kernels as they were found; after: once more,
    behind a rebuild that ended with `rebuilt` (None: none was made). config: path and what became of it, in order. refused: the
    script's own word, "" for none. said: the rebuild's last lines."""

    system: str
    host: str
    running: str
    distribution: str
    macs: frozenset[str]
    refused: str
    generator: str
    unified: tuple[str, ...]
    before: tuple[Kernel, ...]
    after: tuple[Kernel, ...]
    config: tuple[tuple[str, str], ...]
    rebuilt: int | None
    said: tuple[str, ...]


@dataclass
class Reader:
    """Takes the script's output as it comes. on_said: each line of the rebuild. where: for messages."""

    where: str
    on_said: Callable[[str], None]
    _rest: bytearray = field(default_factory=bytearray)
    _taken: int = 0
    _begun: bool = False
    _ended: bool = False
    _words: list[tuple[str, ...]] = field(default_factory=list)
    _said: deque[str] = field(default_factory=lambda: deque(maxlen=SAID_KEPT))

    def feed(self, piece: bytes) -> bool:
        """True once the report is whole. GuestError when it says too much, or what the script never says."""
        self._taken += len(piece)
        if self._taken > MOST:
            raise self._odd(f"it said more than {MOST // MiB} MiB")
        self._rest += piece
        lines = self._rest.split(b"\n")
        self._rest = lines.pop()
        if max(len(self._rest), *map(len, lines), 0) > LONGEST_LINE:
            raise self._odd(f"a line has more than {LONGEST_LINE} bytes")
        for line in lines:
            self._take(bytes(line))
        return self._ended

    @property
    def begun(self) -> bool:
        """The script's first line came: a POSIX shell runs it."""
        return self._begun

    def report(self) -> Report:
        """GuestError when it ended early, or its lines do not fit together."""
        if not self._ended:
            raise self._odd("it ended in the middle")
        at = next((n for n, words in enumerate(self._words) if words[0] == "rebuilt"), len(self._words))
        return Report(
            system=self._one("system"),
            host=self._one("host"),
            running=self._one("running"),
            distribution=self._one("distribution", count=2),
            macs=frozenset(words[1].lower() for words in self._words if words[0] == "mac"),
            refused=self._one("refused", missing=""),
            generator=self._one("generator", missing="none"),
            unified=tuple(words[1] for words in self._words if words[0] == "unified"),
            before=self._kernels(self._words[:at]),
            after=self._kernels(self._words[at:]),
            config=tuple((words[1], words[2]) for words in self._words if words[0] == "config"),
            rebuilt=next((int(words[1]) for words in self._words if words[0] == "rebuilt"), None),
            said=tuple(self._said),
        )

    def _take(self, line: bytes) -> None:
        if self._ended or not self._begun:
            self._begun = self._begun or line == HEADER
        elif line == END:
            self._ended = True
        elif line.startswith(b"said "):
            text = readable(line[5:].decode("utf-8", "replace").replace("\r", " ").strip())
            self._said.append(text)
            self.on_said(text)
        else:
            match = _LINE.fullmatch(line.decode("utf-8", "replace"))
            if match is None or len(self._words) >= MOST_WORDS:
                raise self._odd(f"`{readable(line.decode('utf-8', 'replace'), limit=80)}`")
            self._words.append(tuple(word for word in match.groups() if word is not None))

    def _one(self, kind: str, *, count: int = 1, missing: str | None = None) -> str:
        found = [words for words in self._words if words[0] == kind]
        if len(found) > 1 or (not found and missing is None):
            raise self._odd(f"it has {len(found)} lines `{kind}`")
        return " ".join(word for word in found[0][1 : 1 + count] if word != "-") if found else str(missing)

    def _kernels(self, lines: list[tuple[str, ...]]) -> tuple[Kernel, ...]:
        drivers: dict[str, dict[str, Held]] = {}
        for _, version, name, held in (words for words in lines if words[0] == "module"):
            drivers.setdefault(version, {})[name] = Held(held)
        found = [
            Kernel(version, initrd, int(size), int(free) * KiB, Seen(seen), drivers.get(version, {}))
            for _, version, initrd, size, free, seen in (words for words in lines if words[0] == "kernel")
        ]
        if len(found) > MOST_KERNELS or any(len(one.drivers) != len(DRIVERS) for one in found):
            raise self._odd("its kernels and modules do not fit together")
        return tuple(found)

    def _odd(self, what: str) -> GuestError:
        return GuestError(
            f"the guest's answer cannot be understood: {what}",
            where=self.where,
            fix="is it the guest of this VM? Log in by hand and see what a plain `sh` says there",
        )
