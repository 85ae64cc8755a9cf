"""A vCenter, or an ESXi's own API, in front of a played ESXi host, for tests and for the lab.

with build_host(tmp_path / "host", machines=[…]) as host, VSphere(host, vcenter=True) as vsphere:
    vsphere.fault("CreateSnapshot_Task", "lost_reply")
    run_tokvm(vsphere.url, tls_ca=vsphere.ca_file, password_file=vsphere.password_file)
    assert vsphere.violations() == []
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack, cast

from tokvm.testing import pids
from tokvm.testing.certificates import Authority, fingerprint
from tokvm.testing.esxi.host import EsxHost, vm_named
from tokvm.testing.persona.host import Record
from tokvm.testing.sshd import Lifetime
from tokvm.testing.vsphere import faults
from tokvm.testing.vsphere.clock import Clock
from tokvm.testing.vsphere.ground import Ground
from tokvm.testing.vsphere.keeping import keep_moments
from tokvm.testing.vsphere.machine import Machine, machines_of
from tokvm.testing.vsphere.options import Options, Override, State, Store, default_options
from tokvm.testing.vsphere.serving import API, HOST, Serving
from tokvm.testing.vsphere.tracking import Tracker

START_TIMEOUT_S = 30.0
ADDRESS = "127.0.0.1"


class VSphere:
    """Starts at once, and again with the state it left: the same port, certificate, tracking; no session, no task, no lease."""

    def __init__(self, host: EsxHost, *, vcenter: bool, lifetime: Lifetime = Lifetime.WITH_US, **options: object) -> None:
        """options: over options.default_options. OUTLIVES_US: in a process of its own, noted in the host's folder."""
        self.host = host
        self.folder = host.folder / ("vcenter" if vcenter else "hostd")
        self.store: Store = Store(self.folder)
        self.clock = Clock(self.folder)
        self._lifetime = lifetime
        self._serving: Serving | None = None
        if not (self.folder / "state.json").exists():
            self._begin(vcenter=vcenter)
        if options:
            self.set_options(**options)
        self.start()

    def _begin(self, *, vcenter: bool) -> None:
        self.folder.mkdir(parents=True)
        self.store.write(State(options=default_options(vcenter=vcenter), overrides={}, tracking={}, versions={}, extra={}))
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(self.options["password"] + "\n")
        authority = Authority(self.folder / "tls")
        for name in (API, HOST):
            authority.server(name)
        with self.host.edit() as state:
            keep_moments(state)

    # Reaching it

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    @property
    def url(self) -> str:
        """`vpx://user@127.0.0.1:port`"""
        return f"vpx://{urllib.parse.quote(self.user, safe='')}@{ADDRESS}:{self.port}"

    @property
    def user(self) -> str:
        return self.options["user"]

    @property
    def password(self) -> str:
        return self.options["password"]

    @property
    def password_file(self) -> Path:
        return self.folder / "password"

    @property
    def ca_file(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the API's certificate."""
        return fingerprint(self.folder / "tls" / f"{API}.pem")

    def client_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))

    def start(self) -> None:
        if self._lifetime is Lifetime.WITH_US:
            if self._serving is None:
                self._serving = Serving(self.folder, self.host.folder)
        elif pids.noted(self._note) is None:
            self._start_process()

    def _start_process(self) -> None:
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tokvm.testing.vsphere", str(self.folder), str(self.host.folder)]
        with (self.folder / "serving.log").open("ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        pids.note(self._note.parent, self.folder.name, process.pid)
        until = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the played vSphere did not start: {log.name}")
            time.sleep(0.02)
        pids.disown(process)

    @property
    def _note(self) -> Path:
        return self.host.folder / "run" / f"{self.folder.name}{pids.PID_SUFFIX}"

    def close(self) -> None:
        """Every connection breaks. The folder stays."""
        if self._serving is not None:
            self._serving.close()
            self._serving = None
        pid = pids.noted(self._note)
        if pid is not None:
            pids.kill(pid)
            pids.wait_gone(pid)
            self._note.unlink(missing_ok=True)

    def restart(self) -> None:
        """As when vpxd, or hostd, restarts."""
        self.close()
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Looking at it

    @property
    def options(self) -> Options:
        return self.store.read()["options"]

    def moid(self, name: str) -> str:
        return self._machine(name).moid

    def violations(self) -> list[Record]:
        """What no client of ours may ask for. Any at all is a bug in who sent it, or in us."""
        return self._log("violations")

    def calls(self) -> list[str]:
        """The methods called, in order."""
        return [str(row["method"]) for row in self._log("calls.log") if "method" in row]

    def requests(self) -> list[Record]:
        """What was asked of /folder and of leases: request, path, range."""
        return [row for row in self._log("calls.log") if "request" in row]

    def override(self, name: str) -> Override:
        """What the VM has of its own in its cluster."""
        guest = vm_named(self.host.store.read(), name)["guest"]
        return self.store.read()["overrides"].get(guest, Override(restart_priority="", drs=""))

    def extra_config(self, name: str) -> dict[str, str]:
        return self.store.read()["extra"].get(vm_named(self.host.store.read(), name)["guest"], {})

    def tracks(self, name: str) -> bool:
        """Whether changed block tracking is enabled."""
        tracking = self.store.read()["tracking"].get(vm_named(self.host.store.read(), name)["guest"])
        return tracking is not None and tracking["enabled"]

    def _log(self, name: str) -> list[Record]:
        try:
            lines = (self.folder / name).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    # Changing and hurting it

    def set_options(self, **options: object) -> None:
        """options.Options, at once."""
        with self.store.change() as state:
            unknown = options.keys() - state["options"].keys()
            if unknown:
                raise ValueError(f"no option {sorted(unknown)}")
            cast("dict[str, object]", state["options"]).update(options)

    def fault(self, method: str, kind: str, **more: Unpack[faults.Settings]) -> None:
        """Plan a fault for the next call of a method (`folder`, `nfc`, "": any); kinds and settings: faults.py."""
        faults.PLAN.add(self.store, {**more, "match": method, "kind": kind})

    def faults_left(self) -> list[faults.Fault]:
        return faults.PLAN.left(self.store)

    def clear_faults(self) -> None:
        faults.PLAN.clear(self.store)

    def reset_tracking(self, name: str) -> None:
        """What was tracked so far is worth nothing: every changeId gets another uuid."""
        Tracker(self.store, Ground(self.host.folder)).reset(self._machine(name))

    def ha_restarts(self, name: str) -> bool:
        """vCenter: HA finds the VM off and starts it, unless its own restart priority forbids. True if it did."""
        wants = self.options["ha"] and self.override(name)["restart_priority"] != "disabled"
        return wants and self.host.ha_restarts(name)

    def drs_moves(self, name: str) -> bool:
        """vCenter: DRS moves the VM to another host, unless its own setting forbids. True if it did."""
        wants = self.options["drs"] and self.override(name)["drs"] not in ("disabled", "manual", "partiallyAutomated")
        if wants:
            self.host.vmotion_away(name)
        return wants

    def new_certificate(self) -> None:
        """The API shows another one, by the same CA."""
        self._threads().renew_certificate()

    def cut_connections(self) -> int:
        return sum(one.cut_connections() for one in self._threads().listeners.values())

    def end_sessions(self) -> None:
        self._threads().endpoint.sessions.end_all()

    def _threads(self) -> Serving:
        if self._serving is None:
            raise RuntimeError("only in a process of its own does it run; restart it")
        return self._serving

    def _machine(self, name: str) -> Machine:
        state = self.host.state()
        guest = vm_named(state, name)["guest"]
        return next(one for one in machines_of(state, vcenter=self.options["vcenter"]) if one.vm["guest"] == guest)
