"""Nothing starts the source any more by itself: not the host's boot, not the cluster. tokvm's own start refuses it, too.

    record    what it was before; written first, removed last, never overwritten (`record.Fence`)
    AutomaticStartAction        Nothing        the host's boot does not start it
    the role's Priority         0              "no auto start": neither failover nor the cluster's start brings it online
    its resource's RestartAction  0            a VM that failed (or was shut down from inside) is not restarted

Hyper-V has no lock that keeps a person from starting a VM. That one is seen: whether it runs is asked again before every step
that depends on it. Where a group's failover would be stopped by its PersistentState, that cannot be set (it is what the cluster
last did), and taking the role offline would save the VM: Priority is the setting made for this.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tokvm.core.errors import SourceError, UsageError
from tokvm.sources.hyperv import record
from tokvm.sources.hyperv.answers import Fields
from tokvm.sources.hyperv.machine import Facts, Switches
from tokvm.sources.hyperv.powershell import Asking
from tokvm.sources.hyperv.record import Fence

log = logging.getLogger(__name__)

NOTHING = "Nothing"


def fence(shell: Asking, vm: str, reason: str) -> None:
    if not reason or "\0" in reason:
        raise UsageError("a fence needs a reason that people can read")
    facts = record.look(shell, vm)
    before = _before(reason, facts.switches)
    record.change(shell, vm, lambda found: found if found.fence else replace(found, fence=before), known=facts)
    switches = facts.switches
    if not _shut(switches):
        switches = _set(shell, vm, switches, replace(before, auto_start=NOTHING, priority=0, restart_action=0))
    if not _shut(switches):
        raise _refused(shell, vm, "fenced", switches)
    log.info("VM %s is fenced", vm)


def is_fenced(shell: Asking, vm: str) -> bool:
    facts = record.look(shell, vm)
    return _shut(facts.switches) and has_fence(shell, vm, facts)


def has_fence(shell: Asking, vm: str, facts: Facts) -> bool:
    """Is there a fence in the record, whether or not it holds?"""
    return record.record_of(shell, vm, facts.record).fence is not None


def unfence(shell: Asking, vm: str) -> None:
    facts = record.look(shell, vm)
    before = record.record_of(shell, vm, facts.record).fence
    if before is None:
        return
    switches = _set(shell, vm, facts.switches, before)
    if not _restored(switches, before):
        raise _refused(shell, vm, "unfenced", switches)
    record.change(shell, vm, lambda found: replace(found, fence=None), known=facts)
    log.info("VM %s is unfenced", vm)


def _before(reason: str, switches: Switches) -> Fence:
    cluster = switches.cluster
    if cluster is None:
        return Fence(reason, switches.auto_start, None, None)
    return Fence(reason, switches.auto_start, cluster.priority, cluster.restart_action)


def _shut(switches: Switches) -> bool:
    cluster = switches.cluster
    return switches.auto_start == NOTHING and (cluster is None or (cluster.priority, cluster.restart_action) == (0, 0))


def _restored(switches: Switches, before: Fence) -> bool:
    """A VM that left its cluster, or came into one, meanwhile has nothing of the other kind to put back."""
    cluster = switches.cluster
    there = (
        cluster is None
        or before.priority is None
        or (cluster.priority, cluster.restart_action)
        == (
            before.priority,
            before.restart_action,
        )
    )
    return there and switches.auto_start == before.auto_start


def _set(shell: Asking, vm: str, now: Switches, wanted: Fence) -> Switches:
    """Set what differs: a clustered VM's AutomaticStartAction may be the cluster's to set, and is right as it is mostly."""
    data: dict[str, object] = {"vm": vm}
    if now.auto_start != wanted.auto_start:
        data["autoStart"] = wanted.auto_start
    if now.cluster is not None:
        if wanted.priority is not None and now.cluster.priority != wanted.priority:
            data["priority"] = wanted.priority
        if wanted.restart_action is not None and now.cluster.restart_action != wanted.restart_action:
            data["restartAction"] = wanted.restart_action
    return Switches.parse(Fields.of(shell.act("settings", data), shell.where, "settings"))


def _refused(shell: Asking, vm: str, wanted: str, now: Switches) -> SourceError:
    cluster = now.cluster
    role = "" if cluster is None else f", its role's priority {cluster.priority}, restart action {cluster.restart_action}"
    return SourceError(
        f"the VM could not be {wanted}: read back, AutomaticStartAction is {now.auto_start}{role}",
        where=f"{shell.where} VM {vm}",
        fix="see whether somebody else is changing the VM, then run the same command again",
    )
