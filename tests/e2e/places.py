"""The played hosts that a migration can begin on: what differs between them, and nothing else.

A place has one VM, `web`, with disks of SIZES. All of it lies in one folder, so that it can be kept and put back.
"""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tokvm.testing.esxi import host as esxi
from tokvm.testing.esxi.errors import VimFault
from tokvm.testing.hyperv import host as hyperv
from tokvm.testing.persona.host import PlayedHost, Record
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.xenserver import host as xenserver

MiB = 1 << 20
SIZES = (7 * MiB, 3 * MiB + 512 * 5)
VM = "web"


class Played(Protocol):
    """What both hosts answer alike."""

    def is_running(self, name: str) -> bool: ...

    def start(self, name: str) -> None: ...

    def read_disk(self, name: str, disk: int = 0) -> bytes: ...

    def write_disk(self, name: str, disk: int = 0, *, offset: int, data: bytes) -> None: ...


class Place(Protocol):
    """kept: folders of the host that hold its disks; states: files in it that hold all else. imports: modules that a tokvm
    needs to reach it, if not all do."""

    name: str
    kept: tuple[str, ...]
    states: tuple[str, ...]
    imports: tuple[str, ...]

    @property
    def host(self) -> PlayedHost: ...

    @property
    def url(self) -> str: ...

    @property
    def options(self) -> list[str]:
        """With which `tokvm sync` reaches it."""
        ...

    @property
    def calls(self) -> dict[str, str]:
        """The name of each change → the method of vSphere's API that is told to make it, if one is."""
        ...

    def violations(self) -> list[Record]: ...

    def close(self) -> None: ...

    @property
    def played(self) -> Played: ...

    def forget(self) -> None:
        """No snapshot, no claim, no fence: as if tokvm had never been here. The VM runs."""
        ...

    def uuid(self) -> str: ...

    def guest_writes(self, chance: random.Random) -> None:
        """Something only this kind of disk knows about."""
        ...


class OverSsh:
    """A host that is reached over SSH alone."""

    host: PlayedHost
    states: tuple[str, ...] = ("state.json",)
    imports: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.host.url

    @property
    def options(self) -> list[str]:
        return ["--ssh-config", str(self.host.sshd.config_file)]

    @property
    def calls(self) -> dict[str, str]:
        return {}

    def violations(self) -> list[Record]:
        return self.host.violations()

    def close(self) -> None:
        self.host.close()


class XenPlace(OverSsh):
    name = "xenserver"
    kept: tuple[str, ...] = ("backend",)

    def __init__(self, folder: Path) -> None:
        machine = xenserver.MachineSpec(VM, disks=[xenserver.DiskSpec(size) for size in SIZES])
        self.host: xenserver.XenHost = xenserver.build_host(folder, machines=[machine])
        self.played: Played = self.host

    def forget(self) -> None:
        with self.host.edit() as state:
            for vm in state["vms"].values():
                vm["maps"]["other-config"].pop("tokvm-owner", None)
                vm["maps"]["other-config"].pop("tokvm-fence", None)
                vm["maps"]["blocked-operations"].clear()
            for uuid in [vm["uuid"] for vm in state["vms"].values() if vm["snapshot_of"]]:
                del state["vms"][uuid]
        if not self.host.is_running(VM):
            self.host.start(VM)

    def uuid(self) -> str:
        return self.host.uuid(VM)

    def guest_writes(self, chance: random.Random) -> None: ...


class HyperVPlace(OverSsh):
    """role: a cluster's, or None. merge_s: how long a merge takes."""

    name = "hyperv"
    kept: tuple[str, ...] = ("backend", "drives")

    def __init__(self, folder: Path, *, role: hyperv.ClusterSpec | None = None, merge_s: float = 0.0) -> None:
        machine = hyperv.MachineSpec(VM, disks=[hyperv.DiskSpec(size) for size in SIZES], cluster=role)
        self.host: hyperv.HyperVHost = hyperv.build_host(
            folder, machines=[machine], options=hyperv.HostOptions(merge_s=merge_s)
        )
        self.played: Played = self.host
        self._before = self._settings()

    def _settings(self) -> tuple[dict[str, object], object]:
        vm = self.host.vm(VM)
        return dict(vm["fields"]), vm["role"]

    def forget(self) -> None:
        fields, role = self._before
        with self.host.edit() as state:
            (vm,) = state["vms"].values()
            vm["notes"] = ""
            vm["fields"].update(fields)
            vm["role"] = role  # type: ignore[typeddict-item]
        shutil.rmtree(self.host.folder / "handles")  # whoever held a file was killed
        (self.host.folder / "handles").mkdir()
        for one in self.host.checkpoints(VM):
            self.host.delete_checkpoint(VM, one["id"])
        self.host.finish_merges()
        if not self.host.is_running(VM):
            self.host.start(VM)

    def uuid(self) -> str:
        return self.host.id(VM)

    def guest_writes(self, chance: random.Random) -> None:
        """Trims: in a layer, what reads as zeros is not what is absent."""
        disk = chance.randrange(len(SIZES))
        length = 512 * chance.choice((1, 64, 4096))
        offset = 512 * chance.randrange((SIZES[disk] - length) // 512 + 1)
        self.host.trim_disk(VM, disk, offset=offset, length=length)


class EsxPlace(OverSsh):
    """merge_s: how long a consolidation takes."""

    name = "esx"
    ha_can_be_told = False
    """To leave the VM alone."""

    def __init__(self, folder: Path, *, merge_s: float = 0.0, store: str = "VMFS-6") -> None:
        machine = esxi.MachineSpec(VM, disks=[esxi.DiskSpec(size) for size in SIZES], autostart=esxi.AutostartSpec())
        options = esxi.HostOptions(merge_s=merge_s, fault_code=0, datastores=[esxi.DatastoreSpec("Store 1", type=store)])
        self.host: esxi.EsxHost = esxi.build_host(folder, machines=[machine], options=options)
        self.played: Played = self.host
        self.kept: tuple[str, ...] = ("backend", f"vmfs/volumes/{self.host.state()['datastores'][0]['uuid']}")
        self._entry = dict(self.host.vm(VM)["autostart"] or {})

    def forget(self) -> None:
        shutil.rmtree(self.host.folder / "handles")  # whoever held a file was killed
        (self.host.folder / "handles").mkdir()
        folder = self.host.local(self.host.directory(VM))
        for name in ("tokvm-owner", "tokvm.json", "tokvm.json.new"):
            (folder / name).unlink(missing_ok=True)
        with self.host.edit() as state:
            state["vms"][0]["autostart"] = dict(self._entry)  # type: ignore[typeddict-item]
        for one in self.host.snapshots(VM):
            self.host.finish_tasks()
            self.host.delete_snapshot(VM, one["id"])
        self.host.finish_tasks()
        if not self.host.is_running(VM):
            self.host.start(VM)

    def uuid(self) -> str:
        return self.host.vm(VM)["uuid"]

    def guest_writes(self, chance: random.Random) -> None:
        """Trims: in a seSparse layer, what reads as zeros is not what is absent."""
        disk = chance.randrange(len(SIZES))
        length = 512 * chance.choice((1, 64, 4096))
        offset = 512 * chance.randrange((SIZES[disk] - length) // 512 + 1)
        self.host.trim_disk(VM, disk, offset=offset, length=length)

    def ha_restarts(self) -> None:
        """vSphere HA takes a stop for a failure: nothing over SSH forbids it. What is read keeps the VM from starting."""
        with suppress(VimFault):
            self.host.ha_restarts(VM)

    def refuses(self, order: str) -> None:
        """The host will say no to the next such order, and do nothing."""
        self.host.fault(order, "error")


CALLS = {
    "power.shutdown": "ShutdownGuest",
    "power.off": "PowerOffVM_Task",
    "power.on": "PowerOnVM_Task",
    "snapshot.create": "CreateSnapshot_Task",
    "snapshot.remove": "RemoveSnapshot_Task",
    "write": "ReconfigVM_Task",
    "update_ha": "ReconfigureComputeResource_Task",
    "update_autostartentry": "ReconfigureAutostart",
}
"""What an ESXi host is told over SSH, and the call of the API for the same; the moments of both have the first name."""


class VspherePlace(EsxPlace):
    """The same host, told what to do by vSphere's API: vCenter's, or its own. ssh: disks are read by SFTP; else over HTTPS."""

    imports: tuple[str, ...] = ("tokvm.sources.vmware.api.source",)

    def __init__(self, folder: Path, *, vcenter: bool, ssh: bool, store: str, denied: tuple[str, ...] = ()) -> None:
        super().__init__(folder, store=store)
        self.name = "vcenter" if vcenter else "hostd"
        self.vsphere = VSphere(self.host, vcenter=vcenter, denied=list(denied))
        self.states = ("state.json", f"{self.name}/state.json")
        self.ha_can_be_told = vcenter and not denied
        self._ssh = ssh

    @property
    def url(self) -> str:
        return self.vsphere.url

    @property
    def options(self) -> list[str]:
        login = ["--password-file", str(self.vsphere.password_file), "--tls-ca", str(self.vsphere.ca_file)]
        return [*login, *([*super().options, "--bytes", f"ssh://{self.host.sshd.netloc}"] if self._ssh else [])]

    @property
    def calls(self) -> dict[str, str]:
        return CALLS

    def violations(self) -> list[Record]:
        return [*super().violations(), *self.vsphere.violations()]

    def close(self) -> None:
        self.vsphere.close()
        super().close()

    def forget(self) -> None:
        self.vsphere.clear_faults()
        with self.vsphere.store.change() as own:
            for name in ("overrides", "tracking", "extra"):
                own[name].clear()
        super().forget()

    def ha_restarts(self) -> None:
        """Where there is a cluster, and the VM's own restart priority there does not forbid it."""
        with suppress(VimFault):
            self.vsphere.ha_restarts(VM)

    def refuses(self, order: str) -> None:
        self.vsphere.fault(CALLS[order], "task_error")
