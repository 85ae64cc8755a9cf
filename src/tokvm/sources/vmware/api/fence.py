"""Nothing starts the source any more by itself: not its cluster's HA, not its host's boot. tokvm's own start refuses it, too.

    record       what it was before; written first, removed last, never overwritten (`record.Fence`)
    cluster HA   the VM's restart priority: disabled       (ReconfigureComputeResource_Task, needs Host.Inventory.EditCluster)
    autostart    the VM's start action: none               (ReconfigureAutostart, needs Host.Config.AutoStart)

Where the login may not change the cluster, the fence stands without it, and says so (`check` has told before): HA restarts VMs
that a host lost, not those that were shut down. vSphere has no lock that keeps a person from starting a VM. That one is seen:
whether it runs is asked again before every step that depends on it. DRS starts none, it moves VMs: where this one is, is asked
each time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tokvm.core.errors import SourceError, UsageError
from tokvm.sources.vmware.api import faults, properties, record, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Machines
from tokvm.sources.vmware.api.record import Fence
from tokvm.sources.vmware.api.vmomi import vim

log = logging.getLogger(__name__)

DISABLED, NONE = "disabled", "none"
_NOT_MINE = "*"  # a cluster that the login may not change
RECONFIGURE_S = 300.0


@dataclass(frozen=True, slots=True)
class Switches:
    """How the VM stands where starts come from. cluster: one whose HA is on, else None. priority: the VM's own there, else "".
    auto: the host's AutoStartManager, None where there is none to be seen. entry: the VM's there, else None."""

    cluster: Any
    priority: str
    host: str
    auto: Any
    entry: Any

    @property
    def auto_start(self) -> str:
        return "" if self.entry is None else str(self.entry.startAction or "")


def look(client: Client, vm: Any) -> Switches:
    host = properties.read_one(client, vm, ["runtime.host"]).need("runtime.host")
    above = properties.read_one(client, host, ["parent", "configManager.autoStartManager"], doing="reading the VM's host")
    cluster, priority = _ha(client, above.get("parent"), vm)
    auto = above.get("configManager.autoStartManager")
    return Switches(cluster, priority, str(host._GetMoId()), auto, _entry(client, auto, vm))


def _ha(client: Client, parent: Any, vm: Any) -> tuple[Any, str]:
    if not isinstance(parent, vim.ClusterComputeResource):
        return None, ""
    config = properties.read_one(client, parent, ["configurationEx"], doing="reading the cluster").get("configurationEx")
    das = getattr(config, "dasConfig", None)
    if das is None or not das.enabled:
        return None, ""
    for one in config.dasVmConfig or ():
        if one.key == vm:
            settings = getattr(one, "dasSettings", None)
            return parent, str(getattr(settings, "restartPriority", None) or one.restartPriority or "")
    return parent, ""


def _entry(client: Client, auto: Any, vm: Any) -> Any:
    if auto is None:
        return None
    config = properties.read_one(client, auto, ["config"], doing="reading the host's autostart").get("config")
    return next((one for one in getattr(config, "powerInfo", None) or () if one.key == vm), None)


def fence(client: Client, machines: Machines, uuid: str, reason: str) -> None:
    if not reason or "\0" in reason:
        raise UsageError("a fence needs a reason that people can read")
    vm = machines.ref(uuid)
    switches = look(client, vm)
    before = Fence(
        reason=reason,
        cluster="" if switches.cluster is None else str(switches.cluster._GetMoId()),
        priority=switches.priority,
        host=switches.host if switches.auto_start not in ("", NONE) else "",
        auto_start=switches.auto_start if switches.auto_start not in ("", NONE) else "",
    )
    held = record.change(client, machines, uuid, lambda found: found if found.fence else replace(found, fence=before))
    if not _shut(switches, held.fence):
        _until_free(client, vm, lambda now: _close(client, machines, uuid, now))
    if not is_fenced(client, machines, uuid):
        raise SourceError(
            "the VM could not be fenced: read back, its HA priority or autostart is what it was",
            where=f"{client.where} VM {uuid}",
            fix="see whether somebody else is changing the cluster or host, then run the same command again",
        )
    log.info("VM %s is fenced", uuid)


def _until_free(client: Client, vm: Any, act: Callable[[Switches], None]) -> None:
    """Do it by how the VM stands; looked at anew when the cluster is busy, perhaps with our own change (its reply was lost),
    and when that landed between our look and our act, so that what is to be added is there already."""
    deadline = time.monotonic() + tasks.BUSY_S
    while True:
        seen = look(client, vm)
        try:
            act(seen)
            return
        except faults.VsphereError as failed:
            moved = failed.fault == "InvalidArgument" and look(client, vm).priority != seen.priority
            if not (moved or failed.fault == "TaskInProgress") or time.monotonic() > deadline:
                raise
        time.sleep(tasks.POLL_S)


def _close(client: Client, machines: Machines, uuid: str, switches: Switches) -> None:
    """Each way by which the VM could be started."""
    vm = machines.ref(uuid)
    if switches.auto_start not in ("", NONE):
        set_auto_start(client, switches.auto, vm, switches.entry, NONE)
    if switches.cluster is None or switches.priority == DISABLED:
        return
    try:
        set_priority(client, switches.cluster, vm, now=switches.priority, wanted=DISABLED)
    except faults.VsphereError as failed:
        if failed.fault != "NoPermission":
            raise
        log.warning("VM %s: %s; its cluster's HA was not told to leave it alone", uuid, failed.what)
        record.change(client, machines, uuid, _without_cluster)


def _without_cluster(found: record.Record) -> record.Record:
    return found if found.fence is None else replace(found, fence=replace(found.fence, cluster=_NOT_MINE, priority=""))


def is_fenced(client: Client, machines: Machines, uuid: str) -> bool:
    now, found = record.read(machines, uuid)
    return now.fence is not None and _shut(look(client, found.ref), now.fence)


def _shut(switches: Switches, before: Fence | None) -> bool:
    ha = switches.cluster is None or switches.priority == DISABLED or (before is not None and before.cluster == _NOT_MINE)
    return ha and switches.auto_start in ("", NONE)


def unfence(client: Client, machines: Machines, uuid: str) -> None:
    now, found = record.read(machines, uuid)
    before = now.fence
    if before is None:
        return
    _until_free(client, found.ref, lambda now: _open(client, found.ref, now, before))
    record.change(client, machines, uuid, lambda held: replace(held, fence=None))
    log.info("VM %s is unfenced", uuid)


def _open(client: Client, vm: Any, switches: Switches, before: Fence) -> None:
    """As it was; a VM that left its cluster or host meanwhile has nothing of it to be put back."""
    cluster = "" if switches.cluster is None else str(switches.cluster._GetMoId())
    if cluster and cluster == before.cluster and switches.priority != before.priority:
        set_priority(client, switches.cluster, vm, now=switches.priority, wanted=before.priority)
    if before.auto_start and switches.host == before.host and switches.auto_start != before.auto_start:
        set_auto_start(client, switches.auto, vm, switches.entry, before.auto_start)


def set_priority(client: Client, cluster: Any, vm: Any, *, now: str, wanted: str) -> None:
    """The VM's own HA restart priority; "" takes its own away, so that it has the cluster's."""
    if wanted:
        settings = vim.cluster.DasVmSettings(restartPriority=wanted)
        info = vim.cluster.DasVmConfigInfo(key=vm, dasSettings=settings)
        change = vim.cluster.DasVmConfigSpec(operation="edit" if now else "add", info=info)
    else:
        change = vim.cluster.DasVmConfigSpec(operation="remove", removeKey=vm)
    spec = vim.cluster.ConfigSpecEx(dasVmConfigSpec=[change])
    tasks.run(
        client,
        lambda: cluster.ReconfigureComputeResource_Task(spec=spec, modify=True),
        "setting the VM's HA restart priority",
        timeout_s=RECONFIGURE_S,
        busy_s=0.0,
    )


def set_auto_start(client: Client, auto: Any, vm: Any, entry: Any, action: str) -> None:
    """The VM's entry in its host's autostart with another start action; everything else in it stays."""
    if auto is None:
        return
    info = vim.host.AutoStartManager.AutoPowerInfo(
        key=vm,
        startOrder=entry.startOrder if entry is not None else -1,
        startDelay=entry.startDelay if entry is not None else -1,
        waitForHeartbeat=entry.waitForHeartbeat if entry is not None else "systemDefault",
        startAction=action,
        stopDelay=entry.stopDelay if entry is not None else -1,
        stopAction=entry.stopAction if entry is not None else "systemDefault",
    )
    spec = vim.host.AutoStartManager.Config(powerInfo=[info])
    client.act(lambda: auto.ReconfigureAutostart(spec=spec), "setting the VM's autostart")
