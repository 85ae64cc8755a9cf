"""The contract, word by word (docs/xenserver-commands.md): which command lines there are, in which order of arguments.

A line is first taken apart as the remote shell would, refusing whatever that shell would *do* something about: a client that
forgets to quote must be seen here, not on somebody's dom0.
"""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from tokvm.testing.xenserver.errors import NotInContract

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VM_LIST = "uuid|name-label|power-state"
VM_FIELD = (
    "uuid|name-label|name-description|power-state|VCPUs-max|memory-static-max|HVM-boot-policy|HVM-boot-params|platform|"
    "PV-bootloader|ha-restart-priority|blocked-operations|other-config|current-operations|dom-id"
)
VBD_FIELD = "uuid|userdevice|device|bootable|vdi-uuid|mode|currently-attached"
VDI_FIELD = "virtual-size|sr-uuid|name-label|sharable|snapshot-of|sm-config"
SR_FIELD = "type|name-label|physical-size|physical-utilisation"
VIF_FIELD = "device|MAC|network-name-label"
READ_KEY = "tokvm-owner|tokvm-fence|auto_poweron"
BLOCK_KEY = "start|start_on|resume"
MARK = r"tokvm-[A-Za-z0-9][A-Za-z0-9._-]*"

SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-\t ")
TAIL = re.compile(r"set -o pipefail; (xe vdi-export [^|;&]*) \| tail -c \+([1-9][0-9]{0,18})")


class Rule(NamedTuple):
    """Patterns, compiled only when a line asks for this name: 90 of them would double a command's start."""

    name: str
    words: tuple[str, ...]


class Command(NamedTuple):
    """A line of the contract and the named values in it. `first`: bytes of an export to leave out."""

    name: str
    values: dict[str, str]
    first: int = 0


def _rule(name: str, *words: str) -> Rule:
    filled = (word.replace("<uuid>", f"(?P<uuid>{UUID})").replace("<base>", f"(?P<base>{UUID})") for word in words)
    return Rule(name, tuple(filled))


LISTED = ("is-control-domain=false", "is-a-template=false", "is-a-snapshot=false")
_OWN = r"other-config:(?P<key>tokvm-fence|auto_poweron)=(?P<value>.*)"
_BLOCK = rf"blocked-operations:(?P<key>{BLOCK_KEY})=(?P<value>.+)"
_HA = r"(?P<key>ha-restart-priority)=(?P<value>.*)"
RULES = (
    _rule("vm-list", *LISTED, f"params=(?P<param>{VM_LIST})", "--minimal"),
    _rule("vm-param-get", "uuid=<uuid>", f"param-name=(?P<param>{VM_FIELD})"),
    _rule("vm-param-get", "uuid=<uuid>", "param-name=(?P<param>other-config)", f"param-key=(?P<key>{READ_KEY})"),
    _rule("vm-param-get", "uuid=<uuid>", "param-name=(?P<param>blocked-operations)", f"param-key=(?P<key>{BLOCK_KEY})"),
    _rule("vbd-list", "vm-uuid=<uuid>", "type=Disk", f"params=(?P<param>{VBD_FIELD})", "--minimal"),
    _rule("vdi-param-get", "uuid=<uuid>", f"param-name=(?P<param>{VDI_FIELD})"),
    _rule("sr-param-get", "uuid=<uuid>", f"param-name=(?P<param>{SR_FIELD})"),
    _rule("vif-list", "vm-uuid=<uuid>", f"params=(?P<param>{VIF_FIELD})", "--minimal"),
    _rule("vtpm-list", "vm-uuid=<uuid>", "params=(?P<param>uuid)", "--minimal"),
    _rule("snapshot-list", "snapshot-of=<uuid>", "params=(?P<param>uuid|name-label)", "--minimal"),
    _rule("vm-snapshot", "uuid=<uuid>", f"new-name-label=(?P<label>{MARK})"),
    _rule("vdi-export", "uuid=<uuid>", "format=vhd", "filename="),
    _rule("vdi-export", "uuid=<uuid>", "format=vhd", "base=<base>", "filename="),
    _rule("snapshot-uninstall", "uuid=<uuid>", "force=true"),
    _rule("vdi-destroy", "uuid=<uuid>"),
    _rule("vm-param-add", "uuid=<uuid>", "param-name=other-config", "(?P<key>tokvm-owner)=(?P<value>.+)"),
    _rule("vm-param-remove", "uuid=<uuid>", "param-name=(?P<param>other-config)", "param-key=(?P<key>tokvm-owner|tokvm-fence)"),
    _rule("vm-param-remove", "uuid=<uuid>", "param-name=(?P<param>blocked-operations)", f"param-key=(?P<key>{BLOCK_KEY})"),
    _rule("vm-param-set", "uuid=<uuid>", _OWN),
    _rule("vm-param-set", "uuid=<uuid>", _BLOCK),
    _rule("vm-param-set", "uuid=<uuid>", _HA),
    _rule("vm-shutdown", "uuid=<uuid>"),
    _rule("vm-shutdown", "uuid=<uuid>", "(?P<force>force=true)"),
    _rule("vm-start", "uuid=<uuid>"),
)


DIVIDER = "; printf '\\0%d\\0' $?"


def batch(line: str) -> list[str] | None:
    """The reads of a line that asks several things, each with its exit code behind; None for a line of one command.

    NotInContract for a line that is nearly one: a batch may only read, so that a lost connection loses no action's answer.
    """
    if DIVIDER not in line:
        return None
    commands = f"; {line}".split(DIVIDER)
    rest = commands.pop()
    if rest or not all(command.startswith("; xe ") for command in commands):
        raise NotInContract("a batch is commands with the exit code of each behind it", 2)
    commands = [command.removeprefix("; ") for command in commands]
    for command in commands:
        if not parse(command).name.endswith(("-list", "-param-get")):
            raise NotInContract(f"a batch may only read: {command}", 2)
    return commands


def parse(line: str) -> Command:
    """The command in `line`, or NotInContract saying why it is none."""
    tail = TAIL.fullmatch(line)
    if tail is not None:
        command = _match(_words(tail[1]))
        return command._replace(first=int(tail[2]) - 1)
    return _match(_words(line))


def _words(line: str) -> list[str]:
    """POSIX words of a line in which everything but plain characters is inside single quotes, or in "'" for a quote."""
    bare, quoted = [], False
    for part in line.replace("'\"'\"'", "").split("'"):
        if not quoted:
            bare.append(part)
        quoted = not quoted
    if not quoted:
        raise NotInContract("unexpected end of file while looking for matching `''", 2)
    odd = sorted({char for part in bare for char in part} - SAFE)
    if odd:
        raise NotInContract(f"the shell would act on unquoted {odd}", 2)
    return shlex.split(line)


def _match(words: list[str]) -> Command:
    if words[:1] != ["xe"]:
        raise NotInContract(f"-bash: {' '.join(words[:1])}: command not found", 127)
    rules = [rule for rule in RULES if rule.name in words[1:2]]
    if not rules:
        raise NotInContract(f"Unknown command: {' '.join(words[1:2])}")
    for rule in rules:
        values = _values(rule, words[2:])
        if values is not None:
            return Command(rule.name, values)
    raise NotInContract(f"Required parameter not found or unknown argument: {' '.join(words[2:])}")


def _values(rule: Rule, words: list[str]) -> dict[str, str] | None:
    if len(rule.words) != len(words):
        return None
    values: dict[str, str] = {}
    for pattern, word in zip(rule.words, words, strict=True):
        found = re.fullmatch(pattern, word, re.DOTALL)
        if found is None:
            return None
        values.update(found.groupdict())
    return values
