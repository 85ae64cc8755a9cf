"""The forced command: one process per command line, as powershell.exe is, and one per sftp session.

    sshd ─ SSH_ORIGINAL_COMMAND ─┬─► the bootstrap ─► stdin ─► script by its hash ─► data ─► faults ─► act ─► @@B … @@E ─┐
                                 │                      ▲                                                              │
                                 └─► sftp-server        └──────────────── until the end of stdin ──────────────────────┘

What no row of the contract allows fails and is recorded in STATE_DIR/violations. Must start fast (no numpy, no site): tests
run it thousands of times.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

from tokvm.testing.hyperv import backend, contract, faults, scripts, shell
from tokvm.testing.hyperv.errors import OPERATION_FAILED, HostError, NotInContract
from tokvm.testing.hyperv.state import Late, State, Store
from tokvm.testing.hyperv.vmms import Vmms, with_state
from tokvm.testing.persona import forced
from tokvm.testing.persona.connection import kill_connection, wait_for_hangup
from tokvm.testing.persona.forced import DROPPED, NOBODY, Drop, write


class Persona:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.look()

    def look(self) -> None:
        """How the host is set up now: a powershell.exe may live long."""
        self.options = self.store.read()["options"]
        self.vmms = Vmms(self.store, backend.load(self.options["backend"], self.store.path("backend")))

    def answer_line(self, line: str) -> int:
        """Do what `line` asks. Returns the exit code."""
        if line == shell.SUBSYSTEM:
            from tokvm.testing.hyperv.sftp import SftpServer

            SftpServer(self.vmms).serve()
            return 0
        try:
            shell.check_command(line, self.store.path("bootstrap.ps1").read_text(encoding="ascii"))
            self.store.append("commands.log", {"pid": os.getpid(), "started": "powershell.exe"})
            return self._answer_requests()
        except NotInContract as refused:
            self.store.append("commands.log", {"pid": os.getpid(), "command": line[:200]})
            self.store.append("violations", {"command": line, "why": str(refused)})
            write(2, shell.refusal(line, self.options))
            return 1
        except Drop:
            kill_connection(self.store)
            return DROPPED
        except BrokenPipeError:
            return NOBODY

    def _answer_requests(self) -> int:
        """One after another, until there is no more or powershell.exe ends before."""
        with open(0, "rb", closefd=False) as stdin:
            while raw := shell.read_request(stdin):
                self.look()
                code = self._answer_request(raw)
                if code is not None:
                    return code
        return 0

    def _answer_request(self, raw: bytes) -> int | None:
        """None: it goes on. A number: powershell.exe ends with it."""
        tag = shell.tag_of(raw)
        try:
            name, text, data = shell.parse_request(raw)
        except HostError as error:
            self.store.append("commands.log", {"pid": os.getpid(), "command": "a request cut short"})
            self._print(tag, _failure(error))
            return 0
        self.store.append("commands.log", {"pid": os.getpid(), "command": name, "data": text})
        checked = contract.check(name, data)
        hit = {fault["kind"]: fault for fault in faults.PLAN.take(self.store, lambda match: match in ("", name))}
        if "wait" in hit:
            time.sleep(hit["wait"]["seconds"])
        if "hang" in hit:
            wait_for_hangup(1)
        if "drop" in hit:
            raise Drop
        if "crash" in hit:
            write(2, shell.encoded(shell.CRASH, self.options))
            return 1
        if "late" in hit:
            self._do_late(name, checked, hit["late"]["seconds"])
            raise Drop
        answer = _failure(_planned(hit["error"])) if "error" in hit else self._do(name, checked)
        if "lost_reply" in hit:
            raise Drop
        if "no_answer" in hit:
            return 0
        if "error_after" in hit:
            answer = _failure(_planned(hit["error_after"]))
        self._print(tag, answer, cut="cut_answer" in hit)
        return 0 if "cut_answer" in hit else None

    def _do(self, name: str, data: contract.Data) -> dict[str, object]:
        value: dict[str, object] = {}
        try:
            with_state(self.vmms, lambda state: value.update(scripts.ACTS[name](self.vmms, state, data)))
            if name == "shutdown":
                scripts.wait_for_off(self.vmms, data, value)
        except HostError as error:
            return _failure(error)
        return {"ok": True, "value": value}

    def _do_late(self, name: str, data: contract.Data, seconds: float) -> None:
        def act(state: State) -> None:
            state["later"].append(Late(script=name, data=data, due=time.time() + seconds))

        with_state(self.vmms, act)

    def _print(self, tag: str, answer: dict[str, object], *, cut: bool = False) -> None:
        if self.options["banner"]:
            write(2, shell.encoded(shell.NOISE, self.options))
        said = shell.framed({"tag": tag, **answer}, self.options)
        write(1, said[: len(said) // 2] if cut else said)


def _planned(fault: faults.Fault) -> HostError:
    type_, hresult = fault.get("type", "System.Exception"), fault.get("hresult", OPERATION_FAILED)
    return HostError(type_, hresult, fault.get("id", ""), fault.get("message", "Fehler"))


def _failure(error: HostError) -> dict[str, object]:
    return {"ok": False, "type": error.type, "message": error.message, "hresult": error.hresult, "id": error.id}


def main(folder: str) -> NoReturn:
    place = Path(folder)
    forced.run(Store(place), lambda line: Persona(place).answer_line(line))
