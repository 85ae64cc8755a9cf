"""kill -9 at the Nth write, flush or record of a pass; then resume: byte-identical, and no more sent again than allowed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.extents import ExtentKind
from tokvm.core.units import KiB
from tokvm.targets.open import TargetSpec, open_target
from tokvm.transfer.manifest import ManifestWriter
from tokvm.transfer.passes import Checkpoint, PassLimits, TargetState, run_pass
from tokvm.transfer.verify import verify

# The children use no thread of ours; 3.12 and later warn about forking while any thread lives.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

Model = tuple[bytes, list[tuple[int, int, ExtentKind]]]
PIECE = 64 * KiB
INTERVAL = 512 * KiB
LIMITS = PassLimits(checkpoint_bytes=INTERVAL, checkpoint_s=60.0)


class Journal:
    """Checkpoints and the target's identity in one file: appended, synced, read back after a death."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, what: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[str | None, Checkpoint | None]:
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        identity = next((row["identity"] for row in rows if "identity" in row), None)
        marks = [Checkpoint(**row) for row in rows if "position" in row]
        return identity, marks[-1] if marks else None


def run_once(reader: Any, path: Path, journal: Journal, manifest_path: Path) -> None:
    """What a migration does for one disk, crash-safe by itself."""
    identity, resume = journal.read()
    writer = open_target(TargetSpec(str(path)), size=reader.size, expect=identity)
    if identity is None:
        journal.record({"identity": writer.identity})
    manifest = ManifestWriter.open(manifest_path, number=0, disk=0, size=reader.size)
    run_pass(
        reader,
        writer,
        state=TargetState.UNKNOWN,
        resume=resume,
        record=lambda mark: journal.record(asdict(mark)),
        progress=lambda _: None,
        manifest=manifest,
        limits=LIMITS,
    )
    manifest.close()
    writer.close()


def die_at(call: str, count: int, work: Any) -> int:
    """Run `work` in a child that gets SIGKILL before its `count`-th call of os.<call>. Its exit status."""
    child = os.fork()
    if child == 0:
        real, seen = getattr(os, call), [0]

        def counted(*arguments: Any) -> Any:
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, call, counted)
        ended = 1
        try:
            work()
            ended = 0
        finally:
            os._exit(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def allowed(extents: int) -> int:
    """What a resumed run may send again: one interval, and what was in the writers' hands."""
    return INTERVAL + 16 * PIECE


@pytest.mark.parametrize(
    ("call", "points"),
    [("pwrite", range(1, 60, 4)), ("fdatasync", range(1, 30, 3)), ("fsync", range(1, 16, 2)), ("ftruncate", range(1, 3))],
)
@pytest.mark.slow
def test_killed_anywhere_the_next_run_finishes_byte_identical(
    call: str, points: range, model: Model, reader_of: Any, tmp_path: Path
) -> None:
    content, extents = model
    killed = 0
    for point in points:
        place = tmp_path / f"{call}-{point}"
        place.mkdir()
        path, journal, sealed = place / "disk.raw", Journal(place / "journal"), place / "manifest"
        status = die_at(
            call, point, lambda p=path, j=journal, s=sealed: run_once(reader_of(content, extents, piece=PIECE), p, j, s)
        )
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        _, mark = journal.read()
        reader = reader_of(content, extents, piece=PIECE)
        run_once(reader, path, journal, sealed)
        assert path.read_bytes() == content
        done = mark.data_bytes if mark else 0
        assert reader.sent == reader.total - done
        writer = open_target(TargetSpec(str(path)), size=len(content), expect=journal.read()[0])
        report = verify(writer, [sealed], progress=lambda _: None)
        writer.close()
        assert (report.bad, report.unverifiable_bytes) == ([], 0)
    assert killed >= len(points) // 2


@pytest.mark.slow
def test_killed_twice(model: Model, reader_of: Any, tmp_path: Path) -> None:
    content, extents = model
    for first, second in [(3, 2), (9, 9), (20, 3), (31, 12), (40, 1)]:
        place = tmp_path / f"{first}-{second}"
        place.mkdir()
        path, journal, sealed = place / "disk.raw", Journal(place / "journal"), place / "manifest"
        for point in (first, second):
            die_at(
                "pwrite", point, lambda p=path, j=journal, s=sealed: run_once(reader_of(content, extents, piece=PIECE), p, j, s)
            )
        run_once(reader_of(content, extents, piece=PIECE), path, journal, sealed)
        assert path.read_bytes() == content


def test_what_is_sent_again_is_bounded_by_the_checkpoint_interval(reader_of: Any, tmp_path: Path) -> None:
    """Killed late in a long pass: the distance between what was handed out and the last checkpoint."""
    content = os.urandom(KiB) * (16 * 1024)
    extents = [(0, len(content), ExtentKind.DATA)]
    for point in (40, 77, 120, 200):
        place = tmp_path / str(point)
        place.mkdir()
        journal, counter = Journal(place / "journal"), place / "handed"
        reader = reader_of(content, extents, piece=PIECE)
        log = os.open(counter, os.O_WRONLY | os.O_CREAT)
        reader.before = lambda number, log=log: os.lseek(log, os.write(log, b"%08d" % number) * 0, os.SEEK_SET)
        status = die_at("pwrite", point, lambda r=reader, p=place, j=journal: run_once(r, p / "disk.raw", j, p / "manifest"))
        os.close(log)
        assert status == -signal.SIGKILL
        _, mark = journal.read()
        handed = (int(counter.read_bytes()) + 1) * PIECE
        assert handed - (mark.data_bytes if mark else 0) <= allowed(1)
