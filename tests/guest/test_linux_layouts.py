"""The micro-morph on the layouts of four distributions: found, and replayed over the last delta by an appliance that waited.

disk ─► inspect ─► plan ─► an appliance waits ─► the guest's last delta below it ─► replay, commit ─► every fsck, the bytes
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.domain.conftest import make_plan
from tests.guest.linux_layouts import LABEL, LAYOUTS, Layout, keep_a_snapshot, make, sound

from tokvm.app.morph import open_disk
from tokvm.app.morphers import WayMorpher
from tokvm.app.ways import Replay
from tokvm.core.units import KiB, MiB
from tokvm.guest import micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestFacts, LinuxFacts, Verdict, Way
from tokvm.guest.inspection import inspect
from tokvm.guest.morph_store import MorphStore
from tokvm.guest.verdict import judge
from tokvm.lab.kernel import find_kernel

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]

PIECE = 64 * KiB
ROOTS = {"rhel": "/dev/rhel/root", "debian": "/dev/debian-vg/root", "suse": "/dev/sda2", "fedora": "btrfsvol:/dev/sda3/root"}
BOOTS = {"rhel": "/dev/sda1", "debian": "/dev/sda2", "fedora": "/dev/sda2"}


@dataclass
class Guest:
    name: str
    layout: Layout
    disk: Path
    work: Path
    tcg: bool

    @property
    def note(self) -> str:
        return f"/boot/{'grub' if self.name == 'debian' else 'grub2'}/note"

    def appliance(self, disk: Path | None = None, *, readonly: bool = True) -> Appliance:
        return Appliance.launch([GuestDisk(str(disk or self.disk))], readonly=readonly, tcg=self.tcg)

    def store(self) -> MorphStore:
        return MorphStore(self.work / "morph", [GuestDisk(str(self.disk))], open_disk)


@pytest.fixture(scope="module", params=LAYOUTS)
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tcg: bool) -> Guest:
    work = tmp_path_factory.mktemp(request.param)
    layout = LAYOUTS[request.param]
    disk = make(request.param, layout, work, find_kernel(), tcg=tcg)
    sound(disk, layout, work)
    return Guest(request.param, layout, disk, work, tcg)


def linux_of(facts: GuestFacts) -> LinuxFacts:
    assert facts.linux is not None
    return facts.linux


def after_the_guests_last_writes(guest: Guest, mounts: dict[str, str]) -> Path:
    """A copy of the disk on which the guest went on: files grew, came and went, in / and in /boot."""
    copy = guest.work / "later.raw"
    shutil.copyfile(guest.disk, copy)
    with guest.appliance(copy, readonly=False) as appliance:
        g = appliance.g
        if guest.name == "suse":
            keep_a_snapshot(g, "/dev/sda")
        appliance.mount(mounts)
        appliance.write("/var/log/new", b"n" * (3 * MiB))
        g.rm("/var/log/old")
        g.write(guest.note, b"of the last hour")
    return copy


def apply_delta(guest: Guest, later: Path) -> int:
    """The pieces that differ, as a target writes them; how many."""
    changed = 0
    with later.open("rb") as new, guest.disk.open("rb") as old, closing(open_disk(GuestDisk(str(guest.disk)), None)) as target:
        for at in range(0, guest.layout.size, PIECE):
            piece = new.read(PIECE)
            if piece != old.read(PIECE):
                target.write(at, memoryview(piece))
                changed += 1
        target.flush()
    return changed


def test_it_is_morphed_over_its_last_delta_and_every_file_system_is_sound(guest: Guest) -> None:
    with guest.appliance() as appliance:
        facts = inspect(appliance)
        planned = micro.plan(appliance, facts, guest.work)
    linux = linux_of(facts)
    assert (facts.root, facts.mounts.get("/boot")) == (ROOTS[guest.name], BOOTS.get(guest.name))
    assert (facts.distro, linux.lvm) == (guest.layout.distro, guest.name in ("rhel", "debian"))
    assert linux.boot_free > 20 * MiB
    assert judge(facts, 1).ways[0] is Way.MICRO
    replay = Replay(Way.MICRO, family="linux", micro=planned.as_json(), mounts=facts.mounts)
    morpher = WayMorpher(replay, guest.store(), guest.work, guest.tcg)
    morpher.prepare(make_plan())
    later = after_the_guests_last_writes(guest, facts.mounts)
    assert apply_delta(guest, later) > 40
    morpher.morph(make_plan())
    morpher.store.close()

    sound(guest.disk, guest.layout, guest.work)
    with guest.appliance() as appliance:
        found = inspect(appliance)
        appliance.mount(found.mounts)
        default = linux_of(found).default_kernel
        assert default is not None
        assert default.has("virtio_blk")
        assert judge(found, 1).verdict is Verdict.READY
        assert appliance.read("/var/log/new") == b"n" * (3 * MiB)
        assert appliance.read(guest.note) == b"of the last hour"
        assert not appliance.g.exists("/var/log/old")
        if guest.name == "rhel":
            assert appliance.g.getxattr("/etc/dracut.conf.d/tokvm.conf", "security.selinux") == LABEL.encode()
    assert guest.disk.read_bytes() != later.read_bytes()

    with closing(guest.store()) as store:
        store.undo()
    assert guest.disk.read_bytes() == later.read_bytes(), "the exact bytes of the last delta"
