"""A Hyper-V host with real guests: played Windows behind a real sshd, a Linux in QEMU behind every VM of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokvm.lab.layer_backend import QEMU_BACKEND
from tokvm.lab.machines import MEMORY, LabMachine
from tokvm.lab.settings import LabSettings
from tokvm.testing.hyperv.host import DiskSpec, HostOptions, HyperVHost, MachineSpec, NicSpec, build_host
from tokvm.testing.sshd import Lifetime

MERGE_S = 1.0


def build_hyperv(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> HyperVHost:
    """The host in `folder`; its guests are still to be made. They are of generation 1: BIOS and IDE disks."""
    specs = [
        MachineSpec(
            one.name,
            id=one.uuid,
            disks=[DiskSpec(settings.disk_size)],
            nics=[NicSpec(one.mac.replace(":", "").upper(), dynamic_mac=False)],
            generation=1,
            memory=MEMORY,
            running=False,
            notes="a guest of the lab",
        )
        for one in machines
    ]
    options = HostOptions(backend=QEMU_BACKEND, merge_s=MERGE_S)
    return build_host(folder, machines=specs, options=options, lifetime=Lifetime.OUTLIVES_US)
