"""Our note on the VM, in its settings (`extraConfig`, so in its .vmx), which go with it wherever it moves.

    tokvm.record = {"asked": …, "cbt": false, "fence": {…}, "owner": "…", "v": 1}

owner: who migrates it · fence: what to put back when the fence is lifted · asked: when the guest was last asked to shut down,
in seconds of the server's clock · cbt: whether changed blocks were tracked before us. Without anything in it the key goes.

A change is compare-and-set: the settings are written with the `changeVersion` they were read with, and the server refuses with
ConcurrentAccess when somebody wrote in between. Whoever loses reads again and decides anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.sources.vmware.api import faults, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Machines
from tokvm.sources.vmware.api.properties import Properties
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.check import API_RECORD

log = logging.getLogger(__name__)

KEY = API_RECORD
PATHS = ("config.extraConfig", "config.changeVersion")
RECONFIGURE_S = 120.0
_VERSION = 1
_TRIES = 8
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Fence:
    """What could start the VM before us.

    cluster: the cluster whose HA was told to leave it alone; "" when there was none to tell. priority: the VM's own HA restart
    priority there; "" when it had none of its own. host, auto_start: the host whose autostart had it, and what it did; "" both.
    """

    reason: str
    cluster: str = ""
    priority: str = ""
    host: str = ""
    auto_start: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    owner: str = ""
    fence: Fence | None = None
    asked: int | None = None
    cbt: bool | None = None

    def to_text(self) -> str:
        """ "" when there is nothing to say: that removes the key."""
        found = {key: value for key, value in asdict(self).items() if value is not None and value != ""}
        return json.dumps({"v": _VERSION, **found}, sort_keys=True, separators=(",", ":")) if found else ""

    @classmethod
    def from_text(cls, text: str) -> Record:
        """ValueError for anything that `to_text` did not write."""
        if not text:
            return cls()
        found = json.loads(text) if len(text) <= _MOST else None
        if not isinstance(found, dict) or found.pop("v", None) != _VERSION:
            raise ValueError("not a record of this version")
        if not found.keys() <= {"owner", "fence", "asked", "cbt"}:
            raise ValueError("it has a field that this version does not know")
        fence = found.get("fence")
        if fence is not None and not (isinstance(fence, dict) and fence.keys() == set(Fence.__slots__)):
            raise ValueError("its fence has other fields")
        made = cls(found.get("owner", ""), None if fence is None else Fence(**fence), found.get("asked"), found.get("cbt"))
        made._check()
        return made

    def _check(self) -> None:
        """ValueError when a field is of another type."""
        texts = [self.owner, *(asdict(self.fence).values() if self.fence else ())]
        right = (
            all(isinstance(text, str) for text in texts)
            and (self.asked is None or (isinstance(self.asked, int) and not isinstance(self.asked, bool)))
            and isinstance(self.cbt, bool | None)
        )
        if not right:
            raise ValueError("a field is of another type")


def read(machines: Machines, uuid: str, *also: str) -> tuple[Record, Properties]:
    """The record, and with it whatever else is wanted of the VM in the same look."""
    found = machines.read(uuid, [*PATHS, *also])
    return record_of(found, uuid), found


def record_of(found: Properties, uuid: str) -> Record:
    """SourceError for a record that nobody here wrote: somebody edited it, or a newer tokvm did."""
    return parse(found.get("config.extraConfig"), f"VM {uuid}")


def parse(extra: Any, where: str) -> Record:
    text = next((str(one.value or "") for one in extra or () if str(one.key) == KEY), "")
    try:
        return Record.from_text(text)
    except (ValueError, RecursionError) as exc:
        raise SourceError(
            f"the VM's setting {KEY} is not what this tokvm wrote: {exc}",
            where=where,
            fix=f"if no other tokvm has the VM in hand, remove {KEY} (Edit Settings, Advanced Parameters), look at the VM's HA "
            "priority and autostart, and run the same command again",
        ) from exc


def change(client: Client, machines: Machines, uuid: str, decide: Callable[[Record], Record]) -> Record:
    """Set the record to what `decide` makes of it; returns what is there afterwards.

    A reply that was lost is no trouble: the next look shows whether it was written."""
    lost: ConnectionLost | None = None
    for _ in range(_TRIES):
        now, found = read(machines, uuid)
        wanted = decide(now)
        if wanted == now:
            return now
        try:
            _write(client, found, wanted)
            lost = None
        except faults.VsphereError as failed:
            if failed.fault != "ConcurrentAccess":
                raise
            log.debug("VM %s: %s; looking again", uuid, failed.what)
        except ConnectionLost as failed:
            if lost is not None:
                raise
            lost = failed
    raise SourceError(
        "the VM's settings change faster than they can be written, or do not keep ours",
        where=f"{client.where} VM {uuid}",
        fix="see who edits the VM, then run the same command again",
    )


def _write(client: Client, found: Properties, wanted: Record) -> None:
    spec = vim.vm.ConfigSpec(
        changeVersion=found.get("config.changeVersion"), extraConfig=[vim.option.OptionValue(key=KEY, value=wanted.to_text())]
    )
    doing = f"writing {readable(KEY)} of VM {found.moid}"
    tasks.run(client, lambda: found.ref.ReconfigVM_Task(spec=spec), doing, timeout_s=RECONFIGURE_S)
