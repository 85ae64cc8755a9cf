"""An ESXi host with real guests: played ESXi behind a real sshd, a Linux in QEMU behind every VM of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokvm.lab.layer_backend import QEMU_BACKEND
from tokvm.lab.machines import MEMORY, LabMachine
from tokvm.lab.settings import LabSettings
from tokvm.testing.esxi.host import DiskSpec, EsxHost, HostOptions, MachineSpec, NicSpec, build_host
from tokvm.testing.sshd import Lifetime

MERGE_S = 1.0


def build_esx(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> EsxHost:
    """The host in `folder`; its guests are still to be made. They have a BIOS, and their power button is VMware Tools'."""
    specs = [
        MachineSpec(
            one.name,
            uuid=one.uuid,
            disks=[DiskSpec(settings.disk_size)],
            nics=[NicSpec(one.mac, address_type="manual")],
            memory=MEMORY,
            running=False,
            fields={"annotation": "a guest of the lab"},
        )
        for one in machines
    ]
    options = HostOptions(backend=QEMU_BACKEND, merge_s=MERGE_S)
    return build_host(folder, machines=specs, options=options, lifetime=Lifetime.OUTLIVES_US)
