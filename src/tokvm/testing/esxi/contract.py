"""docs/esxi-commands.md, to the letter: which command lines there are. Anything else is a defect of who sent it."""

from __future__ import annotations

import re
from typing import NamedTuple

from tokvm.testing.esxi import shell
from tokvm.testing.esxi.errors import NotInContract

VMID = r"\d+"
MARK = r"tokvm-\S+-\d+"
TAG = re.compile(r"tokvm-[0-9a-f]{16}")
DIR = r"/vmfs/volumes/[0-9a-f]{8}-[0-9a-f]{8}(?:-[0-9a-f]{4}-[0-9a-f]{12})?/[^/]+"
CLONES = "tokvm-clone"
OWNER, NOTES = "tokvm-owner", "tokvm.json"
CHANGE, READ = "change", "read"
AUTOSTART = "hostsvc/autostartmanager"

# name: (read or change, a pattern for each word). A word that is a pattern's group is an argument.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "getallvms": (READ, ("vim-cmd", "vmsvc/getallvms")),
    **{
        name: (READ, ("vim-cmd", f"vmsvc/{re.escape(name)}", f"({VMID})"))
        for name in (
            "get.summary", "device.getdevices", "power.getstate", "snapshot.get", "get.tasklist", "message",
        )
    },
    "task_info": (READ, ("vim-cmd", "vimsvc/task_info", r"(haTask-\S+)")),
    "get_autostartseq": (READ, ("vim-cmd", f"{AUTOSTART}/get_autostartseq")),
    "hostsummary": (READ, ("vim-cmd", "hostsvc/hostsummary")),
    "process list": (READ, ("esxcli", "--formatter=xml", "vm", "process", "list")),
    "filesystem list": (READ, ("esxcli", "--formatter=xml", "storage", "filesystem", "list")),
    "cat": (READ, ("cat", rf"({DIR}/(?:[^/]+\.vmx|[^/]+\.vmsd|{OWNER}|{re.escape(NOTES)}))")),
    "ls": (READ, ("ls", "-1", f"({DIR}/{CLONES})")),
    "date": (READ, ("date", r"\+%s")),
    "dd": (READ, ("dd", rf"if=({DIR}/[^/]+\.vmdk)", "of=/dev/null", "bs=512", "count=1")),
    "snapshot.create": (CHANGE, ("vim-cmd", r"vmsvc/snapshot\.create", f"({VMID})", f"({MARK})", "(tokvm)", "0", "0")),
    "snapshot.remove": (CHANGE, ("vim-cmd", r"vmsvc/snapshot\.remove", f"({VMID})", r"(\d+)", "0")),
    "mkdir": (CHANGE, ("mkdir", "-p", f"({DIR}/{CLONES})")),
    "clone": (CHANGE, ("vmkfstools", "-i", rf"({DIR}/[^/]+\.vmdk)", rf"({DIR}/{CLONES}/[^/]+\.vmdk)", "-d", "thin")),
    "unclone": (CHANGE, ("vmkfstools", "-U", rf"({DIR}/{CLONES}/[^/]+\.vmdk)")),
    "rmdir": (CHANGE, ("rmdir", f"({DIR}/{CLONES})")),
    "rm": (CHANGE, ("rm", "-f", rf"({DIR}/(?:{OWNER}|{re.escape(NOTES)}))")),
    "update_autostartentry": (
        CHANGE,
        (
            "vim-cmd", f"{AUTOSTART}/update_autostartentry", "--", f"({VMID})", "(none|powerOn|systemDefault)", r"(-?\d+)",
            r"(-?\d+)", "(none|systemDefault|powerOff|guestShutdown|suspend)", r"(-?\d+)", "(yes|no|systemDefault)",
        ),
    ),
    **{
        name: (CHANGE, ("vim-cmd", f"vmsvc/{re.escape(name)}", f"({VMID})"))
        for name in ("power.shutdown", "power.off", "power.on")
    },
}  # fmt: skip
CLAIMED = re.compile(f"{DIR}/{OWNER}")
WRITTEN = re.compile(rf"({DIR}/{re.escape(NOTES)})\.new")


class Command(NamedTuple):
    """A row of the contract, or "claim" and "write" (text, path)."""

    name: str
    arguments: tuple[str, ...]


def read_line(line: str) -> tuple[list[Command], str]:
    """(commands, TAG); NotInContract."""
    parsed = shell.parse(line)
    words = parsed.commands[0]
    if parsed.kind == shell.CLAIM:
        if CLAIMED.fullmatch(words[1]):
            return [Command("claim", (words[0], words[1]))], ""
        raise NotInContract(f"nobody claims a VM with {words[1]!r}")
    if parsed.kind == shell.WRITE:
        fresh = WRITTEN.fullmatch(words[1])
        if fresh and fresh[1] == words[2]:
            return [Command("write", (words[0], words[2]))], ""
        raise NotInContract(f"nobody writes {words[2]!r} by way of {words[1]!r}")
    found = [_row_of(one) for one in parsed.commands]
    if parsed.tag and not TAG.fullmatch(parsed.tag):
        raise NotInContract(f"{parsed.tag!r} is no fresh random word")
    if bool(parsed.tag) != all(ROWS[one.name][0] == READ for one in found):
        raise NotInContract("reads are sent with a TAG, and changes alone and without")
    return found, parsed.tag


def _row_of(words: list[str]) -> Command:
    for name, (_, patterns) in ROWS.items():
        if len(patterns) == len(words):
            matches = [re.fullmatch(pattern, word) for pattern, word in zip(patterns, words, strict=True)]
            if all(matches):
                return Command(name, tuple(group for one in matches if one for group in one.groups()))
    raise NotInContract(f"no row of the contract has this command: {words[:4]}")
