"""A libvirt for the lab: one of our own beside whatever the host runs, needing neither systemd nor D-Bus nor a change in /etc.

    root        unshare --mount ─► our folders bound over /etc/libvirt, /var/{lib,cache,log}/libvirt and /run/libvirt
                ─► libvirtd --daemon        qemu+unix:///system?socket=<folder>/run/libvirt-sock
    others      qemu:///session, which libvirt starts by itself

Its QEMUs run as root without cgroups, private /dev or security labels, so that they open any disk root can, wherever it lies.
The host's own libvirt, when there is one, does not see the lab's domains and keeps its own; it is used when we may not make a
mount namespace (a container without CAP_SYS_ADMIN). Tried with libvirt 9.0 (Debian 12).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from tokvm.core.errors import TokvmError
from tokvm.lab.errors import LabError
from tokvm.lab.kernel import cache_dir
from tokvm.lab.programs import find_program, run_program

log = logging.getLogger(__name__)

SYSTEM_URI = "qemu:///system"
SESSION_URI = "qemu:///session"
# A unix socket's path may have 107 bytes; the folder of a lab may be deep.
RUN_FOLDER = Path("/run/tokvm-lab")
# The first connection asks every QEMU binary what it can do; a broken KVM makes that slow.
CONNECT_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
# VNC's from 5900 on, below the ports that the kernel hands out by itself (ip_local_port_range: 32768).
FIRST_PORT, PORTS, PORT_RANGES = 6000, 64, 400

LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0700"
unix_sock_ro_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""


class Owner(Enum):
    """Who runs the daemon."""

    LAB = "lab"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class LabLibvirt:
    """`uri` answers. `folder` holds the daemon's files when it is ours."""

    uri: str
    owner: Owner
    folder: Path

    def stop(self) -> None:
        """Destroy the domains that run on our daemon, end it, remove its files. Nothing of the host's is touched."""
        if self.owner is Owner.HOST:
            return
        pid = _pid(self.folder)
        if pid is not None:
            self._end_domains()
            _end(pid, self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_domains(self) -> None:
        try:
            for name in virsh(self.uri, "list", "--uuid").decode().split():
                virsh(self.uri, "destroy", name)
        except TokvmError as exc:
            log.warning("domains of the lab's libvirt may still run: %s", exc.what)


def ensure_libvirt(folder: Path) -> LabLibvirt:
    """A libvirt that answers: ours for this lab `folder`, started when it does not run yet. LabError when none can be had."""
    if os.geteuid() != 0:
        virsh(SESSION_URI, "uri")
        return LabLibvirt(SESSION_URI, Owner.HOST, folder)
    ours = existing_libvirt(folder)
    if _pid(ours.folder) is None:
        try:
            _start(ours.folder)
        except TokvmError as exc:
            return _host_libvirt(ours.folder, reason=exc)
    # What libvirt asks QEMU before its first domain takes seconds; better now than in a downtime. The answers are cached.
    virsh(ours.uri, "domcapabilities", "--virttype", "qemu", "--arch", "x86_64")
    return ours


def existing_libvirt(folder: Path) -> LabLibvirt:
    """Our daemon of this lab `folder`, running or not: what a later process needs to stop it."""
    short = RUN_FOLDER / hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return LabLibvirt(f"qemu+unix:///system?socket={quote(str(short / 'run/libvirt-sock'))}", Owner.LAB, short)


def _start(folder: Path) -> None:
    libvirtd = find_program("libvirtd", package="libvirt-daemon-system")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("etc", "lib", "log", "run"):
        (folder / name).mkdir(exist_ok=True)
    # What QEMU can do is asked once per QEMU, not once per lab.
    shared = cache_dir() / "libvirt"
    shared.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(shared)
    (folder / "etc/libvirtd.conf").write_text(LIBVIRTD_CONF)
    (folder / "etc/qemu.conf").write_text(QEMU_CONF + display_ports(os.getpid()))
    script = folder / "start.sh"
    script.write_bytes(resources.files("tokvm.lab").joinpath("data/private_libvirtd.sh").read_bytes())
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", str(script), str(folder), libvirtd]
    run_program(argv, package="util-linux", timeout_s=CONNECT_TIMEOUT_S)
    log.info("libvirtd of the lab runs as pid %s", _pid(folder))


def display_ports(number: int) -> str:
    """Lines of qemu.conf: VNC ports of one libvirtd alone, told by a number. Two that look for free ones at once collide."""
    first = FIRST_PORT + number % PORT_RANGES * PORTS
    return f"remote_display_port_min = {first}\nremote_display_port_max = {first + PORTS - 1}\n"


def _host_libvirt(folder: Path, *, reason: TokvmError) -> LabLibvirt:
    try:
        virsh(SYSTEM_URI, "uri")
    except TokvmError as exc:
        fix = f"start libvirtd on this host; see {folder / 'log/libvirtd.log'}"
        raise LabError(f"no libvirt: ours did not start ({reason.what}), the host's does not answer", fix=fix) from exc
    log.warning("using the host's libvirt, because ours did not start: %s", reason.what)
    return LabLibvirt(SYSTEM_URI, Owner.HOST, folder)


def virsh(uri: str, *words: str) -> bytes:
    argv: Sequence[str] = ["virsh", "-q", "-c", uri, *words]
    return run_program(argv, package="libvirt-clients", timeout_s=CONNECT_TIMEOUT_S)


def _pid(folder: Path) -> int | None:
    """The daemon's process while it lives; the number may have gone to another program."""
    try:
        pid = int((folder / "run/libvirtd.pid").read_text())
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]  # empty when it is dead but not yet buried
    except (OSError, ValueError):
        return None
    return pid if program.endswith(b"libvirtd") else None


def _end(pid: int, folder: Path) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    os.kill(pid, signal.SIGTERM)
    while _pid(folder) == pid:
        if time.monotonic() > deadline:
            log.warning("killing libvirtd, pid %d", pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
