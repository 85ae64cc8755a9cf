"""The commands that move one guest of a lab.

    tokvm migrate                                       or, staged:
    tokvm sync ─► tokvm rehearse (--rehearse) ─► tokvm cutover

A rehearsal's copy must be heard of by nobody: that the outside clock heard nothing of one is looked at here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.lab.clock import OutsideClock
from tokvm.lab.command import Event, Finished, cutover_argv, migrate_argv, rehearse_argv, report_argv, run_tokvm, sync_argv
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord
from tokvm.lab.settings import LabSettings

COPIED = ("verdict", "works", "why", "way", "ways", "screenshot", "predicted_downtime_s", "predicted_parts", "timings", "proof")
KEPT = 100
"""Pictures and reports of earlier labs."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a guest's move needs. tell: takes every event of tokvm; say: a line for people."""

    folder: Path
    record: LabRecord
    clock: OutsideClock
    settings: LabSettings
    name: str
    say: Callable[[str], None]
    tell: Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Moved:
    """done: the last command, the one that failed if one did. known: the guest's boots before the cutover."""

    done: Finished
    known: frozenset[str]
    rehearsal: dict[str, object] = field(default_factory=dict)


def move(move: Move) -> Moved:
    """Until the target is started, or a command fails."""
    settings, known = move.settings, _boots(move)
    if not settings.staged:
        return Moved(_run(move, migrate_argv(move.record, move.folder, move.name, passes=settings.passes)), known)
    done = _run(move, sync_argv(move.record, move.folder, move.name, passes=settings.passes))
    rehearsal: dict[str, object] = {}
    if done.code == 0 and settings.rehearse:
        done = _run(move, _rehearsal(move))
        rehearsal = _copied(move, done.document)
        if _boots(move) != known:
            raise LabError("the rehearsal's copy was heard outside: its network is not isolated", where=move.name)
    if done.code == 0:
        done = _run(move, cutover_argv(move.folder, move.name, way=settings.way))
    return Moved(done, known, rehearsal)


def _rehearsal(move: Move) -> list[str]:
    settings = move.settings
    return rehearse_argv(
        *(move.folder, move.name), way=settings.way, deadline_s=settings.boot_timeout_s, boots=settings.rehearsal_boots
    )


def predicted(moved: Moved) -> dict[str, float]:
    """The downtime as tokvm saw it coming, by its last word on it: `total` and parts, in seconds. predicted_parts is
    part → {seconds, basis}."""
    for document in (moved.done.document, moved.rehearsal):
        total, parts = document.get("predicted_downtime_s"), document.get("predicted_parts")
        if isinstance(total, int | float):
            rows = parts.items() if isinstance(parts, dict) else ()
            return {"total": float(total), **{part: float(row["seconds"]) for part, row in rows if isinstance(row, dict)}}
    return {}


def _run(move: Move, argv: list[str]) -> Finished:
    move.say(f"tokvm {' '.join(argv[:3] if argv[0] in ('migrate', 'sync') else argv[:2])} …")
    return run_tokvm(argv, move.folder, timeout_s=move.settings.migrate_timeout_s, on_event=move.tell)


def _boots(move: Move) -> frozenset[str]:
    return frozenset(boot.id for boot in move.clock.boots(move.name))


def _copied(move: Move, document: dict[str, object]) -> dict[str, object]:
    """What the lab's document tells of a rehearsal; its picture would go with the lab."""
    found = {key: document[key] for key in COPIED if key in document}
    picture = Path(str(found.get("screenshot") or ""))
    if picture.is_file():
        found["screenshot"] = str(shutil.copyfile(picture, _kept(move.settings, f"{move.name}{picture.suffix}")))
    return found


def draw_report(folder: Path, settings: LabSettings, name: str, *, outside_s: float) -> dict[str, object]:
    """`drawn`: where `tokvm report` drew the move, foretold and actual, with the rehearsal's picture in it."""
    path = _kept(settings, f"{name}.svg")
    done = run_tokvm(report_argv(folder, name, path, outside_s=outside_s), folder, timeout_s=settings.migrate_timeout_s)
    if done.code != 0:
        raise LabError("the report was not drawn", where=name, fix="\n".join(done.messages))
    return {"drawn": str(path)}


def _kept(settings: LabSettings, name: str) -> Path:
    """A path in the folder that outlives the lab. The oldest files there go: nobody else clears the cache."""
    settings.pictures.mkdir(parents=True, exist_ok=True)
    ours = sorted(settings.pictures.glob("lab*-*.*"), key=lambda path: path.stat().st_mtime)
    for old in ours[:-KEPT]:
        old.unlink(missing_ok=True)
    return settings.pictures / name
