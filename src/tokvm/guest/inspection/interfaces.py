"""Names of network interfaces that a Linux guest's configuration depends on: they change with the virtual hardware.

Read: ifupdown (interfaces(5)), netplan (YAML, only its `ethernets:` keys and `set-name`), NetworkManager keyfiles,
systemd-networkd `[Match] Name=`, ifcfg files (RHEL to 9, SUSE). Pure: texts in, names out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

NAMES_LIMIT = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,14}")
"""IFNAMSIZ is 16 with its NUL. Patterns (`en*`) bind nothing, so they are no names."""
# [ \t], never \s: with MULTILINE, \s* would run over a file of empty lines once for each of them.
_IFUPDOWN = re.compile(r"^[ \t]*(?:iface[ \t]+(\S+)|(?:auto|allow-\S+)[ \t]+(.+))", re.MULTILINE)
_KEYFILE = re.compile(r"^[ \t]*interface-name[ \t]*=[ \t]*(\S+)", re.MULTILINE)
_NETWORKD = re.compile(r"^[ \t]*\[Match\][ \t]*$(.*?)(?=^[ \t]*\[|\Z)", re.MULTILINE | re.DOTALL)
_NETWORKD_NAME = re.compile(r"^[ \t]*Name[ \t]*=[ \t]*(\S.*)$", re.MULTILINE)
_IFCFG_DEVICE = re.compile(r"^[ \t]*DEVICE[ \t]*=[ \t]*[\"']?([^\s\"']+)", re.MULTILINE)
_YAML_KEY = re.compile(r"""^( *)["']?([^\s"':#]+)["']? *:(?: +(.*))?$""")


def from_ifupdown(text: str) -> list[str]:
    found: list[str] = []
    for match in _IFUPDOWN.finditer(text):
        found += [match[1]] if match[1] else match[2].split()
    return found


def from_keyfile(text: str) -> list[str]:
    return _KEYFILE.findall(text)


def from_networkd(text: str) -> list[str]:
    return [name for part in _NETWORKD.findall(text) for names in _NETWORKD_NAME.findall(part) for name in names.split()]


def from_ifcfg(filename: str, text: str) -> list[str]:
    match = _IFCFG_DEVICE.search(text)
    return [match[1] if match else filename.removeprefix("ifcfg-")]


def from_netplan(text: str) -> list[str]:
    """Keys right below `ethernets:`, or their `set-name`. A key with a `match:` is only a label; its set-name is the name."""
    inside, level, found = -1, -1, {}
    current = ""
    for line in text.splitlines():
        key = _YAML_KEY.match(line)
        if key is None:
            continue
        indent, name, rest = len(key[1]), key[2], (key[3] or "").strip().strip("\"'")
        if inside >= 0 and indent <= inside:
            inside = level = -1
        if name == "ethernets" and not rest:
            inside = indent
        elif inside >= 0 and (level < 0 or indent == level):
            level, current = indent, name
            found[current] = name
        elif inside >= 0 and name == "match" and current in found:
            found[current] = ""
        elif inside >= 0 and name == "set-name" and current:
            found[current + "\0"] = rest
    return list(found.values())


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """Real names, each once, in order, without lo."""
    fit = [name for name in names if _NAME.fullmatch(name) and name != "lo" and not name.startswith("lo:")]
    return tuple(dict.fromkeys(fit))[:NAMES_LIMIT]


def from_ifcfgs(files: Mapping[str, str]) -> list[str]:
    return [name for filename, text in files.items() for name in from_ifcfg(filename, text)]
