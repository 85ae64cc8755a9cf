"""grub.cfg of GRUB 2, as grub-mkconfig writes it: its menu, and the entry that it starts by default.

    set default="${saved_entry}"
    menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-…' {
            linux   /vmlinuz-6.1.0-9-amd64 root=UUID=… ro quiet
            initrd  /initrd.img-6.1.0-9-amd64
    }
    submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-…' { menuentry … }

No script is run: both arms of an `if` count, and the last `set` of a name wins, as grub-mkconfig puts the usual case last.
The default is an index, a title or an id, or several of them joined by `>` for submenus. GRUB takes the first entry
when its default is not there, and so do we. GRUB 2.06 manual (2021), 6.1 and 16.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokvm.guest.inspection.boot_entry import ENTRIES_LIMIT, BootEntry, options_of, words_of

LINES_LIMIT = 50_000
_DEPTH_LIMIT = 16
_SAVED = "${saved_entry}"


@dataclass(slots=True)
class _Item:
    """A menuentry, or a submenu with items of its own."""

    title: str
    ident: str
    kernel: str = ""
    initrds: tuple[str, ...] = ()
    words: list[str] = field(default_factory=list)
    items: list[_Item] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GrubMenu:
    """variables: what `set` gave, grubenv's above it. uses_bls: `blscfg` stands in it, so the entries are files of their own.
    enforces_signatures: `check_signatures=enforce`."""

    items: tuple[_Item, ...]
    variables: Mapping[str, str]
    uses_bls: bool

    @property
    def enforces_signatures(self) -> bool:
        return self.variables.get("check_signatures") == "enforce"

    @property
    def default(self) -> str:
        """What the menu starts by: index, title or id; "" when it does not say."""
        wanted = self.variables.get("default", "")
        return self.variables.get("saved_entry", "") if wanted == _SAVED else wanted

    def default_entry(self) -> BootEntry | None:
        """The entry that starts by default; None when the menu has none with a kernel."""
        item = _find(self.items, self.default) or _first(self.items)
        return None if item is None else self._entry(item)

    def _entry(self, item: _Item) -> BootEntry:
        return BootEntry(item.title, item.ident, item.kernel, item.initrds, options_of(item.words, self.variables))


def parse_grubenv(text: str) -> dict[str, str]:
    """grubenv: `name=value` lines in a block padded with `#` to 1024 bytes."""
    pairs = (line.partition("=") for line in text.splitlines()[:200] if not line.startswith("#"))
    return {name: value for name, found, value in pairs if found}


def parse_grub_cfg(text: str, grubenv: Mapping[str, str]) -> GrubMenu:
    variables: dict[str, str] = {}
    top: list[_Item] = []
    open_items: list[_Item | None] = []
    count, uses_bls = 0, False
    for line in text.splitlines()[:LINES_LIMIT]:
        stripped = line.strip()
        if stripped == "}":
            if open_items:
                open_items.pop()
            continue
        command = stripped.split(None, 1)[0] if stripped else ""
        uses_bls = uses_bls or command == "blscfg"
        if command == "set":
            _set(variables, stripped)
        elif command in {"menuentry", "submenu"} and stripped.endswith("{"):
            count += 1
            open_items.append(_added(top, open_items, stripped) if count <= ENTRIES_LIMIT else None)
        elif stripped.endswith("{"):
            open_items.append(None)  # a function
        elif open_items and open_items[-1] is not None:
            _fill(open_items[-1], command, stripped)
    return GrubMenu(tuple(top), {**variables, **grubenv}, uses_bls)


def _set(variables: dict[str, str], line: str) -> None:
    name, found, value = line[4:].partition("=")
    value = value.strip().strip("\"'")
    if found and len(variables) < 1000:
        variables[name.strip()] = value[:4096]


def _added(top: list[_Item], open_items: list[_Item | None], line: str) -> _Item:
    """The item that `line` begins, below the innermost open one; below none when that is too deep."""
    item = _begun(line)
    parent = next((one for one in reversed(open_items) if one is not None), None)
    if len(open_items) < _DEPTH_LIMIT:
        (top if parent is None else parent.items).append(item)
    return item


def _begun(line: str) -> _Item:
    words = words_of(line.removesuffix("{"))
    marks = [index for index, one in enumerate(words[:-1]) if one in {"--id", "$menuentry_id_option", "${menuentry_id_option}"}]
    return _Item(words[1] if len(words) > 1 else "", words[marks[0] + 1] if marks else "")


def _fill(item: _Item, command: str, line: str) -> None:
    if command in {"linux", "linux16", "linuxefi"} and not item.kernel:
        words = words_of(line)[1:]
        item.kernel, item.words = (words[0], words[1:]) if words else ("", [])
    elif command in {"initrd", "initrd16", "initrdefi"}:
        item.initrds = tuple(one for one in words_of(line)[1:] if not one.startswith("$"))[:8]


def _find(items: tuple[_Item, ...], wanted: str) -> _Item | None:
    """By `part>part`; a submenu stands for its first entry. None: no such entry, or one without a kernel."""
    level = list(items)
    found: _Item | None = None
    for part in wanted.split(">")[:_DEPTH_LIMIT]:
        found = next((one for one in level if part and part in {one.ident, one.title}), None)
        if found is None and part.isascii() and part.isdigit() and len(part) < 4 and int(part) < len(level):
            found = level[int(part)]
        if found is None:
            return None
        level = found.items
    return _first((found,)) if found else None


def _first(items: tuple[_Item, ...]) -> _Item | None:
    """The first entry with a kernel, looking into submenus in order."""
    waiting = list(items)
    while waiting:
        item = waiting.pop(0)
        if item.kernel:
            return item
        waiting = item.items + waiting
    return None
