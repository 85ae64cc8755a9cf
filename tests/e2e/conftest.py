"""A played XenServer, a nursery that forks tokvm, and what a guest does to its disks meanwhile."""

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


@dataclass
class Ended:
    code: int
    events: int
    stderr: str


@dataclass
class Saved:
    folder: Path
    targets: dict[Path, bytes]
    host: bytes


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
        return self.tokvm(*argv, "--ssh-config", str(self.host.sshd.config_file), kill_at=kill_at)

    def tokvm(self, *argv: str, kill_at: int | None = None) -> Ended:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        request = {"argv": [*argv, "--state-dir", str(self.state)], "kill_at": kill_at, "domains": str(self.domains)}
        self.nursery.stdin.write(json.dumps(request) + "\n")
        self.nursery.stdin.flush()
        return Ended(**json.loads(self.nursery.stdout.readline()))

    @property
    def domains(self) -> Path:
        """The target hypervisor's domains."""
        return self.folder / f"domains{self.number}.json"

    @property
    def target_runs(self) -> bool:
        return self.domains.exists() and "running" in json.loads(self.domains.read_text()).values()

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
                vm["maps"]["other-config"].pop("tokvm-fence", None)
                vm["maps"]["blocked-operations"].clear()
            for uuid in [vm["uuid"] for vm in state["vms"].values() if vm["snapshot_of"]]:
                del state["vms"][uuid]

    def save(self) -> Saved:
        """Everything as it stands between two commands, to be put back by `restore`."""
        kept = self.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.state, kept / "state")
        shutil.copytree(self.host.folder / "backend", kept / "backend")
        targets = {path: path.read_bytes() for path in self.target.iterdir()}
        return Saved(kept, targets, (self.host.folder / "state.json").read_bytes())

    def restore(self, saved: Saved) -> None:
        """Targets are written in place: they are known by their inode and mark."""
        self.domains.unlink(missing_ok=True)
        for name, place in (("state", self.state), ("backend", self.host.folder / "backend")):
            shutil.rmtree(place)
            shutil.copytree(saved.folder / name, place)
        for path, held in saved.targets.items():
            with path.open("r+b") as file:
                file.write(held)
                file.truncate()
        (self.host.folder / "state.json").write_bytes(saved.host)

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
