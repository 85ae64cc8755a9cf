"""Which data each script takes: every field, and of which kind. Anything else is a defect of who sent it."""

from __future__ import annotations

from tokvm.testing.hyperv.errors import NotInContract

Data = dict[str, object]

ABOUT_A_VM = ("checkpoints", "evidence", "inspect", "layers", "power", "start", "turn-off")

# name: (fields that must be there, fields that may)
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "list": (frozenset(), frozenset()),
    "ping": (frozenset(), frozenset()),
    "checkpoint": (frozenset({"vm", "mark", "types"}), frozenset()),
    "remove-checkpoint": (frozenset({"vm", "id", "mark"}), frozenset()),
    "leftovers": (frozenset({"end"}), frozenset()),
    "record": (frozenset({"vm", "expect", "write"}), frozenset()),
    "shutdown": (frozenset({"vm", "ask", "wait"}), frozenset()),
    "settings": (
        frozenset({"vm"}),
        frozenset({"checkpointType", "automaticCheckpoints", "autoStart", "priority", "restartAction"}),
    ),
    **dict.fromkeys(ABOUT_A_VM, (frozenset({"vm"}), frozenset())),
}
KINDS: dict[str, tuple[type, ...]] = {
    "vm": (str,),
    "id": (str,),
    "mark": (str,),
    "types": (list,),
    "end": (bool,),
    "ask": (bool,),
    "wait": (int, float),
    "expect": (str, type(None)),
    "write": (str, type(None)),
    "checkpointType": (str, type(None)),
    "autoStart": (str, type(None)),
    "automaticCheckpoints": (bool, type(None)),
    "priority": (int, type(None)),
    "restartAction": (int, type(None)),
}


def check(name: str, data: object) -> Data:
    """The data if it has the fields that the contract gives this script, each of its kind; NotInContract otherwise."""
    if not isinstance(data, dict):
        raise NotInContract(f"{name}: the data are no object")
    needed, allowed = FIELDS[name]
    if not needed <= set(data) <= needed | allowed:
        raise NotInContract(f"{name}: the data have {sorted(data)}, not {sorted(needed)}")
    for field, value in data.items():
        if not isinstance(value, KINDS[field]) or (isinstance(value, bool) and bool not in KINDS[field]):
            raise NotInContract(f"{name}: {field} is {value!r}")
    return data
