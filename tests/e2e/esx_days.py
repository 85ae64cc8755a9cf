"""What the bad days of an ESXi host have in common: exit codes, moments, and other people's snapshots."""

from __future__ import annotations

from tests.e2e.bench import Bench, Ended
from tests.e2e.places import VM

from tokvm.testing.esxi.host import EsxHost

REFUSED, LOST, NOT_OFF, NEEDS_PERSON, ROLLED_BACK = 4, 5, 12, 15, 16

# In the order in which a cutover comes to them. Each is right before, or right behind, what changes the world.
FENCE, STOP, ASKED, OFF = "phase:STOP_INTENT", "script:power.shutdown", "did:power.shutdown", "phase:FENCED"
FREEZE, FROZEN, COPY, COPIED = "script:snapshot.create", "did:snapshot.create", "target:pwrite", "phase:FINAL"
COMMIT, DEFINE, START, RUNS = "phase:START_INTENT", "define", "start", "phase:STARTED"
MOMENTS = (FENCE, STOP, ASKED, OFF, FREEZE, FROZEN, COPY, COPIED, COMMIT, DEFINE, START, RUNS)
WINDOW = (OFF, FREEZE, FROZEN, COPY, COPIED)
RUNNING, LATE = (FENCE, STOP), (START, RUNS)
SYNC = (FREEZE, FROZEN, COPY)
KINDS = ("lost_reply", "drop", "late", "hang", "freeze", "cut_answer", "no_answer", "error", "error_after")


def ours(host: EsxHost) -> list[int]:
    """Ids of our snapshots, oldest first."""
    return [one["id"] for one in host.snapshots(VM) if one["name"].startswith("tokvm-")]


def foreign(host: EsxHost) -> list[str]:
    return [one["name"] for one in host.snapshots(VM) if not one["name"].startswith("tokvm-")]


def ordered_once(host: EsxHost) -> bool:
    """No mark of ours is two snapshots'."""
    marks = [one["name"] for one in host.snapshots(VM) if one["id"] in ours(host)]
    return len(marks) == len(set(marks))


def said(ended: Ended) -> str:
    return " ".join(ended.stderr.split())


THEIRS = ("theirs, below ours", "theirs, between ours", "ours, the newest", "ours, since which")
HOW = ("held by us", "at once", "slowly")


def let_merge(host: EsxHost, how: str) -> None:
    with host.edit() as state:
        state["options"]["readers_lock"] = how == "held by us"
        state["options"]["merge_s"] = 3.0 if how == "slowly" else 0.0


def between_snapshots(bench: Bench, host: EsxHost) -> dict[str, int]:
    """Synced, with somebody's snapshots below and above ours."""
    bench.afresh()
    bench.guest_writes()
    below = host.foreign_snapshot(VM, "below")["id"]
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    between = host.foreign_snapshot(VM, "between")["id"]
    bench.guest_writes()
    return {"theirs, below ours": below, "theirs, between ours": between}


def delete(host: EsxHost, theirs: dict[str, int], whose: str, how: str) -> None:
    let_merge(host, how)
    host.delete_snapshot(VM, {**theirs, "ours, the newest": ours(host)[-1], "ours, since which": ours(host)[0]}[whose])
