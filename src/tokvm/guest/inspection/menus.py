"""Boot menus other than grub.cfg: Boot Loader Specification entries, systemd-boot, GRUB 0.97 (legacy), extlinux.

BLS (Boot Loader Specification, UAPI.1): one file per entry, `key value` lines (title, version, linux, initrd, options); GRUB of
RHEL 8+ and Fedora reads them by `blscfg`, sorted by version, newest first, and expands `$kernelopts` from grubenv.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from tokvm.guest.inspection.boot_entry import ENTRIES_LIMIT, BootEntry, options_of, version_key, words_of


def parse_bls(name: str, text: str, variables: Mapping[str, str]) -> BootEntry:
    """One entry; `name` is its file's. Keys may come more than once (initrd, options)."""
    fields: dict[str, list[str]] = {}
    for line in text.splitlines()[:200]:
        key, _, value = line.strip().partition(" ")
        if value and not key.startswith("#"):
            fields.setdefault(key, []).extend(words_of(value) if key in {"options", "initrd"} else [value.strip()])
    return BootEntry(
        title=" ".join(fields.get("title", [])),
        ident=name.removesuffix(".conf"),
        kernel=" ".join(fields.get("linux", fields.get("efi", fields.get("uki", [])))[:1]),
        initrds=tuple(one for one in fields.get("initrd", []) if not one.startswith("$"))[:8],
        options=options_of(fields.get("options", []), variables),
    )


def bls_entries(files: Mapping[str, str], variables: Mapping[str, str]) -> list[BootEntry]:
    """The entries with a kernel, in the menu's order: newest version first."""
    entries = (parse_bls(name, text, variables) for name, text in files.items())
    return sorted((one for one in entries if one.kernel), key=lambda one: version_key(one.ident), reverse=True)


def grub_bls_default(entries: list[BootEntry], wanted: str) -> BootEntry | None:
    """GRUB's choice: by id or title, by index, else the first."""
    for one in entries:
        if wanted and wanted in {one.ident, one.title}:
            return one
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 4 and int(wanted) < len(entries):
        return entries[int(wanted)]
    return entries[0] if entries else None


def systemd_boot_default(entries: list[BootEntry], loader_conf: str) -> BootEntry | None:
    """loader.conf's `default` is a glob over the entries' file names; else the newest entry, as loader.conf(5) says."""
    lines = (line.split(None, 1) for line in loader_conf.splitlines()[:200])
    wanted = next((one[1].strip() for one in lines if len(one) == 2 and one[0] == "default"), "")
    fit = [one for one in entries if wanted and fnmatchcase(f"{one.ident}.conf", wanted[:256])]
    fit += [one for one in entries if one.ident == wanted.removesuffix(".conf")]
    return next(iter(fit or entries), None)


def legacy_grub_default(text: str) -> BootEntry | None:
    """menu.lst or grub.conf: `default N` counts the `title`s. `default saved` and nonsense read as 0."""
    default, sections = "0", _sections(text, "title")
    for key, value in _pairs(text):
        if key == "default":
            default = value
            break
    entries = [
        BootEntry(
            title,
            "",
            *_kernel_and_initrds(fields.get("kernel", ""), fields.get("initrd", "")),
            options_of(words_of(fields.get("kernel", ""))[1:], {}),
        )
        for title, fields in sections
        if fields.get("kernel")
    ]
    index = int(default) if default.isascii() and default.isdigit() and len(default) < 4 else 0
    return next(iter(entries[index : index + 1] or entries), None)


def extlinux_default(text: str) -> BootEntry | None:
    """extlinux.conf / syslinux.cfg: `DEFAULT label`, `LABEL`, `LINUX`/`KERNEL`, `APPEND`, `INITRD` (or `initrd=` in APPEND)."""
    default = next((value for key, value in _pairs(text) if key == "default"), "")
    entries = []
    for label, fields in _sections(text, "label"):
        words = words_of(fields.get("append", ""))
        inside = [one.removeprefix("initrd=") for one in words if one.startswith("initrd=")]
        kernel = fields.get("linux", fields.get("kernel", ""))
        initrds = fields.get("initrd", inside[0] if inside else "").split(",")
        options = options_of([one for one in words if not one.startswith("initrd=")], {})
        entries.append(BootEntry(fields.get("menu label", label), label, kernel, tuple(filter(None, initrds))[:8], options))
    entries = [one for one in entries if one.kernel]
    return next((one for one in entries if one.ident == default), entries[0] if entries else None)


def _kernel_and_initrds(kernel: str, initrd: str) -> tuple[str, tuple[str, ...]]:
    return (words_of(kernel) or [""])[0], tuple(words_of(initrd))[:8]


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    """`key value` or `key=value` lines, keys in lower case."""
    for line in text.splitlines()[:20_000]:
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        if "=" in key and not key.startswith("#"):
            key, _, value = line.strip().partition("=")
        if key and not key.startswith("#"):
            yield key.lower(), value.strip(" =")


def _sections(text: str, opener: str) -> list[tuple[str, dict[str, str]]]:
    """The `opener` lines' values with the pairs below each."""
    found: list[tuple[str, dict[str, str]]] = []
    for key, value in _pairs(text):
        if key == opener and len(found) < ENTRIES_LIMIT:
            found.append((value, {}))
        elif found:
            found[-1][1].setdefault(key, value)
    return found
