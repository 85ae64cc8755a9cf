"""An ESXi host for tests and for the lab: build it, reach it over SSH, be its guests, hurt it, look at what was done to it.

with build_host(tmp_path, machines=[MachineSpec("web", disks=[DiskSpec(64 * MiB)])]) as host:
    host.write_disk("web", 0, offset=4096, data=b"…")
    host.fault("snapshot.create", "lost_reply")
    run_tokvm(host.url, ssh_config=host.sshd.config_file)
    assert host.violations() == []
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from tokvm.testing.esxi import faults, locks, paths
from tokvm.testing.esxi.disasters import Disasters
from tokvm.testing.esxi.hostd import Hostd, hostd_of, with_state
from tokvm.testing.esxi.persona import SUBSYSTEM
from tokvm.testing.esxi.specs import AutostartSpec, DatastoreSpec, DiskSpec, HostOptions, MachineSpec, NicSpec, first_state
from tokvm.testing.esxi.state import ON, Snapshot, State, Store, Vm, chain
from tokvm.testing.hyperv import backend as backends
from tokvm.testing.hyperv.backend import UNMAPPED, FileBackend
from tokvm.testing.persona.holders import Holder, holders
from tokvm.testing.persona.host import PlayedHost, Record
from tokvm.testing.persona.sftp_settings import SftpSettings
from tokvm.testing.persona.store import replace
from tokvm.testing.sshd import ESXI_LIMITS, Lifetime, Sshd

__all__ = [
    "Answer",
    "AutostartSpec",
    "DatastoreSpec",
    "DiskSpec",
    "EsxHost",
    "HostOptions",
    "MachineSpec",
    "NicSpec",
    "build_host",
]
TAG = "tokvm-0123456789abcdef"


class Answer(NamedTuple):
    """What a command printed and ended with."""

    code: int
    stdout: str
    stderr: str


def build_host(
    folder: Path, *, machines: Sequence[MachineSpec], options: HostOptions | None = None, lifetime: Lifetime = Lifetime.WITH_US
) -> EsxHost:
    """A new host in `folder` (made; must hold no host yet), its VMDK files written. With the plain file backend its guests are
    made too, their disks all zeros, and started. Its sshd starts when `sshd` is first asked for."""
    options = options or HostOptions()
    folder = folder.absolute()
    for name in ("backend", "handles", "vmfs/volumes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    settings = SftpSettings(cap=options.cap, limits=options.limits, die_after=-1, freeze_after=-1, shuffle=False)
    replace(folder / "sftp.json", json.dumps(settings))
    (folder / "banner").write_text(options.banner, encoding="utf-8")
    state = first_state(machines, options)
    for one in state["datastores"]:
        paths.local(folder, f"{paths.VOLUMES}/{one['uuid']}").mkdir()
        paths.local(folder, f"{paths.VOLUMES}/{one['name']}").symlink_to(one["uuid"])
    store.write(state)
    host = EsxHost(folder, lifetime=lifetime)
    host.write_launcher(site=options.site)
    if options.backend == backends.FILE_BACKEND:
        _make_guests(host.guests, machines, state["vms"])
        host.write_files()
        for spec, vm in zip(machines, state["vms"], strict=True):
            if spec.running:
                host.start(str(vm["vmid"]))
    return host


class EsxHost(Disasters, PlayedHost):
    """A host in a folder. Machines are named by their name, or by their Vmid where names are not unique."""

    scheme = "esx"
    persona = "tokvm.testing.esxi.persona"
    launcher_name = "esxi-persona"
    subsystem = SUBSYSTEM
    store: Store

    def _make_sshd(self) -> Sshd:
        limits = ESXI_LIMITS.with_banner(self.folder / "banner") if (self.folder / "banner").read_text() else ESXI_LIMITS
        return Sshd(self.folder / "sshd", forced_command=[str(self.launcher)], sftp=self.subsystem, limits=limits)

    def run(self, line: str, *, timeout_s: float = 30.0) -> Answer:
        """A command line without SSH in between."""
        done = self.execute(line, b"", timeout_s=timeout_s)
        return Answer(done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode())

    def vim(self, command: str, *words: object) -> Answer:
        """A change by vim-cmd: `vim("vmsvc/power.off", 3)`"""
        return self.run(shlex.join(["vim-cmd", command, *map(str, words)]))

    def ask(self, *words: object) -> Answer:
        """One read, as tokvm sends it; stdout and code are that command's own."""
        done = self.run(f"{shlex.join(map(str, words))}; echo {TAG} $?")
        text, _, code = done.stdout.rpartition(TAG)
        return Answer(int(code or done.code), text, done.stderr)

    # Looking at it

    def state(self) -> State:
        """As it is now: what was due has landed."""
        with self.store.change() as state:
            self._hostd.refresh(state)
        return state

    def vm(self, name: str) -> Vm:
        return vm_named(self.state(), name)

    def vmid(self, name: str) -> int:
        return vm_named(self.store.read(), name)["vmid"]

    def is_running(self, name: str) -> bool:
        return self.vm(name)["state"] == ON

    def snapshots(self, name: str) -> list[Snapshot]:
        """In the order they were taken."""
        return self.vm(name)["snapshots"]

    def chain(self, name: str, disk: int = 0) -> list[str]:
        """The descriptors of a disk's files, top first."""
        state = self.state()
        return [layer["path"] for layer in chain(state, vm_named(state, name)["disks"][disk]["top"])]

    def frozen(self, name: str, snapshot: int, disk: int = 0) -> list[str]:
        """The descriptors below a snapshot, top first."""
        state = self.state()
        found = next(one for one in vm_named(state, name)["snapshots"] if one["id"] == snapshot)
        return [layer["path"] for layer in chain(state, found["paths"][disk])]

    def extent(self, path: str) -> str:
        """The file with the bytes of a descriptor."""
        return paths.extent_of(self.store.read()["layers"][path])

    def directory(self, name: str) -> str:
        """`/vmfs/volumes/<uuid>/web`"""
        state = self.store.read()
        return paths.directory(state, vm_named(state, name))

    def local(self, path: str) -> Path:
        """Where the file of a path is."""
        return paths.local(self.folder, path)

    def locked(self) -> set[str]:
        """Paths that nobody may open."""
        return locks.locked(self.state())

    def starts_and_stops(self, name: str) -> list[tuple[str, str]]:
        """(on | off, who did it) in order."""
        guest = vm_named(self.store.read(), name)["guest"]
        rows = [row for row in self.events() if row.get("vm") == guest]
        return [(str(row["event"]), str(row["who"])) for row in rows if row["event"] in ("on", "off")]

    def events(self) -> list[Record]:
        return self._log("events.log")

    def opened(self) -> list[tuple[str, bool]]:
        """(path, refused) of each file that sftp was asked for."""
        return [(str(row["sftp"]), bool(row["refused"])) for row in self._log("commands.log") if "sftp" in row]

    def holders(self) -> list[Holder]:
        """The sftp-servers there are."""
        return holders(self.store, orphans=False)

    # Its disks (file backend)

    @property
    def guests(self) -> FileBackend:
        return FileBackend(self.folder / "backend")

    def read_disk(self, name: str, disk: int = 0, *, snapshot: int = 0) -> bytes:
        """What the guest sees, or saw at the snapshot of this id."""
        vm = vm_named(self.store.read(), name)
        frozen = [one["freeze"] for one in vm["snapshots"] if one["id"] == snapshot]
        return self.guests.read(vm["guest"], disk, frozen[0] if snapshot else "")

    def write_disk(self, name: str, disk: int = 0, *, offset: int, data: bytes) -> None:
        """As the guest would; of a VM that is off, as a person who mounts the disk."""
        self._touch(name, disk, lambda guest: self.guests.write(guest, disk, offset, data))

    def trim_disk(self, name: str, disk: int = 0, *, offset: int, length: int, kind: str = UNMAPPED) -> None:
        """kind: UNMAPPED or ZERO, which whole grains then are in a seSparse delta."""
        self._touch(name, disk, lambda guest: self.guests.trim(guest, disk, offset, length, kind))

    def _touch(self, name: str, disk: int, act: Callable[[str], None]) -> None:
        from tokvm.testing.esxi import vmdks

        with self.store.change() as state:
            vm = vm_named(state, name)
            act(vm["guest"])
            top = state["layers"][vm["disks"][disk]["top"]]
            if not top["live"]:
                vmdks.write(self.store, state, self._hostd.backend, top)

    def write_files(self) -> None:
        """Write all files anew from what the guests hold."""
        from tokvm.testing.esxi import vmdks, vmx

        with self.store.change() as state:
            for layer in sorted(state["layers"].values(), key=lambda one: len(chain(state, one["path"]))):
                vmdks.write(self.store, state, self._hostd.backend, layer)
            for vm in state["vms"]:
                vmx.write(self.store, state, vm)

    # Changing it

    @contextlib.contextmanager
    def edit(self) -> Iterator[State]:
        """The whole state, locked, to change whatever a test wants changed; the .vmx files follow."""
        from tokvm.testing.esxi import vmx

        with self.store.change() as state:
            yield state
            for vm in state["vms"]:
                vmx.write(self.store, state, vm)

    def set_fields(self, name: str, **fields: object) -> None:
        """What vim-cmd says of a VM: see specs.FIELDS."""
        with self.edit() as state:
            vm_named(state, name)["fields"].update(fields)

    def set_guest(self, name: str, **settings: object) -> None:
        """File backend: `shutdown_s`, `ignores_shutdown`."""
        self.guests.set_guest(vm_named(self.store.read(), name)["guest"], **settings)

    def set_sftp(self, **settings: object) -> None:
        """What new sftp sessions do: persona.sftp_settings."""
        path = self.folder / "sftp.json"
        replace(path, json.dumps({**json.loads(path.read_text()), **settings}))

    def start(self, name: str, who: str = "a person") -> None:
        """As a person in the host client would, who also answers questions."""
        self.change(name, lambda hostd, state, vm: hostd.really_on(state, vm, who))

    def change(self, name: str, act: Callable[[Hostd, State, Vm], object]) -> None:
        """Do something with one VM, after a look around."""
        hostd = self._hostd

        def found(state: State) -> None:
            act(hostd, state, vm_named(state, name))

        with_state(hostd, found)

    # Hurting it

    def fault(self, command: str, kind: str, **more: Unpack[faults.Settings]) -> None:
        """Plan a fault for the next run of a command ("": any); kinds and settings: faults.py."""
        faults.PLAN.add(self.store, {**more, "match": command, "kind": kind})

    def faults_left(self) -> list[faults.Fault]:
        return faults.PLAN.left(self.store)

    def clear_faults(self) -> None:
        faults.PLAN.clear(self.store)

    @property
    def _hostd(self) -> Hostd:
        return hostd_of(self.store)


def vm_named(state: State, name: str) -> Vm:
    found = [vm for vm in state["vms"] if name in (vm["name"], str(vm["vmid"]))]
    if len(found) != 1:
        raise KeyError(f"{len(found)} machines are called {name!r}")
    return found[0]


def _make_guests(guests: FileBackend, machines: Sequence[MachineSpec], vms: Sequence[Vm]) -> None:
    for spec, vm in zip(machines, vms, strict=True):
        guest: Record = {"shutdown_s": spec.shutdown_s, "ignores_shutdown": spec.ignores_shutdown}
        guests.create(vm["guest"], [disk.size for disk in spec.disks], guest)
