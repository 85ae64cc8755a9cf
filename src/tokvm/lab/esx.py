"""An ESXi host with real guests: played ESXi behind a real sshd, a Linux in QEMU behind every VM of it.

esxi         VMFS-6: seSparse layers
esxi-vmfs5   an older datastore: COWD layers
esxi-locked  a build that keeps a base locked below its snapshots: it is cloned on the host first
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokvm.lab.layer_backend import QEMU_BACKEND
from tokvm.lab.machines import MEMORY, LabMachine
from tokvm.lab.settings import LabSettings
from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, EsxHost, HostOptions, MachineSpec, NicSpec, build_host
from tokvm.testing.sshd import Lifetime

MERGE_S = 1.0


class LockedHost(EsxHost):
    """One that tokvm has to be told of."""

    def reach(self, netloc: str) -> tuple[str, list[str]]:
        url, options = super().reach(netloc)
        return url, [*options, "--clone-base"]


def build_esx(
    folder: Path, machines: Sequence[LabMachine], settings: LabSettings, *, datastore: str = "VMFS-6", locked: bool = False
) -> EsxHost:
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
    options = HostOptions(
        backend=QEMU_BACKEND,
        merge_s=MERGE_S,
        datastores=[DatastoreSpec("datastore1", type=datastore)],
        base_stays_locked="files" if locked else "",
    )
    host = build_host(folder, machines=specs, options=options, lifetime=Lifetime.OUTLIVES_US)
    return LockedHost(folder, lifetime=Lifetime.OUTLIVES_US) if locked else host
