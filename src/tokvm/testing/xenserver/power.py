"""On and off: clean and forced shutdown, start, high availability, and what is still in hand after the client has gone.

A power operation is a task of the toolstack, not of the client that asked: it runs in a worker of its own session, and the
command only waits for it. When the client's connection dies, the task goes on, and lands.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

from tokvm.testing import pids
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.xenserver import backend as backends
from tokvm.testing.xenserver.errors import XeError, api_error, bad_power
from tokvm.testing.xenserver.records import find_vm, real_vms
from tokvm.testing.xenserver.state import HALTED, RUNNING, Operation, State, Store, Vm

DONE = b"+"  # what a worker says at a good end; saying nothing at all is dying


class Power:
    def __init__(self, store: Store, backend: backends.Backend) -> None:
        self.store = store
        self.backend = backend

    def refresh(self, state: State) -> None:
        """Look at the guests: who went off by himself, which operation died, whom HA starts again."""
        now = time.time()
        for vm in real_vms(state):
            vm["operations"] = [one for one in vm["operations"] if pids.start_tick(one["pid"]) == one["tick"]]
            if vm["power"] == RUNNING and not self.backend.is_running(vm["uuid"]):
                self._note_off(state, vm, "the guest stopped")
            if vm["domid"] >= 0 and vm["power"] == HALTED and now >= vm["linger_until"]:
                vm["domid"] = -1
        self.high_availability(state)

    def high_availability(self, state: State) -> None:
        """A protected VM that is off and not fenced is started again, whoever switched it off."""
        delay = state["options"]["ha_delay_s"]
        for vm in real_vms(state):
            due = vm["off_since"] > 0 and delay >= 0 and time.time() >= vm["off_since"] + delay
            protected = vm["fields"].get("ha-restart-priority", "") in ("restart", "best-effort")
            if due and vm["power"] == HALTED and protected and "start_on" not in vm["maps"]["blocked-operations"]:
                self._switch_on(state, vm, "HA")

    def start(self, uuid_: str) -> None:
        with self.store.change() as state:
            self.refresh(state)
            vm = find_vm(state, uuid_)
            if vm["power"] != HALTED:
                raise bad_power(uuid_, vm["name"], HALTED, vm["power"])
            reason = vm["maps"]["blocked-operations"].get("start")
            if reason is not None:
                raise api_error("OPERATION_BLOCKED", f"{uuid_} ({vm['name']})", reason)
            self._refuse_while_busy(vm)
            self._switch_on(state, vm, "vm-start")

    def restart_host(self) -> None:
        """All guests lose their power; those with auto_poweron come back unless starting them is blocked."""
        with self.store.change() as state:
            for vm in real_vms(state):
                if vm["power"] == RUNNING:
                    self.backend.power_off(vm["uuid"])
                    self._note_off(state, vm, "host restart")
                if vm["maps"]["other-config"].get("auto_poweron") == "true" and not vm["maps"]["blocked-operations"].get(
                    "start_on"
                ):
                    self._switch_on(state, vm, "auto_poweron")

    def shut_down(self, uuid_: str, *, force: bool) -> None:
        """Start the task and wait for its end."""
        raise_late(self.begin_shutdown(uuid_, force=force)())

    def begin_shutdown(self, uuid_: str, *, force: bool, after_s: float = 0.0, hidden: bool = False) -> Callable[[], str]:
        """Begin; returns what waits for the end and gives the error's text, or nothing. `hidden`: current-operations is
        silent about it, the worst that a toolstack can do."""
        name = "hard_shutdown" if force else "clean_shutdown"
        with self.store.change() as state:
            self.refresh(state)
            vm = find_vm(state, uuid_)
            if vm["power"] != RUNNING:
                raise bad_power(uuid_, vm["name"], RUNNING, vm["power"])
            if not force:
                self._refuse_while_busy(vm)
            ref = f"OpaqueRef:{new_uuid()}"
            pid, wait = spawn(self.store, name, lambda: self._shut_down_task(uuid_, ref, force=force, after_s=after_s))
            if not hidden:
                vm["operations"].append(Operation(ref=ref, name=name, pid=pid, tick=pids.start_tick(pid) or 0))
        return wait

    def _shut_down_task(self, uuid_: str, ref: str, *, force: bool, after_s: float) -> None:
        time.sleep(after_s)
        timeout_s = self.store.read()["options"]["clean_timeout_s"]
        try:
            if force:
                self.backend.power_off(uuid_)
            else:
                self.backend.shutdown(uuid_, timeout_s)
        except TimeoutError:
            raise api_error("VM_FAILED_SHUTDOWN_ACKNOWLEDGMENT", uuid_) from None
        finally:
            with self.store.change() as state:
                vm = find_vm(state, uuid_)
                vm["operations"] = [one for one in vm["operations"] if one["ref"] != ref]
                if vm["power"] == RUNNING and not self.backend.is_running(uuid_):
                    self._note_off(state, vm, "hard_shutdown" if force else "clean_shutdown")

    def _refuse_while_busy(self, vm: Vm) -> None:
        if vm["operations"]:
            raise api_error("OTHER_OPERATION_IN_PROGRESS", "VM", f"{vm['uuid']} ({vm['name']})")

    def _switch_on(self, state: State, vm: Vm, who: str) -> None:
        self.backend.power_on(vm["uuid"])
        vm["power"] = RUNNING
        vm["domid"] = state["next_domid"]
        state["next_domid"] += 1
        vm["off_since"] = 0.0
        self.store.append("events.log", {"event": "on", "vm": vm["uuid"], "who": who})

    def _note_off(self, state: State, vm: Vm, why: str) -> None:
        vm["power"] = HALTED
        vm["off_since"] = time.time()
        linger_s = state["options"]["linger_s"]
        vm["linger_until"] = vm["off_since"] + linger_s
        if linger_s <= 0:
            vm["domid"] = -1
        self.store.append("events.log", {"event": "off", "vm": vm["uuid"], "who": why})


def raise_late(text: str) -> None:
    if text:
        raise XeError(text)


def spawn(store: Store, name: str, task: Callable[[], None]) -> tuple[int, Callable[[], str]]:
    """Run `task` in a process that nobody's hang-up reaches. Returns its pid and a wait for the error it ended with.

    Forked twice, so that it is init's child; its standard streams are closed, or sshd would wait for them.
    """
    answer, report = os.pipe()
    first, said = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        grandchild = os.fork()
        if grandchild:
            os.write(said, str(grandchild).encode())
            os._exit(0)
        os.dup2(report, 3)
        os.closerange(4, 256)  # the state's lock among them: a fork holds a flock as long as its parent would
        _be_worker(store, name, task, 3)
    os.close(report)
    os.close(said)
    os.waitpid(child, 0)
    pid = int(os.read(first, 32))
    os.close(first)

    def wait() -> str:
        text = b""
        while piece := os.read(answer, 65536):
            text += piece
        os.close(answer)
        if text == DONE:
            return ""
        if not text:
            store.append("violations", {"command": name, "why": f"the persona itself failed: worker {pid} died"})
        return text.decode("utf-8", "surrogateescape") or api_error("INTERNAL_ERROR", f"worker {pid} died").text

    return pid, wait


def _be_worker(store: Store, name: str, task: Callable[[], None], report: int) -> None:
    """The rest of a worker's life. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        note = pids.note(store.path("run"), f"{name}-{os.getpid()}", os.getpid())
        try:
            task()
            code, said = 0, DONE
        except XeError as error:
            said = error.text.encode("utf-8", "surrogateescape")
        except OSError as error:
            store.append("violations", {"command": name, "why": f"the persona itself failed: {error!r}"})
            said = api_error("INTERNAL_ERROR", str(error)).text.encode("utf-8", "surrogateescape")
        finally:
            note.unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError):  # the client may have gone long ago
            os.write(report, said)
    finally:
        os._exit(code)
