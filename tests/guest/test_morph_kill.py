"""kill -9 at any write, flush, rename or program of a morph, its commit and its undo: the exact bytes come back.

Numbers: reliability of the undo is asked for as 200 random kills; 40 of them run every day, all at night.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.guest.disks import change
from tests.guest.kills import KILLED, kill_after, run_child
from tests.targets.conftest import loop  # noqa: F401 - a fixture
from tests.transfer.conftest import ModelReader, make_delta

from tokvm.app.morph import open_disk
from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore, Undone
from tokvm.transfer.checkpoint import TargetState
from tokvm.transfer.passes import run_pass

# The children use no thread of ours; 3.12 and later warn about forking while any thread lives.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SIZE = 4 * MiB
EVERY_DAY = 20
ALL = 100


class Bench:
    """A VM of two disks: `path` under test and a small second one, with what they held before."""

    def __init__(self, path: Path, tmp_path: Path) -> None:
        second = tmp_path / "second.raw"
        second.write_bytes(random.Random(2).randbytes(MiB + 1536))
        self.disks = (GuestDisk(str(path)), GuestDisk(str(second)))
        self.folder = tmp_path / "state" / "morph"
        self.counter = tmp_path / "passed"
        self.before = self.content()

    def store(self) -> MorphStore:
        return MorphStore(self.folder, self.disks, open_disk)

    def content(self) -> list[str]:
        return [hashlib.sha256(Path(disk.path).read_bytes()).hexdigest() for disk in self.disks]

    def morph(self) -> None:
        with self.store() as store:
            first, second = store.begin()
            change(
                first, "write -P 1 4096 8192", "write -P 2 300k 400k", "write -P 3 3M 1M", "discard 1M 1M", "write -P 9 512 512"
            )
            change(second, "write -P 4 0 512", f"write -P 5 {MiB + 1024} 512")
            store.commit()

    def undo(self) -> None:
        with self.store() as store:
            store.undo()

    def points(self, act: Callable[[], None]) -> int:
        assert run_child(act, kill_at=None, counter=self.counter) == 0
        return int(self.counter.read_text())

    def check(self) -> None:
        assert self.content() == self.before
        assert self.store().state() is MorphState.NOTHING
        assert not self.folder.exists() or not list(self.folder.iterdir())


@pytest.fixture(params=["file", pytest.param("loop device", marks=pytest.mark.root)])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    content = random.Random(1).randbytes(SIZE)
    if request.param == "file":
        path = tmp_path / "disk.raw"
        path.write_bytes(content)
        return Bench(path, tmp_path)
    device = Path(request.getfixturevalue("loop")(size=SIZE, content={0: content}))
    return Bench(device, tmp_path)


def kill_all(bench: Bench, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    forward = bench.points(bench.morph)
    assert bench.content() != bench.before
    backward = bench.points(bench.undo)
    bench.check()
    died = 0
    for number in range(kills):
        if number % 10 == 9:
            died += kill_after(bench.morph, rng.uniform(0.05, 0.4)) == KILLED
        elif number % 3 < 2:
            died += run_child(bench.morph, kill_at=rng.randint(1, forward), seed=number) == KILLED
        else:
            assert run_child(bench.morph, kill_at=None) == 0
        for _ in range(rng.choice([0, 1, 1, 2]) if number % 3 < 2 else 1):
            died += run_child(bench.undo, kill_at=rng.randint(1, backward), seed=number) == KILLED
        with bench.store() as store:
            store.undo()
            assert store.undo() is Undone.NOTHING
        bench.check()
    assert died >= kills  # some are killed twice, and an undo of nothing passes too few points to be killed
    next_delta_is_good(bench)


def next_delta_is_good(bench: Bench) -> None:
    """A further pass over the disk that was put back: byte-identical."""
    path = Path(bench.disks[0].path)
    content, extents = make_delta(path.read_bytes(), seed=5)
    with closing(open_disk(bench.disks[0], None)) as target:
        reader = ModelReader(content, extents)
        run_pass(reader, target, state=TargetState.PREVIOUS_PASS, resume=None, record=print, progress=lambda _: None)
        assert bytes(target.read_back(0, SIZE)) == content
    assert path.read_bytes() == content


@pytest.mark.slow
def test_whatever_is_killed_the_undo_is_exact(bench: Bench) -> None:
    kill_all(bench, EVERY_DAY, seed=11)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_two_hundred_kills(bench: Bench) -> None:
    kill_all(bench, ALL, seed=12)
