"""Verification of a migration's targets against the manifests of its passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from tokvm.app.state import manifest_path
from tokvm.app.workshop import Workshop
from tokvm.core.errors import UsageError
from tokvm.migration.records import PassState, TargetRan
from tokvm.targets.readback import ReadBack
from tokvm.transfer.verify import verify


class Watcher(Protocol):
    def pass_begin(self, n: int, kind: str, disk: int, total: int, /) -> None: ...

    def advance(self, disk: int, count: int, /) -> None: ...

    def note(self, text: str, /) -> None: ...


@dataclass(frozen=True, slots=True)
class DiskVerdict:
    """`bad`: (offset, length) of ranges that differ from what was written."""

    index: int
    path: str
    size: int
    verified_bytes: int
    unverifiable_bytes: int
    skipped_bytes: int
    bad: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    id: str
    disks: tuple[DiskVerdict, ...]

    @property
    def bad(self) -> list[tuple[str, int, int]]:
        """(path, offset, length) of every bad range."""
        return [(disk.path, offset, length) for disk in self.disks for offset, length in disk.bad]

    def to_dict(self) -> dict[str, object]:
        return {"outcome": "bad" if self.bad else "good", "id": self.id, "disks": [asdict(disk) for disk in self.disks]}


def verify_job(shop: Workshop, name: str, watcher: Watcher, *, sample: float | None) -> Verdict:
    """Every disk of a migration, past the page cache. The target must be off: a guest that ran has changed its disks."""
    record = shop.journal.find(name)
    book = shop.journal.book(record.id)
    with shop.journal.lock(record.id):
        if record.target_ran is not TargetRan.NO:
            watcher.note("the target has run: what its guest wrote differs from the manifests, and rightly so")
        passes = book.passes()
        verdicts = []
        for disk in book.disks():
            if any(one.disk == disk.index and one.state is PassState.RUNNING for one in passes):
                what = "a pass was interrupted, so what it wrote is not all written down yet"
                raise UsageError(what, where=disk.path, fix="finish it with tokvm sync, then verify")
            numbers = [p.number for p in passes if p.disk == disk.index and p.state is PassState.DONE]
            paths = [manifest_path(shop.state_dir, record.id, number, disk.index) for number in sorted(numbers)]
            paths = [path for path in paths if path.exists()]
            if not paths:
                raise UsageError("nothing was copied yet", where=disk.path, fix="run tokvm sync first")
            watcher.pass_begin(0, "verify", disk.index, disk.size)
            target = ReadBack.open(disk.path, expect=disk.identity or None)
            try:
                found = verify(target, paths, progress=lambda n, i=disk.index: watcher.advance(i, n), sample=sample)  # type: ignore[misc]
            finally:
                target.close()
            verdicts.append(
                DiskVerdict(
                    disk.index,
                    disk.path,
                    disk.size,
                    found.verified_bytes,
                    found.unverifiable_bytes,
                    found.skipped_bytes,
                    tuple(found.bad),
                )
            )
        return Verdict(record.id, tuple(verdicts))
