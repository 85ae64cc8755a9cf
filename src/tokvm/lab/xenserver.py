"""A XenServer with real guests: the played toolstack behind a real sshd, a Linux in QEMU behind every VM of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokvm.lab.machines import MEMORY, LabMachine
from tokvm.lab.settings import LabSettings
from tokvm.lab.xenserver_backend import QEMU_BACKEND
from tokvm.testing.sshd import Lifetime
from tokvm.testing.xenserver.host import DiskSpec, HostOptions, MachineSpec, NicSpec, XenHost, build_host


def build_xenserver(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> XenHost:
    """The host in `folder`; its guests are still to be made."""
    specs = [
        MachineSpec(
            one.name,
            uuid=one.uuid,
            disks=[DiskSpec(settings.disk_size)],
            nics=[NicSpec(one.mac)],
            memory=MEMORY,
            running=False,
            description="a guest of the lab",
        )
        for one in machines
    ]
    options = HostOptions(backend=QEMU_BACKEND, in_use_s=0.5)
    return build_host(folder, machines=specs, options=options, lifetime=Lifetime.OUTLIVES_US)
