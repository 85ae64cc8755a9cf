"""Where labs lie, and how one is taken away again, also after a crash.

    $TOKVM_LAB_DIR, else /var/tmp/tokvm-lab-<uid>/
        <name>/  lab.json          what was built, for another process to go on with
                 run/*.pid         processes of ours with their start times: the keeper, tokvm, `lab run` itself
                 clock.jsonl       what the guests told the outside clock
                 images/           guests before their first boot
                 host/             the played hypervisor; host/backend/<uuid>/ the source VMs
                 target/ state/    what tokvm wrote: disks, journal

Taking away works from what is in the folder and never from names of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokvm.core.errors import TokvmError
from tokvm.lab.errors import LabError
from tokvm.lab.libvirtd import Owner, existing_libvirt, virsh
from tokvm.lab.source_vm import SourceVm
from tokvm.testing import pids
from tokvm.testing.sshd import Sshd

log = logging.getLogger(__name__)

LAB_FILE = "lab.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabRecord:
    """A lab as it was built. options: what tokvm needs besides the URL to reach the source. machines: uuid → name. `owner` says
    whose the libvirt is (Owner's value)."""

    source: str
    url: str
    ssh_config: str
    libvirt: str
    owner: str
    machines: dict[str, str]
    options: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> LabRecord:
        try:
            return cls(**json.loads((folder / LAB_FILE).read_text()))
        except (OSError, ValueError, TypeError) as exc:
            raise LabError("there is no lab here", where=str(folder), fix="tokvm lab up") from exc

    def save(self, folder: Path) -> None:
        (folder / LAB_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def labs_root() -> Path:
    """The directory of all labs: ours, and nobody else may write into it (it is under a shared /var/tmp)."""
    given = os.environ.get("TOKVM_LAB_DIR")
    root = Path(given) if given else Path(f"/var/tmp/tokvm-lab-{os.geteuid()}")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.lstat()
    if root.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise LabError("the directory of labs is somebody else's", where=str(root), fix="give another in TOKVM_LAB_DIR")
    return root


def new_home(folder: Path | None = None) -> Path:
    """A fresh folder, marked as ours while this process lives."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="lab-", dir=labs_root()))
    elif folder.exists() and any(folder.iterdir()):
        raise LabError("a lab needs a folder of its own", where=str(folder), fix="tokvm lab down, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run", "images", "target", "state"):
        (folder / name).mkdir(mode=0o700)
    pids.note(folder / "run", "lab", os.getpid())
    return folder.absolute()


def is_home(folder: Path) -> bool:
    """Whether a lab was begun here: nothing else is ever removed."""
    return (folder / "run").is_dir() and (folder / "images").is_dir()


def all_homes() -> list[Path]:
    return sorted(folder for folder in labs_root().iterdir() if is_home(folder))


def take_down(folder: Path) -> None:
    """Kill everything the lab started and remove it. Again, or after a crash at any point: the same."""
    if not is_home(folder):
        raise LabError("there is no lab here", where=str(folder))
    pids.kill_noted(folder / "run")
    Sshd(folder / "host" / "sshd").stop()
    pids.kill_noted(folder / "host" / "run")
    for home in (folder / "host" / "backend").glob("*/vm.json"):
        SourceVm(home.parent).destroy()
    _end_targets(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise LabError("the lab's folder could not be removed", where=str(folder), fix="look who still writes there")


def _end_targets(folder: Path) -> None:
    """Our own libvirt ends with all it runs; on the host's only the lab's own domains go."""
    existing_libvirt(folder).stop()
    try:
        record = LabRecord.load(folder)
    except LabError:
        return
    if record.owner == Owner.HOST.value:
        for uuid in record.machines:
            for verb in ("destroy", "undefine"):
                try_virsh(record.libvirt, verb, uuid)


def try_virsh(uri: str, verb: str, domain: str) -> None:
    """Of a domain by uuid or name, as far as it goes."""
    try:
        virsh(uri, verb, domain)
    except TokvmError as exc:
        log.debug("%s %s: %s", verb, domain, exc.what)  # not there, or off already
