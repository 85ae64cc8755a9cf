"""Long work: a task is begun, and looked at until it is over.

    queued ─► running ─► success | error          a queued task is one that goes on, not one that failed

The task is the server's: it goes on when our connection or our login is gone, and a new login sees it. What became of a task
that cannot be found any more is not known (ConnectionLost): the caller looks at the VM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.sources.vmware.api import faults, properties
from tokvm.sources.vmware.api.client import Client

log = logging.getLogger(__name__)

POLL_S = 0.5
BUSY_S = 120.0
_UNDER_WAY = ("queued", "running")


def run(
    client: Client,
    begin: Callable[[], Any],
    doing: str,
    *,
    timeout_s: float,
    busy_s: float = BUSY_S,
    watch: Callable[[], None] | None = None,
) -> Any:
    """The task's result. VsphereError: it ended in a fault (or was refused). ConnectionLost: it may have been done.

    busy_s: how long to try again while another task is at work on the object. watch: called between two looks; it raises when
    there is nothing to wait for (the VM asks a question)."""
    deadline = time.monotonic() + busy_s
    while True:
        try:
            return wait(client, client.act(begin, doing), doing, timeout_s=timeout_s, watch=watch)
        except faults.VsphereError as failed:
            if failed.fault != "TaskInProgress" or time.monotonic() >= deadline:
                raise
        time.sleep(POLL_S)


def wait(client: Client, task: Any, doing: str, *, timeout_s: float, watch: Callable[[], None] | None = None) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        info = task_info(client, task, doing)
        match str(info.state):
            case "success":
                return info.result
            case "error":
                raise faults.error_of(info.error, where=client.where, doing=doing)
            case state if state not in _UNDER_WAY:
                raise SourceError(f"{doing}: the task is {state!r}, which is no state of a task", where=client.where)
        if time.monotonic() > deadline:
            raise ConnectionLost(
                f"{doing}: the task {task._GetMoId()} is not over after {timeout_s:g} s; the server goes on with it",
                where=client.where,
                fix="wait until it is over (recent tasks in the vSphere client), then run the same command again",
            )
        time.sleep(POLL_S)
        if watch is not None:
            watch()


def under_way(client: Client, refs: Any, *words: str) -> list[Any]:
    """The infos of those of these tasks that are not over, and are about one of these words: names of tasks differ from one
    server to the next (`VirtualMachine.createSnapshot`, `vm.Snapshot.remove`, `vim.vm.Snapshot.remove`)."""
    infos = [one.values.get("info") for one in properties.read(client, list(refs or ()), ["info"], doing="reading tasks")]
    going = [info for info in infos if info is not None and str(info.state) in _UNDER_WAY]
    return [info for info in going if any(word in str(info.descriptionId).lower() for word in words)]


def task_info(client: Client, task: Any, doing: str) -> Any:
    try:
        return properties.read_one(client, task, ["info"], doing=doing).need("info")
    except faults.VsphereError as failed:
        if failed.fault != "ManagedObjectNotFound":
            raise
        raise ConnectionLost(
            f"{doing}: what became of the task {task._GetMoId()} is not known: the server has forgotten it",
            where=client.where,
            fix="run the same command again; it looks first",
        ) from failed
