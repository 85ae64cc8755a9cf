"""Disks by themselves, morphed and put back: `tokvm morph` and `tokvm unmorph`.

<state>/morphs/<hash of the disks' paths>/    the morph's overlays, undo logs and its virt-v2v.log (guest.morph_store)
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tokvm.app.claimed import refuse_claimed
from tokvm.app.convert import Target
from tokvm.app.state import prepare_state_dir
from tokvm.core.errors import Blocked, UsageError
from tokvm.core.machine import Firmware, VirtualMachine
from tokvm.core.text import printable
from tokvm.core.units import GiB
from tokvm.domain.accel import kvm_works
from tokvm.guest import micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import TOUCHES_DISK, GuestDisk, GuestError, Judgement, Way
from tokvm.guest.engines import Conversion, Engine, Micro, MorphReport, morph_disks
from tokvm.guest.inspection import inspect
from tokvm.guest.morph_record import MorphRecord
from tokvm.guest.morph_store import MorphStore, Undone
from tokvm.guest.verdict import judge
from tokvm.guest.virt_v2v import FIX_INSTALL, VirtV2v, find_virt_v2v
from tokvm.targets.base import Target as OpenTarget
from tokvm.targets.open import TargetSpec, open_target

FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class MorphWishes:
    """way: None for the best that changes disks. root: libguestfs' name of the system meant. deadline_s: for the morph."""

    way: Way | None = None
    root: str | None = None
    virtio_win: str | None = None
    firmware: Firmware = Firmware.BIOS
    deadline_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found, what will be or was done. judgement: None when nobody looked, because the way was given. way: None when
    nothing has to be done. report: None when nothing was."""

    disks: tuple[GuestDisk, ...]
    judgement: Judgement | None
    way: Way | None
    report: MorphReport | None = None

    def to_dict(self) -> dict[str, object]:
        judged, report = self.judgement, self.report
        found: dict[str, object] = {
            "outcome": "morphed" if report else "nothing to do" if self.way is None else "not morphed",
            "disks": [disk.path for disk in self.disks],
            "way": self.way,
        }
        if judged is not None:
            findings = [{"severity": one.severity, "what": one.what, "fix": one.fix} for one in judged.findings]
            found |= {"verdict": judged.verdict, "why": judged.why, "ways": list(judged.ways), "findings": findings}
        if report is not None:
            found |= {"seconds": report.seconds, "changed_bytes": report.changed, "warnings": list(report.warnings)}
        return found


def open_disk(disk: GuestDisk, expect: str | None) -> OpenTarget:
    """A disk that is there, held exclusively; the identity it must have is `expect`, or else its own: nothing is marked anew,
    so that the migration which made it still knows it."""
    with closing(Target(disk.path, disk.format).open_to_read()) as found:
        size, identity = found.size, found.identity
    return open_target(TargetSpec(disk.path, create=False, format=disk.format), size=size, expect=expect or identity)


def disks_of(paths: Sequence[str], image_format: str) -> tuple[GuestDisk, ...]:
    if image_format not in FORMATS:
        raise UsageError(f"{image_format!r} is no format of a disk", fix=f"--format {', or '.join(FORMATS)}")
    return tuple(GuestDisk(str(Path(path).absolute()), image_format) for path in paths)


def look(disks: tuple[GuestDisk, ...], wishes: MorphWishes) -> Outcome:
    """Which way would be taken; the disks are only read. Blocked: none of those that change disks works for this guest."""
    if wishes.way is not None:
        return Outcome(disks, None, _checked(wishes.way))
    with Appliance.launch(disks, readonly=True, tcg=not kvm_works(), deadline_s=wishes.deadline_s) as appliance:
        facts = inspect(appliance, root=wishes.root)
    judged = judge(
        facts,
        len(disks),
        windows_drivers=micro.windows_drivers_at_hand(wishes.virtio_win),
        virt_v2v=find_virt_v2v() is not None,
    )
    if judged.ways[:1] == (Way.NONE,):
        return Outcome(disks, judged, None)
    way = next((way for way in judged.ways if way in TOUCHES_DISK), None)
    if way is None:
        fixes = "; ".join(finding.fix for finding in judged.findings if finding.fix)
        raise Blocked(f"no morph helps this guest: {judged.why}", where=disks[0].path, fix=fixes)
    return Outcome(disks, judged, way)


def morph(found: Outcome, state_dir: Path, wishes: MorphWishes, on_step: Callable[[str], None]) -> Outcome:
    """Do it. GuestError, Ctrl-C and the like: the disks hold what they held. UnsafeTarget: one is a migration's."""
    if found.way is None:
        return found
    refuse_claimed([disk.path for disk in found.disks], state_dir)
    folder = _folder_for(prepare_state_dir(state_dir), found.disks)
    with closing(MorphStore(folder, found.disks, open_disk)) as store:
        report = morph_disks(store, _engine(found.way, folder, wishes, on_step))
    return Outcome(found.disks, found.judgement, found.way, report)


def unmorph(paths: Sequence[str], state_dir: Path, *, forget: bool) -> tuple[Undone, tuple[str, ...]]:
    """What came of it, and all disks of the morph that these belong to. forget: only the undo logs go, the morph stays.
    UnsafeTarget: a migration has written to one of them since, and what was there before would be put over that."""
    results, disks = [Undone.NOTHING], []
    for folder, recorded in _morphs_of(state_dir, [str(Path(path).absolute()) for path in paths]):
        with closing(MorphStore(folder, recorded, open_disk)) as store:
            if forget:
                store.forget()
            else:
                if store.touched():
                    refuse_claimed([disk.path for disk in recorded], state_dir)
                results.append(store.undo())
            shutil.rmtree(folder, ignore_errors=True)  # while its lock is held: segments and logs are of no use any more
        disks += [disk.path for disk in recorded]
    worst = next(one for one in (Undone.TOUCHED, Undone.EXACT, Undone.NOTHING) if one in results)
    return worst, tuple(disks)


def _checked(way: Way) -> Way:
    if way not in TOUCHES_DISK:
        raise UsageError(f"the way {way!s} changes no disk", fix=f"--way {', or '.join(sorted(TOUCHES_DISK))}")
    return way


def _engine(way: Way, folder: Path, wishes: MorphWishes, on_step: Callable[[str], None]) -> Engine:
    tcg = not kvm_works()
    if way is Way.MICRO:
        return Micro(
            folder, tcg=tcg, root=wishes.root, virtio_win=wishes.virtio_win, deadline_s=wishes.deadline_s, on_step=on_step
        )
    program = find_virt_v2v()
    if program is None:
        raise Blocked("virt-v2v-in-place is not installed here", fix=FIX_INSTALL)
    vm = VirtualMachine("", "disks", vcpus=1, memory=GiB, disks=(), firmware=wishes.firmware)
    return Conversion(
        VirtV2v(
            program,
            vm,
            folder / "virt-v2v.log",
            tcg=tcg,
            root=wishes.root,
            virtio_win=wishes.virtio_win,
            virt_tools=os.environ.get("VIRT_TOOLS_DATA_DIR"),
            deadline_s=wishes.deadline_s,
            on_step=on_step,
        )
    )


def _folder_for(state_dir: Path, disks: Sequence[GuestDisk]) -> Path:
    """Where the morph of exactly these disks is kept. GuestError: some of them are in the middle of a morph with others."""
    paths = [disk.path for disk in disks]
    for folder, recorded in _morphs_of(state_dir, paths):
        if _resolved(disk.path for disk in recorded) == _resolved(paths):
            return folder
        raise GuestError(
            f"it was morphed before together with {printable(', '.join(disk.path for disk in recorded))}",
            where=paths[0],
            fix="give the same disks in the same order, or tokvm unmorph them first",
        )
    name = hashlib.blake2b("\0".join(_resolved(paths)).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return state_dir / "morphs" / name


def _morphs_of(state_dir: Path, paths: Sequence[str]) -> Iterator[tuple[Path, tuple[GuestDisk, ...]]]:
    """Folder and disks of every morph that one of these disks is part of."""
    wanted = set(_resolved(paths))
    for folder in sorted((state_dir / "morphs").glob("*")):
        record = MorphRecord.read(folder)
        if record is not None and wanted & set(_resolved(note.path for note in record.disks)):
            yield folder, tuple(note.disk for note in record.disks)


def _resolved(paths: Iterator[str] | Sequence[str]) -> list[str]:
    return [os.path.realpath(path) for path in paths]
