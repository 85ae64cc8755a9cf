"""Plans to make domains from, and a private libvirtd: real, privileged, and unseen by the host's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.machine import Disk, DiskBus, Nic, VirtualMachine
from tokvm.core.units import GiB, MiB
from tokvm.domain.base import DomainPlan, TargetDisk
from tokvm.lab.libvirtd import display_ports

SYSTEM_LIBVIRTD = Path("/usr/sbin/libvirtd")


def make_plan(
    *,
    name: str = "web",
    vm_uuid: str = "9f3a2b1c-0000-4000-8000-0123456789ab",
    paths: tuple[str, ...] = ("/srv/web-0.raw", "/dev/vg/web-1"),
    bus: DiskBus = DiskBus.VIRTIO_BLK,
    machine: str = "q35",
    bootable: int = 0,
    networks: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
    **vm: Any,
) -> DomainPlan:
    """A plan with one disk for each path (those below /dev are devices) and two NICs, unless `vm` says otherwise.
    `more` is for the plan itself."""
    facts: dict[str, Any] = {
        "vcpus": 2,
        "memory": 256 * MiB,
        "disks": tuple(Disk(i, f"vdi-{i}", GiB, bootable=i == bootable) for i in range(len(paths))),
        "nics": (Nic(0, "52:54:00:12:34:56", "Pool-wide network"), Nic(1, "52:54:00:12:34:57", "storage")),
        **vm,
    }
    disks = tuple(TargetDisk(path, path.startswith("/dev/"), bus, serial=f"tokvm-{i}") for i, path in enumerate(paths))
    wanted = {"*": "user", "storage": "none"} if networks is None else networks
    return DomainPlan(VirtualMachine(uuid=vm_uuid, name=name, **facts), name, disks, wanted, machine=machine, **(more or {}))


@pytest.fixture(name="make_plan")
def _make_plan() -> Callable[..., DomainPlan]:
    return make_plan


@dataclass
class PrivateLibvirtd:
    """A libvirtd in a mount namespace of its own: own /etc/libvirt, /var/lib/libvirt and /run, own socket."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.folder}/sock/libvirt-sock"

    def start(self) -> None:
        script = "; ".join(
            [
                "set -e",
                "mount -t tmpfs tmpfs /run",
                "mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt",
                *(f'mount --bind "$0/{mine}" {theirs}' for mine, theirs in _PLACES.items()),
                'exec "$1" --config "$0/libvirtd.conf" --pid-file "$0/pid"',
            ]
        )
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self.folder), str(SYSTEM_LIBVIRTD)]
        socket = self.folder / "sock/libvirt-sock"
        socket.unlink(missing_ok=True)
        with (self.folder / "libvirtd.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.skip(f"no private libvirtd here: {(self.folder / 'libvirtd.log').read_text()[-300:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)
            self.process = None


_PLACES = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
    "etc": "/etc/libvirt",
}
_QEMU_CONF = (
    'stdio_handler = "file"\nuser = "root"\ngroup = "root"\nremember_owner = 0\n'
    'namespaces = []\ncgroup_controllers = []\nsecurity_driver = "none"\n'
)


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    if os.geteuid() != 0 or not SYSTEM_LIBVIRTD.exists() or not shutil.which("unshare"):
        pytest.skip("a private libvirtd needs root, libvirtd and unshare")
    with tempfile.TemporaryDirectory(prefix="tokvm-libvirtd-") as name:
        folder = Path(name)
        for place in (*_PLACES, "sock"):
            (folder / place).mkdir()
        (folder / "etc/qemu.conf").write_text(_QEMU_CONF + display_ports(os.getpid()))
        auth = 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n'
        (folder / "libvirtd.conf").write_text(f'unix_sock_dir = "{folder}/sock"\n{auth}')
        daemon = PrivateLibvirtd(folder)
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.stop()


@pytest.fixture
def new_plan(libvirtd: PrivateLibvirtd, tmp_path: Path) -> Iterator[Callable[..., DomainPlan]]:
    """Plans for real domains: files that exist, a fresh uuid; whatever was defined with it is removed at the end."""
    import libvirt

    made: list[str] = []

    def make(*, disks: int = 1, vm_disks: tuple[Disk, ...] | None = None, **facts: Any) -> DomainPlan:
        if vm_disks is not None:
            facts["disks"] = vm_disks
        made.append(facts.setdefault("vm_uuid", str(uuid.uuid4())))
        paths = tuple(str(tmp_path / f"{made[-1]}-{i}.raw") for i in range(disks))
        for path in paths:
            with Path(path).open("wb") as file:
                file.truncate(MiB)
        return make_plan(paths=paths, **{"name": f"test-{made[-1][:8]}", **facts})

    yield make
    connection = libvirt.open(libvirtd.uri)
    for domain in connection.listAllDomains():
        if domain.UUIDString() in made:
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    connection.close()
