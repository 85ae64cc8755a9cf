"""A XenServer for tests and for the lab: build it, reach it over SSH, change its disks, hurt it, look at what was done to it.

with build_host(tmp_path, machines=[MachineSpec("web", disks=[DiskSpec(64 * MiB)])]) as host:
    host.write_disk("web", 0, offset=4096, data=b"…")
    host.fault("vdi-export", "stall", at=1 << 20)
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

from tokvm.testing import pids
from tokvm.testing.persona.host import PlayedHost, Record
from tokvm.testing.sshd import Lifetime
from tokvm.testing.xenserver import backend as backends
from tokvm.testing.xenserver import faults
from tokvm.testing.xenserver.power import Power
from tokvm.testing.xenserver.records import real_vms, snapshots_of
from tokvm.testing.xenserver.specs import DiskSpec, HostOptions, MachineSpec, NicSpec, first_state
from tokvm.testing.xenserver.state import RUNNING, State, Store, Vdi, Vm

__all__ = ["Answer", "DiskSpec", "HostOptions", "MachineSpec", "NicSpec", "XenHost", "build_host"]


class Answer(NamedTuple):
    """What a command printed and ended with."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "surrogateescape").removesuffix("\n")


def build_host(
    folder: Path, *, machines: Sequence[MachineSpec], options: HostOptions | None = None, lifetime: Lifetime = Lifetime.WITH_US
) -> XenHost:
    """A new host in `folder` (made; must hold no host yet). With the plain file backend its disks are made too: raw, sparse,
    all zeros. Its sshd starts when `sshd` is first asked for."""
    options = options or HostOptions()
    folder = folder.absolute()
    for name in ("backend", "exports", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    state = first_state(machines, options)
    store.write(state)
    host = XenHost(folder, lifetime=lifetime)
    host.write_launcher(site=options.site)
    if options.backend == backends.FILE_BACKEND:
        _make_files(folder / "backend", machines, real_vms(state))
        for spec in machines:
            if spec.running:
                host.start(spec.name)
    return host


class XenHost(PlayedHost):
    """A host in a folder. Machines are named by their name-label, or by their uuid where names are not unique."""

    scheme = "xenserver"
    persona = "tokvm.testing.xenserver.persona"
    launcher_name = "xe-persona"
    store: Store

    def run(self, *words: str, line: str | None = None, timeout_s: float = 30.0) -> Answer:
        """A command without SSH in between: either words, or a whole line as a client would send it."""
        done = self.execute(line if line is not None else shlex.join(words), timeout_s=timeout_s)
        return Answer(done.returncode, done.stdout, done.stderr)

    def close(self) -> None:
        """Stop sshd, workers and exports. The folder stays."""
        super().close()
        pids.kill_noted(self.folder / "run")

    # Looking at it

    def state(self) -> State:
        return self.store.read()

    def vm(self, name: str) -> Vm:
        """Its record, after a look at the guest (so HA has had its chance)."""
        with self.store.change() as state:
            self._power(state).refresh(state)
        return _vm_named(self.state(), name)

    def uuid(self, name: str) -> str:
        return _vm_named(self.state(), name)["uuid"]

    def is_running(self, name: str) -> bool:
        return self.vm(name)["power"] == RUNNING

    def power_events(self, name: str) -> list[tuple[str, str]]:
        """(on | off, who did it) in order."""
        uuid = self.uuid(name)
        rows = self._log("events.log")
        return [(str(row["event"]), str(row["who"])) for row in rows if row.get("vm") == uuid and row["event"] in ("on", "off")]

    def snapshots(self, name: str) -> list[Vm]:
        """In the order they were taken."""
        state = self.state()
        return snapshots_of(state, _vm_named(state, name)["uuid"])

    def exports(self) -> list[Record]:
        """Every stream: vdi, base, first (bytes left away by tail), sent, ended (complete, short or broken)."""
        return self._log("exports.log")

    # Its disks (file backend)

    def disk_path(self, name: str, disk: int = 0) -> Path:
        """The raw file that the guest "writes" to."""
        return self.folder / "backend" / self.uuid(name) / f"{disk}.raw"

    def read_disk(self, name: str, disk: int = 0, *, offset: int = 0, length: int = -1) -> bytes:
        with self.disk_path(name, disk).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write_disk(self, name: str, disk: int = 0, *, offset: int, data: bytes) -> None:
        """As the guest would; never in the middle of a snapshot."""
        with self.store.locked(), self.disk_path(name, disk).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def frozen_path(self, snapshot: str, disk: int = 0) -> Path:
        """The raw bytes of a disk as that snapshot (its uuid) froze it."""
        vm = self.state()["vms"][snapshot]["snapshot_of"]
        return self.folder / "backend" / vm / "frozen" / snapshot / f"{disk}.raw"

    def vdi(self, name: str, disk: int = 0) -> str:
        return _disk_vdi(self.state(), name, disk)["uuid"]

    # Changing it

    @contextlib.contextmanager
    def edit(self) -> Iterator[State]:
        """The whole state, locked, to change whatever a test wants changed."""
        with self.store.change() as state:
            yield state

    def set_guest(self, name: str, **settings: object) -> None:
        """File backend: `shutdown_s`, `ignores_shutdown`."""
        path = self.folder / "backend" / self.uuid(name) / "guest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def start(self, name: str) -> None:
        """As a person at the console would (blocked operations count)."""
        self._with_power(lambda power: power.start(self.uuid(name)))

    def guest_stops(self, name: str) -> None:
        """The guest goes off by itself: shut down from inside, or crashed."""
        self._with_power(lambda power: power.backend.power_off(self.uuid(name)))
        self.vm(name)

    def restart_host(self) -> None:
        """A power cut: every guest stops, auto_poweron guests come back."""
        self._with_power(Power.restart_host)

    # Hurting it

    def fault(self, match: str, kind: str, **more: Unpack[faults.Settings]) -> None:
        """Plan a fault for the next command line that holds `match`; kinds and settings: faults.py."""
        faults.PLAN.add(self.store, {**more, "match": match, "kind": kind})

    def faults_left(self) -> list[faults.Fault]:
        return faults.PLAN.left(self.store)

    def clear_faults(self) -> None:
        faults.PLAN.clear(self.store)

    def _power(self, state: State) -> Power:
        return Power(self.store, backends.load(state["options"]["backend"], self.folder / "backend"))

    def _with_power(self, act: Callable[[Power], None]) -> None:
        act(self._power(self.state()))


def _vm_named(state: State, name: str) -> Vm:
    found = [vm for vm in real_vms(state) if name in (vm["name"], vm["uuid"])]
    if len(found) != 1:
        raise KeyError(f"{len(found)} machines are called {name!r}")
    return found[0]


def _disk_vdi(state: State, name: str, disk: int) -> Vdi:
    vbds = [vbd for vbd in _vm_named(state, name)["vbds"] if vbd["type"] == "Disk"]
    return state["vdis"][vbds[disk]["vdi"]]


def _make_files(folder: Path, machines: Sequence[MachineSpec], vms: Sequence[Vm]) -> None:
    for spec, vm in zip(machines, vms, strict=True):
        home = folder / vm["uuid"]
        home.mkdir(parents=True)
        guest = {"on": False, "shutdown_s": spec.shutdown_s, "ignores_shutdown": spec.ignores_shutdown}
        (home / "guest.json").write_text(json.dumps(guest))
        for number, disk in enumerate(spec.disks):
            with (home / f"{number}.raw").open("wb") as file:
                file.truncate(disk.size)
