"""A checkpoint applied on the played Hyper-V: the guest's disk, and the chain below it, are what they were then."""

from __future__ import annotations

import pytest
from tests.persona.conftest import BuildHyperV, MiB
from tests.persona.test_hyperv_disks import by_tokvm, live

from tokvm.testing.hyperv.host import DiskSpec, MachineSpec


@pytest.mark.parametrize("which", [0, 1])
def test_an_applied_checkpoint_is_the_disk_of_then(build_hyperv: BuildHyperV, which: int) -> None:
    host = build_hyperv(MachineSpec("web", disks=[DiskSpec(8 * MiB)]))
    made, held = [], []
    for number in range(3):
        host.write_disk("web", offset=number * MiB, data=bytes([number + 1]) * 4096)
        held.append(host.read_disk("web"))
        made.append(host.foreign_checkpoint("web")["id"])
    host.write_disk("web", offset=5 * MiB, data=b"x" * 512)
    host.apply_checkpoint("web", made[which])
    assert not host.is_running("web")
    assert host.read_disk("web") == held[which] == by_tokvm(live(host))
    host.start("web")
    host.write_disk("web", offset=6 * MiB, data=b"y" * 512)
    host.guest_stops("web")
    assert by_tokvm(live(host)) == host.read_disk("web") != held[which]
    assert [one["id"] for one in host.checkpoints("web")] == made
