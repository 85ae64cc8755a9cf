"""The forced command: one process per command line, as `xe` is on dom0.

    sshd ─ SSH_ORIGINAL_COMMAND ─► log ─► grammar ─► faults ─► act under the state's lock ─► answer

What no row of the contract allows fails and is recorded in STATE_DIR/violations. Must start fast (no numpy, no site): tests
run it thousands of times.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from tokvm.testing.persona import forced
from tokvm.testing.persona.connection import kill_connection, wait_for_hangup
from tokvm.testing.persona.forced import DROPPED, NOBODY, Drop, write
from tokvm.testing.xenserver import backend, faults, grammar, power, records, snapshots
from tokvm.testing.xenserver.errors import NotInContract, XeError, api_error
from tokvm.testing.xenserver.state import Store

POWER_PARAMS = frozenset({"power-state", "dom-id", "current-operations", "currently-attached"})


class Persona:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self._power: power.Power | None = None

    @property
    def power(self) -> power.Power:
        """Loaded when needed: most commands only read."""
        if self._power is None:
            dotted = self.store.read()["options"]["backend"]
            self._power = power.Power(self.store, backend.load(dotted, self.store.path("backend")))
        return self._power

    def answer_line(self, line: str) -> int:
        """One command, or a batch of reads with the exit code behind each."""
        try:
            commands = grammar.batch(line)
        except NotInContract as error:
            self.store.append("commands.log", {"pid": os.getpid(), "command": line})
            return self._refuse(line, error)
        if commands is None:
            return self.answer(line)
        for command in commands:
            code = self.answer(command)
            if code in (DROPPED, NOBODY):
                return code
            with contextlib.suppress(BrokenPipeError):
                os.write(1, b"\0%d\0" % code)
        return 0

    def _refuse(self, line: str, error: XeError) -> int:
        if isinstance(error, NotInContract):
            self.store.append("violations", {"command": line, "why": error.text})
        with contextlib.suppress(BrokenPipeError):
            os.write(2, (error.text + "\n").encode("utf-8", "surrogateescape"))
        return error.code

    def answer(self, line: str) -> int:
        """Do what `line` asks. Returns the exit code."""
        self.store.append("commands.log", {"pid": os.getpid(), "command": line})
        code = 1
        try:
            code = self._with_faults(grammar.parse(line), faults.PLAN.take(self.store, lambda match: match in line))
        except XeError as error:
            code = self._refuse(line, error)
        except Drop:
            code = DROPPED
            kill_connection(self.store)
        except BrokenPipeError:
            code = NOBODY
        finally:
            self.store.append("commands.log", {"pid": os.getpid(), "exit": code})
        return code

    def _with_faults(self, command: grammar.Command, plan: list[faults.Fault]) -> int:
        kinds = {fault["kind"]: fault for fault in plan}
        if "wait" in kinds:
            time.sleep(kinds["wait"]["seconds"])
        if "hang" in kinds:
            wait_for_hangup(1)
        if "refuse" in kinds:
            fault = kinds["refuse"]
            raise XeError(fault["text"]) if "text" in fault else api_error(fault["code"], "")
        if "drop" in kinds:
            raise Drop
        if "late" in kinds:
            self._do_late(command, kinds["late"])
            raise Drop
        if command.name == "vdi-export":
            self._export(command, plan)
            return 0
        text = self._do(command)
        if "lost_reply" in kinds:
            raise Drop
        if text is not None and "mute" not in kinds:
            _print(text)
        return 0

    def _export(self, command: grammar.Command, plan: list[faults.Fault]) -> None:
        from tokvm.testing.xenserver import export  # the VHD code, for exports alone

        values = command.values
        try:
            export.export(self.store, self.power, values["uuid"], values.get("base"), command.first, plan, 1)
        except export.ConnectionCut:
            raise Drop from None

    def _do_late(self, command: grammar.Command, fault: faults.Fault) -> None:
        """The client is told nothing; the toolstack does it in its own time."""
        seconds = fault["seconds"]
        if command.name == "vm-shutdown":
            force = command.values.get("force") is not None
            self.power.begin_shutdown(command.values["uuid"], force=force, after_s=seconds, hidden=fault.get("hidden", False))
            return

        def task() -> None:
            time.sleep(seconds)
            self._do(command)

        power.spawn(self.store, "late", task)

    def _do(self, command: grammar.Command) -> str | None:
        """The text to print, or None for nothing at all."""
        values = command.values
        uuid = values.get("uuid", "")
        if command.name.endswith(("-list", "-param-get")):
            return self._read(command)
        match command.name:
            case "vm-snapshot":
                return snapshots.take_snapshot(self.store, self.power, uuid, values["label"])
            case "snapshot-uninstall":
                snapshots.uninstall(self.store, self.power, uuid)
            case "vdi-destroy":
                snapshots.destroy_orphan(self.store, self.power, uuid)
            case "vm-start":
                self.power.start(uuid)
            case "vm-shutdown":
                self.power.shut_down(uuid, force=values.get("force") is not None)
            case _:
                self._change_map(command)
        return None

    def _read(self, command: grammar.Command) -> str:
        values = command.values
        uuid, param = values.get("uuid", ""), values.get("param", "")
        if param in POWER_PARAMS:
            with self.store.change() as state:
                self.power.refresh(state)
        state = self.store.read()
        if command.name == "vm-param-get":
            vm = records.find_vm(state, uuid)
            return records.vm_map_value(vm, param, values["key"]) if "key" in values else records.vm_field(vm, param)
        readers = {
            "vm-list": lambda: records.vm_list(state, param),
            "snapshot-list": lambda: records.snapshot_list(state, uuid, param),
            "vbd-list": lambda: records.vbd_list(state, uuid, param),
            "vif-list": lambda: records.vif_list(state, uuid, param),
            "vtpm-list": lambda: records.vtpm_list(state, uuid),
            "vdi-param-get": lambda: records.vdi_field(records.find_vdi(state, uuid), param),
            "sr-param-get": lambda: records.sr_field(state, uuid, param),
        }
        return readers[command.name]()

    def _change_map(self, command: grammar.Command) -> None:
        """vm-param-add, -remove and -set."""
        values = command.values
        uuid, key = values["uuid"], values["key"]
        with self.store.change() as state:
            vm = records.find_vm(state, uuid)
            if key == "ha-restart-priority":
                vm["fields"][key] = values["value"]
                return
            param = values.get("param") or ("blocked-operations" if key in grammar.BLOCK_KEY.split("|") else "other-config")
            held = vm["maps"][param]
            if command.name == "vm-param-remove":
                records.vm_map_value(vm, param, key)  # xe refuses to remove what is not there
                del held[key]
                return
            if command.name == "vm-param-add" and key in held:
                raise api_error("MAP_DUPLICATE_KEY", "VM", param, uuid, key)
            held[key] = values["value"]


def _print(text: str) -> None:
    write(1, (text + "\n").encode("utf-8", "surrogateescape"))


def main(folder: str) -> NoReturn:
    persona = Persona(Path(folder))

    def answer(line: str) -> int:
        code = persona.answer_line(line)
        sys.stdout.flush()
        return code

    forced.run(persona.store, answer, told=lambda error: api_error("INTERNAL_ERROR", repr(error)).text)
