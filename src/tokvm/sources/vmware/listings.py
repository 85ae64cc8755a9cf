"""The two tables that vim-cmd prints for people: all VMs, and a VM's snapshots. Both hold texts of anybody, unescaped.

    Vmid   Name      File                Guest OS      Version   Annotation
    12     web 1     [ds] web/web.vmx    debian11Guest vmx-19    first line
    and the second line of the annotation, which may look like a row

    Get Snapshot:
    |-ROOT
    --Snapshot Name        : before the update
    --Snapshot Id        : 1
    --Snapshot Desciption  : text             misspelt on all versions
    --Snapshot Created On  : 10/4/2026 19:0:52
    --Snapshot State       : powered off
    --|-CHILD
    ----Snapshot Name        : …              each level adds two dashes

So of the first only numbers are taken, as questions: get.summary says which VM each is, if any. Of the second a pair of id and
name is taken as a hint, which counts when the .vmsd, whose texts are escaped, has the same pair.
"""

from __future__ import annotations

import re

from tokvm.sources.vmware.marks import is_mark

_VMID = re.compile(r"^([1-9][0-9]{0,9})\s", re.MULTILINE)
_PAIR = re.compile(r"^(-+)Snapshot Name {1,20}: (.*)\r?\n\1Snapshot Id {1,20}: ([0-9]{1,9})[ \t]*\r?$", re.MULTILINE)
_MOST_ROWS = 4096


def possible_vmids(text: str) -> list[int]:
    """Each once, in order. ValueError when it is no such table."""
    if not text.lstrip().startswith("Vmid"):
        raise ValueError("it does not begin with Vmid")
    found = list(dict.fromkeys(int(one) for one in _VMID.findall(text)))
    if len(found) > _MOST_ROWS:
        raise ValueError(f"it has more than {_MOST_ROWS} rows")
    return found


def possible_marks(text: str) -> set[tuple[int, str]]:
    """(id, name) of what may be snapshots of ours."""
    return {(int(uid), name) for _, name, uid in _PAIR.findall(text) if is_mark(name)}
