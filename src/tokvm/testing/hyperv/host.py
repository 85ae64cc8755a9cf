"""A Hyper-V host for tests and for the lab: build it, reach it over SSH, be its guests, hurt it, look at what was done to it.

with build_host(tmp_path, machines=[MachineSpec("web", disks=[DiskSpec(64 * MiB)])]) as host:
    host.write_disk("web", 0, offset=4096, data=b"…")
    host.fault("checkpoint", "lost_reply")
    run_tokvm(host.url, ssh_config=host.sshd.config_file)
    assert host.violations() == []
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

from tokvm.testing.hyperv import backend as backends
from tokvm.testing.hyperv import faults, handles, paths, shell, vhds
from tokvm.testing.hyperv.backend import UNMAPPED, FileBackend
from tokvm.testing.hyperv.specs import ClusterSpec, DiskSpec, HostOptions, MachineSpec, NicSpec, first_state
from tokvm.testing.hyperv.state import OFF, RUNNING, STANDARD, Checkpoint, SftpSettings, State, Store, Vm, chain
from tokvm.testing.hyperv.vmms import Vmms, with_state
from tokvm.testing.persona.host import PlayedHost, Record
from tokvm.testing.persona.store import replace
from tokvm.testing.sshd import Lifetime

__all__ = ["Answer", "ClusterSpec", "DiskSpec", "HostOptions", "HyperVHost", "MachineSpec", "NicSpec", "build_host"]


class Answer(NamedTuple):
    """What a command printed and ended with."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def framed(self) -> dict[str, Any]:
        """The answer between the sentinels."""
        text = self.stdout.split(b"\r\n@@B\r\n")[1].split(b"\r\n@@E\r\n")[0]
        answer: dict[str, Any] = json.loads(base64.b64decode(text.replace(b"\r\n", b"")))
        return answer

    @property
    def value(self) -> dict[str, Any]:
        assert self.framed["ok"] is True, self.framed
        return cast("dict[str, Any]", self.framed["value"])


def build_host(
    folder: Path, *, machines: Sequence[MachineSpec], options: HostOptions | None = None, lifetime: Lifetime = Lifetime.WITH_US
) -> HyperVHost:
    """A new host in `folder` (made; must hold no host yet), its VHDX files written. With the plain file backend its guests are
    made too, their disks all zeros, and started. Its sshd starts when `sshd` is first asked for."""
    from tokvm.sources.hyperv.powershell import BOOTSTRAP

    options = options or HostOptions()
    folder = folder.absolute()
    for name in ("backend", "handles", "run", "drives"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "bootstrap.ps1").write_text(BOOTSTRAP, encoding="ascii")
    store = Store(folder)
    settings = SftpSettings(cap=options.cap, limits=options.limits, die_after=-1, freeze_after=-1, shuffle=False)
    replace(folder / "sftp.json", json.dumps(settings))
    state = first_state(machines, options)
    store.write(state)
    host = HyperVHost(folder, lifetime=lifetime)
    host.write_launcher(site=options.site)
    if options.backend == backends.FILE_BACKEND:
        _make_guests(host.guests, machines, list(state["vms"].values()))
        host.write_files()
        for spec in machines:
            if spec.running:
                host.start(spec.name)
    return host


class HyperVHost(PlayedHost):
    """A host in a folder. Machines are named by their name, or by their id where names are not unique."""

    scheme = "hyperv"
    persona = "tokvm.testing.hyperv.persona"
    launcher_name = "hyperv-persona"
    subsystem = shell.SUBSYSTEM
    store: Store

    def run(self, line: str, stdin: bytes = b"", *, timeout_s: float = 30.0) -> Answer:
        """A command line without SSH in between."""
        done = self.execute(line, stdin, timeout_s=timeout_s)
        return Answer(done.returncode, done.stdout, done.stderr)

    def ask(self, script: str, data: Mapping[str, object]) -> Answer:
        """A script of the contract, as tokvm sends it, without SSH in between."""
        from tokvm.sources.hyperv import powershell

        return self.run(powershell.COMMAND, powershell.request(powershell.script_text(script), dict(data)))

    # Looking at it

    def state(self) -> State:
        """As it is now: what was due has landed."""
        with self.store.change() as state:
            self._vmms.refresh(state)
        return state

    def vm(self, name: str) -> Vm:
        return _vm_named(self.state(), name)

    def id(self, name: str) -> str:
        return _vm_named(self.store.read(), name)["id"]

    def is_running(self, name: str) -> bool:
        return self.vm(name)["state"] == RUNNING

    def checkpoints(self, name: str) -> list[Checkpoint]:
        """In the order they were taken."""
        state = self.state()
        id_ = _vm_named(state, name)["id"]
        return [one for one in state["checkpoints"] if one["vm"] == id_]

    def snapshots(self, name: str) -> list[Checkpoint]:
        """As the other played hosts call them."""
        return self.checkpoints(name)

    def chain(self, name: str, disk: int = 0) -> list[str]:
        """Windows paths of a disk's files, top first."""
        state = self.state()
        return [vhd["path"] for vhd in chain(state, _vm_named(state, name)["drives"][disk]["path"])]

    def disk_id(self, name: str, disk: int = 0) -> str:
        """VirtualDiskId, the same in all files of a chain."""
        state = self.store.read()
        return state["vhds"][_vm_named(state, name)["drives"][disk]["path"]]["disk_id"]

    def disk_key(self, name: str, disk: int = 0) -> str:
        """Where it is plugged in, and Get-VHD's DiskIdentifier of its first file: `SCSI:0:1:8a5a0c5f-…`"""
        state = self.store.read()
        drive = _vm_named(state, name)["drives"][disk]
        base = chain(state, drive["path"])[-1]["identifier"]
        return f"{('IDE', 'SCSI')[drive['controller']]}:{drive['number']}:{drive['location']}:{base}"

    def local(self, path: str) -> Path:
        """Where the file of a Windows path is."""
        return paths.local(self.folder, path)

    def starts_and_stops(self, name: str) -> list[tuple[str, str]]:
        """(on | off, who did it) in order."""
        rows = [row for row in self.events() if row.get("vm") == self.id(name)]
        return [(str(row["event"]), str(row["who"])) for row in rows if row["event"] in ("on", "off")]

    def events(self) -> list[Record]:
        return self._log("events.log")

    def opened(self) -> list[tuple[str, bool]]:
        """(Windows path, refused) of each file that sftp was asked for."""
        return [(str(row["sftp"]), bool(row["refused"])) for row in self._log("commands.log") if "sftp" in row]

    def powershells(self) -> int:
        """How many powershell.exe were started so far."""
        return sum("started" in row for row in self._log("commands.log"))

    def holders(self) -> list[handles.Holder]:
        """The sftp-servers there are, orphans too."""
        return handles.holders(self.store, self.store.read())

    # Its disks (file backend)

    @property
    def guests(self) -> FileBackend:
        return FileBackend(self.folder / "backend")

    def read_disk(self, name: str, disk: int = 0, *, checkpoint: str = "") -> bytes:
        """What the guest sees, or saw at the checkpoint of this id."""
        frozen = [one["freeze"] for one in self.store.read()["checkpoints"] if one["id"] == checkpoint]
        return self.guests.read(self.id(name), disk, frozen[0] if checkpoint else "")

    def write_disk(self, name: str, disk: int = 0, *, offset: int, data: bytes) -> None:
        """As the guest would; of a VM that is off, as a person who mounts the disk."""
        self._touch(name, disk, lambda vm: self.guests.write(vm, disk, offset, data))

    def trim_disk(self, name: str, disk: int = 0, *, offset: int, length: int, kind: str = UNMAPPED) -> None:
        """kind: UNMAPPED or ZERO, which whole blocks then are in the file."""
        self._touch(name, disk, lambda vm: self.guests.trim(vm, disk, offset, length, kind))

    def _touch(self, name: str, disk: int, act: Callable[[str], None]) -> None:
        with self.store.change() as state:
            vm = _vm_named(state, name)
            act(vm["id"])
            top = state["vhds"][vm["drives"][disk]["path"]]
            if not top["live"]:
                vhds.write(self.store, state, self._vmms.backend, top)

    def write_files(self) -> None:
        """Write all disk files anew from what the guests hold."""
        with self.store.change() as state:
            for vhd in sorted(state["vhds"].values(), key=lambda one: len(chain(state, one["path"]))):
                vhds.write(self.store, state, self._vmms.backend, vhd)

    def leave_dirty(self, name: str, disk: int = 0, *, seed: int = 0) -> None:
        """As a host that crashed leaves the top file of a VM that is off: its last writes are only in its log."""
        from tokvm.testing.vhdx_log_writer import make_dirty

        make_dirty(self.local(self.chain(name, disk)[0]), seed=seed)

    # Changing it

    @contextlib.contextmanager
    def edit(self) -> Iterator[State]:
        """The whole state, locked, to change whatever a test wants changed."""
        with self.store.change() as state:
            yield state

    def set_fields(self, name: str, **fields: object) -> None:
        """What Get-VM and its relatives say: see specs."""
        with self.edit() as state:
            _vm_named(state, name)["fields"].update(fields)

    def set_guest(self, name: str, **settings: object) -> None:
        """File backend: `shutdown_s`, `ignores_shutdown`."""
        self.guests.set_guest(self.id(name), **settings)

    def set_sftp(self, **settings: object) -> None:
        """What new sftp sessions do: `cap`, `limits`, `die_after`, `freeze_after`, `shuffle` (state.SftpSettings)."""
        path = self.folder / "sftp.json"
        replace(path, json.dumps({**json.loads(path.read_text()), **settings}))

    def start(self, name: str, who: str = "a person") -> None:
        """As a person at the console would."""
        self._change(name, lambda state, vm: self._vmms.start(state, vm, who))

    def guest_stops(self, name: str) -> None:
        """The guest goes off by itself: shut down from inside, or crashed."""
        self._vmms.backend.power_off(self.id(name))
        self.state()

    def host_restarts(self) -> None:
        """Everything stops; what Windows starts by itself comes back."""

        def act(state: State) -> None:
            was_on = [vm for vm in state["vms"].values() if vm["state"] == RUNNING]
            for vm in was_on:
                self._vmms.turn_off(state, vm, "host restart")
            for vm in state["vms"].values():
                action = vm["fields"]["AutomaticStartAction"]
                if action == "Start" or (action == "StartIfRunning" and vm in was_on):
                    self._vmms.start(state, vm, "automatic start")

        with_state(self._vmms, act)

    def cluster_acts(self, name: str, *, failed: str = "node") -> bool:
        """A node or the VM's resource failed: the cluster starts an off VM unless its priority (node) or its restart action
        (resource) forbids. True if it did."""
        started = []

        def act(state: State, vm: Vm) -> None:
            role = vm["role"]
            wants = role is not None and (role["priority"] if failed == "node" else role["restart_action"]) != 0
            if wants and vm["state"] == OFF:
                self._vmms.start(state, vm, "the cluster")
                started.append(vm)

        self._change(name, act)
        return bool(started)

    def foreign_checkpoint(self, name: str, label: str = "nightly", *, kind: str = STANDARD) -> Checkpoint:
        """Somebody else's. kind: STANDARD, or RECOVERY as a backup product makes it."""
        made: list[Checkpoint] = []
        self._change(name, lambda state, vm: made.append(self._vmms.checkpoint(state, vm, label, kind)))
        return made[0]

    def delete_checkpoint(self, name: str, id_: str) -> None:
        """Somebody deletes it: its merge begins, or waits until nobody reads the files."""
        self._change(name, lambda state, _vm: self._vmms.remove(state, id_, wait_for_readers=True))

    def apply_checkpoint(self, name: str, id_: str) -> None:
        """File backend. Somebody goes back to it: the VM is off, and its disks are as they were then."""
        self._change(name, lambda state, vm: self._vmms.apply(state, vm, id_, self.guests.revert))

    def finish_merges(self) -> None:
        """Whatever is being merged is done now."""
        with self.edit() as state:
            for job in state["jobs"]:
                job["due"] = 0.0
        self.state()

    def _change(self, name: str, act: Callable[[State, Vm], object]) -> None:
        def found(state: State) -> None:
            act(state, _vm_named(state, name))

        with_state(self._vmms, found)

    # Hurting it

    def fault(self, script: str, kind: str, **more: Unpack[faults.Settings]) -> None:
        """Plan a fault for the next run of `script` ("": any); kinds and settings: faults.py."""
        faults.PLAN.add(self.store, {**more, "match": script, "kind": kind})

    def faults_left(self) -> list[faults.Fault]:
        return faults.PLAN.left(self.store)

    def clear_faults(self) -> None:
        faults.PLAN.clear(self.store)

    @property
    def _vmms(self) -> Vmms:
        dotted = self.store.read()["options"]["backend"]
        return Vmms(self.store, backends.load(dotted, self.folder / "backend"))


def _vm_named(state: State, name: str) -> Vm:
    found = [vm for vm in state["vms"].values() if name in (vm["name"], vm["id"])]
    if len(found) != 1:
        raise KeyError(f"{len(found)} machines are called {name!r}")
    return found[0]


def _make_guests(guests: FileBackend, machines: Sequence[MachineSpec], vms: Sequence[Vm]) -> None:
    for spec, vm in zip(machines, vms, strict=True):
        guest: Record = {"shutdown_s": spec.shutdown_s, "ignores_shutdown": spec.ignores_shutdown}
        guests.create(vm["id"], [disk.size for disk in spec.disks], guest)
