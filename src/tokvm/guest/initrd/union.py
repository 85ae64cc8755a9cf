"""depmod's files for an initramfs and the modules that are added to it.

What the initramfs has of them stays as it is, line by line; the added modules' lines come from the root's own files, where
depmod in the guest put them. So nobody reads a module's insides, and depmod is not needed. Both forms are written: the texts
(busybox) and the binary indexes (kmod: udev, modprobe).
"""

from __future__ import annotations

from collections.abc import Mapping

from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.archive import Archive, module_name
from tokvm.guest.initrd.index import index
from tokvm.guest.initrd.lines import lines, lines_of
from tokvm.guest.initrd.modules import Lists

DEP_LIMIT = 8 * MiB  # the largest in the field: 1


def depmod_files(
    archive: Archive, folder: str, lists: Lists, present: Mapping[str, str], added: Mapping[str, str]
) -> dict[str, bytes]:
    """modules.dep and its kin by file name. `folder`: of the modules in the initramfs; `present` and `added`: module → its path
    below it."""
    dep = _dep_lines(archive.text(f"{folder}/modules.dep"), lists, present, added)
    aliases = _lines(archive.text(f"{folder}/modules.alias"), lists.aliases, "alias", 2, present, added)
    softdeps = _lines(archive.text(f"{folder}/modules.softdep"), lists.softdeps, "softdep", 1, present, added)
    order = {module_name(line.partition(":")[0]): number for number, line in enumerate(dep)}
    files = {
        "modules.dep": _text(dep),
        "modules.dep.bin": index((name, number, dep[number]) for name, number in order.items()),
        "modules.alias": _text(aliases),
        "modules.alias.bin": index(_alias_entries(aliases, order)),
    }
    return files | ({"modules.softdep": _text(softdeps)} if softdeps else {})


def _dep_lines(text: str | None, lists: Lists, present: Mapping[str, str], added: Mapping[str, str]) -> list[str]:
    where = {**present, **added}
    found = [line for line in lines(text or "") if module_name(line.partition(":")[0]) not in added]
    known = {module_name(line.partition(":")[0]) for line in found}
    fresh = sorted(name for name in where if name not in known and name in lists.files)
    size = 0
    for name in fresh:
        needs = dict.fromkeys(where[need] for need in lists.needs(name) if need in where)
        found.append(f"{where[name]}:{''.join(f' {need}' for need in needs)}")
        size += len(found[-1])
        if size > DEP_LIMIT:  # a short name in modules.dep may stand for a long path in the initramfs
            raise GuestError(f"a modules.dep of more than {DEP_LIMIT} bytes", fix="run depmod in the guest")
    return found


def _lines(text: str | None, roots: str, kind: str, at: int, present: Mapping[str, str], added: Mapping[str, str]) -> list[str]:
    """The initramfs' own lines, and the root's about the added modules (about all, where the initramfs has no such file)."""
    names = added if text is not None else {**present, **added}
    found = list(lines(text or ""))
    known = frozenset(found)
    return found + [line for line in lines_of(roots, kind, names, at=at) if line not in known]


def _alias_entries(found: list[str], order: Mapping[str, int]) -> list[tuple[str, int, str]]:
    entries = []
    for line in found:
        parts = line.split(None, 3)
        if len(parts) == 3 and parts[0] == "alias":
            name = parts[2].replace("-", "_")
            entries.append((underscored(parts[1]), order.get(name, len(order)), name))
    return entries


def underscored(alias: str) -> str:
    """`-` as `_`, but not inside `[a-z]` (libkmod's alias_normalize)."""
    parts = alias.replace("[", "\0[").replace("]", "]\0").split("\0")
    return "".join(part if part.startswith("[") else part.replace("-", "_") for part in parts)


def _text(found: list[str]) -> bytes:
    text = "".join(f"{line}\n" for line in found)
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as exc:
        raise GuestError(f"a module list that depmod would not write: {readable(text[exc.start :], limit=60)}") from exc
