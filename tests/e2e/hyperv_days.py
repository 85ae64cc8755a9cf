"""What the bad days of a Hyper-V host have in common: faults of scripts, and what must be as before when tokvm is gone."""

from __future__ import annotations

from typing import Any

from tests.e2e.bench import Bench
from tests.e2e.places import VM

from tokvm.testing.hyperv.host import HyperVHost
from tokvm.testing.hyperv.state import Vm

SHARING_VIOLATION, NO_ROOM = -2147024864, -2147024784

FAULTS: dict[str, dict[str, Any]] = {
    "lost_reply": {"kind": "lost_reply"},
    "drop": {"kind": "drop"},
    "late": {"kind": "late", "seconds": 1.0},
    "hang": {"kind": "hang"},
    "cut_answer": {"kind": "cut_answer"},
    "no_answer": {"kind": "no_answer"},
    "crash": {"kind": "crash"},
    "in use": {"kind": "error", "hresult": SHARING_VIOLATION},
    "no room": {"kind": "error_after", "hresult": NO_ROOM},
    "unknown": {"kind": "error"},
}


class NodeMove:
    """A live migration: the VM is another node's, which this host does not know, until it comes back."""

    def __init__(self, host: HyperVHost) -> None:
        self._host = host
        self._gone: dict[str, Vm] = {}

    def leave(self) -> None:
        with self._host.edit() as state:
            self._gone, state["vms"] = state["vms"], {}

    def come_back(self) -> None:
        with self._host.edit() as state:
            state["vms"].update(self._gone)


def foreign(host: HyperVHost) -> list[str]:
    """Ids of other people's checkpoints."""
    return [one["id"] for one in host.checkpoints(VM) if not one["name"].startswith("tokvm-")]


def ours(host: HyperVHost) -> list[str]:
    """Ids of our own, oldest first."""
    return [one["id"] for one in host.checkpoints(VM) if one["name"].startswith("tokvm-")]


def merge_at_once(host: HyperVHost, id_: str) -> None:
    """Somebody deletes it, and the host does not wait for those who read."""
    for record in (host.folder / "handles").glob("*.json"):
        record.unlink()
    host.delete_checkpoint(VM, id_)


def others(host: HyperVHost) -> object:
    """What is not ours to change: checkpoints of other people, settings, the cluster's too."""
    vm = host.vm(VM)
    return foreign(host), vm["fields"], vm["role"]


def give_up(bench: Bench, host: HyperVHost) -> None:
    """`finish` of a VM that stays where it is: nothing of ours is left, all else is as it was before the first command."""
    done = bench.tokvm("finish", VM)
    assert done.code == 0, done.stderr
    assert "tokvm" not in host.vm(VM)["notes"]
    assert ours(host) == []
    assert host.is_running(VM)
