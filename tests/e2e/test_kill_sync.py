"""tokvm sync, killed with -9 at hundreds of points, on a played XenServer behind a real sshd: the same command goes on, and the
target is byte for byte the disk that was frozen.

Two families: a first sync (claim, snapshot, base) from nothing, and delta passes on and on over the same target. Points are
spread evenly over all of a run's writes, flushes, journal transactions and programs started; see nursery.py.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, XenHost, build_host

MiB = 1 << 20
SIZES = (7 * MiB, 3 * MiB + 512 * 5)
BASE_POINTS = 5
DELTA_POINTS = 6
DOUBLE_KILLS = 2


@dataclass
class Ended:
    code: int
    events: int
    stderr: str


@dataclass
class Bench:
    """A host, a state directory, a target directory, and the nursery that runs tokvm."""

    folder: Path
    host: XenHost
    nursery: subprocess.Popen[str]
    chance: random.Random = field(default_factory=lambda: random.Random(2))
    number: int = 0

    def sync(self, kill_at: int | None = None) -> Ended:
        argv = ["sync", self.host.url, "web", "--to", str(self.target), "--passes", "1", "--network", "*=user"]
        argv += ["--state-dir", str(self.state), "--ssh-config", str(self.host.sshd.config_file)]
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps({"argv": argv, "kill_at": kill_at}) + "\n")
        self.nursery.stdin.flush()
        return Ended(**json.loads(self.nursery.stdout.readline()))

    @property
    def state(self) -> Path:
        return self.folder / f"state{self.number}"

    @property
    def target(self) -> Path:
        return self.folder / f"target{self.number}"

    def afresh(self) -> None:
        """Another migration from nothing: new state, new targets, no snapshot and no claim on the host."""
        for old in (self.state, self.target):
            shutil.rmtree(old, ignore_errors=True)
        self.number += 1
        self.target.mkdir()
        with self.host.edit() as state:
            for vm in state["vms"].values():
                vm["maps"]["other-config"].pop("tokvm-owner", None)
            for uuid in [vm["uuid"] for vm in state["vms"].values() if vm["snapshot_of"]]:
                del state["vms"][uuid]

    def guest_writes(self) -> None:
        """Some runs, some single sectors, some zeros; also at the very end."""
        for disk, size in enumerate(SIZES):
            for _ in range(5):
                length = 512 * self.chance.choice((1, 1, 8, 64, 700))
                offset = 512 * self.chance.randrange((size - length) // 512 + 1)
                data = bytes(length) if self.chance.random() < 0.2 else self.chance.randbytes(length)
                self.host.write_disk("web", disk, offset=offset, data=data)
        self.host.write_disk("web", 1, offset=SIZES[1] - 512, data=self.chance.randbytes(512))

    def assert_identical(self) -> None:
        for disk in range(len(SIZES)):
            (target,) = self.target.glob(f"*-disk{disk}.raw")
            assert target.read_bytes() == self.host.read_disk("web", disk), f"disk {disk} differs"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    machine = MachineSpec("web", disks=[DiskSpec(size) for size in SIZES])
    nursery = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("nursery.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with build_host(tmp_path / "host", machines=[machine]) as host:
        yield Bench(tmp_path, host, nursery)
        assert host.violations() == []
    nursery.kill()
    nursery.communicate()


def points(total: int, count: int) -> list[int]:
    """`count` kill points, evenly from the first event to the last."""
    return sorted({1 + round(n * (total - 1) / (count - 1)) for n in range(count)})


def kill_and_go_on(bench: Bench, at: int) -> None:
    killed = bench.sync(kill_at=at)
    assert killed.code in (-9, 0), killed.stderr
    finished = bench.sync()
    assert finished.code == 0, finished.stderr
    bench.assert_identical()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_first_sync_killed_anywhere_goes_on(bench: Bench) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    bench.assert_identical()
    tried = points(whole.events, BASE_POINTS)
    for at in tried:
        bench.afresh()
        kill_and_go_on(bench, at)
    assert len(tried) >= 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_delta_passes_killed_anywhere_go_on(bench: Bench) -> None:
    bench.afresh()
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    tried = points(whole.events, min(DELTA_POINTS, whole.events))
    for number in range(DELTA_POINTS):
        bench.guest_writes()
        kill_and_go_on(bench, tried[number % len(tried)])
    assert DELTA_POINTS + BASE_POINTS >= 200


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twice_it_still_goes_on(bench: Bench) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    for number in range(DOUBLE_KILLS):
        if number % 3 == 0:
            bench.afresh()
        bench.guest_writes()
        bench.sync(kill_at=1 + bench.chance.randrange(whole.events))
        bench.sync(kill_at=1 + bench.chance.randrange(whole.events))
        finished = bench.sync()
        assert finished.code == 0, finished.stderr
        finished = bench.sync()  # an interrupted pass may be of an older snapshot: one more holds the newest writes
        assert finished.code == 0, finished.stderr
        bench.assert_identical()
